"""Machines that adapt: files, and their place among scikit-learn's tools."""


import joblib
import numpy as np
import pandas as pd
import pytest
from adaptive_cases import PLAIN, classifier, frame, regressor, table, words
import torch
from sklearn.base import clone
from sklearn.feature_selection import RFE, SelectFromModel
from sklearn.model_selection import GridSearchCV

from agop_book.agop import agop
from agop_book.kernels import Laplace
from agop_book.rfm import RFMClassifier, RFMRegressor

pytestmark = pytest.mark.filterwarnings("error")
both = pytest.mark.parametrize("params", [{}, PLAIN], ids=["adaptive", "plain"])



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
    X, y = table(80)
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
    X, y = table(80)
    model = classifier(class_weight=weight, **params).fit(X, (y > 0).astype(int))
    model.save(tmp_path / "model.safetensors")
    other = RFMClassifier.load(tmp_path / "model.safetensors")
    assert kept(model, other, X) and other.class_weight == weight


# --- scikit-learn's tools


def test_grid_searches():
    X, y = table(80)
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
    X, y = table(80)
    F = frame(X)
    model = regressor().set_output(transform="pandas").fit(F, y)
    out = model.transform(F)
    assert list(out.columns) == model.get_feature_names_out().tolist() and len(out) == len(F)
    assert out.columns[0] == "rfmregressor0"


def test_several_targets():
    X, y = table(80)
    Y = np.column_stack([y, 1e4 * X[:, 3] + 5])
    model = regressor().fit(X, Y)
    assert model.predict(X).shape == Y.shape and model.score(X, Y) > 0.9


def numerical_jacobian(f, X, step=1e-5):
    slopes = [(f(X + step * e) - f(X - step * e)) / (2 * step) for e in np.eye(X.shape[1])]
    return np.stack([s.reshape(len(X), -1) for s in slopes], -1)


@both
@pytest.mark.parametrize("target", ["number", "numbers", "classes"])
def test_gradients_and_agop(params, target):
    (X, y), (T, _) = table(80), table(80, seed=1)
    unit = 1 if params else 1e4
    numbers = np.column_stack([unit * y + 7, y**2])
    y = {"number": numbers[:, 0], "numbers": numbers, "classes": words(y)}[target]
    model = (classifier if target == "classes" else regressor)(**params).fit(X, y)
    J = numerical_jacobian(model.outputs if target == "classes" else model.predict, T)
    found = model.kernel_machine().jacobian(torch.as_tensor(T)).numpy()
    assert np.abs(found - J).max() < 1e-6 * np.abs(J).max()
    G = np.einsum("mcd,mce->de", J, J) / len(T)
    assert np.abs(np.asarray(agop(model, T)) - G).max() < 1e-6 * np.abs(G).max()
