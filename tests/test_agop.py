"The operator against brute force, across families, loaders, probes and bad input."

import math
import warnings

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from sklearn.linear_model import LinearRegression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agop_book.accumulator import AGOP
from agop_book.agop import Sketch, agop
from agop_book.matrices import matrix_power, top_directions
from agop_book.differences import choose_steps, differences
from agop_book.jacobians import pullbacks, random_signs
from agop_book.kernels import Laplace
from agop_book.machines import KernelMachine

f64 = torch.float64
quick = settings(max_examples=15, deadline=None)


def normal(*shape, seed=0, dtype=f64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp(d=6, c=3, width=16, seed=0, dtype=f64):
    W, V = normal(d, width, seed=seed, dtype=dtype), normal(width, c, seed=seed + 1, dtype=dtype)
    return lambda x: torch.tanh(x.flatten(1) @ W) @ V


def brute(f, x, center=False, diag=False):
    J = torch.func.vmap(torch.func.jacrev(lambda r: f(r[None])[0]))(x)
    J = J.reshape(len(x), -1, x[0].numel())
    J = J - J.mean(0) if center else J
    A = torch.einsum("ncd,nce->de", J, J) / len(x)
    return A.diagonal() if diag else A


@quick
@given(
    n=st.integers(2, 9),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    c=st.integers(1, 7),
    center=st.booleans(),
    diag=st.booleans(),
    chunk=st.integers(1, 8),
    batch=st.integers(1, 9),
)
def test_any_shape_chunk_and_batch(n, shape, c, center, diag, chunk, batch):
    x = normal(n, *shape, seed=n)
    f = mlp(math.prod(shape), c)
    A = agop(f, x, center=center, diag=diag, chunk=chunk, batch_size=batch)
    assert A.shape == ((x[0].numel(),) if diag else (x[0].numel(),) * 2)
    assert (A - brute(f, x, center, diag)).abs().max() < 1e-10


@pytest.mark.parametrize("center", [False, True])
def test_outputs_of_any_shape(center):
    x, W = normal(7, 5), normal(5, 12)

    def g(x):
        return torch.sin(x @ W)

    assert torch.allclose(
        agop(lambda x: g(x).reshape(-1, 3, 2, 2), x, center=center),
        agop(g, x, center=center),
        atol=1e-12,
    )
    assert torch.allclose(
        agop(lambda x: g(x)[:, 0], x, center=center),
        agop(lambda x: g(x)[:, :1], x, center=center),
        atol=1e-12,
    )


def test_rotation():
    R, x, f = torch.linalg.qr(normal(6, 6)).Q, normal(20, 6), mlp()
    assert torch.allclose(agop(lambda x: f(x @ R.T), x), R.T @ agop(f, x @ R.T) @ R, atol=1e-11)


def test_operation_that_cannot_be_batched():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return torch.as_tensor(2 * g.numpy())

    x = normal(5, 3)
    assert torch.allclose(agop(Twice.apply, x), 4 * torch.eye(3, dtype=f64))


def test_contexts_and_side_effects():
    net, x = nn.Linear(4, 2).double(), normal(5, 4)
    with torch.no_grad():
        A = agop(net, x)
    with torch.inference_mode():
        B = agop(net, normal(5, 4))
    assert torch.equal(A, B) and not x.requires_grad and not A.requires_grad
    assert all(p.grad is None for p in net.parameters())
    x.requires_grad_()
    assert torch.equal(agop(net, x), A) and x.grad is None


@quick
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    center=st.booleans(),
    diag=st.booleans(),
)
def test_dtypes(dtype, center, diag):
    W = normal(5, 3)
    A = agop(
        lambda x: torch.tanh(x @ W.to(x.dtype)), normal(40, 5).to(dtype), center=center, diag=diag
    )
    assert A.dtype == (dtype if dtype in (torch.float64, torch.float32) else torch.float32)
    expected = brute(lambda x: torch.tanh(x @ W), normal(40, 5).to(dtype).double(), center, diag)
    rounding = {f64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert (A.double() - expected).norm() <= rounding * expected.norm()


def test_same_family_out():
    X, net = normal(30, 4), nn.Linear(4, 2).double()
    frame = pd.DataFrame(X.numpy(), columns=list("abcd"))
    A = agop(net, X)
    assert isinstance(agop(net, X.numpy()), np.ndarray) and np.allclose(agop(net, X.numpy()), A)
    B, D = agop(net, frame), agop(net, frame, diag=True)
    assert list(B.columns) == list(B.index) == list(D.index) == list("abcd") and np.allclose(B, A)
    assert agop(net, X.float().numpy()).dtype == np.float32
    assert isinstance(agop(net, DataLoader(X, 8), progress=False), torch.Tensor)
    assert np.allclose(agop(net, X.tolist()), A)
    assert isinstance(matrix_power(B, 0.5), pd.DataFrame)
    assert isinstance(top_directions(B, 2), pd.DataFrame)
    assert isinstance(matrix_power(D, 0.5), pd.Series)


def test_loaders_and_iterables():
    x, f = normal(23, 6), mlp()
    expected = brute(f, x)
    for loader in (
        DataLoader(x, 5),
        DataLoader(TensorDataset(x, torch.zeros(23)), 5, shuffle=True),
        iter(x.split(4)),
        (b.numpy() for b in x.split(9)),
    ):
        assert np.allclose(agop(f, loader, progress=False), expected, atol=1e-12)


@pytest.mark.parametrize("center,probes", [(False, 2), (False, 5), (True, 4), (True, 7)])
def test_probes_unbiased_with_honest_error(center, probes):
    x, f = normal(30, 6), mlp(c=20)
    exact, options = brute(f, x, center), dict(center=center, probes=probes, batch_size=11)
    runs = [agop(f, x, random_state=s, **options) for s in range(150)]
    mean = sum(r.matrix for r in runs) / len(runs)
    true = np.mean([float((r.matrix - exact).norm() ** 2) for r in runs]) ** 0.5
    promised = np.mean([r.error**2 for r in runs]) ** 0.5
    assert (mean - exact).norm() < 3 * true / len(runs) ** 0.5 and 0.8 < promised / true < 1.25


def test_probes_repeat_and_unpack():
    x, f = normal(10, 6), mlp()
    A, error = agop(f, x, probes=4, random_state=3)
    again = agop(f, x, probes=4, random_state=3)
    assert torch.equal(A, again.matrix) and error == again.error and isinstance(again, Sketch)
    assert again.relative == pytest.approx(error / float(A.norm()))
    one = agop(mlp(c=1), x, probes=2, center=True, random_state=0)
    assert torch.allclose(one.matrix, brute(mlp(c=1), x, True), atol=1e-12) and one.error < 1e-12
    assert agop(f, x, probes=4, diag=True).matrix.shape == (6,)


x0 = normal(6, 4)
BAD = [
    (lambda: agop(mlp(4), torch.full((3, 4), math.nan)), ValueError, "x contains NaN"),
    (lambda: agop(mlp(4), torch.full((3, 4), math.inf)), ValueError, "x contains NaN or inf"),
    (
        lambda: agop(mlp(4), DataLoader(torch.full((3, 4), math.nan), 2), progress=False),
        ValueError,
        "batch 0 of x",
    ),
    (lambda: agop(mlp(4), x0[0]), ValueError, r"x\[None\]"),
    (lambda: agop(mlp(4), x0[:0]), ValueError, "empty"),
    (lambda: agop(mlp(4), [x0[:0]][:0]), (ValueError, TypeError), "x "),
    (lambda: agop(mlp(4), iter([]), progress=False), ValueError, "empty"),
    (lambda: agop(mlp(4), x0 + 0j), ValueError, "complex"),
    (lambda: agop(mlp(4), np.array([["a", "b"]])), TypeError, "x must"),
    (lambda: agop(mlp(4), "x"), TypeError, "got str"),
    (lambda: agop(mlp(4), {"x": x0}), TypeError, "got dict"),
    (lambda: agop(mlp(4), iter([{"x": x0}]), progress=False), TypeError, "batch 0 of x is a dict"),
    (lambda: agop(mlp(4), TensorDataset(x0)), TypeError, "DataLoader"),
    (
        lambda: agop(
            LinearRegression().fit(x0, x0[:, 0]), pd.DataFrame({"a": ["u", "v"], "b": [1, 2]})
        ),
        TypeError,
        r"\['a'\]",
    ),
    (lambda: agop(mlp(4), x0.long()), TypeError, "embeddings"),
    (lambda: agop(nn.Linear(4, 1), x0.long().numpy()), TypeError, "int64"),
    (lambda: agop(mlp(4), x0[:1], center=True), ValueError, "one sample"),
    (lambda: agop(lambda x: x.sum(), x0), ValueError, "first axis"),
    (lambda: agop(lambda x: x.sum(0), x0), ValueError, "first axis"),
    (lambda: agop(lambda x: (x,), x0), TypeError, "returned tuple"),
    (lambda: agop(lambda x: x.argmax(1), x0), TypeError, "int64"),
    (lambda: agop(lambda x: x + 0j, x0), TypeError, "complex"),
    (lambda: agop(lambda x: x.detach().numpy(), x0), TypeError, "pass x as numpy"),
    (lambda: agop(lambda x: (x - x).sqrt(), x0), ValueError, "not finite"),
    (lambda: agop(lambda a: a.sum(), x0.numpy()), ValueError, "first axis"),
    (lambda: agop(lambda a: np.array(["u"] * len(a)), x0.numpy()), TypeError, "real numbers"),
    (lambda: agop(lambda a: a * np.nan, x0.numpy()), ValueError, "not finite"),
    (
        lambda: agop(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), x0.float()),
        ValueError,
        r"eval\(\)",
    ),
    (
        lambda: agop(nn.BatchNorm1d(4, track_running_stats=False).eval(), x0.float()),
        ValueError,
        "running statistics",
    ),
    (
        lambda: agop(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), x0.float()),
        ValueError,
        r"eval\(\)",
    ),
    (lambda: agop(mlp(4), x0, probes=1), ValueError, "at least 2; got 1|at least 2 .*got 1"),
    (lambda: agop(mlp(4), x0, probes=2.5), ValueError, "2.5"),
    (lambda: agop(LinearRegression().fit(x0, x0[:, 0]), x0, probes=4), ValueError, "probes=4"),
    *[
        (lambda v=v, n=n: agop(mlp(4), x0, **{n: v}), ValueError, f"{n} must be")
        for n in ("batch_size", "chunk", "probes")
        for v in (0, -1, True, 2.0, 2**63, "3")
    ],
    *[
        (lambda v=v: agop(lambda a: a, x0.numpy(), step=v), ValueError, "step must be")
        for v in (
            True,
            0,
            -1.0,
            math.nan,
            math.inf,
            1j,
            "1",
            [0.1] * 3,
            np.datetime64("2020-01-01"),
        )
    ],
    *[
        (lambda v=v: choose_steps(lambda a: a, x0.numpy(), pilot=v), ValueError, "pilot must be")
        for v in (0, True, 2**63)
    ],
    *[
        (lambda v=v: random_signs(v, torch.Generator()), ValueError, "k must be")
        for v in (0, True, 2**63)
    ],
    *[(lambda v=v: AGOP(probes=v), ValueError, "probes must be") for v in (0, 1, True, 2**63)],
    (lambda: list(pullbacks(mlp(4), x0, chunk=0)), ValueError, "chunk must be"),
    (lambda: differences(lambda a: a, x0.numpy(), np.zeros(4)), ValueError, "steps must be"),
    (lambda: agop(lambda a: np.ma.masked_array(a, a > 0), x0.numpy()), TypeError, "masked"),
    (lambda: agop(mlp(4), x0, method="guess"), ValueError, "'guess'"),
    (lambda: agop(mlp(4), x0, method="closed_form"), ValueError, "kernel machine"),
    (lambda: agop(3, x0), TypeError, "got int"),
    (lambda: agop(lambda a: a, x0.numpy(), step=-1.0), ValueError, "step"),
    (lambda: agop(lambda a: a, x0.numpy(), step=[1.0, 2.0]), ValueError, "step"),
    (lambda: agop(KernelMachine(Laplace(), x0, x0[:, :1]), x0[:, :3]), ValueError, "features"),
    (lambda: AGOP().matrix, ValueError, "empty"),
    (lambda: AGOP().update(torch.zeros(2, 3)), ValueError, "shape"),
    (
        lambda: AGOP().update(torch.zeros(2, 3, 4)).update(torch.zeros(2, 3, 5)),
        ValueError,
        "5 features",
    ),
    (lambda: AGOP() + AGOP(center=True), ValueError, "differ"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, error, words = BAD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=words):
            call()


def test_outputs_that_ignore_x():
    with pytest.warns(UserWarning, match="do not depend"):
        A = agop(lambda x: torch.ones(len(x), 2), x0)
    assert torch.equal(A, torch.zeros(4, 4, dtype=f64))
    p = torch.ones(1, requires_grad=True)
    assert torch.equal(agop(lambda x: p.expand(len(x), 1), x0), torch.zeros(4, 4, dtype=f64))


def test_eval_modules_pass():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)).eval()
    assert agop(net, x0.float()).shape == (4, 4)
    assert agop(net, x0).dtype == f64  # a module gets its own dtype


def test_a_function_may_change_what_it_gets():
    def doubled(a):
        a *= 2
        return a[:, :1] ** 2

    x = normal(9, 3)
    wanted = torch.zeros(3, 3, dtype=f64)
    wanted[0, 0] = (8 * x[:, 0]).square().mean()  # f(x) = 4 x_0^2
    for data in (x.clone(), x.clone().numpy()):
        np.testing.assert_allclose(agop(doubled, data), wanted, rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(data, x)


@pytest.mark.parametrize("x", [normal(6, 3), normal(6, 3).numpy()], ids=["torch", "numpy"])
def test_outputs_that_cannot_be_differentiated(x):
    with pytest.raises(ValueError, match=r", 0\).*no output"):
        agop(lambda a: a[:, :0], x)
    with pytest.raises(TypeError, match="scores"):
        agop(lambda a: a > 0, x)


def test_a_sparse_output_is_refused():
    with pytest.raises(TypeError, match="sparse"):
        agop(lambda a: a.to_sparse(), normal(6, 3))


@pytest.mark.parametrize(
    "family",
    [torch.Tensor.clone, torch.Tensor.numpy, lambda t: (t, t[:, 0])],
    ids=["tensors", "arrays", "tuples"],
)
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_batches(family, kind):
    x, smooth = normal(9, 3), mlp(3, 2)

    def f(a):
        return smooth(torch.as_tensor(a))

    A = agop(f, kind([family(x[:4]), family(x[4:8]), family(x[8:])]))
    assert A.shape == (3, 3)
    np.testing.assert_allclose(A, brute(smooth, x), rtol=1e-5, atol=1e-8)


def test_a_list_of_rows_is_an_array():
    x = normal(6, 3)

    def f(a):
        return np.tanh(a[:, :2]) * a[:, 2:]

    wanted = agop(f, x.numpy())
    for rows in (x.tolist(), list(x.numpy()), tuple(x.numpy())):
        np.testing.assert_array_equal(agop(f, rows), wanted)


@pytest.mark.parametrize("options", [{}, {"center": True}, {"probes": 4}, {"diag": True}])
def test_the_number_of_outputs_must_not_vary(options):
    def f(a):
        return a[:, : len(a)] ** 2  # as many outputs as samples

    for sizes in ((2, 3), (3, 2)):
        with pytest.raises(ValueError, match="outputs.*before.*same outputs"):
            agop(f, [normal(n, 4) for n in sizes], **options)
