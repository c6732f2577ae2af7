"""Captions and the gallery: what they show, and that nothing in a record runs."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython import display
from nbconvert.filters.markdown_mistune import markdown2html_mistune as rendered

from agop_book.book import captions as C
from agop_book.book import gallery as G
from agop_book.book.chapters import chapters
from agop_book.book.records import record
from agop_book.book.run import notebooks

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "cpu")
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path / "out"))
    yield tmp_path / "out"
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    "What was displayed."
    found = []
    monkeypatch.setattr(G, "display", lambda *objects: found.extend(objects))
    return found


def save(id, **changes):
    entry = dict(measured={"x": 1}, paper=None, data="none", caption="c") | changes
    record(id, plt.figure(figsize=(4, 4)), **entry)


def texts(shown):
    return [o.data for o in shown if isinstance(o, display.Markdown)]


def images(shown):
    return [o for o in shown if isinstance(o, display.Image)]


def test_gallery(shown):
    "Title, picture, caption, and the numbers that the key names beside the paper's."
    save("pipe", title="A pipe", measured={"a|b": {"c": 1}, "d": 2}, key=["a|b / c"],
         paper="says | nothing", seconds=2)
    G.gallery()
    text = "".join(texts(shown))
    assert "### A pipe" in text and "a\\|b / c | 1" in text and "| d |" not in text
    assert "says \\| nothing" in text and "seconds: 2" in text
    assert images(shown)[0].alt == "c"


def test_gallery_of_the_book(shown):
    "Every stored figure in the order of the book, linked to its chapter, with few numbers."
    G.gallery(notebooks() / "records")
    homes = {id: chapter.name for chapter in chapters() for id in chapter.figures}
    links = [text for text in texts(shown) if text.startswith("### [")]
    stored = {path.stem for path in (notebooks() / "records").glob("*.json")}
    places = [f"({homes[id]}.ipynb)" for id in homes if id in stored]
    assert [re.search(r"\(.*\)$", link)[0] for link in links] == places
    assert all(image.data.startswith(b"\xff\xd8") for image in images(shown))
    assert sum(len(image.data) for image in images(shown)) * 4 / 3 < 1_400_000
    assert all(text.count("\n| ") <= 8 for text in texts(shown))


def test_gallery_without_figures(shown, tmp_path):
    G.gallery(tmp_path)
    assert "agop-book reproduce" in texts(shown)[0]


# --- hostile input

HOSTILE = [
    "<script>planted()</script>",
    "<img src=x onerror=planted()>",
    "[a](javascript:planted())",
    "[b](<javascript:planted()>)",
    "[c](java&#115;cript&colon;planted())",
    "[d]\n\n[d]: JaVaScRiPt:planted()\n",
    "[e]( data:text/html,planted() )",
    "<javascript:planted()>",
    "[f](vbscript:planted())",
    "x <svg/onload=planted()>",
    "[g](\\javascript:planted())",
    "```{raw} html\n<script>planted()</script>\n```",
    "`a`{=html}",
    "{raw}`planted()`",
    "$\\href{javascript:planted()}{x}$",
    "$\\\\href{javascript:planted()}{x}$",
    "<!-- planted() -->",
    "<?planted()?>",
    "<{script}`>planted()",
]


class Reader(HTMLParser):
    "Collects what a browser would run."

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "img", "svg", "iframe", "style"):
            self.found.append(tag)
        schemes = ("javascript:", "data:", "vbscript:")
        for name, value in attrs:
            if name.startswith("on") or (value or "").strip().lower().startswith(schemes):
                self.found.append(f"{tag} {name}={value}")

    def handle_comment(self, text):
        self.found.append("comment")

    def handle_pi(self, text):
        self.found.append("instruction")


def active(page):
    reader = Reader()
    reader.feed(page)
    return reader.found


@pytest.mark.parametrize("text", HOSTILE)
def test_stored_markdown_cannot_run(text):
    safe = C.safe_markdown(text)
    page = rendered(safe)
    assert active(page) == [] and "\\href" not in page
    assert "{raw}" not in page and "`{" not in safe


def test_the_attacks_are_attacks():
    assert sum(bool(active(rendered(text))) for text in HOSTILE) >= 7


@given(st.text(alphabet="<>`~:{}[]()\\ \n\tajsJ&;#!/?=o-.", max_size=40))
def test_no_text_becomes_a_tag(text):
    page = rendered(C.safe_markdown(text))
    tags = ("<a>", "<j", "<s>", "<aj", "<!--", "<?", "<script")
    assert not any(tag in page for tag in tags)


def test_harmless_markdown_stays():
    text = ("**Bold**, *soft*, `x[0]`, $a < b$, [paper](https://doi.org/10.1126/x_(y)), "
            "[chapter](02_agop.ipynb#the-agop), ![p](figs/a.png), <https://a> 1 < 2 > 0\n\n"
            "| a | b |\n|---|---|\n| 1 | 2 |")
    safe = C.safe_markdown(text)
    assert safe == text.replace("<https", "< https") and rendered(safe).count("<a ") == 3


def test_gallery_shows_a_hostile_record_harmlessly(shown):
    bad = "<script>planted()</script> [x](javascript:planted())"
    save("evil", title=bad, caption=f"**Bold** {bad}", data=bad, paper={bad: bad}, seed=bad,
         measured={bad: bad, "deep": {bad: [bad]}})
    G.gallery()
    heading, text = texts(shown)
    assert "### " in heading and "<strong>Bold</strong>" in rendered(text)
    assert active(rendered(heading)) == active(rendered(text)) == []
