"Fits with every row a centre, and samples whose rare values the search does not see."

import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from agop_book import allcenters, folds, manyrows
from agop_book.allcenters import (AllCenters, SymmetricGram, WeightedGram, best_ridge,
                                  conjugate_gradients)
from agop_book.crossfit import LeftOut
from agop_book.iterative import Nystrom
from agop_book.kernels import Gaussian, L1Laplace, Laplace, Matern32
from agop_book.partfit import Sample
from agop_book.partials import Block
from agop_book.rfm import RFMClassifier, RFMRegressor


def points(n, d=4, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", [Laplace(3.0), Gaussian(2.0), Matern32(3.0), L1Laplace(5.0)])
@pytest.mark.parametrize("n", [1, 512, 513, 1300])
def test_half_of_the_kernel_is_the_kernel(kernel, n):
    x = points(n) + 100
    K, p = SymmetricGram(kernel, x), points(n, 3, 1).T
    exact = kernel(x.double(), x.double())
    assert (K.of_rows(p) - p.double() @ exact).abs().max() < 2e-3 * n**0.5
    assert (K.diagonal - exact.diagonal()).abs().max() < 1e-6
    assert (K.columns(100) - exact[:, :100]).abs().max() < 1e-3


@pytest.mark.parametrize("kernel", [Laplace(3.0), L1Laplace(5.0)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_steps_reach_the_exact_solution(kernel, size):
    x = points(700)
    Y = size * torch.stack([x[:, 0] * x[:, 1], torch.zeros(700), x[:, 2].abs()], 1)
    w = 0.5 + torch.rand(700, generator=torch.Generator().manual_seed(2))
    heard = torch.ones(2, 700, dtype=torch.bool)
    heard[1, ::5] = False
    system = WeightedGram(SymmetricGram(kernel, x), w)
    step = conjugate_gradients(system, Y, 0.01, heard, 1e-9)
    assert not step.beta[1, ::5].any()
    for beta, rows in zip(step.beta, heard):
        K = kernel(x[rows].double(), x[rows].double())
        exact = torch.linalg.solve(K + (0.01 / w[rows].double()).diag(), Y[rows].double())
        assert (beta[rows] - exact).abs().max() < 1e-3 * exact.abs().max()


def test_weights_of_any_spread():
    "A thousandth, or a thousand times, the weight of others: the steps stay few."
    x = points(900)
    Y = (x[:, :1] * x[:, 1:2]).contiguous()
    w = 10.0 ** torch.randint(-3, 4, (900,), generator=torch.Generator().manual_seed(2))
    heard = torch.ones(1, 900, dtype=torch.bool)
    step = conjugate_gradients(WeightedGram(SymmetricGram(Laplace(3.0), x), w), Y, 0.1, heard, 1e-8)
    K = Laplace(3.0)(x.double())
    exact = K @ torch.linalg.solve(K + (0.1 / w.double()).diag(), Y.double())
    assert step.number < 100
    off = (K @ step.beta[0].double() - exact).square()
    assert w.double() @ off < 1e-6 * (w.double() @ Y.double().square())


def smooth(n=1500):
    "A sample, and a kernel so smooth that its smallest eigenvalues are rounding."
    x = points(n, 2)
    Y = (torch.sin(3 * x[:, :1]) + 0.1 * points(n, 1, 3)).contiguous()
    rest, held = slice(n - 200), slice(n - 200, None)
    w = torch.ones(n)
    return Sample(x[rest], Y[rest], w[rest], Block(x[held], Y[held], w[held])), Gaussian(3.0)


def test_what_single_precision_cannot_solve_is_solved_in_double():
    sample, kernel = smooth()
    fit = AllCenters(sample, kernel, torch.ones(2), 1e-6)
    assert conjugate_gradients(fit.system, fit.Y, 1e-5, ~fit.held[None], 1e-9).residual > 1e-9
    machine, step, *_ = fit.fit(1e-5)
    assert machine.coef.dtype == torch.float64 and step.residual < 1e-6
    x, Y = fit.x.double(), fit.Y.double()
    K = machine.kernel(x)
    exact = K @ torch.linalg.solve(K + 1e-5 * torch.eye(1500, dtype=torch.float64), Y)
    assert (machine(x) - exact).square().mean() < 1e-5 * Y.square().mean()


def test_what_is_not_solved_is_said(monkeypatch):
    monkeypatch.setattr(allcenters, "_STEPS", 0)
    sample, kernel = smooth()
    with pytest.warns(ConvergenceWarning, match="solver='cholesky'"):
        machine, *_ = AllCenters(sample, kernel, torch.ones(2), 1e-9).fit(1e-3)
    assert machine.coef.isfinite().all()


def test_steps_that_lead_away_are_not_taken(monkeypatch):
    "Without a guard the residual came to 22 times the targets, and R2 to -21."
    sample, kernel = smooth()
    fit = AllCenters(sample, kernel, torch.ones(2), 1e-6)
    monkeypatch.setattr(WeightedGram, "inverse", lambda self, ridge, heard: lambda r: r)
    everybody = torch.ones(1, 1500, dtype=torch.bool)
    # with this ridge the matrix has negative eigenvalues
    step = conjugate_gradients(fit.system, fit.Y, -50.0, everybody, 1e-9)
    beta = step.beta[0]
    assert 1e-9 < step.residual <= 1 and beta.isfinite().all()
    left = fit.Y - (fit.system.K.of_rows(beta.T).T - 50 * beta)
    assert np.isclose(float(left.square().sum() / fit.Y.square().sum()), step.residual, rtol=0.05)


def test_a_ridge_that_is_not_solved_is_not_taken(monkeypatch):
    sample, kernel = smooth()
    fit = AllCenters(sample, kernel, torch.ones(2), 1e-6)
    solved = AllCenters._solve

    def only_large(self, reg, heard):
        if reg < 1e-2:
            warnings.warn("not solved", ConvergenceWarning)
        return solved(self, reg, heard)

    monkeypatch.setattr(AllCenters, "_solve", only_large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, losses = best_ridge(fit, 1e-3)
    assert found >= 1e-2 and losses[1e-3] == losses[1e-3 * 0.1] == torch.inf


@pytest.mark.parametrize("best, tried, chosen", [
    (0.0, [0.01, 0.1, 1, 10], 1.0), (-3.0, [1e-4, 1e-3, 1e-2, 0.1], 1e-3),
    # the last two win too little
    (-1.0, [0.01, 0.1, 1], 0.1), (-0.497, [0.01, 0.1, 1], 0.1), (-1.502, [0.01, 0.1, 1], 0.1)])
def test_ridges_walk_where_it_pays(best, tried, chosen):
    class Part:
        least = 0.005

        def judged(self, reg):
            loss = 1 + abs(np.log10(reg) - best)
            return LeftOut(torch.full((1, 1), loss**0.5), torch.zeros(1, 1), torch.ones(1))

    found, losses = best_ridge(Part(), 0.1)
    assert np.allclose(sorted(losses), tried) and np.isclose(found, chosen)


def test_a_row_of_weight_two_is_the_row_twice_and_one_of_none_is_not_there():
    x = points(600)
    Y = (x[:, :1] * x[:, 1:2]).contiguous()
    w = torch.ones(500)
    w[:100], w[100:200] = 2, 0
    held = Block(x[500:], Y[500:], torch.ones(100))
    rows = torch.cat([torch.arange(100), torch.arange(100), torch.arange(200, 500)])
    one = Sample(x[:500], Y[:500], w, held)
    two = Sample(x[rows], Y[rows], torch.ones(500), held)
    kernel = Laplace(1.0)
    outputs = []
    for sample in (one, two):
        fit = AllCenters(sample, kernel, torch.ones(4), 1e-8)
        fit.kernel = kernel
        fit.system = WeightedGram(SymmetricGram(kernel, fit.x), fit.rows.w)
        outputs.append(fit.judged(0.1).outputs)
    assert (outputs[0] - outputs[1]).abs().max() < 1e-3


def board(n, seed=0):
    "Rows whose label no small number of centres can tell."
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, 6)).astype(np.float32)
    return X, np.where(np.sin(3 * X[:, 0]) * X[:, 1] * X[:, 2] > 0, "yes", "no")


def test_every_row_becomes_a_centre_where_centres_are_not_enough(monkeypatch):
    monkeypatch.setattr(manyrows, "_TOGETHER", 1000)
    X, y = board(4000)
    fits = [RFMClassifier(random_state=0, n_iter=1, solver=solver).fit(X[:2000], y[:2000])
            for solver in (Nystrom(centers=100), "auto")]
    last = fits[1].history_.iloc[-1]
    assert last["stage"] == "all rows" and last["centers"] == 2000
    scores = [model.score(X[2000:], y[2000:]) for model in fits]
    assert scores[1] > scores[0]
    assert np.allclose(fits[1].predict_proba(X[:5]).sum(1), 1)


def test_rare_values_that_the_search_does_not_see(monkeypatch):
    monkeypatch.setattr(folds, "_LEARN", 400)
    rng = np.random.default_rng(0)
    n = 1500
    X = rng.standard_normal((n, 4))
    X[:, 3] = rng.integers(0, 5, n)
    y = X[:, 0] + (X[:, 3] == 2)
    rare = rng.permutation(n)
    X[rare[:3], 3] = [17, 23, 40]      # more values than a code may have
    X[rare[3:5], 1] = np.nan           # a hole
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(3):
            model = RFMRegressor(random_state=seed, n_iter=1, solver=Nystrom(centers=300))
            assert model.fit(X, y).score(X, y) > 0.9


def test_a_kernel_that_is_better_on_more_rows_is_taken():
    X, y = board(3000)
    model = RFMClassifier(random_state=0, n_iter=1, solver=Nystrom(centers=300)).fit(X, y)
    tried = model.history_[model.history_.stage == "kernel"]
    if len(tried):
        best = tried.loc[tried.loss.idxmin()]
        assert type(model.machines_[0].kernel).__name__ == best.kernel
    search = model.history_[model.history_.stage == "search"]
    near = search.groupby("kernel").loss.min() <= 1.03 * search.loss.min()
    assert len(tried) == (near.sum() if near.sum() > 1 else 0)
