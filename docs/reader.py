"""A reader for myst-nb: notebooks as nbdev writes them for Quarto (`_proc/*.ipynb`) -> notebooks that MyST understands."""
import re
from functools import cache
from pathlib import Path

import nbformat
import yaml

BOOK = Path(__file__).parent.parent
URL = re.compile(r"https://agop-book\.github\.io/agop_book/(\w+)\.html(?:#([\w.-]+))?")
BADGE = re.compile(r"\[!\[([^]]*)\]\([^)]*colab-badge\.svg\)\]\(([^)]*)\)")
SHOWN = re.compile(r"---\s+(?:\[source\]\((?P<url>.*?)\)\{.*?\}\s+)?#+ (?P<name>.*)\s+(?P<rest>[\s\S]*)")
HEADING, FENCE = re.compile(r"^(#+) ", re.M), re.compile(r"^```[\s\S]*?^```", re.M)


def slug(title):
    "The anchor of a heading, by pandoc's rule, so that one link serves Quarto and Sphinx."
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", title).strip().lower())) or "section"


@cache
def pages():
    "Page of the published site -> (notebook, anchors that show_doc makes in it)."
    return {re.sub(r"^\d+[a-z0-9]*_", "", p.stem): (p.name, set(re.findall(r"show_doc\(([\w.]+)", p.read_text("utf-8").lower())))
            for p in BOOK.glob("_proc/*.ipynb")}


def local(text):
    "nbdev's absolute links to names -> links between the chapters; to the class where a method has no entry of its own."
    def link(m):
        notebook, anchors = pages()[m[1]]
        return notebook + next((f"#{a}" for a in (m[2] or "", (m[2] or "").partition(".")[0]) if a in anchors), "")
    return URL.sub(lambda m: link(m) if m[1] in pages() else m[0], text)


def contents():
    "The sidebar of _quarto.yml as hidden toctrees, one per part."
    sidebar = yaml.safe_load((BOOK / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    parts = [e if isinstance(e, dict) else {"section": "", "contents": [e]} for e in sidebar if e != "index.ipynb"]
    return "\n".join(f"```{{toctree}}\n:hidden:\n:caption: {p['section']}\n\n" + "\n".join(p["contents"]) + "\n```\n" for p in parts)


def options(cell):
    "Take the `#| key: value` lines off a code cell."
    lines = cell.source.splitlines()
    cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    pairs = (line[2:].partition(":") for line in lines if line.startswith("#|"))
    return {key.strip(): yaml.safe_load(value) for key, _, value in pairs}


def show_doc(cell, following, level):
    "The output of show_doc -> a section: name, link to the source, signature (if the code does not follow), summary. Else None."
    found = [o.data["text/markdown"] for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})]
    m = SHOWN.match(found[0]) if found and cell.source.startswith("show_doc") else None
    if m:
        link = f"{{.source}}\n[source]({m['url']})\n\n" if m["url"] else ""
        shown = FENCE.sub("", m["rest"], count=1) if "Exported source" in following.source else m["rest"]
        return f"{'#' * level} `{m['name']}`\n\n{link}{shown}"


def read(text):
    "The reader itself: the text of one notebook -> NotebookNode."
    nb, cells, level = nbformat.reads(text, as_version=4), [], 1
    nb.metadata.pop("widgets", None)          # would load scripts from the network
    front = yaml.safe_load(nb.cells[0].source.strip().strip("-"))
    for cell, following in zip(nb.cells[1:], [*nb.cells[2:], nbformat.v4.new_raw_cell()]):
        if cell.cell_type == "code":
            opts = options(cell)
            if opts.get("include") is False:
                continue
            if doc := show_doc(cell, following, min(level + 1, 3)):
                cell = nbformat.v4.new_markdown_cell(doc)
            elif opts.get("output") is False:
                cell.outputs = []
        if cell.cell_type == "markdown":
            cell.source = local(BADGE.sub(r"[\1](\2){.colab}", cell.source))     # its picture is on the network
            level = ([level] + [len(h) for h in HEADING.findall(FENCE.sub("", cell.source))])[-1]
        elif cell.cell_type == "code":
            hide = {False: "remove-input"}.get(opts.get("echo")) or {True: "hide-input"}.get(opts.get("code-fold"))
            caption, alt = opts.get("fig-cap"), opts.get("fig-alt") or opts.get("fig-cap")
            cell.metadata = nbformat.from_dict({"tags": [hide] if hide else [], "mystnb": {
                "code_prompt_show": opts.get("code-summary", "Show the code"), "code_prompt_hide": "Hide the code",
                **({"figure": {"caption": local(caption)}} if caption else {}), **({"image": {"alt": alt}} if alt else {})}})
        cells.append(cell)
    subtitle = f"{{.subtitle}}\n{front['description']}\n\n" if front.get("description") else ""
    toc = contents() if front["output-file"] == "index.html" else ""
    nb.cells = [nbformat.v4.new_markdown_cell(f"# {front['title']}\n\n{local(subtitle)}{toc}"), *cells]
    return nb
