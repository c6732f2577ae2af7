"""The average gradient outer product and Recursive Feature Machines.

The modules of the library, and its public classes under their own names: both are found by
looking, and loaded on first use, so that the command line answers before torch is imported.
Functions stay in their modules (`agop_book.agop` is a module).
"""
__version__ = "0.2.0"


def _modules():
    from pkgutil import iter_modules
    names = {module.name for module in iter_modules(__path__) if module.name[0] != "_"}
    return names - {"all", "nbs"}


def class_homes():
    "Public class -> the library's module that defines it, from the index that nbdev keeps."
    from ._modidx import d
    homes = {}
    for module, symbols in d["syms"].items():
        prefix = f"{module}."
        names = [symbol.removeprefix(prefix) for symbol in symbols]
        if module.count(".") == 1:
            homes |= {name: module for name in names if name[0].isupper() and "." not in name}
    return homes


def __getattr__(name):
    from importlib import import_module
    if name in _modules():
        return import_module(f"agop_book.{name}")
    if name == "__all__":
        return sorted(class_homes())
    if name[0] != "_" and name in class_homes():
        return getattr(import_module(class_homes()[name]), name)
    raise AttributeError(f"module 'agop_book' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *class_homes(), *_modules()})
