"""What only the book needs: its data, figures, records and runs, with the extra `book`."""
from importlib.util import find_spec

from ..extras import MissingExtra

NEEDS = ("PIL", "ipykernel", "jinja2", "joblib", "kymatio", "matplotlib", "nbclient", "nbformat",
         "pooch", "scikit_posthocs", "skorch", "yaml")
if missing := [name for name in NEEDS if find_spec(name) is None]:
    raise MissingExtra(f'{", ".join(missing)} not installed: pip install "agop_book[book]"',
                       name=missing[0])
