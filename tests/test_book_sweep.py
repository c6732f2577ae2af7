"""Sweeps: what is kept when one is killed, changed or short of space."""

import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import ParameterGrid

from agop_book.book.run import out_dir
from agop_book.book.sweep import append_row, check_results, finished_rows, sweep


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("AGOP_BOOK_SCALE", "AGOP_BOOK_SINCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "cpu")
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path / "out"))
    return tmp_path / "out"


def square(x, power=2):
    square.calls += 1
    return {"value": float(x) ** power, "list": [x, x]}


@pytest.fixture
def counted():
    square.calls = 0
    return square


def study(fn, grid, **options):
    return sweep("s", fn, grid, progress=False, **options)


def test_sweep_resumes(fresh, counted):
    grid = [{"x": i} for i in range(5)]
    one = study(square, grid)
    two = study(square, grid + [{"x": 9}])
    assert square.calls == 6 and list(two.value) == [0, 1, 4, 9, 16, 81]
    pd.testing.assert_frame_equal(one, two.iloc[:5])
    assert (fresh / "results/s-quick.jsonl").read_text().count("\n") == 6


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 600))
def test_sweep_after_any_truncation(tmp_path_factory, cut):
    """However much of the file a crash takes, the result is the same."""
    square.calls = 0
    # restored by the fixture
    os.environ["AGOP_BOOK_OUT"] = str(tmp_path_factory.mktemp("out"))
    grid = [{"x": i} for i in range(3)]
    whole = study(square, grid)
    path = out_dir() / "results/s-quick.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-min(cut, len(data))])
    again = study(square, grid)
    pd.testing.assert_frame_equal(whole.drop(columns="seconds"), again.drop(columns="seconds"))
    assert study(square, grid).equals(again) and path.read_bytes().count(b"\n") == 3
    assert square.calls <= 6


def test_sweep_key(monkeypatch, counted):
    study(square, [{"x": 1}])
    study(square, [{"x": 1}], version="2")
    study(square, [{"x": 1}], version="2")
    assert square.calls == 2
    monkeypatch.setenv("AGOP_BOOK_SCALE", "book")  # another file
    study(square, [{"x": 1}])
    assert square.calls == 3
    monkeypatch.setenv("AGOP_BOOK_SINCE", "9e12")  # --force
    study(square, [{"x": 1}])
    assert square.calls == 4


def test_sweep_keeps_rows_before_a_failure(fresh):
    def fails(x):
        if x == 2: raise RuntimeError("no")
        return {"y": x}

    with pytest.raises(RuntimeError):
        study(fails, [{"x": i} for i in range(4)])
    assert (fresh / "results/s-quick.jsonl").read_text().count("\n") == 2


def test_sweep_accepts_a_parameter_grid_and_arrays():
    def add(a, b):
        return {"sum": np.float32(a + b), "v": np.arange(2)}

    got = study(add, ParameterGrid({"a": np.arange(2), "b": [1.5]}))
    assert list(got["sum"]) == [1.5, 2.5] and got.v[0] == [0, 1]


def returns_a_number(x):
    return 3


def returns_its_parameter(x):
    return {"x": 3}


BAD = [
    (("a/b", square, []), {}, ValueError, "name="),
    (("../x", square, []), {}, ValueError, "name="),
    (("x" * 300, square, []), {}, ValueError, "name="),
    (("s", 3, []), {}, TypeError, "fn=3"),
    (("s", max, [{"x": 1}]), {}, ValueError, "version="),
    (("s", square, []), dict(version=square), TypeError, "version="),
    (("s", square, 3), {}, TypeError, "grid must be"),
    (("s", square, [3]), {}, TypeError, "grid holds 3"),
    (("s", square, {"x": [1]}), {}, TypeError, "ParameterGrid"),
    (("s", square, [{"x": len}]), {}, TypeError, "grid: x"),
    (("s", returns_a_number, [{"x": 1}]), {}, TypeError, "return a dict"),
    (("s", returns_its_parameter, [{"x": 1}]), {}, ValueError, r"\['x'\]"),
]


@pytest.mark.parametrize("arguments, options, error, text", BAD)
def test_bad_sweep(arguments, options, error, text):
    with pytest.raises(error, match=text):
        sweep(*arguments, progress=False, **options)


FOREIGN = [
    "[" * 100_000, '{"key": [], "row": {}}', '{"key": "a", "row": 3}', "3", "null", "[]", '"text"',
    '{"key": "a", "row": {}, "time": "now"}', '{"key": "a"}',
]


def test_results_files_of_others_are_passed_over(fresh, counted):
    path = fresh / "results/s-quick.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(FOREIGN) + "\n")
    assert finished_rows(path) == {}
    assert list(study(square, [{"x": 2}]).value) == [4]


# --- full disks

def full(descriptor):
    raise OSError(28, "No space left on device")


def test_a_full_disk_loses_no_result(fresh, counted, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="s-quick.jsonl cannot be written.*No space"):
        table = study(counted, [{"x": 2}, {"x": 3}])
    assert list(table.value) == [4, 9]
    assert (fresh / "results/s-quick.jsonl").read_bytes() == b""  # nothing torn


def test_an_unwritable_folder_is_found_before_the_work(fresh, counted):
    fresh.mkdir()
    (fresh / "results").write_text("a file")
    with pytest.raises(OSError):
        study(counted, [{"x": 2}])
    assert counted.calls == 0


def test_a_results_file_that_may_not_be_written_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, "a", {"x": 1})
    path.chmod(0o400)
    if os.access(path, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(PermissionError, match="out: .*rows.jsonl"):
        check_results(path, "out")
