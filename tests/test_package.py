"""The package: what its top level holds, what an import brings along, and the library alone, with
nothing installed but what it requires."""
import inspect
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import agop_book.book


def python(code, *arguments, flags=(), **options):
    "Standard output of a fresh interpreter."
    command = [sys.executable, *flags, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_top_level_holds_classes_and_modules():
    assert all(inspect.isclass(getattr(agop_book, name)) for name in agop_book.__all__)
    assert inspect.ismodule(agop_book.agop) and callable(agop_book.agop.agop)
    assert inspect.ismodule(agop_book.rfm) and agop_book.RFMRegressor is agop_book.rfm.RFMRegressor
    assert not hasattr(agop_book, "nonsense") and set(agop_book.__all__) <= set(dir(agop_book))


def test_importing_the_package_does_not_import_torch():
    python("import sys, agop_book; assert 'torch' not in sys.modules")


def test_the_library_stands_below_the_book():
    "Modules of the library import neither the book nor what draws."
    modules = [f"agop_book.{name}" for name in ("rfm", "agop", "nfa", "cntk", "convrfm", "kernels")]
    loaded = python(f"import sys, {', '.join(modules)}; print(*sys.modules)").split()
    assert set(modules) <= set(loaded)
    above = r"agop_book\.book|(matplotlib|PIL|skorch|IPython)$"
    assert [name for name in loaded if re.match(above, name)] == []


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements):
    "Installed distributions that these requirements bring along: normal name -> distribution."
    seen, found = set(), {}
    todo = [Requirement(r) for r in requirements]
    while todo:
        wanted = todo.pop()
        key = normal(wanted.name), frozenset(wanted.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            found[key[0]] = dist = distribution(wanted.name)
        except PackageNotFoundError:        # for another platform, or an extra that is not here
            continue
        extras = [{"extra": extra} for extra in ("", *wanted.extras)]
        more = map(Requirement, dist.requires or ())
        todo += [r for r in more if not r.marker or any(map(r.marker.evaluate, extras))]
    return found


def link(found, folder):
    "Links in `folder` to everything that the distributions have in theirs."
    for dist in found.values():
        for part in {file.parts[0] for file in dist.files} - {"..", "__pycache__"}:
            source = Path(dist.locate_file(part)).resolve()
            if not (folder / part).exists() and source.suffix != ".pth":
                os.symlink(source, folder / part, target_is_directory=source.is_dir())


@pytest.fixture(scope="module")
def core(tmp_path_factory, settings, installed):
    "core(code): Python with the wheel and its requirements, and nothing else: no site-packages."
    folder = tmp_path_factory.mktemp("core")
    try:
        link(closure(settings["requirements"].split()), folder)
    except OSError as error:
        pytest.skip(f"this system makes no links: {error}")
    paths = [str(installed), str(folder)]

    def run(code, *arguments):
        start = f"import sys; sys.path[:0] = {paths!r}\n"
        return python(start + code, *arguments, flags=["-I", "-S"], cwd=folder)
    return run


def test_the_core_is_alone(core, settings):
    "What only the book needs cannot be imported there (jinja2 and joblib are requirements' own)."
    inside = closure(settings["requirements"].split())
    extra = {normal(Requirement(r).name) for r in settings["book_requirements"].split()}
    names = {name for name, dists in packages_distributions().items()
             if {normal(d) for d in dists} & (extra - inside.keys())}
    assert names >= {"matplotlib", "PIL", "pooch", "nbformat", "skorch", "kymatio", "yaml"}
    code = ("from importlib.util import find_spec\n"
            "print(*[name for name in sys.argv[1:] if find_spec(name)])")
    assert core(code, *sorted(names)).split() == []


def test_the_book_looks_for_its_requirements(settings):
    required = {normal(Requirement(r).name) for r in settings["book_requirements"].split()}
    names = packages_distributions()
    assert {normal(names[name][0]) for name in agop_book.book.NEEDS} == required


USES = """
import numpy as np
import agop_book
assert agop_book.__file__.startswith(sys.argv[1])

from agop_book.rfm import RFMClassifier, RFMRegressor
X = np.random.default_rng(0).normal(size=(300, 5))
y = X[:, 0] * X[:, 1]
plain, rfm = (RFMRegressor(bandwidth=10.0, n_iter=n).fit(X[:200], y[:200]) for n in (0, 3))
assert rfm.predict(X).shape == (300,)
assert rfm.score(X[200:], y[200:]) > plain.score(X[200:], y[200:])
labels = np.where(y > 0, "plus", "minus")
assert RFMClassifier(bandwidth=10.0).fit(X[:200], labels[:200]).score(X[200:], labels[200:]) > 0.7

from agop_book.agop import agop
A = agop(lambda x: x[:, :1] * x[:, 1:2], X[:, :3], center=False)
assert np.allclose(A[:2, :2], X[:, 1::-1].T @ X[:, 1::-1] / 300) and not A[2].any()

from agop_book.cntk import CNTK
K = CNTK(depth=2)(X[:4].reshape(4, 1, 1, 5).repeat(5, 2))
assert np.allclose(K, K.T) and np.linalg.eigvalsh(K).min() > 0

import torch
from agop_book.nfa import nfa, summary
net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).eval()
table = nfa(net, torch.randn(40, 6, generator=torch.manual_seed(0)))
assert len(table) == 2 and len(summary(table))
"""


def test_the_library_needs_its_requirements_only(core, installed):
    "Recursive Feature Machines, the AGOP, the CNTK and the ansatz, imported and used."
    core(USES, installed)


MISSING = """
from importlib import import_module
from pkgutil import walk_packages
import agop_book

for module in walk_packages(agop_book.__path__, "agop_book."):
    if module.name.rpartition(".")[2] != "all":
        try:
            import_module(module.name)
        except ImportError as error:
            print(module.name, "|", str(error).replace(chr(10), " "))
"""


def test_a_module_names_the_extra_that_it_misses(core):
    "With the requirements alone a module can be imported, or says which extra it needs."
    lines = core(MISSING).splitlines()
    assert {"agop_book.draw", "agop_book.book"} <= {line.partition(" ")[0] for line in lines}
    assert [s for s in lines if not re.search(r"agop_book\[(book|large|text|vision)\]", s)] == []
