"""Predictions in batches: the same as at once, in a file that is whole or as it was before."""
import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression

import agop_book
from agop_book import batchwise
from agop_book.batchwise import predict_rows
from agop_book.rfm import RFMClassifier, RFMRegressor
from agop_book.rowstream import rows_of

N = 500


@pytest.fixture(scope="module")
def table():
    "Two columns of numbers, one of them with holes, one of words, an id, and two targets."
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"id": [f"row {i}" for i in range(N)], "a": rng.normal(size=N),
                          "b": rng.normal(size=N), "kind": rng.choice(["x", "y", "z"], N)})
    frame["y"] = frame["a"] * (frame["kind"] == "x") + frame["b"]
    frame["label"] = np.where(frame["y"] > 0, "plus", "minus")
    frame.loc[3, "b"] = np.nan
    return frame


@pytest.fixture
def source(table, tmp_path):
    "The same in shards; nothing in them says that the words are categories."
    folder = tmp_path / "shards"
    folder.mkdir()
    for i, a in enumerate(range(0, N, 200)):
        table[a:a + 200].to_parquet(folder / f"{i}.parquet", row_group_size=64)
    return folder


def features(table):
    return table[["a", "b", "kind"]].astype({"kind": "category"})


@pytest.fixture(scope="module")
def regressor(table):
    return RFMRegressor(bandwidth=3.0, n_iter=1).fit(features(table)[:100], table["y"][:100])


@pytest.fixture(scope="module")
def classifier(table):
    return RFMClassifier(bandwidth=3.0, n_iter=1).fit(features(table)[:100], table["label"][:100])


def silent(*arguments, **options):
    return predict_rows(*arguments, progress=False, **options)


def test_a_regressor_and_its_file(table, source, regressor, tmp_path):
    wanted = regressor.predict(features(table))
    assert silent(regressor, source, tmp_path / "p.npy") == N
    assert silent(regressor, source, tmp_path / "p.parquet", keep=["id", "y"]) == N
    found = pd.read_parquet(tmp_path / "p.parquet")
    assert list(found) == ["id", "y", "prediction"]
    assert found["id"].tolist() == table["id"].tolist()
    np.testing.assert_allclose(found["prediction"], wanted, rtol=1e-10)
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), wanted, rtol=1e-10)


def test_a_classifier(table, source, classifier, tmp_path):
    wanted = classifier.predict(features(table))
    silent(classifier, source, tmp_path / "p.npy")
    assert np.load(tmp_path / "p.npy", allow_pickle=False).tolist() == wanted.tolist()
    silent(classifier, source, tmp_path / "p.parquet")
    assert pd.read_parquet(tmp_path / "p.parquet")["prediction"].tolist() == wanted.tolist()
    silent(classifier, source, tmp_path / "p.parquet", "predict_proba", keep=["id"])
    found = pd.read_parquet(tmp_path / "p.parquet")
    assert list(found) == ["id", "minus", "plus"]
    np.testing.assert_allclose(found[["minus", "plus"]].to_numpy(),
                               classifier.predict_proba(features(table)), rtol=1e-10)


def test_other_sources(table, regressor, tmp_path):
    "Of a frame too the model takes its own columns; targets are left alone."
    wanted = regressor.predict(features(table))
    chosen = features(table)
    sources = [table, chosen, rows_of(table, target="y", categorical=["kind"], batch_size=99),
               rows_of(table.astype({"kind": "category"}), target="label", batch_size=64),
               lambda: iter([chosen[:300], chosen[300:]]),
               [(chosen[:10], table["y"][:10]), (chosen[10:], table["y"][10:])]]
    for i, rows in enumerate(sources):
        assert silent(regressor, rows, tmp_path / "p.npy") == N
        np.testing.assert_allclose(np.load(tmp_path / "p.npy"), wanted, rtol=1e-10, err_msg=str(i))


@pytest.mark.parametrize("c", [0, 1, 3])
def test_arrays_and_other_estimators(c, tmp_path):
    X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
    np.save(tmp_path / "X.npy", X)
    model = LinearRegression().fit(X, X[:, 0] if c == 0 else X[:, :c])
    silent(model, rows_of(tmp_path / "X.npy", batch_size=77), tmp_path / "p.npy")
    found = np.load(tmp_path / "p.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.shape, model.predict(X).shape)
    np.testing.assert_allclose(found, model.predict(X), rtol=1e-5)
    silent(model, tmp_path / "X.npy", tmp_path / "p.parquet")
    names = [f"prediction_{i}" for i in range(c)] or ["prediction"]
    assert list(pd.read_parquet(tmp_path / "p.parquet")) == names


def test_labels_of_other_kinds(tmp_path):
    X = np.random.default_rng(0).normal(size=(N, 2))
    for labels in (X[:, 0] > 0, np.where(X[:, 0] > 0, 2, 7),
                   np.where(X[:, 0] > 0, "a", "longer").astype(object)):
        model = RandomForestClassifier(3, random_state=0).fit(X, labels)
        silent(model, rows_of(X, batch_size=60), tmp_path / "p.npy")
        assert np.load(tmp_path / "p.npy").tolist() == model.predict(X).tolist()
        silent(model, X, tmp_path / "p.parquet", "predict_proba")
        assert list(pd.read_parquet(tmp_path / "p.parquet")) == list(map(str, model.classes_))


def test_a_model_of_arrays_reads_a_frame_without_warning(table, tmp_path, recwarn):
    numbers = table[["a", "id"]].assign(c=1.0)
    model = LinearRegression().fit(numbers[["a", "c"]].to_numpy(), table["y"])
    silent(model, rows_of(numbers, columns=["a", "c"]), tmp_path / "p.parquet", keep=["id"])
    assert not recwarn.list


# --- bad input

def test_bad_calls(table, source, regressor, tmp_path):
    bad = [(("p.csv",), {}, "must end in .npy or .parquet"),
           (("p.npy",), {"keep": ["id"]}, "needs a .parquet file"),
           (("p.npy", "predict_proba"), {}, "RFMRegressor has no such method"),
           (("p.parquet",), {"keep": ["ids"]}, "keep='ids' is no column: did you mean 'id'")]
    for (out, *method), options, message in bad:
        with pytest.raises(ValueError, match=message):
            silent(regressor, source, tmp_path / out, *method, **options)
    with pytest.raises(ValueError, match="keep=.*needs a source whose columns have names"):
        silent(LinearRegression().fit(np.eye(2), [1, 2]), np.eye(2), tmp_path / "p.parquet",
               keep=["id"])
    with pytest.raises(FileNotFoundError, match="out: no folder"):
        silent(regressor, source, tmp_path / "nowhere" / "p.npy")
    with pytest.raises(ValueError, match="columns='b' is no column"):
        silent(regressor, table[["a", "kind"]], tmp_path / "p.npy")
    clash = table.rename(columns={"id": "prediction"})
    with pytest.raises(ValueError, match="the predictions have this name"):
        silent(regressor, clash, tmp_path / "p.parquet", keep=["prediction"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards"]


def test_what_the_model_refuses_has_its_rows(tmp_path):
    X = np.ones((100, 2))
    X[70, 1] = np.nan
    model = LogisticRegression().fit(np.eye(2), [0, 1])
    with pytest.raises(ValueError, match=r"batch 2, rows 60 to 89: Input X contains NaN"):
        silent(model, rows_of(X, batch_size=30), tmp_path / "p.npy")
    assert not list(tmp_path.iterdir())


class Stops(LinearRegression):
    "A model that raises an error in its third batch."

    def predict(self, X):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3: raise self.error
        return super().predict(X)


@pytest.mark.parametrize("kind", ["npy", "parquet"])
@pytest.mark.parametrize("before", [None, b"an old result"])
def test_an_interruption_leaves_what_was_there(kind, before, tmp_path):
    X = np.random.default_rng(0).normal(size=(N, 2))
    out = tmp_path / f"p.{kind}"
    if before:
        out.write_bytes(before)
    model = Stops().fit(X, X[:, 0])
    model.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt, match="interrupted after 200 of 500 rows.*as it was"):
        silent(model, rows_of(X, batch_size=100), out)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


FULL = """
import resource, sys
import numpy as np
import pyarrow.parquet                     # before files may no longer grow
from sklearn.linear_model import LinearRegression
from agop_book.batchwise import predict_rows
from agop_book.rowstream import rows_of

X = np.random.default_rng(0).normal(size=(100_000, 2))
model = LinearRegression().fit(X, X[:, 0])
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
try:
    predict_rows(model, rows_of(X, batch_size=10_000), sys.argv[1], progress=False)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of that kind")
@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_file_that_cannot_grow(kind, tmp_path):
    "The operating system refuses to write more than 400,000 bytes; 800,000 are needed."
    out = tmp_path / f"p.{kind}"
    out.write_bytes(b"old")
    root = str(Path(agop_book.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", FULL, str(out)], env={"PYTHONPATH": root},
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"[Errno {errno.EFBIG}]" in done.stdout and "of 100,000 rows" in done.stdout
    assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]


class Full:
    "A file on a disk that is full after 2,000 bytes."

    def __init__(self, file):
        self.file = file

    def write(self, data):
        if self.file.tell() > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_disk_that_fills(kind, tmp_path, monkeypatch):
    write_table = pq.ParquetWriter.write_table

    def until_full(self, table):
        if Path(self.where).stat().st_size > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_table(self, table)

    monkeypatch.setattr(batchwise, "open", lambda *a: Full(open(*a)), raising=False)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", until_full)
    X = np.random.default_rng(0).normal(size=(N, 2))
    with pytest.raises(OSError, match=r"No space left on device, after \d00 of 500 rows") as error:
        silent(LinearRegression().fit(X, X), rows_of(X, batch_size=100), tmp_path / f"p.{kind}")
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
