"""Kernels: the contract for every registered one, and what is particular to some; bad input."""

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_contract import EVERY_KERNEL, FORMULAS, MORE, KernelContract, normal, slow_gram

from agop_book.arrays import as_tensor
from agop_book.kernels import (
    KERNELS,
    NTK,
    Gaussian,
    GeneralizedExponential,
    Kernel,
    L1Laplace,
    Laplace,
)
from agop_book.machines import KernelMachine
from agop_book.metrics import METRICS, check_metric

f64 = torch.float64
every_kernel = pytest.mark.parametrize("kernel", EVERY_KERNEL, ids=str)


@every_kernel
class TestEveryKernel(KernelContract):
    "All of KERNELS, and some with other parameters."


def test_every_registered_kernel_has_a_formula_in_the_contract():
    assert set(KERNELS.values()) <= set(FORMULAS)      # tests of other kernels add theirs
    assert {type(kernel) for kernel in MORE} <= set(KERNELS.values())


def test_a_kernel_says_what_it_lacks():
    @dataclass(frozen=True)
    class Nothing(Kernel):
        bandwidth: float = 1.0

    @dataclass(frozen=True)
    class Linear(Nothing):
        def tile(self, left, right, slopes=False):
            K = left.xM @ right.x.T
            return K, torch.ones_like(K) if slopes else None

    with pytest.raises(TypeError, match="abstract.*tile"):
        Nothing()
    machine = KernelMachine(Linear(), normal(3, 2), normal(3, 1))
    assert torch.allclose(machine(normal(4, 2)), normal(4, 2) @ normal(3, 2).T @ normal(3, 1))
    with pytest.raises(NotImplementedError, match="Linear needs complete"):
        machine.agop()


def psd(rng, d, form):
    B = rng.normal(size=(d, d))
    forms = {
        "none": None,
        "diag": rng.random(d) + 0.1,
        "full": B @ B.T / d,
        "low rank": B[:, :1] @ B[:, :1].T,
    }
    return forms[form]


def taken(kernel):
    "Forms of M that the kernel takes."
    return ["none", "diag", "full", "low rank"][: 4 if "full" in kernel.metrics else 2]


@every_kernel
@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 5),
    m=st.integers(1, 5),
    d=st.integers(1, 6),
    which=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_gram_matrix_of_any_shape(kernel, n, m, d, which, seed):
    rng, forms = np.random.default_rng(seed), taken(kernel)
    x, z = rng.normal(size=(n, d)), rng.normal(size=(m, d))
    M = psd(rng, d, forms[which % len(forms)])
    got = kernel(x, z, M)
    assert isinstance(got, np.ndarray) and got.shape == (n, m)
    exact = slow_gram(
        kernel, torch.from_numpy(x), torch.from_numpy(z), None if M is None else torch.from_numpy(M)
    )
    # near coincidence r is only as exact as the square root of the rounding of r^2
    rough = getattr(kernel, "exponent", 1) < 1
    np.testing.assert_allclose(got, exact, atol=1e-5 if rough else 1e-6)


# of the others the cusp is steeper than a difference can follow
BLUNT = [k for k in EVERY_KERNEL if not isinstance(k, NTK) and getattr(k, "exponent", 1) >= 1]


@pytest.mark.parametrize("kernel, form", [(k, form) for k in BLUNT for form in taken(k)])
def test_jacobian_at_coincident_points_is_the_central_difference(kernel, form):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(12, 4)))
    x[3] = x[7]
    M = psd(rng, 4, form)
    machine = KernelMachine(kernel, x, torch.from_numpy(rng.normal(size=(12, 2))), M)
    h, eye = 1e-4, torch.eye(4, dtype=f64)
    moved = [(machine(x + h * e) - machine(x - h * e)) / (2 * h) for e in eye]
    torch.testing.assert_close(machine.jacobian(x), torch.stack(moved, -1), atol=2e-4, rtol=1e-3)


def test_centring_survives_a_large_mean_gradient():
    "A steep plane plus a small wave: the covariance of the gradients is that of the wave."
    x, kernel = normal(300, 2) * 0.1, Gaussian(5.0)
    wave, plane = 1e-3 * torch.sin(x[:, 0]), 1e4 * x[:, 1]
    K = kernel(x) + 1e-9 * torch.eye(300)
    machine = KernelMachine(kernel, x, torch.linalg.solve(K, wave + plane))
    J = machine.jacobian(x)
    spread = J - J.mean(0)
    exact = torch.einsum("ncd,nce->de", spread, spread) / 300
    torch.testing.assert_close(machine.agop(center=True), exact, rtol=1e-6, atol=1e-12)


def test_a_kernel_of_no_matrix_of_slopes_learns_features():
    "Rounds of a ridge regression and its AGOP with the l1 kernel: the two features in y stand out."
    x, M = normal(120, 6), None
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2].abs()
    for _ in range(3):
        kernel = L1Laplace(4.0)
        K = kernel(x, M=M) + 1e-3 * torch.eye(120)
        machine = KernelMachine(kernel, x, torch.linalg.solve(K, y), M)
        M = machine.agop(diag=True)
        M = M / M.max()
    assert M[:2].min() > 5 * M[2:].max()


@pytest.mark.parametrize("family", ["numpy", "torch", "pandas"])
def test_families(family):
    a = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    x = {"numpy": a, "torch": torch.from_numpy(a), "pandas": pd.DataFrame(a)}[family]
    K = Laplace(2.0)(x, x)
    assert isinstance(K, torch.Tensor if family == "torch" else np.ndarray)
    assert str(K.dtype).endswith("float32") and np.allclose(np.diag(K), 1)


BAD_POINTS = [
    (np.full((2, 2), np.nan), "x contains NaN or infinity"),
    (np.full((2, 2), np.inf), "x contains NaN or infinity"),
    (np.ones(3), "x must have 2 axes"),
    (np.ones((0, 3)), "x is empty"),
    (np.ones((3, 0)), "x is empty"),
    (np.ones((2, 2)) * 1j, "x is complex"),
    (np.array([["a"]]), "x must hold real numbers"),
    (np.array([[10**400]], dtype=object), "x must hold real numbers"),
    (np.eye(2) * 1e200, "overflow"),
    (np.array([["2020-01-01"]], dtype="datetime64[D]"), "dates"),
]


@pytest.mark.parametrize("x, message", BAD_POINTS)
def test_bad_points(x, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Laplace(1.0)(x)


BAD_METRICS = [
    (-np.eye(3), "smallest eigenvalue"),
    (np.array([1.0, 1.0, -1.0]), "smallest eigenvalue"),
    (np.eye(2), "with 3 features"),
    (np.triu(np.ones((3, 3))), "not symmetric"),
    (np.full((3, 3), np.nan), "M contains NaN"),
    (np.ones((3, 3, 3)), "with 3 features"),
]


@pytest.mark.parametrize("M, message", BAD_METRICS)
def test_bad_metric(M, message):
    with pytest.raises(ValueError, match=message):
        Laplace(1.0)(np.ones((2, 3)), M=M)


def test_metric_with_rounding_is_accepted():
    B = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert check_metric(B @ B.T, 40, B) is not None
    assert check_metric(torch.zeros(3), 3, torch.zeros(1)) is not None


def machine_of(n, coefficients):
    return KernelMachine(Laplace(1.0), np.ones((n, 3)), np.ones(coefficients))


BAD_PARAMETERS = [
    (lambda: Laplace(0.0), "bandwidth"),
    (lambda: Gaussian(-1), "bandwidth"),
    (lambda: Laplace(np.nan), "bandwidth"),
    (lambda: Laplace(np.inf), "bandwidth"),
    (lambda: Laplace("1"), "bandwidth"),
    (lambda: L1Laplace(0.0), "bandwidth"),
    (lambda: GeneralizedExponential(1.0, 2.5), "exponent"),
    (lambda: NTK(0), "depth"),
    (lambda: NTK(1.5), "depth"),
    (lambda: Laplace(1.0)(np.ones((2, 3)), np.ones((2, 4))), "3 features and z has 4"),
    (lambda: machine_of(2, 3), "3 rows for 2 centers"),
    (lambda: machine_of(2, 2)(np.ones((2, 2))), "made with 3"),
]


@pytest.mark.parametrize("make, message", BAD_PARAMETERS)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("bandwidth", [1e-150, 1e-30, 1e30, 1e150])
@pytest.mark.parametrize("name", [k for k in KERNELS if k != "ntk"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_bandwidths_stay_finite(name, bandwidth, dtype):
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(dtype)
    kernel = KERNELS[name](bandwidth)
    K = kernel(x)
    assert np.isfinite(K).all() and np.allclose(np.diag(K), 1)
    assert np.isfinite(KernelMachine(kernel, x, np.ones(6)).jacobian(x)).all()


def test_ntk_at_the_origin_and_along_a_ray():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]], dtype=f64)
    machine, K = KernelMachine(NTK(2), x, torch.ones(4)), NTK(2)(x)
    assert torch.isfinite(K).all() and torch.isfinite(machine.jacobian(x)).all()
    assert K[1, 2] == pytest.approx(6.0, abs=1e-6)  # |x| |z| (depth + 1)


def test_read_only_and_strided_arrays():
    a = np.arange(12.0).reshape(3, 4)
    a.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_tensor(a).shape == as_tensor(a[:, ::-1]).shape == (3, 4)
        assert as_tensor(a.astype(">f8")).dtype == f64


def test_the_kinds_of_metric_that_a_kernel_claims_exist():
    for cls in KERNELS.values():
        assert set(cls.metrics) <= set(METRICS) and "identity" in cls.metrics
