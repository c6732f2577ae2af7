"""The twin of a recurrent module: equal in every variant, shared weights, exact gradients."""
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from agop_book.gates import LSTMStep
from agop_book.nfa import nfa
from agop_book.rnns import explicit
from agop_book.shared import SharedLinear

KINDS = {"rnn": (nn.RNN, {}), "relu": (nn.RNN, dict(nonlinearity="relu")), "gru": (nn.GRU, {}),
         "lstm": (nn.LSTM, {}), "projected": (nn.LSTM, dict(proj_size=2))}


def make(kind, seed=0, **options):
    torch.manual_seed(seed)
    layer, more = KINDS[kind]
    return layer(3, 4, **more, **options).double().eval()


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def start(module, *batch):
    "Random initial states."
    layers = module.num_layers * (1 + module.bidirectional)
    h = numbers(layers, *batch, module.proj_size or 4)
    return (h, numbers(layers, *batch, 4)) if isinstance(module, nn.LSTM) else h


def same(a, b):
    "Equal to 1e-10, whatever the nesting."
    if torch.is_tensor(a):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-10)
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))


VARIANTS = [*itertools.product((1, 3), (False, True), (True, False), (True, False))]


@pytest.mark.parametrize("layers, bidirectional, bias, batch_first", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal(kind, layers, bidirectional, bias, batch_first):
    module = make(kind, num_layers=layers, bidirectional=bidirectional, bias=bias,
                  batch_first=batch_first)
    twin, x = explicit(module), numbers(5, 6, 3)
    n = 5 if batch_first else 6
    h, h_one = start(module, n), start(module)
    assert same(module(x), twin(x)) and same(module(x, h), twin(x, h))
    assert same(module(x[0]), twin(x[0])) and same(module(x[0], h_one), twin(x[0], h_one))


@pytest.mark.parametrize("enforce_sorted", (True, False))
@pytest.mark.parametrize("bidirectional", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_packed(kind, bidirectional, enforce_sorted):
    module = make(kind, num_layers=2, bidirectional=bidirectional, dropout=0.5)
    lengths = (6, 4, 4, 1) if enforce_sorted else (4, 1, 6, 4)
    x = pack_sequence([numbers(t, 3) for t in lengths], enforce_sorted=enforce_sorted)
    h = start(module, 4)
    for given in ((x,), (x, h)):
        (a, a_h), (b, b_h) = module(*given), explicit(module)(*given)
        assert same(a_h, b_h) and same(a.data, b.data)
        assert same(pad_packed_sequence(a), pad_packed_sequence(b))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_get_the_same_gradient(kind):
    module, x = make(kind, num_layers=2, bidirectional=True), numbers(5, 2, 3)
    parameters = list(module.parameters())
    want = torch.autograd.grad(module(x)[0].square().sum(), parameters)
    got = torch.autograd.grad(explicit(module)(x)[0].square().sum(), parameters)
    assert all(map(same, want, got))


def test_shares_the_weights():
    module = make("gru")
    twin, x = explicit(module), numbers(5, 2, 3)
    with torch.no_grad():
        module.weight_hh_l0 *= 2
    assert same(module(x), twin(x))
    module.load_state_dict(make("gru", seed=1).state_dict(), assign=True)  # new Parameter objects
    assert same(module(x), twin(x))
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0 *= 3
    assert same(module(x), twin(x))
    assert {id(p) for p in twin.parameters()} == {id(p) for p in module.parameters()}


def test_a_shared_map_owns_no_weights():
    lstm = make("lstm")
    site = SharedLinear(lstm, ("ih_l0", "hh_l0"), slice(4))
    assert list(site.parameters()) == [] and site.in_features == 7 and site.out_features == 4
    assert same(site.weight, torch.cat([lstm.weight_ih_l0[:4], lstm.weight_hh_l0[:4]], 1))
    assert same(site.bias, lstm.bias_ih_l0[:4] + lstm.bias_hh_l0[:4])
    assert SharedLinear(make("lstm", bias=False), ("ih_l0",)).bias is None
    assert [head for head, _ in LSTMStep(lstm, "l0").gates.heads][1] == "forget"


def test_sites_are_linear_maps_seen_at_every_step():
    twin, seen = explicit(make("lstm", num_layers=2)), {}
    sites = {name: m for name, m in twin.named_modules() if isinstance(m, nn.Linear)}
    assert list(sites) == ["l0.gates", "l1.gates"]
    for name, site in sites.items():
        calls = seen[name] = []
        site.register_forward_hook(lambda m, args, out, calls=calls: calls.append((args[0], out)))
    twin(numbers(5, 2, 3))
    for name, site in sites.items():
        assert site.kind == "gate"
        assert [label for label, _ in site.heads] == ["input", "forget", "cell", "output"]
        assert site.weight.shape == (16, site.in_features) and len(seen[name]) == 5
        for u, out in seen[name]:
            assert same(out, nn.functional.linear(u, site.weight, site.bias))


def test_dropout_acts_in_training_only():
    module = make("gru", num_layers=2, dropout=0.5)
    twin, x = explicit(module), numbers(5, 2, 3)
    assert same(module(x), twin(x))
    twin.train()
    assert module.training and not same(twin(x), twin(x))


class Own(nn.GRU):
    def forward(self, x):
        return x


@pytest.mark.parametrize("module, message", [
    (nn.Linear(2, 2), "Linear: give an nn.RNN"),
    (nn.LSTMCell(2, 2), "LSTMCell"),
    (Own(2, 2), "forward"),
])
def test_other_modules_are_refused(module, message):
    with pytest.raises(TypeError, match=message):
        explicit(module)


@pytest.mark.parametrize("module, shapes, message", [
    (nn.GRU(3, 2), [(4,)], "three axes"),
    (nn.GRU(3, 2), [(4, 1, 2)], "2 features"),
    (nn.GRU(3, 2), [(0, 1, 3)], "no time steps"),
    (nn.GRU(3, 2), [(4, 1, 3), (1, 5, 2)], "hx has shapes"),
    (nn.LSTM(3, 2), [(4, 1, 3), (1, 1, 2)], "hx has shapes"),
])
def test_bad_input(module, shapes, message):
    with pytest.raises(ValueError, match=message):
        explicit(module)(*map(torch.zeros, shapes))


def gru(a, b, d, h):
    r, z = (a[0] + b[0] + d["reset"]).sigmoid(), (a[1] + b[1] + d["update"]).sigmoid()
    inside, back = a[2] + d["candidate-input"], b[2] + d["candidate-recurrent"]
    return (1 - z) * (inside + r * back).tanh() + z * h


def lstm(a, b, d, c):
    names = "input", "forget", "cell", "output"
    i, f, g, o = (a[k] + b[k] + d[name] for k, name in enumerate(names))
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def by_hand(module, e, x):
    "States of a layer over `x` (T, d), with `e[name]` (T, H) added to the pre-activation `name`."
    weights = "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"
    wi, wh, bi, bh = (getattr(module, name) for name in weights)
    h, c, out = x.new_zeros(1, 4), x.new_zeros(1, 4), []
    for t in range(len(x)):
        a, b = (x[t:t + 1] @ wi.T + bi).split(4, -1), (h @ wh.T + bh).split(4, -1)
        d = {k: v[t] for k, v in e.items()}
        if isinstance(module, nn.GRU):
            h = gru(a, b, d, h)
        elif isinstance(module, nn.LSTM):
            h, c = lstm(a, b, d, c)
        else:
            h = (a[0] + b[0] + d["recurrent"]).tanh()
        out.append(h)
    return torch.cat(out).flatten()


@pytest.mark.parametrize("kind", ("rnn", "gru", "lstm"))
def test_gradients_at_the_gates_against_brute_force(kind):
    module, x = make(kind, batch_first=True), numbers(5, 3)
    table, sites = nfa(module, x[None], matrices=True, progress=False)
    names = list(table["kind"])

    def states(e):
        return by_hand(module, dict(zip(names, e)), x)

    zero = x.new_zeros(len(names), 5, 4)
    assert same(states(zero), module(x)[0].flatten())
    J = torch.autograd.functional.jacobian(states, zero)  # (outputs, gates, T, H)
    for k, site in enumerate(sites):
        C = torch.einsum("oti,otj->ij", J[:, k], J[:, k])
        assert torch.allclose(site.agop(), site.W.T @ C @ site.W, rtol=0, atol=1e-10)
