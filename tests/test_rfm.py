"""RFM estimators: scikit-learn's checks, independent solutions, families, memory, files."""

import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from agop_book.book.costs import PeakMemory
from agop_book.book.lowrank import low_rank
from agop_book.kernels import Gaussian, KERNELS, Laplace, Matern52, NTK
from agop_book.machines import KernelMachine
from agop_book.points import Points
from agop_book.dense import cholesky_, gram_and_slopes_, slopes_product
from agop_book.rfm import RFMClassifier, RFMRegressor
from agop_book.solvers import CholeskySolver, Solver, first, plan_memory, rounds
from agop_book.structures import Diagonal, Full


@parametrize_with_checks(
    [
        RFMRegressor(),
        RFMClassifier(),
        RFMRegressor(bandwidth=10.0, diag=True),
        RFMClassifier(bandwidth=10.0, kernel="ntk", reg=0.3),
    ]
)
def test_sklearn(estimator, check):
    check(estimator)


def problem(n=60, d=4, c=1, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)).astype(dtype)
    Y = np.stack([X[:, 0] * X[:, 1 + k] for k in range(c)], 1).astype(dtype)
    return X, Y[:, 0] if c == 1 else Y


def plain_rounds(kernel, X, Y, reg, n_iter, diag, center):
    "The algorithm on explicit matrices, by LU and the kernel machine's own streamed AGOP."
    X, Y, M = torch.as_tensor(X), torch.as_tensor(Y), None
    for _ in range(n_iter + 1):
        machine = KernelMachine(
            kernel,
            X,
            torch.linalg.solve(kernel(X, M=M) + reg * torch.eye(len(X), dtype=X.dtype), Y),
            M,
        )
        yield machine
        M = machine.agop(center=center, diag=diag)
        M = M if diag else (M + M.T) / 2


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("diag", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_rounds_equal_the_plain_algorithm(name, diag, center):
    kernel = KERNELS[name]()
    if not diag and "full" not in kernel.metrics:
        pytest.skip("takes a diagonal only")
    X, Y = problem(70, 4, 2)
    solver = CholeskySolver(
        kernel,
        torch.from_numpy(X),
        torch.from_numpy(Y),
        [1e-2],
        Diagonal() if diag else Full(),
        center,
    )
    for machine, fit in zip(
        plain_rounds(kernel, X, Y, 1e-2, 2, diag, center), rounds(solver, 2), strict=True
    ):
        torch.testing.assert_close(fit.machine.coef, machine.coef, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            fit.fitted, fit.machine(torch.from_numpy(X)), rtol=1e-6, atol=1e-8
        )
        assert fit.reg == 1e-2 and (fit.M is None) == (machine.M is None)
        if fit.M is not None:
            torch.testing.assert_close(fit.M, machine.M, rtol=1e-6, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(1, 90),
    d=st.integers(1, 5),
    tile=st.sampled_from([8, 16, 512]),
    seed=st.integers(0, 1000),
)
def test_one_buffer_holds_factor_and_slopes(n, d, tile, seed):
    X = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    kernel = Matern52(1.0)
    buf = torch.full((n, n), torch.nan, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agop_book.points.blocks.__defaults__", (tile,))
        gram_and_slopes_(buf, kernel, Points(X))
        K, A = kernel.tile(Points(X), Points(X), slopes=True)
        A.fill_diagonal_(0)
        torch.testing.assert_close(buf.tril(), K.tril())
        buf.diagonal().add_(0.1)
        assert cholesky_(buf, size=7)
        torch.testing.assert_close(slopes_product(buf, X), A @ X)
    L = buf.tril()
    torch.testing.assert_close(L @ L.T, K + 0.1 * torch.eye(n, dtype=torch.float64))


def test_published_tutorial():
    t = low_rank("x1*x2", n=2000, d=100, n_test=10_000, random_state=1717)
    model = RFMRegressor(bandwidth=10.0, n_iter=5, reg=1e-4).fit(t.x, t.y[:, 0])
    assert abs(model.score(t.x_test, t.y_test[:, 0]) - 0.923) <= 0.002
    single = RFMRegressor(bandwidth=10.0, n_iter=5, reg=1e-4).fit(t.x.astype(np.float32), t.y[:, 0])
    assert (
        single.M_.dtype == np.float32
        and abs(single.score(t.x_test, t.y_test[:, 0]) - 0.923) <= 0.002
    )


def test_no_rounds_is_kernel_ridge():
    X, y = problem(80, 3, 2)
    ours = RFMRegressor("gaussian", bandwidth=2.0, reg=0.1, n_iter=0).fit(X, y)
    theirs = KernelRidge(alpha=0.1, kernel="rbf", gamma=1 / 8).fit(X, y)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), atol=1e-10)
    np.testing.assert_allclose(ours.dual_coef_, theirs.dual_coef_, atol=1e-8)


@pytest.mark.parametrize("family", ["numpy", "pandas", "torch"])
def test_families_in_and_out(family):
    X, Y = problem(40, 4, 2)
    convert = {
        "numpy": lambda a: a,
        "pandas": lambda a: pd.DataFrame(
            a, columns=[f"f{i}" for i in range(a.shape[1])], index=np.arange(len(a)) + 7
        ),
        "torch": torch.from_numpy,
    }[family]
    kind = torch.Tensor if family == "torch" else np.ndarray
    model = RFMRegressor(bandwidth=10.0, n_iter=1).fit(convert(X), convert(Y))
    for out in (model.predict(convert(X)), model.transform(convert(X))):
        assert isinstance(out, kind) and len(out) == 40
    np.testing.assert_allclose(
        np.asarray(model.predict(convert(X))),
        RFMRegressor(bandwidth=10.0, n_iter=1).fit(X, Y).predict(X),
    )
    if family == "pandas":
        assert list(model.feature_names_in_) == ["f0", "f1", "f2", "f3"]
        framed = model.set_output(transform="pandas").transform(convert(X))
        assert (framed.index == np.arange(40) + 7).all() and list(framed.columns) == [
            f"rfmregressor{i}" for i in range(4)
        ]
        labels = pd.Series(np.where(Y[:, 0] > 0, "up", "down"), name="direction")
        out = RFMClassifier(bandwidth=10.0, n_iter=1).fit(convert(X), labels).predict(convert(X))
        assert isinstance(out, np.ndarray) and set(out) <= {"up", "down"}


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@settings(deadline=None, max_examples=30)
@example(
    n=2, d=2, c=1, n_iter=2, diag=False, name="ntk", dtype=np.float64, device="cpu", seed=0
)  # gradients almost in the null space of M
@given(
    n=st.integers(2, 40),
    d=st.integers(1, 6),
    c=st.integers(1, 3),
    n_iter=st.integers(0, 2),
    diag=st.booleans(),
    name=st.sampled_from(sorted(KERNELS)),
    dtype=st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.uint8, bool]),
    device=st.sampled_from(DEVICES),
    seed=st.integers(0, 1000),
)
def test_shapes_dtypes_and_devices(n, d, c, n_iter, diag, name, dtype, device, seed):
    rng = np.random.default_rng(seed)
    diag = diag or "full" not in KERNELS[name].metrics
    X, Y = (
        (rng.normal(size=(n, d)) * 3).clip(0 if dtype in (np.uint8, bool) else -9).astype(dtype),
        rng.normal(size=(n, c)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few or equal rows may need a larger ridge
        model = RFMRegressor(name, bandwidth=10.0, n_iter=n_iter, diag=diag, device=device).fit(
            X, Y if c > 1 else Y[:, 0]
        )
    f, Z = model.predict(X), model.transform(X)
    want = np.float32 if dtype == np.float32 else np.float64
    assert f.shape == ((n, c) if c > 1 else (n,)) and f.dtype == want and np.isfinite(f).all()
    assert (
        Z.shape == (n, d)
        and model.M_.shape == ((d,) if diag else (d, d))
        and np.isfinite(Z).all()
        and len(model.history_) == n_iter + 1
    )


def test_transform_carries_the_metric():
    X, y = problem(50)
    for diag in (False, True):
        model = RFMRegressor(bandwidth=10.0, n_iter=2, diag=diag).fit(X, y)
        Z = model.transform(X)
        M = np.diag(model.M_) if diag else model.M_
        np.testing.assert_allclose(Z @ Z.T, X @ M @ X.T, atol=1e-10)
        np.testing.assert_allclose(Laplace(10.0)(Z), Laplace(10.0)(X, M=model.M_), atol=1e-6)
    frame = (
        make_pipeline(StandardScaler(), RFMRegressor(bandwidth=10.0, n_iter=1))
        .set_output(transform="pandas")
        .fit(X, y)
        .transform(X)
    )
    assert list(frame.columns) == [f"rfmregressor{i}" for i in range(4)]


def test_validation_keeps_the_best_round():
    X, y = problem(120, 6)
    rng = np.random.default_rng(0)
    X_val, y_val = problem(60, 6, seed=1)
    model = RFMRegressor(bandwidth=10.0, n_iter=4, reg=1e-2).fit(
        X, y + rng.normal(size=120), X_val, y_val
    )
    scores = model.history_["val_score"]
    assert len(scores) == 5 and model.best_round_ == scores.idxmax()
    assert model.score(X_val, y_val) == pytest.approx(scores.max())
    alone = RFMRegressor(bandwidth=10.0, n_iter=model.best_round_, reg=1e-2).fit(
        X, y + np.random.default_rng(0).normal(size=120)
    )
    np.testing.assert_allclose(alone.predict(X_val), model.predict(X_val))
    held = RFMClassifier(bandwidth=10.0, n_iter=2, validation_fraction=0.3, random_state=3)
    X, y = load_iris(return_X_y=True)
    first, second = clone(held).fit(X, y), clone(held).fit(X, y)
    assert (
        first.history_["val_score"].equals(second.history_["val_score"])
        and len(first.machine_.centers) == 105
    )


def test_history_says_what_each_round_did():
    X, y = problem(80)
    history = RFMRegressor(bandwidth=10.0, n_iter=3).fit(X, y).history_
    assert list(history.columns) == [
        "round",
        "train_score",
        "val_score",
        "reg",
        "alignment",
        "effective_rank",
        "seconds",
    ] and list(history["round"]) == [0, 1, 2, 3]
    model = RFMRegressor(bandwidth=10.0, n_iter=3, reg=0.5).fit(X, y)
    assert model.history_["train_score"].iloc[-1] == pytest.approx(model.score(X, y), abs=1e-9)
    assert model.history_["effective_rank"].iloc[0] == pytest.approx(4)


def test_search_clone_and_joblib(tmp_path):
    X, y = load_iris(return_X_y=True)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), RFMClassifier(bandwidth=10.0, n_iter=1)),
        {"rfmclassifier__bandwidth": [2.0, 10.0], "rfmclassifier__kernel": ["laplace", NTK(2)]},
        cv=3,
    ).fit(X, y)
    assert search.best_score_ > 0.9
    joblib.dump(search.best_estimator_, tmp_path / "m")
    np.testing.assert_array_equal(joblib.load(tmp_path / "m").predict(X), search.predict(X))


@pytest.mark.parametrize(
    "options", [{}, {"diag": True}, {"n_iter": 0}, {"kernel": Matern52(3.0)}, {"kernel": "ntk"}]
)
def test_save_and_load_without_pickle(tmp_path, options):
    X, y = load_iris(return_X_y=True, as_frame=True)
    for labels in (y, y.map({0: "a", 1: "b", 2: "c"})):
        model = RFMClassifier(bandwidth=10.0, n_iter=options.pop("n_iter", 2), **options).fit(
            X, labels
        )
        model.save(tmp_path / "model")
        again = RFMClassifier.load(tmp_path / "model")
        np.testing.assert_array_equal(again.predict(X), model.predict(X))
        pd.testing.assert_frame_equal(again.history_, model.history_)
        assert again.get_params() == model.get_params() and list(again.feature_names_in_) == list(
            X.columns
        )
    X, Y = problem(30, 4, 2)
    model = RFMRegressor(**options).fit(X, Y)
    model.save(tmp_path / "model")
    np.testing.assert_allclose(
        RFMRegressor.load(tmp_path / "model").predict(X), model.predict(X), rtol=1e-12
    )
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_damaged_and_wrong_files(tmp_path):
    X, y = problem(30)
    path = tmp_path / "model"
    RFMRegressor(bandwidth=10.0, n_iter=1).fit(X, y).save(path)
    with pytest.raises(ValueError, match="holds a RFMRegressor"):
        RFMClassifier.load(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a complete model file"):
        RFMRegressor.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a complete model file"):
        RFMRegressor.load(path)
    with pytest.raises(FileNotFoundError, match="no model file"):
        RFMRegressor.load(tmp_path / "none")
    with pytest.raises(OSError):
        RFMRegressor(bandwidth=10.0, n_iter=0).fit(X, y).save(tmp_path / "no" / "folder")


def test_interrupted_fit_keeps_finished_rounds_and_resumes(monkeypatch):
    X, y = problem(80)
    whole = RFMRegressor(bandwidth=10.0, n_iter=4).fit(X, y)
    prepare, calls = CholeskySolver.prepare, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prepare(self, *args)

    model = RFMRegressor(bandwidth=10.0, n_iter=4, warm_start=True)
    monkeypatch.setattr(CholeskySolver, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y)
    assert len(model.history_) == 2
    model.fit(X, y)
    assert list(model.history_["round"]) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(model.predict(X), whole.predict(X), atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 300),
    d=st.integers(1, 12),
    c=st.integers(1, 60),
    center=st.booleans(),
    diag=st.booleans(),
    kernel=st.sampled_from([Laplace(3.0), Gaussian(3.0), Matern52(3.0)]),
    seed=st.integers(0, 99),
)
def test_all_outputs_together_equal_one_by_one(n, d, c, center, diag, kernel, seed):
    torch.manual_seed(seed)
    X, Y = torch.randn(n, d, dtype=torch.float64), torch.randn(n, c, dtype=torch.float64)
    structure = Diagonal() if diag else Full()
    solver = CholeskySolver(kernel, X, Y, [1e-2], structure, center)
    fit = first(solver.fits(None))
    exact = fit.machine.agop(center=center, diag=diag)
    apart = float(torch.pdist(X).min()) > 0.02
    one_by_one = sum(structure.product(J, J) for J in solver.gradients(fit))
    for got in (
        solver.together(fit.machine.coef),
        one_by_one,
        n * solver.agop(fit),
        n * Solver.agop(solver, fit),
    ):
        if got is not None:
            np.testing.assert_allclose(
                got / n, exact, atol=(1e-9 if apart else 1e-4) * float(exact.abs().max()) + 1e-14
            )


def test_near_coincident_points_are_taken_one_by_one():
    torch.manual_seed(0)
    X = torch.randn(60, 8, dtype=torch.float64)
    X, Y = torch.cat([X, X + 1e-4 * torch.randn_like(X)]), torch.randn(120, 40, dtype=torch.float64)
    solver = CholeskySolver(Laplace(3.0), X, Y, [1e-4])
    fit = first(solver.fits(None))
    assert solver.together(fit.machine.coef) is None
    exact = fit.machine.agop()
    np.testing.assert_allclose(solver.agop(fit), exact, atol=1e-6 * float(exact.abs().max()))


def test_warm_start_goes_on_from_the_kept_round():
    X, y = problem(80)
    held = dict(
        X_val=X[60:], y_val=np.random.default_rng(1).normal(size=20)
    )  # targets that nothing predicts: the best round is any
    model = RFMRegressor(bandwidth=10.0, n_iter=5, warm_start=True).fit(X[:60], y[:60], **held)
    kept, best, M = model.history_, model.best_round_, model.M_
    model.fit(X[:60], y[:60], **held)
    assert model.best_round_ == best < 5, "the seed should leave the best round before the last"
    np.testing.assert_allclose(model.history_["train_score"], kept["train_score"], atol=1e-9)
    np.testing.assert_allclose(model.M_, M)


def test_singular_gram_matrix_warns_and_fits():
    X, y = np.repeat(problem(20)[0], 2, axis=0), np.random.default_rng(0).normal(size=40)
    with pytest.warns(UserWarning, match="not positive definite with reg=0.*using reg="):
        model = RFMRegressor(bandwidth=10.0, reg=0.0, n_iter=1).fit(X, y)
    assert np.isfinite(model.predict(X)).all() and (model.history_["reg"] > 0).all()


def test_constant_feature_and_huge_bandwidth():
    X, y = problem(60)
    X = np.c_[X, np.ones(60)]
    model = RFMRegressor(bandwidth=10.0, n_iter=3).fit(X, y)
    assert abs(model.M_[-1]).max() < 1e-12 and model.score(X, y) > 0.99
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isfinite(RFMRegressor(bandwidth=1e12, n_iter=2).fit(X, y).predict(X)).all()
        assert np.isfinite(RFMRegressor(bandwidth=1e-12, n_iter=2).fit(X, y).predict(X)).all()
    assert np.isfinite(RFMRegressor(bandwidth=10.0, n_iter=2).fit(X, np.zeros(60)).predict(X)).all()


X, y = problem(20)
LABELS = (y > 0).astype(int)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bandwidth": 0}, "bandwidth must be a finite number above 0.*got 0"),
        ({"bandwidth": np.inf}, "bandwidth"),
        ({"bandwidth": "wide"}, "bandwidth"),
        ({"reg": -1.0}, "reg must be .*got -1.0"),
        ({"reg": np.nan}, "reg"),
        ({"n_iter": -1}, "n_iter"),
        ({"n_iter": 2.5}, "n_iter"),
        ({"n_iter": True}, "n_iter"),
        ({"kernel": "cauchy"}, "kernel must be a Kernel or one of"),
        ({"kernel": ["laplace"]}, "kernel"),
        ({"solver": "magic"}, "solver must be"),
        ({"diag": "yes"}, "diag"),
        ({"center": 3}, "center"),
        ({"validation_fraction": 1.5}, "validation_fraction"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"memory_limit": -5}, "memory_limit"),
    ],
)
def test_bad_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        RFMRegressor(**options).fit(X, y)


@pytest.mark.parametrize(
    "X_, y_, message",
    [
        (np.full_like(X, np.inf), y, "infinity"),
        (X, np.full(20, np.nan), "Input y contains NaN"),
        (X[:5], y, "inconsistent numbers of samples"),
        (X[:0], y[:0], "minimum of 2"),
        (X[:1], y[:1], "minimum of 2"),
        (X[:, 0], y, "1D array"),
        (X * 1j, y, "Complex"),
        (X.astype(str)[:, :1] + "a", y, "could not convert"),
        (X * 1e200, y, "overflow"),
        (X, y * 1e200, "overflow"),
        (np.array([[10**400] * 2] * 20, dtype=object), y, "too large|overflow"),
    ],
)
def test_bad_data(X_, y_, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, OverflowError), match=message):
            RFMRegressor(bandwidth=10.0, n_iter=2).fit(X_, y_)


def test_bad_classes_and_validation_sets():
    with pytest.raises(ValueError, match="only one class"):
        RFMClassifier(bandwidth=10.0).fit(X, np.zeros(20))
    with pytest.raises(ValueError, match="Unknown label type"):
        RFMClassifier(bandwidth=10.0).fit(X, y)
    with pytest.raises(ValueError, match="only X_val was given"):
        RFMClassifier(bandwidth=10.0).fit(X, LABELS, X)
    with pytest.raises(ValueError, match="y_val holds the class 7"):
        RFMClassifier(bandwidth=10.0).fit(X, LABELS, X, LABELS * 7)
    with pytest.raises(ValueError, match="y_val contains NaN"):
        RFMRegressor(bandwidth=10.0).fit(X, y, X, y * np.nan)
    with pytest.raises(ValueError, match="3 features"):
        RFMRegressor(bandwidth=10.0).fit(X, y, X[:, :3], y)
    with pytest.raises(ValueError, match="inconsistent"):
        RFMRegressor(bandwidth=10.0).fit(X, y, X, y[:5])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            RFMRegressor(bandwidth=10.0, device="cuda").fit(X, y)


def test_memory_error_names_size_and_what_fits():
    with pytest.raises(MemoryError, match=r"X with 20 rows.*GiB.*rows fit.*float32"):
        RFMRegressor(bandwidth=10.0, memory_limit=1000).fit(X, y)
    fits = int(
        str(pytest.raises(MemoryError, plan_memory, 100_000, 100, 1, 4, 2**33).value)
        .split("About ")[1]
        .split(" rows")[0]
        .replace(",", "")
    )
    assert plan_memory(fits, 100, 1, 4, 2**33) <= 2**33


def test_peak_memory_is_what_was_planned():
    "One buffer of n x n, and no more than the plan says (n = 4,000: 122 MiB)."
    X = np.random.default_rng(0).normal(size=(4000, 50))
    model = RFMRegressor(bandwidth=10.0, n_iter=1)
    with PeakMemory() as taken:
        model.fit(X, X[:, 0] * X[:, 1])
    planned = plan_memory(4000, 50, 1, 8, 2**40)
    assert 8 * 4000**2 < taken.peak < planned, (taken.peak, planned)
