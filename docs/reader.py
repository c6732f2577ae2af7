"""A reader for myst-nb: notebooks as nbdev writes them for Quarto (`_proc/*.ipynb`) -> notebooks that MyST understands."""
import re
from functools import cache
from pathlib import Path

import bleach
import nbformat
import yaml
from bleach.css_sanitizer import ALLOWED_CSS_PROPERTIES, CSSSanitizer

from agop_book.book.captions import safe_markdown

BOOK = Path(__file__).parent.parent
URL = re.compile(r"https://agop-book\.github\.io/agop_book/(\w+)\.html(?:#([\w.-]+))?")
BADGE = re.compile(r"\[!\[([^]]*)\]\([^)]*colab-badge\.svg\)\]\(([^)]*)\)")
SHOWN = re.compile(r"---\s+(?:\[source\]\((?P<url>.*?)\)\{.*?\}\s+)?#+ (?P<name>\S+)\s+(?P<rest>[\s\S]*)")
HEADING, FENCE = re.compile(r"^(#+) ", re.M), re.compile(r"^```[\s\S]*?^```", re.M)
DEFINED = re.compile(r"^(?:async )?(?:def|class) (\w+)", re.M)
STYLE = re.compile(r"<style[^<>]*>([^<]*)</style>")
TAGS = {"a", "b", "br", "caption", "code", "colgroup", "col", "div", "em", "hr", "i", "li", "ol", "p", "pre", "span", "strong",
        "sub", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul"}
ATTRIBUTES = {"*": ["class", "id", "style", "title"], "a": ["href"], "table": ["border"], "tr": ["valign"],
              "td": ["colspan", "rowspan", "valign"], "th": ["colspan", "halign", "rowspan", "valign"]}
COLOURS = CSSSanitizer({*ALLOWED_CSS_PROPERTIES, "border-radius", "opacity"})
SHOWN_AS_THEY_ARE = {"text/plain", "image/png", "image/jpeg"}
markdown = nbformat.v4.new_markdown_cell


def slug(title):
    "The anchor of a heading, by pandoc's rule, so that one link serves Quarto and Sphinx."
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", title).strip().lower())) or "section"


@cache
def pages():
    "Page of the published site -> (notebook, anchors that show_doc makes in it)."
    return {re.sub(r"^\d+[a-z0-9]*_", "", p.stem): (p.name, set(re.findall(r"show_doc\(([\w.]+)", p.read_text("utf-8").lower())))
            for p in BOOK.glob("_proc/*.ipynb")}


def local(text):
    "The badge as a link without its picture, which is on the network; nbdev's absolute links as links between the chapters."
    def link(m):
        notebook, anchors = pages()[m[1]]
        name = m[2] or ""            # a method without an entry of its own: its class
        return notebook + next((f"#{a}" for a in (name, name.partition(".")[0]) if a in anchors), "")
    return URL.sub(lambda m: link(m) if m[1] in pages() else m[0], BADGE.sub(r"[\1](\2){.colab}", text))


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


def shown(cell):
    "The match of show_doc's output, or None for any other cell."
    found = [o.data["text/markdown"] for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})]
    return SHOWN.match(found[0]) if found and "show_doc(" in cell.source else None


def section(docs, level, source):
    "Documented names as one section: names, link, and what the code (if it is shown) does not say already."
    names = [m["name"] for m in docs]
    targets = "".join(f"({name.lower()})=\n" for name in names if len(names) > 1)
    link = f"{{.source}}\n[source]({docs[0]['url']})\n\n" if docs[0]["url"] else ""
    rest = "" if len(names) > 1 else FENCE.sub("", docs[0]["rest"], count=1) if source else docs[0]["rest"]
    return markdown(f"{targets}{'#' * level} {', '.join(f'`{name}`' for name in names)}\n\n{link}{rest}")


def safe_html(text):
    "HTML of a stored output with its tables, colours and style sheets, and nothing that runs or loads anything."
    styles = [css for css in STYLE.findall(text) if not re.search(r"@|url|expression|\\|behavior", css, re.I)]
    body = bleach.clean(STYLE.sub("", text), TAGS, ATTRIBUTES, {"http", "https", "mailto"}, css_sanitizer=COLOURS)
    return "".join(f"<style>{css}</style>" for css in styles) + body


def harmless(output):
    "A stored output without anything that could run in a reader's browser; None where nothing is left."
    if "data" not in output:
        return output                         # printed text, which Sphinx shows as text
    clean = {"text/html": safe_html, "text/markdown": safe_markdown, "text/latex": safe_markdown}
    found = {kind: clean[kind]("".join(value)) if kind in clean else value for kind, value in output["data"].items()
             if kind in clean or kind in SHOWN_AS_THEY_ARE}
    output["data"] = nbformat.from_dict(found)
    return output if found else None


def read(text):
    "The reader itself: the text of one notebook -> NotebookNode."
    nb, cells, level = nbformat.reads(text, as_version=4), [], 1
    nb.metadata.pop("widgets", None)          # would load scripts from the network
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    front = yaml.safe_load(nb.cells[0].source.strip().strip("-"))
    subtitle = f"{{.subtitle}}\n{front['description']}\n\n" if front.get("description") else ""
    toc = contents() if front["output-file"] == "index.html" else ""
    todo = [markdown(f"# {front['title']}\n\n{subtitle}{toc}"), *nb.cells[1:]]
    while todo:
        cell = todo.pop(0)
        if cell.cell_type == "code" and (doc := shown(cell)):
            docs, source = [doc], None
            if todo and "Exported source" in todo[0].source:        # the code that defines the name, then its other names
                source = todo.pop(0)
                order = DEFINED.findall(source.source)
                while todo and (doc := shown(todo[0])) and doc["name"] in order:
                    docs.append(doc)
                    todo.pop(0)
                docs.sort(key=lambda m: order.index(m["name"]) if m["name"] in order else -1)
            todo[:0] = [section(docs, min(level + 1, 3), source), *([source] if source else [])]
        elif cell.source.startswith("<!-- WARNING"):                    # nbdev's own
            continue
        elif cell.cell_type == "markdown":
            cell.source = local(cell.source)
            level = ([level] + [len(h) for h in HEADING.findall(FENCE.sub("", cell.source))])[-1]
            cells.append(cell)
        elif (opts := options(cell)).get("include") is not False:
            cell.outputs = [] if opts.get("output") is False else [o for o in map(harmless, cell.outputs) if o]
            hide = {False: "remove-input"}.get(opts.get("echo")) or {True: "hide-input"}.get(opts.get("code-fold"))
            caption, alt = opts.get("fig-cap"), opts.get("fig-alt") or opts.get("fig-cap")
            cell.metadata = nbformat.from_dict({"tags": [hide] if hide else [], "mystnb": {
                "code_prompt_show": opts.get("code-summary", "Show the code"), "code_prompt_hide": "Hide the code",
                **({"figure": {"caption": local(caption)}} if caption else {}), **({"image": {"alt": alt}} if alt else {})}})
            cells.append(cell)
    nb.cells = cells
    return nb
