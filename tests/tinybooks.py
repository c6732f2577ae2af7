"""Tiny books for the tests of chapters and of the command: folders of a few notebooks."""

import nbformat

IMPORTS = ("import os, time\nfrom pathlib import Path\nimport matplotlib.pyplot as plt\n"
           "from agop_book.book.records import record\n"
           "from agop_book.book.run import scale\n"
           "from agop_book.book.sweep import sweep")


def fig(id, value="1"):
    "Code that records a figure."
    return (f"record('{id}', plt.figure(figsize=(1, 1)), measured=dict(value={value}), "
            "paper=dict(value=2), data='none', caption='c', seconds=1)")


def chapter(folder, name, *sources):
    "Write a notebook; a source that begins with `# ` is Markdown."
    path = folder / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nb = nbformat.v4.new_notebook()
    for i, source in enumerate(sources):
        text = source.startswith("# ")
        make = nbformat.v4.new_markdown_cell if text else nbformat.v4.new_code_cell
        nb.cells.append(make(source, id=f"c{i}"))
    nbformat.write(nb, path)


def sidebar(folder, text):
    "Write the order of a book: the contents of the sidebar, in YAML."
    (folder / "sidebar.yml").write_text(f"website: {{sidebar: {{contents: {text}}}}}")
