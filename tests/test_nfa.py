"""The sweep over all weights of a network, against Jacobians taken one weight at a time."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from networks import normal
from torch import nn
from torch.nn.utils import parametrize

from agop_book.matrices import matrix_power, pearson
from agop_book.nfa import nfa, plot, summary

FEW = dict(random_state=0, rotations=1, progress=False)


def mapped(m, u):
    "(input as rows of one matrix, that matrix times the rows) of a linear map or a convolution."
    if isinstance(m, nn.Linear):
        return u, F.linear(u, m.weight.detach(), m.bias)
    sizes = [list(s) for s in (m.kernel_size, m.dilation, m.padding, m.stride)]
    if m.weight.ndim == 3:  # a 1-d convolution is a 2-d one of height 1
        u = u[:, :, None]
        sizes = [[first, *size] for first, size in zip((1, 1, 0, 1), sizes)]
    rows = F.unfold(u, *sizes).transpose(1, 2).clone()
    W = torch.block_diag(*m.weight.detach().flatten(1).unflatten(0, (m.groups, -1)))
    return rows, F.linear(rows, W, m.bias).transpose(1, 2)


def channels(m, out, rows):
    "True where an output belongs to the rows of the weight."
    linear = isinstance(m, nn.Linear)
    keep = torch.zeros(out.shape[-1 if linear else 1], dtype=torch.bool)
    keep[rows] = True
    return keep if linear else keep.reshape(-1, *(1,) * (out.ndim - 2))


def brute(model, x, module, rows=slice(None), output=lambda y: y):
    "AGOP at the input of some rows of one weight: one Jacobian for its input alone."
    seen = []

    def cut(m, args, out):
        u = args[0].clone()  # an input of its own for this use
        u = u if u.requires_grad else u.requires_grad_()
        own, new = mapped(m, u)
        seen.append(own)
        rest = out if out.requires_grad else out.detach()
        return torch.where(channels(m, out, rows), new.reshape(out.shape), rest)

    hook = module.register_forward_hook(cut)
    y = output(model(x)).reshape(len(x), -1)
    hook.remove()
    G = 0
    for o in y.sum(0):
        for g in torch.autograd.grad(o, seen, retain_graph=True, allow_unused=True):
            if g is not None:
                G = G + torch.einsum("...i,...j->ij", g, g) / len(x)
    return G


def on_outputs(output, y, batch):
    return output(y)


def check(model, x, output=None, tol=1e-12, **kw):
    "Every row of the table against its own Jacobian."
    model = model.double().eval()
    f = None if output is None else partial(on_outputs, output)
    table, sites = nfa(model, x, matrices=True, output=f, **FEW, **kw)
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


pytestmark = pytest.mark.usefixtures("seed")


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


class Attend(nn.Module):
    "Causal attention with queries, keys and values from parts of the input."

    def __init__(self, batch_first, options):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.widths = options.get("kdim", 8), options.get("vdim", 8)

    def turn(self, t):
        return t if self.attend.batch_first else t.transpose(0, 1)

    def forward(self, x):
        k, v = self.widths
        parts = x[..., :8], x[..., 8 : 8 + k], x[..., :v]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        out = self.attend(*map(self.turn, parts), attn_mask=mask, need_weights=False)
        return self.turn(out[0])


def projections(m):
    if m._qkv_same_embed_dim:
        return m.in_proj_weight.detach().chunk(3)
    return [W.detach() for W in (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)]


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
    model, x = Attend(batch_first, options).double().eval(), normal(3, 4, 16)
    before = model(x)
    table, sites = nfa(model, x, matrices=True, **FEW)
    assert torch.equal(model(x), before) and "forward" not in vars(model.attend)
    assert list(table.kind) == [*np.repeat(["query", "key", "value"], 2), "attention-out"]
    assert list(table["head"][:6]) == [0, 1] * 3
    heads = [W for weight in projections(model.attend) for W in weight.split(4)]
    for site, W in zip(sites, heads):
        assert torch.equal(site.W, W)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_value_of_one_head_by_hand(batch_first):
    "A linear map of an input of its own, then everything as torch does it."
    model, x = Attend(batch_first, {}).double().eval(), normal(3, 4, 16)
    m, u = model.attend, x[..., :8].clone().requires_grad_()
    W, b = m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3)
    q, k, v = (F.linear(t, *wb) for t, *wb in zip((x[..., :8], x[..., 8:], x[..., :8]), W, b))
    v = torch.cat([v[..., :4], F.linear(u, W[2][4:], b[2][4:])], -1)
    q, k, v = (t.reshape(3, 4, 2, 4).transpose(1, 2) for t in (q, k, v))
    h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = m.out_proj(h.transpose(1, 2).reshape(3, 4, 8))
    assert torch.allclose(out, model(x))
    grads = [torch.autograd.grad(o, u, retain_graph=True)[0] for o in out.sum(0).flatten()]
    G = sum(torch.einsum("bti,btj->ij", g, g) for g in grads) / 3
    _, sites = nfa(model, x, matrices=True, **FEW)
    assert torch.allclose(sites[5].agop(), G) and (sites[5].kind, sites[5].head) == ("value", 1)


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
    assert table.reached.all() and table.site[0].startswith("cell.l0")
    assert len(table) == {nn.RNN: 3, nn.GRU: 9, nn.LSTM: 9}[cell]
    W = sites[0].W  # on the input beside the state
    assert W.shape[1] == 7 and torch.equal(W[:, :3], model.cell.weight_ih_l0.detach()[:4])


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
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    for dtype, tol in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        got = nfa(model.to(dtype), x, **FEW)
        assert np.allclose(got.pearson, want.pearson, atol=tol)


class Looks(nn.Module):
    "A table, a layer that is used, one whose output is not differentiated, one never called."

    def __init__(self):
        super().__init__()
        self.embed, self.used = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.unused, self.never = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, input_ids, scale):
        h = self.used(self.embed(input_ids))
        return torch.tanh(h) * scale[:, None, None], self.unused(h)


@pytest.mark.filterwarnings("ignore:.* are not compared:UserWarning")
def test_embeddings_dicts_loaders_and_unreached():
    model = Looks().requires_grad_(False)
    batch = {"input_ids": torch.randint(0, 11, (8, 5)), "scale": torch.linspace(1, 2, 8)}
    table = nfa(model, batch, **FEW)
    assert list(table.reached) == list(table.pearson.notna()) == [True, False, False]
    parts = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)]
    for data in (parts, iter(parts), {k: v.numpy() for k, v in batch.items()}):
        assert np.allclose(nfa(model, data, **FEW).pearson, table.pearson, equal_nan=True)
    twice = nfa(model, iter(parts), initial=model, **FEW)
    assert np.allclose(twice.pearson_init, table.pearson, equal_nan=True)


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
    a, b = (nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 10)) for _ in range(2))
    x = normal(50, 30).float()
    table = nfa(a, x, initial=b, **FEW)
    assert np.allclose(table.pearson_init, nfa(b, x, **FEW).pearson)
    for found, i in zip(table.pearson_weights, (0, 2)):
        nfms = [m[i].weight.T @ m[i].weight for m in (a, b)]
        assert abs(found - pearson(*nfms)) < 1e-6
    # the last layer's deltas are one-hot: rotating them changes nothing
    assert abs(table.pearson_forced[1] - table.pearson[1]) < 1e-6
    assert isinstance(summary(table), pd.DataFrame) and summary(table).loc["all", "sites"] == 2
    assert len(plot(table).lines) == 4


def test_batches_and_memory_do_not_change_the_result(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 7)).double(), normal(13, 4)
    want = nfa(model, x, matrices=True, **FEW)[1]
    for size in (1, 5):
        sites = nfa(model, x, matrices=True, batch_size=size, **FEW)[1]
        assert torch.allclose(sites[0].agop(), want[0].agop(), rtol=1e-12)
    real, calls = torch.autograd.grad, []

    def scarce(y, *a, **kw):
        calls.append(len(y))
        if len(y) > 5:
            raise MemoryError
        return real(y, *a, **kw)

    monkeypatch.setattr(torch.autograd, "grad", scarce)
    with pytest.warns(UserWarning, match="out of memory"):
        got = nfa(model, x, matrices=True, **FEW)[1]
    assert torch.allclose(got[0].agop(), want[0].agop(), rtol=1e-12)
    assert max(calls) > 5 >= min(calls)


def test_memory_that_ends_in_copies_of_a_sample_halves_the_copies():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 16)).double()
    x, calls = normal(1, 4), []
    want = nfa(model, x, **FEW)

    def scarce(module, args):
        calls.append(len(args[0]))
        if calls[-1] > 5:
            raise MemoryError

    model.register_forward_pre_hook(scarce)
    with pytest.warns(UserWarning, match="1 samples x 8 copies"):
        table = nfa(model, x, **FEW)
    assert np.allclose(table.pearson, want.pearson) and calls[:4] == [1, 16, 8, 4]


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
    assert all(p.requires_grad for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled()
    for m in model.modules():
        assert not (m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m))


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from test_nfa import FEW, network, nfa, normal
dist.init_process_group("gloo")
rank, model, found = dist.get_rank(), network(), []
share = normal(21, 6).split([8, 13])[rank]
for data, initial in ((share, model), ([share] if rank else [], None)):
    table, sites = nfa(model, data, initial=initial, matrices=True, **FEW)
    found.append([torch.tensor(table.pearson.to_numpy()), *(s.agop() for s in sites)])
if rank: torch.save(found, sys.argv[1])
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
