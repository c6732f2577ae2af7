"""What a lesson owes its reader: a picture early, little code, boxes to try, a verdict, words for
every picture, a way on."""
import ast
import inspect
import json
import re
from pathlib import Path

import pytest
from conftest import notebooks
from test_style import MAGIC

import agop_book.all
from agop_book.book.claims import claims
from agop_book.book.records import read_record

NBS = Path(__file__).parents[1] / "nbs"
PAGES = [name.removesuffix(".ipynb") for name in notebooks() if "/" not in name]
LESSONS = [name for name in PAGES if name[:2].isdigit()]
EARLY = 8                  # cells, within which there is something to see
VISIBLE = 250              # lines of code in a lesson
LONGEST = 20               # lines of a cell
LARGEST = 1_500_000        # bytes of a notebook, which GitHub still shows
HEADER = re.compile(
    r"^\*\*Before this:\*\* .+ · \*\*Reading time:\*\* \d+ minutes · "
    r"\*\*Running time:\*\* .+ at quick scale, .+ at book scale · \*\*Data:\*\* .+$", re.M)
# what may change its mind about a table has to be told everything in a lesson
ESTIMATOR = re.compile(r"(Map|Conv|Deep|Transfer)?RFM(Regressor|Classifier)?$")
NAMED = ({"bandwidth", "kernel"}, {"reg"}, {"metric", "diag"}, {"center"})


def cells(name):
    return json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def text(name):
    return "\n\n".join(source(c) for c in cells(name) if c["cell_type"] == "markdown")


def code(name, hidden=False):
    "The code cells that a reader sees."
    found = [c for c in cells(name) if c["cell_type"] == "code"]
    return [c for c in found if hidden or not re.search(r"^#\| *hide\s*$", source(c), re.M)]


def lines(cell):
    "What is seen of a cell; its options are not."
    return [x for x in source(cell).splitlines() if not x.startswith("#|")]


def pictures(cell):
    "The outputs of a cell that are pictures."
    kinds = ("image/png", "image/jpeg")
    return [o for o in cell.get("outputs", ()) if any(k in o.get("data", {}) for k in kinds)]


@pytest.mark.parametrize("name", LESSONS)
def test_there_is_something_to_see_early(name):
    assert any(pictures(cell) for cell in cells(name)[:EARLY])


@pytest.mark.parametrize("name", LESSONS)
def test_there_is_little_code(name):
    assert max(len(lines(cell)) for cell in code(name)) <= LONGEST
    assert sum(bool(x.strip()) for cell in code(name) for x in lines(cell)) <= VISIBLE


@pytest.mark.parametrize("name", LESSONS)
def test_the_first_lines_say_what_to_expect(name):
    start = source(cells(name)[1])
    assert HEADER.search(start) and "colab-badge" in start


@pytest.mark.parametrize("name", LESSONS)
def test_the_last_line_leads_on(name):
    order = ["index", *LESSONS, "failures"]
    place = order.index(name)
    last = source(cells(name)[-1]).strip().splitlines()[-1]
    way = (rf"← \[.+\]\({order[place - 1]}\.ipynb\) · \[all chapters\]\(index\.ipynb#chapters\)"
           rf" · \[.+\]\({order[place + 1]}\.ipynb\) →")
    assert re.fullmatch(way, last)


@pytest.mark.parametrize("name", LESSONS)
def test_there_are_boxes_to_try(name):
    "A prediction is asked for, a cell is run, the answer follows."
    found = cells(name)
    boxes = [i for i, c in enumerate(found)
             if re.search(r"^> \*\*Try it\.\*\*.*\bPredict\b", source(c), re.M)]
    assert len(boxes) >= 2
    for i in boxes:
        shown = [c for c in found[i + 1:i + 5] if c["cell_type"] == "code"]
        assert shown and any("<summary>Answer</summary>" in source(c) for c in found[i + 2:i + 6])


@pytest.mark.parametrize("name", LESSONS)
def test_exercises_climb(name):
    words = text(name)
    steps = [words.index(f"**{step}**") for step in ("Recall", "Derive", "Break it")]
    assert steps == sorted(steps) and words.count("<summary>Solution</summary>") >= 3
    assert words.count("<details>") == words.count("</details>")


@pytest.mark.parametrize("name", LESSONS)
def test_there_is_a_verdict(name):
    calls = [c for c in code(name) if f'verdicts("{name}")' in source(c)]
    assert len(calls) == 1
    shown = "".join(calls[0]["outputs"][0]["data"]["text/markdown"])
    assert [c.claim in shown for c in claims(name)].count(False) == 0


def test_every_claim_is_one_of_a_lesson_and_has_its_numbers():
    found = claims()
    assert {c.chapter for c in found} == set(LESSONS)
    assert len({c.id for c in found}) == len(found)
    for claim in found:
        assert not claim.figure or read_record(NBS / "records" / f"{claim.figure}.json")
        assert claim.why or claim.verdict in ("agrees", "not tested"), claim.id


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_has_words(name):
    for cell in code(name, hidden=True):
        for output in pictures(cell):
            metadata = output.get("metadata", {}).values()
            spoken = any("alt" in m for m in metadata if isinstance(m, dict))
            assert spoken or re.search(r"^#\| *fig-alt: *\S", source(cell), re.M), source(cell)


def calls(name):
    "The calls of functions with names in a lesson's code, and the names of the dicts in it."
    for cell in code(name, hidden=True):
        tree = ast.parse(MAGIC.sub(r"\1pass", source(cell)))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                yield node


@pytest.mark.parametrize("name", [name for name in LESSONS if name != "15_practice"])
def test_estimators_are_told_everything(name):
    "15 is about the default call; all others name what a default could change."
    for call in calls(name):
        if not ESTIMATOR.fullmatch(call.func.id):
            continue
        given = {keyword.arg for keyword in call.keywords}
        if None in given:                                           # **a shared dict
            continue
        taken = inspect.signature(getattr(agop_book.all, call.func.id)).parameters.keys()
        missing = [names for names in NAMED if names & taken and not names & given]
        assert not missing, f"{ast.unparse(call)} leaves {missing} to a default"


@pytest.mark.parametrize("name", LESSONS)
def test_records_have_titles_for_people(name):
    for call in calls(name):
        if call.func.id == "record":
            given = {keyword.arg for keyword in call.keywords}
            assert {"title", "caption", "measured", "paper", "data", "seed"} <= given


@pytest.mark.parametrize("name", PAGES)
def test_notebooks_are_small_enough_to_be_shown(name):
    limit = 300_000 if name == "index" else LARGEST
    assert (NBS / f"{name}.ipynb").stat().st_size < limit
