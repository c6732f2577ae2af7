"""Scale, folder, bars and steady output of a run; the device it uses; what a missing extra says."""

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from agop_book.book import run
from agop_book.terminal import steady_output
from agop_book.devices import device
from agop_book.extras import MissingExtra, extra


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("AGOP_BOOK_SCALE", "AGOP_BOOK_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path / "out"))
    return tmp_path / "out"


def test_scale_and_pick(monkeypatch):
    assert run.scale() == "quick" and run.pick(quick=1, book=2, paper=3) == 1
    monkeypatch.setenv("AGOP_BOOK_SCALE", "paper")
    assert run.pick(quick=1, book=2, paper=3) == 3 and run.pick(quick=1) == 1
    assert run.pick(quick=1, book=None) is None  # None is a value, not "left out"
    monkeypatch.setenv("AGOP_BOOK_SCALE", "Quick")
    with pytest.raises(ValueError, match="'Quick'.*quick, book, paper"):
        run.scale()


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "mps:1", "CUDA"])
def test_unknown_device(name):
    with pytest.raises(ValueError, match="auto, cpu, cuda, cuda:N or mps"):
        device(name)


def test_device(monkeypatch):
    assert device("cpu") == device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device() == device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda'.*no GPU.*cpu"):
        device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device() == torch.device("cuda") and device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="cuda:2.*cuda:1"):
        device("cuda:2")
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "cpu")
    assert device() == torch.device("cpu")


def test_unwritable_folder(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path / "file" / "below"))
    with pytest.raises(PermissionError, match="cannot be written.*AGOP_BOOK_OUT"):
        run.out_dir()


def test_default_folder_is_here(monkeypatch, tmp_path):
    monkeypatch.delenv("AGOP_BOOK_OUT")
    assert run.out_dir() == tmp_path / "agop_book_out"


def test_folders_can_be_looked_at_by_many_threads(fresh):
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(lambda k: run.out_dir(), range(400)))) == 400
    assert not list(fresh.iterdir())


def test_output_survives_encodings_and_readers_that_leave():
    raw = io.BytesIO()
    outer, sys.stdout = sys.stdout, io.TextIOWrapper(raw, "ascii")
    try:
        with steady_output():
            print("Fernández 数")
        sys.stdout.flush()
        assert raw.getvalue() == b"Fern\\xe1ndez \\u6570\n" and sys.stdout.errors == "strict"
    finally:
        sys.stdout = outer


def test_a_bar_on_a_terminal_counts(capsys):
    assert list(run.progress("abc", desc="letters")) == ["a", "b", "c"]
    assert "letters: 100%" in capsys.readouterr().err


# --- extras

def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(MissingExtra, match=r'^nowhere is not.*pip install "agop_book\[vision\]"'):
        with extra("vision"):
            import nowhere.inside  # noqa: F401


@pytest.mark.parametrize("code", ["import agop_book.nowhere", "raise ImportError('broken')"])
def test_other_errors_of_an_import_stay_as_they_are(code):
    with pytest.raises(ImportError) as caught:
        with extra("book"):
            exec(code)
    assert not isinstance(caught.value, MissingExtra)


WITHOUT = """
import sys, json
for name in ("matplotlib", "nbformat", "nbclient", "yaml", "jinja2", "PIL", "IPython"):
    sys.modules[name] = None
found = {}
for name in ("draw", "book", "book.records", "book.chapters"):
    try:
        __import__(f"agop_book.{name}")
    except ImportError as error:
        found[name] = str(error)
from agop_book.cli import main
codes = main(["about"]), main(["--version"]), main(["list"])
print(json.dumps([found, codes]))
"""


def test_what_needs_the_extra_names_it():
    "Without the extra the book says what to install, and so does the command; the rest works."
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True,
                          env={**os.environ, "AGOP_BOOK_DEVICE": "cpu"})
    assert done.returncode == 0, done.stderr
    found, codes = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4 and all('pip install "agop_book[book]"' in e for e in found.values())
    assert codes == [0, 0, 1] and 'pip install "agop_book[book]"' in done.stderr
