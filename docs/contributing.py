"""CONTRIBUTING.md is the opening of the workshop's front page: `python docs/contributing.py`.

Its markdown up to the first code that a reader sees, with links that hold from the repository's
root; the worked examples stay in the notebook.
"""
import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = "nbs/workshop/index.ipynb"
LINK = re.compile(r"\]\((?!https?:|#)([^)#]*)")
BADGE = re.compile(r"^\[!\[.*colab-badge.*\n+", re.M)
NOTE = f"<!-- Written by docs/contributing.py from {PAGE}: edit it there. -->"
REST = f"Examples that run: [{PAGE}]({PAGE})."


def opening(cells):
    "The markdown cells before the first code cell that the page shows."
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith(("#| hide", "#| default_exp")):
            return
        if cell["cell_type"] == "markdown":
            yield BADGE.sub("", source)


def contributing(text):
    "The page from the notebook's text."
    def from_root(match):
        return "](" + posixpath.normpath(posixpath.join(posixpath.dirname(PAGE), match[1]))
    parts = [NOTE, *opening(json.loads(text)["cells"])]
    return LINK.sub(from_root, "\n\n".join(parts)) + f"\n\n{REST}\n"


if __name__ == "__main__":
    page = contributing((ROOT / PAGE).read_text(encoding="utf-8"))
    (ROOT / "CONTRIBUTING.md").write_text(page, encoding="utf-8", newline="\n")
