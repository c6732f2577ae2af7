"The run of the benchmark: resuming, failures, backends, kills, full disks, the command."

import os
import subprocess
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import psutil
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.neighbors import KNeighborsClassifier

from agop_book.book import benchmark as module
from agop_book.book.benchmark import benchmark, main
from agop_book.book.learners import KernelModel, Model
from agop_book.book.results import read_results, stored_results
from agop_book.book.tasks import split_task

REAL = Path(os.environ.get("AGOP_BOOK_DATA") or Path(__file__).parents[2] / "shared/data")
COMMAND = [sys.executable, "-m", "agop_book.book.benchmark"]
LAPLACE = {"bandwidth": [10.0], "reg": [0.1, 0.01]}
NEIGHBOURS = {"k-NN": Model(KNeighborsClassifier(), {"n_neighbors": [1, 3]})}
SMALL = {
    "RFM": KernelModel("laplace", {**LAPLACE, "rounds": [0, 1, 2]}),
    "Laplace": KernelModel("laplace", LAPLACE),
    **NEIGHBOURS,
}


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    "No data folder unless a test sets one."
    monkeypatch.delenv("AGOP_BOOK_DATA", raising=False)


def toy(n=60, seed=0, name="toy"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    return split_task(name, x, np.digitize(x[:, 0] * x[:, 1], [-0.5, 0.5]))


class Moody(ClassifierMixin, BaseEstimator):
    "Fails while a file exists."

    def __init__(self, path=None):
        self.path = path

    def fit(self, X, y):
        if Path(self.path).exists(): raise RuntimeError("bad mood")
        return self

    def predict(self, X):
        return np.zeros(len(X), int)


# --- what is kept


def test_failures_are_kept_and_retried_on_request(tmp_path):
    mood, out = tmp_path / "mood", tmp_path / "new/rows.jsonl"
    models = {**NEIGHBOURS, "moody": Model(Moody(str(mood)))}

    def run(**options):
        return benchmark([toy()], models, out=out, progress=False, **options).set_index("model")

    mood.touch()
    assert run().loc["moody", "error"] == "RuntimeError: bad mood"
    assert run().loc["k-NN", "accuracy"] > 0
    mood.unlink()
    assert run().loc["moody", "error"] == "RuntimeError: bad mood"  # kept ...
    assert run(retry_failed=True).loc["moody", "accuracy"] > 0  # ... until asked
    assert run().loc["moody", "accuracy"] > 0 and len(out.read_text().splitlines()) == 3
    assert len(read_results(out)) == 2


def test_nothing_is_recomputed_and_changes_are_noticed(tmp_path, monkeypatch):
    out, calls = tmp_path / "rows.jsonl", []
    real = module.evaluate

    def counted(task, model, protocol):
        calls.append(task.name)
        return real(task, model, protocol)

    def run(task, models=SMALL):
        return benchmark([task], models, out=out, progress=False)

    monkeypatch.setattr(module, "evaluate", counted)
    first = run(toy())
    assert len(calls) == 3
    assert run(toy())["accuracy"].tolist() == first["accuracy"].tolist() and len(calls) == 3
    run(toy(seed=1))  # other data of the same name
    assert len(calls) == 6
    run(toy(), {"k-NN": Model(KNeighborsClassifier(), {"n_neighbors": [1, 9]})})
    assert len(calls) == 7
    with open(out, "ab") as f:
        f.write(b'{"key": "cut o')  # killed while writing
    run(toy())
    assert len(calls) == 7


def test_rows_that_are_none_are_left_out(tmp_path):
    out = tmp_path / "r.jsonl"
    row = '{"key": "a", "row": {"accuracy": 1}}\n'
    out.write_text("[" * 100_000 + '\n{"key": "a", "row": []}\n' + row)
    assert len(read_results(out)) == 1
    results = benchmark([toy()], NEIGHBOURS, out=out, retry_failed=True, progress=False)
    assert results["error"].isna().all()


def wait_for(condition, seconds=60):
    "Poll until a condition holds."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "rows.jsonl"
    tasks = [f"sklearn/{name}" for name in ("digits", "wine", "iris")]
    command = [*COMMAND, *tasks, "--model", "k-NN", "--model", "RFM", "--out", str(out)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=tmp_path, **quiet)
    wait_for(lambda: out.exists() and b"\n" in out.read_bytes())
    process.kill()
    process.wait()
    before = out.read_bytes()
    results = benchmark(["sklearn/iris", "sklearn/wine"], ["k-NN"], out=out, progress=False)
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert results["error"].isna().all()


# --- where it runs


def test_threads_and_order():
    tasks = [toy(40 + 20 * k, name=f"t{k}") for k in range(3)]
    with joblib.parallel_config(backend="threading"):
        two = benchmark(tasks, NEIGHBOURS, n_jobs=2, progress=False)
    one = benchmark(tasks, NEIGHBOURS, progress=False)
    assert one["task"].tolist() == ["t2", "t1", "t0"]
    assert one["accuracy"].tolist() == two["accuracy"].tolist()
    few = benchmark(tasks, NEIGHBOURS, max_rows=60, progress=False)
    assert few["task"].tolist() == ["t1", "t0"]


def test_on_a_dask_cluster():
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    models = {name: SMALL[name] for name in ("Laplace", "k-NN")}
    tasks = [toy(40), toy(60, name="other")]
    options = dict(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None)
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster):
        with joblib.parallel_config(backend="dask"):
            far = benchmark(tasks, models, progress=False)
    columns = ["task", "model", "accuracy", "chosen"]
    assert far[columns].equals(benchmark(tasks, models, progress=False)[columns])


def test_more_processes_than_jobs_are_not_started(monkeypatch):
    seen, real = [], joblib.Parallel

    def parallel(n_jobs, **options):
        seen.append(n_jobs)
        return real(n_jobs=1, return_as="generator")

    monkeypatch.setattr(joblib, "Parallel", parallel)
    benchmark([toy()], NEIGHBOURS, n_jobs=5000, progress=False)
    assert seen == [1]


SLEEPERS = """
import os, sys, time
from pathlib import Path
import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from agop_book.book.benchmark import benchmark
from agop_book.book.learners import Model
from agop_book.book.tasks import split_task

class Sleeper(ClassifierMixin, BaseEstimator):
    def __init__(self, folder="", name=""):
        self.folder, self.name = folder, name

    def fit(self, X, y):
        if self.name != "quick":
            (Path(self.folder) / f"{os.getpid()}.pid").touch()
            time.sleep(600)
        return self

    def predict(self, X):
        return np.zeros(len(X), int)

if __name__ == "__main__":
    task = split_task("t", np.random.RandomState(0).randn(40, 2), np.arange(40) % 2)
    models = {name: Model(Sleeper(sys.argv[1], name)) for name in ("slow", "quick")}
    benchmark([task], models, n_jobs=2, progress=False)
"""


def test_workers_of_a_killed_run_end_with_it(tmp_path):
    "One worker is busy, one idle."
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    command = [sys.executable, "sleepers.py", str(tmp_path)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob("*.pid")))
    time.sleep(1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=8)
    for child in alive:
        child.kill()
    assert not alive, f"{len(alive)} processes outlived the run"


# --- hostile options


@pytest.mark.parametrize(
    "options, words",
    [
        ({"models": ["RMF"]}, "unknown model 'RMF': did you mean 'RFM'"),
        ({"protocol": "ours"}, "protocol='ours' must be one of"),
        ({"models": ["MLP"], "protocol": "nested"}, "unknown model 'MLP'"),
    ],
)
def test_unknown_names(options, words):
    with pytest.raises(ValueError, match=words):
        benchmark(["sklearn/iris"], progress=False, **options)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(n_jobs=0), "n_jobs=0"),
        (dict(n_jobs=2**63), "n_jobs=9223372036854775808"),
        (dict(n_jobs=-(2**63)), "n_jobs=-9"),
        (dict(n_jobs=1.5), "n_jobs=1.5"),
        (dict(n_jobs=True), "n_jobs=True"),
        (dict(n_jobs="two"), "n_jobs='two'"),
        (dict(max_rows=0), "max_rows=0"),
        (dict(max_rows=-5), "max_rows=-5"),
        (dict(max_rows="all"), "max_rows='all'"),
        (dict(protocol=["nested"]), "protocol="),
    ],
)
def test_hostile_options_of_the_benchmark(options, words):
    with pytest.raises(ValueError, match=words):
        benchmark([toy()], NEIGHBOURS, **{"progress": False, **options})


def test_what_is_no_task_or_model():
    with pytest.raises(TypeError, match=r"models\['a'\]=3 has no method candidates"):
        benchmark([toy()], {"a": 3}, progress=False)
    with pytest.raises(TypeError, match="tasks holds 3"):
        benchmark([3], NEIGHBOURS, progress=False)


# --- the command


@pytest.mark.skipif(not (REAL / "uci121/flags").is_dir(), reason="the 121 are not on this machine")
def test_a_stored_row_can_be_had_again(monkeypatch, capsys):
    stored = stored_results()
    if stored is None:
        pytest.skip("no stored results")
    monkeypatch.setenv("AGOP_BOOK_DATA", str(REAL))
    assert main(["flags", "--model", "RFM"]) == 0
    printed = capsys.readouterr().out
    row = stored.query("task == 'flags' and model == 'RFM' and protocol == 'published'").iloc[0]
    assert "flags" in printed and f"{row['accuracy']:.4f}"[:5] in printed


def test_the_command_in_two_processes(tmp_path):
    csv = tmp_path / "r.csv"
    command = [*COMMAND, "sklearn/iris", "sklearn/wine", "--model", "k-NN", "--jobs", "2"]
    done = subprocess.run(
        [*command, "--csv", str(csv)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = read_results(csv)
    assert "sklearn/wine" in done.stdout and len(results) == 2
    assert results["error"].isna().all()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["sklearn/irsi"], "did you mean 'sklearn/iris'"),
        (["sklearn/iris", "--model", "RMF"], "did you mean 'RFM'"),
        ([], "AGOP_BOOK_DATA"),
    ],
)
def test_command_line_errors(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--csv", "nowhere/r.csv"], "--csv: no folder"),
        (["--csv", "."], "--csv: '.' is a folder"),
        (["--out", "file/r.jsonl"], "file"),
        (["--out", "."], "out: '.' is a folder"),
    ],
)
def test_unwritable_files_are_found_before_the_work(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setattr(module, "evaluate", lambda *a: pytest.fail("worked before it looked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["sklearn/iris", "--model", "k-NN", *options])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_full_disk_after_the_work_loses_nothing(tmp_path, capsys, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("agop_book.book.results.write_atomic", full)
    csv = str(tmp_path / "r.csv")
    assert main(["sklearn/iris", "--model", "k-NN", "--csv", csv]) == 1
    said = capsys.readouterr()
    assert "No space left" in said.err and "task,model,protocol,accuracy,folds" in said.out
    assert "sklearn/iris,k-NN,published,0." in said.out


def test_the_command_in_a_narrow_encoding_without_a_reader():
    words = " ".join([*COMMAND, "sklearn/iris --model k-NN"])
    line = f"{words} 2>&1 | true; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.stdout == "0\n" and done.stderr == ""
