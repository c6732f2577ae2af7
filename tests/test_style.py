"""The rules that ruff has none for, over the syntax trees of the package, the notebooks, the tests
and the site's code.

`python tests/test_style.py FILE ...` prints what is wrong with some modules or notebooks.
"""
import ast
import json
import re
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GENERATED = ("_modidx.py", "all.py")
MODULES = sorted(p for p in ROOT.glob("agop_book/**/*.py") if p.name not in GENERATED)
NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
OTHERS = sorted([*ROOT.glob("tests/*.py"), *ROOT.glob("docs/*.py"), ROOT / "setup.py"])
BODY = 25                 # lines of a function
MODULE = 300              # lines of a module
NAMES = 12                # public names of a module
MEDIAN = 45               # characters a line
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
MAGIC = re.compile(r"^(\s*)[%!].*", re.M)


def name(path):
    return path.relative_to(ROOT).as_posix()


def code(path):
    "The source of a module, or of a notebook's code cells (without lines of IPython's own)."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    sources = ["".join(c["source"]) for c in cells]
    return "\n\n".join(MAGIC.sub(r"\1pass", s) for s in sources if not s.startswith("%%"))


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


def crowded(tree, lines):
    """Statements that share a line with what stands before them.

    `if ...: return`, raise or continue may, and a definition's docstring or ellipsis."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            for statement in block if isinstance(block, list) else ():
                before = lines[statement.lineno - 1].encode()[:statement.col_offset]
                if before.strip() and not (statement is block[0] and allowed(node, field, block)):
                    yield f"line {statement.lineno}: more than one statement"


def allowed(node, field, block):
    "Whether the first statement of a block may stand on the line of what it belongs to."
    if isinstance(node, ast.If) and field == "body":
        return isinstance(block[0], (ast.Return, ast.Raise, ast.Continue))
    constant = isinstance(getattr(block[0], "value", None), ast.Constant)
    return isinstance(node, DEFINITIONS) and isinstance(block[0], ast.Expr) and constant


def named_lambdas(tree):
    "Lambdas bound to names, also one by one or as a branch."
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            values += [b for v in values if isinstance(v, ast.IfExp) for b in (v.body, v.orelse)]
            if any(isinstance(value, ast.Lambda) for value in values):
                yield f"line {node.lineno}: a lambda bound to a name; use def"


def dense(tree):
    "Conditional expressions in one another, more than two assignments in one."
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            if any(isinstance(part, ast.IfExp) for part in (node.test, node.body, node.orelse)):
                yield f"line {node.lineno}: conditional expressions in one another"
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            count = len(node.value.elts)
            if count > 2 and isinstance(node.targets[0], ast.Tuple):
                yield f"line {node.lineno}: {count} assignments in one"


def dotted(node):
    "The names of `a.b.c`; empty for anything else."
    if isinstance(node, ast.Name):
        return [node.id]
    parts = dotted(node.value) if isinstance(node, ast.Attribute) else []
    return [*parts, node.attr] if parts else []


def is_private(name):
    "_name, but neither __name__ nor what IPython calls (_repr_html_)."
    return name.startswith("_") and not name.endswith("_")


def imported(tree):
    "Local name -> what it is called from outside, for what is imported of this package."
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname or "agop_book": a.name if a.asname else "agop_book"
                      for a in node.names if a.name.split(".")[0] == "agop_book"}
        elif isinstance(node, ast.ImportFrom):
            if node.level or (node.module or "").split(".")[0] == "agop_book":
                home = node.module or "agop_book"
                found |= {a.asname or a.name: f"{home}.{a.name}" for a in node.names}
    return found


@cache
def methods(path):
    "Private methods and attributes that the classes of a module define."
    found = set()
    for node in ast.walk(ast.parse(code(path))):
        if isinstance(node, ast.ClassDef):
            found |= {f.name for f in node.body if isinstance(f, FUNCTIONS)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {n for n in found if is_private(n)}


def private_names(tree, path=None):
    """Private names of the package's other modules: imported, or taken from a module or an object.

    What a base class leaves to its heirs (`self._hook`) is theirs."""
    names = imported(tree)
    for local, origin in names.items():
        if is_private(origin.rpartition(".")[2]):
            yield f"the private name {origin}, here {local}"
    others = set().union(*(methods(p) for p in MODULES if p != path))
    foreign = others - (methods(path) if path else set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            parts = dotted(node)
            of_module = parts and parts[0] in names and not parts[-2][:1].isupper()
            if of_module or node.attr in foreign and not own(node.value):
                yield f"line {node.lineno}: the private name {ast.unparse(node)}"


def own(node):
    "self, cls, super()."
    called = node.func if isinstance(node, ast.Call) else node
    return isinstance(called, ast.Name) and called.id in ("self", "cls", "super")


def undocumented(tree, lines):
    "Parameters of public functions without a comment where they stand."
    for node in tree.body:
        if not isinstance(node, FUNCTIONS) or node.name.startswith("_"):
            continue
        args = node.args
        found = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
        bare = [a.arg for a in found
                if a and b"#" not in lines[a.end_lineno - 1].encode()[a.end_col_offset:]]
        if bare:
            yield f"line {node.lineno}: {node.name} does not say what {', '.join(bare)} is"


def public_names(tree):
    "Functions, classes and variables of a module (what it imports is not its own)."
    found, todo = set(), list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, DEFINITIONS):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif not isinstance(node, (ast.Lambda, ast.comprehension)):
            todo += ast.iter_child_nodes(node)
    return sorted(n for n in found if not n.startswith("_"))


def size(tree, lines):
    "A module of more than 300 lines or 12 public names."
    if len(lines) > MODULE:
        yield f"{len(lines)} lines, more than {MODULE}"
    if len(names := public_names(tree)) > NAMES:
        yield f"{len(names)} public names, more than {NAMES}: {', '.join(names)}"


def everywhere(source):
    "What holds for all code."
    tree = ast.parse(source)
    return [*too_long(tree), *crowded(tree, source.splitlines()), *named_lambdas(tree)]


def in_modules(source):
    "What holds for the package's modules beside that."
    tree, lines = ast.parse(source), source.splitlines()
    return [*undocumented(tree, lines), *size(tree, lines)]


def in_book(source, path=None):
    "What holds for the package and its notebooks beside that."
    tree = ast.parse(source)
    return [*dense(tree), *private_names(tree, path)]


def faults(path):
    "Everything that is wrong with one file, as lines of text."
    source = code(path)
    found = everywhere(source)
    if path in MODULES or path in NOTEBOOKS:
        found += in_book(source, path)
    if path in MODULES:
        found += in_modules(source)
    return found


WRONG = {
    "x = 1; y = 2": "one statement",
    "match x:\n    case 1: y = 2": "one statement",
    "def _f(\n    *args\n): return args": "one statement",
    "if x: y = 1": "one statement",
    "if x:\n    pass\nelse: y = 1": "one statement",
    "try:\n    x\nexcept E: pass": "one statement",
    "f, g = lambda: 1, 2": "lambda",
    "f = (lambda: 1) if x else None": "lambda",
    "x = a if b else c if d else e": "in one another",
    "a, b, c = 1, 2, 3": "3 assignments",
    "from agop_book.rfm import _x": "_x",
    "from .rfm import _x as x": "_x",
    "import agop_book.rfm as r\nr._x": "r._x",
    "import agop_book\nagop_book.rfm._x()": "agop_book.rfm._x",
    "from . import rfm\nrfm._x": "rfm._x",
    "from ..book import figures\nfigures._x": "figures._x",
    "def f(x, *more):  # x\n    return x": None,
    "def f(\n    x,  # a number\n    *more,\n):\n    return x": "what more is",
    "def f():\n" + "    x\n" * (BODY + 1): f"more than {BODY}",
    "\n".join(f"a{i}, b{i} = x" for i in range(NAMES)): f"more than {NAMES}",
    "def f(x):  # a number\n    if x: return 1": None,
    "@decorated\nclass A(B): \"It.\"": None,
    "if x:\n    pass\nelif y:\n    pass": None,
    "class A:\n    def f(self):\n        return super()._x() + self._x": None,
}


@pytest.mark.parametrize("source", WRONG)
def test_the_rules_see(source):
    found = [*everywhere(source), *in_book(source), *in_modules(source)]
    if WRONG[source] is None:
        assert found == []
    else:
        assert len(found) == 1 and WRONG[source] in found[0]


@pytest.mark.parametrize("path", [*MODULES, *NOTEBOOKS, *OTHERS], ids=name)
def test_rules(path):
    assert faults(path) == []


def prose(tree):
    "The numbers of the lines that docstrings stand on."
    for node in ast.walk(tree):
        first = node.body[:1] if isinstance(node, (ast.Module, *DEFINITIONS)) else []
        if first and is_docstring(first[0]):
            yield from range(first[0].lineno, first[0].end_lineno + 1)


def test_median_line():
    "Half of the package's lines of code are short, those that nbdev writes left out."
    generated = re.compile(r"\s*$|# %% |# AUTOGENERATED|__all__ = |           '")
    lengths = []
    for source in map(code, MODULES):
        left_out = {*prose(ast.parse(source))}
        lengths += [len(line) for number, line in enumerate(source.splitlines(), 1)
                    if number not in left_out and not generated.match(line)]
    assert statistics.median(lengths) < MEDIAN


def test_ruff():
    "100 columns, complexity of at most 10, nothing unused: the configuration is in pyproject.toml."
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for fault in faults(Path(argument).resolve()):
            print(f"{argument}: {fault}")
