"The benchmark: protocols, resuming, failures, backends, statistics, foreign tables, the command."
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from agop_book.book import tabular
from agop_book.book.sources import DataNotFound
from agop_book.files import UnreadableData
from agop_book.book.uci import Task
from agop_book.kernels import NTK, Laplace
from agop_book.rfm import RFMClassifier
from agop_book.book.tabular import (MODELS, PROTOCOLS, TUNED, KernelModel, Model, accuracy_table, benchmark, choose_parameters, critical_difference, evaluate, friedman, gains_over, get_task, given_split, grinsztajn, holds,
                               inner_folds, _main, median_distance, one_scale, pairwise, rank_diagram, ranking, read_published, read_results, rows_and_folds, save_results, several_ridges, several_rounds, split_task,
                               stored_results, unit_rows)

REAL = Path(os.environ.get("AGOP_BOOK_DATA") or Path(__file__).parents[2] / "shared/data")
SMALL = {"RFM": KernelModel("laplace", {"bandwidth": [10.0], "reg": [0.1, 0.01], "rounds": [0, 1, 2]}), "Laplace": KernelModel("laplace", {"bandwidth": [10.0], "reg": [0.1, 0.01]}),
         "k-NN": Model(KNeighborsClassifier(), {"n_neighbors": [1, 3]}, KNeighborsRegressor())}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    "No data folder unless a test sets one, and no task remembered from another."
    monkeypatch.delenv("AGOP_BOOK_DATA", raising=False)
    get_task.cache_clear()
    yield
    get_task.cache_clear()


def toy(n=60, d=4, classes=3, seed=0, name="toy"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return split_task(name, x, np.digitize(x[:, 0] * x[:, 1], np.linspace(-0.5, 0.5, classes - 1)))


# --- tasks ----------------------------------------------------------------------------------------------------------------------------------

def test_drawn_splits_have_the_form_of_the_published_ones():
    t = toy(100)
    assert sorted(np.concatenate([t.train, t.validation])) == list(range(100)) and len(t.folds) == 4
    for train, test in t.folds: assert len(train) == 75 and sorted(np.concatenate([train, test])) == list(range(100))
    assert np.allclose(t.x.mean(0), 0) and np.allclose(t.x.std(0), 1) and t.n_classes == 3
    again, other = toy(100), split_task("toy", t.x, t.y, random_state=5)
    assert (again.train == t.train).all() and not (other.train == t.train).all()
    assert split_task("r", t.x, t.x[:, 0]).n_classes == 0
    rare = split_task("rare", t.x, [0] * 99 + [1])                       # a class of one row cannot be stratified
    assert rare.n_classes == 2


def test_a_test_table_is_brought_to_the_scale_of_the_training_table():
    t = toy()
    raw = Task("raw", t.x, t.y, 3, t.train, t.validation, t.folds, 50 + 9 * t.x, t.y)
    assert np.allclose(one_scale(raw).x_test, t.x) and one_scale(t) is t
    x, y, folds = rows_and_folds(raw)
    assert x.shape == (120, 4) and [len(part) for part in folds[0]] == [60, 60] and len(folds) == 1
    constant = one_scale(Task("c", np.ones((4, 2)), t.y[:4], 3, None, None, [], np.ones((3, 2)), t.y[:3]))
    assert (constant.x == 0).all() and (constant.x_test == 0).all()


@pytest.mark.parametrize("name, words", [("sklearn/irsi", "unknown task 'sklearn/irsi': did you mean sklearn/iris"), ("flags", "AGOP_BOOK_DATA"), ("", "unknown task ''")])
def test_unknown_task(name, words):
    with pytest.raises(ValueError, match=words): get_task(name)
    with pytest.raises(ValueError, match=words): benchmark([name], SMALL, progress=False)


def task_folder(root, name="toy", n=24, seed=0):
    t, folder = toy(n, 3, 2, seed), root / "uci121" / name
    folder.mkdir(parents=True)
    (folder / f"{name}.txt").write_text(f"n_entradas= 3\nn_clases= 2\nn_arquivos= 1\nfich1= {name}_R.dat\nn_patrons1= {n}\n")
    (folder / f"{name}_R.dat").write_text("\tf1\tf2\tf3\tclase\n" + "\n".join("\t".join(map(str, (i + 1, *row, c))) for i, (row, c) in enumerate(zip(t.x, t.y))) + "\n")
    line = lambda rows: " ".join(map(str, rows)) + "\n"
    (folder / "conxuntos.dat").write_text(line(t.train) + line(t.validation))
    (folder / "conxuntos_kfold.dat").write_text("".join(line(a) + line(b) for a, b in t.folds))
    return folder


@pytest.mark.parametrize("file, change, words", [
    ("conxuntos_kfold.dat", None, "no conxuntos_kfold.dat"), ("conxuntos.dat", lambda s: s + "99\n", "3 lines of indices"),
    ("conxuntos.dat", lambda s: s.replace("23", "24"), "'24'.*is not an index of one of the 24 samples"),
    ("toy.txt", lambda s: s.replace("clases= 2", "clases= 3"), "no row is of class 2"), ("toy_R.dat", lambda s: s.replace("\n2\t", "\n2\tx"), "line 3: not a row of numbers")])
def test_a_malformed_task_is_a_failed_row_and_the_run_goes_on(tmp_path, monkeypatch, file, change, words):
    task_folder(tmp_path, "good")
    folder = task_folder(tmp_path)
    if change is None: (folder / file).unlink()
    else: (folder / file).write_text(change((folder / file).read_text()))
    monkeypatch.setenv("AGOP_BOOK_DATA", str(tmp_path))
    results = benchmark(["toy", "good"], ["Laplace"], progress=False).set_index("task")
    assert results.loc["good", "accuracy"] > 0 and np.isnan(results.loc["toy", "accuracy"])
    assert pd.Series(results.loc["toy", "error"]).str.contains("UnreadableData.*" + words).all()


# --- models -----------------------------------------------------------------------------------------------------------------------------------

def test_kernel_candidates_equal_the_estimators():
    t = toy()
    X, y, X_new = t.x[t.train], t.y[t.train], t.x[t.validation]
    got = {(p["reg"], p["rounds"]): f for p, f in SMALL["RFM"].candidates(X, y, 3, X_new)}
    assert list(got) == [(r, k) for r in (0.1, 0.01) for k in (0, 1, 2)]
    for (reg, k), f in got.items(): assert (f == RFMClassifier(bandwidth=10.0, reg=reg, n_iter=k).fit(X, y).predict(X_new)).all()
    (_, only), = SMALL["RFM"].candidates(X, y, 3, X_new, {"bandwidth": [10.0], "reg": [0.01], "rounds": [2]})
    assert (only == got[0.01, 2]).all()
    r = median_distance(X)
    (_, relative), = KernelModel("laplace", {"bandwidth": [2.0], "reg": [0.1]}, relative=True).candidates(X, y, 3, X_new)
    assert (relative == RFMClassifier(bandwidth=2 * r, reg=0.1, n_iter=0).fit(X, y).predict(X_new)).all()
    (_, unit), = KernelModel("laplace", {"bandwidth": [1.0], "unit_rows": [True], "reg": [0.1]}).candidates(X, y, 3, X_new)
    assert (unit == RFMClassifier(bandwidth=1.0, reg=0.1, n_iter=0).fit(unit_rows(X), y).predict(unit_rows(X_new))).all()


def test_ridges_that_single_precision_cannot_hold_run_in_double():
    rng = np.random.default_rng(0)
    which = rng.integers(10, size=1500)
    X, y, X_new = rng.standard_normal((10, 3))[which], rng.integers(2, size=1500), rng.standard_normal((40, 3))
    model = KernelModel("laplace", {"bandwidth": [5.0], "reg": [1, 1e-3, 1e-5], "rounds": [0, 2]})
    for (params, got), (same, exact) in zip(model.candidates(X, y, 2, X_new), replace(model, single=10**9).candidates(X, y, 2, X_new), strict=True):
        assert params == same
        if params["reg"] < 1: np.testing.assert_array_equal(got, exact)
    assert holds(Laplace(1.0), torch.ones(1000, 3), 0.01) and not holds(Laplace(1.0), torch.ones(1000, 3), 1e-4)
    assert not holds(NTK(), 100 * torch.ones(1000, 3), 0.01), "the NTK grows with the rows"


def test_ridges_against_scikit_learn():
    import torch
    rng = np.random.default_rng(0)
    X, Y, Z = rng.normal(size=(50, 3)), rng.normal(size=(50, 2)), rng.normal(size=(20, 3))
    for reg, _, f in several_ridges(Laplace(2.0), *map(torch.from_numpy, (X, Y, Z)), [1, 0.01]):
        K = lambda a, b: np.exp(-np.linalg.norm(a[:, None] - b[None], axis=2) / 2)
        np.testing.assert_allclose(f, KernelRidge(alpha=reg, kernel="precomputed").fit(K(X, X), Y).predict(K(Z, X)), atol=1e-9)


@pytest.mark.filterwarnings("ignore:the Gram matrix is not positive definite")
def test_ridges_too_small_for_single_precision_are_solved_in_double():
    import torch
    rng = np.random.default_rng(0)
    X = torch.from_numpy(np.repeat(rng.normal(size=(40, 2)), 4, axis=0))          # every point four times
    Y = torch.from_numpy(rng.normal(size=(160, 1)))
    few = lambda a: a.float()
    for double, single in ((several_ridges(Laplace(1.0), X, Y, X, [1e-9]), several_ridges(Laplace(1.0), few(X), few(Y), few(X), [1e-9])),
                           (several_rounds(Laplace(1.0), X, Y, X, [1e-9], 1), several_rounds(Laplace(1.0), few(X), few(Y), few(X), [1e-9], 1))):
        double, single = list(double), list(single)
        assert [e[:2] for e in double] == [e[:2] for e in single] and all(e[2].dtype == np.float64 for e in single[:1])
        np.testing.assert_allclose(double[0][2], single[0][2], atol=1e-2)


def test_centres_are_a_subset_where_there_are_too_many():
    t = toy(200)
    full, part = (list(KernelModel("laplace", SMALL["Laplace"].grid, max_centers=m).candidates(t.x[:150], t.y[:150], 3, t.x[150:])) for m in (150, 40))
    rows = np.random.RandomState(0).permutation(150)[:40]
    by_hand = list(SMALL["Laplace"].candidates(t.x[rows], t.y[rows], 3, t.x[150:]))
    assert all((a == b).all() for (_, a), (_, b) in zip(part, by_hand)) and any((a != b).any() for (_, a), (_, b) in zip(part, full))


def test_constant_and_coincident_rows():
    assert median_distance(np.ones((5, 2))) == 1.0 and (unit_rows(np.zeros((3, 2))) == 0).all()
    t = split_task("flat", np.ones((40, 3)), np.arange(40) % 2)
    for protocol in PROTOCOLS: assert 0 <= evaluate(t, KernelModel("laplace", SMALL["RFM"].grid, relative=protocol == "nested"), protocol)["accuracy"] <= 1


@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_and_beats_chance(name):
    if name == "xRFM": pytest.importorskip("xrfm", reason="xrfm is not installed")
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    t = split_task("blobs", 2.5 * rng.normal(size=(3, 4))[y] + rng.normal(size=(90, 4)), y)
    model = MODELS[name] if name != "random forest" else Model(MODELS[name].estimator.set_params(n_estimators=20))
    row, = benchmark([t], {name: model}, progress=False).to_dict("records")
    assert row["accuracy"] > 0.7, row["error"]


def test_regression_tasks():
    t = toy(120)
    t = split_task("r", t.x, 1000 + 50 * t.x[:, 0])
    models = {"RFM": SMALL["RFM"], "linear": Model(LogisticRegression(), {}, LinearRegression()), "classifier": Model(LogisticRegression())}
    results = benchmark([t], models, progress=False).set_index("model")
    assert results.loc["linear", "accuracy"] > 0.999 and results.loc["RFM", "accuracy"] > 0.8
    assert "regressor=" in results.loc["classifier", "error"] and np.isnan(results.loc["classifier", "accuracy"])
    assert benchmark([t], {"RFM": TUNED["Laplace"]}, protocol="nested", progress=False)["accuracy"][0] > 0.6


# --- protocols --------------------------------------------------------------------------------------------------------------------------------

class Spy(ClassifierMixin, BaseEstimator):
    "Remembers what it was fitted on and asked about; better with a larger `level`, up to 2."
    seen = []
    def __init__(self, level=0): self.level = level
    def fit(self, X, y): self.rows_ = X[:, 0].astype(int).tolist(); self.y_ = dict(zip(self.rows_, y)); return self
    def predict(self, X):
        Spy.seen.append((self.level, self.rows_, X[:, 0].astype(int).tolist()))
        return np.where(np.arange(len(X)) < len(X) * min(self.level, 2) / 3, X[:, 1].astype(int), -1)


def spied(protocol):
    n, rng = 80, np.random.default_rng(0)
    y = np.arange(n) % 2
    t = split_task("spied", rng.normal(size=(n, 2)), y)
    t = Task("spied", np.stack([np.arange(n), y], 1).astype(float), y, 2, t.train, t.validation, t.folds)
    Spy.seen = []
    return t, evaluate(t, Model(Spy(), {"level": [0, 1, 2, 3]}), protocol), Spy.seen


def test_published_protocol_uses_the_rows_it_says():
    t, row, seen = spied("published")
    assert [s[1:] for s in seen[:4]] == [(t.train.tolist(), t.validation.tolist())] * 4
    assert [s[1:] for s in seen[4:]] == [(a.tolist(), b.tolist()) for a, b in t.folds]
    assert row["chosen"] == [{"level": 2}] and len(row["folds"]) == 4         # 2 and 3 tie: the first of the grid


def test_nested_protocol_never_sees_a_test_row():
    t, row, seen = spied("nested")
    assert len(row["chosen"]) == 4 and len(seen) == 4 * 3 * 4 + 4
    for k, (train, test) in enumerate(t.folds):
        for _, fitted, asked in seen[12 * k:12 * (k + 1)]: assert set(fitted) | set(asked) <= set(train) and not set(fitted) & set(asked)
        assert seen[48 + k][1:] == (train.tolist(), test.tolist())
    most = inner_folds(t, most=30)
    assert all(len(a) + len(b) == 30 for splits in most for a, b in splits)


def test_ties_go_to_fewer_rounds():
    class Tied:
        def candidates(self, X, y, n_classes, X_new, grid=None):
            for reg in (10, 1):
                for rounds in (3, 0, 1): yield {"reg": reg, "rounds": rounds}, np.zeros(len(X_new), int)
    t = toy()
    assert choose_parameters(Tied(), t, given_split(t)[0]) == {"reg": 10, "rounds": 0}
    results = benchmark([split_task("random", t.x, np.random.default_rng(1).integers(0, 2, 60))], {k: SMALL[k] for k in ("RFM", "Laplace")}, progress=False)
    if results["chosen"][0][0]["rounds"] == 0: assert results["folds"][0] == results["folds"][1]


# --- the run ----------------------------------------------------------------------------------------------------------------------------------

class Moody(ClassifierMixin, BaseEstimator):
    def __init__(self, path=None): self.path = path
    def fit(self, X, y):
        if Path(self.path).exists(): raise RuntimeError("bad mood")
        return self
    def predict(self, X): return np.zeros(len(X), int)


def test_failures_are_kept_and_retried_on_request(tmp_path):
    mood, models = tmp_path / "mood", None
    models = {"k-NN": SMALL["k-NN"], "moody": Model(Moody(str(mood)))}
    mood.touch()
    run = lambda **k: benchmark([toy()], models, out=tmp_path / "new/rows.jsonl", progress=False, **k).set_index("model")
    assert run().loc["moody", "error"] == "RuntimeError: bad mood" and run().loc["k-NN", "accuracy"] > 0
    mood.unlink()
    assert run().loc["moody", "error"] == "RuntimeError: bad mood"                        # kept ...
    assert run(retry_failed=True).loc["moody", "accuracy"] > 0                            # ... until asked
    assert run().loc["moody", "accuracy"] > 0 and len((tmp_path / "new/rows.jsonl").read_text().splitlines()) == 3


def test_nothing_is_recomputed_and_changes_are_noticed(tmp_path, monkeypatch):
    out, calls = tmp_path / "rows.jsonl", []
    real = tabular.evaluate
    monkeypatch.setattr(tabular, "evaluate", lambda task, model, protocol: calls.append(task.name) or real(task, model, protocol))
    run = lambda task, models=SMALL: benchmark([task], models, out=out, progress=False)
    first = run(toy())
    assert len(calls) == 3 and run(toy())["accuracy"].tolist() == first["accuracy"].tolist() and len(calls) == 3
    run(toy(seed=1)); assert len(calls) == 6                                              # other data of the same name
    run(toy(), {"k-NN": Model(KNeighborsClassifier(), {"n_neighbors": [1, 9]})}); assert len(calls) == 7
    with open(out, "ab") as f: f.write(b'{"key": "cut o')                                 # killed while writing
    run(toy()); assert len(calls) == 7


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "agop_book.book.tabular", *(f"sklearn/{n}" for n in ("digits", "wine", "iris")), "--model", "k-NN", "--model", "RFM", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    for _ in range(600):
        if out.exists() and out.read_bytes().count(b"\n") >= 1: break
        time.sleep(0.05)
    process.kill(); process.wait()
    before = out.read_bytes()
    results = benchmark(["sklearn/iris", "sklearn/wine"], ["k-NN"], out=out, progress=False)
    assert out.read_bytes().startswith(before[:before.rfind(b"\n") + 1]) and results["error"].isna().all()


def test_threads_and_order():
    tasks = [toy(40 + 20 * k, name=f"t{k}") for k in range(3)]
    with joblib.parallel_config(backend="threading"): two = benchmark(tasks, {"k-NN": SMALL["k-NN"]}, n_jobs=2, progress=False)
    one = benchmark(tasks, {"k-NN": SMALL["k-NN"]}, progress=False)
    assert one["task"].tolist() == ["t2", "t1", "t0"] and one["accuracy"].tolist() == two["accuracy"].tolist()
    assert benchmark(tasks, {"k-NN": SMALL["k-NN"]}, max_rows=60, progress=False)["task"].tolist() == ["t1", "t0"]


def test_on_a_dask_cluster():
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        with joblib.parallel_config(backend="dask"): far = benchmark([toy(40), toy(60, name="other")], {k: SMALL[k] for k in ("Laplace", "k-NN")}, progress=False)
    near = benchmark([toy(40), toy(60, name="other")], {k: SMALL[k] for k in ("Laplace", "k-NN")}, progress=False)
    assert far[["task", "model", "accuracy", "chosen"]].equals(near[["task", "model", "accuracy", "chosen"]])


@pytest.mark.parametrize("options, words", [({"models": ["RMF"]}, "unknown model 'RMF': did you mean RFM"), ({"protocol": "ours"}, "protocol='ours' must be one of"),
                                            ({"models": ["MLP"], "protocol": "nested"}, "unknown model 'MLP'")])
def test_unknown_names(options, words):
    with pytest.raises(ValueError, match=words): benchmark(["sklearn/iris"], progress=False, **options)


def test_csv_round_trip(tmp_path):
    results = benchmark([toy()], {"Laplace": SMALL["Laplace"], "moody": Model(Moody(str(tmp_path)))}, out=tmp_path / "rows.jsonl", progress=False)
    save_results(results, tmp_path / "rows.csv")
    back = read_results(tmp_path / "rows.csv").set_index("model")
    assert back.loc["Laplace", "chosen"] == results["chosen"][0] and np.isclose(back.loc["Laplace", "accuracy"], results["accuracy"][0], atol=1e-5)
    assert back.loc["moody", "error"] == "RuntimeError: bad mood" and len(read_results(tmp_path / "rows.jsonl")) == 2
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UnreadableData, match="no column accuracy"): read_results(tmp_path / "other.csv")
    with pytest.raises(FileNotFoundError, match="no results at"): read_results(tmp_path / "none.csv")


def test_stored_results_are_the_whole_run():
    stored = stored_results()
    if stored is None: pytest.skip("no stored results")
    assert not stored.duplicated(["task", "model", "protocol"]).any()
    for protocol, (_, models) in PROTOCOLS.items(): assert stored[stored["protocol"] == protocol].groupby("model").size().to_dict() == dict.fromkeys(models, 113)
    given = stored[stored["protocol"] == "published"]
    assert given["task"].nunique() == 113 and given["n"].max() <= 12_000 and "miniboone" not in set(given["task"])
    assert (given["error"].isna() == given["accuracy"].notna()).all()


@pytest.mark.skipif(not (REAL / "uci121/flags").is_dir(), reason="the 121 tasks are not on this machine")
def test_a_stored_row_can_be_had_again(monkeypatch, capsys):
    monkeypatch.setenv("AGOP_BOOK_DATA", str(REAL))
    assert _main(["flags", "--model", "RFM"]) == 0
    printed, stored = capsys.readouterr().out, stored_results()
    assert "flags" in printed and "RFM" in printed
    if stored is not None:
        row = stored.query("task == 'flags' and model == 'RFM' and protocol == 'published'").iloc[0]
        assert f"{row['accuracy']:.4f}"[:5] in printed


def test_the_command_in_two_processes(tmp_path):
    command = [sys.executable, "-m", "agop_book.book.tabular", "sklearn/iris", "sklearn/wine", "--model", "k-NN", "--jobs", "2", "--csv", str(tmp_path / "r.csv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sklearn/wine" in done.stdout and len(read_results(tmp_path / "r.csv")) == 2


@pytest.mark.parametrize("argv, words", [(["sklearn/irsi"], "did you mean sklearn/iris"), (["sklearn/iris", "--model", "RMF"], "did you mean RFM"), ([], "AGOP_BOOK_DATA")])
def test_command_line_errors(capsys, argv, words):
    with pytest.raises(SystemExit) as stop: _main(argv)
    assert stop.value.code == 2 and words in capsys.readouterr().err


# --- statistics -------------------------------------------------------------------------------------------------------------------------------

def table(values, models="abc"): return pd.DataFrame([(f"t{i}", m, v) for i, row in enumerate(values) for m, v in zip(models, row)], columns=["task", "model", "accuracy"])


def test_scores_by_hand():
    s = ranking(table([[1.0, 0.9, 0.5], [0.5, 0.5, 0.46], [0.0, 0.0, 0.0]]))
    assert s.loc["a", "rank"] == (1 + 1.5 + 2) / 3 and s.loc["c", "rank"] == (3 + 3 + 2) / 3 and s.index[0] == "a"
    assert np.isclose(s.loc["c", "PMA"], 100 * (0.5 + 0.92 + 0) / 3) and np.isclose(s.loc["c", "P90"], 100 / 3) and np.isclose(s.loc["b", "P95"], 100 / 3)


def test_missing_accuracies():
    rows = table([[1.0, 0.9, np.nan], [0.5, 0.4, 0.3]])
    assert ranking(rows)["tasks"].tolist() == [1, 1, 1] and np.isclose(accuracy_table(rows, fill=True).loc["t0", "c"], 0.95)
    with pytest.raises(ValueError, match="fill=True"): ranking(table([[1.0, np.nan, 0.5]]))
    with pytest.raises(ValueError, match="two rows for the task.*select one protocol"): ranking(pd.concat([rows, rows]))


def test_tests_agree_with_scipy():
    rng = np.random.default_rng(0)
    values = rng.normal(0.8, 0.05, (40, 3)) + [0, 0, 0.04]
    rows = table(values)
    assert np.isclose(friedman(rows)[1], stats.friedmanchisquare(*values.T).pvalue)
    with pytest.raises(ValueError, match="at least 3 models"): friedman(table(values[:, :2], "ab"))
    p = {pair: stats.wilcoxon(*values[:, pair].T).pvalue for pair in ((0, 1), (0, 2), (1, 2))}
    bonferroni = pairwise(rows, correction="bonferroni")
    assert np.isclose(bonferroni.loc["a", "c"], min(1, 3 * p[0, 2])) and np.isclose(bonferroni.loc["b", "a"], min(1, 3 * p[0, 1]))
    assert pairwise(table(np.repeat(values[:, :1], 3, 1))).to_numpy().min() == 1              # three models that are the same
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    assert "critical difference" in rank_diagram(rows, ax).get_title()
    plt.close(fig)


def test_critical_difference_of_demsar(): assert abs(critical_difference(5, 30) - 2.728 * (30 / 180)**0.5) < 1e-3


def test_against():
    rows = gains_over(table([[0.5, 0.6, 0.5], [0.5, 0.4, 0.5], [0.5, 0.9, 0.5]]), "a")
    assert rows.loc["b", ["won", "equal", "lost"]].tolist() == [2, 0, 1] and np.isclose(rows.loc["b", "largest gain"], 40) and rows.loc["b", "on"] == "t2" and rows.loc["c", "p"] == 1
    with pytest.raises(ValueError, match="no model 'Laplce' in results.*there are a, b, c"): gains_over(table([[1, 2, 3]]), "Laplce")


# --- foreign tables -----------------------------------------------------------------------------------------------------------------------------

def test_published_accuracies(tmp_path):
    path = tmp_path / "results.txt"
    for header in ("problem rforest_R svm_C", "rforest_R\tsvm_C"):
        path.write_text(f"{header}\nabalone 62.3 --\n\nt0   96.0\t97.3\n")
        theirs = read_published(path)
        assert theirs["accuracy"].tolist()[::2] == [0.623, 0.96] and theirs["accuracy"].isna().sum() == 1 and set(theirs["model"]) == {"rforest_R", "svm_C"}
    together = ranking(pd.concat([table([[1.0, 0.9, 0.5]]), theirs]))
    assert len(together) == 5 and together["tasks"].max() == 1 and len(ranking(theirs, fill=True)) == 2


@pytest.mark.parametrize("text, words", [("a b\nt 1 2 3\n", "line 1: 2 classifiers for 3 accuracies"), ("a b\nt 1 2\nu 1\n", "line 3: 1 accuracies, expected 2"), ("a b\nt 1 x\n", "line 2: 'x' is not a number.*b on t"),
                                         ("a b\nt 1 200\n", "line 2: 200 is not a percentage"), ("", "found 0 lines")])
def test_malformed_published_table(tmp_path, text, words):
    (tmp_path / "r.txt").write_text(text)
    with pytest.raises(UnreadableData, match=words): read_published(tmp_path / "r.txt")
    with pytest.raises(FileNotFoundError, match="no table of published"): read_published(tmp_path / "none.txt")


ARFF = "@relation toy\n@attribute width numeric\n@attribute colour {red,green}\n@attribute target %s\n@data\n%s\n"


def test_grinsztajn_from_arff(tmp_path):
    rng = np.random.default_rng(0)
    width, colour = rng.normal(size=300), rng.choice(["red", "green"], 300)
    (tmp_path / "c.arff").write_text(ARFF % ("{yes,no}", "\n".join(f"{w},{c},{'yes' if w > 0 else 'no'}" for w, c in zip(width, colour))))
    task, = grinsztajn(334, tmp_path)
    assert task.name == "c" and task.x.shape == (300, 3) and task.n_classes == 2 and len(task.folds) == 5
    assert len(task.train) == 210 and len(task.validation) == 27 and len(task.folds[0][1]) == 63 and not set(task.folds[0][0]) & set(task.folds[0][1])
    assert benchmark([task], {"k-NN": SMALL["k-NN"]}, progress=False)["accuracy"][0] > 0.8
    (tmp_path / "c.arff").write_text(ARFF % ("numeric", "\n".join(f"{w},{c},{2 * w}" for w, c in zip(width, colour))))
    task, = grinsztajn(335, tmp_path)
    assert task.n_classes == 0 and benchmark([task], {"k-NN": SMALL["k-NN"]}, progress=False)["accuracy"][0] > 0.8
    (tmp_path / "c.arff").write_text(ARFF % ("numeric", "1,red\n"))
    with pytest.raises(UnreadableData, match="c.arff"): list(grinsztajn(335, tmp_path))
    (tmp_path / "c.arff").write_text(ARFF % ("numeric", "?,red,1\n2,red,1"))
    with pytest.raises(UnreadableData, match="missing or not finite"): list(grinsztajn(335, tmp_path))
    with pytest.raises(DataNotFound, match="no ARFF files"): list(grinsztajn(335, tmp_path / "none"))
    with pytest.raises(ValueError, match="suite=336000"): grinsztajn(336000)


def test_grinsztajn_from_openml(monkeypatch):
    openml = pytest.importorskip("openml", reason="openml is not installed")
    from types import SimpleNamespace as space
    frame = pd.DataFrame({"a": np.arange(40.0), "b": pd.Categorical(["x", "y"] * 20)})
    data = space(name="remote", get_data=lambda target: (frame, pd.Series(np.arange(40) % 2, name=target), [False, True], ["a", "b"]))
    monkeypatch.setattr(openml.study, "get_suite", lambda suite: space(tasks=[361]))
    monkeypatch.setattr(openml.tasks, "get_task", lambda number: space(target_name="class", get_dataset=lambda: data))
    task, = grinsztajn(337)
    assert task.name == "remote" and task.x.shape == (40, 3) and task.n_classes == 2
    def offline(suite): raise ConnectionError("no route to host")
    monkeypatch.setattr(openml.study, "get_suite", offline)
    with pytest.raises(DataNotFound, match="OpenML's suite 337 cannot be read: no route.*folder="): list(grinsztajn(337))
    monkeypatch.setitem(sys.modules, "openml", None)
    with pytest.raises(ImportError, match="pip install"): list(grinsztajn(337))


# --- hostile input, kills, full disks

SLEEPERS = """
import os, sys, time
from pathlib import Path
import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from agop_book.book.tabular import Model, benchmark, split_task

class Sleeper(ClassifierMixin, BaseEstimator):
    def __init__(self, folder="", name=""): self.folder, self.name = folder, name
    def fit(self, X, y):
        if self.name != "quick": (Path(self.folder) / f"{os.getpid()}.pid").touch(); time.sleep(600)
        return self
    def predict(self, X): return np.zeros(len(X), int)

if __name__ == "__main__":
    task = split_task("t", np.random.RandomState(0).randn(40, 2), np.arange(40) % 2)
    names = sys.argv[2].split()
    benchmark([task], {f"{k} {name}": Model(Sleeper(sys.argv[1], name)) for k, name in enumerate(names)}, n_jobs=2, progress=False)
"""


@pytest.mark.parametrize("number, names, waiting", [(9, "slow quick", 1)])        # one worker busy, one idle
def test_workers_of_a_killed_run_end_with_it(tmp_path, number, names, waiting):
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    process = subprocess.Popen([sys.executable, "sleepers.py", str(tmp_path), names], cwd=tmp_path, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if len(list(tmp_path.glob("*.pid"))) == waiting: break
        assert process.poll() is None
        time.sleep(0.05)
    else: pytest.fail("the workers did not start")
    time.sleep(1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(number)
    process.wait()
    alive = psutil.wait_procs(children, timeout=8)[1]
    for child in alive: child.kill()
    assert not alive, f"{len(alive)} processes outlived the run"


@pytest.mark.parametrize("options, error, words", [
    (dict(n_jobs=0), ValueError, "n_jobs=0"), (dict(n_jobs=2**63), ValueError, "n_jobs=9223372036854775808"), (dict(n_jobs=-2**63), ValueError, "n_jobs=-9"), (dict(n_jobs=1.5), ValueError, "n_jobs=1.5"), (dict(n_jobs=True), ValueError, "n_jobs=True"),
    (dict(n_jobs="two"), ValueError, "n_jobs='two'"), (dict(max_rows=0), ValueError, "max_rows=0"), (dict(max_rows=-5), ValueError, "max_rows=-5"), (dict(max_rows="all"), ValueError, "max_rows='all'"), (dict(protocol=["nested"]), ValueError, "protocol="),
    (dict(models={"a": 3}), TypeError, r"models\['a'\]=3 has no method candidates")])
def test_hostile_options_of_the_benchmark(options, error, words):
    with pytest.raises(error, match=words): benchmark([toy()], **{"models": {"k-NN": SMALL["k-NN"]}, "progress": False, **options})


@pytest.mark.parametrize("call, error, words", [
    (lambda: benchmark([3], progress=False), TypeError, "tasks holds 3"), (lambda: evaluate(toy(), SMALL["k-NN"], "ours"), ValueError, "protocol='ours'"), (lambda: split_task("t", np.ones((4, 2)), [0, 1]), ValueError, "x has shape"),
    (lambda: split_task("t", [[1.0], [np.nan], [2.0]], [0, 1, 1]), ValueError, "x holds NaN"), (lambda: split_task("t", np.ones((4, 2)), [0.5, np.inf, 1, 2]), ValueError, "y holds NaN"), (lambda: split_task("t", np.ones(4), [0, 1, 0, 1]), ValueError, "x has shape"),
    (lambda: split_task("t", np.ones((4, 2)) * 1j, [0, 1, 0, 1]), ValueError, "x is complex"), (lambda: split_task("t", np.ones((8, 2)), [0, 1] * 4, n_folds=0), ValueError, "n_folds=0"), (lambda: split_task("t", np.ones((8, 2)), [0, 1] * 4, n_folds=2**63), ValueError, "n_folds=9"),
    (lambda: split_task("t", np.ones((8, 2)), [0, 1] * 4, random_state=-1), ValueError, "random_state=-1"), (lambda: inner_folds(toy(), n_splits=1), ValueError, "n_splits=1"), (lambda: inner_folds(toy(), most=-1), ValueError, "most=-1"),
    (lambda: critical_difference(1, 10), ValueError, "k=1"), (lambda: critical_difference(3, 0), ValueError, "n=0"), (lambda: critical_difference(3, 10, 2), ValueError, "alpha=2"), (lambda: critical_difference(3, 10, np.nan), ValueError, "alpha=nan"),
    (lambda: pairwise(table([[1, 2, 3]] * 4), "hulm"), ValueError, "correction='hulm'"), (lambda: rank_diagram(table([[1, 2, 3]] * 4), None, alpha=-1), ValueError, "alpha=-1"),
    (lambda: accuracy_table(pd.DataFrame({"task": ["a"]})), ValueError, "no column accuracy, model"), (lambda: tabular.grinsztajn_task("t", pd.DataFrame({"a": [1.0]}), [0], False, -1), ValueError, "random_state=-1")])
def test_hostile_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words): call()


def test_more_processes_than_jobs_are_not_started(monkeypatch):
    seen = []
    real = joblib.Parallel
    monkeypatch.setattr(joblib, "Parallel", lambda n_jobs, **options: seen.append(n_jobs) or real(n_jobs=1, return_as="generator"))
    benchmark([toy()], {"k-NN": SMALL["k-NN"]}, n_jobs=5000, progress=False)
    assert seen == [1]


def test_gram_matrices_are_planned(monkeypatch):
    monkeypatch.setattr("agop_book.memory.free_memory", lambda device="cpu": 2**20)
    row, = benchmark([toy(600)], {"Laplace": SMALL["Laplace"]}, progress=False).to_dict("records")
    assert row["error"].startswith("MemoryError: laplace: the Gram matrices of 300 centres") and "max_centers" in row["error"]
    small, = benchmark([toy(60)], {"Laplace": SMALL["Laplace"]}, progress=False).to_dict("records")
    assert small["error"] is None


def test_as_many_classes_as_rows_need_no_square():
    n, seen = 40_000, KernelModel("laplace", {"bandwidth": [10.0], "reg": [1.0]}, max_centers=50)
    params, predicted = next(seen.candidates(np.random.default_rng(0).normal(size=(n, 2)), np.arange(n), n, np.zeros((3, 2))))      # one-hot by an n x n identity: 12.8 GB
    assert len(predicted) == 3 and predicted.max() < n


def test_hostile_results_files(tmp_path):
    head = "task,model,protocol,accuracy,folds,chosen,error\n"
    for text, words in ((head + "a,b,published,0.5,[0.5,,\n", "folds is not JSON"), (head + f"a,b,published,0.5,{'[' * 100_000},,\n", "folds is not JSON"), (head + "a,b,published,high,[],,\n", "accuracy is no number"),
                        ("a,b\n1,2,3\n4,5,6,7\n", "not a table|no column"), ("", "not a table"), ("task,model,protocol,accuracy\n", "no column chosen, error, folds")):
        (tmp_path / "r.csv").write_text(text)
        with pytest.raises(UnreadableData, match=f"r.csv.*({words})"): read_results(tmp_path / "r.csv")
    (tmp_path / "r.jsonl").write_text("[" * 100_000 + '\n{"key": "a", "row": []}\n{"key": "a", "row": {"accuracy": 1}}\n')
    assert len(read_results(tmp_path / "r.jsonl")) == 1
    row = benchmark([toy()], {"k-NN": SMALL["k-NN"]}, out=tmp_path / "r.jsonl", retry_failed=True, progress=False)
    assert row["error"].isna().all()


def test_unwritable_files_are_found_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tabular, "evaluate", lambda *a: pytest.fail("worked before it looked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for argv, words in ((["--csv", "nowhere/r.csv"], "--csv: no folder"), (["--csv", "."], "--csv: '.' is a folder"), (["--out", "file/r.jsonl"], "file"), (["--out", "."], "out: '.' is a folder")):
        with pytest.raises(SystemExit) as stop: _main(["sklearn/iris", "--model", "k-NN", *argv])
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_full_disk_after_the_work_loses_nothing(tmp_path, capsys, monkeypatch):
    def full(path, data): raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(tabular, "write_atomic", full)
    assert _main(["sklearn/iris", "--model", "k-NN", "--csv", str(tmp_path / "r.csv")]) == 1
    said = capsys.readouterr()
    assert "No space left" in said.err and "task,model,protocol,accuracy,folds" in said.out and "sklearn/iris,k-NN,published,0." in said.out


def test_the_command_in_a_narrow_encoding_without_a_reader():
    line = f"{sys.executable} -m agop_book.book.tabular sklearn/iris --model k-NN 2>&1 | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.stdout == "0\n" and done.stderr == ""
