"""The twin of a recurrent module: equal outputs in every variant, shared weights, the gates' gradients against brute force."""
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from agop_book.rnns import explicit

KINDS = {"rnn": nn.RNN, "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k), "gru": nn.GRU, "lstm": nn.LSTM,
         "projected": lambda *a, **k: nn.LSTM(*a, proj_size=2, **k)}


def make(kind, seed=0, **options):
    torch.manual_seed(seed)
    return KINDS[kind](3, 4, **options).double().eval()


def start(kind, module, *batch):
    "Random initial states."
    layers = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(layers, *batch, module.proj_size or 4, dtype=torch.float64)
    return (h, torch.randn(layers, *batch, 4, dtype=torch.float64)) if isinstance(module, nn.LSTM) else h


def same(a, b):
    "Equal to 1e-10, whatever the nesting."
    if torch.is_tensor(a): return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-10)
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))


@pytest.mark.parametrize("layers, bidirectional, bias, batch_first", [*itertools.product((1, 3), (False, True), (True, False), (True, False))])
@pytest.mark.parametrize("kind", KINDS)
def test_equal(kind, layers, bidirectional, bias, batch_first):
    module = make(kind, num_layers=layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first)
    twin = explicit(module)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    n = 5 if batch_first else 6
    assert same(module(x), twin(x))
    assert same(module(x, h := start(kind, module, n)), twin(x, h))
    assert same(module(x[0]), twin(x[0])) and same(module(x[0], h := start(kind, module)), twin(x[0], h))


@pytest.mark.parametrize("enforce_sorted", (True, False))
@pytest.mark.parametrize("bidirectional", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_packed(kind, bidirectional, enforce_sorted):
    module = make(kind, num_layers=2, bidirectional=bidirectional, dropout=0.5)
    lengths = (6, 4, 4, 1) if enforce_sorted else (4, 1, 6, 4)
    x = pack_sequence([torch.randn(t, 3, dtype=torch.float64) for t in lengths], enforce_sorted=enforce_sorted)
    h = start(kind, module, 4)
    for given in ((x,), (x, h)):
        (a, a_h), (b, b_h) = module(*given), explicit(module)(*given)
        assert same(a_h, b_h) and same(a.data, b.data) and same(pad_packed_sequence(a), pad_packed_sequence(b))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_get_the_same_gradient(kind):
    module, x = make(kind, num_layers=2, bidirectional=True), torch.randn(5, 2, 3, dtype=torch.float64)
    want = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    got = torch.autograd.grad(explicit(module)(x)[0].square().sum(), list(module.parameters()))
    assert all(map(same, want, got))


def test_shares_the_weights():
    module = make("gru")
    twin, x = explicit(module), torch.randn(5, 2, 3, dtype=torch.float64)
    with torch.no_grad(): module.weight_hh_l0 *= 2
    assert same(module(x), twin(x))
    module.load_state_dict(make("gru", seed=1).state_dict(), assign=True)      # new Parameter objects
    assert same(module(x), twin(x))
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad(): module.parametrizations.weight_hh_l0.original0 *= 3
    assert same(module(x), twin(x))
    assert {id(p) for p in twin.parameters()} == {id(p) for p in module.parameters()}


def test_sites_are_linear_maps_seen_at_every_step():
    twin, seen = explicit(make("lstm", num_layers=2)), {}
    sites = {name: m for name, m in twin.named_modules() if isinstance(m, nn.Linear)}
    assert list(sites) == ["l0.gates", "l1.gates"]
    for name, site in sites.items():
        site.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, []).append((args[0], out)))
    twin(torch.randn(5, 2, 3, dtype=torch.float64))
    for name, site in sites.items():
        assert site.kind == "gate" and [label for label, _ in site.heads] == ["input", "forget", "cell", "output"]
        assert site.weight.shape == (16, site.in_features) and len(seen[name]) == 5
        assert all(same(out, nn.functional.linear(u, site.weight, site.bias)) for u, out in seen[name])


def test_dropout_acts_in_training_only():
    module = make("gru", num_layers=2, dropout=0.5)
    twin, x = explicit(module), torch.randn(5, 2, 3, dtype=torch.float64)
    assert same(module(x), twin(x))
    twin.train()
    assert module.training and not same(twin(x), twin(x))


@pytest.mark.parametrize("bad, error, message", [
    (lambda: explicit(nn.Linear(2, 2)), TypeError, "Linear: give an nn.RNN"),
    (lambda: explicit(nn.LSTMCell(2, 2)), TypeError, "LSTMCell"),
    (lambda: explicit(type("Own", (nn.GRU,), {"forward": lambda self, x: x})(2, 2)), TypeError, "forward"),
    (lambda: explicit(nn.GRU(3, 2))(torch.zeros(4)), ValueError, "three axes"),
    (lambda: explicit(nn.GRU(3, 2))(torch.zeros(4, 1, 2)), ValueError, "2 features"),
    (lambda: explicit(nn.GRU(3, 2))(torch.zeros(0, 1, 3)), ValueError, "no time steps"),
    (lambda: explicit(nn.GRU(3, 2))(torch.zeros(4, 1, 3), torch.zeros(1, 5, 2)), ValueError, "hx has shapes"),
    (lambda: explicit(nn.LSTM(3, 2))(torch.zeros(4, 1, 3), torch.zeros(1, 1, 2)), ValueError, "hx has shapes"),
])
def test_bad_input(bad, error, message):
    with pytest.raises(error, match=message): bad()
