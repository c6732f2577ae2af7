"Powers, directions and likeness of matrices."

import math

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given

from agop_book.kernels import Laplace
from agop_book.matrices import cosine, matrix_power, pearson, top_directions
from test_agop import f64, normal, quick


@quick
@given(
    d=st.integers(1, 8), p=st.sampled_from([0, 0.25, 0.5, 1, 2, -0.5, -1]), seed=st.integers(0, 50)
)
def test_powers(d, p, seed):
    B = normal(d, 2 * d, seed=seed)
    A = B @ B.T + 0.1 * torch.eye(d, dtype=f64)
    P = matrix_power(A, p)
    assert torch.allclose(P @ matrix_power(A, 1 - p), A, rtol=1e-8, atol=1e-8)
    assert torch.allclose(matrix_power(A.diagonal(), p), A.diagonal() ** p)
    assert np.allclose(matrix_power(A.numpy(), p), P)
    assert matrix_power(A.float(), p).dtype == torch.float32


def test_power_clipped():
    A = np.diag([2.0, -1.0])
    np.testing.assert_array_equal(matrix_power(A, 2, clip=True), np.diag([4.0, 0.0]))
    np.testing.assert_array_equal(matrix_power(A.diagonal(), 2, clip=True), [4.0, 0.0])


def test_power_of_a_rounded_low_rank_matrix():
    u = normal(200, 2, dtype=torch.float32)
    root = matrix_power(u @ u.T, 0.5)
    assert torch.isfinite(root).all() and torch.allclose(root @ root, u @ u.T, atol=1e-2)


def test_directions():
    Q = torch.linalg.qr(normal(6, 6)).Q
    A = (Q * torch.tensor([6.0, 5, 4, 3, 2, 1], dtype=f64)) @ Q.T
    V, w = top_directions((A + A.T) / 2, 3, values=True)
    assert torch.allclose(w, torch.tensor([6.0, 5, 4], dtype=f64)) and V.shape == (3, 6)
    assert torch.allclose((V @ Q[:, :3]).abs(), torch.eye(3, dtype=f64), atol=1e-12)
    assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()


def test_likeness():
    a, b = normal(5, 5), normal(5, 5, seed=1)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a.flatten(), b.flatten())[0, 1])
    assert pearson(a, a.numpy()) == pytest.approx(1)
    assert cosine(1e200 * a, 1e-200 * a) == pytest.approx(1)
    with pytest.warns(UserWarning, match="A is constant"):
        assert math.isnan(pearson(torch.ones(3, 3) * 0.1, torch.eye(3)))
    with pytest.warns(UserWarning, match="B is zero"):
        assert math.isnan(cosine(torch.eye(3), torch.zeros(3, 3)))


BAD = [
    (lambda: matrix_power(-torch.eye(3), 0.5), ValueError, "eigenvalue -1"),
    (lambda: matrix_power(torch.diag(torch.tensor([1.0, 0.0])), -1), ValueError, "ridge"),
    (lambda: matrix_power(torch.ones(2, 3), 1), ValueError, "square"),
    (lambda: matrix_power(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 1), ValueError, "symmetric"),
    (lambda: matrix_power(torch.eye(2), math.nan), ValueError, "p must"),
    (lambda: top_directions(torch.eye(3), 4), ValueError, "from 1 to 3"),
    (lambda: top_directions(torch.ones(3)), ValueError, "full matrix"),
    *[
        (lambda v=v, g=g: g(v), error, f"A .*{words}")
        for g in (
            lambda A: matrix_power(A, 0.5),
            top_directions,
            lambda A: cosine(A, np.eye(2)),
            lambda A: pearson(A, np.eye(2)),
        )
        for v, error, words in (
            (torch.eye(2) + 0j, ValueError, "complex"),
            (np.eye(2) + 0j, ValueError, "complex"),
            (pd.DataFrame(np.eye(2) + 0j), ValueError, "complex"),
            (np.eye(2) * math.nan, ValueError, "NaN"),
            (np.ma.masked_array(np.eye(2), np.eye(2) > 0), TypeError, "masked"),
            (np.full((2, 2), "2020-01-01", "datetime64[D]"), TypeError, "dates"),
            (pd.DataFrame({"u": ["a", "b"], "v": [1, 2]}), TypeError, "not numbers"),
            (np.zeros((0, 0)), ValueError, "empty"),
        )
    ],
    *[
        (lambda v=v: top_directions(torch.eye(3), v), ValueError, "k must be")
        for v in (True, 0, 2**63, 1.0)
    ],
    *[
        (lambda v=v: matrix_power(torch.eye(3), v), ValueError, "p must be")
        for v in (True, 1j, "1", math.inf)
    ],
    (lambda: matrix_power(torch.eye(3).double() * 1e300, 2), ValueError, "overflows"),
    (lambda: cosine(torch.eye(2), torch.eye(3)), ValueError, "agree"),
    (lambda: pearson(torch.eye(2) * math.nan, torch.eye(2)), ValueError, "A contains NaN"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_matrices(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()


def test_a_matrix_of_single_precision_may_have_its_rounding():
    U = torch.linalg.qr(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))[0]
    M = (U @ U.T).float()
    M = (M + M.T) / 2
    x = torch.randn(5, 50, dtype=torch.float64)
    assert torch.isfinite(Laplace(1.0)(x, M=M - 1e-7 * torch.eye(50))).all()
    with pytest.raises(ValueError, match="semi-definite"):
        Laplace(1.0)(x, M=(M - 1e-7 * torch.eye(50)).double())
