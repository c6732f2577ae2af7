"Data of any kind become batches."

from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from networks import FEW, normal, small
from torch import nn

from agop_book.nfa import nfa

pytestmark = pytest.mark.usefixtures("seed", "nothing_left_behind")


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


@pytest.mark.parametrize(
    "turn",
    [
        lambda a: a[::-1][::-1],
        lambda a: a.astype(">f8"),
        lambda a: a.astype(object),
        lambda a: a.astype(str),
        lambda a: a.astype(np.longdouble),
        lambda a: np.asfortranarray(a),
    ],
)
def test_arrays_of_any_layout_are_data(turn):
    model, x = small(), normal(5, 4).numpy()
    np.testing.assert_array_equal(nfa(model, turn(x), **FEW).pearson, nfa(model, x, **FEW).pearson)


@pytest.mark.parametrize(
    "data, error",
    [
        (np.array([["a"] * 4]), TypeError),
        (np.zeros(3, dtype=[("a", "f8")]), TypeError),
        (torch.eye(4).to_sparse(), TypeError),
        (torch.ones(3, 4, device="meta"), ValueError),
    ],
)
def test_what_is_no_data_is_named(data, error):
    with pytest.raises(error, match="data"):
        nfa(small(), data, **FEW)


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
