"""The rules that ruff has none for, over the syntax trees of the package, the notebooks, the tests and the site's code.

`python tests/test_style.py FILE ...` prints what is wrong with some modules or notebooks.
"""
import ast
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p for p in ROOT.glob("agop_book/**/*.py") if p.name not in ("_modidx.py", "all.py"))
NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
OTHERS = sorted([*ROOT.glob("tests/*.py"), *ROOT.glob("docs/*.py"), ROOT / "setup.py"])
BODY, MODULE, NAMES, MEDIAN = 25, 300, 12, 45
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)


def name(path):
    return str(path.relative_to(ROOT))


def code(path):
    "The source of a module, or of a notebook's code cells (without its magic commands)."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    cells = nbformat.reads(text, as_version=4).cells
    lines = "\n\n".join(c.source for c in cells if c.cell_type == "code").splitlines()
    return "\n".join("pass" if line == "%" else line.replace("%pip", "pass  #") for line in lines)


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def too_long(tree):
    "Functions whose bodies, signature and docstring not counted, have more than 25 lines."
    estimators = {id(f) for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body
                  if isinstance(f, FUNCTIONS) and f.name == "__init__"}
    for node in ast.walk(tree):
        if not isinstance(node, FUNCTIONS) or id(node) in estimators:
            continue
        body = node.body[1:] if is_docstring(node.body[0]) else node.body
        length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        if length > BODY:
            yield f"line {node.lineno}: {node.name} has a body of {length} lines, more than {BODY}"


def crowded(tree):
    "Lines with more than one statement; `if ...:` with a return, raise, continue or an ellipsis is none."
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody", "handlers"):
            block = getattr(node, field, None)
            if not isinstance(block, list):
                continue
            for before, after in zip(block, block[1:]):
                if after.lineno == before.end_lineno:
                    yield f"line {after.lineno}: more than one statement"
            if field in ("body", "orelse") and block and same_line(node, block[0], field):
                yield f"line {block[0].lineno}: more than one statement"


def same_line(node, first, field):
    "Whether `first` of a compound statement stands on its header's line and must not."
    if not isinstance(first, ast.stmt) or isinstance(node, ast.Module):
        return False
    ends = (ast.Return, ast.Raise, ast.Continue)
    if isinstance(node, ast.If) and field == "body" and isinstance(first, ends):
        return False
    if isinstance(node, DEFINITIONS) and isinstance(getattr(first, "value", None), ast.Constant):
        return False                                        # a docstring, or `...`
    if isinstance(node, ast.If) and field == "orelse" and isinstance(first, ast.If):
        return False                                        # elif
    return first.lineno == header_end(node, field)


def header_end(node, field):
    "The last line of what comes before the block."
    if field == "orelse":
        return node.body[-1].end_lineno + 1
    parts = [getattr(node, part, None) for part in ("test", "iter", "returns", "subject", "type")]
    parts += [item.context_expr for item in getattr(node, "items", [])]
    parts += getattr(node, "bases", [])
    if isinstance(node, FUNCTIONS):
        parts += [a for a in (*node.args.args, *node.args.kwonlyargs, *node.args.defaults)]
    ends = [part.end_lineno for part in parts if isinstance(part, ast.AST)]
    return max([node.lineno, *ends]) if hasattr(node, "lineno") else 0


def named_lambdas(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Lambda):
            yield f"line {node.lineno}: a lambda bound to a name; use def"


def private_imports(tree):
    "Private names of this package's other modules."
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("agop_book")):
            for alias in node.names:
                if alias.name.startswith("_") and alias.name != "__version__":
                    yield f"line {node.lineno}: the private name {alias.name} of {node.module}"
                modules[alias.asname or alias.name] = node.module or ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr[1:2] != "_":
            if isinstance(node.value, ast.Name) and modules.get(node.value.id) in ("", "agop_book", "agop_book.book"):
                yield f"line {node.lineno}: the private name {node.attr} of {node.value.id}"


def undocumented(tree, lines):
    "Parameters of public functions, three or more of them, without a comment where they stand."
    for node in tree.body:
        if not isinstance(node, FUNCTIONS) or node.name.startswith("_"):
            continue
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in args if "#" not in lines[a.lineno - 1].partition(a.arg)[2]]
        if bare:
            yield f"line {node.lineno}: {node.name} does not say what {', '.join(bare)} is"


def public_names(tree):
    found = set()
    for node in tree.body:
        if isinstance(node, DEFINITIONS):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return sorted(n for n in found if not n.startswith("_"))


def size(tree, lines):
    "A module of more than 300 lines or 12 public names."
    if len(lines) > MODULE:
        yield f"{len(lines)} lines, more than {MODULE}"
    if len(names := public_names(tree)) > NAMES:
        yield f"{len(names)} public names, more than {NAMES}: {', '.join(names)}"


def faults(path):
    "Everything that is wrong with one file, as lines of text."
    source = code(path)
    tree, lines = ast.parse(source), source.splitlines()
    found = [*too_long(tree), *crowded(tree), *named_lambdas(tree)]
    if path in MODULES:
        found += [*private_imports(tree), *undocumented(tree, lines), *size(tree, lines)]
    return found


@pytest.mark.parametrize("path", [*MODULES, *NOTEBOOKS, *OTHERS], ids=name)
def test_rules(path):
    assert faults(path) == []


def test_median_line():
    "Half of the package's lines of code are short."
    lines = [line for path in MODULES for line in code(path).splitlines() if line.strip()]
    assert statistics.median(map(len, lines)) < MEDIAN


def test_ruff():
    "100 columns, complexity of at most 10, nothing unused: the configuration is in pyproject.toml."
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for fault in faults(Path(argument).resolve()):
            print(f"{argument}: {fault}")
