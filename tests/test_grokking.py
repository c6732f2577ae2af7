"""Arithmetic modulo p: tables and their errors, the quadratic kernel by autograd, circulants by
least squares, growth by hand, and what a renaming must not change."""

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from kernel_contract import FORMULAS, KernelContract
from PIL import Image

from agop_book.book.grokking_features import PLANTED, planted_metric, planted_run, squares_run
from agop_book.book.grokking_figures import block_film
from agop_book.book.grokking_study import grokking_run, latin_square, named_table, rounds_to
from agop_book.grokking import (
    Quadratic,
    RootSolver,
    circulant_metric,
    circulant_part,
    circulant_share,
    quadratic_forms,
)
from agop_book.kernels import Gaussian
from agop_book.machines import KernelMachine
from agop_book.modular import addition_order, discrete_logarithms, modular_table, split_table
from agop_book.rfm import RFMRegressor
from agop_book.solvers import CholeskySolver, rounds



def quadratic(kernel, p, q, M):
    return (p @ M @ q) ** 2


FORMULAS[Quadratic] = quadratic
OPERATIONS = {"+": lambda a, b, p: a + b, "-": lambda a, b, p: a - b,
              "*": lambda a, b, p: a * b, "/": lambda a, b, p: a * pow(b, p - 2, p)}
each_operation = pytest.mark.parametrize("op", OPERATIONS)


class TestQuadratic(KernelContract):
    @pytest.fixture
    def kernel(self):
        return Quadratic()

    def test_its_fields_say_all_about_it(self, kernel):
        assert Quadratic() == kernel and hash(Quadratic()) == hash(kernel)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def slow_agop(machine, x):
    "Covariance of the gradients of all outputs, by autograd of the prediction."
    def f(point):
        k = FORMULAS[type(machine.kernel)]
        M = torch.eye(x.shape[1]).double() if machine.M is None else machine.M
        return torch.stack([k(machine.kernel, point, z, M) for z in machine.centers]) @ machine.coef
    J = torch.stack([torch.autograd.functional.jacobian(f, row) for row in x])
    J = J - J.mean(0)
    return torch.einsum("ncd,nce->de", J, J) / len(x)


@pytest.mark.parametrize("kernel", [Quadratic(), Gaussian(1.5)])
@pytest.mark.parametrize("solver", [CholeskySolver, RootSolver])
def test_agops_of_solvers_are_those_of_autograd(kernel, solver):
    X, Y, B = normal(25, 4), normal(25, 3, seed=1), normal(4, 4, seed=2)
    options = {"center": True} if solver is CholeskySolver else {}
    made = solver(kernel, X, Y, [1e-3], **options)
    for M in (None, B @ B.T):
        fit = next(made.fits(M))
        exact = slow_agop(fit.machine, X)
        assert (made.agop(fit) - exact).abs().max() < 1e-8 * exact.abs().max()
        if solver is RootSolver:
            root = made.next_metric(fit)
            assert (root @ root - exact).abs().max() < 1e-8 * exact.abs().max()


def test_a_quadratic_machine_is_a_form():
    X, coef, B, x = normal(9, 4), normal(9, 2, seed=1), normal(4, 4, seed=2), normal(5, 4, seed=3)
    for M in (None, B @ B.T):
        machine = KernelMachine(Quadratic(), X, coef, M)
        S = quadratic_forms(machine)
        assert torch.allclose(torch.einsum("nd,cde,ne->nc", x, S, x), machine(x))
        assert torch.allclose(2 * torch.einsum("cde,ne->ncd", S, x), machine.jacobian(x))


def test_where_the_metric_sees_nothing_the_gradient_is_zero():
    M = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    machine = KernelMachine(Quadratic(), normal(4, 3), normal(4, 1, seed=1), M)
    assert (machine.jacobian(torch.tensor([[0.0, 1.0, 2.0]]).double()) == 0).all()


def test_the_kernel_serves_the_estimator():
    X = np.random.default_rng(0).normal(size=(200, 3))
    y = X[:, 0] * X[:, 1]
    model = RFMRegressor(kernel=Quadratic(), reg=1e-6, metric="full", center=True, n_iter=2)
    assert model.fit(X, y).score(X, y) > 0.999


@each_operation
@pytest.mark.parametrize("p", [3, 5, 13, 31])
def test_tables(op, p):
    table, first = modular_table(op, p), 0 if op in "+-" else 1
    assert table.shape == (p - first, p - first)
    for (i, j), k in np.ndenumerate(table):
        assert OPERATIONS[op](i + first, j + first, p) % p == k + first


@pytest.mark.parametrize("p", [3, 5, 7, 11, 61, 97])
def test_logarithms(p):
    log = discrete_logarithms(p)
    base = int(np.flatnonzero(log == 1)[0]) + 1
    assert sorted(log) == list(range(p - 1))
    assert all(pow(base, int(k), p) == n for n, k in enumerate(log, 1))


@pytest.mark.parametrize("p", [4, 6, 9, 15, 25, 91])
def test_no_logarithms_unless_prime(p):
    for call in (lambda: discrete_logarithms(p), lambda: modular_table("*", p),
                 lambda: modular_table("/", p), lambda: addition_order("/", p)):
        with pytest.raises(ValueError, match=f"p={p} is not prime.*take a prime"):
            call()
    assert modular_table("+", p).shape == (p, p)


@pytest.mark.parametrize("p", [2, 0, -7, 31.0, "31", True, None, 10**9])
def test_a_modulus_that_is_none(p):
    with pytest.raises(ValueError, match="p=.*must be an integer >= 3 and <= 1,000"):
        modular_table("+", p)


@pytest.mark.parametrize("op", ["x", "", "+-", None, 3, ["+"]])
def test_an_operation_that_is_none(op):
    with pytest.raises(ValueError, match="op=.*choose one of"):
        modular_table(op, 31)


@each_operation
def test_in_order_every_table_adds(op):
    table = modular_table(op, 13)[np.ix_(*addition_order(op, 13))]
    for k, row in enumerate(table):
        assert (row == np.roll(table[0], -k)).all()


def test_a_split_has_every_pair_once():
    table = modular_table("-", 11)
    task = split_table(table, 0.6, seed=3)
    assert len(task.X) == int(0.6 * 121) and task.X.dtype == torch.float64
    rows = torch.cat([task.X, task.X_test])
    a, b = rows[:, :11].argmax(1), rows[:, 11:].argmax(1)
    assert (rows.sum(1) == 2).all() and len({*zip(a.tolist(), b.tolist())}) == 121
    answers = torch.cat([task.Y.argmax(1), task.answers])
    assert (answers.numpy() == table[a, b]).all()
    assert not torch.equal(task.X, split_table(table, 0.6, seed=4).X)
    assert len(split_table(table, 1).answers) == 0


def test_what_is_never_trained_is_an_error():
    with pytest.raises(ValueError, match="share=0.02 leaves .* of 31 values of the first number.*"
                                         "take a larger share, or another seed"):
        split_table(modular_table("+", 31), 0.02)
    rare = np.zeros((9, 9), int)
    rare[0, 0] = 2                                  # class 1 is nowhere, class 2 in one place
    with pytest.raises(ValueError, match="1 of 3 values of the answer .value 1 is one."):
        split_table(rare, 1.0)
    rare[0, 1] = 1
    with pytest.raises(ValueError, match="values of the answer"):
        [split_table(rare, 0.7, seed) for seed in range(20)]


@pytest.mark.parametrize("share", [0, -0.5, 1.5, np.nan, "half", None, True])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match="share="):
        split_table(modular_table("+", 5), share)


@pytest.mark.parametrize("table", [np.zeros((3, 4), int), np.zeros(4, int), np.zeros((3, 3)), 5])
def test_a_table_that_is_none(table):
    with pytest.raises(ValueError, match="table has shape.*square"):
        split_table(table)


def test_the_circulant_part_is_the_nearest_circulant():
    B = np.random.default_rng(0).normal(size=(7, 7))
    shift = np.roll(np.eye(7), 1, 0)
    basis = np.array([np.linalg.matrix_power(shift, k).ravel() for k in range(7)])
    weights = np.linalg.lstsq(basis.T, B.ravel(), rcond=None)[0]
    assert np.allclose(circulant_part(B), (weights @ basis).reshape(7, 7))
    assert np.allclose(circulant_part(circulant_part(B)), circulant_part(B))
    away = B - B.mean()
    explained = 1 - ((away - circulant_part(away)) ** 2).sum() / (away**2).sum()
    assert circulant_share(B) == pytest.approx(explained)
    assert circulant_share(torch.from_numpy(B)) == circulant_share(B)


def test_shares_of_noise_and_of_nothing():
    rng = np.random.default_rng(0)
    shares = [circulant_share(rng.normal(size=(20, 20))) for _ in range(400)]
    assert np.mean(shares) == pytest.approx(1 / 21, rel=0.05)
    assert np.isnan(circulant_share(np.ones((5, 5))))


def test_a_circulant_metric():
    M = circulant_metric(11, 3)
    assert np.allclose(M, M.T) and np.linalg.eigvalsh(M).min() > -1e-9
    assert circulant_share(M[:11, 11:]) > 1 - 1e-9
    assert not np.allclose(M, circulant_metric(11, 4))


@each_operation
def test_planted_metrics_have_one_spectrum_and_only_one_helps(op):
    spectra = [np.linalg.eigvalsh(planted_metric(op, 31, kind, 0)) for kind in PLANTED]
    assert np.abs(np.array(spectra) - spectra[0]).max() < 1e-10
    found = {kind: planted_run("quadratic", op, 31, kind, 0)["test"] for kind in PLANTED}
    assert found.pop("circulant") > 0.8 and max(found.values()) < 0.1


def one_round(task, E):
    "The off-diagonal block after a round from [[I, E], [E^T, I]], over the diagonal; by autograd."
    m = len(E)
    M = torch.eye(2 * m).double()
    M[:m, m:], M[m:, :m] = E, E.T
    K = (task.X @ M @ task.X.T) ** 2
    coef = torch.linalg.solve(K, task.Y)
    machine = KernelMachine(Quadratic(), task.X, coef, M)
    values, V = torch.linalg.eigh(slow_agop(machine, task.X))
    root = (V * values.clamp(min=0).sqrt()) @ V.T
    return root[:m, m:] / root.diagonal().mean()


@pytest.mark.parametrize("op", ["+", "-"])
def test_circulants_double_and_noise_stays(op):
    "From all pairs, modulo 7; the derivation leaves out terms of order 1 / m."
    task, E = split_table(modular_table(op, 7), 1.0), np.random.default_rng(0).normal(size=(7, 7))
    E = E - E.mean(0) - E.mean(1, keepdims=True) + E.mean()
    order = np.ix_(*addition_order(op, 7))
    part = np.empty_like(E)
    part[order] = circulant_part(E[order])
    for block, factor in ((part, 2), (E - part, 1)):
        small = 1e-4 * torch.from_numpy(block)
        change = (one_round(task, small) - one_round(task, -small)) / 2
        assert abs(float((change * small).sum() / (small**2).sum()) - factor) < 0.2


def outputs(table, order, n_iter=3):
    "Outputs at the test pairs, drawn in the given order of the table's entries."
    m = len(table)
    a, b = np.divmod(order, m)
    X = torch.cat([torch.eye(m).double()[part] for part in (a, b)], 1)
    Y = torch.eye(m).double()[table[a, b]]
    n = len(order) // 2
    *_, last = rounds(RootSolver(Quadratic(), X[:n], Y[:n]), n_iter)
    return last.machine(X[n:])


@each_operation
def test_names_are_of_no_consequence(op):
    "A product modulo 13 is a sum modulo 12 with other names, round for round."
    table = modular_table(op, 13)
    m = len(table)
    first, second = addition_order(op, 13)
    sums = modular_table("+", m)
    names = table[np.ix_(first, second)][0]                 # of the answers 0, 1, ...
    pairs = np.random.default_rng(0).permutation(m * m)
    a, b = np.divmod(pairs, m)
    plain = outputs(sums, pairs)
    renamed = outputs(table, first[a] * m + second[b])
    assert torch.allclose(renamed[:, names], plain, atol=1e-6)


def test_accuracy_comes_late_and_the_circulant_early():
    run = grokking_run("quadratic", "*", 31, 0.5, 0, 18)
    assert min(run["train"]) == 1 and max(run["test"][:8]) < 0.02 and run["test"][-1] > 0.3
    assert run["circulant"][0] > 0.1 and len(run["circulant"]) == 18
    assert run["alignment"][-1] == pytest.approx(1)


def test_a_latin_square_is_never_learned():
    square = latin_square(31, 0)
    assert all(set(line) == set(range(31)) for line in [*square, *square.T])
    run = grokking_run("quadratic", "Latin square", 31, 0.5, 0, 18)
    assert min(run["train"]) == 1 and max(run["test"]) < 0.1 and run["alignment"][8] > 0.8
    renamed = named_table("renamed", 31, 0)
    assert (np.sort(renamed, 1) == np.arange(31)).all()


def test_rounds_to_a_level():
    assert rounds_to([0, 0.2, 0.6, 0.4], 0.5) == 2 and rounds_to([0.1], 0.5) == np.inf


def test_a_network_is_followed():
    run = pd.DataFrame(squares_run(7, 1.0, 0, 20, 10))
    assert list(run["epoch"]) == [0, 10, 20] and run.drop(columns="epoch").abs().max().max() <= 1
    assert run["train"].iloc[-1] > run["train"].iloc[0]


def test_a_film_plays_every_round():
    film = block_film([np.eye(4) * k for k in (1, 2, 3)], [0, 0, 0.5, 1], "three & four")
    assert Image.open(BytesIO(film.gif)).n_frames == 3
    data, metadata = film._repr_mimebundle_()
    assert "three &amp; four" in data["text/html"] and metadata["image/jpeg"]["alt"]
