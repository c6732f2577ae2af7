"Layers: which matrices they hold, whatever they do with them."

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import FEW, Net, Unheard, brute, compare, normal, same
from torch import nn
from torch.nn.utils import parametrize

from agop_book.agop import agop
from agop_book.layers import plan_taps
from agop_book.nfa import nfa
from agop_book.watch import watching

pytestmark = pytest.mark.usefixtures("seed", "nothing_left_behind")


class Up(Net):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        u = self.at("conv", torch.sin(x).movedim(1, -1))
        return torch.tanh(self.conv(u.movedim(-1, 1)))


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
    model, x, d = Up(conv), normal(*shape), shape[1]
    table = compare(model, x, {"conv": "conv"})
    _, (site,) = nfa(model, x, matrices=True, **FEW)
    # the matrix: each pixel's patch of outputs, without overlap, bias or padding
    spatial = len(shape) - 2
    pixels = torch.eye(d, dtype=torch.float64).reshape(d, d, *(1,) * spatial)
    f = getattr(F, f"conv_transpose{spatial}d")
    patches = f(pixels, conv.weight.detach(), groups=conv.groups).flatten(1)
    assert torch.allclose(site.nfm(), patches @ patches.T) and table.kind[0] == "conv-transpose"
    G, root = site.agop(), site.root()
    want = np.corrcoef(site.nfm().flatten(), root.flatten())[0, 1]
    assert abs(table.pearson[0] - want) < 1e-6
    assert torch.allclose(root @ root, G, atol=1e-8 * float(torch.linalg.eigvalsh(G)[-1]))


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


class Steps(nn.Module):
    "A cell, called in a loop."

    def __init__(self, cell):
        super().__init__()
        self.rnn = cell

    def forward(self, x):
        h, out = None, []
        for t in range(x.shape[1]):
            h = self.rnn(x[:, t], h)
            out.append(first(h))
        return torch.stack(out, 1)


class Whole(nn.Module):
    "The outputs of a recurrent layer."

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


def first(h):
    return h[0] if isinstance(h, tuple) else h


@pytest.mark.parametrize(
    "layer,cell", [(nn.RNN, nn.RNNCell), (nn.GRU, nn.GRUCell), (nn.LSTM, nn.LSTMCell)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_layers_of_one_step(layer, cell, bias):
    "The recurrent layers have oracles of their own in test_rnns."
    a = Steps(cell(3, 4, bias=bias)).double()
    b, x = Whole(layer(3, 4, bias=bias, batch_first=True)).double(), normal(3, 5, 3)
    b.rnn.load_state_dict({f"{k}_l0": v for k, v in a.rnn.state_dict().items()})
    assert torch.allclose(a(x), b(x))
    (one, sites), (two, want) = nfa(a, x, matrices=True, **FEW), nfa(b, x, matrices=True, **FEW)
    assert [n.replace("rnn.", "rnn.l0.") for n in one.site] == list(two.site)
    assert list(one.kind) == list(two.kind)
    for s, w in zip(sites, want):
        assert same(s.agop(), w.agop())
    assert one.attrs["coverage"] == 1 and "forward" not in vars(a.rnn)
    assert torch.allclose(first(a.rnn(x[0, 0])), first(a.rnn(x[:1, 0]))[0])


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
        return Unheard.apply(x, self.numbers().T)


class AsksFor(Codes):
    def dequantize(self):
        return self.numbers()


class InBytes(Codes):
    "Its codes are packed in a column of bytes, as in bitsandbytes; only it knows its numbers."

    def __init__(self, W, way):
        super().__init__(W, way)
        self.weight = self.weight.view(torch.uint8).reshape(-1, 1)
        self.known = W

    def numbers(self):
        return self.known


def around(layer):
    "A network with the layer in its middle."
    ends = nn.Linear(4, 4), nn.Linear(5, 2)
    return nn.Sequential(ends[0], nn.Tanh(), layer, nn.Tanh(), ends[1]).double()


@pytest.mark.parametrize("make,way", [(Codes, "torch"), (AsksFor, "hidden")])
def test_codes_are_compared_by_their_numbers(make, way):
    layer, x = make(normal(5, 4), way), normal(6, 4)
    model = around(layer)
    middle = nn.Linear(4, 5, bias=False).double()
    middle.weight.data = layer.numbers()
    plain = nn.Sequential(*model[:2], middle, *model[3:])
    table, sites = nfa(model, x, matrices=True, **FEW)
    want, wanted = nfa(plain, x, matrices=True, **FEW)
    assert list(table.site) == ["0", "2", "4"] and np.allclose(table.pearson, want.pearson)
    for s, w in zip(sites, wanted):
        assert same(s.agop(), w.agop())


def test_codes_without_numbers_are_left_out_or_refused():
    W, x = normal(5, 4), normal(6, 4)
    with pytest.warns(UserWarning, match="2.weight"):
        table = nfa(around(Codes(W, "hidden")), x, **FEW)
    assert list(table.reached) == [True, False, True]
    with pytest.raises(ValueError, match="site '2'.*quantised"):
        nfa(around(InBytes(W, "packed")), x, **FEW)


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


def shadowed(layer, calls):
    "The layer with a forward of its own on the instance, as accelerate sets it."
    old = layer.forward

    def forward(*args, **kwargs):
        calls.append(len(args))
        return old(*args, **kwargs)

    layer.forward = forward
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(3, 4, batch_first=True),
        lambda: nn.GRU(3, 4, batch_first=True),
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda: nn.GRUCell(3, 4),
    ],
)
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


class Divide(nn.Module):
    "y = A^-1 u: no call shows the matrix that acts."

    def __init__(self, d):
        super().__init__()
        self.A = nn.Parameter(torch.eye(d) + 0.1 * torch.randn(d, d))

    def forward(self, u):
        return torch.linalg.solve(self.A, u.mT).mT


def test_a_new_layer_is_one_function():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Divide(4), nn.Tanh(), nn.Linear(4, 2))
    net, x = net.double(), normal(8, 3)
    with pytest.warns(UserWarning, match=r"2.A \(used by"):
        assert "2" not in set(nfa(net, x, **FEW).site)

    @plan_taps.register(Divide)
    def _(module, name, watch):
        tap = watch.put(name, module, lambda: torch.linalg.inv(module.A.detach())[None])
        watch.mark_output(module, tap)

    table, sites = nfa(net, x, matrices=True, **FEW)
    assert list(table.site) == ["0", "2", "4"] and table.attrs["coverage"] == 1
    assert list(table.kind) == ["linear"] * 3 and "forward" not in vars(net[2])
    assert torch.equal(sites[1].W, torch.linalg.inv(net[2].A.detach()))
    assert same(sites[1].agop(), agop(net[2:], net[:2](x).detach()))
