"""The twin of a recurrent module: equal outputs in every variant, shared weights, the gates' gradients against brute force."""
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from agop_book.nfa import nfa
from agop_book.rnns import CharLoss, CharRNN, char_codes, char_task, explicit

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


def by_hand(module, e, x):
    "States of a one-layer module over `x` (T, d) with `e[name]` (T, H) added to the pre-activation `name`, from the formulas."
    wi, wh, bi, bh = (getattr(module, f"{p}_l0") for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h, c, out = torch.zeros(1, 4, dtype=x.dtype), torch.zeros(1, 4, dtype=x.dtype), []
    for t in range(len(x)):
        a, b = (x[t:t + 1] @ wi.T + bi).split(4, -1), (h @ wh.T + bh).split(4, -1)
        d = {k: v[t] for k, v in e.items()}
        if isinstance(module, nn.GRU):
            r, z = (a[0] + b[0] + d["reset"]).sigmoid(), (a[1] + b[1] + d["update"]).sigmoid()
            h = (1 - z) * (a[2] + d["candidate-input"] + r * (b[2] + d["candidate-recurrent"])).tanh() + z * h
        elif isinstance(module, nn.LSTM):
            i, f, g, o = (a[k] + b[k] + d[name] for k, name in enumerate(("input", "forget", "cell", "output")))
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else: h = (a[0] + b[0] + d["recurrent"]).tanh()
        out.append(h)
    return torch.cat(out).flatten()


@pytest.mark.parametrize("kind", ("rnn", "gru", "lstm"))
def test_gradients_at_the_gates_against_brute_force(kind):
    module, x = make(kind, batch_first=True), torch.randn(5, 3, dtype=torch.float64)
    table, sites = nfa(module, x[None], matrices=True, progress=False)
    names = list(table["kind"])
    zero = torch.zeros(len(names), 5, 4, dtype=torch.float64)
    assert same(by_hand(module, dict(zip(names, zero)), x), module(x)[0].flatten())
    J = torch.autograd.functional.jacobian(lambda e: by_hand(module, dict(zip(names, e)), x), zero)     # (outputs, gates, T, H)
    for k, site in enumerate(sites):
        C = torch.einsum("oti,otj->ij", J[:, k], J[:, k])
        assert torch.allclose(site.agop(), site.W.T @ C @ site.W, rtol=0, atol=1e-10)


def test_characters():
    codes = char_codes(["ab", "bca"], "ab")
    assert codes.tolist() == [[2, 3, 0], [3, 1, 2]] and char_codes(["abc"], "abc", 2).shape == (1, 2)
    for embed in (None, 5):
        torch.manual_seed(0)
        model = CharRNN(4, "gru", hidden=6, layers=2, outputs=3, embed=embed).eval()
        alone = torch.cat([model(row[row != 0][None]) for row in codes])
        assert torch.allclose(model(codes), alone, atol=1e-6) and alone.shape == (2, 3)
    assert CharRNN(4, "rnn", hidden=6)(codes).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="kind='gpt'"): CharRNN(4, "gpt")
    scores = torch.randn(2, 3, 4)
    assert torch.allclose(CharLoss()(scores, codes), nn.functional.cross_entropy(scores.reshape(6, 4), codes.reshape(6)))


@pytest.mark.parametrize("texts, options, message", [
    (["ab"], dict(length=-1), "length=-1"), (["ab"], dict(length=0), "length=0"),
    (["ab"], dict(length=True), "length=True"), (["ab"], dict(length=1.5), "length=1.5"),
    ([], {}, "texts holds no"), ([""], dict(length=3), "texts holds no"), ("ab", {}, "texts is one"),
])
def test_bad_texts_and_lengths_are_named(texts, options, message):
    with pytest.raises(ValueError, match=message): char_codes(texts, "abc", **options)
    assert char_codes(iter(["ab", "c"]), "abc").tolist() == [[2, 3], [4, 0]]


@pytest.mark.parametrize("name", ["vocab", "hidden", "layers", "outputs", "embed"])
def test_bad_sizes_of_networks_are_named(name):
    for bad in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match=f"{name}="): CharRNN(**dict(vocab=5) | {name: bad})


@pytest.mark.parametrize("task", ("names", "text"))
def test_tasks(task, monkeypatch):
    for name in ("AGOP_BOOK_DATA", "AGOP_BOOK_SCALE"): monkeypatch.delenv(name, raising=False)
    run = char_task(task, "lstm")
    net = run.net.set_params(max_epochs=1, callbacks=[]).fit(run.x[:64], run.y[:64])
    scores = torch.as_tensor(net.predict(run.x_test[:8]))
    assert torch.isfinite(scores).all() and len(run.x) == len(run.y) and scores.shape[:-1] == run.y_test[:8].shape
    if task == "text": assert torch.equal(run.x[:, 1:], run.y[:, :-1]) and torch.equal(run.x[1:, 0], run.y[:-1, -1])
    with pytest.raises(ValueError, match="task='images'"): char_task("images", "lstm")
