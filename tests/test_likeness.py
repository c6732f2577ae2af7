"The comparison in the small frame: sizes, and the network before training."

import warnings

import numpy as np
import pytest
import torch
from networks import FEW, normal
from torch import nn

from agop_book.nfa import nfa

pytestmark = pytest.mark.usefixtures("seed", "nothing_left_behind")


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


@pytest.mark.parametrize("size", [1e-90, 1e-60, 1e80])
def test_weights_of_any_size_in_float64(size):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double(), normal(5, 4)
    model[1].weight.data.div_(model[1].weight.abs().max())
    want = nfa(model, x, initial=model, **FEW)
    model[0].weight.data.mul_(size)
    table = nfa(model, x, initial=model, **FEW)
    for column in ("pearson", "cosine", "pearson_weights"):
        np.testing.assert_allclose(table[column], want[column], atol=1e-7)
