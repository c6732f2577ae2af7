"""ConvRFM and Deep RFM: the published round, an independent solution, scale, shapes, files."""

import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer

import agop_book.convrfm as convrfm
import agop_book.imagerfm as imagerfm
from agop_book.matrices import matrix_power
from agop_book.cntk import CNTK, patch_agop
from agop_book.convrfm import (
    ConvRFMClassifier,
    ConvRFMRegressor,
    DeepRFMClassifier,
    DeepRFMRegressor,
    noisy_frames,
    stars,
)
from agop_book.deeprfm import draw_filters
from agop_book.imagerfm import ImageSolver, next_metric
from agop_book.solvers import first, rounds
from agop_book.image_data import convolve, seen_through

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "cntk_fixture.npz"
ESTIMATORS = [ConvRFMClassifier, ConvRFMRegressor, DeepRFMClassifier, DeepRFMRegressor]
REGS = [1e-4, 1e-2]


def problem(n=24, c=2, side=8, seed=0, dtype=np.float64):
    "A bright 3 x 3 spot in the first channel of every second image."
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(n, c, side, side)) * 0.3, np.arange(n) % 2
    for i in np.flatnonzero(y):
        r, k = rng.integers(0, side - 2, 2)
        X[i, 0, r : r + 3, k : k + 3] += 1
    return X.astype(dtype), y


@pytest.mark.skipif(not FIXTURE.exists(), reason=f"no reference values at {FIXTURE}")
@pytest.mark.parametrize("key, depth", [("d1", 1), ("d2", 2), ("d2M", 2)])
def test_published_round(key, depth):
    """The released code's next multiplier is the root of our next M.

    And its kernel with that multiplier is ours with M."""
    f = np.load(FIXTURE)

    def images(name):
        return torch.from_numpy(
            np.ascontiguousarray(f[f"agop_{key}_{name}"].transpose(0, 3, 1, 2))
        )

    multiplier = torch.from_numpy(f["agop_d2M_M"]) if key == "d2M" else None
    metric = None if multiplier is None else multiplier @ multiplier.T
    G = patch_agop(
        CNTK(depth, 3), images("Xs"), images("X"), torch.from_numpy(f[f"agop_{key}_alphas"]), metric
    )
    published = f[f"agop_{key}_G"]
    w, V = np.linalg.eigh(published)
    root = (V * np.sqrt(w.clip(0))) @ V.T
    M = next_metric(G)
    np.testing.assert_allclose(
        matrix_power(M, 0.5), root / np.linalg.norm(root), atol=1e-7
    )  # roots of tiny eigenvalues carry the error's root
    np.testing.assert_allclose(M, published / np.trace(published), atol=1e-12)


@pytest.mark.skipif(not FIXTURE.exists(), reason=f"no reference values at {FIXTURE}")
def test_published_kernel_with_a_multiplier():
    f = np.load(FIXTURE)
    X, Z = (np.ascontiguousarray(f[k].transpose(0, 3, 1, 2)) for k in ("X1_8x8x3", "X2_8x8x3"))
    K = CNTK(2, 3)(X, Z, M=f["M_8x8x3"] @ f["M_8x8x3"].T)
    np.testing.assert_allclose(
        np.delete(K.ravel(), 0), np.delete(f["ntk_expandedM_8x8x3_d2"].ravel(), 0), rtol=1e-9
    )  # without the coincident pair


def plain_rounds(kernel, X, Y, reg, n_iter, rows):
    "The round written out in numpy, by LU."
    M = None
    for _ in range(n_iter + 1):
        K = kernel(X, None, M)
        coef = np.linalg.solve(K / K.max() + reg * np.eye(len(X)), Y)
        yield coef / K.max(), M
        g = kernel.gradient(X[rows], X, coef / K.max(), M)
        G = np.einsum("ncpi,ncpj->ij", g, g)
        M = G / np.trace(G)


@pytest.mark.parametrize(
    "depth, padding", [(1, "valid"), (2, "valid"), (2, "zero"), (3, "circular")]
)
def test_rounds_equal_the_plain_algorithm(depth, padding):
    X, y = problem(16)
    Y, kernel = np.eye(2)[y], CNTK(depth, 3, padding)
    fast = rounds(
        ImageSolver(kernel, torch.from_numpy(X), torch.from_numpy(Y), [1e-2], slice(5)), 2
    )
    for step, (coef, M) in zip(fast, plain_rounds(kernel, X, Y, 1e-2, 2, slice(5)), strict=True):
        np.testing.assert_allclose(step.machine.coef, coef, rtol=1e-6, atol=1e-9)
        assert (M is None) == (step.machine.M is None)
        if M is not None:
            np.testing.assert_allclose(step.machine.M, M, atol=1e-10)
        np.testing.assert_allclose(step.fitted, step.machine(torch.from_numpy(X)), atol=1e-9)


def test_machine_agop_against_finite_differences():
    "With one patch per image the patch gradient is the image gradient."
    X, y = problem(10, side=3)
    step = first(
        ImageSolver(CNTK(1, 3), torch.from_numpy(X), torch.from_numpy(np.eye(2)[y]), [1e-2]).fits(
            None
        )
    )
    x, h = torch.from_numpy(problem(3, side=3, seed=5)[0]), 1e-5
    E = torch.eye(18, dtype=torch.float64).unflatten(1, (2, 3, 3)) * h
    g = torch.stack(
        [(step.machine(image + E) - step.machine(image - E)) / (2 * h) for image in x]
    )  # (images, entries, outputs)
    np.testing.assert_allclose(
        step.machine.patch_agop(x), torch.einsum("nic,njc->ij", g, g) / 3, rtol=1e-5, atol=1e-9
    )


def test_scale_of_pixels_and_bytes_do_not_matter():
    X, y = problem(20, dtype=np.float32)
    bytes_ = (60 * X + 128).clip(0, 255).astype(np.uint8)
    model = ConvRFMClassifier(depth=2, n_iter=1, random_state=0)
    a = clone(model).fit(bytes_, y).decision_function(bytes_)
    b = clone(model).fit(bytes_ / np.float32(255), y).decision_function(bytes_ / np.float32(255))
    np.testing.assert_allclose(a, b, atol=2e-3)
    assert a.dtype == np.float32


def test_rows_images_tensors_frames_agree():
    X, y = problem()
    rows = X.reshape(len(X), -1)
    by_images = ConvRFMClassifier(depth=2, n_iter=1, random_state=0).fit(X, y)
    by_rows = ConvRFMClassifier(depth=2, n_iter=1, random_state=0, image_shape=(2, 8, 8)).fit(
        rows, y
    )
    want = by_images.decision_function(X)
    for got in (
        by_rows.decision_function(rows),
        by_rows.decision_function(X),
        by_images.decision_function(rows),
    ):
        np.testing.assert_allclose(got, want)
    tensors = by_images.decision_function(torch.from_numpy(X))
    assert isinstance(tensors, torch.Tensor)
    np.testing.assert_allclose(tensors, want)
    frame = pd.DataFrame(rows, index=range(100, 124), columns=[f"p{i}" for i in range(128)])
    by_frame = ConvRFMClassifier(depth=2, n_iter=1, random_state=0, image_shape=(2, 8, 8)).fit(
        frame, y
    )
    seen = by_frame.transform(frame)
    assert isinstance(seen, np.ndarray)
    framed = by_frame.set_output(transform="pandas").transform(frame)
    assert framed.index.equals(frame.index) and framed.shape == (24, 128)
    np.testing.assert_allclose(seen, by_images.transform(X).reshape(24, -1))


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_contract(cls):
    X, y = problem(dtype=np.float32)
    target = (
        np.array(["no", "yes"])[y] if "Classifier" in cls.__name__ else np.stack([y, 2.0 * y], 1)
    )
    wide = {"width": 6} if "Deep" in cls.__name__ else {}
    model = cls(2, n_iter=1, reg=REGS, validation_fraction=0.25, random_state=0, **wide)
    before = model.get_params()
    assert model.fit(X, target) is model and model.get_params() == before
    columns = ["round", "train_score", "val_score", "reg", "alignment", "effective_rank", "seconds"]
    assert list(model.history_.columns)[:7] == columns
    assert np.isfinite(model.history_).all(axis=None)
    assert len(model.filters_) == len(model.M_) and np.isclose(np.trace(model.M_), 1)
    assert np.allclose(model.M_, model.M_.T)
    assert np.linalg.eigvalsh(model.M_).min() > -1e-12
    assert model.predict(X).shape == target.shape and model.score(X, target) > 0.5
    again = clone(model).fit(X, target)
    assert (again.predict(X) == model.predict(X)).all()


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_files(cls, tmp_path):
    X, y = problem(dtype=np.float32)
    model = cls(2, n_iter=1, reg=REGS, validation_fraction=0.25, random_state=0).fit(X, y)
    model.save(tmp_path / "m.safetensors")
    loaded = cls.load(tmp_path / "m.safetensors")
    assert (loaded.predict(X) == model.predict(X)).all() and loaded.get_params()["reg"] == REGS
    pd.testing.assert_frame_equal(loaded.history_, model.history_)
    assert loaded.transform(X).shape == model.transform(X).shape
    other = next(c for c in ESTIMATORS if c is not cls)
    with pytest.raises(ValueError, match=f"holds a {cls.__name__}"):
        other.load(tmp_path / "m.safetensors")
    (tmp_path / "broken").write_bytes((tmp_path / "m.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match="not a complete model file"):
        cls.load(tmp_path / "broken")


def test_composes_with_scikit_learn():
    X, y = problem()
    search = GridSearchCV(ConvRFMClassifier(depth=1, n_iter=1), {"patch_size": [1, 3]}, cv=2).fit(
        X, y
    )
    assert search.best_params_["patch_size"] in (1, 3)
    assert cross_val_score(ConvRFMRegressor(depth=1, n_iter=0), X, y, cv=2).shape == (2,)
    seen = make_pipeline(
        ConvRFMClassifier(depth=1, n_iter=1),
        FunctionTransformer(lambda x: x.reshape(len(x), -1)),
        LogisticRegression(),
    ).fit(X, y)
    assert seen.score(X, y) > 0.5


def test_learns_where_to_look():
    X, y = stars(30, size=28, random_state=0)
    X_test, y_test = stars(150, size=28, random_state=1)
    model = ConvRFMClassifier(depth=1, patch_size=7, n_iter=1, random_state=0).fit(
        X, y, X_test, y_test
    )
    assert model.history_["val_score"][1] > model.history_["val_score"][0]
    energy = model.M_.diagonal().reshape(3, -1).sum(1)
    assert energy[2] < 0.8 * energy[:2].min()  # the star shows in the first two channels only


def test_best_round_and_ridge_come_from_validation():
    X, y = problem(40)
    model = ConvRFMClassifier(depth=1, n_iter=3, reg=[1e-6, 1.0], random_state=0).fit(
        X[:24], y[:24], X[24:], y[24:]
    )
    assert model.best_round_ == model.history_["val_score"].idxmax() and set(
        model.history_["reg"]
    ) <= {1e-6, 1.0}
    assert model.score(X[24:], y[24:]) == model.history_["val_score"].max()
    deep = DeepRFMClassifier(depth=2, n_iter=1, width=8, random_state=0).fit(
        X[:24], y[:24], X[24:], y[24:]
    )
    assert np.isclose(deep.score(X[24:], y[24:]), deep.history_["val_score"].max())
    kept = deep.history_[
        (deep.history_["layer"] == deep.best_layer_) & (deep.history_["round"] == deep.best_round_)
    ]
    assert kept["val_score"].item() == deep.history_["val_score"].max()


def test_deep_layers():
    X = torch.from_numpy(problem(4)[0])
    A = torch.randn(18, 18, dtype=torch.float64)
    M = next_metric(A @ A.T)
    W = draw_filters(M, 2, 30_000, random_state=0)
    assert W.shape == (30_000, 2, 3, 3)
    np.testing.assert_allclose(
        W.flatten(1).T @ W.flatten(1) / 30_000, M, atol=0.05 * float(M.abs().max())
    )
    exact = draw_filters(M, 2, None)  # M^(1/2) itself: inner products of features are those of M
    patches = CNTK(1, 3).patches(X)
    features = convolve(X, exact).permute(2, 3, 0, 1)
    np.testing.assert_allclose(features @ features.mT, patches @ M @ patches.mT, atol=1e-10)
    assert (
        convolve(X, exact, "circular").shape == (4, 18, 8, 8)
        and (convolve(X, exact, "zero", "relu") >= 0).all()
    )
    deep = DeepRFMRegressor(
        depth=3, patch_size=3, n_iter=0, width=5, padding="circular", random_state=0
    ).fit(X.numpy(), np.arange(4.0))
    assert deep.best_layer_ == 2 and deep.transform(X).shape == (4, 5, 8, 8)


def test_seen_through_identity_and_projection():
    X = torch.from_numpy(problem(3)[0])
    np.testing.assert_allclose(
        seen_through(X, 9 * torch.eye(18, dtype=torch.float64)), 3 * X, atol=1e-12
    )
    flat = torch.zeros(18, 18, dtype=torch.float64)
    flat[:9, :9] = 1 / 9  # the mean of the first channel's patch
    assert seen_through(X, flat)[:, 1].abs().max() < 1e-12
    with pytest.raises(ValueError, match="18 numbers"):
        seen_through(X[:, :1], flat)


def test_constant_identical_and_zero_images():
    X, y = problem(12)
    flat = np.broadcast_to(
        np.linspace(0, 1, 12)[:, None, None, None], (12, 1, 6, 6)
    ).copy()  # one of them is zero everywhere
    assert np.isfinite(
        ConvRFMClassifier(depth=2, n_iter=2).fit(flat, y).decision_function(flat)
    ).all()
    same = np.repeat(X[:1], 12, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing can be learned, and the model may say so
        model = ConvRFMClassifier(depth=2, n_iter=2).fit(same, y)
    assert np.isfinite(model.decision_function(X)).all() and np.isfinite(model.M_).all()
    with pytest.raises(ValueError, match="every image of X is zero"):
        ConvRFMClassifier().fit(0 * X, y)
    with pytest.warns(UserWarning, match="every gradient is zero"):
        next_metric(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="overflow"):
        next_metric(torch.full((4, 4), torch.inf))


def test_ridges():
    K, Y = torch.ones(3, 3), torch.eye(3)  # the same image three times
    same = torch.ones(3, 1, 4, 4)

    def fits(regs):
        return list(ImageSolver(CNTK(1, 3), same, Y, regs).fits(None))

    assert [fit.reg for fit in fits([1e-12, 1e-2, 1.0])] == [1e-2, 1.0]
    for fit in fits([1e-2, 1.0]):
        coef = (Y - fit.fitted) / fit.reg
        torch.testing.assert_close((K + fit.reg * torch.eye(3)) @ coef, Y, rtol=1e-3, atol=1e-3)
    with pytest.warns(
        UserWarning, match=r"not positive definite with reg=1e-12; using reg=.*larger reg"
    ):
        (fit,) = fits([1e-12])
    assert fit.reg > 1e-12 and torch.isfinite(fit.machine.coef).all()
    X, y = problem(12, dtype=np.float32)
    twice, labels = np.concatenate([X, X]), np.concatenate([y, 1 - y])
    with pytest.warns(UserWarning, match="not positive definite with reg=0"):
        model = ConvRFMClassifier(depth=1, n_iter=0, reg=0.0).fit(twice, labels)
    assert model.history_["reg"][0] > 0


def test_interrupted_fit_keeps_its_rounds(monkeypatch):
    X, y = problem()
    calls, real = [], imagerfm.patch_agop

    def stop_at_second(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(imagerfm, "patch_agop", stop_at_second)
    model = ConvRFMClassifier(depth=1, n_iter=5)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y)
    assert len(model.history_) == 2 and model.predict(X).shape == (24,)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"depth": 0}, "depth must be .* 0"),
        ({"patch_size": 4}, "patch_size must be .*4"),
        ({"n_iter": -1}, "n_iter must be .*-1"),
        ({"reg": []}, "reg must be"),
        ({"reg": -1.0}, "reg must be .*-1"),
        ({"reg": [1e-3, np.nan]}, "reg must be"),
        ({"n_grad": 0}, "n_grad must be .*0"),
        ({"padding": "same"}, "padding must be .*same"),
        ({"image_shape": (8, 8)}, "image_shape must be"),
        ({"validation_fraction": 1.5}, "validation_fraction must be"),
        ({"memory_limit": 0}, "memory_limit must be"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"reg": [1e-3, 1e-2]}, "2 ridges to choose from.*X_val"),
        ({"image_shape": (3, 8, 8)}, r"shape \(2, 8, 8\), but image_shape is \(3, 8, 8\)"),
        ({"depth": 4}, "8 x 8 pixels"),
        ({"patch_size": 9, "depth": 1}, "8 x 8 pixels"),
    ],
)
def test_bad_parameters(params, message):
    with pytest.raises(ValueError, match=message):
        ConvRFMClassifier(**params).fit(*problem(6))


@pytest.mark.parametrize(
    "params, message",
    [({"width": 0}, "width must be .*0"), ({"activation": "tanh"}, "activation must be .*tanh")],
)
def test_bad_deep_parameters(params, message):
    with pytest.raises(ValueError, match=message):
        DeepRFMClassifier(**params).fit(*problem(6))


def test_bad_data():
    X, y = problem(6)
    model = ConvRFMClassifier(depth=1, n_iter=0)
    for images, message in (
        (X.reshape(6, -1), "rows need image_shape"),
        (X[:, 0], r"pass X\[:, None\]"),
        (X * np.nan, "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(images, y)
    with pytest.raises(ValueError, match="only one class"):
        model.fit(X, 0 * y)
    with pytest.raises(ValueError, match="X_val and y_val go together"):
        model.fit(X, y, X)
    with pytest.raises(ValueError, match="y_val holds the class"):
        model.fit(X, y, X, y + 5)
    with pytest.raises(ValueError, match="overflows"):
        model.fit(X.astype(np.float32) * 1e30, y)
    with pytest.raises(MemoryError, match="6 images, 36 pairs.*memory_limit"):
        ConvRFMClassifier(depth=1, memory_limit=1000).fit(X, y)


def test_bad_images_of_a_fitted_model():
    X, y = problem(6)
    model = ConvRFMClassifier(depth=1, n_iter=0).fit(X, y)
    with pytest.raises(
        ValueError, match=r"shape \(1, 8, 8\), but the model was fitted to \(2, 8, 8\)"
    ):
        model.predict(X[:, :1])
    with pytest.raises(ValueError, match="fitted to"):
        model.predict(X[:, :, :7])
    with pytest.raises(ValueError, match="fitted to"):
        model.predict(X.reshape(6, -1)[:, :50])
    with pytest.raises(FileNotFoundError, match="no model file"):
        ConvRFMClassifier.load("nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="no folder"):
        model.save(os.path.join("nowhere", "m.safetensors"))


def test_tasks():
    X, y = stars(30, random_state=0)
    assert (
        X.dtype == np.float32
        and y.sum() == 15
        and ((X[:, :2] == 1).sum((1, 2, 3)) == 2 * convrfm.STAR.sum() * y).all()
    )
    assert (stars(30, random_state=0)[0] == X).all()
    digits = np.ones((5, 1, 4, 4), np.float32) * 9
    frames = noisy_frames(digits, 10, random_state=0)
    assert frames.shape == (5, 1, 10, 10) and ((frames == 9).sum((1, 2, 3)) == 16).all()
    with pytest.raises(ValueError, match="size=3 is too small"):
        noisy_frames(digits, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees():
    X, y = problem(dtype=np.float32)
    a, b = (
        ConvRFMClassifier(depth=2, n_iter=1, random_state=0, device=d)
        .fit(X, y)
        .decision_function(X)
        for d in ("cpu", "cuda")
    )
    np.testing.assert_allclose(a, b, atol=1e-3)
