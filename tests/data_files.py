"""What tests of readers share: small files in the published formats, in a folder of their own."""

import gzip
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agop_book.book import sources

rng = np.random.RandomState(0)


def empty_root(tmp_path, monkeypatch):
    "An empty data root; no cache of this machine can be seen."
    folder = tmp_path / "root"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGOP_BOOK_DATA", str(folder))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "scikit"))
    monkeypatch.setattr(sources, "cache_dir", lambda: tmp_path / "cache")
    return folder


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def idx(values, kind=8):
    values = np.asarray(values)
    head = bytes([0, 0, kind, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return head + values.astype({8: "u1", 12: ">i4"}[kind]).tobytes()


def picture(path, value=0, size=(40, 30), kind="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(kind, size, value if kind == "L" else (value,) * 3).save(path)


def npz(path, **arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return write(path, stream.getvalue())


def pixels(*shape):
    return rng.randint(0, 256, shape).astype(np.uint8)


def digits_files(folder, n=6, prefix=("train", "train"), gz=False, kind=8):
    labels = np.arange(n) % 10 if kind == 8 else np.stack([np.arange(n) % 10] * 8, 1)
    x = pixels(n, 28, 28)
    pack, end = (gzip.compress, ".gz") if gz else (bytes, "")
    write(folder / f"{prefix[0]}-images-idx3-ubyte{end}", pack(idx(x)))
    write(
        folder / f"{prefix[1]}-labels-{'idx1-ubyte' if kind == 8 else 'idx2-int'}{end}",
        pack(idx(labels, kind)),
    )
    return x


SHOW_ERROR = """
try:
    print(len({}))
except (UnreadableData, MemoryError) as error:
    print(type(error).__name__, error)
"""

CAPPED = """
import resource
import numpy, psutil, torch
from agop_book.book.load import load
from agop_book.book.readers import read_idx
from agop_book.files import UnreadableData

top = psutil.Process().memory_info().vms + int({} * 2**30)
resource.setrlimit(resource.RLIMIT_AS, (top, top))
"""


def capped(code, gigabytes=0.4):
    "Run `code` in a process that may take so much address space beyond what its imports took."
    pytest.importorskip("resource", reason="no limits of memory here")
    done = subprocess.run(
        [sys.executable, "-c", CAPPED.format(gigabytes) + code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
