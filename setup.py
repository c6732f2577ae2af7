"""Packaging from settings.ini, the one place that names versions and requirements."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser(delimiters=["="], interpolation=None)
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    # The chapters travel inside the package, so that an installed wheel can run the book.
    packages=["agop_book", "agop_book.nbs"],
    package_dir={"agop_book.nbs": cfg["nbs_path"]},
    package_data={"agop_book.nbs": ["*.ipynb", "records/*.png", "records/*.json", "weights/*.safetensors", "weights/*.json", "results/*.csv"]},
    install_requires=cfg["requirements"].split(),
    extras_require={
        "vision": cfg["vision_requirements"].split(),
        "text": cfg["text_requirements"].split(),
        "dev": cfg["dev_requirements"].split(),
    },
    # "nbdev" is where the site looks up which cell defines a name.
    entry_points={"console_scripts": [cfg["console_scripts"]], "nbdev": ["agop_book=agop_book._modidx:d"]},
    zip_safe=False,
)
