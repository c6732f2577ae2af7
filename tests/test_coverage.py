"What is not seen is said."

import numpy as np
import pytest
import torch
from networks import FEW, Unheard
from torch import nn

from agop_book.nfa import nfa, summary

pytestmark = pytest.mark.usefixtures("seed", "nothing_left_behind")


class Hidden(nn.Module):
    "A product that nobody can hear."

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
        return (Unheard.apply(h, self.W)[..., None] * self.scale).sum(-2)


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
    class Half(nn.ModuleDict):
        def forward(self, x):
            return self["a"](x)

    model = Half(dict(a=nn.Linear(3, 3), q_proj=nn.Linear(3, 3)))
    with pytest.warns(UserWarning, match="q_proj.weight"):
        table = nfa(model, torch.randn(5, 3), **FEW)
    rows = summary(table)
    assert (
        rows.loc["all", "unreached"] == 1
        and rows.loc["query", "sites"] == 0
        and rows.loc["query", "unreached"] == 1
        and np.isnan(rows.loc["query", "pearson"])
    )
