"Pulling back: what samples have in common, chance, states, gradients of any size."

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import FEW, Net, compare, normal, small
from torch import nn
from torch.nn.utils import parametrizations

from agop_book.agop import agop
from agop_book.nfa import nfa

pytestmark = pytest.mark.usefixtures("seed", "nothing_left_behind")


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


@pytest.mark.parametrize(
    "make, x",
    [
        (lambda: Mean(True), torch.ones(4, 3)),
        (lambda: Mean(False), torch.ones(4, 3)),
        (spectral, torch.ones(4, 3)),
        (lambda: nn.InstanceNorm1d(2, track_running_stats=True), torch.rand(4, 2, 3)),
    ],
)
def test_training_mode_with_state_is_refused_and_restored(make, x):
    model = nn.Sequential(make(), nn.Linear(3, 2)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for measure in (lambda: nfa(model, x, **FEW), lambda: agop(model, x)):
        with pytest.raises(ValueError, match=r"training mode.*\.eval\(\)"):
            measure()
        for k, v in model.state_dict().items():
            assert torch.equal(v, before[k]), k
    assert len(nfa(model.eval(), x, **FEW))


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize(
    "mixer",
    [
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=False),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=False), 1),
        Centred,
    ],
)
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
