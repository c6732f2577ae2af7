"""Machines that adapt: what must not matter, weights, and one wild row."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import r2_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from adaptive_cases import PLAIN, SEARCHES, TARGETS, answers, away, fitted, table

from agop_book.folds import fold_weights, merged
from agop_book.rfm import RFMClassifier, RFMRegressor


@parametrize_with_checks([RFMRegressor(bandwidth=5.0, n_iter=2)])
def test_sklearn(estimator, check):
    check(estimator)


# --- what must not matter

kinds = pytest.mark.parametrize("kind", ["numbers", "classes"])


@kinds
def test_units_of_features(kind):
    (X, y), (T, _) = table(), table(seed=1)
    rng = np.random.default_rng(2)
    a = np.exp(5 * rng.normal(size=5))
    b = a * rng.normal(size=5)
    found = answers(fitted(kind, X * a + b, y), T * a + b)
    assert away(found, answers(fitted(kind, X, y), T)) < 1e-6


def test_units_of_the_target():
    (X, y), (T, _) = table(), table(seed=1)
    found = fitted("numbers", X, 3e5 + 1e4 * y).predict(T)
    assert away((found - 3e5) / 1e4, fitted("numbers", X, y).predict(T)) < 1e-6


def test_units_of_one_of_two_targets():
    (X, y), (T, _) = table(), table(seed=1)
    Y = np.column_stack([y, X[:, 0] ** 2])
    one, two = fitted("numbers", X, Y), fitted("numbers", X, Y * [1, 1e6])
    assert away(two.predict(T) / [1, 1e6], one.predict(T)) < 1e-6


@kinds
def test_order_of_rows(kind):
    (X, y), (T, _) = table(), table(seed=1)
    order = np.random.default_rng(2).permutation(len(X))
    found = answers(fitted(kind, X[order], y[order]), T)
    assert np.array_equal(found, answers(fitted(kind, X, y), T))


def test_order_of_columns():
    "The search counts in float32, where the order of a sum matters in the seventh digit."
    (X, y), (T, _) = table(), table(seed=1)
    order = [3, 0, 4, 2, 1]
    found = fitted("numbers", X[:, order], y).predict(T[:, order])
    assert away(found, fitted("numbers", X, y).predict(T)) < 2e-3


# --- weights

CLASS_WEIGHTS = {"none": None, "balanced": "balanced", "dict": {"low": 2, "high": 0.7}}
searches = pytest.mark.parametrize("search", SEARCHES)


def frame(X):
    "With categories and holes."
    F = pd.DataFrame(X, columns=list("abcde"))
    F["kind"] = pd.Categorical(np.array(["u", "v", "w"])[np.digitize(X[:, 4], [-0.5, 0.5])])
    return F.mask(np.random.default_rng(4).random(F.shape) < 0.05)


@searches
@pytest.mark.parametrize("kind", ["numbers", *CLASS_WEIGHTS])
def test_weight_2_is_a_row_twice_and_0_none(kind, search):
    X, y = table(120)
    F = frame(X)
    weights = np.random.default_rng(3).integers(0, 4, len(X))
    twice = np.repeat(np.arange(len(X)), weights)
    params = dict(SEARCHES[search])
    if kind in CLASS_WEIGHTS:
        params["class_weight"] = CLASS_WEIGHTS[kind]
    kind = "numbers" if kind == "numbers" else "classes"
    found = answers(fitted(kind, F, y, sample_weight=weights, **params), F)
    wanted = answers(fitted(kind, F.iloc[twice], y[twice], **params), F)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)


@kinds
@pytest.mark.parametrize("factor", [7.3, 1e-9, 4])
def test_the_unit_of_the_weights_is_arbitrary(kind, factor):
    X, y = table(120)
    weights = np.random.default_rng(3).integers(0, 4, len(X))
    found = answers(fitted(kind, X, y, sample_weight=factor * weights), X)
    assert away(found, answers(fitted(kind, X, y, sample_weight=weights), X)) < 1e-8
    found = answers(fitted(kind, X, y, sample_weight=np.full(len(X), factor)), X)
    assert away(found, answers(fitted(kind, X, y), X)) < 1e-8


def test_rows_are_left_out_whole_unless_their_features_have_another_target():
    X = np.array([[0.0], [0], [1], [2], [np.nan], [np.nan]])
    y = np.array([[1.0], [2], [1], [1], [3], [4]])
    rows, weights, shared = merged(X, y, np.array([3.0, 1, 3, 1, 2, 2]))
    assert dict(zip(rows.tolist(), shared.tolist())) == {i: i not in (2, 3) for i in range(6)}
    left_out = (fold_weights(weights, 3, 0, shared) > 0).sum(0)
    assert dict(zip(rows.tolist(), left_out.tolist())) == {0: 3, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2}


def test_class_weights_are_not_dealt_into_folds():
    "Else a row of a class of weight 10 is learned from and left out at once, and fits itself."
    X, y = table(400, noise=1.0)
    labels = y > 1
    models = [
        RFMClassifier(class_weight={False: 1, True: weight}, random_state=0).fit(X, labels)
        for weight in (10, 10 + 1e-9)
    ]
    assert away(models[0].predict_proba(X), models[1].predict_proba(X)) < 1e-4


@pytest.mark.parametrize("params", [{}, PLAIN])
def test_class_weight_moves_probabilities(params):
    (X, y), (T, _) = table(300, noise=1.0), table(500, seed=1, noise=1.0)
    share = []
    for weight in (1, 5):
        model = RFMClassifier(class_weight={False: 1, True: weight}, random_state=0, **params)
        share.append(model.fit(X, y > 1).predict_proba(T)[:, 1].mean())
    assert share[1] > share[0] + 0.02


# --- one wild row


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", [1e6, -1e6, 1e300])
def test_one_wild_row_costs_the_others_little(target, value):
    X, y = table(600, target=target)
    T, t = table(500, seed=8, target=target)
    model = fitted("numbers", X, y)
    usual = r2_score(t, model.predict(T))
    assert usual > 0.95
    for where in (0, slice(None)):
        wild, asked = X.copy(), T.copy()
        wild[7, where] = asked[7, where] = value
        assert r2_score(t, fitted("numbers", wild, y).predict(T)) > usual - 0.02
        told = model.predict(asked)
        assert np.isfinite(told).all()
        others = np.arange(len(t)) != 7
        np.testing.assert_allclose(told[others], model.predict(T)[others], rtol=1e-8)
