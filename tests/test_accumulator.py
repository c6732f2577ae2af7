"Sums that merge, what they refuse, and the memory that is planned for them."

import math
import warnings

import numpy as np
import pytest
import torch

from agop_book import memory
from agop_book.accumulator import AGOP
from agop_book.agop import agop
from agop_book.jacobians import pullbacks, random_signs
from agop_book.kernels import Laplace
from agop_book.machines import KernelMachine
from test_agop import f64, normal


def test_merge_equals_one_pass_and_large_means():
    J = normal(60, 4, 5) + 1e7
    spread = J - J.mean(0)
    expected = torch.einsum("ncd,nce->de", spread, spread) / 60
    parts = [AGOP(center=True).update(p) for p in J.split([1, 20, 9, 30])]
    total = parts[0] + parts[1] + AGOP(center=True) + (parts[2] + parts[3])
    assert total.n == 60 and torch.allclose(total.matrix, expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose((AGOP(center=True) + parts[1]).matrix, parts[1].matrix)
    assert parts[0].n == 1  # + leaves its operands alone


def test_more_centred_outputs_than_memory_holds(monkeypatch):
    "The mean Jacobian is the one thing that grows with the outputs."
    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": 2**18)
    x, W = normal(2, 50), normal(50, 1000)

    def f(x):
        return torch.tanh(x @ W)

    with pytest.raises(MemoryError, match="mean Jacobian .* 50 features.*Pass probes"):
        AGOP(center=True).update(pullbacks(f, x))
    signs = random_signs(4, torch.Generator(), fixed=True)
    assert AGOP(center=True, probes=4).update(pullbacks(f, x, signs)).n == 2


def test_memory_does_not_grow_with_outputs():
    x = normal(512, 1024, dtype=torch.float32)  # 2 MiB: 32 outputs fit the budget
    W = normal(1024, 100, dtype=torch.float32)
    sizes = [g.nbytes for g in pullbacks(lambda x: x @ W, x)]
    assert max(sizes) <= 2**26 and sum(sizes) == 100 * x.nbytes


J0 = normal(5, 2, 3)
NO_JACOBIANS = [
    (J0 * math.nan, ValueError, "not finite at 5 of 5"),
    (J0.index_fill(0, torch.tensor([1]), math.inf), ValueError, "not finite at 1 of 5"),
    (J0 + 1j, ValueError, "complex"),
    (J0.numpy() + 1j, ValueError, "complex"),
    (np.ma.masked_array(J0.numpy(), mask=J0.numpy() > 1), TypeError, "masked"),
    (np.full((1, 2, 3), "2020-01-01", "datetime64[D]"), TypeError, "dates"),
    (normal(5, 3, 3), ValueError, "3 outputs"),
    (J0 * 1e200, ValueError, "overflow float64"),
    (J0[:0], ValueError, "empty"),
]


@pytest.mark.parametrize("bad,error,words", NO_JACOBIANS, ids=[words for *_, words in NO_JACOBIANS])
def test_what_is_no_jacobian_leaves_the_sums_alone(bad, error, words):
    acc = AGOP(center=True).update(J0)
    before = acc.matrix
    with pytest.raises(error, match=f"jacobians.*{words}"):
        acc.update(bad)
    assert torch.equal(acc.matrix, before) and acc.n == 5


@pytest.mark.parametrize(
    "pieces",
    [[J0, J0 * math.nan], [J0[:, :1], J0[:4, 1:]], [J0[:, :1]]],
    ids=["not finite", "fewer samples", "fewer outputs"],
)
def test_a_batch_that_fails_halfway(pieces):
    acc = AGOP(center=True).update(J0)
    with pytest.raises(ValueError, match="jacobians"):
        acc.update(iter(pieces))
    with pytest.raises(ValueError, match="halfway"):
        acc.matrix
    with pytest.raises(ValueError, match="halfway"):
        AGOP(center=True).merge(acc)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_squares_outside_of_single_precision(scale):
    J = normal(40, 3, 5).float() * scale
    exact = torch.einsum("ncd,nce->de", J.double(), J.double()) / 40
    for options in ({}, {"diag": True}):
        A = AGOP(**options).update(J).matrix
        assert torch.allclose(A, exact.diagonal() if options else exact, rtol=1e-5)
    x = normal(9, 5).float()
    with pytest.raises(ValueError, match="float32 cannot hold; rescale f, or pass x in float64"):
        agop(lambda x: x * scale, x)
    assert torch.allclose(
        agop(lambda x: x * scale, x.double()), torch.eye(5, dtype=f64) * scale**2, rtol=1e-5
    )


@pytest.mark.parametrize(
    "way,options,dtype",
    [
        ("pullbacks", {"center": True}, torch.float32),
        ("pullbacks", {"probes": 3}, f64),
        ("closed_form", {}, f64),
    ],
)
def test_the_plan_is_what_is_taken(planned_and_taken, way, options, dtype):
    x, W = torch.randn(40, 5000, dtype=dtype), torch.randn(5000, 2, dtype=dtype)
    centers, coef = torch.randn(50, 5000, dtype=dtype), torch.randn(50, 2, dtype=dtype)
    functions = {
        "closed_form": KernelMachine(Laplace(99.0), centers, coef),
        "pullbacks": lambda x: torch.tanh(x @ W),
    }
    planned, taken = planned_and_taken(lambda: agop(functions[way], x, **options))
    assert taken > 8e7 and 0.9 * taken <= planned <= 1.3 * taken, (planned, taken)


def test_memory_is_planned_before_the_work_and_diagonals_pass(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": 2**30)
    x, d = torch.zeros(2, 60_000), 60_000

    def fail(x):
        pytest.fail("it began to work")

    machine = KernelMachine(Laplace(), torch.ones(2, d), torch.ones(2, 1))
    for call in (
        lambda **k: agop(fail, x, **k),
        lambda **k: agop(machine, x, **k),
        lambda **k: agop(fail, x.numpy(), **k),
    ):
        with pytest.raises(MemoryError, match="AGOP of 60,000 features takes .* GiB.*diag=True"):
            call()
    assert agop(lambda x: 2 * x[:, :1], x, diag=True).shape == (d,)
    assert agop(machine, x, diag=True).shape == (d,)
    with pytest.raises(MemoryError, match="60,000 features"):
        AGOP().update(torch.zeros(1, 1, d))
    with pytest.raises(MemoryError, match="probes"):
        agop(lambda x: x, normal(9, 6), probes=2**31 - 1)


def test_merging_demands_equal_outputs():
    with pytest.raises(TypeError, match="AGOP"):
        AGOP().merge(None)
    one, two = AGOP().update(normal(4, 2, 3)), AGOP().update(normal(4, 1, 3))
    with pytest.raises(ValueError, match="outputs"):
        one.merge(two)


@pytest.mark.parametrize("x", [normal(6, 3), normal(6, 3).numpy()], ids=["torch", "numpy"])
def test_gradients_whose_squares_vanish_are_told(x):
    with pytest.warns(UserWarning, match="1.0e-200.*rescale"):
        agop(lambda a: 1e-200 * a, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(
            agop(lambda a: 1e-120 * a, x) * 1e120 * 1e120, np.eye(3), rtol=1e-6, atol=1e-8
        )
