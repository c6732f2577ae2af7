"""Explanations of fitted machines: autograd, sums, truths that are known, weights, bad input."""

import numpy as np
import pandas as pd
import pytest
import torch
from fitted_designs import Classifier, Regressor
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.datasets import load_iris, make_friedman1
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.exceptions import NotFittedError
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LinearRegression

from agop_book import explain as E
from agop_book.explain import additivity_gap, directions, explain, feature_importances
from agop_book.explain import feature_names, interactions
from agop_book.kernels import Gaussian
from agop_book.machines import KernelMachine


def table(n=200, seed=0):
    "Two numbers, a category that matters, one that does not, and the target."
    rng = np.random.default_rng(seed)
    X = pd.DataFrame(
        {
            "size": rng.normal(100, 20, n),
            "town": rng.choice(["a", "b", "c"], n),
            "age": rng.normal(size=n),
            "door": rng.choice(["red", "blue"], n),
        }
    )
    y = X["size"] / 20 + 2 * (X["town"] == "b") + np.sin(X["age"])
    return X, (y - y.mean()).to_numpy()


@pytest.fixture(scope="module")
def mixed():
    X, y = table()
    return Regressor(kernel="gaussian", bandwidth=3.0, reg=0.1, n_iter=2).fit(X, y), X, y


@pytest.fixture(scope="module")
def friedman():
    X, y = make_friedman1(500, noise=1.0, random_state=0)
    model = Regressor(bandwidth=8.0, reg=0.1, n_iter=1, diag=True).fit(X[:300], y[:300])
    return model, X, y


def gradients(model, X):
    "Gradients `(m, p)` of the first output in the design, by autograd through a formula."
    machine = model.machine_
    z = torch.as_tensor(model.design(X)).requires_grad_()
    away = z[:, None] - machine.centers
    M = machine.M if machine.M is not None else torch.eye(away.shape[-1], dtype=z.dtype)
    squared = torch.einsum("mnp,pq,mnq->mn", away, M, away)
    K = torch.exp(-squared / (2 * machine.kernel.bandwidth**2))
    (K @ machine.coef[:, 0]).sum().backward()
    return z.grad.numpy()


def test_first_order_is_autograd(mixed):
    model, X, _ = mixed
    z = model.design(X)
    each = gradients(model, X) * (z - model.reference_)
    expected = np.stack([each[:, model.design_.groups_ == j].sum(1) for j in range(4)], 1)
    assert np.abs(explain(model, X, steps=1) - expected).max() < 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["mixed", "friedman"])
def test_effects_add_up(name, request):
    model, X, y = request.getfixturevalue(name)
    effects, gap = explain(model, X), additivity_gap(model, X)
    f = model.predict(X)
    start = f - effects.sum(1) - gap
    assert np.ptp(start) < 1e-9 and effects.shape == X.shape
    reference = torch.as_tensor(model.reference_)[None]
    assert abs(start[0] - float(model.machine_(reference))) < 1e-9
    worst = [np.abs(additivity_gap(model, X, steps)).max() for steps in (1, 5, 20)]
    assert worst[2] < worst[1] < worst[0] and worst[2] < 0.01 * y.std()


def test_effects_are_true_ones(friedman):
    "Of a column that only adds a line, the effect is its slope times the way from the mean."
    model, X, _ = friedman
    for column, slope in ((3, 10), (4, 5)):
        true = slope * (X[:, column] - X[:300, column].mean())
        assert np.corrcoef(explain(model, X)[:, column], true)[0, 1] > 0.98


def test_classes_and_outputs():
    X, y = load_iris(return_X_y=True)
    three = Classifier(bandwidth=3.0, reg=0.1, n_iter=1).fit(X, y)
    effects = explain(three, X, 50)
    assert effects.shape == (150, 3, 4)
    scores = three.decision_function(X)
    start = scores - effects.sum(2) - additivity_gap(three, X, 50)
    assert np.ptp(start, axis=0).max() < 1e-9
    two = Classifier(bandwidth=3.0, reg=0.1, n_iter=1).fit(X[50:], y[50:])
    effects, gap = explain(two, X[50:], 50), additivity_gap(two, X[50:], 50)
    assert effects.shape == (100, 4) and gap.shape == (100,)
    assert np.ptp(two.decision_function(X[50:]) - effects.sum(1) - gap) < 1e-9
    several = Regressor(bandwidth=3.0, reg=0.1, n_iter=1).fit(X[:, :2], X[:, 2:])
    assert explain(several, X[:, :2]).shape == (150, 2, 2)
    assert additivity_gap(several, X[:, :2]).shape == (150, 2)


def test_tensors_come_back_as_tensors(friedman):
    model, X, _ = friedman
    rows = torch.as_tensor(X[:5])
    found = explain(model, rows)
    assert isinstance(found, torch.Tensor) and isinstance(additivity_gap(model, rows), torch.Tensor)
    assert np.array_equal(found.numpy(), explain(model, X[:5]))


def test_importances_are_those_of_the_definition(mixed):
    "tr(G_gg C_gg) for the columns of a category, G_jj times the variance for a number."
    model, X, _ = mixed
    z, J = model.design(X), gradients(model, X)
    G, C = J.T @ J / len(J), np.cov(z.T, bias=True)
    expected = np.zeros(4)
    for j in range(4):
        mine = model.design_.groups_ == j
        expected[j] = np.sum(G[np.ix_(mine, mine)] * C[np.ix_(mine, mine)])
    found = feature_importances(model)
    assert found.dtype == np.float64 and np.abs(found - expected / expected.sum()).max() < 1e-9
    assert found[3] < 0.02 < found[[0, 1, 2]].min()


def test_matrices_are_those_of_the_definition(mixed):
    "Directions are eigenvectors of S^(1/2) G S^(1/2); pairs, blocks of the gradients' covariance."
    model, X, _ = mixed
    J = gradients(model, X) * np.sqrt(model.spread_)
    values, vectors = np.linalg.eigh(J.T @ J / len(J))
    found = directions(model, 1)
    assert abs(found.vectors.to_numpy()[0] @ vectors[:, -1]) == pytest.approx(1, abs=1e-9)
    assert found.shares[0] == pytest.approx(values[-1] / values.sum(), abs=1e-9)
    C, owner = np.cov(J.T, bias=True), model.design_.groups_
    pairs = interactions(model, "agop").set_index(["feature", "other"])["strength"]
    block = C[np.ix_(owner == 0, owner == 1)]
    assert pairs["size", "town"] == pytest.approx(np.linalg.norm(block) / np.trace(C), abs=1e-9)


def test_importances_of_a_linear_function():
    "They are the squares of the slopes times the variances, whatever the units."
    X = np.random.default_rng(0).normal(size=(300, 3)) * [1, 1000, 0.01]
    y = 3 * X[:, 0] + 2e-3 * X[:, 1]
    model = Regressor(kernel="gaussian", bandwidth=30.0, reg=1e-6, n_iter=0).fit(X, y)
    found, expected = feature_importances(model), np.array([9, 4, 0]) / 13
    assert np.abs(found - expected).max() < 0.03


def test_importances_beside_permutations(friedman):
    model, X, y = friedman
    boosting = HistGradientBoostingRegressor(random_state=0).fit(X[:300], y[:300])
    ours = feature_importances(model)
    assert set(np.argsort(ours)[-5:]) == {0, 1, 2, 3, 4} and ours[5:].sum() < 0.05
    for other in (model, boosting):
        permuted = permutation_importance(other, X[300:], y[300:], n_repeats=5, random_state=0)
        assert spearmanr(ours[:5], permuted.importances_mean[:5])[0] > 0.5
        assert set(np.argsort(permuted.importances_mean)[-5:]) == {0, 1, 2, 3, 4}


def test_a_constant_has_no_importances():
    X = np.random.default_rng(0).normal(size=(30, 3))
    model = Regressor(n_iter=0).fit(X, X[:, 0])
    model.machine_.coef = torch.zeros_like(model.machine_.coef)
    assert np.array_equal(feature_importances(model), np.zeros(3))
    assert np.array_equal(directions(model, 2).shares, np.zeros(2))
    assert interactions(model)["strength"].eq(0).all()


def with_weights(X, coef, weights):
    "A fitted model that holds this machine, and weights of its centres."
    model = Regressor(n_iter=0).fit(X, X[:, 0])
    model.design_.middle, model.design_.scale = 0.0, 1.0
    share = np.ones(len(X)) if weights is None else weights
    model.machine_ = KernelMachine(Gaussian(2.0), torch.as_tensor(X), torch.as_tensor(coef))
    model.reference_ = np.average(X, axis=0, weights=share)
    model.spread_ = np.average((X - model.reference_) ** 2, axis=0, weights=share)
    model.weights_ = weights
    return model


def test_a_weight_of_two_is_a_row_twice(monkeypatch):
    monkeypatch.setattr(E, "_AT_ONCE", 7 * 4)  # blocks of seven rows
    rng = np.random.default_rng(0)
    X, coef = rng.normal(size=(20, 4)), rng.normal(size=(20, 1))
    weights = rng.integers(0, 3, 20).astype(float)
    weights[:2] = 0, 2
    coef[weights == 0] = 0
    counts = weights.astype(int)
    once = with_weights(X, coef, weights)
    share = (coef / np.maximum(weights, 1)[:, None]).repeat(counts, 0)
    twice = with_weights(X.repeat(counts, 0), share, None)
    assert np.abs(feature_importances(once) - feature_importances(twice)).max() < 1e-12
    a, b = directions(once, 2), directions(twice, 2)
    assert np.abs(a.vectors - b.vectors).to_numpy().max() < 1e-9
    assert np.abs(a.shares - b.shares).max() < 1e-12
    a, b = (interactions(model, "agop")["strength"] for model in (once, twice))
    assert np.abs(a - b).max() < 1e-12
    assert np.abs(explain(once, X) - explain(twice, X)).max() < 1e-12


def test_rows_of_weight_zero_are_not_asked_about():
    "Far rows of weight 0 change nothing: pairs are those of the machine without them."
    rng = np.random.default_rng(0)
    X, coef = rng.normal(size=(20, 3)), rng.normal(size=(20, 1))
    weights = np.where(np.arange(20) < 15, 1.0, 0.0)
    X, coef = np.concatenate([X[:15], X[15:] + 50]), np.where(weights > 0, coef.T, 0).T
    moved = interactions(with_weights(X, coef, weights), random_state=0)
    kept = interactions(with_weights(X[:15], coef[:15], None), random_state=0)
    assert moved["strength"].to_numpy() == pytest.approx(kept["strength"].to_numpy(), rel=1e-9)


def test_directions_name_the_columns():
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(400, 3)) * [1000, 5, 1], columns=["length", "mass", "noise"])
    y = np.tanh(X["length"] / 500 - X["mass"] / 5)
    found = directions(Regressor(bandwidth=3.0, reg=0.01, n_iter=1).fit(X, y), 2)
    assert found.vectors.columns.tolist() == ["length", "mass", "noise"]
    assert found.vectors.index.tolist() == [1, 2]
    first = found.vectors.iloc[0].to_numpy()
    assert abs(first @ [2, -1, 0]) / 5**0.5 > 0.995 and first[0] > 0
    assert np.allclose((found.vectors**2).sum(axis=1), 1)
    assert found.heaviest(2)[0] == ["length", "mass"] and found.shares[0] > 0.9


def test_directions_of_a_category_name_its_levels(mixed):
    names, doors = directions(mixed[0], 1).vectors.columns, ["door=blue", "door=red"]
    assert names.tolist() == ["size", "town=a", "town=b", "town=c", "age", *doors]
    assert feature_names(mixed[0]).tolist() == ["size", "town", "age", "door"]


def test_names_without_a_frame(friedman):
    assert feature_names(friedman[0]).tolist() == [f"x{j}" for j in range(10)]


def test_the_true_pair_comes_first(friedman):
    found = interactions(friedman[0])
    assert found.columns.tolist() == ["feature", "other", "strength"] and len(found) == 45
    assert found.loc[0, ["feature", "other"]].tolist() == ["x0", "x1"]
    assert found["strength"][0] > 3 * found["strength"][1]
    assert found["strength"].is_monotonic_decreasing
    pd.testing.assert_frame_equal(found, interactions(friedman[0]))


def test_a_product_and_a_sum():
    "x0 x1 has all its variance in the pair, and no off-diagonal; x0 + x1² has none."
    X = np.random.default_rng(0).normal(size=(500, 2))
    plain = Regressor(kernel="gaussian", bandwidth=3.0, reg=1e-3, n_iter=0)
    product = clone(plain).fit(X, X[:, 0] * X[:, 1])
    added = clone(plain).fit(X, X[:, 0] + X[:, 1] ** 2)
    assert interactions(product, rows=2000)["strength"][0] == pytest.approx(1, abs=0.2)
    assert interactions(product, "agop")["strength"][0] < 0.1
    assert interactions(added)["strength"][0] < 0.01


def test_a_category_and_a_number_act_together():
    X, _ = table(300)
    y = np.where(X["town"] == "b", 1, -1) * X["age"]
    model = Regressor(bandwidth=3.0, reg=0.1, n_iter=1).fit(X, y)
    assert set(interactions(model).loc[0, ["feature", "other"]]) == {"town", "age"}
    assert len(interactions(model, among=2)) == 1


BAD = [
    (explain, dict(steps=0), "steps=0"),
    (explain, dict(steps=1.5), "steps=1.5"),
    (additivity_gap, dict(steps=-1), "steps=-1"),
    (interactions, dict(by="M"), "by='M'.*differences"),
    (interactions, dict(among=1), "among=1"),
    (interactions, dict(rows=0), "rows=0"),
    (directions, dict(k=8), "k must be an integer from 1 to 7, got 8"),
    (directions, dict(k=0), "k must be an integer from 1 to 7, got 0"),
]


@pytest.mark.parametrize("function, options, message", BAD)
def test_bad_arguments(mixed, function, options, message):
    model, X, _ = mixed
    rows = [X] if function in (explain, additivity_gap) else []
    with pytest.raises(ValueError, match=message):
        function(model, *rows, **options)


def test_bad_rows(mixed):
    model, X, _ = mixed
    with pytest.raises(ValueError, match="X"):
        explain(model, X.iloc[:, :2])


def test_one_feature_has_no_pairs():
    X = np.random.default_rng(0).normal(size=(30, 1))
    model = Regressor().fit(X, X[:, 0])
    with pytest.raises(ValueError, match="two features"):
        interactions(model)


FUNCTIONS = [feature_importances, directions, interactions, feature_names]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_other_models(function):
    X = np.random.default_rng(0).normal(size=(30, 2))
    with pytest.raises(NotFittedError, match="Regressor"):
        function(Regressor())
    with pytest.raises(TypeError, match="LinearRegression.*RFMRegressor"):
        function(LinearRegression().fit(X, X[:, 0]))
    blind = Regressor().fit(X, X[:, 0])
    blind.machine_ = LinearRegression()
    with pytest.raises(TypeError, match="permutation_importance"):
        function(blind)


def test_what_does_not_fit_in_memory(friedman, monkeypatch):
    def refuse(*arguments, **options):
        raise MemoryError(arguments[1])

    monkeypatch.setattr(E, "plan", refuse)
    model, X, _ = friedman
    with pytest.raises(MemoryError, match="500 rows, 1 outputs and 10 features"):
        explain(model, X)
    with pytest.raises(MemoryError, match="AGOP of 10 columns"):
        directions(model)
