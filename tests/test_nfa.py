"""The sweep over all weights of a network, against Jacobians taken one weight at a time."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from agop_book.agop import matrix_power, pearson
from agop_book.nfa import nfa, plot, summary

FEW = dict(random_state=0, rotations=1, progress=False)


def brute(model, x, module, rows=slice(None), output=lambda y: y):
    "AGOP at the input of the rows `rows` of one linear map or convolution: one Jacobian for its input alone."
    seen = []

    def cut(m, args, out):
        u = (
            args[0].clone() if args[0].requires_grad else args[0].clone().requires_grad_()
        )  # an input of its own for this use
        if isinstance(m, nn.Linear):
            new = F.linear(u, m.weight.detach(), m.bias)
        else:
            one = m.weight.ndim == 3  # a 1-d convolution is a 2-d one of height 1
            lift = (lambda t: (0, *t)) if one else tuple
            spread = (lambda t: (1, *t)) if one else tuple
            u = (
                F.unfold(
                    u[:, :, None] if one else u,
                    spread(m.kernel_size),
                    spread(m.dilation),
                    lift(m.padding),
                    spread(m.stride),
                )
                .transpose(1, 2)
                .clone()
            )
            W = torch.block_diag(*m.weight.detach().flatten(1).unflatten(0, (m.groups, -1)))
            new = (F.linear(u, W, m.bias)).transpose(1, 2).reshape(out.shape)
        seen.append(u)
        keep = torch.zeros(
            out.shape[1 if out.ndim > 2 and not isinstance(m, nn.Linear) else -1], dtype=torch.bool
        )
        keep[rows] = True
        keep = (
            keep[:, None, None]
            if out.ndim == 4
            else keep[:, None]
            if out.ndim == 3 and not isinstance(m, nn.Linear)
            else keep
        )
        return torch.where(keep, new, out.detach() if not out.requires_grad else out)

    hook = module.register_forward_hook(cut)
    y = output(model(x)).reshape(len(x), -1)
    hook.remove()
    G = 0
    for o in y.sum(0):
        for g in torch.autograd.grad(o, seen, retain_graph=True, allow_unused=True):
            if g is not None:
                G = G + torch.einsum("...i,...j->ij", g, g) / len(x)
    return G


def check(model, x, output=None, tol=1e-12, **kw):
    "Every row of the table against its own Jacobian."
    model = model.double().eval()
    table, sites = nfa(
        model,
        x,
        matrices=True,
        output=None if output is None else lambda y, b: output(y),
        **FEW,
        **kw,
    )
    modules = dict(model.named_modules())
    for row, site in zip(table.itertuples(), sites):
        module = modules[row.site]
        same = [s for s in sites if s.name == site.name]
        d, at = site.W.shape[0], [s is site for s in same].index(True)
        G = brute(model, x, module, slice(at * d, (at + 1) * d), output or (lambda y: y))
        assert site.agop().shape == (row.d_in, row.d_in) == G.shape
        assert (site.agop() - G).abs().max() <= tol * G.abs().max(), row.site
        assert abs(row.pearson - pearson(site.nfm(), matrix_power(G, 0.5))) < 1e-6, row.site
    return table


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_dense_tall_and_wide():
    check(
        nn.Sequential(
            nn.Linear(4, 9), nn.ReLU(inplace=True), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3)
        ),
        normal(7, 4),
    )


@pytest.mark.parametrize(
    "conv,shape",
    [
        (nn.Conv2d(4, 6, 3, padding=1), (5, 4, 6, 6)),
        (nn.Conv2d(4, 6, 3, stride=2), (5, 4, 7, 7)),
        (nn.Conv2d(4, 6, (3, 2), dilation=2), (5, 4, 8, 8)),
        (nn.Conv2d(4, 6, 3, groups=2), (5, 4, 6, 6)),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), (5, 4, 6, 6)),
        (nn.Conv2d(2, 12, 1, groups=2), (5, 2, 4, 4)),
        (nn.Conv2d(3, 64, 3), (3, 3, 5, 5)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4, 9)),
    ],
)
def test_convolutions(conv, shape):
    width = conv.double()(normal(*shape)).flatten(1).shape[1]
    check(
        nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(width, 3)),
        normal(*shape),
    )


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return {"logits": self.b(torch.tanh(self.a(torch.tanh(self.a(x))))), "cache": x}


def test_a_module_used_twice():
    check(Twice(), normal(6, 5), output=lambda y: y["logits"] if isinstance(y, dict) else y)


def test_outputs_of_every_form():
    model, x = Twice().double(), normal(6, 5)
    whole = nfa(model, x, **FEW)
    assert whole.pearson.equals(nfa(model, x, output=lambda y, b: y["logits"], **FEW).pearson)
    one = nfa(model, x, output=1, matrices=True, **FEW)[1][0].agop()
    assert torch.allclose(one, brute(model, x, model.a, output=lambda y: y["logits"][:, 1]))
    loss = nfa(
        model,
        [(x, torch.arange(6) % 2)],
        output=lambda y, b: F.cross_entropy(y["logits"], b[1]),
        matrices=True,
        **FEW,
    )[1][0].agop()
    each = [
        nfa(
            model,
            [(x[i : i + 1], torch.arange(6)[i : i + 1] % 2)],
            output=lambda y, b: F.cross_entropy(y["logits"], b[1]),
            matrices=True,
            **FEW,
        )[1][0].agop()
        for i in range(6)
    ]
    assert torch.allclose(
        loss, sum(each) / 6
    )  # the gradient of a mean over samples counts each sample fully


def test_parametrised_and_tied_weights():
    class Double(nn.Module):
        def forward(self, W):
            return 2 * W

    model = nn.Sequential(
        nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    model[2].weight = model[0].weight
    parametrize.register_parametrization(model[4], "weight", Double())
    table = check(model, normal(6, 4))
    assert list(table.site) == ["0", "2", "4"]


@pytest.mark.parametrize(
    "batch_first,options",
    [
        (True, {}),
        (False, {}),
        (True, dict(kdim=6, vdim=3)),
        (True, dict(bias=False, add_bias_kv=True, add_zero_attn=True)),
    ],
)
def test_torch_attention(batch_first, options):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)

        def forward(self, x):
            q, k, v = (
                x[..., :8],
                x[..., 8 : 8 + options.get("kdim", 8)],
                x[..., : options.get("vdim", 8)],
            )
            turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            return turn(self.attend(*map(turn, (q, k, v)), attn_mask=mask, need_weights=False)[0])

    model, x = Net().double().eval(), normal(3, 4, 16)
    before = model(x)
    table, sites = nfa(model, x, matrices=True, **FEW)
    assert torch.equal(model(x), before) and "forward" not in vars(model.attend)
    assert (
        list(table.kind) == ["query"] * 2 + ["key"] * 2 + ["value"] * 2 + ["attention-out"]
        and list(table["head"][:6]) == [0, 1] * 3
    )
    # the value of one head by hand: a linear map of the input, then everything as torch does it
    m, h = model.attend, 1
    weights = dict(
        zip(
            ("query", "key", "value"),
            m.in_proj_weight.chunk(3)
            if m._qkv_same_embed_dim
            else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight),
        )
    )
    for kind in weights:
        site = next(s for s in sites if s.kind == kind and s.head == h)
        assert torch.equal(site.W, weights[kind].detach()[4 * h : 4 * h + 4])
    if not options:
        u = x[..., :8].detach().requires_grad_()
        q, k, v = (
            F.linear(t, W, b).reshape(3, 4, 2, 4).transpose(1, 2)
            for t, W, b in zip(
                (x[..., :8], x[..., 8:], x[..., :8]),
                m.in_proj_weight.chunk(3),
                m.in_proj_bias.chunk(3),
            )
        )
        own = F.linear(
            u,
            m.in_proj_weight[16 + 4 * h : 16 + 4 * h + 4],
            m.in_proj_bias[16 + 4 * h : 16 + 4 * h + 4],
        )
        v = torch.stack([v[:, 0], own], 1)
        out = m.out_proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(3, 4, 8)
        )
        assert torch.allclose(out, before)
        G = (
            sum(
                torch.einsum("bti,btj->ij", g, g)
                for g in (
                    torch.autograd.grad(o, u, retain_graph=True)[0] for o in out.sum(0).flatten()
                )
            )
            / 3
        )
        assert torch.allclose(next(s for s in sites if s.kind == "value" and s.head == h).agop(), G)


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent(cell):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.out = cell(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.cell(x)[0][:, -1])

    model, x = Net().double(), normal(5, 6, 3)
    table, sites = nfa(model, x, matrices=True, **FEW)
    assert (
        table.reached.all()
        and table.site[0].startswith("cell.l0")
        and len(table) == {nn.RNN: 3, nn.GRU: 9, nn.LSTM: 9}[cell]
    )
    first = sites[
        0
    ]  # by perturbing the pre-activations of all steps through the bias: sum over steps of delta
    assert first.W.shape[1] == 7 and torch.equal(
        first.W[:, :3], model.cell.weight_ih_l0.detach()[:4]
    )


def test_frozen_half_and_dropout():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    x = normal(20, 6).float()
    with pytest.raises(ValueError, match="Dropout.*eval"):
        nfa(model, x)
    model.eval()
    want = nfa(model, x, **FEW)
    for p in model[0].parameters():
        p.requires_grad_(False)
    assert nfa(model, x, **FEW).equals(want)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True] and all(
        p.grad is None for p in model.parameters()
    )
    for dtype, tol in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        got = nfa(model.to(dtype), x, **FEW)
        assert np.allclose(got.pearson, want.pearson, atol=tol)


def test_embeddings_dicts_loaders_and_unreached():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.used, self.unused, self.never = (
                nn.Embedding(11, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 6),
            )

        def forward(self, input_ids, scale):
            h = self.used(self.embed(input_ids))
            return torch.tanh(h) * scale[:, None, None], self.unused(h)

    model = Net().requires_grad_(False)
    batch = {"input_ids": torch.randint(0, 11, (8, 5)), "scale": torch.linspace(1, 2, 8)}
    table = nfa(model, batch, **FEW)
    assert list(table.reached) == [True, False, False] and table.pearson.notna().tolist() == [
        True,
        False,
        False,
    ]
    parts = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)]
    for data in (parts, iter(parts), {k: v.numpy() for k, v in batch.items()}):
        assert np.allclose(nfa(model, data, **FEW).pearson, table.pearson, equal_nan=True)
    assert np.allclose(
        nfa(model, iter(parts), initial=model, **FEW).pearson_init, table.pearson, equal_nan=True
    )


def test_probes_agree_within_their_error():
    model = nn.Sequential(
        nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 30)
    ).double()
    x = normal(64, 10)
    exact = nfa(model, x, **FEW)
    some = nfa(model, x, probes=16, **FEW)
    assert (
        ((some.pearson - exact.pearson).abs() < 6 * some.error + 1e-3).all()
        and (some.error < 0.05).all()
        and exact.error.isna().all()
    )
    assert nfa(model, x, probes=16, **FEW).equals(some)
    x = x[:1]  # one sample, many probes: copies of the batch carry them
    assert (
        nfa(model, x, probes=4000, **FEW).pearson - nfa(model, x, **FEW).pearson
    ).abs().max() < 0.02


def test_controls():
    torch.manual_seed(3)
    net = lambda: nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 10))
    a, b = net(), net()
    x = normal(50, 30).float()
    table = nfa(a, x, initial=b, **FEW)
    assert np.allclose(table.pearson_init, nfa(b, x, **FEW).pearson)
    for i in (0, 2):
        assert (
            abs(
                table.pearson_weights[i // 2]
                - pearson(a[i].weight.T @ a[i].weight, b[i].weight.T @ b[i].weight)
            )
            < 1e-6
        )
    # the last layer's deltas are one-hot: rotating them changes nothing
    assert abs(table.pearson_forced[1] - table.pearson[1]) < 1e-6
    assert isinstance(summary(table), pd.DataFrame) and summary(table).loc["all", "sites"] == 2
    assert len(plot(table).lines) == 4


def test_batches_and_memory_do_not_change_the_result(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 7)).double(), normal(13, 4)
    want = nfa(model, x, matrices=True, **FEW)[1]
    for size in (1, 5):
        assert torch.allclose(
            nfa(model, x, matrices=True, batch_size=size, **FEW)[1][0].agop(),
            want[0].agop(),
            rtol=1e-12,
        )
    real, calls = torch.autograd.grad, []

    def scarce(y, *a, **kw):
        calls.append(len(y))
        if len(y) > 5:
            raise MemoryError
        return real(y, *a, **kw)

    monkeypatch.setattr(torch.autograd, "grad", scarce)
    with pytest.warns(UserWarning, match="out of memory"):
        got = nfa(model, x, matrices=True, **FEW)[1]
    assert torch.allclose(got[0].agop(), want[0].agop(), rtol=1e-12) and max(calls) > 5 >= min(
        calls
    )


def test_errors_name_what_is_wrong():
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    for call, match in [
        (lambda: nfa(lambda x: x, x), "model must be a torch module"),
        (lambda: nfa(nn.ReLU(), x), "no weights"),
        (lambda: nfa(nn.BatchNorm1d(3).eval(), x), "no linear"),
        (lambda: nfa(nn.Sequential(linear, nn.BatchNorm1d(2)), x), "BatchNorm1d.*eval"),
        (lambda: nfa(linear, []), "data is empty"),
        (lambda: nfa(linear, x, probes=1), "probes"),
        (lambda: nfa(linear, x, output=2), "output=2.*2 outputs"),
        (lambda: nfa(linear, x, output="logits"), "output="),
        (lambda: nfa(linear, x, output=lambda y, b: y.detach()), "no gradient path"),
        (lambda: nfa(linear, x, output=lambda y, b: y.argmax(1)), "floating"),
        (lambda: nfa(linear, x, output=lambda y, b: y.sum(0)), "samples"),
        (lambda: nfa(linear, "x"), "data must be"),
        (lambda: nfa(linear, torch.full((2, 3), torch.nan)), "the data"),
        (lambda: nfa(linear, x, initial=nn.Linear(3, 4)), "initial"),
        (lambda: nfa(linear, x.to("meta")), "data is on meta"),
        (lambda: nfa(linear, x, output="loss"), "loss"),
        (lambda: nfa(linear, x[0]), "first axis"),
        (lambda: nfa(nn.Sequential(linear, nn.Linear(2, 2)).apply(_explode), x), "'0'"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            call()


def _explode(m):
    if isinstance(m, nn.Linear) and m.in_features == 3:
        nn.init.constant_(m.weight, torch.inf)


def test_gradient_that_is_not_finite_names_its_site():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.b((self.a(x) * 0).abs().sqrt())

    with pytest.raises(ValueError, match="site 'a'"):
        nfa(Root(), torch.randn(4, 3))


def test_the_model_comes_back_as_it_was_after_an_error():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.rnn = nn.MultiheadAttention(4, 2, batch_first=True), nn.GRU(4, 4)

        def forward(self, x):
            self.rnn(self.attend(x, x, x)[0])
            raise KeyError("mine")

    model = Bad().eval()
    with pytest.raises(KeyError, match="mine"):
        nfa(model, torch.randn(2, 3, 4))
    assert (
        all(p.requires_grad for p in model.parameters())
        and torch.backends.mha.get_fastpath_enabled()
    )
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()
    )


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from test_nfa import FEW, network, nfa, normal
dist.init_process_group("gloo")
share = normal(21, 6).split([8, 13])[dist.get_rank()]
model = network()
tables = [nfa(model, share, initial=model, matrices=True, **FEW), nfa(model, [share] if dist.get_rank() else [], matrices=True, **FEW)]
if dist.get_rank(): torch.save([[torch.tensor(t.pearson.to_numpy()), *(s.agop() for s in sites)] for t, sites in tables], sys.argv[1])
dist.destroy_process_group()
"""


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()


def test_two_processes_equal_one(two_processes):
    both, lonely = torch.load(two_processes(WORKER), weights_only=True)
    for found, x in ((both, normal(21, 6)), (lonely, normal(21, 6)[8:])):
        table, sites = nfa(network(), x, matrices=True, **FEW)
        assert np.allclose(found[0].numpy(), table.pearson, atol=1e-10)
        for a, b in zip(found[1:], sites):
            assert (a - b.agop()).abs().max() < 1e-11 * b.agop().abs().max() + 1e-14
