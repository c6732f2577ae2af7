"""The site: it builds without a warning, and a browser without a network shows every page as it
should be."""
import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import nbformat
import pytest
from conftest import notebooks

from agop_book.book.live import Live

ROOT = Path(__file__).parents[1]
PAGES = [name.removesuffix(".ipynb") for name in notebooks()]
# some images load when they are scrolled to; one that cannot be loaded is found by UNLOADED
LOADED = "() => Promise.allSettled([...document.images].map(image => image.decode()))"
UNLOADED = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"


def cells(name, kind):
    "The sources of a notebook's cells of one kind."
    nb = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
    return "\n".join(c.source for c in nb.cells if c.cell_type == kind)


def run(*arguments, cwd, env):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True,
                          text=True, timeout=900)


@pytest.fixture(scope="session")
def book(once, copy_book, plain_env):
    "A scratch copy of the book with its site built."
    def make(folder):
        copy_book(folder, "settings.ini", "nbs", "agop_book", "docs")
        done = run("docs/build.py", cwd=folder, env=plain_env)
        assert done.returncode == 0, f"the site does not build:\n{done.stderr[-6000:]}"
    return once("book", make)


@pytest.fixture(scope="session")
def address(book):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=book / "_site"))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def watch(page, problems, address):
    "Keep what goes wrong in a page: what it asks of the network, too."
    def request(asked):
        if not asked.url.startswith((address, "data:", "blob:")):
            problems.append(f"asked the network for {asked.url}")

    def console(message):
        if message.type in ("error", "warning"):
            problems.append(f"console: {message.text}")

    def response(answer):
        if answer.status >= 400:
            problems.append(f"{answer.status}: {answer.url}")
    page.on("request", request)
    page.on("console", console)
    page.on("response", response)
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))


@pytest.fixture(scope="session")
def context(browser):
    "One session of the browser, which keeps the scripts that every page loads."
    context = browser.new_context(color_scheme="light")
    yield context
    context.close()


@pytest.fixture
def visit(context, address):
    "visit(path) -> the opened page; what goes wrong, the network included, is in visit.problems."
    pages = []

    def visit(path):
        pages.append(page := context.new_page())
        page.set_viewport_size({"width": 1400, "height": 900})
        watch(page, visit.problems, address)
        page.goto(f"{address}/{path}")
        page.evaluate("async () => { await window.MathJax?.startup?.promise }")
        return page

    visit.problems = []
    yield visit
    for page in pages:
        page.close()


def test_every_notebook_has_its_page(book):
    made = {p.relative_to(book / "_site").as_posix() for p in (book / "_site").rglob("*.html")}
    assert [name for name in PAGES if f"{name}.html" not in made] == []


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


@pytest.mark.parametrize("name", PAGES)
def test_page(visit, name, settings):
    page = visit(f"{name}.html")
    for image in page.locator("article img").all():
        image.scroll_into_view_if_needed()
    page.evaluate(LOADED)
    assert visit.problems == [] and page.evaluate(UNLOADED) == []

    if re.search(r"\$[^$]+\$", cells(name, "markdown")):
        assert page.locator("mjx-container").count() > 0, "mathematics is not typeset"
    assert page.locator("article .math:not(:has(mjx-container))").all_inner_texts() == []
    wrong = page.locator('[data-mjx-error], mtext[mathcolor="red"]')
    assert wrong.all_inner_texts() == [], "a formula with an error"

    for alt in re.findall(r"^#\| fig-alt:\s*[\"']?(.+?)[\"']?$", cells(name, "code"), re.M):
        assert page.locator(f'img[alt="{alt}"]').count() >= 1, "an alternative text is lost"

    repository = settings["git_url"].removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{repository}/blob/main/nbs/{name}.ipynb"
    for place in ("article", ".dropdown-launch-buttons"):
        assert page.locator(f'{place} a[href="{colab}"]').count() == 1, "no link to Colab"

    assert overflow(page) <= 0, "the page is wider than the screen"
    page.set_viewport_size({"width": 390, "height": 900})
    assert overflow(page) <= 0, "the page is wider than a telephone"


def test_search_finds_the_chapter(visit):
    page = visit("search.html?q=Laplace+kernel")
    page.wait_for_selector("#search-results li a")
    links = page.locator("#search-results li a")
    found = links.evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert any(href.startswith("01_kernels.html") for href in found), found
    assert visit.problems == []


def test_dark_mode(visit):
    page = visit("index.html")
    background = {}
    for mode in ("dark", "light"):
        for _ in range(3):                  # the button opens a menu, or goes round
            if page.evaluate("document.documentElement.dataset.theme") != mode:
                page.locator(".theme-switch-button:visible").first.click()
                for item in page.locator(f'.theme-change-button[data-mode="{mode}"]:visible').all():
                    item.click()
        background[mode] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert page.evaluate("document.documentElement.dataset.theme") == mode
    assert background["dark"] != background["light"]
    assert visit.problems == []


@pytest.mark.parametrize("name", ["index", "workshop/arrays"])
def test_navigation_is_the_order_of_the_book(visit, name):
    page = visit(f"{name}.html")
    links = page.locator("nav.bd-links a.reference.internal")
    found = links.evaluate_all("links => links.map(a => new URL(a.href).pathname)")
    assert found == [f"/{page}.html" for page in PAGES]


def test_names_lead_to_their_definitions(book, settings):
    "nbdev's links to the published site are links between the pages, whatever their folder."
    pages = {name: (book / "_site" / f"{name}.html").read_text(encoding="utf-8") for name in PAGES}
    published = f'href="{settings["doc_host"]}{settings["doc_baseurl"]}/'
    assert [name for name, text in pages.items() if published in text] == []
    link = re.compile(r'href="((?:\.\./)?[\w/]+\.html)#[\w.]+">(?:<span[^>]*>)?<code')
    found = {name: link.findall(text) for name, text in pages.items()}
    ways = {("/" in name, href.startswith("../")) for name in PAGES for href in found[name]}
    assert {(False, False), (True, True)} <= ways        # from a lesson, and out of a folder


def page(cells, **front):
    "A notebook as nbdev leaves it for Quarto."
    front = "".join(f"{key}: {value}\n" for key, value in front.items())
    first = nbformat.v4.new_raw_cell(f"---\n{front}---")
    return nbformat.v4.new_notebook(cells=[first, *cells])


def small_book(folder, cells):
    "A book of an index and a page with these cells, in a folder of its own."
    (folder / "part").mkdir(parents=True)
    nbformat.write(page(cells, title="Page"), folder / "part/01_page.ipynb")
    (folder / "index.md").write_text("# Index\n\n```{toctree}\npart/01_page\n```\n")


def test_broken_links_fail_the_build(tmp_path, copy_book, plain_env):
    book = copy_book(tmp_path, "settings.ini", "docs")
    links = {"whole": "[a](../index.md) [b](/part/01_page.ipynb#a-heading)",
             "broken": "[a](77_nowhere.ipynb) [b](/part/01_page.ipynb#no-such-heading)"}
    done = {}
    for name, text in links.items():
        small_book(book / name, [nbformat.v4.new_markdown_cell(f"## A heading\n\n{text}")])
        sphinx = f"-m sphinx -W --keep-going -q -b html -c docs {name} out-{name}".split()
        done[name] = run(*sphinx, cwd=book, env=plain_env | {"PYTHONPATH": str(ROOT)})
    assert done["whole"].returncode == 0, done["whole"].stderr
    assert done["broken"].returncode != 0
    assert all(name in done["broken"].stderr for name in ("77_nowhere", "no-such-heading"))


PLANTED_HTML = """<table onclick='planted()'><tr><td><b>kept</b><script>planted()</script>
<img src=x onerror=planted()><a href='javascript:planted()'>a</a>
<style>td { background: url(javascript:planted()) }</style><style>td { color: green }</style>
</td></tr></table><svg onload=planted()><iframe src=//planted>"""

PLANTED_MARKDOWN = r"""**kept** $a<b$ [good](https://example.org/kept) [bad](javascript:planted())
[b]( java&#115;cript:planted()) [c](<javascript:planted()>) [d](javascript&colon;planted())

<script>planted()</script><img src=x onerror="planted()"><details open ontoggle=planted()>

[e]

[e]: JavaScript:planted()

```{raw} html
<script>planted()</script>
```

~~~ {raw} html
<script>planted()</script>
~~~

```{include} /etc/hostname
```

{download}`/etc/hostname` `x`{=html} $\href{javascript:planted()}{f}$
$\\href{javascript:planted()}{f}$

<!-- x --><?php planted() ?>
"""

PLANTED = {
    "text/html": PLANTED_HTML,
    "text/markdown": PLANTED_MARKDOWN,
    "application/javascript": "planted()",
    "image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg'><script>planted()</script></svg>",
    "text/latex": r"$\href{javascript:planted()}{x}$",
}


class Active(HTMLParser):
    "Collects what a browser would run in a page, and what was to be kept."
    loads = {"iframe", "object", "embed", "base", "meta-refresh"}

    def __init__(self, text):
        super().__init__()
        self.found, self.script, self.kept = [], False, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.script = tag == "script"
        self.found += [f"<{tag} {k}={v}>" for k, v in attrs if "planted()" in f"{v}"
                       and (k[:2] == "on" or k in ("src", "style", "srcdoc")
                            or re.match(r"\s*(javascript|data|vbscript)\s*:", f"{v}", re.I))]
        if tag in self.loads:
            self.found.append(f"<{tag}>")
        if tag == "a" and dict(attrs).get("href") == "https://example.org/kept":
            self.kept += "link "

    def handle_endtag(self, tag):
        self.script = False

    def handle_data(self, text):
        if self.script and "planted()" in text:
            self.found.append("script: " + text[:60])
        if text == "kept":
            self.kept += "text "


def test_nothing_stored_in_an_output_runs(tmp_path, copy_book, plain_env):
    v4 = nbformat.v4
    outputs = [v4.new_output("display_data", data={k: text}) for k, text in PLANTED.items()]
    outputs.append(v4.new_output("stream", name="stdout", text="<script>planted()</script>"))
    book = copy_book(tmp_path, "settings.ini", "docs")
    small_book(book / "source", [v4.new_code_cell("1 + 1", outputs=[o], execution_count=1)
                                 for o in outputs])
    sphinx = "-m sphinx -q -b html -c docs source out".split()
    done = run(*sphinx, cwd=book, env=plain_env | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    text = (book / "out/part/01_page.html").read_text(encoding="utf-8")
    page = Active(text)
    assert page.found == [] and page.kept.count("text") == 2 and "link" in page.kept
    assert "color: green" in text and "background: url" not in text and r"\href" not in text
    assert not [p for p in (book / "out").rglob("*") if p.name in ("hostname", "_downloads")]


HOSTILE_PAGE = """<script>
fetch("{server}/fetch"); new Image().src = "{server}/image"; location = "{server}/elsewhere";
try {{ parent.document.title = "planted" }} catch (error) {{ }}
</script><meta http-equiv="refresh" content="0; url={server}/refresh">"""
KIND_PAGE = "<b></b><script>document.querySelector('b').textContent = 'ran'</script>"


@pytest.fixture
def outside():
    "A server that a page has no business with: its address, and what it was asked for."
    class Server(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass
    asked, server = [], ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_a_page_in_a_frame_reaches_nothing(tmp_path, copy_book, plain_env, browser, outside):
    "It runs, but neither the network, nor another page, nor the site around it."
    address, asked = outside
    page = HOSTILE_PAGE.format(server=address)
    pages = [Live("A page", text, b"", "Nothing.", 40, 40).html() for text in (KIND_PAGE, page)]
    outputs = [nbformat.v4.new_output("display_data", data={"text/html": html}) for html in pages]
    book = copy_book(tmp_path, "settings.ini", "docs")
    small_book(book / "source", [nbformat.v4.new_code_cell("1 + 1", outputs=outputs)])
    sphinx = "-m sphinx -q -b html -c docs source out".split()
    done = run(*sphinx, cwd=book, env=plain_env | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    shown = browser.new_page()
    shown.goto((book / "out/part/01_page.html").as_uri())
    shown.wait_for_timeout(1500)
    assert shown.frames[1].locator("b").inner_text() == "ran"
    assert asked == [] and shown.title() != "planted"
    shown.close()
