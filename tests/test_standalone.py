"""Every chapter alone, as on Colab: one notebook in an empty folder, and nothing but the installed wheel."""
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture(scope="session")
def site(tmp_path_factory, copy_book):
    """A folder with the wheel installed in it, built from a copy of the sources so that the checkout stays clean."""
    source, dist, site = (tmp_path_factory.mktemp(n) for n in ("source", "dist", "site"))
    copy_book(source, "agop_book", "nbs", "settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    for build in (lambda: ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", dist, source],
                  lambda: ["install", "--no-deps", "--no-index", "--target", site, next(dist.glob("*.whl"))]):
        done = subprocess.run(pip + build(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return site


@pytest.fixture
def env(site, plain_env, tmp_path):
    """No settings of the book, no data folder, no caches, no way to the network; the wheel before the checkout."""
    home = tmp_path / "home"
    home.mkdir()
    blocked = "http://127.0.0.1:9"                                      # nothing listens there: a download fails at once
    return plain_env | dict(PYTHONPATH=str(site), HOME=str(home), XDG_CACHE_HOME=str(home / "cache"), IPYTHONDIR=str(home / "ipython"),
                      http_proxy=blocked, https_proxy=blocked, HTTP_PROXY=blocked, HTTPS_PROXY=blocked, no_proxy="127.0.0.1,localhost")


def test_wheel_carries_the_chapters(site):
    assert sorted(p.name for p in (site / "agop_book/nbs").glob("*.ipynb")) == CHAPTERS
    assert {p.stem for p in (site / "agop_book").glob("*.py")} >= {"figures", "reproduce", "all", "__init__"}
    stored = ROOT / "nbs/records"
    if stored.is_dir():
        assert {p.name for p in stored.iterdir()} == {p.name for p in (site / "agop_book/nbs/records").iterdir()}


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_alone(name, site, env, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    nb = nbformat.read(ROOT / "nbs" / name, 4)
    check = f"import agop_book as _a; assert _a.__file__.startswith({str(site)!r}), _a.__file__"
    nb.cells.insert(0, nbformat.v4.new_code_cell(check))                # the wheel's package, not the checkout's
    nbformat.write(nb, folder / name)
    run = ("import sys, nbformat; from nbclient import NotebookClient; nb = nbformat.read(sys.argv[1], 4)\n"
           "from agop_book.book.chapters import runs as _runs\n"
           "for c in nb.cells:\n    if c.cell_type == 'code' and not _runs(c): c.source = ''\n"
           "NotebookClient(nb, timeout=300, kernel_name='python3', resources={'metadata': {'path': '.'}}).execute()")
    done = subprocess.run([sys.executable, "-c", run, name], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)[-4000:]


def test_command_from_the_wheel(site, env, tmp_path):
    run = lambda *argv: subprocess.run([sys.executable, site / "bin/agop-book", *argv], cwd=tmp_path, env=env, capture_output=True, text=True)
    done = run("list")
    assert done.returncode == 0, done.stderr
    for name in CHAPTERS:
        assert name.removesuffix(".ipynb") in done.stdout
    done = run("data")
    assert done.returncode == 0 and "digits" in done.stdout, done.stderr
    done = run("reproduce", "no-such-figure")
    assert done.returncode == 2 and "no-such-figure" in done.stderr
