"""Build the offline site: `python docs/build.py` -> `_site/`.

Warnings, broken links among them, are errors.
"""
import os
import shutil
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
TOCTREE = "```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


def contents(folder):
    "The order of the book, sidebar.yml, as hidden toctrees, one per part."
    text = (folder / "sidebar.yml").read_text(encoding="utf-8")
    parts = yaml.safe_load(text)["website"]["sidebar"]["contents"]
    parts = [p if isinstance(p, dict) else {"section": "", "contents": [p]}
             for p in parts if p != "index.ipynb"]
    return "\n".join(TOCTREE.format(caption=p["section"], pages="\n".join(p["contents"]))
                     for p in parts)


def prepare(folder):
    "Notebooks as nbdev makes them for a site, in `folder`; the index names all others."
    from nbdev.serve import proc_nbs

    proc_nbs(force=True, n_workers=0)       # a pool of processes imports torch for each notebook
    index = nbformat.read(folder / "index.ipynb", as_version=4)
    index.cells.insert(1, nbformat.v4.new_markdown_cell(contents(folder)))
    nbformat.write(index, folder / "index.ipynb")


def build(source, target):
    "Sphinx's exit status."
    from sphinx.cmd.build import main

    strict = ["-W", "--keep-going", "-q"]
    return main([*strict, "-b", "html", "-c", "docs", "-d", f"{source}/doctrees", source, target])


def leave(status):
    "End the process at once: nbdev has an IPython for each notebook, and each would tidy up."
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    prepare(Path("_proc"))
    if status := build("_proc", "_proc/html"):
        leave(status)                                   # the last good site stays
    shutil.rmtree("_site", ignore_errors=True)
    shutil.move("_proc/html", "_site")
    leave(0)
