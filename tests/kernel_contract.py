"""What every kernel must do. A new kernel is one class, one line in KERNELS and its formula here.

`FORMULAS` holds each kernel once more, written for one pair of points and differentiable: nothing
of the package's own formulas is in it. `KernelContract` is inherited in `tests/test_kernels.py`,
which runs it for every kernel of `KERNELS`; a test of a kernel of one's own can inherit it too.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

from agop_book.kernels import (
    KERNELS,
    NTK,
    Gaussian,
    GeneralizedExponential,
    L1Laplace,
    Laplace,
    Matern32,
    Matern52,
)
from agop_book.machines import KernelMachine
from agop_book.metrics import METRICS, Shared
from agop_book.points import COLUMNS, TILE, Points

f64 = torch.float64


def distance(p, q, M):
    return ((p - q) @ M @ (p - q)).sqrt()


def ntk(kernel, p, q, M):
    a, b = (p @ M @ p).sqrt(), (q @ M @ q).sqrt()
    u = T = p @ M @ q / (a * b)
    for _ in range(kernel.depth):
        theta = torch.acos(u.clamp(-1, 1))
        on = (math.pi - theta) / math.pi
        u = (torch.sin(theta) + (math.pi - theta) * torch.cos(theta)) / math.pi
        T = T * on + u
    return a * b * T


def matern32(kernel, p, q, M):
    s = 3**0.5 * distance(p, q, M) / kernel.bandwidth
    return (1 + s) * torch.exp(-s)


def matern52(kernel, p, q, M):
    s = 5**0.5 * distance(p, q, M) / kernel.bandwidth
    return (1 + s + s**2 / 3) * torch.exp(-s)


FORMULAS = {  # class: k(kernel, p, q, M) for points `(d,)` and M `(d, d)`
    Laplace: lambda k, p, q, M: torch.exp(-distance(p, q, M) / k.bandwidth),
    Gaussian: lambda k, p, q, M: torch.exp(-((p - q) @ M @ (p - q)) / (2 * k.bandwidth**2)),
    GeneralizedExponential: lambda k, p, q, M: torch.exp(
        -((distance(p, q, M) / k.bandwidth) ** k.exponent)
    ),
    Matern32: matern32,
    Matern52: matern52,
    NTK: ntk,
    L1Laplace: lambda k, p, q, M: torch.exp(-(M @ (p - q).abs()).sum() / k.bandwidth),
}
MORE = [GeneralizedExponential(1.5, 1.4), GeneralizedExponential(1.5, 0.7), NTK(1), NTK(3)]


def example(cls):
    "A kernel of the class, whose bandwidth is that of the tests' points where it has one."
    fields = {field.name for field in dataclasses.fields(cls)}
    return cls(bandwidth=1.5) if "bandwidth" in fields else cls()


EVERY_KERNEL = [*map(example, KERNELS.values()), *MORE]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def metric(kind, d):
    "An M of the kind, with entries of size 1, for an even number of features."
    B = normal(d, d, seed=5)
    M = B @ B.T / d
    A = normal(2, 2, seed=6)
    return {"identity": None, "diag": M.diagonal(), "full": M, "shared": Shared(A @ A.T)}[kind]


def dense(M, d):
    "The same as a matrix `(d, d)`."
    if M is None:
        return torch.eye(d, dtype=f64)
    if isinstance(M, Shared):
        return M.dense(d)
    return torch.diag(M) if M.ndim == 1 else M


def slow_gram(kernel, x, z, M):
    "The Gram matrix by the formula, pair by pair."
    M, k = dense(M, x.shape[1]), FORMULAS[type(kernel)]
    return torch.stack([torch.stack([k(kernel, p, q, M) for q in z]) for p in x])


def slow_jacobian(kernel, x, z, coef, M):
    "Gradients `(n, c, d)` of the sum over `z`, by automatic differentiation of the formula."

    def f(p):
        return slow_gram(kernel, p[None], z, M)[0] @ coef

    return torch.stack([torch.autograd.functional.jacobian(f, p) for p in x])


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


class KernelContract:
    "Inherit, and give the tests a `kernel` (a fixture, or a parameter)."

    @pytest.fixture(params=METRICS)
    def M(self, request, kernel):
        "Every kind of M that the kernel takes, for 4 features."
        if request.param not in kernel.metrics:
            pytest.skip("the kernel does not take it")
        return metric(request.param, 4)

    def test_values_are_those_of_the_formula(self, kernel, M):
        x, z = normal(6, 4), normal(5, 4, seed=1)
        assert relative(kernel(x, z, M), slow_gram(kernel, x, z, M)) < 1e-12

    def test_symmetric_and_positive_semi_definite(self, kernel, M):
        K = kernel(normal(40, 4), M=M)
        assert relative(K, K.T) < 1e-14
        assert torch.linalg.eigvalsh(K).min() > -1e-12 * K.diagonal().max()

    def test_gradients_are_those_of_the_formula(self, kernel, M):
        x, z, coef = normal(6, 4), normal(5, 4, seed=1), normal(5, 2, seed=2)
        machine = KernelMachine(kernel, z, coef, M)
        exact = slow_jacobian(kernel, x, z, coef, M)
        assert relative(machine.jacobian(x), exact) < 1e-9
        brute = torch.einsum("ncd,nce->de", exact, exact) / 6
        assert relative(machine.agop(x), brute) < 1e-9
        assert relative(machine.agop(x, diag=True), brute.diagonal()) < 1e-9

    def test_gradients_at_the_centers_are_finite(self, kernel, M):
        x = normal(12, 4)
        x[3] = x[7]
        for x in (x, x.float()):
            J = KernelMachine(kernel, x, x[:, :2], M).jacobian(x)
            assert J.dtype == x.dtype and torch.isfinite(J).all()

    def test_a_tile_is_a_part_of_the_gram_matrix(self, kernel, M):
        x, z = normal(6, 4), normal(5, 4, seed=1)
        shift = kernel.shift(z)
        left, right = Points(x - shift, M), Points(z - shift, M)
        K, none = kernel.tile(left[2:5], right[1:], slopes=False)
        assert relative(K, kernel(x, z, M)[2:5, 1:]) < 1e-12 and none is None
        K2, A = kernel.tile(left[2:5], right[1:], slopes=True)
        assert torch.equal(K, K2)
        assert A.shape == K.shape if kernel.bilinear else A is None

    def test_single_precision(self, kernel, M):
        x, z, coef = normal(30, 4), normal(20, 4, seed=1), normal(20, 2, seed=2)
        K = kernel(x.float(), z.float(), M)
        assert K.dtype == torch.float32 and relative(K.double(), kernel(x, z, M)) < 1e-5
        exact = KernelMachine(kernel, z, coef, M).jacobian(x)
        J = KernelMachine(kernel, z.float(), coef, M).jacobian(x.float())
        assert J.dtype == torch.float32 and relative(J.double(), exact) < 1e-4

    def test_a_far_row_leaves_the_others_alone(self, kernel):
        x, coef = normal(60, 4), normal(60, 1, seed=2)
        coef[0] = 0
        far = x.float()
        far[0] *= 1e6
        assert relative(kernel(far)[1:, 1:].double(), kernel(x)[1:, 1:]) < 1e-5
        exact = KernelMachine(kernel, x, coef).jacobian(x)[1:]
        J = KernelMachine(kernel, far, coef).jacobian(far)[1:]
        assert relative(J.double(), exact) < 1e-3

    def test_all_points_may_move_where_the_kernel_says_so(self, kernel, M):
        if not kernel.stationary:
            pytest.skip("the kernel knows where the origin is")
        x, t = normal(20, 4), torch.tensor([1000.0, -500.0, 0.0, 3.0])
        assert relative(kernel(x + t, M=M), kernel(x, M=M)) < 1e-9
        single = (x + t).float()  # exact in double precision
        assert relative(kernel(single, M=M).double(), kernel(single.double(), M=M)) < 1e-5

    def test_a_metric_that_it_cannot_take_is_an_error(self, kernel):
        x = normal(5, 4)
        for kind in set(METRICS) - set(kernel.metrics):
            message = f"{type(kernel).__name__} cannot take M of the kind '{kind}'.*pass "
            with pytest.raises(ValueError, match=message):
                kernel(x, M=metric(kind, 4))
            with pytest.raises(ValueError, match=message):
                KernelMachine(kernel, x, x, metric(kind, 4))

    def test_many_centers_and_points_add_up(self, kernel):
        z, x = normal(COLUMNS + 8, 2), normal(TILE + 8, 2, seed=1)
        coef, half = normal(len(z), 1, seed=2), len(z) // 2
        whole = KernelMachine(kernel, z, coef)
        parts = [KernelMachine(kernel, z[s], coef[s]) for s in (slice(half), slice(half, None))]
        assert relative(whole(x[:9]), sum(part(x[:9]) for part in parts)) < 1e-9
        J = whole.jacobian(x[:9])
        assert relative(J, sum(part.jacobian(x[:9]) for part in parts)) < 1e-7
        part = parts[0]
        rows = torch.cat([part.jacobian(x[:100]), part.jacobian(x[100:])])
        spread = rows - rows.mean(0)
        exact = torch.einsum("ncd,nce->de", spread, spread) / len(x)
        assert relative(part.agop(x, center=True), exact) < 1e-9

    def test_families_of_arrays(self, kernel):
        x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
        K = kernel(x, x.astype(np.float64))
        assert isinstance(K, np.ndarray) and K.dtype == np.float64
        assert isinstance(kernel(torch.from_numpy(x)), torch.Tensor)

    def test_its_fields_say_all_about_it(self, kernel):
        "A model file keeps a kernel as its class's name and its fields."
        stored = {"name": type(kernel).__name__, **dataclasses.asdict(kernel)}
        classes = {cls.__name__: cls for cls in KERNELS.values()}
        again = classes[stored.pop("name")](**stored)
        assert again == kernel and hash(again) == hash(kernel)
        field = next(iter(stored))
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kernel, field, 2)
