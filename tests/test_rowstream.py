"""Rows that do not fit: every kind of source gives the same batches, every bad one says where it
is bad, and one pass finds what numpy and pandas find in the whole table."""
import tracemalloc

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from agop_book.rowchecks import Rows
from agop_book.rowstream import rows_of, scan

N, D = 1000, 4
NAMES = list("abcd")


@pytest.fixture(scope="module")
def X():
    return np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


@pytest.fixture(scope="module")
def y(X):
    return X[:, 0] * X[:, 1]


@pytest.fixture
def frame(X, y):
    return pd.DataFrame(X, columns=NAMES).assign(y=y, w=np.linspace(0, 2, N))


@pytest.fixture
def shards(frame, tmp_path):
    "Four files, one of them without rows."
    folder = tmp_path / "shards"
    folder.mkdir()
    for i, (a, b) in enumerate(((0, 300), (300, 300), (300, 900), (900, N))):
        frame[a:b].to_parquet(folder / f"part-{i}.parquet", row_group_size=128)
    return folder


def whole(rows):
    "All batches as (X, y, w)."
    batches = list(rows.batches())
    columns = ([np.asarray(v) for v in values] for values in zip(*batches))
    return [None if v[0].dtype == object else np.concatenate(v) for v in columns]


def arrays(folder, X, y):
    "Sources without names of the same 1,000 rows."
    np.save(folder / "X.npy", X)
    np.save(folder / "y.npy", y)
    return {
        "array": rows_of(X, y, batch_size=300),
        "strided": rows_of(np.asfortranarray(X), y, batch_size=7),
        "memmap": rows_of(np.load(folder / "X.npy", mmap_mode="r"), y, batch_size=300),
        "npy": rows_of(folder / "X.npy", folder / "y.npy"),
        "tensor": rows_of(torch.from_numpy(X), torch.from_numpy(y), batch_size=300),
        "lists": rows_of(X.tolist(), y.tolist()),
        "dask.array": rows_of(da.from_array(X, chunks=(300, 2)), da.from_array(y, chunks=500)),
        "dask and numpy": rows_of(da.from_array(X, chunks=(300, 2)), y),
    }


def passes(X, y):
    "Sources that make batches of the same rows."
    parts = [(X[a:a + 300], y[a:a + 300]) for a in range(0, N, 300)]
    tensors = TensorDataset(torch.from_numpy(X), torch.from_numpy(y))
    return {
        "function": rows_of(lambda: iter(parts)),
        "list": rows_of(parts),
        "loader": rows_of(DataLoader(tensors, batch_size=64)),
    }


def frames(table, folder):
    "Sources with names of the same rows."
    table.to_parquet(folder / "t.parquet")
    feather.write_feather(table, str(folder / "t.feather"))
    X, y = table[NAMES], table["y"]
    return {
        "pandas": rows_of(table, target="y", batch_size=300),
        "series": rows_of(X, y),
        "polars": rows_of(pl.from_pandas(table), target="y", batch_size=300),
        "parquet": rows_of(folder / "t.parquet", target="y", batch_size=300),
        "feather": rows_of(str(folder / "t.feather"), target="y", batch_size=300),
        "dataset": rows_of(ds.dataset(folder / "t.parquet"), target="y"),
        "in memory": rows_of(ds.dataset(pa.Table.from_pandas(table)), target="y"),
        "dask.dataframe": rows_of(dd.from_pandas(table, npartitions=3), target="y"),
        "dask.series": rows_of(dd.from_pandas(X, npartitions=3), dd.from_pandas(y, npartitions=3)),
        "frames": rows_of([(X[:500], y[:500]), (X[500:], y[500:])]),
    }


def sources(frame, folder, X, y):
    "Every kind of source of the same 1,000 rows."
    return arrays(folder, X, y) | passes(X, y) | frames(frame.drop(columns="w"), folder)


def test_every_source_gives_the_same_rows_twice(frame, tmp_path, X, y):
    found = sources(frame, tmp_path, X, y)
    for name, rows in found.items():
        assert isinstance(rows, Rows) and rows_of(rows) is rows
        for _ in range(2):
            X_read, y_read, w = whole(rows)
            assert w is None and rows.n == N, name
            np.testing.assert_array_equal(X_read, X, name)
            np.testing.assert_array_equal(y_read, y, name)
        assert X_read.dtype == (np.float64 if name == "lists" else np.float32), name
        framed = name not in arrays(tmp_path, X, y) | passes(X, y)
        assert rows.names == (NAMES if framed else None), name


def test_every_source_gives_the_same_scan(frame, tmp_path, X, y):
    scans = {name: scan(rows, 50, 3) for name, rows in sources(frame, tmp_path, X, y).items()}
    keys = np.random.default_rng(3).random(N)
    wanted = np.argsort(keys)[:50]
    for name, found in scans.items():
        np.testing.assert_array_equal(found.at, wanted, name)
        np.testing.assert_array_equal(np.asarray(found.X), X[wanted], name)
        np.testing.assert_array_equal(found.y, y[wanted], name)
        np.testing.assert_array_equal(found.keys, keys[wanted], name)
        assert found.n == N and found.missing is None and found.labels is None


def test_shards_pattern_list_and_columns(shards, frame, X):
    several = {"folder": shards, "pattern": f"{shards}/part-*.parquet",
               "list": sorted(shards.glob("*.parquet"))}
    for source in several.values():
        rows = rows_of(source, target="y", weight="w", columns=["c", "a"], batch_size=256)
        assert rows.n == N and rows.names == ["c", "a"]
        read, targets, w = whole(rows)
        np.testing.assert_array_equal(read, X[:, [2, 0]])
        np.testing.assert_array_equal(targets, frame["y"])
        np.testing.assert_array_equal(w, frame["w"])
    two = rows_of(shards, target=["y", "d"], columns=["a"])
    np.testing.assert_array_equal(whole(two)[1], frame[["y", "d"]])
    assert scan(two, 3).y.shape == (3, 2)


def test_categories_alone(tmp_path):
    table = pd.DataFrame({"kind": list("aab"), "y": [1.0, 2.0, 3.0]})
    table.to_parquet(tmp_path / "t.parquet")
    for source in (table, tmp_path / "t.parquet"):
        found = scan(rows_of(source, target="y", categorical=["kind"], batch_size=2), 3, 0)
        assert found.X["kind"].tolist() == table["kind"].iloc[found.at].tolist()


def test_a_folder_per_value(tmp_path, frame):
    table = frame.assign(year=np.where(frame["a"] > 0, 2020, 2021))
    table.to_parquet(tmp_path / "t", partition_cols=["year"])
    rows = rows_of(tmp_path / "t", target="y", columns=["b", "year"])
    read = np.concatenate([np.asarray(X) for X, _, _ in rows.batches()])
    assert sorted(read[:, 1].tolist()) == sorted(table["year"].tolist())


def test_the_index_of_a_frame_is_no_feature(frame, tmp_path):
    frame.iloc[::-1].to_parquet(tmp_path / "t.parquet")
    assert rows_of(tmp_path / "t.parquet", target="y", weight="w").names == NAMES


def test_numbers_of_all_kinds(tmp_path):
    table = pd.DataFrame({"i": [1, 2, None], "b": [True, False, None], "f": [0.5, 1.5, 2.5]})
    table = table.astype({"i": "Int64", "b": "boolean", "f": "float32"}).assign(y=[1, 2, 3])
    table.to_parquet(tmp_path / "t.parquet")
    for source in (table, tmp_path / "t.parquet", pl.from_pandas(table)):
        rows = rows_of(source, target="y", batch_size=2)
        X = np.concatenate([np.asarray(X) for X, _, _ in rows.batches()])
        np.testing.assert_array_equal(X, [[1, 1, 0.5], [2, 0, 1.5], [np.nan, np.nan, 2.5]])
        assert rows.missing == (2, "i") and X.dtype == np.float64


@pytest.mark.parametrize("stored", ["words", "dictionary"])
def test_categories(tmp_path, stored):
    words = np.random.default_rng(0).choice(["red", "green", "blue", None], 500)
    table = pd.DataFrame({"colour": words, "size": np.arange(500.0), "y": 1.0})
    kept = table if stored == "words" else table.astype({"colour": "category"})
    kept.to_parquet(tmp_path / "t.parquet", row_group_size=50)
    asked = {"target": "y", "batch_size": 64}
    if stored == "words":
        with pytest.raises(ValueError, match="'colour' of t.parquet holds strings.*categorical="):
            scan(rows_of(tmp_path / "t.parquet", **asked), 10)
        with pytest.raises(ValueError, match="'colour' of X of batch 0 holds strings, as 'blue'"):
            list(rows_of(table.sort_values("colour"), **asked).batches())
        asked["categorical"] = ["colour"]
    for source in (kept, tmp_path / "t.parquet", dd.from_pandas(kept, npartitions=2)):
        rows = rows_of(source, **asked)
        for X, _, _ in rows.batches():
            assert list(X.columns) == ["colour", "size"]
            assert isinstance(X.dtypes["colour"], pd.CategoricalDtype)
        found = scan(rows, 200, 0)
        assert found.X["colour"].astype(object).fillna("-").tolist() \
            == table["colour"].iloc[found.at].fillna("-").tolist()
        assert found.X["colour"].cat.categories.tolist() == ["blue", "green", "red"]
        assert found.missing == (int(np.argmax(pd.isna(words))), "colour")


# --- bad input

def broken(where, what):
    "A function that gives three batches of 100 rows, in one of which something is done."
    def batches():
        for i in range(3):
            X, y = np.ones((100, 3)), np.arange(100.0)
            yield what(X, y) if i == where else (X, y)
    return batches


def put(value, in_y=False):
    def change(X, y):
        (y if in_y else X)[(7, *([] if in_y else [1]))] = value
        return X, y
    return change


BROKEN = {
    "width": (lambda X, y: (X[:, :2], y), r"batch 1 \(from row 100 on\) has columns 2.* 3;.*give"),
    "dtype": (lambda X, y: (X.astype("f4"), y), "batch 1.* has dtype float32.*float64;.*astype"),
    "frame": (lambda X, y: (pd.DataFrame(X), y), r"names \[0, 1, 2\], and those before it None"),
    "no y": (lambda X, y: X, "batch 1.* has y None.*numbers of shape"),
    "two y": (lambda X, y: (X, y[:, None]), r"has y numbers of shape \(b, 1\)"),
    "labels": (lambda X, y: (X, y.astype(str)), "has y labels"),
    "weights": (lambda X, y: (X, y, y), "has weights True"),
    "short y": (lambda X, y: (X, y[:99]), "batch 1 has 100 rows of X and 99 of y"),
    "short w": (lambda X, y: (X, y, y[:9]), "batch 1 has 100 rows of X and 9 of weights"),
    "infinity": (put(np.inf), r"infinite in row 107, column 1 \(batch 1\)"),
    "y is NaN": (put(np.nan, True), r"y is nan in row 107 \(batch 1\)"),
    "y is infinite": (put(-np.inf, True), r"y is -inf in row 107"),
    "axes": (lambda X, y: (X[0], y), r"X of batch 1 has shape \(3,\).*DataLoader"),
    "weight": (lambda X, y: (X, y, y - 1), "weight of row 100 .* is -1"),
    "parts": (lambda X, y: (X, y, y, y), "batch 1 is 4 parts"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_batch_that_is_wrong(name):
    what, message = BROKEN[name]
    with pytest.raises((ValueError, TypeError), match=message):
        list(rows_of(broken(1, what)).batches())


@pytest.mark.parametrize("X", [np.array([["a"]]), np.array([[1j]]), np.zeros((2, 2), "M8[s]")])
def test_numbers_that_are_none(X):
    with pytest.raises((TypeError, ValueError), match="batch 0"):
        list(rows_of(X).batches())


def test_names_in_another_order(frame):
    parts = [frame[["a", "b"]], frame[["b", "a"]]]
    with pytest.raises(ValueError, match=r"batch 1 .*has names \['b', 'a'\]"):
        list(rows_of(parts).batches())


def test_nan_in_row_700_000_of_a_million(tmp_path):
    X = np.lib.format.open_memmap(tmp_path / "X.npy", "w+", np.float32, (1_000_000, 2))
    X[700_000, 1] = np.nan
    X.flush()
    found = scan(rows_of(tmp_path / "X.npy"), 10, 0)
    assert found.missing == (700_000, 1) and found.n == 1_000_000
    y = np.zeros(1_000_000)
    y[700_000] = np.nan
    with pytest.raises(ValueError, match=r"y is nan in row 700,000 \(batch 10\)"):
        scan(rows_of(X, y), 10)


def test_missing_labels():
    with pytest.raises(ValueError, match="y is missing in row 1 .*drop the rows"):
        list(rows_of(np.ones((3, 1)), ["a", None, "b"]).batches())


def test_generators_are_read_once(X, y):
    make = broken(-1, None)
    with pytest.raises(ValueError, match="a generator, which can be read only once.*rows_of"):
        rows_of(make())
    once = make()
    rows = rows_of(lambda: once)
    assert len(list(rows.batches())) == 3
    with pytest.raises(ValueError, match="iterator of its last call again"):
        list(rows.batches())


def test_a_source_that_changes():
    lengths = iter((5, 4))
    rows = rows_of(lambda: iter([np.ones((next(lengths), 2))]))
    list(rows.batches())
    with pytest.raises(ValueError, match="this pass gave 4 rows, one before it 5"):
        list(rows.batches())


@pytest.mark.parametrize("empty", [[np.ones((0, 2))] * 2, np.ones((0, 2)), lambda: iter(())])
def test_no_rows_at_all(empty):
    with pytest.raises(ValueError, match="there is no row in any of the"):
        list(rows_of(empty).batches())


def test_all_shards_empty(frame, tmp_path):
    for i in range(2):
        frame[:0].to_parquet(tmp_path / f"{i}.parquet")
    with pytest.raises(ValueError, match="there is no row"):
        scan(rows_of(tmp_path, target="y"), 10)


def test_columns_that_are_not_there(shards, frame):
    for source in (shards, frame, pl.from_pandas(frame)):
        for key, asked in (("target", "yy"), ("weight", "ww"), ("columns", ["aa"])):
            with pytest.raises(ValueError, match=f"{key}=.* is no column: did you mean"):
                rows_of(source, **{key: asked})


def test_arguments_that_say_nothing(shards, X, y):
    for source, asked in ((X, {"target": "y"}), (X, {"columns": ["a"]}), ([(X, y)], {"y": y}),
                          (rows_of(X), {"y": y}), (shards, {"y": y}), (X, {"keep": ["id"]})):
        with pytest.raises(ValueError, match="cannot be given"):
            rows_of(source, **asked)
    with pytest.raises(ValueError, match="X has 1,000 rows and y 999"):
        rows_of(X, y[1:])
    with pytest.raises(ValueError, match="X has 1,000 rows and y 999"):
        rows_of(da.from_array(X), y[1:])
    with pytest.raises(ValueError, match="batch_size=0"):
        rows_of(X, batch_size=0)
    with pytest.raises(TypeError, match="X is a int"):
        rows_of(3)
    with pytest.raises(ValueError, match=r"X has shape \(1000,\)"):
        rows_of(y)


def test_a_dataset_without_files(tmp_path):
    with pytest.raises(ValueError, match="this dataset has no files"):
        rows_of(ds.dataset([], schema=pa.schema([("a", pa.float32())])))


def test_files_that_are_none(tmp_path, shards):
    with pytest.raises(FileNotFoundError, match="no such file"):
        rows_of(tmp_path / "nowhere.parquet")
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match="no Parquet"):
        rows_of(tmp_path / "bare")
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="t.csv: neither a Parquet"):
        rows_of(tmp_path / "t.csv")
    (tmp_path / "X.npy").write_bytes(b"none")
    with pytest.raises(ValueError, match="X.npy"):
        rows_of(tmp_path / "X.npy")
    damaged = shards / "part-2.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ValueError, match="part-2.parquet: cannot be read"):
        rows_of(shards, target="y")


def test_a_shard_that_is_damaged_inside(shards):
    path = shards / "part-2.parquet"
    data = bytearray(path.read_bytes())
    data[100:4000] = bytes(3900)
    path.write_bytes(data)
    rows = rows_of(shards, target="y")
    with pytest.raises(ValueError, match="part-2.parquet: cannot be read"):
        list(rows.batches())


@pytest.mark.parametrize("change, message", [
    (lambda t: t.drop(columns="b"), r"part-3.parquet has no column 'b', which part-0.parquet has"),
    (lambda t: t.astype({"b": "float64"}), r"'b' is double in part-3.parquet and float in part-0"),
    (lambda t: t.astype({"b": str}), r"'b' is \w*string in part-3.parquet"),
])
def test_shards_that_differ(shards, change, message):
    path = shards / "part-3.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(ValueError, match=message):
        rows_of(shards, target="y")


def test_columns_of_dates_and_lists(tmp_path):
    table = pa.table({"when": pa.array([1, 2], pa.timestamp("s")), "y": [1.0, 2.0]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(TypeError, match="'when' of t.parquet holds timestamp"):
        scan(rows_of(tmp_path / "t.parquet", target="y"), 10)


# --- a scan

def test_the_sample_is_fair():
    "Each of 20 rows is in the sample of 5 as often as any other: chi-squared of 19 degrees."
    X = np.arange(20.0)[:, None]
    counts = np.zeros(20)
    for seed in range(800):
        counts[scan(rows_of(X, batch_size=6), 5, seed).at] += 1
    expected = 800 * 5 / 20
    # without replacement the variance of a count is smaller by (1 - 5/20)
    assert ((counts - expected)**2 / expected / 0.75).sum() * 19 / 20 < 43.8       # 0.1 %


@pytest.mark.parametrize("most", [1, 999, 1000, 5000])
def test_the_sample_does_not_depend_on_the_batches(X, y, most):
    found = [scan(rows_of(X, y, batch_size=b), most, 1) for b in (1, 17, 999, 5000)]
    for other in found:
        assert len(other.at) == min(most, N) and (np.diff(other.keys) > 0).all()
        np.testing.assert_array_equal(other.at, found[0].at)
        np.testing.assert_array_equal(other.X, X[other.at])
        np.testing.assert_array_equal(other.y, y[other.at])


@pytest.mark.parametrize("kind", ["words", "booleans", "category", "numbers"])
def test_labels(X, y, kind):
    labels = pd.Series(np.where(y > 0.5, "many", np.where(y > 0, "some", "no")))
    labels = {"words": labels, "category": labels.astype("category"), "booleans": labels == "no",
              "numbers": labels.str.len()}[kind]
    found = scan(rows_of(X, labels, batch_size=100), 10, labels=kind == "numbers")
    counts = labels.astype(object).value_counts().sort_index()
    assert found.labels.tolist() == counts.index.tolist()
    assert found.counts.tolist() == counts.tolist()
    assert found.y.tolist() == labels.iloc[found.at].tolist()


def test_too_many_labels():
    with pytest.raises(ValueError, match="more than 10,000 distinct labels"):
        scan(rows_of(np.ones((20_000, 1)), np.arange(20_000.0)), 10, labels=True)


def test_a_scan_holds_a_batch_and_the_sample():
    "Beside its source: 200,000 x 20 numbers come by, 1,000 rows are kept."
    def batches():
        for i in range(100):
            yield np.full((2000, 20), float(i), np.float32), np.zeros(2000, np.float32)

    tracemalloc.start()
    found = scan(rows_of(batches), 1000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.n == 200_000 and peak < 2**20
