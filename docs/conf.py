"""The offline site: the notebooks in `_proc/`, through Sphinx, with nothing from the network.

build.py lets nbdev prepare `_proc/` and runs Sphinx; reader.py turns what nbdev made for Quarto
into what MyST reads.
"""
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from address import settings  # noqa: E402

cfg = settings()

project = cfg["title"]
author = cfg["author"]
copyright = cfg["copyright"]
release = version = cfg["version"]
language = "en"
extensions = ["myst_nb"]
exclude_patterns = ["html", "doctrees", "jupyter_execute", ".ipynb_checkpoints"]

# notebooks: the stored outputs are shown, nothing is executed
nb_custom_formats = {".ipynb": ["reader.read", {}, False]}
nb_execution_mode = "off"
nb_output_stderr = "remove"       # progress bars
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "dollarmath"]
highlight_language = "none"       # a fence without a language is no Python; cells say what they are
myst_heading_anchors = 4
myst_heading_slug_func = "reader.slug"

# MathJax as one local file
mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent
mathjax /= "static/mathjax/tex-svg-full.js"
mathjax_path = mathjax.name

html_theme = "sphinx_book_theme"
html_title = cfg["title"]
html_context = {"default_mode": "auto"}
html_favicon = "icon.svg"
html_static_path = [str(mathjax), "book.css", "book.js"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_copy_source = False
html_last_updated_fmt = None
html_theme_options = {
    "repository_url": cfg["git_url"],
    "repository_branch": cfg["branch"],
    "path_to_docs": cfg["nbs_path"],
    "use_repository_button": True,
    "use_source_button": False,
    "use_download_button": False,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "show_toc_level": 2,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "home_page_in_toc": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def no_other_pages(app, pagename, templatename, context, doctree):
    "A frame shows what its output brings, and may not go elsewhere."
    alone = '<meta http-equiv="Content-Security-Policy" content="frame-src \'none\'">'
    context["metatags"] = context.get("metatags", "") + alone


def setup(app):
    "Called by Sphinx."
    app.connect("html-page-context", no_other_pages)
