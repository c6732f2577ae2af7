"""Run notebooks at quick scale on an emulated device and name the cells that fail.

    python tests/on_device.py cuda FOLDER nbs/03_rfm.ipynb nbs/05_nfa.ipynb

Records go to FOLDER. A cell that fails is named with its error; those after it may only follow from
it."""
import contextlib
import io
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

TESTS = Path(__file__).parent


def code_cells(path):
    "The sources of a notebook's code cells, without installations."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [(i, source) for i, source in enumerate(found) if "%pip" not in source]


def place(error):
    "Files and lines of the book where an error was raised."
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "site-packages" not in f.filename and f.filename != __file__
            and not f.filename.endswith("emulated.py")]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in ours[:-4:-1])


def silent(*args, **options):
    "No traceback: the error is in the result."


def run(path, device):
    "Run one notebook; how many of its cells failed."
    from emulated import emulated
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shell.reset(new_session=True)
    shell.showtraceback = silent
    failed = 0
    with emulated(device):
        for i, source in code_cells(path):
            with contextlib.redirect_stdout(io.StringIO()):
                result = shell.run_cell(source, store_history=True)
            error = result.error_in_exec or result.error_before_exec
            if error is None: continue
            failed += 1
            print(f"{path.name}, code cell {i}: {type(error).__name__}: {str(error)[:200]!r} "
                  f"at {place(error)}", flush=True)
    return failed


def main(device, folder, *names):
    "Run notebooks one after the other; how many cells failed."
    paths = [Path(name).resolve() for name in names]
    os.environ.update(AGOP_BOOK_SCALE="quick", AGOP_BOOK_DEVICE=device, AGOP_BOOK_OUT=folder,
                      MPLBACKEND="Agg")
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    os.chdir(folder)
    warnings.filterwarnings("ignore")
    failed = 0
    for path in paths:
        start = time.perf_counter()
        found = run(path, device)
        print(f"{path.name}: {found} cells failed, {time.perf_counter() - start:.0f} s", flush=True)
        failed += found
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:])))
