"""What the tests of the whole book share: a scratch copy of it, and an environment without the caller's settings."""
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def copy_book():
    "copy_book(folder, *names): the named parts of the book in a folder of their own."
    def copy(to, *names):
        for name in names:
            source, target = ROOT / name, Path(to) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
            else:
                shutil.copy2(source, target)
        return Path(to)
    return copy


@pytest.fixture(scope="session")
def plain_env():
    "The environment of a reader who has set nothing: quick scale, no data folder."
    ours = ("AGOP_BOOK_", "IN_TEST", "QUARTO_")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)}
