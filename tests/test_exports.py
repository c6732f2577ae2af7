"""The notebooks and what is made from them agree; nothing private is stored; addresses are one."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import notebooks

ROOT = Path(__file__).parents[1]
NOTEBOOKS = notebooks()
PRIVATE = re.compile(r"(?<![\w.<])/(?:work|root|tmp|home|Users)/\S*")
each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def python(code, *args, cwd, env):
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, env=env,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def read(name):
    "Cells and outputs of a notebook."
    nb = nbformat.read(ROOT / "nbs" / name, as_version=4)
    return nb.cells, [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]


def different(folder, copy, pattern):
    "Files that differ between a folder and its copy, or are in one of them only."
    before, after = ({p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob(pattern)
                      if ".ipynb_checkpoints" not in p.parts} for root in (folder, copy))
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def test_modules_are_what_the_notebooks_export(copy_book, plain_env, tmp_path):
    by_hand = ["agop_book/__init__.py", "agop_book/book/__init__.py"]
    book = copy_book(tmp_path, "settings.ini", "nbs", *by_hand)
    python("from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=book, env=plain_env)
    stale = different(ROOT / "agop_book", book / "agop_book", "*.py")
    assert not stale, f"edit the notebooks, then `make export`: in agop_book/ {stale}"


def test_notebooks_are_clean(copy_book, plain_env, tmp_path):
    book = copy_book(tmp_path, "settings.ini", "nbs")
    python("from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=book, env=plain_env)
    unclean = different(ROOT / "nbs", book / "nbs", "*.ipynb")
    assert not unclean, f"run `make export`: there is stray metadata in nbs/ {unclean}"


@each_notebook
def test_stored_outputs(name):
    cells, outputs = read(name)
    errors = [o.ename for o in outputs if o.output_type == "error"]
    assert not errors, "a stored output is an error: run the notebook again"
    text = [c.source for c in cells] + [str(o.get("text", "")) for o in outputs]
    text += [str(v) for o in outputs for kind, v in o.get("data", {}).items()
             if not kind.startswith("image/")]
    private = PRIVATE.findall(re.sub(r"base64,[\w+/=]+", "", "\n".join(text)))
    assert not private, f"paths of one machine: {private[:5]}"


def test_records_name_no_machine():
    paths = sorted((ROOT / "nbs/records").rglob("*.json*"))
    found = {p.name: PRIVATE.findall(p.read_text(encoding="utf-8")) for p in paths}
    assert found and not {name: private for name, private in found.items() if private}


@each_notebook
def test_title_cell(name):
    "nbdev makes the page's title of the first cell and drops the rest of that cell from the site."
    first = read(name)[0][0]
    lines = [line for line in first.source.splitlines() if line.strip()]
    titled = first.cell_type == "markdown" and re.match(r"# \S", lines[0])
    assert titled, "the first cell must be `# Title`, `> subtitle`"
    assert len(lines) == 2 and lines[1].startswith("> "), f"a cell of its own for {lines[1:]}"


@each_notebook
def test_site_shows_the_code(name):
    "The site hides the source of `#| export` cells: `#| exports` shows what is public."
    for cell in read(name)[0]:
        if cell.cell_type == "code" and re.match(r"#\|\s*export\s*$", cell.source, re.M):
            defined = [n.name for n in ast.parse(cell.source).body
                       if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
            public = [n for n in defined if not n.startswith("_")]
            assert not public, f"use `#| exports` where {', '.join(public)} is defined"


@each_notebook
def test_colab(name, settings):
    "Each notebook opens in Colab as itself, and installs the package there, and only there."
    cells, _ = read(name)
    repository = settings["git_url"].removeprefix("https://github.com/")
    address = f"https://colab.research.google.com/github/{repository}/blob/main/nbs/{name}"
    text = "".join(c.source for c in cells if c.cell_type == "markdown")
    assert text.count("colab-badge.svg") == text.count(f"]({address})") == 1
    installs = [c.source for c in cells if "%pip install" in c.source and c.cell_type == "code"]
    line = r'    %pip install -q "agop_book\[book(,\w+)*\] @ git\+' + re.escape(settings["git_url"])
    hidden = r'#\| hide\nimport sys\nif "google.colab" in sys.modules:\n'
    assert len(installs) == 1 and re.fullmatch(f'{hidden}{line}"', installs[0]), installs


FILES = ("settings.ini", "nbs", "docs", "README.md", "CONTRIBUTING.md", "CITATION.cff")


def write_addresses(book, env):
    done = subprocess.run([sys.executable, book / "docs/address.py"], cwd=book, env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_address_is_that_of_the_settings(copy_book, plain_env, tmp_path):
    assert write_addresses(copy_book(tmp_path, *FILES), plain_env) == "", "run `make export`"


def test_a_new_address_reaches_every_file(copy_book, plain_env, settings, tmp_path):
    book = copy_book(tmp_path, *FILES)
    old, new = settings["git_url"], "https://github.com/some-one/a.book"
    text = (book / "settings.ini").read_text(encoding="utf-8")
    text = text.replace(old, new).replace(settings["doc_host"], "https://book.example")
    (book / "settings.ini").write_text(text, encoding="utf-8")
    write_addresses(book, plain_env)
    texts = [p for p in book.rglob("*") if p.suffix in (".ipynb", ".md", ".cff", ".yml")]
    parts = (old.removeprefix("https://"), settings["doc_host"], old.partition("github.com/")[2])
    left = [p.name for p in texts for part in parts if part in p.read_text(encoding="utf-8")]
    assert len(texts) > len(NOTEBOOKS) and left == []
    assert f"git+{new}" in (book / "nbs" / NOTEBOOKS[0]).read_text(encoding="utf-8")
    assert write_addresses(book, plain_env) == ""


def test_readme_example(plain_env, tmp_path):
    "The README's own lines, and the number that stands beside them."
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.S))
    check = "\nassert abs(model.score(X_test, y_test) - 0.923) < 0.002"
    python(code + check, cwd=tmp_path, env=plain_env | {"PYTHONPATH": str(ROOT)})
