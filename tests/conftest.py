"""What the tests of the whole book share: a scratch copy of it, the installed wheel, and an
environment without the caller's settings."""
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch.utils.checkpoint
import yaml
from filelock import FileLock

from agop_book import memory
from agop_book.book.costs import PeakMemory

ROOT = Path(__file__).parents[1]
SOURCES = ("agop_book", "nbs", "settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE")

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
         "--disable-background-networking --disable-component-update --disable-sync").split()
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


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
def once(tmp_path_factory):
    "once(name, make): the folder of that name, made by make(folder) for all of pytest's processes."
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name, make):
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not (folder / "finished").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                (folder / "finished").touch()
        return folder
    return get


@pytest.fixture(scope="session")
def installed(once, copy_book):
    "A folder with the wheel installed in it, from a copy of the sources: the checkout stays clean."
    def pip(*arguments):
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def make(folder):
        source, dist = copy_book(folder / "source", *SOURCES), folder / "dist"
        pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", dist, source)
        wheel = next(dist.glob("*.whl"))
        pip("install", "--no-deps", "--no-index", "--target", folder / "packages", wheel)
    return once("installed", make) / "packages"


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


@pytest.fixture
def planned_and_taken(monkeypatch):
    "planned_and_taken(call): bytes that `memory.plan` gave for a call, and that it took."
    plans, plan = [], memory.plan

    def planned(*args, **options):
        plans.append(plan(*args, **options))
        return plans[-1]

    def run(call):
        for name, module in list(sys.modules.items()):
            if name.startswith("agop_book") and getattr(module, "plan", None) is plan:
                monkeypatch.setattr(module, "plan", planned)
        with PeakMemory() as taken:
            call()
        return max(plans), taken.peak
    return run


@pytest.fixture
def seed():
    "The same random numbers in every test."
    torch.manual_seed(0)


@pytest.fixture
def nothing_left_behind():
    "Settings of torch are afterwards as they were."
    yield
    assert torch.backends.mha.get_fastpath_enabled()
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)


@pytest.fixture(scope="session")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        pytest.skip("no chromium on the PATH (Debian: apt install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=[*FLAGS, OFFLINE])
        yield browser
        browser.close()
