"""The repository's address, wherever it is written: `python docs/address.py` (`make export`).

settings.ini is its one place. Badges and install cells of the notebooks are made from it. In all
other text the address that was written last, which CITATION.cff names, gives way to it.
"""
import json
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("README.md", "CONTRIBUTING.md", "nbs/_quarto.yml", "nbs/nbdev.yml", "CITATION.cff")
BADGE = re.compile(r"https://colab\.research\.google\.com/github/[^)\s]*\.ipynb")
INSTALL = re.compile(r'%pip install -q "?agop_book(?:\[([\w,]*)\])?.*')


def settings(root=ROOT):
    "The settings of the book."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def addresses(cfg):
    "Where the book is read, and where its source is."
    return cfg["doc_host"] + cfg["doc_baseurl"], cfg["git_url"]


def colab(cfg, path):
    "Where Colab opens the notebook at `path` within the folder of notebooks."
    repository = cfg["git_url"].removeprefix("https://github.com/")
    folder = f"{repository}/blob/{cfg['branch']}/{cfg['nbs_path']}"
    return f"https://colab.research.google.com/github/{folder}/{path}"


def install(cfg, extras=""):
    "The line that installs the package on Colab, with the extra `book` and those of the notebook."
    extras = ",".join(dict.fromkeys(["book", *filter(None, (extras or "").split(","))]))
    return f'%pip install -q "{cfg["lib_name"]}[{extras}] @ git+{cfg["git_url"]}"'


def field(citation, name):
    "A top-level field of CITATION.cff."
    return re.search(rf'^{name}: "?([^"\n]*)', citation, re.M)[1]


def notebook(text, path, cfg):
    "The notebook's text with its own badge and install cell."
    nb = json.loads(text)
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = BADGE.sub(colab(cfg, path), source)
        elif '"google.colab" in sys.modules' in source:
            source = INSTALL.sub(lambda m: install(cfg, m[1]), source)
        cell["source"] = source.splitlines(keepends=True)
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def written(root=ROOT):
    "Path -> text, for every file that names the address, as it should be."
    cfg = settings(root)
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    moves = list(zip((field(citation, "url"), field(citation, "repository-code")), addresses(cfg)))
    notebooks = sorted((root / cfg["nbs_path"]).rglob("*.ipynb"))
    found = {}
    for path in [*notebooks, *(root / name for name in TEXTS)]:
        if ".ipynb_checkpoints" in path.parts or not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        for old, new in moves:
            text = text.replace(old, new)
        if path in notebooks:
            text = notebook(text, path.relative_to(root / cfg["nbs_path"]).as_posix(), cfg)
        found[path] = text
    cff = root / "CITATION.cff"
    found[cff] = re.sub(r"^version: .*", f"version: {cfg['version']}", found[cff], flags=re.M)
    return found


if __name__ == "__main__":
    for path, text in written().items():
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"{path.relative_to(ROOT)}: the address of settings.ini")
