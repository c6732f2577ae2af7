"""The top level: classes only, loaded on first use, and no function in the place of a module."""
import inspect
import subprocess
import sys

import agop_book


def test_top_level_holds_classes_and_modules():
    assert all(inspect.isclass(getattr(agop_book, name)) for name in agop_book.__all__)
    assert inspect.ismodule(agop_book.agop) and callable(agop_book.agop.agop)
    assert inspect.ismodule(agop_book.rfm) and agop_book.RFMRegressor is agop_book.rfm.RFMRegressor
    assert not hasattr(agop_book, "nonsense") and set(agop_book.__all__) <= set(dir(agop_book))


def test_importing_the_package_does_not_import_torch():
    code = "import sys, agop_book; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
