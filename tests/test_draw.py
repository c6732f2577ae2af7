"""Pictures: bad input, and what must hold for any input."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agop_book import draw as D


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


BAD_IMAGES = [
    (np.zeros((3, 3)), {}, "shape"),
    (np.zeros((2, 5, 3, 3)), {}, "shape"),
    (np.zeros((0, 3, 3)), {}, "empty"),
    (np.full((1, 2, 2), np.nan), {}, "NaN"),
    (np.zeros((2, 9)), dict(shape=(2, 4)), "rows of size"),
    (np.zeros((2, 3, 3)), dict(titles=["a"]), "titles"),
    (np.ones((2, 3, 3)), dict(ncols=0), "ncols=0"),
    (np.ones((2, 3, 3)), dict(ncols=-1), "ncols=-1"),
    (np.ones((2, 3, 3)), dict(ncols=2**63), "ncols=9223"),
    (np.ones((2, 3, 3)), dict(size=-1), "size=-1"),
    (np.ones((2, 3, 3)), dict(size=float("nan")), "size=nan"),
    (np.ones((2, 4)), dict(shape=(-2, -2)), "shape=-2"),
]


@pytest.mark.parametrize("images, options, text", BAD_IMAGES)
def test_bad_images(images, options, text):
    with pytest.raises(ValueError, match=text):
        D.show_images(images, **options)


@pytest.mark.parametrize("values", [np.zeros((1, 2, 2), complex), [[["a", "b"]]]])
def test_images_must_be_real_numbers(values):
    with pytest.raises(TypeError, match="real numbers"):
        D.show_images(values)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 9),
    st.sampled_from([(), (1,), (3,)]),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(["float32", "float64", "int64", "uint8", "bool"]),
)
def test_any_images(k, c, h, w, dtype):
    x = (np.random.default_rng(0).normal(size=(k, *c, h, w)) * 3).astype(dtype)
    for value in (x, torch.from_numpy(x)):
        fig = D.show_images(value, ncols=4)
        assert sum(bool(ax.images) for ax in fig.axes) == k
        plt.close(fig)


def test_sign_does_not_matter():
    v = torch.randn(2, 16, requires_grad=True, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        fig = D.show_images(sign * v, shape=(4, 4))
        for image in [im for ax in fig.axes for im in ax.images]:
            low, high = image.get_clim()
            assert low == -high and np.isclose(high, np.abs(image.get_array()).max())


def test_colours_are_grey_at_zero():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 2))
    x[0, :, 0, 0] = 0
    for sign in (1, -1):
        shown = D.show_images(sign * x).axes[0].images[0].get_array()
        assert np.allclose(shown[0, 0], 0.5) and np.allclose(shown - 0.5, sign * x[0].transpose(
            1, 2, 0) / (2 * np.abs(x).max()))


def test_show_matrix():
    fig = D.show_matrix([np.eye(3), -torch.eye(3)], ["a", "b"])
    assert [ax.get_title() for ax in fig.axes[:2]] == ["a", "b"]
    fig = D.show_matrix(pd.DataFrame(np.eye(2), ["a", "b"], ["c", "d"]), "one")
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == ["c", "d"]
    for wrong in (np.zeros(3), np.zeros((0, 0)), np.array([[np.inf]])):
        with pytest.raises(ValueError, match=r"matrices\[0\]"):
            D.show_matrix(wrong)
    with pytest.raises(ValueError, match="titles"):
        D.show_matrix([np.eye(2)], ["a", "b"])
    with pytest.raises(ValueError, match="empty"):
        D.show_matrix([])
    with pytest.raises(ValueError, match="size=1"):
        D.show_matrix(np.ones((2, 2)), size=1e9)


def test_curves():
    df = pd.DataFrame({"n": [1, 1, 2, 2], "err": [1.0, 3.0, 2.0, 2.0], "m": ["a"] * 4})
    ax = D.curves(df, "n", "err", "m", spread="minmax")
    assert list(ax.lines[0].get_ydata()) == [2, 2]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1, 3)
    ax = D.curves(df, "n", "err")
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert np.allclose((band.min(), band.max()), (2 - 2**0.5, 2 + 2**0.5))
    one = D.curves(df.iloc[:1], "n", "err")  # one run: no spread, no error
    assert list(one.lines[0].get_ydata()) == [1]
    with pytest.raises(KeyError, match="'x'.*not a column"):
        D.curves(df, "x", "err")
    with pytest.raises(ValueError, match="spread='range'"):
        D.curves(df, "n", "err", spread="range")
