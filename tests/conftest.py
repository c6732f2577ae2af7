"""What the tests of the whole book share: a scratch copy of it, the installed wheel, and an
environment without the caller's settings."""
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = ("agop_book", "nbs", "settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="session")
def settings():
    "The settings of the book."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def notebooks():
    "Paths of the notebooks within nbs/, in the order of the book: sidebar.yml names each once."
    sidebar = yaml.safe_load((ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8"))
    parts = sidebar["website"]["sidebar"]["contents"]
    return [name for part in parts
            for name in (part["contents"] if isinstance(part, dict) else [part])]


@pytest.fixture(scope="session")
def copy_book():
    "copy_book(folder, *names): the named parts of the book in a folder of their own."
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")

    def copy(to, *names):
        for name in names:
            source, target = ROOT / name, Path(to) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=skip)
            else:
                shutil.copy2(source, target)
        return Path(to)
    return copy


@pytest.fixture(scope="session")
def installed(tmp_path_factory, copy_book):
    "A folder with the wheel installed in it, from a copy of the sources: the checkout stays clean."
    source, dist, folder = (tmp_path_factory.mktemp(n) for n in ("source", "dist", "installed"))
    copy_book(source, *SOURCES)

    def pip(*arguments):
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", dist, source)
    pip("install", "--no-deps", "--no-index", "--target", folder, next(dist.glob("*.whl")))
    return folder


@pytest.fixture(scope="session")
def plain_env():
    "The environment of a reader who has set nothing: quick scale, no data folder."
    ours = ("AGOP_BOOK_", "IN_TEST", "QUARTO_")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)}


@pytest.fixture
def two_processes(tmp_path):
    """two_processes(code, timeout=300): run `code` under torchrun with two gloo processes.

    It finds this folder in sys.argv[2] and stores what it found at sys.argv[1], whose path comes
    back."""
    def run(code, timeout=300):
        worker, found = tmp_path / "worker.py", tmp_path / "found.pt"
        worker.write_text(code)
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node=2"]
        done = subprocess.run([*torchrun, str(worker), str(found), str(ROOT / "tests")],
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                              capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr[-3000:]
        return found
    return run
