"""What everything stands on: what counts as numbers, what memory there is, whole files."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from agop_book.arrays import as_real, as_tensor, is_number, to_family
from agop_book.files import check_writable, load_arrays, save_arrays, write_atomic
from agop_book.memory import free_memory, group_room, largest, plan


# --- numbers


@pytest.mark.parametrize(
    "x, error, message",
    [
        (np.ones(3) * 1j, ValueError, "y is complex"),
        (torch.ones(2) * 1j, ValueError, "y is complex"),
        (pd.DataFrame({"a": [1j]}), ValueError, "y is complex"),
        (np.array(["2026"], "datetime64[Y]"), TypeError, "y holds dates"),
        (np.array([3], "timedelta64[s]"), TypeError, "y holds dates"),
        (
            pd.DataFrame({"a": [1.0], "b": pd.to_datetime(["2026-01-01"])}),
            TypeError,
            "y holds dates",
        ),
        (pd.Series(pd.period_range("2026", periods=2, freq="Y")), TypeError, "y holds dates"),
        ([np.datetime64("2026-01-01")], TypeError, "y holds dates"),
        (np.ma.array([1.0, 2.0], mask=[True, False]), TypeError, "y has masked entries"),
        (torch.eye(2).to_sparse(), TypeError, "sparse"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), TypeError, "quantised"),
    ],
)
def test_what_numpy_would_convert_to_wrong_numbers(x, error, message):
    with pytest.raises(error, match=message):
        as_real(x, "y")
    with pytest.raises((TypeError, ValueError)):
        as_tensor(x, "y", None)


def test_plain_passes_on_what_is_right():
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    assert as_real(frame) is frame and as_real([["a"]]) == [["a"]]
    assert as_real(np.array(["2026"], "datetime64[Y]"), dates=True).dtype.kind == "M"
    assert as_real(np.ma.array([1.0, 2.0])) is not None  # nothing is masked
    half = torch.tensor([1.5, 3e38], dtype=torch.bfloat16)
    assert (as_real(half) == half.float().numpy()).all()
    assert as_real(torch.ones(2, requires_grad=True)).tolist() == [1, 1]


def test_families_come_back():
    assert isinstance(to_family(np.ones(2), torch.ones(1)), torch.Tensor) and isinstance(
        to_family(torch.ones(2), np.ones(1)), np.ndarray
    )
    assert to_family(np.array(["a"]), torch.ones(1)).tolist() == ["a"]
    assert (
        is_number(np.float32(1))
        and not is_number(np.True_)
        and not is_number("1")
        and not is_number(1.0, int)
    )


# --- memory


def group(
    folder, limit, used, cache=0, names=("memory.max", "memory.current"), key="inactive_file"
):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(str(limit))
    (folder / names[1]).write_text(str(used))
    (folder / "memory.stat").write_text(f"anon 7\n{key} {cache}\n")


def test_the_tightest_of_nested_groups_counts(tmp_path):
    root, groups = tmp_path / "cgroup", tmp_path / "self"
    groups.write_text("0::/outer/inner/leaf\n")
    group(root / "outer", 5000, 1000)
    group(root / "outer/inner", 3000, 2500, cache=400)
    group(root / "outer/inner/leaf", "max", 10)
    assert sorted(group_room(root, groups)) == [900, 4000]
    groups.write_text("5:cpu:/\n4:memory:/a/b\n0::/\n")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(root / "memory", 2**63 - 4096, 100, names=v1)
    group(root / "memory/a/b", 800, 300, cache=50, names=v1, key="total_inactive_file")
    assert min(group_room(root, groups)) == 550
    assert group_room(root, tmp_path / "none") == []


CHILD = """
import sys, numpy as np, psutil
from agop_book.memory import free_memory
from agop_book.rfm import RFMRegressor
used = psutil.Process().memory_info().rss
print(free_memory(), used)
X = np.random.default_rng(0).normal(size=(14_000, 3))
try: RFMRegressor(bandwidth=10.0, n_iter=0, solver="cholesky").fit(X, X[:, 0])
except MemoryError as error: print("refused:", error)
"""


@pytest.fixture
def real_group():
    "A control group of 1.5 GB below this process's own; skips where none can be made."
    names = {
        "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        "": (Path("/sys/fs/cgroup"), "memory.max"),
    }
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        pytest.skip("no control groups on this system")
    for _, kind, path in lines:
        if kind not in names:
            continue
        mount, limit = names[kind]
        folder = mount / path.lstrip("/") / f"agop_book_{os.getpid()}"
        try:
            folder.mkdir()
            (folder / limit).write_text(str(1500 * 2**20))
        except OSError:
            if folder.is_dir():
                folder.rmdir()
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip("this process may not make control groups")


def test_a_fit_inside_a_real_group_is_refused_not_killed(real_group):
    def join():
        (real_group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(
        [sys.executable, "-c", CHILD], preexec_fn=join, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    free, used = map(int, done.stdout.split()[:2])
    assert 0 < free <= 1500 * 2**20 and "refused: a fit to X with 14,000 rows" in done.stdout
    assert psutil.virtual_memory().available > 1500 * 2**20, (
        "the machine itself has less: this shows nothing"
    )


def test_plans():
    def need(n):
        return 8 * n * n + 100

    assert plan(need, "X", "", 10, limit=900) == 900
    assert largest(need, 1000, 10**6) == 353 and largest(need, 10, 50) == 0
    with pytest.raises(
        MemoryError,
        match=r"the thing takes 1\.0 GiB, 0\.5 GiB are free\. About 23 crates fit\. Do less\.",
    ):
        plan(lambda n: 2**30 if n > 23 else 1, "the thing", "Do less.", 99, "crates", limit=2**29)
    with pytest.raises(MemoryError):
        plan(2**60, "X", "")
    assert free_memory() == pytest.approx(free_memory(torch.device("cpu")), rel=0.2)


# --- files


def test_writers_do_not_tear_each_other(tmp_path):
    path, errors = tmp_path / "page", []
    pages = [bytes([i]) * 300_000 for i in range(6)]

    def write(page):
        try:
            for _ in range(15):
                write_atomic(path, page)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(page,)) for page in pages]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        if path.exists():
            assert path.read_bytes() in pages
    assert not errors and [p.name for p in tmp_path.iterdir()] == ["page"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "page", b"first")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "page", b"second")
    assert (tmp_path / "page").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    write_atomic(tmp_path / "page", b"")
    assert (tmp_path / "page").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_look_before_the_work(tmp_path):
    with pytest.raises(IsADirectoryError, match="--csv"):
        check_writable(tmp_path, "--csv")
    with pytest.raises(FileNotFoundError, match="no folder"):
        check_writable(tmp_path / "a" / "b")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no folder"):
        check_writable(tmp_path / "file" / "b")
    assert check_writable(tmp_path / "b") == tmp_path / "b" and not (tmp_path / "b").exists()


def test_arrays_come_back_exactly(tmp_path):
    arrays = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.asfortranarray(np.ones((3, 2), np.float32)),
        "c": np.array(5, np.int64),
    }
    save_arrays(tmp_path / "m", arrays, {"x": np.float32(0.1), "deep": {"y": [1, None]}})
    again, about = load_arrays(tmp_path / "m")
    assert about == {"x": float(np.float32(0.1)), "deep": {"y": [1, None]}}
    for name, value in arrays.items():
        assert (
            again[name].dtype == value.dtype
            and again[name].shape == value.shape
            and (again[name] == value).all()
        )
    with pytest.raises(TypeError, match="cannot be kept"):
        save_arrays(tmp_path / "n", {}, {"x": object()})
    assert not (tmp_path / "n").exists()
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "none")
