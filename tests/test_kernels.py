"""Kernels against independent computations, over shapes, dtypes and metrics; bad input."""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agop_book.arrays import as_tensor
from agop_book.kernels import KERNELS, NTK, Gaussian, GeneralizedExponential, Laplace, Matern32, Matern52
from agop_book.machines import KernelMachine
from agop_book.metrics import check_metric

ALL = [Laplace(1.5), Gaussian(1.5), GeneralizedExponential(1.5, 1.4), GeneralizedExponential(1.5, 0.7), Matern32(1.5), Matern52(1.5), NTK(1), NTK(3)]
RADIAL = ALL[:6]
names = lambda k: f"{type(k).__name__}-{getattr(k, 'exponent', getattr(k, 'depth', ''))}"


def psd(rng, d, form):
    B = rng.normal(size=(d, d))
    return {"none": None, "diag": rng.random(d) + 0.1, "full": B @ B.T / d, "low rank": B[:, :1] @ B[:, :1].T}[form]


def slow_gram(kernel, x, z, M):
    "Radial Gram matrix from explicit differences."
    M = np.eye(x.shape[1]) if M is None else np.diag(M) if M.ndim == 1 else M
    diff = x[:, None] - z
    r = np.sqrt(np.maximum(np.einsum("ijd,de,ije->ij", diff, M, diff), 0))
    return kernel.phi(torch.from_numpy(r)).numpy()


@pytest.mark.parametrize("kernel", RADIAL, ids=names)
@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 9), m=st.integers(1, 9), d=st.integers(1, 6), form=st.sampled_from(["none", "diag", "full", "low rank"]), seed=st.integers(0, 10**6))
def test_gram_equals_explicit_differences(kernel, n, m, d, form, seed):
    rng = np.random.default_rng(seed)
    x, z, M = rng.normal(size=(n, d)), rng.normal(size=(m, d)), psd(rng, d, form)
    got = kernel(x, z, M)
    assert isinstance(got, np.ndarray) and got.shape == (n, m)
    # near coincidence r is only as exact as the square root of the rounding of r^2
    np.testing.assert_allclose(got, slow_gram(kernel, x, z, M), atol=1e-5 if getattr(kernel, "exponent", 1) < 1 else 1e-6)


@pytest.mark.parametrize("kernel", ALL, ids=names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["none", "diag", "full", "low rank"])
def test_jacobian_is_finite_at_coincident_points_and_matches_central_differences(kernel, dtype, form):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(12, 4))).to(dtype)
    x[3] = x[7]
    M = psd(rng, 4, form)
    machine = KernelMachine(kernel, x, torch.from_numpy(rng.normal(size=(12, 2))), M)
    J = machine.jacobian(x)
    assert J.shape == (12, 2, 4) and J.dtype == dtype and torch.isfinite(J).all()
    if dtype == torch.float64 and not isinstance(kernel, NTK) and getattr(kernel, "exponent", 1) >= 1:
        h, eye = 1e-4, torch.eye(4, dtype=dtype)
        difference = torch.stack([(machine(x + h * e) - machine(x - h * e)) / (2 * h) for e in eye], -1)
        torch.testing.assert_close(J, difference, atol=2e-4, rtol=1e-3)
    brute = torch.einsum("ncd,nce->de", J, J) / 12
    torch.testing.assert_close(machine.agop(), brute, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(machine.agop(diag=True), brute.diagonal(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ALL, ids=names)
def test_blocks_do_not_change_the_result(kernel, monkeypatch):
    x = torch.randn(70, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    machine = KernelMachine(kernel, x, x[:, :2])
    whole = machine(x), machine.agop(center=True)
    monkeypatch.setattr("agop_book.machines.TILE", 16)
    monkeypatch.setattr("agop_book.points.blocks.__defaults__", (16,))
    torch.testing.assert_close(machine(x), whole[0])
    torch.testing.assert_close(machine.agop(center=True), whole[1])


def test_centring_survives_a_large_mean_gradient():
    "A steep plane plus a small wave: the covariance of the gradients is that of the wave."
    x = torch.randn(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    kernel = Gaussian(5.0)
    K = kernel(x)
    wave, plane = 1e-3 * torch.sin(x[:, 0]), 1e4 * x[:, 1]
    machine = KernelMachine(kernel, x, torch.linalg.solve(K + 1e-9 * torch.eye(300), wave + plane))
    J = machine.jacobian(x)
    spread = J - J.mean(0)
    torch.testing.assert_close(machine.agop(center=True), torch.einsum("ncd,nce->de", spread, spread) / 300, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("family", ["numpy", "torch", "pandas"])
def test_families(family):
    a = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    x = {"numpy": a, "torch": torch.from_numpy(a), "pandas": pd.DataFrame(a)}[family]
    K = Laplace(2.0)(x, x)
    assert isinstance(K, torch.Tensor if family == "torch" else np.ndarray)
    assert str(K.dtype).endswith("float32") and np.allclose(np.diag(K), 1)


@pytest.mark.parametrize("x, message", [
    (np.full((2, 2), np.nan), "x contains NaN or infinity"), (np.full((2, 2), np.inf), "x contains NaN or infinity"), (np.ones(3), "x must have 2 axes"),
    (np.ones((0, 3)), "x is empty"), (np.ones((3, 0)), "x is empty"), (np.ones((2, 2)) * 1j, "x is complex"), (np.array([["a"]]), "x must hold real numbers"),
    (np.array([[10**400]], dtype=object), "x must hold real numbers"), (np.eye(2) * 1e200, "overflow"), (np.array([["2020-01-01"]], dtype="datetime64[D]"), "dates"),
])
def test_bad_points(x, message):
    with pytest.raises((ValueError, TypeError), match=message): Laplace(1.0)(x)


@pytest.mark.parametrize("M, message", [
    (-np.eye(3), "smallest eigenvalue"), (np.array([1.0, 1.0, -1.0]), "smallest eigenvalue"), (np.eye(2), "with 3 features"), (np.triu(np.ones((3, 3))), "not symmetric"),
    (np.full((3, 3), np.nan), "M contains NaN"), (np.ones((3, 3, 3)), "with 3 features"),
])
def test_bad_metric(M, message):
    with pytest.raises(ValueError, match=message): Laplace(1.0)(np.ones((2, 3)), M=M)


def test_metric_with_rounding_is_accepted():
    B = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert check_metric(B @ B.T, 40, B) is not None
    assert check_metric(torch.zeros(3), 3, torch.zeros(1)) is not None


@pytest.mark.parametrize("make, message", [
    (lambda: Laplace(0.0), "bandwidth"), (lambda: Gaussian(-1), "bandwidth"), (lambda: Laplace(np.nan), "bandwidth"), (lambda: Laplace(np.inf), "bandwidth"), (lambda: Laplace("1"), "bandwidth"),
    (lambda: GeneralizedExponential(1.0, 2.5), "exponent"), (lambda: NTK(0), "depth"), (lambda: NTK(1.5), "depth"),
    (lambda: Laplace(1.0)(np.ones((2, 3)), np.ones((2, 4))), "3 features and z has 4"),
    (lambda: KernelMachine(Laplace(1.0), np.ones((2, 3)), np.ones(3)), "3 rows for 2 centers"),
    (lambda: KernelMachine(Laplace(1.0), np.ones((2, 3)), np.ones(2))(np.ones((2, 2))), "made with 3"),
])
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message): make()


@pytest.mark.parametrize("bandwidth", [1e-150, 1e-30, 1e30, 1e150])
@pytest.mark.parametrize("name", [k for k in KERNELS if k != "ntk"])
def test_extreme_bandwidths_stay_finite(name, bandwidth):
    x = np.random.default_rng(0).normal(size=(6, 2))
    kernel = KERNELS[name](bandwidth)
    K = kernel(x)
    assert np.isfinite(K).all() and np.allclose(np.diag(K), 1)
    assert np.isfinite(KernelMachine(kernel, x, np.ones(6)).jacobian(x)).all()


def test_ntk_at_the_origin_and_along_a_ray():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    machine = KernelMachine(NTK(2), x, torch.ones(4))
    assert torch.isfinite(NTK(2)(x)).all() and torch.isfinite(machine.jacobian(x)).all()
    assert torch.allclose(NTK(2)(x)[1, 2], torch.tensor(6.0, dtype=torch.float64), atol=1e-6)     # |x| |z| (depth + 1)


def test_read_only_and_strided_arrays():
    a = np.arange(12.0).reshape(3, 4)
    a.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_tensor(a).shape == (3, 4) and as_tensor(a[:, ::-1]).shape == (3, 4) and as_tensor(a.astype(">f8")).dtype == torch.float64
