"""What every estimator promises.

scikit-learn's habits, families of data, files, AGOP, rows that do not influence each other,
refusals."""

import copy
import inspect
import json
import pickle
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file
from sklearn import (
    base,
    calibration,
    compose,
    ensemble,
    feature_selection,
    inspection,
    linear_model,
)
from sklearn import (
    model_selection,
    multiclass,
    multioutput,
    pipeline,
    preprocessing,
    semi_supervised,
)
from sklearn.exceptions import NotFittedError
from sklearn.utils import all_estimators, get_tags

from agop_book.agop import agop
from agop_book.convrfm import (
    ConvRFMClassifier,
    ConvRFMRegressor,
    DeepRFMClassifier,
    DeepRFMRegressor,
)
from agop_book.kernels import NTK, Laplace, Matern52
from agop_book.machines import KernelMachine
from agop_book.rfm import RFMClassifier, RFMRegressor
from agop_book.solvers import CholeskySolver, first
from agop_book.matrices import matrix_power
from agop_book.metrics import Shared, apply_metric
from agop_book.maprfm import MapRFMClassifier, MapRFMRegressor
from agop_book.transfer import TransferRFM

IMAGE = dict(depth=1, patch_size=3, image_shape=(1, 4, 4), n_iter=1, random_state=0)
SOURCE = RFMRegressor(bandwidth=10.0, n_iter=1).fit(
    *(lambda X: (X, X[:, 0] * X[:, 1]))(np.random.default_rng(9).normal(size=(60, 16)))
)
REGRESSORS = {
    "RFM adaptive": RFMRegressor(n_iter=2, random_state=0),
    "RFM": RFMRegressor(bandwidth=10.0, n_iter=1),
    "RFM diag, Matern": RFMRegressor(Matern52(4.0), bandwidth=10.0, n_iter=1, diag=True),
    "RFM ntk": RFMRegressor("ntk", bandwidth=10.0, n_iter=1),
    "MapRFM diag": MapRFMRegressor(n_iter=1),
    "MapRFM shared": MapRFMRegressor("shared", channels=4, n_iter=2),
    "MapRFM separable": MapRFMRegressor("separable", channels=4, n_iter=1),
    "ConvRFM": ConvRFMRegressor(**IMAGE),
    "DeepRFM": DeepRFMRegressor(**IMAGE | {"depth": 2}, padding="zero", width=4),
    "TransferRFM": TransferRFM(SOURCE, cv=None, weight=1.0),
}
CLASSIFIERS = {
    "RFM adaptive": RFMClassifier(n_iter=2, random_state=0),
    "RFM": RFMClassifier(bandwidth=10.0, n_iter=1),
    "MapRFM shared": MapRFMClassifier("shared", channels=4, n_iter=1),
    "ConvRFM": ConvRFMClassifier(**IMAGE),
    "DeepRFM": DeepRFMClassifier(**IMAGE | {"depth": 2}, padding="zero", width=4),
    "TransferRFM": TransferRFM(
        SOURCE, RFMClassifier(bandwidth=10.0, n_iter=1), cv=None, weight=1.0
    ),
}
EVERY = {
    f"{kind} {name}": model
    for kind, models in (("regressor", REGRESSORS), ("classifier", CLASSIFIERS))
    for name, model in models.items()
}
every = pytest.mark.parametrize("name", EVERY)
SAVING = [name for name in EVERY if "Transfer" not in name]


def rows(n=48, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=(n, 16)).astype(dtype)


def labels(name, X):
    "A target that the estimator `name` takes: numbers, or three words."
    f = X[:, 0] * X[:, 1] + X[:, 2]
    if name.startswith("regressor"):
        return f
    return np.array(["low", "middle", "high"])[np.digitize(f, np.quantile(f, [1 / 3, 2 / 3]))]


def fitted(name, dtype=np.float64, **params):
    X = rows(dtype=dtype)
    return base.clone(EVERY[name]).set_params(**params).fit(X, labels(name, X))


def scores(model, X):
    "What the machine says, in numbers."
    return np.asarray(model.decision_function(X) if base.is_classifier(model) else model.predict(X))


# --- scikit-learn's habits


@every
def test_fit_returns_self_and_leaves_parameters_alone(name):
    model = base.clone(EVERY[name])
    before, X = copy.deepcopy(model.get_params(deep=False)), rows()
    assert model.fit(X, labels(name, X)) is model
    after = model.get_params(deep=False)
    assert list(before) == list(after) and all(repr(before[k]) == repr(after[k]) for k in before)
    assert set(list(inspect.signature(type(model).__init__).parameters)[1:]) == set(before)


@every
def test_clones_and_pickles_predict_the_same(name):
    model, X = fitted(name), rows(seed=1)
    again = base.clone(model).fit(rows(), labels(name, rows()))
    np.testing.assert_array_equal(scores(again, X), scores(model, X))
    np.testing.assert_array_equal(scores(pickle.loads(pickle.dumps(model)), X), scores(model, X))


@every
def test_not_fitted(name):
    with pytest.raises(NotFittedError):
        base.clone(EVERY[name]).predict(rows())
    with pytest.raises(NotFittedError):
        base.clone(EVERY[name]).transform(rows())


@every
def test_interrupted_before_the_first_round_is_not_fitted(name, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    models = base.clone(EVERY[name]), copy.deepcopy(FITTED[name])
    monkeypatch.setattr("agop_book.solvers.Solver.fits", stop)
    for model in models:
        with pytest.raises(KeyboardInterrupt):
            model.fit(rows(), labels(name, rows()))
        if "Transfer" not in name:
            with pytest.raises(NotFittedError):
                model.predict(rows())


class _Fitted(dict):
    def __missing__(self, name):
        return self.setdefault(name, fitted(name))


FITTED = _Fitted()


# --- families of data


def families(X):
    frame = pd.DataFrame(
        X,
        columns=[f"f{i:02}" for i in range(X.shape[1])],
        index=np.random.default_rng(3).permutation(len(X)) + 1000,
    )
    yield "list", X.tolist()
    yield "frame", frame
    yield "fortran", np.asfortranarray(X)
    yield "read-only", np.broadcast_to(X, X.shape)
    yield "tensor", torch.from_numpy(X)
    try:
        yield "pyarrow frame", frame.convert_dtypes(dtype_backend="pyarrow")
    except ImportError:
        pass
    try:
        import polars
    except ImportError:
        return
    yield "polars", polars.DataFrame(X, schema=list(frame.columns))


@every
def test_every_family_gives_the_same_numbers(name):
    X = rows()
    y, want = labels(name, X), scores(FITTED[name], rows(seed=1))
    for (family, A), (_, B) in zip(families(X), families(rows(seed=1))):
        model = base.clone(EVERY[name])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.fit(A, pd.Series(y, A.index) if isinstance(A, pd.DataFrame) else y)
            got, Z = model.predict(B), model.transform(B)
        kind = torch.Tensor if family == "tensor" else np.ndarray
        assert isinstance(Z, kind) and (isinstance(got, kind) or base.is_classifier(model)), family
        np.testing.assert_allclose(scores(model, B), want, atol=1e-8, err_msg=family)


@every
def test_half_precision_tensors(name):
    model, X = FITTED[name], torch.from_numpy(rows())
    for dtype in (torch.bfloat16, torch.float16):
        half = X.to(dtype)
        np.testing.assert_allclose(
            scores(model, half), scores(model, half.float().numpy()), atol=1e-6
        )
        y = labels(name, X.numpy())
        again = base.clone(EVERY[name]).fit(half, y)
        assert np.isfinite(scores(again, half)).all() and np.asarray(again.transform(half)).shape[
            0
        ] == len(X)


@every
def test_frames_come_from_set_output_only(name):
    X = pd.DataFrame(rows(), columns=[f"f{i}" for i in range(16)], index=np.arange(48)[::-1])
    model = base.clone(EVERY[name]).fit(X, labels(name, rows()))
    assert isinstance(model.transform(X), np.ndarray) and isinstance(model.predict(X), np.ndarray)
    if not hasattr(model, "set_output") or "Deep" in name:
        return  # maps, not rows, come out of the deep ones
    framed = model.set_output(transform="pandas").transform(X)
    assert framed.index.equals(X.index) and framed.shape == X.shape


@every
def test_single_and_double_precision_agree(name):
    X = rows(seed=1)
    double, single = scores(FITTED[name], X), scores(fitted(name, np.float32), X.astype(np.float32))
    assert np.abs(double - single).max() < 5e-3 * np.abs(double).max()


# --- meta-estimators, with a frame whose index is shuffled


def around_regressors(e):
    c = base.clone
    return {
        "TransformedTargetRegressor": compose.TransformedTargetRegressor(
            e, transformer=preprocessing.StandardScaler()
        ),
        "StackingRegressor": ensemble.StackingRegressor([("a", e), ("b", c(e))], cv=2),
        "VotingRegressor": ensemble.VotingRegressor([("a", e), ("b", c(e))]),
        "BaggingRegressor": ensemble.BaggingRegressor(e, 2),
        "MultiOutputRegressor": multioutput.MultiOutputRegressor(e),
        "RegressorChain": multioutput.RegressorChain(e),
        "RANSACRegressor": linear_model.RANSACRegressor(
            e, min_samples=30, max_trials=2, residual_threshold=1e3
        ),
        "GridSearchCV": model_selection.GridSearchCV(e, {}, cv=2, error_score="raise"),
        "RandomizedSearchCV": model_selection.RandomizedSearchCV(
            e, {}, n_iter=1, cv=2, error_score="raise"
        ),
        "SequentialFeatureSelector": None,
    }


def around_classifiers(e):
    c = base.clone
    return {
        "CalibratedClassifierCV": calibration.CalibratedClassifierCV(e, cv=2),
        "StackingClassifier": ensemble.StackingClassifier([("a", e), ("b", c(e))], cv=2),
        "VotingClassifier": ensemble.VotingClassifier([("a", e), ("b", c(e))]),
        "BaggingClassifier": ensemble.BaggingClassifier(e, 2),
        "OneVsRestClassifier": multiclass.OneVsRestClassifier(e),
        "OneVsOneClassifier": multiclass.OneVsOneClassifier(e),
        "OutputCodeClassifier": multiclass.OutputCodeClassifier(e, code_size=2, random_state=0),
        "MultiOutputClassifier": multioutput.MultiOutputClassifier(e),
        "ClassifierChain": multioutput.ClassifierChain(e, chain_method="decision_function"),
        "FixedThresholdClassifier": model_selection.FixedThresholdClassifier(e),
        "TunedThresholdClassifierCV": model_selection.TunedThresholdClassifierCV(e, cv=2),
        "SelfTrainingClassifier": semi_supervised.SelfTrainingClassifier(
            calibration.CalibratedClassifierCV(e, cv=2)
        ),
        "HalvingGridSearchCV": None,
        "HalvingRandomSearchCV": None,
    }


REFUSED = {  # meta-estimators that need what no kernel machine has
    "AdaBoostClassifier": "sample_weight",
    "AdaBoostRegressor": "sample_weight",
    "RFE": "coef_",
    "RFECV": "coef_",
    "SelectFromModel": "coef_",
    "Pipeline": "is tested everywhere",
    "FeatureUnion": "transformers only",
    "ColumnTransformer": "transformers only",
    "FrozenEstimator": "hands on",
}
METAS = {"regressor": around_regressors, "classifier": around_classifiers}


def test_no_meta_estimator_is_forgotten():
    known = {*around_regressors(RFMRegressor()), *around_classifiers(RFMClassifier()), *REFUSED}
    takes = {"estimator", "estimators", "regressor"}
    found = {name: inspect.signature(cls.__init__).parameters for name, cls in all_estimators()}
    assert {name for name, parameters in found.items() if takes & set(parameters)} <= known


def fits_any_width(name):
    return name in (
        "regressor RFM",
        "regressor RFM diag, Matern",
        "regressor RFM ntk",
        "regressor MapRFM diag",
        "classifier RFM",
    )


@pytest.mark.parametrize(
    "name, meta",
    [
        (n, m)
        for n in EVERY
        for m, made in METAS[n.split()[0]](RFMClassifier()).items()
        if made is not None and ("Chain" not in m or fits_any_width(n))
    ],
)  # chains add columns
def test_meta_estimators_take_frames(name, meta):
    index = np.random.default_rng(5).permutation(64)
    X = pd.DataFrame(rows(64), columns=[f"f{i}" for i in range(16)], index=index)
    y = pd.Series(labels(name, X.to_numpy()), X.index)
    if meta.endswith(("ThresholdClassifier", "ThresholdClassifierCV")):
        y = (y == "low").astype(int)
    if meta.startswith("MultiOutput") or "Chain" in meta:
        a = pd.factorize(y)[0] > 0 if name.startswith("classifier") else y
        y = pd.DataFrame({"a": a, "b": X["f1"] > 0}, X.index).astype(float)
    model = METAS[name.split()[0]](base.clone(EVERY[name]))[meta].fit(X, y)
    out = np.asarray(model.predict(X))
    assert len(out) == 64 and (out.dtype.kind != "f" or np.isfinite(out).all())
    plain = np.asarray(
        base.clone(model)
        .fit(X.reset_index(drop=True), y.reset_index(drop=True))
        .predict(X.reset_index(drop=True))
    )
    if not meta.startswith(("Bagging", "Randomized", "RANSAC")):
        np.testing.assert_array_equal(plain, out)  # the index means nothing


def test_displays_and_searches_take_frames():
    X = pd.DataFrame(rows(64)[:, :2], columns=["a", "b"], index=np.arange(64)[::-1])
    y = (X["a"] * X["b"] > 0).astype(int)
    model = RFMClassifier(bandwidth=10.0, n_iter=1).fit(X, y)
    assert inspection.DecisionBoundaryDisplay.from_estimator(
        model, X, grid_resolution=5
    ).response.shape == (5, 5)
    inspection.PartialDependenceDisplay.from_estimator(model, X, ["a"], grid_resolution=5)
    assert inspection.permutation_importance(model, X, y, n_repeats=2).importances.shape == (2, 2)
    assert feature_selection.SequentialFeatureSelector(
        RFMClassifier(bandwidth=10.0, n_iter=0), n_features_to_select=1, cv=2
    ).fit(X, y).transform(X).shape == (64, 1)
    assert model_selection.cross_val_predict(
        model, X, y, cv=2, method="decision_function"
    ).shape == (64,)
    assert (
        pipeline.make_pipeline(preprocessing.StandardScaler().set_output(transform="pandas"), model)
        .fit(X, y)
        .score(X, y)
        > 0.8
    )


# --- rows do not influence each other


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_predictions_do_not_depend_on_other_rows(name, dtype):
    model, X = fitted(name, dtype), rows(24, seed=1, dtype=dtype)
    alone = np.stack([scores(model, X[i : i + 1])[0] for i in range(24)])
    tolerance = (5e-4 if dtype == np.float32 else 1e-9) * np.abs(alone).max()
    np.testing.assert_allclose(scores(model, X), alone, atol=tolerance)
    for far in (1e2, 1e4, 1e6, 1e9, 1e12):
        Q = X.copy()
        Q[0, 3], Q[7, 5] = far, -far
        np.testing.assert_allclose(
            np.delete(scores(model, Q), [0, 7], 0),
            np.delete(alone, [0, 7], 0),
            atol=tolerance,
            err_msg=str(far),
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("far", [1e2, -9999, 1e6, 1e9, 1e12])
@pytest.mark.parametrize(
    "model",
    [
        RFMRegressor(bandwidth=10.0, n_iter=3),
        RFMRegressor(bandwidth=10.0, n_iter=3, diag=True),
        MapRFMRegressor("shared", channels=2, bandwidth=5.0),
    ],
    ids=["full", "diag", "shared"],
)
def test_one_far_training_row_leaves_the_others_alone(model, far, dtype):
    X = np.random.default_rng(0).normal(size=(1200, 4)).astype(dtype)
    y = X[:, 0] * X[:, 1] + np.sin(X[:, 2])
    want = base.clone(model).fit(X[:600], y[:600]).score(X[600:], y[600:])
    X[7, 2] = far
    assert abs(base.clone(model).fit(X[:600], y[:600]).score(X[600:], y[600:]) - want) < 0.005


def test_rows_far_from_the_others_keep_their_distances():
    "Two clusters a million apart: single precision is exact within each, and so must the rest be."
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(60, 3)).astype(np.float32)
    Z[30:] += 1e6
    B = rng.normal(size=(3, 3)).astype(np.float32)
    for kernel in (Laplace(5.0), Matern52(5.0)):
        for M in (None, np.float32([1, 2, 3]), B @ B.T):
            exact = kernel(Z.astype(np.float64), M=None if M is None else M.astype(np.float64))
            np.testing.assert_allclose(kernel(Z, M=M), exact, atol=1e-5)
    X = rng.normal(size=(300, 3))
    X[:, 0] = 1e6 * (np.arange(300) % 2)
    y = np.sin(2 * X[:, 1]) + X[:, 2]
    single, double = (
        RFMRegressor(bandwidth=10.0, n_iter=0)
        .fit(X[:200].astype(t), y[:200])
        .score(X[200:].astype(t), y[200:])
        for t in (np.float32, np.float64)
    )
    assert double > 0.8 and abs(single - double) < 1e-3


def test_agop_is_not_moved_by_a_far_row_elsewhere():
    X = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    far = X.copy()
    far[7, 2] = 1e6
    y = X[:, 0] * X[:, 1]
    for kernel in (Laplace(5.0), Matern52(5.0)):
        single = RFMRegressor(kernel, bandwidth=10.0, n_iter=2).fit(far, y).M_
        double = RFMRegressor(kernel, bandwidth=10.0, n_iter=2).fit(far.astype(np.float64), y).M_
        np.testing.assert_allclose(single, double, atol=2e-3 * np.abs(double).max())


@pytest.mark.parametrize(
    "kernel", [Laplace(5.0), Matern52(5.0), NTK(2)], ids=lambda k: type(k).__name__
)
@pytest.mark.parametrize("far", [1e2, 1e4, 1e6, 1e9])
def test_gradients_do_not_depend_on_other_rows(kernel, far):
    X = np.random.default_rng(0).normal(size=(80, 4)).astype(np.float32)
    X[40:50] = X[:10] + np.float32(1e-5)  # close, not equal
    coef = np.random.default_rng(1).normal(size=(80, 2))
    exact = KernelMachine(kernel, X.astype(np.float64), coef).jacobian(X.astype(np.float64))
    machine, scale = KernelMachine(kernel, X, coef), np.abs(exact).max()
    np.testing.assert_allclose(machine.jacobian(X), exact, atol=2e-2 * scale)
    Q = X.copy()
    Q[7, 2] = far
    np.testing.assert_allclose(
        np.delete(machine.jacobian(Q), 7, 0), np.delete(exact, 7, 0), atol=2e-2 * scale
    )
    with_far = KernelMachine(kernel, Q.astype(np.float64), coef).jacobian(
        X[20:40].astype(np.float64)
    )
    np.testing.assert_allclose(
        KernelMachine(kernel, Q, coef).jacobian(X[20:40]),
        with_far,
        atol=2e-2 * np.abs(with_far).max(),
    )


@pytest.mark.parametrize("far", [1e2, 1e4, 1e9, 1e12])
def test_all_outputs_together_with_a_far_row(far):
    "The way that squares slopes, in single precision, against the closed form in double precision."
    X = torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
    X[7, 2] = far
    Y, kernel = torch.randn(120, 40, generator=torch.Generator().manual_seed(1)), Laplace(5.0)
    solver = CholeskySolver(kernel, X, Y, [1e-2], center=True)
    fit = first(solver.fits(None))
    want = KernelMachine(kernel, X.double(), fit.machine.coef.double()).agop(center=True)
    np.testing.assert_allclose(solver.agop(fit), want, atol=2e-3 * float(want.abs().max()))


# --- the AGOP of a fitted estimator


@every
def test_agop_equals_differences(name):
    if name in ("regressor DeepRFM", "classifier DeepRFM"):
        pytest.skip("no closed form to compare: differences are the only way")
    model, X = FITTED[name], rows(10, seed=2)
    for center in (False, True):
        want = agop(model, X, method="differences", center=center)
        np.testing.assert_allclose(
            agop(model, X, center=center), want, atol=2e-3 * np.abs(want).max()
        )


def test_agop_of_two_classes():
    X = rows()
    for model in (
        RFMClassifier(bandwidth=10.0, n_iter=1),
        MapRFMClassifier("shared", channels=4, n_iter=1),
    ):
        model.fit(X, X[:, 0] > 0)
        closed, other = agop(model, X[:10]), agop(model, X[:10], method="differences")
        np.testing.assert_allclose(closed, other, atol=2e-3 * np.abs(other).max())
        assert model.outputs(X).shape == (48, 2) and np.allclose(
            model.outputs(X) @ [-1, 1], model.decision_function(X)
        )


# --- files


@pytest.mark.parametrize("name", SAVING)
def test_files_give_back_the_same_model(name, tmp_path):
    params = {"reg": np.float32(1e-3), "device": torch.device("cpu")}
    if "bandwidth" in EVERY[name].get_params():
        params["bandwidth"] = np.float32(3.3)
    model, X = fitted(name, np.float32, **params), rows(seed=1, dtype=np.float32)
    model.save(tmp_path / "m")
    again = type(model).load(tmp_path / "m")
    np.testing.assert_array_equal(scores(again, X), scores(model, X))
    np.testing.assert_array_equal(again.transform(X), model.transform(X))
    assert again.predict(X).dtype == model.predict(X).dtype and [
        p.name for p in tmp_path.iterdir()
    ] == ["m"]
    assert again.n_features_in_ == 16 and len(again.history_) == len(model.history_)
    with pytest.raises(NotFittedError):
        base.clone(model).save(tmp_path / "n")


@pytest.mark.parametrize(
    "classes",
    [
        np.array(["2026-01-01", "2026-02-01"], "datetime64[D]"),
        np.array([1, 7], np.uint8),
        np.array([False, True]),
        np.array(["a", "b"], object),
        np.array([1.0, 2.0]),
    ],
    ids=lambda c: str(c.dtype),
)
def test_classes_of_any_kind_survive_a_file(classes, tmp_path):
    X = rows()
    model = RFMClassifier(bandwidth=10.0, n_iter=0).fit(X, classes[(X[:, 0] > 0).astype(int)])
    model.save(tmp_path / "m")
    again = RFMClassifier.load(tmp_path / "m")
    assert (
        again.classes_.dtype == model.classes_.dtype
        and (again.predict(X) == model.predict(X)).all()
    )


@pytest.mark.parametrize(
    "name", ["regressor RFM", "classifier MapRFM shared", "classifier DeepRFM"]
)
def test_damage_is_found(name, tmp_path):
    model, path = FITTED[name], tmp_path / "m"
    model.save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    want, X = scores(model, rows(seed=1)), rows(seed=1)
    for bit in [*range(0, 8 * 64, 3), *rng.integers(0, 8 * len(whole), 300).tolist()]:
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        try:
            again = type(model).load(path)
        except ValueError as error:
            assert "not a complete model file" in str(error)
        else:
            np.testing.assert_array_equal(scores(again, X), want)  # a bit that means nothing
    for cut in rng.integers(0, len(whole), 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a complete model file"):
            type(model).load(path)


def test_many_writers_of_one_file(tmp_path):
    plain = RFMRegressor(bandwidth=10.0, n_iter=0)
    models = [base.clone(plain).fit(rows(seed=s), rows(seed=s)[:, 0]) for s in range(4)]
    found = []

    def save(model):
        for _ in range(10):
            model.save(tmp_path / "m")

    def read():
        for _ in range(20):
            if (tmp_path / "m").exists():
                found.append(RFMRegressor.load(tmp_path / "m").dual_coef_)

    threads = [threading.Thread(target=save, args=(m,)) for m in models] + [
        threading.Thread(target=read)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    found.append(RFMRegressor.load(tmp_path / "m").dual_coef_)
    assert all(any((coef == m.dual_coef_).all() for m in models) for coef in found) and [
        p.name for p in tmp_path.iterdir()
    ] == ["m"]


def old_header(model):
    "What a file of the first edition says of a model."
    maps = "Map" in type(model).__name__
    return {
        "class": type(model).__name__,
        "history": model.history_.to_dict("records"),
        "best_round": model.best_round_,
        "features": [],
        "targets": None,
        "flat": True,
        "identity": maps,
        "kernel": {"name": "Laplace", "bandwidth": model.machine_.kernel.bandwidth},
        "params": {**model.get_params(), "random_state": None},
    }


@pytest.mark.parametrize("name", ["RFM", "MapRFM shared", "MapRFM separable"])
def test_files_of_the_first_edition_load(name, tmp_path):
    "Without a checksum; the centres of a MapRFM were kept as x M^(1/2)."
    model = FITTED[f"regressor {name}"]
    centers = model.machine_.centers
    if "Map" in name:
        root = torch.from_numpy(matrix_power(model.M_, 0.5))
        centers = apply_metric(centers, root if root.ndim == 1 else Shared(root))
    arrays = {"centers": centers.numpy(), "coef": model.machine_.coef.numpy(), "M": model.M_}
    arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    save_file(arrays, tmp_path / "m", metadata={"agop_book": json.dumps(old_header(model))})
    again = type(model).load(tmp_path / "m")
    np.testing.assert_allclose(again.predict(rows(seed=1)), model.predict(rows(seed=1)), atol=1e-8)


# --- refusals


def spoilt(X, value):
    X = X.copy()
    X[3, 2] = value
    return X


HOSTILE = {
    "complex": lambda X: X * 1j,
    "NaN": lambda X: spoilt(X, np.nan),
    "infinity": lambda X: spoilt(X, np.inf),
    "masked": lambda X: np.ma.array(X, mask=X > 1),
    "dates": lambda X: np.full(X.shape, np.datetime64("2026-01-01")),
    "words": lambda X: X.astype(str).astype(object) + "?",
    "empty": lambda X: X[:0],
    "one axis": lambda X: X[:, 0],
    "no features": lambda X: X[:, :0],
    "sparse tensor": lambda X: torch.from_numpy(X).to_sparse(),
    "too large": lambda X: spoilt(X, 1e200),
    "frame of dates": lambda X: pd.DataFrame(
        {f"f{i}": pd.date_range("2026-01-01", periods=len(X)) for i in range(16)}
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
@every
def test_bad_rows_are_refused(name, kind):
    if kind == "NaN" and get_tags(EVERY[name]).input_tags.allow_nan:
        pytest.skip("missing numbers are welcome here")
    if kind == "too large" and "adaptive" in name:
        pytest.skip("a wild number is clipped")
    X = rows()
    y, bad = labels(name, X), HOSTILE[kind](X)
    with pytest.raises((ValueError, TypeError)) as caught:
        base.clone(EVERY[name]).fit(bad, y)
    assert len(str(caught.value)) > 20
    model = FITTED[name]
    with pytest.raises((ValueError, TypeError)):
        model.predict(bad)
    assert np.isfinite(scores(model, X)).all()  # nothing is lost


@pytest.mark.parametrize("kind", ["complex", "NaN", "masked", "short", "empty"])
@every
def test_bad_targets_are_refused(name, kind):
    X = rows()
    y = labels(name, X)
    number = np.arange(48.0)
    bad = {
        "complex": number + 1j,
        "NaN": spoilt(number[:, None] * [1, 1, 1], np.nan)[:, 2],
        "masked": np.ma.array(number, mask=number > 40),
        "short": y[:20],
        "empty": y[:0],
    }[kind]
    with pytest.raises((ValueError, TypeError)):
        base.clone(EVERY[name]).fit(X, bad)
    if "Transfer" in name:
        return
    with pytest.raises((ValueError, TypeError)):
        base.clone(EVERY[name]).fit(X, y, X, bad)


@every
def test_other_columns_are_refused(name):
    X = pd.DataFrame(rows(), columns=[f"f{i}" for i in range(16)])
    model = base.clone(EVERY[name]).fit(X, labels(name, rows()))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(X[X.columns[::-1]])
    with pytest.raises(ValueError, match="feature names"):
        agop(model, X[X.columns[::-1]])
    with pytest.raises(ValueError):
        model.predict(X.iloc[:, :9])


@pytest.mark.parametrize("name", SAVING)
@pytest.mark.parametrize(
    "params",
    [
        {"n_iter": 2**63},
        {"n_iter": -1},
        {"n_iter": True},
        {"reg": -1.0},
        {"reg": np.nan},
        {"reg": "1"},
        {"memory_limit": 1},
        {"validation_fraction": 2.0},
        {"device": "tpu"},
    ],
    ids=str,
)
def test_bad_parameters_are_refused(name, params):
    X = rows()
    ((key, value),) = params.items()
    error = MemoryError if key == "memory_limit" else ValueError
    with pytest.raises(error, match=key):
        base.clone(EVERY[name]).set_params(**params).fit(X, labels(name, X))


@pytest.mark.parametrize(
    "make, what",
    [
        (
            lambda: RFMRegressor(bandwidth=10.0).fit(
                np.zeros((3, 60_000), np.float32), np.arange(3)
            ),
            "60,000 features",
        ),
        (
            lambda: RFMClassifier(bandwidth=10.0, memory_limit=2**31).fit(
                np.arange(60_000.0)[:, None], np.arange(60_000)
            ),
            "60,000 outputs",
        ),
        (
            lambda: DeepRFMClassifier(width=2_000_000, depth=2, memory_limit=2**31).fit(
                np.random.default_rng(0).normal(size=(6, 1, 8, 8)), np.arange(6) % 2
            ),
            "width=2,000,000",
        ),
        (
            lambda: MapRFMRegressor("shared", channels=60_000, memory_limit=2**31).fit(
                np.zeros((3, 60_000), np.float32), np.arange(3)
            ),
            "60,000 features",
        ),
        (lambda: Laplace()(np.zeros((600_000, 1), np.float32)), "600,000 rows"),
    ],
    ids=["features", "labels", "width", "channels", "kernel"],
)
def test_too_much_is_refused_before_the_work(make, what):
    with pytest.raises(MemoryError, match=what):
        make()


def test_a_diagonal_metric_needs_no_square_of_the_features():
    X = np.random.default_rng(0).normal(size=(8, 60_000)).astype(np.float32)
    model = RFMRegressor(diag=True, n_iter=1, bandwidth=300.0, memory_limit=2**30).fit(X, X[:, 0])
    assert model.M_.shape == (60_000,)


def test_channels_last_is_said():
    X = np.random.default_rng(0).normal(size=(6, 8, 8, 3))
    for model in (
        ConvRFMClassifier(depth=1, padding="zero"),
        DeepRFMRegressor(depth=1, padding="circular"),
    ):
        with pytest.raises(ValueError, match=r"transpose\(0, 3, 1, 2\)"):
            model.fit(X, np.arange(6) % 2)
    ConvRFMClassifier(depth=1, padding="zero", n_iter=0, image_shape=(8, 8, 3)).fit(
        X, np.arange(6) % 2
    )  # said to be channels


@pytest.mark.parametrize("name", SAVING)
def test_a_refused_fit_leaves_the_model_as_it_was(name):
    model, X = copy.deepcopy(FITTED[name]), rows(seed=1)
    want, attributes = scores(model, X), {k: v for k, v in vars(model).items() if k != "machine_"}
    y = labels(name, rows())
    refused = [
        lambda: model.fit(rows(), y, rows(), None),
        lambda: model.fit(rows(), y[:20]),
        lambda: model.fit(spoilt(rows(), np.inf), y),
    ]
    if name.startswith("classifier"):
        refused.append(lambda: model.fit(rows(), np.zeros(48)))
    if "Map" not in name:
        refused.append(
            lambda: model.fit(rows(), y, M=-np.eye(16 if "RFM" == name.split()[1][:3] else 9))
        )
    for fit in refused:
        with pytest.raises((ValueError, TypeError)):
            fit()
        np.testing.assert_array_equal(scores(model, X), want)
        assert {k for k in vars(model) if k != "machine_"} == set(
            attributes
        ) and model.n_features_in_ == 16


@pytest.mark.parametrize("name", SAVING)
def test_validation_targets_of_other_shapes(name):
    X, y = rows(), labels(name, rows())
    right = base.clone(EVERY[name]).fit(X, y, X, y).history_["val_score"]
    np.testing.assert_allclose(
        base.clone(EVERY[name]).fit(X, y, X, y[:, None]).history_["val_score"], right
    )
    for bad in (np.stack([y, y], 1), y[:, None, None]):
        with pytest.raises(ValueError, match="y_val has shape"):
            base.clone(EVERY[name]).fit(X, y, X, bad)
    if name.startswith("regressor"):
        with pytest.raises(ValueError, match="one row"):
            base.clone(EVERY[name]).fit(X, y, X[:1], y[:1])


@pytest.mark.parametrize(
    "labels",
    [
        ["a", None] * 24,
        [np.nan, "b"] * 24,
        [1, "b"] * 24,
        [pd.NA, "b"] * 24,
        np.array(["2020", "NaT"] * 24, "datetime64[D]"),
        pd.Series(["a", None] * 24, dtype="string"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_labels_that_are_missing_or_do_not_compare(labels):
    labels = labels if hasattr(labels, "dtype") else np.array(labels, dtype=object)
    with pytest.raises(
        ValueError,
        match="^y (contains missing labels|holds labels)|Input y contains NaN|"
        "[Uu]nknown label type|mix of label",
    ):
        RFMClassifier(bandwidth=10.0, n_iter=0).fit(rows(), labels)


def test_no_ridge_mends_a_matrix_of_nothing():
    with pytest.raises(ValueError, match="nothing but zeros"):
        RFMRegressor("ntk", bandwidth=10.0, n_iter=0, reg=0).fit(np.zeros((5, 2)), np.arange(5.0))
    for kernel in (Matern52(0.01), Laplace(1e-100)):
        X = rows(dtype=np.float32)
        X[0, 0] = 1e18
        assert np.isfinite(kernel(X)).all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.isfinite(
                RFMRegressor(kernel, bandwidth=10.0, n_iter=0).fit(X, X[:, 1]).predict(X)
            ).all()
    with pytest.raises(ValueError, match="bandwidth"):
        Laplace(1e-320)


def test_warm_start_with_other_columns_starts_afresh():
    X = pd.DataFrame(rows(), columns=[f"f{i}" for i in range(16)])
    y = X["f0"] * X["f1"]
    model = RFMRegressor(bandwidth=10.0, n_iter=2, warm_start=True).fit(X, y)
    with pytest.warns(UserWarning, match="starting afresh"):
        model.fit(X[X.columns[::-1]], y)
    np.testing.assert_allclose(
        model.M_, RFMRegressor(bandwidth=10.0, n_iter=2).fit(X[X.columns[::-1]], y).M_
    )


def test_files_that_load_could_not_open_are_not_written(tmp_path):
    class Own(Laplace):
        pass

    with pytest.raises(ValueError, match="class of your own"):
        RFMRegressor(Own(3.0), bandwidth=10.0, n_iter=0).fit(rows(), rows()[:, 0]).save(
            tmp_path / "m"
        )
    model = MapRFMRegressor(
        n_iter=0, reg=np.array([1e-3, 1e-2]), validation_fraction=0.3, random_state=0
    ).fit(rows(), rows()[:, 0])
    model.save(tmp_path / "m")
    np.testing.assert_array_equal(
        MapRFMRegressor.load(tmp_path / "m").predict(rows()), model.predict(rows())
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a, m: m.pop("classes"),
        lambda a, m: m.update(classes=[0, 0, 0]),
        lambda a, m: m.update(classes=[1]),
        lambda a, m: m.update(classes_dtype=[]),
        lambda a, m: m.update(identity=-1),
        lambda a, m: a.update(coef=a["coef"][:5]),
        lambda a, m: a.update(coef=a["coef"] * np.nan),
        lambda a, m: a.update(M=a["M"][:0]),
        lambda a, m: m.update(params={"n": 1}),
        lambda a, m: m.update(kernel={"name": "os.system"}),
        lambda a, m: m.update(history=3),
    ],
)
@pytest.mark.parametrize(
    "name", ["classifier RFM", "classifier MapRFM shared", "classifier ConvRFM"]
)
def test_whole_files_of_nonsense(name, spoil, tmp_path):
    from agop_book.files import load_arrays, save_arrays

    FITTED[name].save(tmp_path / "m")
    arrays, about = load_arrays(tmp_path / "m")
    spoil(arrays, about)
    save_arrays(tmp_path / "m", arrays, about)
    try:
        model = type(FITTED[name]).load(tmp_path / "m")
    except ValueError as error:
        assert "not a complete model file" in str(error)
    else:
        np.testing.assert_array_equal(
            scores(model, rows()), scores(FITTED[name], rows())
        )  # what it does not need


# --- nothing learned is said


def test_a_collapsed_fit_warns_and_says_why():
    X, y = rows(), rows()[:, 0]
    with pytest.warns(UserWarning, match="M_ is zero.*apart, where the kernel is 0 "):
        RFMRegressor("gaussian", bandwidth=10.0, n_iter=1).fit(1e6 * X, y)
    f = 1e3 * np.sin(3 * X[:, 0]) * X[:, 1]
    with pytest.warns(UserWarning, match="nearest neighbour is typically .*standardise y"):
        RFMRegressor(bandwidth=10.0, n_iter=1).fit(X, f)
    with pytest.warns(UserWarning, match="R2 is .*on the training rows.*standardise y"):
        RFMRegressor(bandwidth=10.0, n_iter=0, reg=1e4).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RFMRegressor(bandwidth=10.0, n_iter=2).fit(X, y)


def test_transfer_from_a_machine_on_maps():
    X, y = rows(), rows()[:, 0]
    for name in ("regressor MapRFM diag", "regressor MapRFM separable"):
        assert TransferRFM(
            FITTED[name], RFMRegressor(bandwidth=10.0, diag=True, n_iter=0), cv=None, weight=1.0
        ).fit(X, y).predict(X).shape == (48,)
    full = TransferRFM(
        FITTED["regressor MapRFM shared"],
        RFMRegressor(bandwidth=10.0, n_iter=0),
        cv=None,
        weight=1.0,
        identity=0.0,
        power=1,
    ).fit(X, y)
    A = FITTED["regressor MapRFM shared"].M_
    want = np.kron(A, np.eye(4))
    np.testing.assert_allclose(full.M_ / np.trace(full.M_), want / np.trace(want), atol=1e-12)
    alone = TransferRFM(FITTED["regressor MapRFM diag"], cv=None, weight=1.0).fit(X, y)
    assert isinstance(alone.learner_, MapRFMRegressor)
    with pytest.raises(ValueError, match="takes no matrix to start from"):
        TransferRFM(FITTED["regressor MapRFM shared"]).fit(X, y)
    with pytest.raises(TypeError, match="learner must be"):
        TransferRFM(np.eye(16), MapRFMRegressor("shared", channels=4)).fit(X, y)
