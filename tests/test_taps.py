"""Where weights act, however they are used.

Each site against the gradient at the input of its weight, sample by sample, in float64."""

import importlib.util
import threading
import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import agop_book.memory
from agop_book.agop import agop
from agop_book.nfa import nfa, summary
from agop_book.watch import watching

FEW = dict(rotations=0, progress=False, random_state=0)


def normal(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    assert torch.backends.mha.get_fastpath_enabled()
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)


class Net(nn.Module):
    "A network that says what goes into a weight: `self.at(name, u)`, which the oracle replaces."

    cut = None

    def at(self, name, u):
        return u if self.cut is None else self.cut(name, u)


def brute(model, x, name):
    "AGOP at the input of one weight: a leaf for each input, one sample and one output at a time."
    total = 0
    for i in range(len(x)):
        leaves = []

        def cut(at, u):
            if at != name:
                return u
            leaves.append(u.detach().clone().requires_grad_())
            return leaves[-1] + (u - u.detach())

        model.cut = cut
        y = model(x[i : i + 1]).flatten()
        model.cut = None
        for o in y:
            for g in torch.autograd.grad(o, leaves, retain_graph=True, allow_unused=True):
                if g is not None:
                    total = total + g.flatten(0, -2).T @ g.flatten(0, -2) / len(x)
    return total


def same(a, b, tol=1e-10):
    return a.shape == b.shape and float((a - b).abs().max()) <= tol * float(b.abs().max())


def compare(model, x, sites, **kw):
    "The table, every site against its oracle; `sites`: name in the table -> name in `at`."
    model = model.double().eval()
    table, found = nfa(model, x, matrices=True, **FEW, **kw)
    assert list(table.site) == list(sites)
    for site in found:
        assert same(site.agop(), brute(model, x, sites[site.name])), site.name
    return table


# --- functions ---------------------------------------------------------------------------------


def use_linear(W, u):
    return F.linear(u, W)


def use_at(W, u):
    return u @ W.T


def use_left(W, u):
    return (W @ u.mT).mT


def use_matmul(W, u):
    return torch.matmul(u, W.transpose(0, 1))


def use_einsum(W, u):
    return torch.einsum("...i,oi->...o", u, W)


def use_tensordot(W, u):
    return torch.tensordot(u, W, ([2], [1]))


def use_inner(W, u):
    return torch.inner(u, W)


def use_bmm(W, u):
    return torch.bmm(u, W.T.expand(len(u), -1, -1))


def use_baddbmm(W, u):
    return torch.baddbmm(u.new_zeros(1, 1, 1), u, W.T.expand(len(u), -1, -1))


def use_addmm(W, u):
    return torch.addmm(u.new_zeros(1), u.flatten(0, 1), W.T).unflatten(0, u.shape[:2])


def use_keywords(W, u):
    return F.linear(weight=W, input=u)


def use_conv(W, u):
    return F.conv1d(u.mT, W[:, :, None]).mT


def use_copy(W, u):
    return F.linear(u, W.t().contiguous().t().clone().to(torch.float64))


def use_detached(W, u):
    return F.linear(u, W.detach())


def use_data(W, u):
    return u @ W.data.T


def use_masked(W, u):
    return u @ (W * torch.ones_like(W).tril()).T


FUNCTIONS = [f for name, f in list(globals().items()) if name.startswith("use_")]


class Raw(Net):
    "A weight that is no module, used by one function after another layer."

    def __init__(self, use, d_in=4, d_out=3):
        super().__init__()
        self.first, self.W = nn.Linear(5, d_in), nn.Parameter(torch.randn(d_out, d_in))
        self.use = use

    def forward(self, x):
        return torch.tanh(
            self.use(self.W, self.at("W", torch.tanh(self.first(self.at("first", x)))))
        )


@pytest.mark.parametrize("shape", [(4, 3), (2, 6)], ids=["wide", "tall"])
@pytest.mark.parametrize("use", FUNCTIONS, ids=lambda f: f.__name__[4:])
def test_a_parameter_in_a_function(use, shape):
    model = Raw(use, *shape)
    table = compare(model, normal(3, 6, 5), {"W": "W", "first": "first"})
    assert table.attrs["coverage"] == 1 and list(table.d_out) == [shape[1], shape[0]]


class Parts(Net):
    "Pieces of one parameter: rows, columns, a transposed view, a function of it, all at once."

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        a, b = self.W.chunk(2)
        h = F.linear(self.at("a", x), a) + F.linear(self.at("b", x.sin()), b)
        h = torch.tanh(h) @ self.W[:3, 1:]
        return torch.tanh(self.at("d", h)) @ self.W.T[1:]


def test_parts_of_a_parameter():
    model, x = Parts().double(), normal(5, 4)
    table, sites = nfa(model, x, matrices=True, **FEW)
    assert list(table.site) == ["W[0:3]", "W[0:3, 1:4]", "W[:, 1:4]", "W[3:6]"]
    W = model.W.detach()
    want = {"W[0:3]": W[:3], "W[3:6]": W[3:], "W[0:3, 1:4]": W[:3, 1:].T, "W[:, 1:4]": W[:, 1:]}
    for site in sites:
        assert torch.equal(site.W, want[site.name])
    for name, at in (("W[0:3]", "a"), ("W[3:6]", "b")):
        assert same(next(s for s in sites if s.name == name).agop(), brute(model, x, at))


class Experts(Net):
    "Experts as one parameter with three axes: every sample's tokens go to two of them."

    def __init__(self, way):
        super().__init__()
        self.router, self.way = nn.Linear(4, 3), way
        self.up, self.down = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 5, 2))

    def forward(self, x):
        gates = self.router(self.at("router", x)).softmax(-1)
        return self.way(self, x, gates)


def one_by_one(m, x, gates):
    "As in transformers: the expert's number is a tensor, its tokens are gathered."
    out, top = x.new_zeros(*x.shape[:-1], 2), gates.topk(2).indices
    for e in torch.arange(3):
        at = (top == e).any(-1)
        if not at.any():
            continue
        h = torch.tanh(F.linear(m.at(f"up{int(e)}", x[at]), m.up[e]))
        out[at] += (m.at(f"down{int(e)}", h) @ m.down[e]) * gates[at][:, e, None]
    return out


def all_at_once(m, x, gates):
    "Every expert computes every token."
    each = torch.stack([m.at(f"up{e}", x.flatten(0, 1)) for e in range(3)])
    h = torch.tanh(torch.bmm(each, m.up.transpose(1, 2)))
    h = torch.stack([m.at(f"down{e}", part) for e, part in enumerate(h)])
    out = torch.baddbmm(x.new_zeros(1, 1, 2), h, m.down)
    return (out.unflatten(1, x.shape[:2]) * gates.movedim(-1, 0)[..., None]).sum(0)


def by_subscripts(m, x, gates):
    each = torch.stack([m.at(f"up{e}", x) for e in range(3)], 2)
    h = torch.tanh(torch.einsum("btei,eoi->bteo", each, m.up))
    h = torch.stack([m.at(f"down{e}", part) for e, part in enumerate(h.unbind(2))], 2)
    return torch.einsum("btei,eio->bteo", h, m.down).mul(gates[..., None]).sum(2)


def chosen(m, x, gates):
    "Every token brings the matrices of its expert along."
    e = gates.argmax(-1).flatten()
    u = x.flatten(0, 1)
    if m.cut is not None:
        u = sum(m.at(f"up{k}", u) * (e == k)[:, None] for k in range(3))
    h = torch.tanh(torch.bmm(m.up[e], u[..., None]))[..., 0]
    if m.cut is not None:
        h = sum(m.at(f"down{k}", h) * (e == k)[:, None] for k in range(3))
    out = torch.bmm(h[:, None], m.down[e].contiguous())[:, 0]
    return (out * gates.flatten(0, 1).amax(-1)[:, None]).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("way", [one_by_one, all_at_once, by_subscripts, chosen])
def test_experts(way):
    model = Experts(way)
    names = {
        "router": "router",
        **{f"{w}[{e}]": f"{w}{e}" for w in ("up", "down") for e in range(3)},
    }
    order = {
        n: names[n] for n in ("up[0]", "up[1]", "up[2]", "down[0]", "down[1]", "down[2]", "router")
    }
    table = compare(model, normal(3, 4, 4), order)
    assert table.attrs["coverage"] == 1


class Shared(Net):
    "One input for all experts: a product that is broadcast."

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.tanh(self.at("W", x) @ self.W.unsqueeze(0)[0]).square().sum(0)


def test_an_input_shared_by_experts():
    model, x = Shared().double(), normal(6, 4)
    table, sites = nfa(model, x, matrices=True, **FEW)
    assert list(table.site) == ["W[0]", "W[1]", "W[2]"]
    for e, site in enumerate(sites):

        def rest(u, e=e):
            return sum(
                torch.tanh((u if k == e else x[:1]) @ model.W[k].detach()).square()
                for k in range(3)
            )

        G = (
            sum(
                agop(lambda u, i=i: torch.tanh(u @ model.W[e].detach()).square(), x[i : i + 1])
                for i in range(6)
            )
            / 6
        )
        assert same(site.agop(), G)


def test_grouped_experts_agree_with_single_ones():
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped_mm")

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(3, 8, 16))

        def forward(self, x):
            own = x.sum(-1).abs().mul(7).long() % 3
            order = own.argsort(stable=True)
            ends = torch.bincount(own, minlength=3).cumsum(0).to(torch.int32)
            if self.grouped:
                h = torch._grouped_mm(x[order], self.W.mT, offs=ends)
            else:
                h = torch.cat(
                    [
                        part @ self.W[e].T
                        for e, part in enumerate(
                            x[order].split(torch.bincount(own, minlength=3).tolist())
                        )
                    ]
                )
            return torch.tanh(h)[order.argsort()]

    model, x, found = Grouped(), normal(12, 16).float(), []
    for model.grouped in (True, False):
        try:
            found.append(nfa(model, x, matrices=True, **FEW))
        except RuntimeError as e:
            pytest.skip(f"grouped_mm: {e}")
    (a, sites), (b, want) = found
    assert list(a.site) == list(b.site) == ["W[0]", "W[1]", "W[2]"] and a.attrs == b.attrs
    for s, w in zip(sites, want):
        assert torch.allclose(s.agop(), w.agop(), rtol=1e-4, atol=1e-6)


# --- layers ------------------------------------------------------------------------------------


class Borrowed(Net):
    "A layer's weight, used by a function; another layer's by its own call."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Embedding(7, 3)

    def forward(self, x):
        h = torch.tanh(F.linear(self.at("a", x), self.a.weight, self.a.bias))
        return F.linear(self.at("c", torch.tanh(self.b(input=self.at("b", h)))), self.c.weight)


def test_the_weight_of_a_layer_in_a_function():
    table = compare(Borrowed(), normal(5, 4), {"a": "a", "b": "b", "c.weight": "c"})
    assert table.reached.all() and table.attrs["coverage"] == 1


class Pair(nn.Linear):
    "A linear layer that returns its bias apart, and masks its weight."

    def forward(self, u):
        return F.linear(u, self.weight * self.mask), self.bias


class Pairs(Net):
    def __init__(self):
        super().__init__()
        self.a, self.b = Pair(4, 5), Pair(5, 5)
        for m in (self.a, self.b):
            m.mask = torch.ones_like(m.weight).tril()

    def forward(self, x):
        y, b = self.a(self.at("a", x))
        return sum(self.b(self.at("b", torch.tanh(y + b))))


def test_a_layer_that_returns_a_tuple_and_masks_its_weight():
    model = Pairs()
    for m in (model.a, model.b):
        m.mask = m.mask.double()
    compare(model, normal(5, 4), {"a": "a", "b": "b"})
    _, sites = nfa(model, normal(5, 4), matrices=True, **FEW)
    assert torch.equal(sites[1].W, model.b.weight.detach().tril())


@pytest.mark.parametrize(
    "conv,shape",
    [
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (3, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1), (3, 4, 4, 4)),
        (nn.ConvTranspose2d(6, 2, 2, stride=2, bias=False), (3, 6, 3, 3)),
        (nn.ConvTranspose3d(2, 3, 2), (2, 2, 2, 3, 2)),
    ],
)
def test_transposed_convolutions(conv, shape):
    class Up(Net):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return torch.tanh(
                self.conv(self.at("conv", torch.sin(x).movedim(1, -1)).movedim(-1, 1))
            )

    model, x = Up(), normal(*shape)
    table = compare(model, x, {"conv": "conv"})
    # the matrix: each pixel's patch of outputs, without overlap, bias or padding
    _, (site,) = nfa(model, x, matrices=True, **FEW)
    eye = torch.eye(shape[1], dtype=torch.float64).reshape(
        shape[1], shape[1], *(1,) * (len(shape) - 2)
    )
    f = getattr(F, f"conv_transpose{len(shape) - 2}d")
    patches = f(eye, conv.weight.detach(), groups=conv.groups).flatten(1)
    assert torch.allclose(site.nfm(), patches @ patches.T) and table.kind[0] == "conv-transpose"
    G, values = site.agop(), torch.linalg.eigvalsh(site.agop())
    root = site.root()
    want = np.corrcoef(site.nfm().flatten(), root.flatten())[0, 1]
    assert abs(table.pearson[0] - want) < 1e-6 and torch.allclose(
        root @ root, G, atol=1e-8 * float(values[-1])
    )


class Two(Net):
    def __init__(self):
        super().__init__()
        self.join, self.out = nn.Bilinear(3, 2, 4), nn.Linear(4, 2)

    def forward(self, x):
        if self.cut is None:
            h = self.join(x[:, :3], x[:, 3:].sin())
        else:
            h = F.linear(
                self.at("join", (x[:, :3, None] * x[:, 3:].sin()[:, None]).flatten(1)),
                self.join.weight.flatten(1),
                self.join.bias,
            )
        return self.out(self.at("out", torch.tanh(h)))


def test_bilinear():
    compare(Two(), normal(5, 5), {"join": "join", "out": "out"})


@pytest.mark.parametrize(
    "layer,cell", [(nn.RNN, nn.RNNCell), (nn.GRU, nn.GRUCell), (nn.LSTM, nn.LSTMCell)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_layers_of_one_step(layer, cell, bias):
    "The recurrent layers have oracles of their own in test_rnns."

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = cell(3, 4, bias=bias)

        def forward(self, x):
            h, out = None, []
            for t in range(x.shape[1]):
                h = self.rnn(x[:, t], h)
                out.append(h[0] if isinstance(h, tuple) else h)
            return torch.stack(out, 1)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer(3, 4, bias=bias, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    a, b, x = Steps().double(), Whole().double(), normal(3, 5, 3)
    b.rnn.load_state_dict({f"{k}_l0": v for k, v in a.rnn.state_dict().items()})
    assert torch.allclose(a(x), b(x))
    (one, sites), (two, want) = nfa(a, x, matrices=True, **FEW), nfa(b, x, matrices=True, **FEW)
    assert [n.replace("rnn.", "rnn.l0.") for n in one.site] == list(two.site) and list(
        one.kind
    ) == list(two.kind)
    for s, w in zip(sites, want):
        assert same(s.agop(), w.agop())
    assert one.attrs["coverage"] == 1 and "forward" not in vars(a.rnn)
    assert (
        torch.allclose(a.rnn(x[0, 0])[0], a.rnn(x[:1, 0])[0][0])
        if cell is nn.LSTMCell
        else torch.allclose(a.rnn(x[0, 0]), a.rnn(x[:1, 0])[0])
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda m: parametrize.register_parametrization(m, "weight", nn.Tanh()),
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda m: nn.utils.prune.l1_unstructured(m, "weight", amount=0.5),
    ],
    ids=[
        "tanh",
        "weight_norm",
        "spectral_norm",
        "orthogonal",
        "old weight_norm",
        "old spectral_norm",
        "pruned",
    ],
)
def test_weights_that_are_computed(change):
    import torch.nn.utils.prune  # noqa: F401

    class Two(Net):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 5)

        def forward(self, x):
            return torch.tanh(self.b(self.at("b", torch.tanh(self.a(self.at("a", x))))))

    model = Two().double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        change(model.b)
    x = normal(6, 4)
    model(x)
    table, sites = nfa(model, x, matrices=True, **FEW)
    assert list(table.site) == ["a", "b"] and torch.allclose(sites[1].W, model.b.weight.detach())
    for site in sites:
        assert same(site.agop(), brute(model, x, site.name))
    assert table.attrs["coverage"] == 1


def test_two_layers_share_a_weight_transposed_and_not():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.enc, self.dec = nn.Linear(4, 4), nn.Linear(4, 4)
            self.dec.weight = self.enc.weight

        def forward(self, x):
            h = torch.tanh(self.dec(self.at("dec", torch.tanh(self.enc(self.at("enc", x))))))
            return torch.tanh(F.linear(self.at("back", h), self.enc.weight.t()))

    compare(Tied(), normal(5, 4), {"enc": "enc", "enc.weight": "back", "dec": "dec"})


# --- inputs that samples share -----------------------------------------------------------------


class Positions(Net):
    "A layer on a table that samples have in common (DeBERTa, Swin V2), and one on states of zeros."

    def __init__(self):
        super().__init__()
        self.table, self.place, self.state, self.out = (
            nn.Embedding(6, 3),
            nn.Linear(3, 4),
            nn.Linear(4, 4, bias=False),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        place = torch.tanh(self.place(self.at("place", self.table(torch.arange(x.shape[1])))))
        h = torch.zeros(len(x), 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = torch.tanh(self.state(self.at("state", h)) + x[:, t] * place[t])
        return self.out(self.at("out", h))


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_what_samples_have_in_common_is_pulled_back_for_each(batch_size):
    compare(
        Positions(),
        normal(4, 3, 4),
        {"place": "place", "state": "state", "out": "out"},
        batch_size=batch_size,
    )


def test_states_of_zeros_are_not_shared(monkeypatch):
    calls, model = [], Positions().double()
    model.place.requires_grad_(False)
    real = model.forward

    def forward(x):
        calls.append(len(x))
        h = torch.zeros(len(x), 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = torch.tanh(model.state(h) + x[:, t])
        return model.out(h)

    model.forward = forward
    with pytest.warns(UserWarning, match="place.weight"):
        nfa(model, normal(4, 3, 4), **FEW)
    assert 1 not in calls and real is not None  # never one sample at a time


# --- what is not seen is said ------------------------------------------------------------------


class Hidden(nn.Module):
    "A product that nobody can hear."

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, W):
            ctx.save_for_backward(W)
            return x @ W

        @staticmethod
        def backward(ctx, g):
            return g @ ctx.saved_tensors[0].T, None

    def __init__(self):
        super().__init__()
        self.a, self.W, self.unused, self.scale = (
            nn.Linear(4, 4),
            nn.Parameter(torch.randn(4, 5)),
            nn.Linear(4, 2),
            nn.Parameter(torch.ones(5, 2)),
        )
        self.table, self.place, self.bias = (
            nn.Embedding(50, 4),
            nn.Parameter(torch.zeros(3, 4)),
            nn.Parameter(torch.zeros(1, 1, 4)),
        )

    def forward(self, x):
        h = torch.tanh(self.a(x) + self.place[: x.shape[1]] + self.bias)
        return (self.Product.apply(h, self.W)[..., None] * self.scale).sum(-2)


def test_weights_that_are_left_out_are_named():
    model = Hidden()
    with pytest.warns(
        UserWarning,
        match=r"70.4% .*: W \(.*\), scale \(used by mul.*\), unused.weight \(not used\)",
    ) as seen:
        table = nfa(model, torch.randn(6, 3, 4), **FEW)
    assert len(seen) == 1 and table.attrs["coverage"] == pytest.approx(
        16 / (16 + 20 + 10 + 8)
    ) == pytest.approx(1 - 0.7037, abs=1e-4)


def test_summary_counts_what_is_not_reached():
    model = nn.ModuleDict(dict(a=nn.Linear(3, 3), q_proj=nn.Linear(3, 3)))
    model.forward = lambda x: model["a"](x)
    with pytest.warns(UserWarning, match="q_proj.weight"):
        table = nfa(model, torch.randn(5, 3), **FEW)
    rows = summary(table)
    assert (
        rows.loc["all", "unreached"] == 1
        and rows.loc["query", "sites"] == 0
        and rows.loc["query", "unreached"] == 1
        and np.isnan(rows.loc["query", "pearson"])
    )


def test_only_some_sites():
    model, x = Borrowed().double(), normal(5, 4)
    whole, some = nfa(model, x, **FEW), nfa(model, x, only="^[ac]", **FEW)
    assert (
        list(some.site) == ["a", "c.weight"]
        and np.allclose(some.pearson, whole.pearson[[0, 2]])
        and some.attrs["coverage"] == 1
    )


# --- quantised weights -------------------------------------------------------------------------


class Codes(nn.Module):
    "int8 codes with a scale for each row; `way` decides how the numbers are made."

    def __init__(self, W, way):
        super().__init__()
        self.out_features, self.in_features, self.way = *W.shape, way
        self.register_buffer("scale", W.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (W / self.scale).round().to(torch.int8))

    def numbers(self):
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x):
        if self.way == "torch":
            return F.linear(x, self.numbers())
        return Hidden.Product.apply(x, self.numbers().T)


class AsksFor(Codes):
    def dequantize(self):
        return self.numbers()


@pytest.mark.parametrize("way", ["torch", "asked", "hidden", "packed"])
def test_codes_are_never_compared(way):
    W, x = normal(5, 4), normal(6, 4)
    layer = AsksFor(W, "hidden") if way == "asked" else Codes(W, way)
    if way == "packed":
        layer.weight = layer.weight.view(torch.uint8).reshape(-1, 1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 2)).double()
    if way == "packed":
        layer.numbers = lambda: W
        with pytest.raises(ValueError, match="site '2'.*quantised"):
            nfa(model, x, **FEW)
        return
    if way == "hidden":
        with pytest.warns(UserWarning, match="2.weight"):
            assert list(nfa(model, x, **FEW).reached) == [True, False, True]
        return
    plain = nn.Sequential(
        model[0], nn.Tanh(), nn.Linear(4, 5, bias=False), nn.Tanh(), model[4]
    ).double()
    plain[2].weight.data = layer.numbers()
    (table, sites), (want, wanted) = (
        nfa(model, x, matrices=True, **FEW),
        nfa(plain, x, matrices=True, **FEW),
    )
    assert list(table.site) == ["0", "2", "4"] and np.allclose(table.pearson, want.pearson)
    for s, w in zip(sites, wanted):
        assert same(s.agop(), w.agop())


def test_quantised_layers_of_torch_are_refused():
    torch.ao = pytest.importorskip("torch.ao")

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self._packed_params = object()

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="site '1'.*quantised"):
        nfa(nn.Sequential(nn.Linear(2, 2), Packed()), torch.randn(3, 2), **FEW)


# --- checkpoints, modes, chance ----------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self, widths, **options):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(widths, widths[1:])
        )
        self.options = options

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, **self.options) if self.options else layer(x)
        return x


@pytest.mark.parametrize("widths", [(4, 4, 4, 4), (3, 6, 2, 5)])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts(reentrant, widths):
    model, x = Deep(widths, use_reentrant=reentrant).double(), normal(5, widths[0])
    table, sites = nfa(model, x, matrices=True, **FEW)
    model.options = {}
    want, wanted = nfa(model, x, matrices=True, **FEW)
    assert table.equals(want) and all(
        torch.equal(s.agop(), w.agop()) for s, w in zip(sites, wanted)
    )
    model.options = dict(use_reentrant=reentrant)
    y = model(x.requires_grad_())  # and checkpoints work again afterwards
    assert ("Checkpoint" in type(y.grad_fn).__name__) == reentrant
    y.sum().backward()


class Chance(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.way = nn.Linear(4, 4), nn.Linear(4, 2), way

    def forward(self, x):
        h = self.a(x)
        if self.way == "dropout":
            h = F.dropout(h, 0.001, self.training)
        if self.way == "rrelu":
            h = F.rrelu(h, training=self.training)
        if self.way == "drop path":
            h = h * torch.empty(len(h), 1).bernoulli_(0.999) if self.training else h
        if self.way == "layer drop":
            h = h if np.random.random() < 2 else h * 0
        if self.way == "noise":
            h = h + torch.randn_like(h)
        if self.way == "attention":
            h = F.scaled_dot_product_attention(
                h[:, None], h[:, None], h[:, None], dropout_p=0.1 * self.training
            )[:, 0]
        return self.b(torch.tanh(h))


@pytest.mark.parametrize(
    "measure", [lambda m, x: nfa(m, x, **FEW), lambda m, x: agop(m, x)], ids=["nfa", "agop"]
)
@pytest.mark.parametrize("way", ["dropout", "rrelu", "drop path", "attention"])
def test_chance_in_training_mode_is_refused(measure, way):
    model, x = Chance(way).train(), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"training mode.*eval"):
        measure(model, x)
    measure(model.eval(), x)


@pytest.mark.parametrize(
    "measure", [lambda m, x: nfa(m, x, **FEW), lambda m, x: agop(m, x)], ids=["nfa", "agop"]
)
def test_other_chance(measure):
    x = torch.randn(3, 4)
    measure(Chance("none").train(), x)  # a harmless network in training mode
    measure(Chance("layer drop").eval(), x)  # draws, but gives the same
    with pytest.raises(ValueError, match="random numbers"):
        measure(Chance("noise").eval(), x)


class Frozen(nn.Module):
    "A backbone under no_grad."

    def __init__(self):
        super().__init__()
        self.backbone, self.head = (
            nn.Sequential(
                nn.Linear(4, 4), nn.Tanh(), nn.MultiheadAttention(4, 2, batch_first=True)
            ),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        with torch.no_grad():
            h = self.backbone[:2](x)
            h = self.backbone[2](h, h, h)[0]
        return self.head(h)


def test_parts_under_no_grad():
    model, x = Frozen(), torch.randn(5, 3, 4)
    with pytest.warns(UserWarning, match=r"backbone.0.weight \(runs under torch.no_grad"):
        table = nfa(model, x, **FEW)
    assert list(table.site[table.reached]) == ["head"]
    with torch.no_grad():
        h = model.backbone[2](*(model.backbone[:2](x),) * 3)[0]
    assert np.allclose(table.pearson.iloc[-1], nfa(model.head, h, **FEW).pearson[0])


def test_inference_mode():
    model, x = Deep((4, 4, 4)), torch.randn(5, 4)
    want = nfa(model, x, **FEW)
    with torch.inference_mode():
        made, other = x.clone(), Deep((4, 4, 4))
        assert nfa(model, made, **FEW).equals(want)
    for data in (made, [made, made], {"x": made}):
        assert np.allclose(nfa(model, data, **FEW).pearson, want.pearson)
    with pytest.raises(ValueError, match=r"layers.0.0.weight.*inference_mode"):
        nfa(other, x, **FEW)


# --- data --------------------------------------------------------------------------------------


def test_frames_and_dtypes():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(6, 4)
    want = nfa(model, x, **FEW)
    for data in (
        pd.DataFrame(x.numpy()),
        pd.DataFrame(x.double().numpy()),
        [pd.DataFrame(x.numpy())],
        x.numpy(),
    ):
        assert np.allclose(nfa(model, data, **FEW).pearson, want.pearson, atol=1e-6)
    whole = torch.arange(24).reshape(6, 4)
    assert np.allclose(
        nfa(model, pd.DataFrame(whole.numpy()), **FEW).pearson,
        nfa(model, whole.float(), **FEW).pearson,
    )
    with pytest.raises(TypeError, match=r"site '0'.*float"):
        nfa(model, whole, **FEW)
    with pytest.raises(TypeError, match="complex"):
        nfa(model, whole + 1j, **FEW)
    with pytest.raises(TypeError, match="data"):
        nfa(model, pd.DataFrame({"a": ["x", "y"]}), **FEW)
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="batch_size"):
            nfa(model, x, batch_size=size, **FEW)
    half = nfa(model.bfloat16(), x.bfloat16(), probes=4, **FEW)
    assert half.reached.all() and half.pearson.notna().all()


# --- memory, threads ---------------------------------------------------------------------------


def test_the_sums_are_planned_before_the_work(monkeypatch):
    calls = []

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.huge = nn.Linear(4, 4), nn.Linear(30_000, 30_000, device="meta")

        def forward(self, x):
            calls.append(1)

    model = Wide()
    monkeypatch.setattr(
        "agop_book.taps.plan", lambda *a, **k: agop_book.memory.plan(*a, **{**k, "limit": 2**32})
    )
    with pytest.raises(MemoryError, match=r"huge \(6.7 GiB\).*4.0 GiB are free.*only="):
        nfa(model, torch.randn(3, 4), **FEW)
    assert not calls

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(1900, 1800))

        def forward(self, x):
            return torch.tanh(x @ self.W)

    monkeypatch.setattr(
        "agop_book.taps.plan", lambda *a, **k: agop_book.memory.plan(*a, **{**k, "limit": 2**22})
    )
    with pytest.raises(MemoryError, match=r"the largest: W"):
        nfa(Late(), torch.randn(3, 1900), **FEW)


def test_one_model_from_several_threads():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double(), normal(8, 4)
    attend = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()
    want, errors, found, stop = nfa(model, x, **FEW), [], [], threading.Event()

    def measure():
        try:
            for _ in range(5):
                found.append(nfa(model, x, **FEW))
                nfa(attend, x.reshape(4, 2, 4), **FEW)
        except Exception as e:
            errors.append(e)  # told below

    def infer():
        while not stop.is_set():
            model(x), attend(x[:, None])

    threads = [threading.Thread(target=measure) for _ in range(3)]
    other = threading.Thread(target=infer)
    for t in (*threads, other):
        t.start()
    for t in threads:
        t.join()
    stop.set()
    other.join()
    assert not errors and len(found) == 15 and all(table.equals(want) for table in found)
    assert all(p.requires_grad for p in model.parameters())


def test_a_watch_puts_everything_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTMCell(2, 2))
    with pytest.raises(KeyError), watching(model) as watch:
        assert [tap.name for tap in watch.taps] == ["0", "1.gates"] and not model[
            0
        ].weight.requires_grad
        raise KeyError("mine")
    assert model[0].weight.requires_grad and "forward" not in vars(model[1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- whole families: torchvision, transformers, peft (tiny, random weights) --------------------

IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 0]])
SMALL = dict(
    vocab_size=7,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    use_cache=False,
    num_hidden_layers=2,
)
MOE = dict(
    hidden_size=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts_per_tok=2,
    max_position_embeddings=8,
)


def needs(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def hub(cls, config, **arguments):
    needs("transformers")
    import transformers

    if not hasattr(transformers, cls):
        pytest.skip(f"this transformers has no {cls}")
    config = getattr(transformers, config)(**{**SMALL, **arguments})
    config._experts_implementation = "eager"  # the grouped product of torch knows no float64
    model = getattr(transformers, cls)(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.4)
    return model, IDS


def swin():
    needs("torchvision")
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=3), torch.randn(
        2, 3, 8, 8
    )


def mixtral():
    return hub(
        "MixtralForCausalLM", "MixtralConfig", intermediate_size=6, num_local_experts=3, **MOE
    )


def olmoe():
    return hub("OlmoeForCausalLM", "OlmoeConfig", intermediate_size=6, num_experts=3, **MOE)


def gpt_oss():
    return hub(
        "GptOssForCausalLM",
        "GptOssConfig",
        intermediate_size=6,
        num_local_experts=3,
        head_dim=4,
        layer_types=["full_attention"] * 2,
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
        **MOE,
    )


def deepseek():
    return hub(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        intermediate_size=6,
        moe_intermediate_size=6,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=4,
        kv_lora_rank=4,
        qk_rope_head_dim=2,
        qk_nope_head_dim=4,
        v_head_dim=4,
        **{**MOE, "num_key_value_heads": 2},
    )


def deberta():
    "Its projections also act on a table of distances, which all samples share."
    return hub(
        "DebertaV2ForTokenClassification",
        "DebertaV2Config",
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=6,
        relative_attention=True,
        max_relative_positions=4,
        position_buckets=2,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        pad_token_id=0,
        max_position_embeddings=8,
    )


def mamba():
    return hub(
        "MambaForCausalLM",
        "MambaConfig",
        hidden_size=8,
        state_size=3,
        expand=2,
        conv_kernel=2,
        time_step_rank=2,
    )


def gpt2(**more):
    return hub(
        "GPT2LMHeadModel",
        "GPT2Config",
        n_positions=8,
        n_embd=6,
        n_layer=2,
        n_head=3,
        num_hidden_layers=2,
        **more,
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_transformers(reentrant):
    model, batch = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    want = nfa(model.eval(), batch, **FEW)
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    assert nfa(model.train(), batch, **FEW).equals(
        want
    )  # without dropout, training mode is harmless


class Shifts:
    "Zeros added to every input of some weights: the AGOP is made of the gradients at them."

    def __init__(self, sites):
        self.sites, self.leaves = sites, [[] for _ in sites]

    def __call__(self, x, w, y):
        "The output `y` = x w^T with the shifts of all sites whose rows stand in `w`."
        for site, leaves in zip(self.sites, self.leaves):
            rows, W = len(site.W), site.W
            if w.ndim != 2 or w.shape[1] != W.shape[1] or len(w) < rows:
                continue
            first = next(
                (r for r in range(0, len(w) - rows + 1) if torch.equal(w[r : r + rows], W)), None
            )
            if first is None:
                continue
            leaves.append(torch.zeros(*x.shape[:-1], W.shape[1], dtype=x.dtype, requires_grad=True))
            y = y + F.pad(
                torch.mul(leaves[-1].unsqueeze(-2), W).sum(-1), (first, len(w) - first - rows)
            )
        return y


def patched(monkeypatch, shifts):
    linear, addmm, matmul = F.linear, torch.addmm, torch.Tensor.__matmul__
    monkeypatch.setattr(
        F,
        "linear",
        lambda input, weight, bias=None: shifts(input, weight, linear(input, weight, bias)),
    )
    monkeypatch.setattr(torch, "addmm", lambda b, x, w: shifts(x, w.T, addmm(b, x, w)))

    def at(a, b):
        if b.ndim == 2:
            return shifts(a, b.T, matmul(a, b))
        return shifts(b.mT, a, matmul(a, b).mT).mT if a.ndim == 2 else matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", at)


def by_hand(model, batch, sites, monkeypatch, layers=()):
    "AGOP of every site, sample by sample; `layers`: [(module, matrix)] get zeros at their output."
    total = [0.0] * len(sites)
    for i in range(len(batch)):
        shifts = Shifts(sites)
        with monkeypatch.context() as patch:
            if not layers:
                patched(patch, shifts)
            hooks = [
                m.register_forward_hook(lambda m, args, out, W=W: shifts(args[0], W, out))
                for m, W in layers
            ]
            y = model(batch[i : i + 1])
            for hook in hooks:
                hook.remove()
        leaves = [leaf for some in shifts.leaves for leaf in some]
        for o in getattr(y, "logits", y).flatten():
            grads = iter(torch.autograd.grad(o, leaves, retain_graph=True, allow_unused=True))
            for k, some in enumerate(shifts.leaves):
                for g in (next(grads) for _ in some):
                    if g is not None:
                        total[k] = total[k] + g.flatten(0, -2).T @ g.flatten(0, -2) / len(batch)
    return total


@pytest.mark.parametrize(
    "build,least",
    [
        (swin, 1.0),
        (mixtral, 0.7),
        (olmoe, 0.7),
        (gpt_oss, 0.7),
        (deepseek, 0.7),
        (mamba, 0.85),
        (deberta, 1.0),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_family(build, least, monkeypatch):
    model, batch = build()
    model = model.double().eval()
    batch = batch.double() if batch.is_floating_point() else batch
    monkeypatch.setattr(
        torch, "float32", torch.float64
    )  # transformers takes norms and routes in single precision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an expert without a token, Mamba's A
        table, sites = nfa(model, batch, matrices=True, **FEW)
    counted = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.ndim > 1 and "embed" not in n and "bias" not in n
    )
    seen = sum(s.weight.numel() for s in sites if s.reached)
    assert table.attrs["coverage"] >= least and (
        build is mamba or table.attrs["coverage"] == pytest.approx(seen / counted)
    )
    sites = [s for s in sites if s.kind != "conv"]  # convolutions are in test_nfa
    for site, G in zip(sites, by_hand(model, batch, sites, monkeypatch)):
        assert torch.is_tensor(G) == site.reached, site.name
        if site.reached:
            assert same(site.agop(), G, 1e-8), site.name


def adapted(**options):
    needs("peft")
    import peft

    model, batch = gpt2()
    config = {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**config)).double().eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.normal_(0, 0.4)
    return model, batch


def in_state(state):
    "GPT-2 with adapters that are one, with magnitudes, two, merged or off."
    model, batch = adapted(use_dora=state == "dora")
    if state == "two":
        import peft

        more = peft.LoraConfig(r=1, target_modules=["c_fc"], fan_in_fan_out=True)
        model.add_adapter("more", more)
        model.base_model.set_adapter(["default", "more"])
        for n, p in model.named_parameters():
            if ".more." in n:
                nn.init.normal_(p, 0, 0.4)
        model.double().eval()
    if state == "merged":
        model.merge_adapter()
    if state == "off":
        model.base_model.disable_adapter_layers()
    return model, batch


def weights_by_hand(model, state):
    "[(name, layer, W0 + s B A), ...] from the formulas of LoRA and DoRA."
    layers = []
    for name, m in model.named_modules():
        if not hasattr(m, "lora_A"):
            continue
        W = m.base_layer.weight.detach().T.clone()
        for a in m.lora_A if state in ("apart", "two", "dora") else ():
            W += m.scaling[a] * m.lora_B[a].weight.detach() @ m.lora_A[a].weight.detach()
        if state == "dora":
            magnitude = m.lora_magnitude_vector["default"].weight.detach()
            W *= (magnitude / W.norm(dim=1))[:, None]
        layers.append((name, m, W))
    return layers


@pytest.mark.parametrize("state", ["apart", "dora", "two", "merged", "off"])
def test_adapters_are_part_of_the_weight(state, monkeypatch):
    model, batch = in_state(state)
    layers = weights_by_hand(model, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table, sites = nfa(model, batch, matrices=True, **FEW)
    plain, wanted = nfa(gpt2()[0].double().eval(), batch, matrices=True, **FEW)
    assert list(table.site.str.removeprefix("base_model.model.")) == list(plain.site)
    assert list(table.kind) == list(plain.kind) and list(table["head"]) == list(plain["head"])
    for name, _, W in layers:
        assert torch.allclose(
            torch.cat([s.W for s in sites if s.name == name]), W, rtol=0, atol=1e-12
        )
    exact = [s for s in sites if any(s.name == name for name, *_ in layers)]
    for site in exact:
        site.weight = torch.cat([W for n, _, W in layers if n == site.name])[_rows(site, layers)][
            None
        ]
    found = by_hand(model, batch, exact, monkeypatch, [(m, W) for _, m, W in layers])
    for site, G in zip(exact, found):
        assert same(site.agop(), G, 1e-8), site.name
    if state in ("apart", "two"):
        assert table.attrs["coverage"] == 1


def test_adapters_on_experts(monkeypatch):
    needs("peft")
    import peft

    model, batch = mixtral()
    model = (
        peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]
            ),
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        [p.normal_(0, 0.4) for n, p in model.named_parameters() if "lora_" in n]
    monkeypatch.setattr(torch, "float32", torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table, sites = nfa(model, batch, matrices=True, **FEW)
    ours = [s for s in sites if "experts.gate_up_proj[" in s.name]
    assert len(ours) >= 3 and not any("lora" in name for name in table.site)
    wrapper = next(m for m in model.modules() if type(m).__name__ == "ParamWrapper")
    merged = wrapper.get_param().detach() + wrapper.get_delta_weight("default").detach()
    for site in ours[:2]:
        assert "layers.0" in site.name and torch.allclose(site.W, merged[int(site.name[-2])])
    for site, G in zip(ours, by_hand(model, batch, ours, monkeypatch)):
        assert same(site.agop(), G, 1e-8), site.name


def _rows(site, layers):
    "Which rows of its layer a site is."
    W = next(W for n, _, W in layers if n == site.name)
    first = next(
        r
        for r in range(len(W))
        if torch.allclose(W[r : r + len(site.W)], site.W, rtol=0, atol=1e-12)
    )
    return slice(first, first + len(site.W))


def test_vmap_is_told():
    class Each(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return torch.vmap(lambda u: torch.tanh(self.W @ u))(x)

    with pytest.raises(
        ValueError, match="site 'W' runs inside torch.vmap|Site 'W' runs inside torch.vmap"
    ):
        nfa(Each(), torch.randn(5, 4), **FEW)


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from test_taps import FEW, Experts, nfa, normal, one_by_one
dist.init_process_group("gloo")
torch.manual_seed(0)
model, x = Experts(one_by_one).double(), normal(6, 4, 4)
rank, found = dist.get_rank(), []
for data in ([x] if rank else [], x.split(3)[rank]):         # at first one has no data
    table, sites = nfa(model, data, matrices=True, **FEW)
    found.append([s.agop() for s in sites] + [torch.tensor(table.attrs["coverage"])])
if not rank: torch.save(found, sys.argv[1])
dist.destroy_process_group()
"""


def test_processes_agree_on_what_was_found(two_processes):
    found = torch.load(two_processes(WORKER), weights_only=True)
    torch.manual_seed(0)
    table, sites = nfa(Experts(one_by_one).double(), normal(6, 4, 4), matrices=True, **FEW)
    for *some, share in found:
        assert float(share) == table.attrs["coverage"] and len(some) == len(sites)
        for a, b in zip(some, sites):
            assert same(a, b.agop())


def shadowed(layer, calls):
    "The layer with a forward of its own on the instance, as accelerate sets it."
    old = layer.forward

    def forward(*args, **kwargs):
        calls.append(len(args))
        return old(*args, **kwargs)

    layer.forward = forward
    return layer


@pytest.mark.parametrize("make", [
    lambda: nn.LSTM(3, 4, batch_first=True), lambda: nn.GRU(3, 4, batch_first=True),
    lambda: nn.MultiheadAttention(4, 2, batch_first=True), lambda: nn.GRUCell(3, 4)])
def test_a_layer_with_its_own_forward_is_refused_and_keeps_it(make):
    layer = shadowed(make(), [])
    kept, model = layer.forward, nn.Sequential(nn.Linear(3, 3), layer).double().eval()
    with pytest.raises(ValueError, match="site '1'.*forward of its own.*del module.forward"):
        nfa(model, normal(2, 5, 3), **FEW)
    assert vars(layer)["forward"] is kept


def test_what_replaces_a_forward_puts_the_old_one_back():
    calls = []
    layer = shadowed(nn.Linear(3, 3), calls)
    kept = layer.forward
    with watching(nn.Sequential(layer)) as watch:
        watch.replace(layer, layer.forward, wraps=True)
        assert layer.forward is not kept
    assert layer.forward is kept and not calls


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.layer(x.mul_(2).add_(1))


def test_a_model_that_changes_its_input_changes_no_data():
    model, x = InPlace().eval(), normal(6, 3)
    model.layer = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    before = x.clone()
    table, sites = nfa(model, x, matrices=True, **FEW)
    assert torch.equal(x, before)
    _, wanted = nfa(model.layer, 2 * x + 1, matrices=True, **FEW)
    for site, want in zip(sites, wanted):
        torch.testing.assert_close(site.agop(), want.agop())


class Some(nn.Module):
    "Three matrices, of which two are used."

    def __init__(self, used):
        super().__init__()
        self.w, self.used = nn.ParameterList([torch.randn(4, 4) for _ in range(3)]), used

    def forward(self, x):
        for i in self.used:
            x = (x @ self.w[i]).tanh()
        return x


def test_initial_is_matched_by_name():
    model, first = Some([0, 1]), Some([1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = nfa(model, torch.randn(5, 4), initial=first, **FEW).set_index("site")
    assert table.index.tolist() == ["w.0", "w.1"]
    assert np.isnan(table.pearson_weights["w.0"])
    A, B = (m.w[1].detach().double() for m in (model, first))
    want = np.corrcoef((A @ A.T).flatten(), (B @ B.T).flatten())[0, 1]
    assert table.pearson_weights["w.1"] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e-19, 1e19, 1e30])
def test_gradients_of_any_size_in_float32(size):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(9, 4)
    want, wanted = nfa(model, x, matrices=True, **FEW)
    table, sites = nfa(model, x, matrices=True, output=lambda y, b: y * size, **FEW)
    assert table.reached.all()
    np.testing.assert_allclose(table.pearson, want.pearson, atol=1e-5)
    for site, w in zip(sites, wanted):
        torch.testing.assert_close(site.moments / size**2, w.moments, rtol=1e-4, atol=0)


def test_large_gradients_in_half_precision():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    half, x = nn.Sequential(model[0], model[1], model[2]).half(), torch.randn(9, 4)
    table = nfa(half, x, output=lambda y, b: y * 300, **FEW)
    np.testing.assert_allclose(table.pearson, nfa(model.float(), x, **FEW).pearson, atol=5e-3)


class Mean(nn.Module):
    "Keeps a moving average while it trains, in place or by another tensor."

    def __init__(self, inplace):
        super().__init__()
        self.register_buffer("mu", torch.zeros(3))
        self.inplace = inplace

    def forward(self, x):
        if self.training and self.inplace:
            self.mu.mul_(0.9).add_(x.detach().mean(0))
        elif self.training:
            self.mu = 0.9 * self.mu + x.detach().mean(0)
        return x - self.mu


def spectral():
    "Its vectors are those of other numbers, so that they move at the next call."
    layer = parametrizations.spectral_norm(nn.Linear(3, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    return layer


@pytest.mark.parametrize("make, x", [
    (lambda: Mean(True), torch.ones(4, 3)), (lambda: Mean(False), torch.ones(4, 3)),
    (spectral, torch.ones(4, 3)),
    (lambda: nn.InstanceNorm1d(2, track_running_stats=True), torch.rand(4, 2, 3))])
def test_training_mode_with_state_is_refused_and_restored(make, x):
    model = nn.Sequential(make(), nn.Linear(3, 2)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for measure in (lambda: nfa(model, x, **FEW), lambda: agop(model, x)):
        with pytest.raises(ValueError, match=r"training mode.*\.eval\(\)"):
            measure()
        for k, v in model.state_dict().items():
            assert torch.equal(v, before[k]), k
    assert len(nfa(model.eval(), x, **FEW))


@pytest.mark.parametrize("name, values", {
    "output": (True, "losses", 1.5), "rotations": (-1, 2.5, None, "2", 2**63, True),
    "probes": (1, True, 2**40, "4"), "only": ("(", 3, b"0"),
    "batch_size": (True, 0, 2**63)}.items())
def test_arguments_are_checked_before_the_work(name, values):
    model = nn.Sequential(nn.Linear(3, 2))
    model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    for value in values:
        with pytest.raises(ValueError, match=name):
            nfa(model, torch.ones(4, 3), **{**FEW, name: value})


def test_only_that_matches_nothing_names_the_sites():
    with pytest.raises(ValueError, match="only='zzz' matches no site; there are 0, 1"):
        nfa(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), torch.ones(4, 3), only="zzz", **FEW)


@pytest.mark.parametrize("reduce", [torch.mean, lambda y: y[:, 0]])
def test_a_class_of_an_output_without_classes(reduce):
    layer = nn.Linear(3, 2)

    class Reduced(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return reduce(self.layer(x))

    with pytest.raises(ValueError, match="output=0 is a class on the last axis"):
        nfa(Reduced(), torch.ones(4, 3), output=0, **FEW)


def small():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()


@pytest.mark.parametrize("turn", [
    lambda a: a[::-1][::-1], lambda a: a.astype(">f8"), lambda a: a.astype(object),
    lambda a: a.astype(str), lambda a: a.astype(np.longdouble), lambda a: np.asfortranarray(a)])
def test_arrays_of_any_layout_are_data(turn):
    model, x = small(), normal(5, 4).numpy()
    np.testing.assert_array_equal(nfa(model, turn(x), **FEW).pearson, nfa(model, x, **FEW).pearson)


@pytest.mark.parametrize("data, error", [
    (np.array([["a"] * 4]), TypeError), (np.zeros(3, dtype=[("a", "f8")]), TypeError),
    (torch.eye(4).to_sparse(), TypeError), (torch.ones(3, 4, device="meta"), ValueError)])
def test_what_is_no_data_is_named(data, error):
    with pytest.raises(error, match="data"):
        nfa(small(), data, **FEW)


def test_a_network_without_values_is_refused():
    with pytest.raises(ValueError, match="'0.weight' is on the meta device"):
        nfa(small().to("meta"), normal(5, 4), **FEW)


def test_big_endian_ids_stay_whole_numbers():
    model = nn.Sequential(nn.Embedding(5, 4), small()).double()
    ids = np.array([[0, 3], [4, 1]], dtype=">i8")
    want = nfa(model, torch.from_numpy(ids.astype("<i8")), **FEW)
    np.testing.assert_array_equal(nfa(model, ids, **FEW).pearson, want.pearson)


class Example(NamedTuple):
    x: object
    y: object


def test_a_named_tuple_keeps_its_fields():
    x, y = normal(5, 4), normal(5, 1)
    table = nfa(small(), [Example(x, y)], output=lambda out, b: out * b.y, **FEW)
    assert type(table) is pd.DataFrame and table.reached.all()


def test_a_reversed_array_is_read_in_its_order():
    model, x = small(), normal(5, 4).numpy()
    _, sites = nfa(model, [x[::-1]], matrices=True, output=lambda y, b: y * b[:, :1], **FEW)
    _, wanted = nfa(model, [x[::-1].copy()], matrices=True, output=lambda y, b: y * b[:, :1], **FEW)
    for site, want in zip(sites, wanted):
        torch.testing.assert_close(site.moments, want.moments, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_without_entries_are_left_out():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.none, self.some = nn.Linear(4, 0), nn.Linear(4, 3)

        def forward(self, x):
            return torch.cat([self.none(x), self.some(x)], 1)

    with pytest.warns(UserWarning, match="weights without entries are left out: none"):
        table = nfa(Beside(), torch.ones(2, 4), **FEW)
    assert table.site.tolist() == ["some"]
    with pytest.raises(ValueError, match="has no linear"):
        nfa(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)), torch.ones(2, 4), **FEW)


def test_complex_weights_are_called_complex():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.o = nn.Linear(4, 6, dtype=torch.complex128), nn.Linear(6, 3).double()

        def forward(self, x):
            return self.o(self.c(x.to(torch.complex128)).real)

    with pytest.raises(TypeError, match="site 'c' multiplies complex numbers"):
        nfa(Both(), normal(5, 4), **FEW)
    assert nfa(Both(), normal(5, 4), only="o", **FEW).site.tolist() == ["o"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_named():
    model, x = small(), normal(5, 4)
    with pytest.raises(ValueError, match="TorchScript"):
        nfa(torch.jit.trace(model, x), x, **FEW)
    part = nn.Sequential(torch.jit.trace(model[:2], x), model[2])
    with pytest.warns(UserWarning, match="runs inside TorchScript"):
        assert nfa(part, x, **FEW).site.tolist() == ["1"]


@pytest.mark.parametrize("size", [1e-90, 1e-60, 1e80])
def test_weights_of_any_size_in_float64(size):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double(), normal(5, 4)
    model[1].weight.data.div_(model[1].weight.abs().max())
    want = nfa(model, x, initial=model, **FEW)
    model[0].weight.data.mul_(size)
    table = nfa(model, x, initial=model, **FEW)
    for column in ("pearson", "cosine", "pearson_weights"):
        np.testing.assert_allclose(table[column], want[column], atol=1e-7)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("mixer", [
    lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=False),
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=False), 1),
    Centred])
def test_samples_that_influence_each_other_are_noticed(mixer):
    model = nn.Sequential(nn.Linear(4, 4), mixer(), nn.Linear(4, 2)).double().eval()
    with pytest.raises(ValueError, match="samples influence each other"):
        nfa(model, normal(5, 3, 4), **FEW)


@pytest.mark.parametrize("backwards", [False, True])
def test_influence_in_one_direction_is_noticed(backwards):
    class Along(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x):
            y = self.layer(x)
            return y.flip(0).cumsum(0).flip(0) if backwards else y.cumsum(0)

    with pytest.raises(ValueError, match="samples influence each other"):
        nfa(Along(), normal(5, 4), **FEW)


def test_samples_that_do_not_are_not_taken_for_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    assert len(nfa(model.eval(), torch.randn(5, 3, 4), **FEW))
    assert len(nfa(small(), normal(5, 4), output=lambda y, b: y * b[:, :1], **FEW))


def test_a_model_that_takes_no_three_samples_is_not_refused():
    class Five(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.layer(x.reshape(-1, 5, 4)).flatten(0, 1)

    assert len(nfa(Five(), normal(5, 4), **FEW))
