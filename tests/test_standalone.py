"""Every notebook alone, as on Colab: in an empty folder, with nothing but the installed wheel and
no network. This is the one run of each: what its cells assert has to hold. A study that several
notebooks show is run by the first; its rows are what the others find."""
import shutil
import subprocess
from pathlib import Path

import alone
import nbformat
import pytest
from conftest import notebooks

ROOT = Path(__file__).parents[1]
NOTEBOOKS = notebooks()


@pytest.fixture
def env(installed, plain_env, tmp_path):
    "No settings of the book, no data, no caches, no way to the network; the wheel comes first."
    home = tmp_path / "home"
    home.mkdir()
    blocked = "http://127.0.0.1:9"                # nothing listens there: a download fails at once
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), blocked)
    return plain_env | proxies | dict(
        PYTHONPATH=str(installed), HOME=str(home), XDG_CACHE_HOME=str(home / "cache"),
        IPYTHONDIR=str(home / "ipython"), no_proxy="127.0.0.1,localhost")


def files(folder, pattern):
    return {p.relative_to(folder).as_posix() for p in folder.rglob(pattern)
            if ".ipynb_checkpoints" not in p.parts}


def test_the_sidebar_lists_every_notebook_once():
    assert len(NOTEBOOKS) == len(set(NOTEBOOKS)), "nbs/sidebar.yml lists a notebook twice"
    assert set(NOTEBOOKS) == files(ROOT / "nbs", "*.ipynb"), "nbs/sidebar.yml is out of date"


def test_the_wheel_carries_the_book(installed):
    inside = installed / "agop_book/nbs"
    assert files(inside, "*.ipynb") == set(NOTEBOOKS) and (inside / "sidebar.yml").exists()
    assert files(installed / "agop_book", "*.py") == files(ROOT / "agop_book", "*.py")
    assert files(installed / "agop_book", "*.html") == files(ROOT / "agop_book", "*.html")
    for folder in ("records", "weights", "results"):
        stored = {p.name for p in (ROOT / "nbs" / folder).iterdir() if p.is_file()}
        assert stored == {p.name for p in (inside / folder).iterdir()}


@pytest.fixture(scope="session")
def studies(once):
    "A folder of finished rows that all notebooks share."
    return once("studies", lambda folder: None)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_alone(name, installed, studies, env, tmp_path):
    nb = nbformat.read(ROOT / "nbs" / name, as_version=4)
    home = f"import agop_book as _book\nassert _book.__file__.startswith({str(installed)!r})"
    nb.cells.insert(0, nbformat.v4.new_code_cell(home))
    path = tmp_path / "folder" / Path(name).name
    path.parent.mkdir()
    (path.parent / "agop_book_out").mkdir()
    (path.parent / "agop_book_out/results").symlink_to(studies)
    nbformat.write(nb, path)
    failure = alone.start(path, installed, env, tmp_path / "log.txt")
    if failure:
        pytest.fail(failure, pytrace=False)


@pytest.fixture
def command(installed, env, tmp_path):
    "command(*arguments): the finished process of agop-book from the wheel."
    def run(*arguments):
        program = shutil.which("agop-book", path=str(installed / "bin"))
        return subprocess.run([program, *arguments], cwd=tmp_path, env=env,
                              capture_output=True, text=True, timeout=300)
    return run


def test_command_from_the_wheel(command):
    done = command("list")
    assert done.returncode == 0, done.stderr
    lessons = [Path(name).stem for name in NOTEBOOKS if name[0].isdigit()]
    assert [name for name in lessons if name not in done.stdout] == []
    done = command("data")
    assert done.returncode == 0 and "digits" in done.stdout, done.stderr
    done = command("reproduce", "no-such-figure")
    assert done.returncode == 2 and "no-such-figure" in done.stderr
