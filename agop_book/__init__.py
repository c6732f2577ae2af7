__version__ = "0.1.0"

# Classes only: a function here would hide the module of its name (agop_book.agop is a module). Loaded on first use,
# so that the command line answers before torch is imported.
_HOMES = {
    "RFMRegressor": "rfm", "RFMClassifier": "rfm", "KernelMachine": "kernels", "AGOP": "agop", "Dataset": "data",
    "Laplace": "kernels", "Gaussian": "kernels", "GeneralizedExponential": "kernels",
    "CNTK": "cntk", "ConvRFMClassifier": "convrfm", "ConvRFMRegressor": "convrfm",
    "DeepRFMClassifier": "convrfm", "DeepRFMRegressor": "convrfm", "TransferRFM": "transfer",
    "Scattering": "scattering", "MapRFMClassifier": "scattering", "MapRFMRegressor": "scattering",
    "Matern32": "kernels", "Matern52": "kernels", "NTK": "kernels",
}
_MODULES = {*_HOMES.values(), "nfa", "mlps", "patches", "rnns", "attention", "tabular", "tokens", "figures", "reproduce",
            "arrays", "memory", "files", "roles", "taps", "acts", "layers"}
__all__ = list(_HOMES)


def __getattr__(name):
    from importlib import import_module
    if name in _MODULES:
        return import_module(f"agop_book.{name}")
    if name in _HOMES:
        return getattr(import_module(f"agop_book.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'agop_book' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOMES, *_MODULES])
