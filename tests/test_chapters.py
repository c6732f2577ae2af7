"""Chapters, read but not run: their figures, their fingerprints, their order."""

import shutil
from pathlib import Path

import nbformat
import pytest
from tinybooks import IMPORTS, chapter, sidebar

import agop_book
from agop_book.book.chapters import book_map, chapters, closure
from agop_book.book.run import notebooks
from agop_book.terminal import UsageError


@pytest.fixture
def book(tmp_path):
    return tmp_path / "book"


def test_figures_are_found_by_reading(book):
    chapter(
        book, "01_a", "# A title\n> sub", "#| export\ndef f():\n    return record('never', 1)",
        "%matplotlib inline\n!ls\nx = 1", "if x:\n    %time 1\n    record('a-1', fig, measured={})",
        "#| eval: false\nrecord('skipped', fig)", "record(id='a-2', fig=1)",
        "%%bash\nrecord('x')", "this is ( not python, record('y')")
    chapter(book, "index", "# Index")
    chapter(book, "zz", "# Last but one")
    a, z, index = chapters(book)
    assert (a.name, a.title, a.subtitle) == ("01_a", "A title", "sub")
    assert (z.name, z.subtitle, index.name) == ("zz", "", "index")
    assert a.figures == {"never": 1, "a-1": 3, "a-2": 5}


# --- fingerprints

def test_fingerprint_follows_code_not_prose(book):
    def of(*sources):
        chapter(book, "01_a", *sources)
        return chapters(book)[0].fingerprint

    base = of("# A", IMPORTS, "x = 1")
    assert base == of("# Another title", IMPORTS, "x = 1")
    assert base == of("# A", IMPORTS, "x = 1", "#| eval: false\ny = 2")
    assert base != of("# A", IMPORTS, "x = 2")


def test_fingerprint_follows_imported_modules(book, monkeypatch, tmp_path):
    chapter(book, "01_a", "# A", "from agop_book.rfm import RFMRegressor")
    chapter(book, "02_b", "# B", "import agop_book.book.run")
    chapter(book, "03_c", "# C", "from agop_book import RFMRegressor")

    def fingerprints():
        return [c.fingerprint for c in chapters(book)]

    before, copy = fingerprints(), tmp_path / "copy/agop_book"
    package = Path(agop_book.__file__).parent
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    kernels = copy / "kernels.py"  # rfm imports it, run does not
    kernels.write_text(kernels.read_text() + "\n# a comment\n")
    monkeypatch.setattr(agop_book, "__file__", str(copy / "__init__.py"))
    assert before == fingerprints()
    kernels.write_text(kernels.read_text() + "changed = True\n")
    after = fingerprints()
    assert [a == b for a, b in zip(after, before)] == [False, True, False]


@pytest.mark.parametrize("source, found, not_found", [
    ("import agop_book.book.records as r", {"book.records", "book.run", "files"}, {"rfm"}),
    ("from agop_book.book import sweep", {"book.sweep", "book.records"}, {"book.report"}),
    ("def f():\n    from agop_book.agop import agop", {"agop", "arrays"}, {"book.run"}),
    ("from agop_book.all import *", {"all", "rfm", "cntk", "draw"}, {"book.report"}),
    ("from ...nowhere import x\nimport numpy.linalg", set(), {"nowhere"}),
])
def test_closure_of_imports(source, found, not_found):
    "Relative imports with one dot and with two lead into the package and its book."
    names = {name.removeprefix("agop_book.") for name in closure([source])}
    assert found <= names and not not_found & names


# --- the order of a book

def test_sidebar_orders_and_names(book):
    for name in ("index", "b", "shop/c", "a"):
        chapter(book, name, f"# The {name} | x", "x = 1")
    parts = "[index.ipynb, {section: One, contents: [b.ipynb, shop/c.ipynb]}, a.ipynb]"
    sidebar(book, parts)
    found = chapters(book)
    order = [(c.name, c.part) for c in found]
    assert order == [("b", "One"), ("shop/c", "One"), ("a", ""), ("index", "")]
    text = book_map(book).data
    assert "**One**\n\n- [The b | x](b.ipynb): " in text
    assert "shop/c" not in text and "index" not in text


def test_facts_of_a_lesson(book):
    line = ("**Before this:** [A](a.ipynb), [B](b.ipynb) · **Reading time:** 5 minutes · "
            "**Running time:** 1 minute at quick scale, 2 minutes at book scale · **Data:** none")
    chapter(book, "a", "# A")
    nb = nbformat.read(book / "a.ipynb", as_version=4)
    nb.cells.insert(1, nbformat.v4.new_markdown_cell(f"A question.\n\n{line}"))
    nbformat.write(nb, book / "a.ipynb")
    facts = chapters(book)[0].facts
    assert facts["Before this"] == "[A](a.ipynb), [B](b.ipynb)"
    assert facts["Reading time"] == "5 minutes" and facts["Data"] == "none"
    assert "*5 minutes to read; 1 minute at quick" in book_map(book).data


@pytest.mark.parametrize("text", ["website: 3", "website: {sidebar: [", "[]", ""])
def test_damaged_sidebar(book, text):
    chapter(book, "a", "# A")
    (book / "sidebar.yml").write_text(text)
    with pytest.raises(UsageError, match="sidebar.yml is no list of chapters"):
        chapters(book)


def test_a_chapter_that_the_sidebar_promises(book):
    chapter(book, "a", "# A")
    sidebar(book, "[a.ipynb, b.ipynb]")
    with pytest.raises(UsageError, match="b.ipynb is not a notebook"):
        chapters(book)


def test_every_notebook_of_the_book_stands_in_its_sidebar():
    folder = notebooks()
    files = {path.relative_to(folder).with_suffix("").as_posix()
             for path in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    own = [c.name for c in chapters()]
    assert sorted(own) == sorted(files) and own[-1] == "index"


def test_every_figure_of_the_book_has_one_chapter():
    ids = [id for c in chapters() for id in c.figures]
    assert len(ids) == len(set(ids))
    stored = {path.stem for path in (notebooks() / "records").glob("*.json")}
    assert stored <= set(ids)


def test_the_map_names_every_chapter_with_its_subtitle():
    text = book_map().data
    for c in chapters()[:-1]:
        if c.is_lesson:
            assert f"({c.name}.ipynb): {c.subtitle}" in text and c.subtitle
