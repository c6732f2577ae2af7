"""Machines that adapt: odd and bad input, parameters, files, and their place in scikit-learn."""

import resource
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from adaptive_cases import PLAIN, classifier, frame, regressor, table, words
from sklearn.exceptions import NotFittedError


pytestmark = pytest.mark.filterwarnings("error")
both = pytest.mark.parametrize("params", [{}, PLAIN], ids=["adaptive", "plain"])



# --- odd tables


@both
def test_categories_of_one_row_unseen_ones_and_holes(params):
    X, y = table(80)
    F = frame(X)
    F["kind"] = F["kind"].cat.add_categories(["rare", "unseen"])
    F.loc[0, "kind"] = "rare"
    model = regressor(**params).fit(F, y)
    G = F.copy()
    G.loc[:3, "kind"] = ["rare", "unseen", "u", "v"]
    told = model.predict(G)
    assert np.isfinite(told).all() and np.array_equal(told[4:], model.predict(F)[4:])


@both
@pytest.mark.parametrize("value", [0.0, 3.3, 1e10])
def test_a_constant_target(params, value):
    X, y = table(80)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = regressor(**params).fit(X, np.full(len(X), value))
    told = model.predict(X)
    if not params:
        np.testing.assert_allclose(told, value, rtol=1e-12)
        assert not model.feature_importances_.any() and not said
    assert np.isfinite(told).all()


@both
@pytest.mark.parametrize("rare", [1, 2])
def test_a_class_of_one_or_two_rows(params, rare):
    X, y = table(80)
    labels = np.where(np.arange(len(X)) < rare, "rare", words(y))
    p = classifier(**params).fit(X, labels).predict_proba(X)
    assert p.shape == (len(X), 4) and np.allclose(p.sum(1), 1)


@both
def test_a_column_of_nothing(params):
    X, y = table(80)
    X[:, 3] = np.nan
    with pytest.warns(UserWarning, match="no value at all in column 'x3'"):
        model = regressor(**params).fit(X, y)
    assert model.score(X, y) > 0.9 and model.feature_importances_[3] == 0


@both
def test_missing_numbers(params):
    X, y = table(200)
    X[np.random.default_rng(1).random(X.shape) < 0.1] = np.nan
    model = regressor(**params).fit(X, y)
    assert model.score(X, y) > 0.8 and model.predict(np.full((1, 5), np.nan)).shape == (1,)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_a_few_rows(n):
    X, y = table(n)
    assert np.isfinite(regressor().fit(X, y).predict(X)).all()
    p = classifier().fit(X, np.arange(n) % 2).predict_proba(X)
    assert np.allclose(p.sum(1), 1)


def test_features_that_say_nothing():
    X, y = table(80)
    model = regressor().fit(np.full_like(X, 3), y)
    np.testing.assert_allclose(model.predict(X), y.mean())
    assert not model.feature_importances_.any()
    labels = np.arange(len(X)) % 4 == 0
    p = classifier().fit(np.full_like(X, 3), labels).predict_proba(X)
    assert (p[:, 1] < 0.5).all()


def test_many_columns():
    X, _ = table(60, d=10_000)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    model = regressor().fit(X, X[:, 0])
    assert time.perf_counter() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert model.M_.shape == (10_000,) and np.isfinite(model.predict(X)).all()


def with_holes(F):
    counts = pd.array([1, None, 3, 4] * 20, dtype="Int64")
    return F.assign(f=counts, g=pd.array([True, None] * 40, dtype="boolean"))


KINDS = {
    "bool": lambda X: X > 0,
    "int": lambda X: (3 * X).astype(int),
    "float32": lambda X: X.astype(np.float32),
    "nullable": lambda X: pd.DataFrame(X, columns=list("abcde")).convert_dtypes(),
    "holes": lambda X: with_holes(pd.DataFrame(X, columns=list("abcde"))),
}


@both
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_numbers(params, kind):
    X, y = table(80)
    X = KINDS[kind](X)
    told = regressor(**params).fit(X, y).predict(X)
    assert told.dtype == (np.float32 if kind == "float32" else np.float64)
    assert np.isfinite(told).all()


# --- what is refused, and with which remedy


def doubled(X):
    return pd.DataFrame(X, columns=list("aacde"))


def with_value(X, value):
    X = X.copy()
    X[3, 1] = value
    return X


REFUSED = {
    "strings": (lambda X, y: (frame(X).astype({"kind": str}), y), "Declare categories"),
    "infinity": (lambda X, y: (with_value(X, np.inf), y), "infinity in column 1.*replace"),
    "doubles": (lambda X, y: (doubled(X), y), "more than one column.*'a'.*rename"),
    "one row": (lambda X, y: (X[:1], y[:1]), "minimum of 2"),
    "hole in y": (lambda X, y: (X, with_value(y[:, None] + [0, 0], np.nan)), "NaN"),
    "only X_val": (lambda X, y: (X, y, X), "go together; only X_val"),
    "only y_val": (lambda X, y: (X, y, None, y), "go together; only y_val"),
    "weight below 0": (lambda X, y: (X, y, *[None] * 3, -(y**2)), "at least 0.*drop"),
    "weight NaN": (lambda X, y: (X, y, *[None] * 3, y * np.nan), "finite.*nan.*drop"),
    "weights 0": (lambda X, y: (X, y, *[None] * 3, 0 * y), "zero for 80 of 80 rows.*pass"),
    "one weight": (lambda X, y: (X, y, *[None] * 3, np.arange(80) == 7), "zero for 79.*pass"),
    "few weights": (lambda X, y: (X, y, *[None] * 3, [1, 2]), r"shape.*\(80,\)"),
}


@both
@pytest.mark.parametrize("reason", REFUSED)
def test_bad_data_are_refused_with_a_remedy(params, reason):
    data, message = REFUSED[reason]
    with pytest.raises(ValueError, match=message):
        regressor(**params).fit(*data(*table(80)))


def test_names_that_occur_twice_are_refused_at_predict_too():
    X, y = table(80)
    model = regressor().fit(frame(X).drop(columns="kind"), y)
    with pytest.raises(ValueError, match="more than one column.*'a'.*rename"):
        model.predict(doubled(X))


def test_holes_that_a_plain_machine_has_not_seen():
    X, y = table(80)
    with pytest.raises(ValueError, match="NaN or infinity; drop or impute"):
        regressor(**PLAIN).fit(X, y).predict(with_value(X, np.nan))


def test_a_start_is_refused_where_fit_chooses():
    X, y = table(80)
    cases = (
        (regressor(), np.eye(5), "M"),
        (regressor(warm_start=True), None, "warm"),
        (regressor(bandwidth=[1.0, 2.0]), np.eye(5), "M"),
    )
    for model, M, name in cases:
        with pytest.raises(ValueError, match=f"^{name}.*pass a number as bandwidth"):
            model.fit(X, y, M=M)


def test_weights_of_one_class():
    X, y = table(80)
    with pytest.raises(ValueError, match="only the class True has weight"):
        classifier().fit(X, y > 0, sample_weight=y > 0)


def test_importances_need_a_fit():
    with pytest.raises(NotFittedError):
        regressor().feature_importances_  # noqa: B018
    assert not hasattr(regressor(), "feature_importances_")


BAD = [
    {"bandwidth": -1.0}, {"bandwidth": "wide"}, {"bandwidth": []}, {"bandwidth": [1, "auto"]},
    {"reg": -1}, {"reg": [1, None]}, {"metric": "round"}, {"metric": ["full", "round"]},
    {"refit": 3}, {"kernel": "cubic"}, {"n_iter": 1.5}, {"n_iter": -1}, {"solver": "guess"},
    {"validation_fraction": 1.0}, {"center": 2}, {"memory_limit": -1}, {"channels": 0},
    {"categorical_features": [7]}, {"categorical_features": "all"}, {"device": "tpu"},
    {"class_weight": "heavy"}, {"class_weight": {"low": -1}}, {"class_weight": {"low": "much"}},
    {"class_weight": {"low": np.nan}},
]  # fmt: skip


@pytest.mark.parametrize("params", BAD, ids=str)
def test_bad_parameters_are_named(params):
    X, y = table(80)
    ((name, value),) = params.items()
    with pytest.raises(ValueError) as refused:
        classifier(**params).fit(X, words(y))
    said = str(refused.value)
    shown = repr(value[0]) if name == "categorical_features" and value == [7] else repr(value)
    assert name in said and shown.strip("[]") in said
