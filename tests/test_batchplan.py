"Big models: what a sample takes is measured, planned and kept to; parts give what the whole gives."

import subprocess
import sys

import numpy as np
import pytest
import torch
from networks import FEW, normal
from torch import nn
from tqdm import tqdm

from agop_book import batchplan, jacobians, memory, sweep
from agop_book.agop import agop
from agop_book.jacobians import pullbacks, random_signs
from agop_book.nfa import nfa
from agop_book.outputs import Outputs
from agop_book.watch import watching

pytestmark = pytest.mark.usefixtures("seed", "nothing_left_behind")


@pytest.fixture
def asked(monkeypatch):
    "Small models are measured too."
    monkeypatch.setattr(batchplan, "_WORK", 0)


def little_memory(monkeypatch, size):
    for module in (memory, batchplan):
        monkeypatch.setattr(module, "free_memory", lambda device="cpu": size)


class Counts(nn.Module):
    "A network that notes how many samples come at a time."

    def __init__(self, wide=64):
        super().__init__()
        self.a, self.b, self.seen = nn.Linear(4, wide), nn.Linear(wide, 3), []

    def forward(self, x):
        self.seen.append(len(x))
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("dtype, samples", [(torch.float32, 6), (torch.bfloat16, 8)])
def test_the_plan_is_what_is_taken(planned_and_taken, dtype, samples):
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(1000, 256), encoder, nn.Linear(256, 6000)).to(dtype).eval()
    ids = torch.randint(1000, (samples, 512))
    planned, taken = planned_and_taken(
        lambda: nfa(model, ids, probes=2, rotations=0, progress=False)
    )
    assert taken > 2e8 and taken / 1.5 < planned < 2 * taken, (planned, taken)


def test_one_sample_that_does_not_fit_is_refused_before_the_work(monkeypatch, asked):
    model = Counts()
    little_memory(monkeypatch, 2**27)
    with pytest.raises(MemoryError, match=r"one sample through Counts.*shorter samples.*only="):
        nfa(model, torch.randn(5, 4), **FEW)
    assert model.seen == [1]  # the sample that was measured


@pytest.mark.parametrize("probes", [None, 4])
def test_parts_give_what_the_whole_gives(monkeypatch, asked, probes):
    model, x = Counts().double(), normal(50, 4)
    want = nfa(model, x, batch_size=50, matrices=True, **FEW)[1]
    with watching(model) as watch:
        need = batchplan.sample_need(watch, Outputs(model), x)
    held = sum(8 * m.numel() for site in want for m in (site.moments,)) * 2
    little_memory(monkeypatch, int((need(9) + held) / batchplan._SURE))
    model.seen.clear()
    table, sites = nfa(model, x, batch_size=50, probes=probes, matrices=True, **FEW)
    assert sum(n > 1 for n in model.seen) > 3 and max(model.seen) <= 16
    assert 0 < table.attrs["planned"] <= memory.free_memory()
    for site, other in zip(sites, want):
        mean = site.moments.mean(0)
        if probes is None:
            torch.testing.assert_close(mean, other.moments[0])
        assert (mean - other.moments[0]).norm() < 0.8 * other.moments.norm()


def test_samples_that_mix_are_noticed_in_parts_of_one(monkeypatch, asked):
    class Mixes(Counts):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    monkeypatch.setattr(batchplan, "_PLENTY", 1)  # one at a time
    with pytest.raises(ValueError, match="influence each other"):
        nfa(Mixes(), torch.randn(5, 4), **FEW)
    table = nfa(Counts(), torch.randn(5, 4), **FEW)
    assert table.reached.all()


def test_a_size_that_was_named_is_kept_to(monkeypatch, asked):
    monkeypatch.setattr(batchplan, "_PLENTY", 1)
    model = Counts()
    nfa(model, torch.randn(6, 4), batch_size=3, output=0, **FEW)
    assert model.seen[0] == 1 and set(model.seen[1:]) == {3}


def test_what_is_kept_is_counted_once():
    "Views count as one, weights not at all, and what was dropped not as what came after it."

    class Chain(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.layer, self.depth = nn.Linear(8, 3), depth

        def forward(self, x):
            for _ in range(self.depth):
                x = torch.tanh(x * 1.5)  # keeps its result, once
            return self.layer(x)

    def sample(depth):
        model = Chain(depth).requires_grad_(False)
        with watching(model) as watch:
            x = torch.randn(3, 1000, 8, requires_grad=True)
            return batchplan.sample_need(watch, Outputs(model), x).sample

    steps = np.diff([sample(depth) for depth in (2, 3, 4, 10)])
    np.testing.assert_allclose(steps, np.array([1, 1, 6]) * 4 * 8000 * batchplan._HOLES, atol=2)


def test_a_network_that_goes_back_by_itself_is_not_measured(asked):
    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 1)

        def forward(self, x):
            x = x.requires_grad_()
            energy = self.b(torch.tanh(self.a(x))).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    model, x = Force(), torch.randn(6, 3)
    with watching(model) as watch:
        assert batchplan.sample_need(watch, Outputs(model), x) is None
    assert nfa(model, x, **FEW).reached.any()


def test_longer_samples_are_measured_again(asked):
    model = Counts()
    loader = [torch.randn(2, n, 4) for n in (3, 2, 5)]
    nfa(model, loader, output=lambda y, b: y.mean(1), **FEW)
    assert model.seen.count(1) == 2


@pytest.mark.parametrize(
    "data, total",
    [
        (torch.randn(10, 4), 10),
        ([torch.randn(4, 4), torch.randn(3, 4)], 7),
        (torch.utils.data.DataLoader(torch.randn(9, 4), batch_size=3), 9),
        (iter([torch.randn(4, 4)]), None),
    ],
    ids=["tensor", "list", "loader", "iterator"],
)
@pytest.mark.parametrize("probes, each", [(None, 3), (5, 5)])
def test_the_bar_knows_the_whole(monkeypatch, data, total, probes, each):
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "disable": False, "delay": 1e6})
            bars.append(self)

    monkeypatch.setattr(sweep, "tqdm", Bar)
    if total is None:
        data = iter([torch.randn(4, 4)])
    nfa(Counts(), data, probes=probes, **FEW)
    assert [bar.total for bar in bars] == [total and total * each]
    assert bars[0].n == (total or 4) * each


def small_gpt():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=500, n_positions=128
    )
    return transformers.GPT2LMHeadModel(config).eval(), torch.randint(500, (2, 128))


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-4), ("bfloat16", 3e-2)])
def test_precisions_agree(asked, dtype, tolerance):
    model, ids = small_gpt()
    want = nfa(model.double(), ids, probes=4, **FEW)
    table = nfa(model.to(getattr(torch, dtype)), ids, probes=4, **FEW)
    np.testing.assert_allclose(table.pearson, want.pearson, atol=tolerance)
    assert (table.error > 0).all()


def test_sites_keep_their_weights_in_float64():
    model, x = Counts().bfloat16(), torch.randn(5, 4)
    table, sites = nfa(model, x, matrices=True, **FEW)
    want = model.a.weight.detach().double()
    model.a.weight.data.zero_()
    assert torch.equal(sites[0].W, want) and sites[0].weight.dtype == torch.float64


@pytest.mark.parametrize("center", [False, True])
def test_probes_one_at_a_time(center):
    W, x = normal(6, 5), normal(9, 6)
    options = dict(probes=4, center=center, random_state=0)
    want = agop(lambda x: torch.tanh(x @ W), x, **options)
    found = agop(lambda x: torch.tanh(x @ W), x, chunk=1, **options)
    torch.testing.assert_close(found.matrix, want.matrix)
    assert found.error == pytest.approx(want.error)


def test_large_outputs_go_back_in_small_pieces(monkeypatch):
    W, x = normal(6, 500), normal(2, 6)
    monkeypatch.setattr(jacobians, "BUDGET", 2 * 500 * 8 * 3)
    signs = random_signs(7, torch.Generator())
    assert [g.shape[1] for g in pullbacks(lambda x: x @ W, x, signs)] == [3, 3, 1]


def test_the_benchmark_runs_in_a_process_of_its_own():
    bigmodels = pytest.importorskip("agop_book.book.bigmodels")
    row = bigmodels.big_cost_apart(name="MLP", samples=1000)
    assert row["sites"] == 3 and row["peak"] / 2 < row["planned"] < 2 * row["peak"], row
    assert row["model"] in bigmodels.big_costs_text(bigmodels.pd.DataFrame([row]))
    with pytest.raises(RuntimeError, match="VGG"):
        bigmodels.big_cost_apart(name="VGG")
    words = [sys.executable, "-m", "agop_book.book.bigmodels", "--csv", "/no/such/folder/x.csv"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode and "no/such/folder" in done.stderr and "GPT" not in done.stdout
