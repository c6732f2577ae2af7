"""The command agop-book: what it offers, in any terminal, and how it ends."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import agop_book
from agop_book.cli import main

COMMAND = "import sys; from agop_book.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("AGOP_BOOK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)


def command(argv, redirect="", **environment):
    "Exit status of the command in a shell line `command | redirect`, and what came out."
    line = f"{sys.executable} -c '{COMMAND}' {argv} {redirect}"
    script = f"{line}; echo status ${{PIPESTATUS[0]}} >&2"
    path = str(Path(agop_book.__file__).parents[1])
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": path, **environment})
    err = done.stderr.decode("latin-1")
    return int(re.search(r"status (\d+)", err)[1]), done.stdout, err


def test_no_verb_is_an_error(capsys):
    assert main([]) == 2
    assert main(["--version"]) == 0 and agop_book.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["reproduce", "--help"]])
def test_answers_without_torch_and_without_the_book(argv):
    heavy = "torch", "pandas", "matplotlib", "nbformat", "agop_book.book.chapters"
    code = (f"import sys; from agop_book.cli import main; code = main({argv!r}); "
            f"sys.exit(code or bool(set({heavy!r}) & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_listing_does_not_import_torch():
    code = ("import sys; from agop_book.cli import main; code = main(['list']); "
            "sys.exit(code or 'torch' in sys.modules or 'matplotlib' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_about(capsys):
    assert main(["about"]) == 0
    text = capsys.readouterr().out
    for word in (agop_book.__version__, "torch", "device cpu", "GiB", "extras missing"):
        assert word in text


def test_list(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert "03_rfm" in text and "rfm-lowrank" in text and "workshop/" not in text


def test_data(capsys):
    assert main(["data"]) == 0
    text = capsys.readouterr().out
    for name in ("celeba", "mnist", "digits"):
        assert name in text


def test_installed_command():
    installed = Path(sys.executable).with_name("agop-book")
    if not installed.exists():
        pytest.skip("agop_book is not installed in this environment")
    done = subprocess.run([installed, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and agop_book.__version__ in done.stdout, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1251", "cp932"])
def test_the_command_in_any_encoding(encoding):
    code, text, err = command("data", PYTHONIOENCODING=encoding)
    assert code == 0 and b"Fern" in text and "Traceback" not in err and "Error" not in err


@pytest.mark.parametrize("argv", ["data", "--help"])
def test_a_reader_that_leaves(argv):
    code, _, err = command(argv, "2>&1 | true")
    assert code == 0 and err == "status 0\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_said():
    code, _, err = command("data", "> /dev/full")
    assert code == 1 and "agop-book: [Errno 28]" in err and "Traceback" not in err
