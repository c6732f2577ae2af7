"""A reader for myst-nb: notebooks that nbdev wrote for Quarto (in `_proc/`), as MyST reads them.

`read` is the whole of it: the title from the front matter; the cells, of which those that document
a name become one section each; the options of a cell; and stored outputs without anything that
could run in a reader's browser.
"""
import re
from functools import cache
from pathlib import Path

import bleach
import nbformat
import yaml
from address import addresses, settings
from bleach.css_sanitizer import ALLOWED_CSS_PROPERTIES, CSSSanitizer

from agop_book.book.captions import safe_markdown

PROC = Path(__file__).resolve().parents[1] / "_proc"
SITE = addresses(settings())[0]
URL = re.compile(re.escape(SITE) + r"/([\w/]+)\.html(?:#([\w.-]+))?")
BADGE = re.compile(r"\[!\[([^]]*)\]\([^)]*colab-badge\.svg\)\]\(([^)]*)\)")
SHOWN = re.compile(r"---\s+(?:\[source\]\((?P<url>.*?)\)\{.*?\}\s+)?"
                   r"#+ (?P<name>\S+)\s+(?P<rest>[\s\S]*)")
HEADING = re.compile(r"^(#+) ", re.M)
FENCE = re.compile(r"^```[\s\S]*?^```", re.M)
DEFINED = re.compile(r"^(?:async )?(?:def|class) (\w+)", re.M)
STYLE = re.compile(r"<style[^<>]*>([^<]*)</style>")
ACTIVE_CSS = re.compile(r"@|url|expression|\\|behavior", re.I)
TAGS = set("a b br caption code colgroup col div em hr i li ol p pre span strong sub sup table "
           "tbody td tfoot th thead tr ul".split())
ATTRIBUTES = {"*": ["class", "id", "style", "title"], "a": ["href"], "table": ["border"],
              "tr": ["valign"], "td": ["colspan", "rowspan", "valign"],
              "th": ["colspan", "halign", "rowspan", "valign"]}
PROTOCOLS = {"http", "https", "mailto"}
COLOURS = CSSSanitizer({*ALLOWED_CSS_PROPERTIES, "border-radius", "opacity"})
FRAME = re.compile(r'<iframe title="([^"<>]*)" sandbox="allow-scripts" srcdoc="([^"]*)"'
                   r'\s*style="--tall: (\d+)px; [^"<>]*height: (\d+)px[^"<>]*"></iframe>')
ALONE = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
         "img-src data:")
AS_THEY_ARE = {"text/plain", "image/png", "image/jpeg"}
markdown = nbformat.v4.new_markdown_cell


def slug(title):
    "The anchor of a heading, by pandoc's rule, so that one link serves Quarto and Sphinx."
    words = re.sub(r"[^\w\s.-]", "", title).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", words)) or "section"


# Links between the pages

@cache
def pages():
    "Page of the published site -> (notebook, anchors that show_doc makes in it)."
    found = {}
    for path in PROC.rglob("*.ipynb"):
        notebook = path.relative_to(PROC)
        page = notebook.with_name(re.sub(r"^\d+[a-z0-9]*_", "", path.stem))
        names = re.findall(r"show_doc\(([\w.]+)", path.read_text(encoding="utf-8").lower())
        found[page.as_posix()] = notebook.as_posix(), set(names)
    return found


def link(match):
    "A link of nbdev to the published site, as a link between notebooks."
    if match[1] not in pages():
        return match[0]
    notebook, anchors = pages()[match[1]]
    name = match[2] or ""
    # a method without an entry of its own: its class
    anchor = next((f"#{a}" for a in (name, name.partition(".")[0]) if a in anchors), "")
    return f"/{notebook}{anchor}"


def local(text):
    "Links between the notebooks; the badge without its picture, which is on the network."
    return URL.sub(link, BADGE.sub(r"[\1](\2){.colab}", text))


# Names that nbdev documents

def shown(cell):
    "The match of show_doc's output, or None for any other cell."
    if "show_doc(" not in cell.source:
        return None
    found = [o.data["text/markdown"] for o in cell.get("outputs", ())
             if "text/markdown" in o.get("data", {})]
    return SHOWN.match(found[0]) if found else None


def section(docs, level, source):
    "Names as one section: link, and what the code (if it is shown) does not say already."
    names = [m["name"] for m in docs]
    url, rest = docs[0]["url"], docs[0]["rest"]
    targets = "".join(f"({name.lower()})=\n" for name in names if len(names) > 1)
    heading = ", ".join(f"`{name}`" for name in names)
    if source:
        rest = "" if len(names) > 1 else FENCE.sub("", rest, count=1)
    where = f"{{.source}}\n[source]({url})\n\n" if url else ""
    return markdown(f"{targets}{'#' * level} {heading}\n\n{where}{rest}")


def documented(doc, todo, level):
    "The section of a name, and the code that defines it: takes what follows of it off `todo`."
    if not (todo and "Exported source" in todo[0].source):
        return [section([doc], level, None)]
    source = todo.pop(0)
    docs, order = [doc], DEFINED.findall(source.source)
    while todo and (more := shown(todo[0])) and more["name"] in order:     # its other names
        docs.append(more)
        todo.pop(0)
    docs.sort(key=lambda m: order.index(m["name"]) if m["name"] in order else -1)
    return [section(docs, level, source), source]


# Stored outputs

def live(match):
    "A page in a frame, cut off from the site around it and from the network."
    title, page, tall, height = match.groups()
    return (f'<iframe class="live" title="{title}" sandbox="allow-scripts" srcdoc="<!doctype html>'
            f"<meta http-equiv='Content-Security-Policy' content=&quot;{ALONE}&quot;>{page}\" "
            f'style="--tall: {tall}px; height: {height}px"></iframe>')


def safe_html(text):
    """Tables, colours and style sheets, and nothing that runs or loads anything, except a page in
    a frame of its own."""
    if match := FRAME.search(text): return live(match)
    styles = [css for css in STYLE.findall(text) if not ACTIVE_CSS.search(css)]
    body = bleach.clean(STYLE.sub("", text), TAGS, ATTRIBUTES, PROTOCOLS, css_sanitizer=COLOURS)
    return "".join(f"<style>{css}</style>" for css in styles) + body


def linked_markdown(text):
    "Markdown without anything that could run, its links between the notebooks."
    return safe_markdown(URL.sub(link, text))


CLEAN = {"text/html": safe_html, "text/markdown": linked_markdown, "text/latex": safe_markdown}


def harmless(output):
    "A stored output without anything that could run; None where nothing is left."
    if "data" not in output:
        return output                         # printed text, which Sphinx shows as text
    found = {kind: value for kind, value in output["data"].items() if kind in AS_THEY_ARE}
    found |= {kind: clean("".join(output["data"][kind])) for kind, clean in CLEAN.items()
              if kind in output["data"]}
    output["data"] = nbformat.from_dict(found)
    return output if found else None


# Cells

def options(cell):
    "Take the `#| key: value` lines off a code cell."
    lines = cell.source.splitlines()
    cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    pairs = (line[2:].partition(":") for line in lines if line.startswith("#|"))
    return {key.strip(): yaml.safe_load(value) for key, _, value in pairs}


def spoken(output):
    "The alternative text that an output brings with its picture, or None."
    marks = output.get("metadata", {}).values()
    return next((m["alt"] for m in marks if isinstance(m, dict) and "alt" in m), None)


def apart(cell):
    "The cell with its outputs up to the second picture, and cells for the rest of the outputs."
    starts = [i for i, output in enumerate(cell.outputs) if spoken(output)][1:]
    rest = [nbformat.v4.new_code_cell("#| echo: false\npass", outputs=cell.outputs[a:b])
            for a, b in zip(starts, [*starts[1:], None])]
    if starts:
        cell.outputs = cell.outputs[:starts[0]]
    return [cell, *rest]


def code(cell, opts):
    "A code cell with its options as MyST knows them; one picture has one alternative text."
    outputs = [] if opts.get("output") is False else map(harmless, cell.outputs)
    cell.outputs = [output for output in outputs if output]
    tags = ["remove-input"] if opts.get("echo") is False else []
    if not tags and opts.get("code-fold") is True:
        tags = ["hide-input"]
    shows = {"code_prompt_show": opts.get("code-summary", "Show the code"),
             "code_prompt_hide": "Hide the code"}
    caption = opts.get("fig-cap")
    if caption:
        shows["figure"] = {"caption": local(caption)}
    brought = next(filter(None, map(spoken, cell.outputs)), None)
    if alt := brought or opts.get("fig-alt") or caption:
        shows["image"] = {"alt": alt}
    cell.metadata = nbformat.from_dict({"tags": tags, "mystnb": shows})
    return cell


def title(cell):
    "The first cell from nbdev's front matter."
    front = yaml.safe_load(cell.source.strip().strip("-"))
    subtitle = f"{{.subtitle}}\n{front['description']}\n" if front.get("description") else ""
    return markdown(f"# {front['title']}\n\n{subtitle}")


def read(text):
    "The reader itself: the text of one notebook -> NotebookNode."
    nb = nbformat.reads(text, as_version=4)
    nb.metadata.pop("widgets", None)          # would load scripts from the network
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    cells, level = [], 1
    todo = [title(nb.cells[0]), *nb.cells[1:]]
    while todo:
        cell = todo.pop(0)
        if cell.cell_type == "code" and (doc := shown(cell)):
            todo[:0] = documented(doc, todo, min(level + 1, 3))
        elif cell.cell_type == "code" and len(parts := apart(cell)) > 1:
            todo[:0] = parts
        elif cell.cell_type == "code" and (opts := options(cell)).get("include") is not False:
            cells.append(code(cell, opts))
        elif cell.cell_type == "markdown" and not cell.source.startswith("<!-- WARNING"):
            cell.source = local(cell.source)
            level = ([level] + [len(h) for h in HEADING.findall(FENCE.sub("", cell.source))])[-1]
            cells.append(cell)
    nb.cells = cells
    return nb
