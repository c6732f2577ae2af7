"""Transfer: units, the mixture, where the modes meet, controls, independent solutions."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from agop_book.cntk import CNTK
from agop_book.convrfm import ConvRFMClassifier, ConvRFMRegressor, DeepRFMClassifier, stars
from agop_book.kernels import NTK, Gaussian, Laplace
from agop_book.rfm import RFMClassifier, RFMRegressor
from agop_book.mixing import mix, normalised, rotated_metric
from agop_book.transfer import TransferRFM, transfer

MODES = ("fixed", "blend", "initial")

D = 8


def rfm(**params):
    "A regressor that is the plain algorithm."
    return RFMRegressor(bandwidth=10.0, **params)


def task(f=lambda X: X[:, 0] * X[:, 1], n=40, seed=0, d=D):
    X = np.random.default_rng(seed).normal(size=(n, d))
    return X, f(X)


def target(n=40, seed=1, d=D):
    return task(lambda X: X[:, 0] ** 2 - X[:, 1], n, seed, d)


def classes(n=40, seed=1, d=D):
    X, y = target(n, seed, d)
    return X, np.where(y > np.median(y), "high", "low")


def metric(d=D, seed=0):
    A = np.random.default_rng(seed).normal(size=(d, d))
    return A @ A.T


@pytest.fixture(scope="module")
def source():
    return rfm(n_iter=3).fit(*task(n=400))


@pytest.fixture(scope="module")
def conv_source():
    X, y = stars(40, 0.5, 16, random_state=0)
    return ConvRFMClassifier(depth=1, patch_size=7, n_iter=1, random_state=0).fit(X, y)


def same(a, b, X, atol=1e-8):
    np.testing.assert_allclose(a.predict(X), b.predict(X), atol=atol)


# the pieces


def test_units_are_the_mean_squared_distance_between_rows():
    X = target()[0] * np.arange(1, D + 1)
    M, Z = metric(), X - X.mean(0)
    wanted = (cdist(X, X) ** 2).mean()
    for N in (M, 1e6 * M, M.diagonal()):
        root = np.linalg.cholesky(np.diag(n) if (n := normalised(N, Z)).ndim == 1 else n)
        assert np.isclose((cdist(X @ root, X @ root) ** 2).mean(), wanted)
    np.testing.assert_array_equal(normalised(np.eye(D), Z), np.eye(D))
    np.testing.assert_allclose(
        normalised(M.astype(np.float32), Z.astype(np.float32)), normalised(M, Z), rtol=1e-4
    )


def test_units_where_the_matrix_sees_nothing():
    X, _ = target()
    X[:, 3] = 1.5
    blind = np.zeros(D)
    blind[3] = 1
    for M in (blind, np.diag(blind)):
        with pytest.raises(
            ValueError, match="source puts all its weight on features that do not vary in X"
        ):
            normalised(M, X - X.mean(0))
        with pytest.raises(ValueError, match="identity above 0"):
            transfer(M, (X, target()[1]), rfm())
    with pytest.raises(ValueError, match="same row again and again"):
        transfer(np.eye(D), (np.ones((5, D)), np.arange(5.0)), rfm())


def test_a_mixture_keeps_the_units():
    X, _ = target()
    Z = X - X.mean(0)
    A, B = (normalised(metric(seed=s), Z) for s in (0, 1))
    for w, s in ((0, 0), (1, 0), (0.3, 0.2), (0.5, 1)):
        M = mix(A, B, w, s)
        assert np.isclose(np.trace(Z @ M @ Z.T), np.square(Z).sum())
        np.testing.assert_allclose(M, (1 - s) * (w * A + (1 - w) * B) + s * np.eye(D))
    np.testing.assert_allclose(
        mix(A.diagonal(), B.diagonal(), 0.3, 0.2), mix(A, B, 0.3, 0.2).diagonal()
    )


def test_rotation_is_orthogonal_and_the_kernel_does_not_see_it_if_the_data_turn_too():
    M, X, Z = metric(), task()[0], target()[0]
    R = rotated_metric(M, random_state=3)
    np.testing.assert_allclose(np.linalg.eigvalsh(R), np.linalg.eigvalsh(M), rtol=1e-10)
    np.testing.assert_array_equal(R, rotated_metric(M, random_state=3))
    of_diagonal = rotated_metric(M.diagonal(), 3)
    np.testing.assert_allclose(rotated_metric(np.diag(M.diagonal()), 3), of_diagonal)
    from scipy.stats import ortho_group

    Q = ortho_group.rvs(D, random_state=3)
    np.testing.assert_allclose(Q @ Q.T, np.eye(D), atol=1e-13)
    np.testing.assert_allclose(R, Q @ M @ Q.T)
    for kernel in (Laplace(), Gaussian(3.0), NTK(2)):
        np.testing.assert_allclose(kernel(X @ Q.T, Z @ Q.T, M=R), kernel(X, Z, M=M), atol=1e-9)


def test_rotations_favour_no_direction():
    M = np.diag([1.0, 0, 0, 0])
    mean = np.mean([rotated_metric(M, s) for s in range(2000)], 0)
    np.testing.assert_allclose(mean, np.eye(4) / 4, atol=0.03)


# fit(M=...) of the estimators


@pytest.mark.parametrize("diag", [False, True])
def test_rfm_starts_from_a_given_matrix(diag):
    X, y = target()
    M = metric().diagonal() if diag else metric()
    model = rfm(n_iter=0, diag=diag, reg=1e-2).fit(X, y, M=M)
    K = Laplace()(X, M=M)
    np.testing.assert_allclose(
        model.dual_coef_, np.linalg.solve(K + 1e-2 * np.eye(len(X)), y), rtol=1e-8
    )
    np.testing.assert_allclose(model.M_, M)
    first = rfm(n_iter=1, diag=diag, reg=1e-2).fit(X, y, M=M)
    np.testing.assert_allclose(
        first.M_, model.machine_.agop(center=True, diag=diag), rtol=1e-6, atol=1e-12
    )
    going_on = rfm(n_iter=1, diag=diag, reg=1e-2, warm_start=True).fit(X, y)
    same(going_on.set_params(n_iter=0).fit(X, y, M=M), model, X)  # a given matrix starts afresh


def test_rfm_matrix_of_the_wrong_kind():
    X, y = target()
    with pytest.raises(ValueError, match=r"M has shape \(3, 3\)"):
        rfm().fit(X, y, M=np.eye(3))
    with pytest.raises(ValueError, match="positive semi-definite"):
        rfm().fit(X, y, M=-np.eye(D))
    with pytest.raises(ValueError, match="diag=True"):
        rfm(diag=True).fit(X, y, M=np.eye(D))
    same(rfm(n_iter=0).fit(X, y, M=np.ones(D)), rfm(n_iter=0).fit(X, y), X)


def test_convrfm_starts_from_a_given_matrix(tmp_path):
    X, y = stars(12, 0.5, 16, random_state=0)
    X = X.astype(np.float64)
    M, kernel = metric(27), CNTK(1, 3)
    model = ConvRFMClassifier(depth=1, n_iter=0).fit(X, y, M=M)
    K = kernel(X, M=M)
    np.testing.assert_allclose(
        model.dual_coef_,
        np.linalg.solve(K / K.max() + 1e-3 * np.eye(12), np.eye(2)[y]) / K.max(),
        rtol=1e-6,
    )
    np.testing.assert_allclose(model.M_, M)
    model.save(tmp_path / "m")
    same(ConvRFMClassifier.load(tmp_path / "m"), model, X)
    taught = ConvRFMClassifier(depth=1, n_iter=1, n_grad=None).fit(X, y, M=M)
    G = model.machine_.patch_agop(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(taught.M_, G / np.trace(G), atol=1e-9)
    np.testing.assert_allclose(
        ConvRFMClassifier(depth=1, n_iter=0).fit(X, y, M=np.ones(27)).M_, np.eye(27)
    )
    with pytest.raises(ValueError, match=r"with 27 features"):
        ConvRFMClassifier(depth=1).fit(X, y, M=np.eye(9))
    deep = DeepRFMClassifier(depth=2, n_iter=0, width=4, random_state=0)
    assert not np.allclose(
        clone(deep).fit(X, y, M=M).decision_function(X), clone(deep).fit(X, y).decision_function(X)
    )


# where the modes meet


@pytest.mark.parametrize(
    "learner, data",
    [
        (rfm(n_iter=0), target()),
        (RFMClassifier(bandwidth=10.0, n_iter=0), classes()),
        (rfm(n_iter=0, diag=True), target()),
        (rfm(n_iter=0, kernel="gaussian"), target()),
    ],
)
def test_the_identity_is_no_transfer(learner, data):
    M = np.ones(D) if learner.diag else np.eye(D)
    a, b = transfer(M, data, learner), clone(learner).fit(*data)
    np.testing.assert_allclose(a.learner_.dual_coef_, b.dual_coef_, rtol=1e-8, atol=1e-10)
    same(
        transfer(metric().diagonal() if learner.diag else metric(), data, learner, identity=1.0),
        b,
        data[0],
    ) if not is_classifier(learner) else None
    np.testing.assert_allclose(
        transfer(metric().diagonal() if learner.diag else metric(), data, learner, power=0).M_,
        M,
        atol=1e-12,
    )


def test_the_modes_meet(source):
    data, plain = target(), rfm(n_iter=0)
    X = target(seed=5)[0]
    fixed = transfer(source, data, plain)
    same(transfer(source, data, plain, mode="initial"), fixed, X)
    same(transfer(source, data, rfm(n_iter=2), mode="blend", weight=1.0), fixed, X)
    own = rfm(n_iter=2).fit(*data)
    same(
        transfer(source, data, rfm(n_iter=2), mode="blend", weight=0.0),
        transfer(own, data, plain),
        X,
    )
    same(
        transfer(source, data, rfm(n_iter=2), mode="initial", cv=None),
        rfm(n_iter=2).fit(*data, M=fixed.M_),
        X,
    )
    same(transfer(source.M_, data, plain), fixed, X)
    same(transfer(1e5 * torch.from_numpy(source.M_), data, plain), fixed, X)
    same(transfer(pd.DataFrame(source.M_), data, plain), fixed, X)
    np.testing.assert_allclose(
        transfer(fixed, data, plain, identity=0, power=1).M_, fixed.M_, rtol=1e-6, atol=1e-9
    )  # a TransferRFM is a source, too


def test_the_matrix_written_out(source):
    X, y = target()
    model = transfer(
        source, (X, y), rfm(n_iter=1), mode="blend", weight=0.3, identity=0.2, power=0.5
    )

    def unit(M):
        values, V = np.linalg.eigh(M)
        root, Z = V * np.sqrt(values.clip(0)) @ V.T, X - X.mean(0)
        return root * np.square(Z).sum() / np.trace(Z @ root @ Z.T)

    wanted = 0.8 * (0.3 * unit(source.M_) + 0.7 * unit(rfm(n_iter=1).fit(X, y).M_)) + 0.2 * np.eye(
        D
    )
    np.testing.assert_allclose(model.M0_, wanted, atol=1e-10)
    np.testing.assert_allclose(model.M_, wanted, atol=1e-10)


def test_a_diagonal_source_serves_a_full_learner_and_its_own_kind():
    data = target()
    diagonal = rfm(n_iter=2, diag=True).fit(*task(n=200))
    full = transfer(diagonal, data, rfm(n_iter=1), mode="blend", weight=0.5)
    assert full.M_.shape == (D, D)
    alike = transfer(diagonal, data, mode="blend", weight=0.5)
    assert alike.M_.shape == (D,) and alike.learner_.diag
    same(
        transfer(diagonal, data, rfm(n_iter=0)),
        transfer(diagonal, data, rfm(n_iter=0, diag=True)),
        data[0],
    )


def test_single_precision(source):
    X, y = target()
    single = rfm(n_iter=3).fit(*(a.astype(np.float32) for a in task(n=400)))
    for M in (
        single,
        single.M_,
        single.M_.astype(np.float64),
    ):  # rounding leaves eigenvalues a little below 0
        low = transfer(
            M, (X.astype(np.float32), y.astype(np.float32)), rfm(n_iter=1), mode="blend", weight=0.5
        )
        assert low.predict(X.astype(np.float32)).dtype == np.float32
    np.testing.assert_allclose(
        transfer(single, (X, y), rfm(n_iter=0)).predict(X),
        transfer(source, (X, y), rfm(n_iter=0)).predict(X),
        atol=0.02,
    )


# choices


def test_choices_are_the_best_of_the_folds(source):
    X, y = target(60)
    blend = dict(learner=rfm(n_iter=1), mode="blend")
    open_ = dict(identity=[0.1, 0.5, 1.0], power=[0.5, 1.0], random_state=3)
    model = transfer(source, (X, y), **blend, **open_)
    table = model.cv_results_
    assert len(table) == 5 * 2 * 2 + 1  # the identity alone is tried once
    best = table.loc[table["mean"].idxmax()]
    used = [model.weight_, model.identity_, model.power_]
    assert used == best[["weight", "identity", "power"]].tolist()
    row = table.query("weight == 0.5 and identity == 0.1 and power == 1").iloc[0]
    again = transfer(source, (X, y), **blend, weight=[0.5, 0.0], power=1.0, random_state=3)
    assert np.isclose(again.cv_results_["mean"][0], row["mean"])
    one = TransferRFM(source, **blend, weight=0.5, power=1.0)
    folds = KFold(3, shuffle=True, random_state=3).split(X)
    by_hand = [one.fit(X[a], y[a]).score(X[b], y[b]) for a, b in folds]
    assert np.isclose(np.mean(by_hand), row["mean"])  # nothing of the held-out rows is seen


def test_rounds_after_an_initial_matrix_are_chosen(source):
    model = transfer(source, target(60), rfm(n_iter=3), mode="initial")
    assert (
        list(model.cv_results_["n_iter"]) == [0, 1, 2, 3]
        and model.n_iter_ == model.cv_results_["n_iter"][model.cv_results_["mean"].idxmax()]
    )
    assert len(model.history_) == model.n_iter_ + 1
    assert transfer(source, target(60), rfm(n_iter=3), mode="initial", cv=None).n_iter_ == 3
    assert transfer(source, target(60), rfm(n_iter=3)).cv_results_ is None


def test_ties_go_to_what_is_listed_first():
    data = target()
    assert transfer(np.eye(D), data, rfm(n_iter=0), identity=[0.5, 0.2]).identity_ == 0.5
    assert transfer(np.eye(D), data, rfm(n_iter=0), identity=[0.2, 0.5]).identity_ == 0.2


def test_few_samples_of_a_class():
    X, y = classes(30)
    y = np.where(np.arange(30) < 2, "rare", y)
    with pytest.raises(
        ValueError, match=r"y holds 2 samples of class 'rare', too few for cv=3 folds.*cv=None"
    ):
        transfer(metric(), (X, y), RFMClassifier(bandwidth=10.0, n_iter=1), mode="blend")
    assert (
        transfer(
            metric(), (X, y), RFMClassifier(bandwidth=10.0, n_iter=1), mode="blend", weight=0.5
        ).cv_results_
        is None
    )
    assert set(
        transfer(
            metric(), (X, y), RFMClassifier(bandwidth=10.0, n_iter=1), mode="initial", cv=2
        ).classes_
    ) == {"high", "low", "rare"}


# an estimator like others


def test_scikit_learn_habits(source):
    X, y = classes(60)
    model = TransferRFM(source, RFMClassifier(bandwidth=10.0, n_iter=1), weight=0.5)
    assert is_classifier(model) and not is_regressor(model) and is_regressor(TransferRFM(source))
    copy = clone(model.fit(X, y))
    assert copy.source is source and copy.learner is not model.learner
    assert not hasattr(copy, "learner_")
    assert len(cross_val_score(model, X, y, error_score="raise")) == 5
    search = GridSearchCV(
        TransferRFM(source, RFMClassifier(bandwidth=10.0, n_iter=1), weight=0.5),
        {"mode": list(MODES), "learner__reg": [1e-3, 1e-1]},
        cv=2,
        error_score="raise",
    ).fit(X, y)
    assert search.best_estimator_.source is source
    piped = make_pipeline(
        FunctionTransformer(), TransferRFM(source, RFMClassifier(bandwidth=10.0))
    ).fit(X, y)
    assert 0.5 < piped.score(X, y) <= 1
    assert model.decision_function(X).shape == (60,) and model.transform(X).shape == X.shape
    assert model.n_features_in_ == D
    assert not hasattr(TransferRFM(source).fit(*target()), "decision_function")
    with pytest.raises(NotFittedError):
        TransferRFM(source).predict(X)
    assert "TransferRFM" in repr(model)


def test_learner_from_the_source():
    X, y = task(n=200)
    source = RFMRegressor(
        n_iter=2, bandwidth=7.0, reg=0.05, validation_fraction=0.2, random_state=0
    ).fit(X, y)
    learner = transfer(source, target()).learner_
    assert (learner.bandwidth, learner.reg, learner.validation_fraction, learner.n_iter) == (
        7.0,
        0.05,
        None,
        0,
    )
    images, labels = stars(40, 0.5, 16, random_state=0)
    source = ConvRFMClassifier(
        depth=1, n_iter=1, reg=[1e-3, 1e-1], validation_fraction=0.25, random_state=0
    ).fit(images, labels)
    assert transfer(source, (images, labels)).learner_.reg in (1e-3, 1e-1)


def test_families_of_data(source):
    X, y = target()
    a = transfer(source, (X, y), rfm(n_iter=1), mode="initial")
    frame = pd.DataFrame(X, columns=[f"f{i}" for i in range(D)], index=range(100, 140))
    b = transfer(
        source, (frame, pd.Series(y, frame.index, name="height")), rfm(n_iter=1), mode="initial"
    )
    c = transfer(source, (torch.from_numpy(X), torch.from_numpy(y)), rfm(n_iter=1), mode="initial")
    assert isinstance(b.predict(frame), np.ndarray) and isinstance(
        c.predict(torch.from_numpy(X)), torch.Tensor
    )
    np.testing.assert_allclose(b.predict(frame), a.predict(X))
    np.testing.assert_allclose(c.predict(torch.from_numpy(X)), a.predict(X))
    same(transfer(source, (X.tolist(), y.tolist()), rfm(n_iter=1), mode="initial"), a, X)
    two = transfer(source, (X, np.stack([y, -y], 1)), rfm(n_iter=1), mode="blend")
    assert two.predict(X).shape == (40, 2)


def test_the_fitted_learner_saves(source, tmp_path):
    X, y = target()
    model = transfer(source, (X, y), rfm(n_iter=1), mode="initial")
    model.learner_.save(tmp_path / "m.safetensors")
    same(RFMRegressor.load(tmp_path / "m.safetensors"), model, X)


# effects with known answers


def test_shared_features_help_and_others_hurt():
    source, other = (
        rfm(n_iter=3).fit(*task(n=500, d=20)),
        rfm(n_iter=3).fit(*task(lambda X: X[:, 2] * X[:, 3], 500, d=20)),
    )
    X_test, y_test = target(1000, 99, 20)
    gains = {name: [] for name in ("fixed", "blend", "initial", "turned", "other")}
    for seed in range(3):
        data = target(60, seed, 20)

        def score(M, **options):
            model = transfer(M, data, rfm(n_iter=1), **options)
            return model.score(X_test, y_test)

        none = rfm(n_iter=0).fit(*data).score(X_test, y_test)
        for mode in MODES:
            gains[mode].append(score(source, mode=mode) - none)
        gains["turned"].append(score(rotated_metric(source.M_, seed)) - none)
        gains["other"].append(score(other) - none)
    for mode in MODES:
        assert min(gains[mode]) > 0.2
    assert max(gains["turned"]) < 0.05 and max(gains["other"]) < 0


def test_patches_transfer_between_images_of_other_sizes(conv_source):
    X_test, y_test = stars(200, 1.5, 20, random_state=9)
    data = stars(30, 1.5, 20, random_state=8)
    learner = ConvRFMClassifier(depth=1, patch_size=7, n_iter=0)
    none, with_source = (
        transfer(M, data, learner).score(X_test, y_test) for M in (np.eye(147), conv_source)
    )
    same_kind = clone(learner).fit(*data).score(X_test, y_test)
    assert none == same_kind and with_source > none + 0.1
    assert conv_source.machine_.centers.shape[2] != data[0].shape[2]
    rows = transfer(
        conv_source,
        (data[0].reshape(30, -1), data[1]),
        clone(learner).set_params(image_shape=(3, 20, 20)),
    )
    assert (
        rows.predict(X_test.reshape(200, -1))
        == transfer(conv_source, data, learner).predict(X_test)
    ).all()


@pytest.mark.parametrize("mode", MODES)
def test_conv_modes(conv_source, mode):
    data = stars(18, 1.0, 16, random_state=8)
    model = transfer(
        conv_source,
        data,
        ConvRFMClassifier(depth=1, patch_size=7, n_iter=1, random_state=0),
        mode=mode,
        weight=(0.5, 1.0),
    )
    assert model.M_.shape == (147, 147) and model.predict(data[0]).shape == (18,)
    assert (model.cv_results_ is None) == (mode == "fixed")


# bad input: (what is wrong, the error, what it says)


def bad_frames(source):
    frame = pd.DataFrame(task(n=50)[0], columns=list("abcdefgh"))
    return rfm(n_iter=1).fit(frame, task(n=50)[1]), (frame[list("hgfedcba")], task(n=50)[1])


@pytest.mark.parametrize(
    "wrong, kind, text",
    [
        (
            np.eye(5),
            ValueError,
            r"source holds a matrix of shape \(5, 5\), but X has 8 features; it must be \(8, 8\)",
        ),
        (np.ones(5), ValueError, r"source holds a matrix of shape \(5,\)"),
        (np.ones((8, 5)), ValueError, r"shape \(8, 5\)"),
        (np.full((8, 8), np.nan), ValueError, "source contains NaN"),
        (-np.eye(8), ValueError, "source: M is not positive semi-definite.*Clip"),
        (np.triu(np.ones((8, 8))), ValueError, "source: M is not symmetric"),
        (np.zeros((8, 8)), ValueError, "source holds a matrix of zeros"),
        (1j * np.eye(8), ValueError, "source is complex"),
        (
            RFMRegressor(),
            NotFittedError,
            r"source=RFMRegressor\(\) is not fitted yet: call source.fit",
        ),
        (TransferRFM(np.eye(8), rfm()), NotFittedError, "is not fitted yet"),
        (rfm(n_iter=1).fit(*task(d=5)), ValueError, r"shape \(5, 5\), but X has 8 features"),
        (FunctionTransformer(), TypeError, "has no AGOP"),
        (
            "mnist",
            TypeError,
            "source must be a fitted RFM or ConvRFM estimator, or a matrix, got 'mnist'",
        ),
        (None, TypeError, "got None"),
        ({}, TypeError, "got {}"),
    ],
)
def test_bad_sources(wrong, kind, text):
    for mode in MODES:
        with pytest.raises(kind, match=text):
            transfer(wrong, target(), rfm(n_iter=1), mode=mode)


@pytest.mark.parametrize(
    "options, kind, text",
    [
        (
            {"mode": "frozen"},
            ValueError,
            "mode='frozen' is unknown: choose one of fixed, blend, initial",
        ),
        ({"weight": 1.5}, ValueError, "weight must be a number between 0 and 1"),
        ({"weight": []}, ValueError, "weight must be"),
        ({"weight": "n"}, ValueError, "weight must be"),
        ({"identity": -0.1}, ValueError, "identity must be a number between 0 and 1"),
        ({"identity": None}, ValueError, "identity must be"),
        ({"power": -1}, ValueError, "power must be a number of at least 0"),
        ({"power": [0.5, np.inf]}, ValueError, "power must be"),
        ({"cv": 1}, ValueError, "cv must be None or an integer of at least 2"),
        ({"cv": True}, ValueError, "cv must be"),
        (
            {"mode": "blend", "cv": None},
            ValueError,
            r"weight=.* holds 5 values to choose from, but cv is None",
        ),
        ({"identity": [0.1, 0.5], "cv": None}, ValueError, "identity=.* holds 2 values"),
        (
            {"mode": "blend", "learner": rfm(n_iter=0)},
            ValueError,
            "mode='blend' needs the target's own AGOP, but learner has n_iter=0",
        ),
        (
            {"learner": rfm(validation_fraction=0.2)},
            ValueError,
            "learner has validation_fraction=0.2",
        ),
        ({"learner": ConvRFMRegressor(reg=[1e-3, 1e-1])}, ValueError, "learner has reg="),
        (
            {"learner": FunctionTransformer()},
            TypeError,
            "learner must be an RFM or ConvRFM estimator",
        ),
        (
            {"learner": rfm(diag=True)},
            ValueError,
            r"source holds a full matrix \(8, 8\), but learner has diag=True; "
            r"pass source=M.diagonal\(\)",
        ),
        ({"learner": None}, ValueError, "learner=None takes the settings of the source"),
        ({"learner": RFMRegressor(bandwidth=-1)}, ValueError, "bandwidth must be"),
    ],
)
def test_bad_options(options, kind, text):
    with pytest.raises(kind, match=text):
        transfer(metric(), target(), **{"learner": rfm(n_iter=1), **options})


@pytest.mark.parametrize(
    "data, kind, text",
    [
        (target()[0], TypeError, r"target must be a pair \(X, y\)"),
        (rfm(), TypeError, "target must be a pair"),
        ((target()[0], target()[1][:-1]), ValueError, "inconsistent numbers of samples"),
        ((target()[0] * np.nan, target()[1]), ValueError, "X contains NaN"),
        ((target()[0][:, 0], target()[1]), ValueError, "Expected 2D array"),
        ((target()[0][:1], target()[1][:1]), ValueError, "minimum of 2"),
    ],
)
def test_bad_targets(data, kind, text):
    for mode in MODES:
        with pytest.raises(kind, match=text):
            transfer(metric(), data, rfm(n_iter=1), mode=mode)


def test_columns_in_another_order(source):
    fitted, data = bad_frames(source)
    with pytest.raises(ValueError, match=r"pass X\[source.feature_names_in_\]"):
        transfer(fitted, data)
    transfer(fitted, (data[0][fitted.feature_names_in_], data[1]))


def test_patches_that_do_not_fit(conv_source):
    X, y = stars(12, 0.5, 16, random_state=0)
    learner = ConvRFMClassifier(depth=1, patch_size=7)
    with pytest.raises(
        ValueError,
        match=r"source was learned on patches of 3 x 7 x 7 .* "
        r"patches of X hold 1 x 7 x 7 = 49 numbers.*X.mean\(1, keepdims=True\)",
    ):
        transfer(conv_source, (X[:, :1], y), learner)
    with pytest.raises(ValueError, match="patches of X hold 3 x 3 x 3 = 27 numbers.*patch_size=7"):
        transfer(conv_source, (X, y), ConvRFMClassifier(depth=1))
    with pytest.raises(
        ValueError, match=r"matrix of shape \(9, 9\), but patches of X hold 3 x 7 x 7"
    ):
        transfer(np.eye(9), (X, y), learner)
    with pytest.raises(ValueError, match="on patches and one on whole rows do not compare"):
        transfer(conv_source, (X.reshape(12, -1), y), RFMClassifier(bandwidth=9))
    with pytest.raises(ValueError, match="do not compare"):
        transfer(RFMClassifier(bandwidth=10.0, n_iter=1).fit(X.reshape(12, -1), y), (X, y), learner)
    with pytest.raises(ValueError, match="images must be"):
        transfer(conv_source, (X[:, 0], y), learner)
    with pytest.raises(ValueError, match="needs at least 7 x 7"):
        transfer(conv_source, (X[:, :, :5, :5], y), learner)


def test_nothing_warns(source):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in MODES:
            transfer(source, target(), rfm(n_iter=1), mode=mode)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees(source):
    data = target()
    found = []
    for device in ("cuda", "cpu"):
        learner = rfm(n_iter=1, device=device)
        model = transfer(source, data, learner, mode="blend", weight=0.5)
        found.append(model.predict(data[0]))
    np.testing.assert_allclose(*found, atol=1e-3)
