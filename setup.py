"""Packaging from settings.ini, the one place that names versions and requirements."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(ROOT / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

EXTRAS = ("book", "vision", "text", "large")
extras = {name: cfg[f"{name}_requirements"].split() for name in EXTRAS}
extras["dev"] = [*sum(extras.values(), []), *cfg["dev_requirements"].split()]

# The notebooks travel inside the package, with their order, records, weights and results: an
# installed wheel can run the book.
NOTEBOOKS = ("*.ipynb", "sidebar.yml", "claims/*.yml", "records/*.*", "weights/*.*", "results/*.*")
folders = {path.parent.relative_to(ROOT / cfg["nbs_path"])
           for path in (ROOT / cfg["nbs_path"]).rglob("*.ipynb")
           if ".ipynb_checkpoints" not in path.parts}
notebooks = {".".join(("agop_book.nbs", *folder.parts)): Path(cfg["nbs_path"], folder).as_posix()
             for folder in folders}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    project_urls={"Book": cfg["doc_host"] + cfg["doc_baseurl"]},
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=[*find_packages(str(ROOT), include=["agop_book", "agop_book.*"]), *notebooks],
    package_dir=notebooks,
    package_data={"agop_book.book": ["*.html", "templates/*"],
                  **{name: list(NOTEBOOKS) for name in notebooks}},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    # "nbdev" is where the site looks up which cell defines a name.
    entry_points={"console_scripts": [cfg["console_scripts"]],
                  "nbdev": ["agop_book=agop_book._modidx:d"]},
    zip_safe=False,
)
