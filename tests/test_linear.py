"Linear RFMs against closed forms, IRLS, convex programs and brute force; bad input."

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power
from scipy.optimize import minimize

from agop_book.agop import agop
from agop_book.book.collapse_study import collapse_run, simplex_distance, within_between
from agop_book.book.convex import basis_pursuit, nuclear_norm
from agop_book.book.linear_study import (deep_linear, free_numbers, low_rank_matrix, random_mask,
                                         random_problems)
from agop_book.linear import (Completion, Sensing, SparseVector, depth_power, irls_exponent,
                              linear_rfm, matrix_metric)
from agop_book.measurements import Entries, Equations, check_power, smoothing

POWERS = [0.25, 0.5, 0.75, 1.0]


def sparse(m=12, d=30, seed=0):
    rng = np.random.default_rng(seed)
    w = np.zeros(d)
    w[:3] = 1, -2, 0.5
    X = rng.normal(size=(m, d))
    return w, SparseVector(X, X @ w)


def entries(W, mask):
    "A completion as sensing: one matrix with a single 1 for each entry."
    c, d = W.shape
    X = np.eye(c * d).reshape(c * d, c, d)[mask.ravel()]
    return Sensing(X, W[mask])


# One round


def test_a_solve_is_the_least_norm_solution_on_reweighted_features():
    _, problem = sparse()
    M = np.random.default_rng(1).uniform(0.1, 2, size=30)
    root = np.sqrt(M)
    expected = root * (np.linalg.pinv(problem.X * root) @ problem.y)
    assert np.allclose(problem.solve(M), expected)


def test_a_ridge_is_ridge_regression_on_reweighted_features():
    _, problem = sparse()
    M, reg = np.random.default_rng(1).uniform(0.1, 2, size=30), 0.3
    Z = problem.X * np.sqrt(M)
    expected = np.sqrt(M) * np.linalg.solve(Z.T @ Z + reg * np.eye(30), Z.T @ problem.y)
    assert np.allclose(SparseVector(problem.X, problem.y, reg).solve(M), expected)


@pytest.mark.parametrize("reg", [0.0, 0.2])
def test_sensing_solves_the_vectorised_problem(reg):
    rng = np.random.default_rng(0)
    X, W = rng.normal(size=(11, 4, 5)), rng.normal(size=(4, 5))
    B = rng.normal(size=(5, 5))
    M, y = B @ B.T, np.einsum("mcd,cd->m", X, W)
    whole = np.kron(np.eye(4), M)                         # on the rows of W, one after another
    rows = X.reshape(11, 20)
    expected = whole @ rows.T @ np.linalg.solve(rows @ whole @ rows.T + reg * np.eye(11), y)
    assert np.allclose(Sensing(X, y, reg).solve(M), expected.reshape(4, 5))


@pytest.mark.parametrize("reg", [0.0, 0.2])
def test_completion_is_sensing_of_entries(reg):
    W, mask = low_rank_matrix((6, 7), 2, 0), random_mask((6, 7), 25, 0)
    B = np.random.default_rng(0).normal(size=(7, 7))
    M = B @ B.T + np.eye(7)
    other = entries(W, mask)
    expected = Sensing(other.X, other.y, reg).solve(M)
    assert np.allclose(Completion(W, mask, reg).solve(M), expected)


def test_completion_does_not_look_at_what_is_not_observed():
    W, mask = low_rank_matrix((6, 7), 2, 0), random_mask((6, 7), 25, 0)
    spoiled = np.where(mask, W, np.nan)
    runs = (linear_rfm(Completion(Y, mask), 1, 20)[-1] for Y in (W, spoiled))
    assert np.array_equal(*runs)


@pytest.mark.parametrize("power", POWERS)
def test_the_metric_is_the_power_of_the_agop(power):
    W = np.random.default_rng(0).normal(size=(4, 6))
    x = torch.randn(5, 6, dtype=torch.float64)
    # the rows of a matrix problem are the outputs of a linear predictor
    G = np.asarray(agop(lambda z: z @ torch.from_numpy(W).T, x))
    expected = fractional_matrix_power(G / np.trace(G) + 0.1 * np.eye(6), power)
    assert np.allclose(matrix_metric(W, 0.1, power), expected)
    w = W[0]
    G = np.asarray(agop(lambda z: z @ torch.from_numpy(w)[:, None], x))
    expected = (np.diag(G) / np.trace(G) + 0.1) ** power
    _, problem = sparse(3, 6)
    assert np.allclose(problem.metric(w, 0.1, power), expected)


# Rounds


@pytest.mark.parametrize("power", POWERS)
def test_rounds_are_iteratively_reweighted_least_squares(power):
    "By a general optimiser of each weighted problem in the null space of the equations."
    _, problem = sparse(6, 10)
    steps, w = smoothing((1, 1e-2), 4), None
    null = np.linalg.svd(problem.X)[2][6:].T
    least = np.linalg.pinv(problem.X) @ problem.y
    for before in (None, *steps[:-1]):
        weight = np.ones(10)
        if before is not None:
            weight = (w**2 + before * (w @ w)) ** (irls_exponent(power) / 2 - 1)
            weight = weight / weight.mean()
        found = minimize(lambda z, weight=weight: weight @ (least + null @ z) ** 2, np.zeros(4),
                         method="BFGS", options={"gtol": 1e-10})
        w = least + null @ found.x
    assert np.allclose(linear_rfm(problem, power, 4, (1, 1e-2), tol=0)[-1], w, atol=1e-5)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("task", ["sparse", "completion", "sensing"])
def test_what_rounds_make_small_never_grows(task, power):
    "With a fixed unit of smoothing, which a fixed trace gives: scale-free on both sides."
    _, problem = random_problems(task, 8, 2, 40 if task != "sparse" else 5, 1)
    eps = 0.01

    def size(w, trace):
        s = w**2 if task == "sparse" else np.linalg.svd(w, compute_uv=False) ** 2
        smooth = s + eps * trace
        return np.log(smooth).sum() if power == 1 else (smooth ** (1 - power)).sum()

    found = linear_rfm(problem, power, 25, eps, tol=0)
    for old, new in zip(found, found[1:]):
        trace = (old**2).sum()
        assert size(new, trace) <= size(old, trace) + 1e-9 * abs(size(old, trace))


def test_every_round_satisfies_the_equations():
    _, problem = sparse()
    assert np.allclose(np.array(linear_rfm(problem, 1, 50)) @ problem.X.T, problem.y)
    W, mask = low_rank_matrix((6, 7), 2, 0), random_mask((6, 7), 25, 0)
    assert all(np.allclose(V[mask], W[mask]) for V in linear_rfm(Completion(W, mask), 1, 50))


@pytest.mark.parametrize("task", ["sparse", "completion", "sensing"])
def test_problems_side_by_side_are_the_same_problems(task):
    truth, many = random_problems(task, 8, 1, 30 if task != "sparse" else 5, 3)
    together = linear_rfm(many, 0.75, 15, tol=0)[-1]
    for i in range(3):
        parts = (many.Y[i], many.mask[i]) if task == "completion" else (many.X[i], many.y[i])
        alone = linear_rfm(type(many)(*parts), 0.75, 15, tol=0)[-1]
        assert np.allclose(alone, together[i], atol=1e-7)


def test_turned_measurements_give_turned_matrices():
    _, problem = random_problems("sensing", 6, 1, 20, 1)
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    turned = Sensing(problem.X @ Q.T, problem.y)
    a, b = (linear_rfm(p, 0.5, 20, tol=0)[-1] for p in (problem, turned))
    assert np.allclose(a @ Q.T, b, atol=1e-7)


def test_a_problem_of_ones_own():
    "Groups of entries: the same rounds, another class."
    class Groups(SparseVector):
        def metric(self, w, eps, power):
            shares = (w.reshape(10, 3) ** 2).sum(1) / (w @ w)
            return np.repeat((shares + eps) ** power, 3)

    w, problem = sparse()
    found = linear_rfm(Groups(problem.X, problem.y), 1)[-1]
    assert np.allclose(found, w, atol=1e-4)          # its three entries are one group


# What is recovered


def test_power_one_half_is_basis_pursuit():
    for seed in range(3):
        _, problem = sparse(8, 20, seed)
        lp = basis_pursuit(problem.X, problem.y)
        w = linear_rfm(problem, 0.5, 2000, tol=0)[-1]
        assert np.allclose(problem.X @ lp, problem.y)
        assert np.abs(w).sum() <= np.abs(lp).sum() * (1 + 1e-3)


@pytest.mark.parametrize("task", ["completion", "sensing"])
def test_power_one_half_is_the_least_nuclear_norm(task):
    _, problem = random_problems(task, 10, 2, 60, 2)
    least, gap = nuclear_norm(problem)
    W = linear_rfm(problem, 0.5, 2000, tol=0)[-1]
    ratio = np.linalg.norm(W, "nuc", (1, 2)) / np.linalg.norm(least, "nuc", (1, 2))
    assert gap.max() < 1e-5 and (abs(ratio - 1) < 3e-3).all()


@pytest.mark.parametrize("task", ["completion", "sensing"])
def test_the_certificate_is_a_lower_bound(task):
    "No solution of the equations that we can find has a smaller norm than the gap allows."
    _, problem = random_problems(task, 6, 1, 20, 1)
    least, gap = nuclear_norm(problem, tol=1e-6)
    rows = entries(problem.Y[0], problem.mask[0]).rows if task == "completion" else problem.rows[0]
    null = np.linalg.svd(rows)[2][len(rows):]
    rng = np.random.default_rng(0)
    norm = np.linalg.norm(least[0], "nuc")
    for scale in (1e-3, 1e-2, 0.1, 1):
        for _ in range(50):
            step = scale * (rng.normal(size=len(null)) @ null).reshape(6, 6)
            assert np.linalg.norm(least[0] + step, "nuc") >= norm * (1 - 2e-6)
    assert 0 <= gap[0] + 1e-12 and gap[0] < 1e-6


def test_larger_powers_recover_more():
    truth, problem = random_problems("sparse", 60, 8, 24, 20)
    share = [np.mean(np.linalg.norm(linear_rfm(problem, p, 200)[-1] - truth, axis=1)
                     < 0.01 * np.linalg.norm(truth, axis=1)) for p in POWERS]
    assert share[0] == 0 and share[3] > share[1] + 0.1


def test_a_deep_linear_network_learns_rank_one():
    truth, problem = random_problems("completion", 8, 1, 45, 2)
    assert np.abs(deep_linear(problem, 3, 4000) - truth).max() < 1e-3


# Depth


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_below_the_last_of_balanced_layers(depth):
    rng = np.random.default_rng(depth)
    U, s, V = np.linalg.svd(rng.normal(size=(5, 5)))
    turns = [V, *(np.linalg.qr(rng.normal(size=(5, 5)))[0] for _ in range(depth - 1)), U.T]
    layers = [b.T * s ** (1 / depth) @ a for a, b in zip(turns, turns[1:])]
    for low, high in zip(layers, layers[1:]):
        assert np.allclose(high.T @ high, low @ low.T)
    H = np.linalg.multi_dot([*layers[-2::-1], np.eye(5)])
    W = layers[-1] @ H
    expected = fractional_matrix_power(W.T @ W, depth_power(depth))
    assert np.allclose(H.T @ H, expected)
    weights = sum((layer**2).sum() for layer in layers)
    assert np.isclose(weights, depth * (s ** irls_exponent(depth_power(depth))).sum())


@pytest.mark.parametrize("depth", [2, 3])
def test_no_factors_are_smaller_than_balanced_ones(depth):
    "Weight decay asks for the sum of s^(2 / depth): any other factors of the same product."
    rng = np.random.default_rng(0)
    for _ in range(30):
        layers = [rng.normal(size=(4, 4)) for _ in range(depth)]
        s = np.linalg.svd(np.linalg.multi_dot([*layers, np.eye(4)]), compute_uv=False)
        assert sum((W**2).sum() for W in layers) >= depth * (s ** (2 / depth)).sum() - 1e-9


# Collapse


def test_within_between_by_brute_force():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
    means = np.array([x[labels == c].mean(0) for c in labels])
    expected = ((x - means) ** 2).sum() / ((means - x.mean(0)) ** 2).sum()
    found = within_between(torch.from_numpy(x), torch.from_numpy(labels))
    assert np.isclose(found, expected)
    assert within_between(torch.from_numpy(means), torch.from_numpy(labels)) < 1e-20


def test_a_simplex_is_a_simplex():
    corners = torch.eye(4).repeat(3, 1)
    assert simplex_distance(corners, torch.arange(4).repeat(3)) < 1e-6
    line = torch.arange(4.0)[:, None]
    assert simplex_distance(line, torch.arange(4)) > 0.5


def test_only_the_agop_collapses():
    runs = {kind: collapse_run("digits", kind, 150, 2, 0) for kind in ("AGOP", "identity")}
    assert runs["AGOP"]["held-out"][-1] < runs["AGOP"]["held-out"][0]
    assert runs["identity"]["held-out"][-1] > runs["identity"]["held-out"][0]


# Bad input

FINE = np.random.default_rng(0).normal(size=(3, 5))


@pytest.mark.parametrize("make, words", [
    (lambda: check_power(0), "power=0"),
    (lambda: check_power(1.2), "power=1.2.*<= 1"),
    (lambda: check_power("half"), "power='half'"),
    (lambda: linear_rfm(SparseVector(FINE, [1, 2, 3]), power=-1), "power=-1"),
    (lambda: linear_rfm(SparseVector(FINE, [1, 2, 3]), n_iter=-1), "n_iter=-1"),
    (lambda: linear_rfm(SparseVector(FINE, [1, 2, 3]), eps=0), "eps=0.*take"),
    (lambda: linear_rfm(SparseVector(FINE, [1, 2, 3]), eps=(1e-9, 1)), "first >= last"),
    (lambda: linear_rfm(SparseVector(FINE, [1, 2, 3]), eps="small"), "eps='small'"),
    (lambda: SparseVector(FINE, [1, 2]), r"y has shape \(2,\)"),
    (lambda: SparseVector(FINE, [0, 0, 0]), "rank 0"),
    (lambda: SparseVector(FINE, [1, 2, 3], reg=-1), "reg=-1"),
    (lambda: SparseVector(FINE[0], [1]), "X has shape"),
    (lambda: SparseVector(FINE * np.nan, [1, 2, 3]), "X has NaN"),
    (lambda: SparseVector(FINE.T, [1, 2, 3, 4, 5]), "5 equations for 3 unknowns.*reg > 0"),
    (lambda: SparseVector(FINE[[0, 0]], [1, 1]), "not independent.*reg > 0"),
    (lambda: Sensing(FINE, [1, 2, 3]), "X has shape"),
    (lambda: Sensing(np.ones((3, 2, 2)), [1, 1, 1]), "not independent"),
    (lambda: Completion(FINE, np.eye(3, 5)), "nothing in column 3"),
    (lambda: Completion(FINE, np.arange(15).reshape(3, 5) < 10), "nothing in row 2"),
    (lambda: Completion(FINE, np.ones((5, 3))), "mask has shape"),
    (lambda: Completion(FINE, np.full((3, 5), 2)), "True where"),
    (lambda: Completion(0 * FINE, np.ones((3, 5))), "Y is zero everywhere"),
    (lambda: Completion(FINE * np.inf, np.ones((3, 5))), "Y has NaN"),
    (lambda: low_rank_matrix((4, 5), 0, 0), "rank=0"),
    (lambda: low_rank_matrix((4, 5), 5, 0), "rank=5"),
    (lambda: random_mask((4, 5), 3, 0), "m=3"),
    (lambda: depth_power(1), "depth=1"),
    (lambda: depth_power(2.5), "depth=2.5"),
    (lambda: basis_pursuit(np.ones((2, 3)), np.array([1.0, 2.0])), "y: no w satisfies"),
    (lambda: within_between(torch.ones(3, 2), torch.zeros(3)), "one class"),
])
def test_bad_input_is_told_what_to_do(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_wrong_kinds():
    with pytest.raises(TypeError, match="SparseVector.*basis_pursuit"):
        nuclear_norm(sparse()[1])
    with pytest.raises(TypeError, match="y holds"):
        Equations(FINE, ["a", "b", "c"])
    with pytest.raises(TypeError, match="masked"):
        Entries(np.ma.masked_less(FINE, 0), np.ones((3, 5)))


def test_a_solver_that_is_not_done_says_so():
    _, problem = random_problems("completion", 8, 2, 40, 1)
    with pytest.warns(UserWarning, match="n_iter=2"):
        nuclear_norm(problem, n_iter=2)


def test_more_equations_than_unknowns_with_a_ridge():
    X = np.random.default_rng(0).normal(size=(9, 4))
    w = linear_rfm(SparseVector(X, X @ np.ones(4), reg=1e-6), 0.5, 5)[0]
    assert np.allclose(w, 1, atol=1e-4)


def test_numbers_sought():
    assert free_numbers("sparse", 100, 7) == 7
    assert free_numbers("sensing", 10, 10) == 100
