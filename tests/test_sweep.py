"A sweep checks before it works."

import pytest
import torch
from networks import FEW, normal, small
from torch import nn

import agop_book.memory
from agop_book.nfa import nfa

pytestmark = pytest.mark.usefixtures("seed", "nothing_left_behind")


class Wide(nn.Module):
    "A layer whose sums fit nowhere, and that must not be computed."

    def __init__(self):
        super().__init__()
        self.small, self.huge = nn.Linear(4, 4), nn.Linear(30_000, 30_000, device="meta")

    def forward(self, x):
        pytest.fail("the model ran")


class Late(nn.Module):
    "A weight that is found when it acts."

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(1900, 1800))

    def forward(self, x):
        return torch.tanh(x @ self.W)


@pytest.mark.parametrize(
    "make, d, limit, match",
    [
        (Wide, 4, 2**32, r"huge \(6.7 GiB\).*4.0 GiB are free.*only="),
        (Late, 1900, 2**22, r"the largest: W"),
    ],
)
def test_the_sums_are_planned_before_the_work(monkeypatch, make, d, limit, match):
    def plan(*args, **options):
        return agop_book.memory.plan(*args, **{**options, "limit": limit})

    monkeypatch.setattr("agop_book.taps.plan", plan)
    with pytest.raises(MemoryError, match=match):
        nfa(make(), torch.randn(3, d), **FEW)


@pytest.mark.parametrize(
    "name, values",
    {
        "output": (True, "losses", 1.5),
        "rotations": (-1, 2.5, None, "2", 2**63, True),
        "probes": (1, True, 2**40, "4"),
        "only": ("(", 3, b"0"),
        "batch_size": (True, 0, 2**63),
    }.items(),
)
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


def test_a_network_without_values_is_refused():
    with pytest.raises(ValueError, match="'0.weight' is on the meta device"):
        nfa(small().to("meta"), normal(5, 4), **FEW)


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
