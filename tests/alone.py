"""One notebook in a process of its own, as nbdev tests it. What every notebook would import, this
package excepted, is imported once: where the system can, processes are copies of one that has."""
import multiprocessing
import os
import re
import sys

METHODS = multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")
LIBRARIES = ["nbdev.test", "matplotlib.pyplot", "pandas", "scipy.stats", "sklearn.metrics",
             "sklearn.model_selection", "torch"]


def run(path, packages, env, log):
    "Run the notebook at `path` where it is, with the package that is in the folder `packages`."
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [packages, *(p for p in sys.path if "site-packages" in p or sys.base_prefix in p)]
    os.chdir(path.parent)
    from nbdev.test import test_nb

    passed, _ = test_nb(path, skip_flags=["notest"])
    sys.stdout.flush()
    os._exit(0 if passed else 1)


def start(path, packages, env, log, timeout=600):
    "What a failing notebook printed; None for one that passes."
    if CONTEXT.get_start_method() == "forkserver":
        CONTEXT.set_forkserver_preload(LIBRARIES)
    process = CONTEXT.Process(target=run, args=(path, str(packages), env, str(log)))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        return f"it runs for more than {timeout} seconds"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return None if process.exitcode == 0 else re.sub(r"\x1b\[[0-9;]*m", "", text)[-6000:] or "?"
