"""The notebooks and what is made from them agree; every chapter's own assertions hold; nothing private is stored."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("[!_.]*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)

# run apart: the chapters set seeds, dtypes and styles, and nbdev sets IN_TEST
RUN_INLINE_TESTS = """
import sys, pathlib, nbdev.test
passed, seconds = nbdev.test.test_nb(pathlib.Path(sys.argv[1]).resolve(), skip_flags=["notest"])
sys.exit(not passed)
"""


def python(code, *args, cwd, env):
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def files(folder, pattern):
    return {p.name: p.read_bytes() for p in sorted(folder.glob(pattern))}


def different(before, after):
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def test_modules_are_what_the_notebooks_export(copy_book, plain_env, tmp_path):
    book = copy_book(tmp_path, "settings.ini", "nbs", "agop_book/__init__.py")
    python("from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=book, env=plain_env)
    stale = different(files(ROOT / "agop_book", "*.py"), files(book / "agop_book", "*.py"))
    assert not stale, f"agop_book/{', agop_book/'.join(stale)} differ from what nbs/ exports: edit the notebook, then `make export`"


def test_notebooks_are_clean(copy_book, plain_env, tmp_path):
    book = copy_book(tmp_path, "settings.ini", "nbs")
    python("from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=book, env=plain_env)
    unclean = different(files(ROOT / "nbs", "*.ipynb"), files(book / "nbs", "*.ipynb"))
    assert not unclean, f"{', '.join(unclean)} carry metadata that nbdev_clean drops: run `make export`"


@each_notebook
def test_inline_tests(path, copy_book, plain_env, tmp_path):
    copy_book(tmp_path, f"nbs/{path.name}")
    env = plain_env | {"AGOP_BOOK_SCALE": "quick", "AGOP_BOOK_OUT": str(tmp_path / "out"), "PYTHONPATH": str(ROOT)}
    python(RUN_INLINE_TESTS, tmp_path / "nbs" / path.name, cwd=tmp_path, env=env)


def read(path):
    nb = nbformat.read(path, as_version=4)
    return nb.cells, [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]


@each_notebook
def test_stored_outputs(path):
    cells, outputs = read(path)
    assert not [o.ename for o in outputs if o.output_type == "error"], "a stored output is an error: run the chapter again"
    text = [c.source for c in cells] + [str(o.get("text", "")) for o in outputs]
    text += [str(v) for o in outputs for kind, v in o.get("data", {}).items() if not kind.startswith("image/")]
    private = re.findall(r"(?<![\w.<])/(?:work|root|tmp|home|Users)/\S*", re.sub(r"base64,[\w+/=]+", "", "\n".join(text)))
    assert not private, f"paths of one machine: {private[:5]}"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs" / "records").rglob("*.json*")), ids=lambda p: p.name)
def test_records_name_no_machine(path):
    assert not re.findall(r"/(?:work|root|tmp|home|Users)/\S*", path.read_text(encoding="utf-8"))


@each_notebook
def test_title_cell(path):
    "nbdev makes the page's title of the first cell and drops the rest of that cell from the site."
    first = read(path)[0][0]
    lines = [line for line in first.source.splitlines() if line.strip()]
    assert first.cell_type == "markdown" and re.match(r"# \S", lines[0]), "the first cell must be `# Title`, `> subtitle`"
    assert len(lines) == 2 and lines[1].startswith("> "), f"move this to a cell of its own, or it is lost: {lines[2:] or lines[1:]}"


@each_notebook
def test_site_shows_the_code(path):
    "The site hides the source of `#| export` cells: where something public is defined, `#| exports` shows it."
    for cell in read(path)[0]:
        if cell.cell_type == "code" and re.match(r"#\|\s*export\s*$", cell.source, re.M):
            defined = [n.name for n in ast.parse(cell.source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
            assert all(name.startswith("_") for name in defined), f"use `#| exports` where {', '.join(defined)} is defined"


def test_colab_cells():
    "Each chapter opens in Colab as itself and installs the package there, and only there."
    for path in NOTEBOOKS:
        cells, _ = read(path)
        badge = f"https://colab.research.google.com/github/agop-book/agop_book/blob/main/nbs/{path.name}"
        if path.stem[0].isdigit():
            assert any(badge in c.source for c in cells if c.cell_type == "markdown"), f"{path.name} lacks its Colab badge"
            assert any("#| hide" in c.source and '"google.colab" in sys.modules' in c.source and "\n    %pip install" in c.source
                       for c in cells), f"{path.name} lacks the hidden cell that installs agop_book on Colab"


def test_readme_example(plain_env, tmp_path):
    "The README's own lines, and the number that stands beside them."
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S))
    check = "\nassert abs(model.score(X_test, y_test) - 0.923) < 0.002"
    python(code + check, cwd=tmp_path, env=plain_env | {"PYTHONPATH": str(ROOT)})
