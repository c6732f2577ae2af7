"""Machines that adapt: odd and bad input, parameters, files, and their place in scikit-learn."""

import resource
import time
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import RFE, SelectFromModel
from sklearn.model_selection import GridSearchCV

from agop_book.agop import agop
from agop_book.kernels import Laplace
from agop_book.rfm import RFMClassifier, RFMRegressor

PLAIN = {"bandwidth": 4.0, "n_iter": 2}
both = pytest.mark.parametrize("params", [{}, PLAIN], ids=["adaptive", "plain"])


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def table(n=80, seed=0, d=5):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, X[:, 0] * X[:, 1] + X[:, 2] + 0.1 * rng.normal(size=n)


def words(y):
    return np.array(["low", "middle", "high"])[np.digitize(y, [-0.7, 0.7])]


def frame(X):
    F = pd.DataFrame(X, columns=list("abcde"))
    F["kind"] = pd.Categorical(np.array(["u", "v"])[(X[:, 3] > 0).astype(int)])
    return F


def regressor(**params):
    return RFMRegressor(random_state=0, **params)


def classifier(**params):
    return RFMClassifier(random_state=0, **params)


# --- odd tables


@both
def test_categories_of_one_row_unseen_ones_and_holes(params):
    X, y = table()
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
    X, y = table()
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
    X, y = table()
    labels = np.where(np.arange(len(X)) < rare, "rare", words(y))
    p = classifier(**params).fit(X, labels).predict_proba(X)
    assert p.shape == (len(X), 4) and np.allclose(p.sum(1), 1)


@both
def test_a_column_of_nothing(params):
    X, y = table()
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
    X, y = table()
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
    X, y = table()
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
    "weights 0": (lambda X, y: (X, y, *[None] * 3, 0 * y), "zero for every row.*pass"),
    "one weight": (lambda X, y: (X, y, *[None] * 3, np.arange(80) == 7), "row 7 alone; pass"),
    "few weights": (lambda X, y: (X, y, *[None] * 3, [1, 2]), r"shape.*\(80,\)"),
}


@both
@pytest.mark.parametrize("reason", REFUSED)
def test_bad_data_are_refused_with_a_remedy(params, reason):
    data, message = REFUSED[reason]
    with pytest.raises(ValueError, match=message):
        regressor(**params).fit(*data(*table()))


def test_names_that_occur_twice_are_refused_at_predict_too():
    X, y = table()
    model = regressor().fit(frame(X).drop(columns="kind"), y)
    with pytest.raises(ValueError, match="more than one column.*'a'.*rename"):
        model.predict(doubled(X))


def test_holes_that_a_plain_machine_has_not_seen():
    X, y = table()
    with pytest.raises(ValueError, match="NaN or infinity; drop or impute"):
        regressor(**PLAIN).fit(X, y).predict(with_value(X, np.nan))


def test_a_start_is_refused_where_fit_chooses():
    X, y = table()
    for model, M, name in ((regressor(), np.eye(5), "M"), (regressor(warm_start=True), None, "warm"),
                           (regressor(bandwidth=[1.0, 2.0]), np.eye(5), "M")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}.*pass a number as bandwidth"):
            model.fit(X, y, M=M)


def test_weights_of_one_class():
    X, y = table()
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
    X, y = table()
    ((name, value),) = params.items()
    with pytest.raises(ValueError) as refused:
        classifier(**params).fit(X, words(y))
    said = str(refused.value)
    shown = repr(value[0]) if name == "categorical_features" and value == [7] else repr(value)
    assert name in said and shown.strip("[]") in said


# --- files


def kept(model, other, X):
    "Whether two models say the same, to the bit."
    methods = ["predict", "explain", "transform"]
    methods += ["predict_proba", "outputs"] * hasattr(model, "predict_proba")
    return all(
        np.array_equal(getattr(model, m)(X), getattr(other, m)(X)) for m in methods
    ) and np.array_equal(model.feature_importances_, other.feature_importances_)


SETTINGS = {
    "adaptive": {},
    "plain": PLAIN,
    "lists": {"bandwidth": [2.0, 4.0], "metric": ["full", "diag"]},
    "validated": {"validation_fraction": 0.3},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("make", [RFMRegressor, RFMClassifier])
def test_files_keep_everything(make, setting, tmp_path):
    X, y = table()
    F = frame(X)
    F.iloc[5] = np.nan
    weights = np.random.default_rng(1).integers(0, 3, len(X))
    if make is RFMClassifier:
        y = words(y)
    model = make(**SETTINGS[setting]).fit(F, y, sample_weight=weights)
    model.save(tmp_path / "model.safetensors")
    joblib.dump(model, tmp_path / "model.joblib")
    G = F.copy()
    G["kind"] = G["kind"].cat.add_categories(["new"]).where(np.arange(len(X)) > 9, "new")
    for other in (
        make.load(tmp_path / "model.safetensors"),
        joblib.load(tmp_path / "model.joblib"),
    ):
        assert kept(model, other, G) and other.get_params() == model.get_params()
        again = clone(other).fit(F, y, sample_weight=weights)
        assert again.predict(F).shape == y.shape


@both
@pytest.mark.parametrize("weight", ["balanced", {np.int64(0): 2, 1: np.float64(0.5)}])
def test_files_keep_class_weights(params, weight, tmp_path):
    X, y = table()
    model = classifier(class_weight=weight, **params).fit(X, (y > 0).astype(int))
    model.save(tmp_path / "model.safetensors")
    other = RFMClassifier.load(tmp_path / "model.safetensors")
    assert kept(model, other, X) and other.class_weight == weight


# --- scikit-learn's tools


def test_grid_searches():
    X, y = table()
    grid = GridSearchCV(regressor(kernel=Laplace(1.0)), {"kernel__bandwidth": [0.01, 4.0]}, cv=3)
    assert grid.fit(X, y).best_params_ == {"kernel__bandwidth": 4.0}
    choices = {"metric": ["full", "diag", "auto"], "reg": ["auto", 1e3]}
    grid = GridSearchCV(regressor(), choices, cv=3).fit(X, y)
    assert (
        grid.best_params_["reg"] == "auto"
        and np.isfinite(grid.cv_results_["mean_test_score"]).all()
    )


def test_selection_by_importances():
    X, y = table(200)
    F = pd.DataFrame(X, columns=list("abcde"))
    chosen = SelectFromModel(regressor(), threshold=0.1).fit(F, y)
    assert chosen.get_feature_names_out().tolist() == ["a", "b", "c"]
    chosen = RFE(classifier(), n_features_to_select=3).fit(X, words(y))
    assert chosen.support_.tolist() == [True] * 3 + [False] * 2


def test_transformed_columns_have_names():
    X, y = table()
    F = frame(X)
    model = regressor().set_output(transform="pandas").fit(F, y)
    out = model.transform(F)
    assert list(out.columns) == model.get_feature_names_out().tolist() and len(out) == len(F)
    assert out.columns[0] == "rfmregressor0"


def test_several_targets():
    X, y = table()
    Y = np.column_stack([y, 1e4 * X[:, 3] + 5])
    model = regressor().fit(X, Y)
    assert model.predict(X).shape == Y.shape and model.score(X, Y) > 0.9


def numerical_jacobian(f, X, step=1e-5):
    slopes = [(f(X + step * e) - f(X - step * e)) / (2 * step) for e in np.eye(X.shape[1])]
    return np.stack([s.reshape(len(X), -1) for s in slopes], -1)


@both
@pytest.mark.parametrize("target", ["number", "numbers", "classes"])
def test_gradients_and_agop(params, target):
    (X, y), (T, _) = table(), table(seed=1)
    unit = 1 if params else 1e4
    numbers = np.column_stack([unit * y + 7, y**2])
    y = {"number": numbers[:, 0], "numbers": numbers, "classes": words(y)}[target]
    model = (classifier if target == "classes" else regressor)(**params).fit(X, y)
    J = numerical_jacobian(model.outputs if target == "classes" else model.predict, T)
    found = model.kernel_machine().jacobian(torch.as_tensor(T)).numpy()
    assert np.abs(found - J).max() < 1e-6 * np.abs(J).max()
    G = np.einsum("mcd,mce->de", J, J) / len(T)
    assert np.abs(np.asarray(agop(model, T)) - G).max() < 1e-6 * np.abs(G).max()
