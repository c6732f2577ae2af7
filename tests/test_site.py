"""The site: it builds without a warning, and a browser without a network shows every page as it should be."""
import re
import shutil
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted(p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))
PAGES = ["index", *CHAPTERS]
COLAB = "https://colab.research.google.com/github/agop-book/agop_book/blob/main/nbs/{}.ipynb"
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()


def source(page):
    "The markdown of a notebook."
    cells = nbformat.read(ROOT / "nbs" / f"{page}.ipynb", as_version=4).cells
    return "\n".join(c.source for c in cells if c.cell_type == "markdown")


@pytest.fixture(scope="session")
def book(tmp_path_factory, copy_book, plain_env):
    "A scratch copy of the book with its site built."
    book = copy_book(tmp_path_factory.mktemp("book"), "settings.ini", "_quarto.yml", "nbs", "agop_book", "docs")
    done = subprocess.run([sys.executable, "docs/build.py"], cwd=book, env=plain_env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"the site does not build:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return book


@pytest.fixture(scope="session")
def address(book):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=book / "_site"))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium on the PATH (Debian: apt install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    "visit(path) -> the opened page; whatever goes wrong in it, the network included, ends up in visit.problems."
    context = browser.new_context(color_scheme="light")
    problems = []

    def route(request):
        if request.request.url.startswith((address, "data:", "blob:")):
            return request.continue_()
        problems.append(f"asked the network for {request.request.url}")
        request.abort()

    def visit(path, width=1400):
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.on("console", lambda m: m.type in ("error", "warning") and problems.append(f"console: {m.text}"))
        page.on("pageerror", lambda e: problems.append(f"exception: {e}"))
        page.on("requestfailed", lambda r: problems.append(f"failed: {r.url}"))
        page.on("response", lambda r: r.status >= 400 and problems.append(f"{r.status}: {r.url}"))
        page.goto(f"{address}/{path}")
        page.evaluate("async () => { await window.MathJax?.startup?.promise }")
        return page

    context.route("**/*", route)
    visit.problems = problems
    yield visit
    context.close()


def test_every_notebook_has_its_page(book):
    assert {p.stem for p in (book / "_site").glob("*.html")} >= set(PAGES)


@pytest.mark.parametrize("width", [1400, 390], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", PAGES)
def test_page(visit, name, width):
    page = visit(f"{name}.html", width)
    for image in page.locator("article img").all():      # some load when they are scrolled to
        image.scroll_into_view_if_needed()
    page.wait_for_load_state("networkidle")
    assert visit.problems == []
    assert page.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src)") == []
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, "the page is wider than the screen"

    if re.search(r"\$[^$]+\$", source(name)):
        assert page.locator("mjx-container").count() > 0, "mathematics is not typeset"
    assert page.locator("article .math:not(:has(mjx-container))").all_inner_texts() == [], "left as it was"
    assert page.locator('[data-mjx-error], mtext[mathcolor="red"]').all_inner_texts() == [], "a formula with an error"

    cells = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4).cells
    for alt in re.findall(r"^#\| fig-alt:\s*[\"']?(.+?)[\"']?$", "\n".join(c.source for c in cells), re.M):
        assert page.locator(f'img[alt="{alt}"]').count() >= 1, "the alternative text of a picture is lost"
    if name in CHAPTERS:
        assert page.locator(f'article a[href="{COLAB.format(name)}"]').count() == 1, "no Colab badge"
        assert page.locator(f'.dropdown-launch-buttons a[href="{COLAB.format(name)}"]').count() == 1, "no launch button"


def test_search_finds_the_chapter(visit):
    page = visit("search.html?q=Laplace+kernel")
    page.wait_for_selector("#search-results li a")
    found = page.locator("#search-results li a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert any(href.startswith("01_kernels.html") for href in found), found
    assert visit.problems == []


def test_dark_mode(visit):
    page = visit("index.html")
    background = {}
    for mode in ("dark", "light"):
        for _ in range(3):                               # the button opens a menu or, in older themes, goes round
            if page.evaluate("document.documentElement.dataset.theme") != mode:
                page.locator(".theme-switch-button:visible").first.click()
                for item in page.locator(f'.theme-change-button[data-mode="{mode}"]:visible').all():
                    item.click()
        background[mode] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert page.evaluate("document.documentElement.dataset.theme") == mode
    assert background["dark"] != background["light"]
    assert visit.problems == []


def test_navigation_lists_the_chapters(visit):
    page = visit("index.html")
    links = page.locator("nav.bd-links a, .bd-sidebar-primary a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert [f"{name}.html" for name in CHAPTERS] == [href for href in links if href and href[0].isdigit()]


def test_broken_links_fail_the_build(book, tmp_path, plain_env):
    for name in ("_proc", "docs", "nbs"):
        shutil.copytree(book / name, tmp_path / name)
    for name in ("_quarto.yml", "settings.ini"):
        shutil.copy2(book / name, tmp_path)
    path = tmp_path / "_proc" / "02_agop.ipynb"
    nb = nbformat.read(path, as_version=4)
    nb.cells.append(nbformat.v4.new_markdown_cell("[chapter](77_nowhere.ipynb) and [heading](01_kernels.ipynb#no-such-heading)"))
    nbformat.write(nb, path)
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", "docs", "_proc", "out/html"]
    done = subprocess.run(sphinx, cwd=tmp_path, env=plain_env, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "77_nowhere" in done.stderr and "no-such-heading" in done.stderr


PLANTED = {
    "text/html": "<table onclick='planted()'><tr><td><b>kept</b><script>planted()</script><img src=x onerror=planted()><a href='javascript:planted()'>a</a>"
                 "<style>td { background: url(javascript:planted()) }</style><style>td { color: green }</style></td></tr></table><svg onload=planted()><iframe src=//planted>",
    "text/markdown": "**kept** $a<b$ [good](https://example.org/kept) [bad](javascript:planted()) [b]( java&#115;cript:planted()) [c](<javascript:planted()>) [d](javascript&colon;planted())\n\n"
                     "<script>planted()</script><img src=x onerror=\"planted()\"><details open ontoggle=planted()>\n\n[e]\n\n[e]: JavaScript:planted()\n\n```{raw} html\n<script>planted()</script>\n```\n\n"
                     "~~~ {raw} html\n<script>planted()</script>\n~~~\n\n```{include} /etc/hostname\n```\n\n{download}`/etc/hostname` `x`{=html} $\\href{javascript:planted()}{f}$ $\\\\href{javascript:planted()}{f}$\n\n<!-- x --><?php planted() ?>\n",
    "application/javascript": "planted()", "image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg'><script>planted()</script></svg>",
    "text/latex": "$\\href{javascript:planted()}{x}$"}


class Active(HTMLParser):
    "Collects what a browser would run in a page."
    def __init__(self, text):
        super().__init__()
        self.found, self.script, self.kept = [], False, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.script = tag == "script"
        self.found += [f"<{tag} {name}={value}>" for name, value in attrs if "planted()" in f"{value}" and (name[:2] == "on" or name in ("src", "style", "srcdoc") or re.match(r"\s*(javascript|data|vbscript)\s*:", f"{value}", re.I))]
        self.found += [f"<{tag}>" for name in ("iframe", "object", "embed", "base", "meta-refresh") if tag == name]
        if tag == "a" and dict(attrs).get("href") == "https://example.org/kept": self.kept += "link "

    def handle_endtag(self, tag): self.script = False

    def handle_data(self, text):
        if self.script and "planted()" in text: self.found.append("script: " + text[:60])
        if text == "kept": self.kept += "text "


def test_nothing_stored_in_an_output_runs(tmp_path, copy_book, plain_env):
    book = copy_book(tmp_path, "settings.ini", "_quarto.yml", "docs")
    outputs = [nbformat.v4.new_output("display_data", data={kind: text}) for kind, text in PLANTED.items()]
    outputs.append(nbformat.v4.new_output("stream", name="stdout", text="<script>planted()</script>"))
    cells = [nbformat.v4.new_raw_cell("---\ntitle: Planted\noutput-file: page.html\n---"), *(nbformat.v4.new_code_cell("1 + 1", outputs=[o], execution_count=1) for o in outputs)]
    (book / "_proc").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), book / "_proc/01_page.ipynb")
    (book / "_proc/index.md").write_text("# Index\n\n```{toctree}\n01_page\n```\n")
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-c", "docs", "_proc", "out"]
    done = subprocess.run(sphinx, cwd=book, env=plain_env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    page = Active((book / "out/01_page.html").read_text())
    assert page.found == [] and page.kept.count("text") == 2 and "link" in page.kept
    text = (book / "out/01_page.html").read_text()
    assert "color: green" in text and "background: url" not in text and r"\href" not in text
    assert not [p for p in (book / "out").rglob("*") if p.name in ("hostname", "_downloads")]
