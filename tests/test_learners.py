"What the benchmark runs: tasks and their splits, learners, protocols."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from agop_book.book.benchmark import benchmark
from agop_book.book.learners import (
    MODELS,
    TUNED,
    KernelModel,
    Model,
    holds,
    median_distance,
    unit_rows,
)
from agop_book.book.protocols import (
    PROTOCOLS,
    choose_parameters,
    evaluate,
    given_split,
    inner_folds,
    rows_and_folds,
)
from agop_book.book.tasks import get_task, one_scale, split_task
from agop_book.book.uci import Task
from agop_book.kernels import NTK, Laplace
from agop_book.rfm import RFMClassifier, RFMRegressor

LAPLACE = {"bandwidth": [10.0], "reg": [0.1, 0.01]}
SMALL = {
    "RFM": KernelModel("laplace", {**LAPLACE, "rounds": [0, 1, 2]}),
    "Laplace": KernelModel("laplace", LAPLACE),
    "k-NN": Model(KNeighborsClassifier(), {"n_neighbors": [1, 3]}, KNeighborsRegressor()),
}


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    "No data folder unless a test sets one."
    monkeypatch.delenv("AGOP_BOOK_DATA", raising=False)


def toy(n=60, d=4, classes=3, seed=0, name="toy"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return split_task(name, x, np.digitize(x[:, 0] * x[:, 1], np.linspace(-0.5, 0.5, classes - 1)))


# --- tasks


def test_drawn_splits_have_the_form_of_the_published_ones():
    t = toy(100)
    assert sorted(np.concatenate([t.train, t.validation])) == list(range(100))
    assert len(t.folds) == 4
    for train, test in t.folds:
        assert len(train) == 75
        assert sorted(np.concatenate([train, test])) == list(range(100))
    assert np.allclose(t.x.mean(0), 0) and np.allclose(t.x.std(0), 1) and t.n_classes == 3
    assert (toy(100).train == t.train).all()
    assert not (split_task("toy", t.x, t.y, random_state=5).train == t.train).all()
    assert split_task("r", t.x, t.x[:, 0]).n_classes == 0
    # a class of one row cannot be stratified
    assert split_task("rare", t.x, [0] * 99 + [1]).n_classes == 2


def test_a_test_table_is_brought_to_the_scale_of_the_training_table():
    t = toy()
    raw = Task("raw", t.x, t.y, 3, t.train, t.validation, t.folds, 50 + 9 * t.x, t.y)
    assert np.allclose(one_scale(raw).x_test, t.x) and one_scale(t) is t
    x, _, folds = rows_and_folds(raw)
    assert x.shape == (120, 4) and len(folds) == 1
    assert [len(part) for part in folds[0]] == [60, 60]
    flat = Task("c", np.ones((4, 2)), t.y[:4], 3, None, None, [], np.ones((3, 2)), t.y[:3])
    assert (one_scale(flat).x == 0).all() and (one_scale(flat).x_test == 0).all()


@pytest.mark.parametrize(
    "name, words",
    [
        ("sklearn/irsi", "unknown task 'sklearn/irsi': did you mean 'sklearn/iris'"),
        ("flags", "AGOP_BOOK_DATA"),
        ("", "unknown task ''"),
    ],
)
def test_unknown_task(name, words):
    with pytest.raises(ValueError, match=words):
        get_task(name)
    with pytest.raises(ValueError, match=words):
        benchmark([name], SMALL, progress=False)


def lines(rows):
    return "".join(" ".join(map(str, row)) + "\n" for row in rows)


def task_folder(root, name="toy", n=24, seed=0):
    "A folder of the form of the 121."
    t, folder = toy(n, 3, 2, seed), root / "uci121" / name
    folder.mkdir(parents=True)
    (folder / f"{name}.txt").write_text(
        f"n_entradas= 3\nn_clases= 2\nn_arquivos= 1\nfich1= {name}_R.dat\nn_patrons1= {n}\n"
    )
    rows = [(i, *row, c) for i, (row, c) in enumerate(zip(t.x, t.y), 1)]
    table = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    (folder / f"{name}_R.dat").write_text("\tf1\tf2\tf3\tclase\n" + table)
    (folder / "conxuntos.dat").write_text(lines([t.train, t.validation]))
    folds = [part for fold in t.folds for part in fold]
    (folder / "conxuntos_kfold.dat").write_text(lines(folds))
    return folder


FAULTS = {
    "no folds": ("conxuntos_kfold.dat", None, "no conxuntos_kfold.dat"),
    "a line more": ("conxuntos.dat", lambda s: s + "99\n", "3 lines of indices"),
    "no such row": (
        "conxuntos.dat",
        lambda s: s.replace("23", "24"),
        "'24'.*is not an index of one of the 24 samples",
    ),
    "no such class": (
        "toy.txt",
        lambda s: s.replace("clases= 2", "clases= 3"),
        "no row is of class 2",
    ),
    "no number": (
        "toy_R.dat",
        lambda s: s.replace("\n2\t", "\n2\tx"),
        "line 3: not a row of numbers",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_task_is_a_failed_row_and_the_run_goes_on(tmp_path, monkeypatch, fault):
    file, change, words = FAULTS[fault]
    task_folder(tmp_path, "good")
    path = task_folder(tmp_path) / file
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))
    monkeypatch.setenv("AGOP_BOOK_DATA", str(tmp_path))
    results = benchmark(["toy", "good"], ["Laplace"], progress=False).set_index("task")
    assert results.loc["good", "accuracy"] > 0 and np.isnan(results.loc["toy", "accuracy"])
    error = pd.Series(results.loc["toy", "error"])
    assert error.str.contains("UnreadableData.*" + words).all()


# --- learners


def test_kernel_candidates_equal_the_estimators():
    t = toy()
    X, y, X_new = t.x[t.train], t.y[t.train], t.x[t.validation]
    got = {(p["reg"], p["rounds"]): f for p, f in SMALL["RFM"].candidates(X, y, 3, X_new)}
    assert list(got) == [(r, k) for r in (0.1, 0.01) for k in (0, 1, 2)]
    for (reg, k), f in got.items():
        alone = RFMClassifier(bandwidth=10.0, reg=reg, n_iter=k).fit(X, y)
        assert (f == alone.predict(X_new)).all()
    point = {"bandwidth": [10.0], "reg": [0.01], "rounds": [2]}
    ((_, only),) = SMALL["RFM"].candidates(X, y, 3, X_new, point)
    assert (only == got[0.01, 2]).all()


def one_machine(bandwidth, X, y, X_new):
    return RFMClassifier(bandwidth=bandwidth, reg=0.1, n_iter=0).fit(X, y).predict(X_new)


def test_relative_bandwidths_and_unit_rows():
    t = toy()
    X, y, X_new = t.x[t.train], t.y[t.train], t.x[t.validation]
    model = KernelModel("laplace", {"bandwidth": [2.0], "reg": [0.1]}, relative=True)
    ((_, relative),) = model.candidates(X, y, 3, X_new)
    assert (relative == one_machine(2 * median_distance(X), X, y, X_new)).all()
    grid = {"bandwidth": [1.0], "unit_rows": [True], "reg": [0.1]}
    ((_, unit),) = KernelModel("laplace", grid).candidates(X, y, 3, X_new)
    assert (unit == one_machine(1.0, unit_rows(X), y, unit_rows(X_new))).all()


def test_a_diagonal_metric_is_asked_for_by_the_grid():
    t = toy()
    X, y, X_new = t.x[t.train], t.y[t.train], t.x[t.validation]
    grid = {"bandwidth": [10.0], "reg": [0.01], "diag": [True], "rounds": [2]}
    ((params, got),) = KernelModel("laplace", grid).candidates(X, y, 3, X_new)
    alone = RFMClassifier(bandwidth=10.0, reg=0.01, n_iter=2, diag=True).fit(X, y)
    assert params["diag"] and (got == alone.predict(X_new)).all()


def test_targets_of_a_regression_are_standardised():
    t = toy()
    X, X_new = t.x[t.train], t.x[t.validation]
    y = 1000 + 50 * X[:, 0]
    grid = {"bandwidth": [10.0], "reg": [0.01], "rounds": [1]}
    ((_, got),) = KernelModel("laplace", grid).candidates(X, y, 0, X_new)
    alone = RFMRegressor(bandwidth=10.0, reg=0.01, n_iter=1).fit(X, (y - y.mean()) / y.std())
    np.testing.assert_allclose(got, alone.predict(X_new) * y.std() + y.mean(), rtol=1e-9)


def test_classes_that_are_missing_have_no_output():
    t = toy(classes=4)
    seen = t.y != 2
    for _, got in SMALL["RFM"].candidates(t.x[seen], t.y[seen], 4, t.x):
        assert set(got) <= set(t.y[seen])


def few_points(n=1500):
    "Rows of which ten differ, where single precision cannot hold small ridges."
    rng = np.random.default_rng(0)
    X = rng.standard_normal((10, 3))[rng.integers(10, size=n)]
    return X, rng.integers(2, size=n), rng.standard_normal((40, 3))


def test_ridges_that_single_precision_cannot_hold_run_in_double():
    X, y, X_new = few_points()
    model = KernelModel("laplace", {"bandwidth": [5.0], "reg": [1, 1e-3, 1e-5], "rounds": [0, 2]})
    double = replace(model, single=10**9).candidates(X, y, 2, X_new)
    for (params, got), (same, exact) in zip(model.candidates(X, y, 2, X_new), double, strict=True):
        assert params == same
        if params["reg"] < 1:
            np.testing.assert_array_equal(got, exact)
    assert holds(Laplace(1.0), torch.ones(1000, 3), 0.01)
    assert not holds(Laplace(1.0), torch.ones(1000, 3), 1e-4)
    assert not holds(NTK(), 100 * torch.ones(1000, 3), 0.01), "the NTK grows with the rows"


@pytest.mark.filterwarnings("ignore:the Gram matrix is not positive definite")
@pytest.mark.filterwarnings("ignore:R2 is")
def test_a_ridge_that_single_precision_had_to_raise_runs_in_double(monkeypatch):
    monkeypatch.setattr("agop_book.book.learners.holds", lambda kernel, X, reg: True)
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(40, 2)), 4, axis=0)  # every point four times
    y = rng.integers(2, size=160)
    raised = RFMClassifier(bandwidth=1.0, reg=1e-9, n_iter=1).fit(X.astype(np.float32), y)
    assert (raised.history_["reg"] > 1e-9).any()
    model = KernelModel("laplace", {"bandwidth": [1.0], "reg": [1e-9], "rounds": [0, 1]}, single=1)
    double = replace(model, single=10**9).candidates(X, y, 2, X)
    for (params, got), (_, exact) in zip(model.candidates(X, y, 2, X), double, strict=True):
        np.testing.assert_array_equal(got, exact)


def laplace_kernel(a, b):
    return np.exp(-np.linalg.norm(a[:, None] - b[None], axis=2) / 2)


def test_ridges_against_scikit_learn():
    rng = np.random.default_rng(0)
    X, y, Z = rng.normal(size=(50, 3)), rng.normal(size=50), rng.normal(size=(20, 3))
    mean, std = y.mean(), y.std()
    model = KernelModel("laplace", {"bandwidth": [2.0], "reg": [1, 0.01]})
    for params, got in model.candidates(X, y, 0, Z):
        ridge = KernelRidge(alpha=params["reg"], kernel="precomputed")
        ridge.fit(laplace_kernel(X, X), (y - mean) / std)
        expected = ridge.predict(laplace_kernel(Z, X)) * std + mean
        np.testing.assert_allclose(got, expected, atol=1e-9)


def test_centres_are_a_subset_where_there_are_too_many():
    t = toy(200)
    part = t.x[:150], t.y[:150], 3, t.x[150:]
    few = [f for _, f in replace(SMALL["Laplace"], max_centers=40).candidates(*part)]
    rows = np.random.RandomState(0).permutation(150)[:40]
    by_hand = SMALL["Laplace"].candidates(t.x[rows], t.y[rows], 3, t.x[150:])
    assert all((a == b).all() for a, (_, b) in zip(few, by_hand, strict=True))
    full = [f for _, f in SMALL["Laplace"].candidates(*part)]
    assert any((a != b).any() for a, b in zip(few, full))


def test_as_many_classes_as_rows_need_no_square():
    # one-hot by an n x n identity would take 12.8 GB
    n = 40_000
    model = KernelModel("laplace", {"bandwidth": [10.0], "reg": [1.0]}, max_centers=50)
    x = np.random.default_rng(0).normal(size=(n, 2))
    ((_, predicted),) = model.candidates(x, np.arange(n), n, np.zeros((3, 2)))
    assert len(predicted) == 3 and predicted.max() < n


def test_constant_and_coincident_rows():
    assert median_distance(np.ones((5, 2))) == 1.0 and (unit_rows(np.zeros((3, 2))) == 0).all()
    t = split_task("flat", np.ones((40, 3)), np.arange(40) % 2)
    for protocol in PROTOCOLS:
        model = replace(SMALL["RFM"], relative=protocol == "nested")
        (row,) = benchmark([t], {"RFM": model}, progress=False).to_dict("records")
        assert row["error"] is None and 0 <= row["accuracy"] <= 1


def test_fits_that_do_not_fit_into_memory_are_failed_rows(monkeypatch):
    monkeypatch.setattr("agop_book.estimators.free_memory", lambda device="cpu": 2**26 + 2**18)
    models = {"Laplace": SMALL["Laplace"]}
    (large,) = benchmark([toy(600)], models, progress=False).to_dict("records")
    assert large["error"].startswith("MemoryError: a fit to X with 300 rows")
    (small,) = benchmark([toy(60)], models, progress=False).to_dict("records")
    assert small["error"] is None


@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_and_beats_chance(name):
    if name == "xRFM":
        pytest.importorskip("xrfm", reason="xrfm is not installed")
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    t = split_task("blobs", 2.5 * rng.normal(size=(3, 4))[y] + rng.normal(size=(90, 4)), y)
    model = MODELS[name]
    if name == "random forest":
        model = Model(model.estimator.set_params(n_estimators=20))
    (row,) = benchmark([t], {name: model}, progress=False).to_dict("records")
    assert row["accuracy"] > 0.7, row["error"]


def test_regression_tasks():
    x = toy(120).x
    t = split_task("r", x, 1000 + 50 * x[:, 0])
    models = {
        "RFM": SMALL["RFM"],
        "linear": Model(LogisticRegression(), {}, LinearRegression()),
        "classifier": Model(LogisticRegression()),
    }
    results = benchmark([t], models, progress=False).set_index("model")
    assert results.loc["linear", "accuracy"] > 0.999 and results.loc["RFM", "accuracy"] > 0.8
    assert "regressor=" in results.loc["classifier", "error"]
    assert np.isnan(results.loc["classifier", "accuracy"])
    tuned = {"Laplace": TUNED["Laplace"]}
    assert benchmark([t], tuned, protocol="nested", progress=False)["accuracy"][0] > 0.6


# --- protocols


class Spy(ClassifierMixin, BaseEstimator):
    "Remembers what it was fitted on and asked about; better with a larger `level`, up to 2."

    seen = []

    def __init__(self, level=0):
        self.level = level

    def fit(self, X, y):
        self.rows_ = X[:, 0].astype(int).tolist()
        return self

    def predict(self, X):
        Spy.seen.append((self.level, self.rows_, X[:, 0].astype(int).tolist()))
        right = np.arange(len(X)) < len(X) * min(self.level, 2) / 3
        return np.where(right, X[:, 1].astype(int), -1)


def spied(protocol):
    n, rng = 80, np.random.default_rng(0)
    y = np.arange(n) % 2
    t = split_task("spied", rng.normal(size=(n, 2)), y)
    x = np.stack([np.arange(n), y], 1).astype(float)
    t = Task("spied", x, y, 2, t.train, t.validation, t.folds)
    Spy.seen = []
    return t, evaluate(t, Model(Spy(), {"level": [0, 1, 2, 3]}), protocol), Spy.seen


def test_published_protocol_uses_the_rows_it_says():
    t, row, seen = spied("published")
    asked = [s[1:] for s in seen]
    assert asked[:4] == [(t.train.tolist(), t.validation.tolist())] * 4
    assert asked[4:] == [(a.tolist(), b.tolist()) for a, b in t.folds]
    # 2 and 3 tie: the first of the grid
    assert row["chosen"] == [{"level": 2}] and len(row["folds"]) == 4


def test_nested_protocol_never_sees_a_test_row():
    t, row, seen = spied("nested")
    assert len(row["chosen"]) == 4 and len(seen) == 4 * 3 * 4 + 4
    for k, (train, test) in enumerate(t.folds):
        for _, fitted, asked in seen[12 * k : 12 * (k + 1)]:
            assert set(fitted) | set(asked) <= set(train)
            assert not set(fitted) & set(asked)
        assert seen[48 + k][1:] == (train.tolist(), test.tolist())
    most = inner_folds(t, most=30)
    assert all(len(a) + len(b) == 30 for splits in most for a, b in splits)


class Tied:
    "All candidates are equally good."

    def candidates(self, X, y, n_classes, X_new, grid=None):
        for reg in (10, 1):
            for rounds in (3, 0, 1):
                yield {"reg": reg, "rounds": rounds}, np.zeros(len(X_new), int)


def test_ties_go_to_fewer_rounds():
    t = toy()
    assert choose_parameters(Tied(), t, given_split(t)[0]) == {"reg": 10, "rounds": 0}


def test_an_rfm_that_chose_no_round_is_its_kernel():
    # all rows are alike, so that every candidate ties
    t = split_task("flat", np.ones((60, 4)), np.arange(60) % 3)
    models = {name: SMALL[name] for name in ("RFM", "Laplace")}
    results = benchmark([t], models, progress=False)
    assert results["chosen"][0][0]["rounds"] == 0
    assert results["folds"][0] == results["folds"][1]


# --- hostile input


def call_split(x, y, **options):
    return split_task("t", np.asarray(x), y, **options)


EIGHT = np.ones((8, 2)), [0, 1] * 4
HOSTILE = [
    (lambda: evaluate(toy(), SMALL["k-NN"], "ours"), "protocol='ours'"),
    (lambda: call_split(np.ones((4, 2)), [0, 1]), "x has shape"),
    (lambda: call_split([[1.0], [np.nan], [2.0]], [0, 1, 1]), "x holds NaN"),
    (lambda: call_split(np.ones((4, 2)), [0.5, np.inf, 1, 2]), "y holds NaN"),
    (lambda: call_split(np.ones(4), [0, 1, 0, 1]), "x has shape"),
    (lambda: call_split(np.ones((4, 2)) * 1j, [0, 1, 0, 1]), "x is complex"),
    (lambda: call_split(*EIGHT, n_folds=0), "n_folds=0"),
    (lambda: call_split(*EIGHT, n_folds=2**63), "n_folds=9"),
    (lambda: call_split(*EIGHT, random_state=-1), "random_state=-1"),
    (lambda: inner_folds(toy(), n_splits=1), "n_splits=1"),
    (lambda: inner_folds(toy(), most=-1), "most=-1"),
]


@pytest.mark.parametrize("call, words", HOSTILE, ids=[words for _, words in HOSTILE])
def test_hostile_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
