"""Records: bad input, damaged and hostile files, and what must hold for any input."""

import json
import math
import os
import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agop_book.book import records as R
from agop_book.book.captions import paper_table, short
from agop_book.book.gallery import gallery
from agop_book.book.run import notebooks
from agop_book.draw import style


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("AGOP_BOOK_SCALE", "AGOP_BOOK_FINGERPRINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "cpu")
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path / "out"))
    yield tmp_path / "out"
    plt.close("all")


class Blank:
    "A figure that is quick to save."

    def savefig(self, file, **options):
        file.write(b"\x89PNG\r\n\x1a\n")


def save(id="a-b", fig=None, **changes):
    entry = dict(measured={"x": 1}, paper=None, data="none", caption="c") | changes
    R.record(id, fig or Blank(), **entry)


def blank_page():
    return plt.figure(figsize=(1, 1))


FIELDS = {"id", "title", "caption", "measured", "paper", "key", "data", "scale", "device", "seed",
          "seconds", "versions", "fingerprint"}


def test_record_round_trip(fresh, monkeypatch):
    monkeypatch.setenv("AGOP_BOOK_FINGERPRINT", "abc")
    measured = {"r2": np.float32(0.5), "t": torch.tensor([1, 2]), "df": pd.DataFrame({"a": [1]}),
                "nan": float("nan")}
    save("fig-1", blank_page(), measured=measured, paper={"r2": 0.6}, seed=np.int64(3), seconds=1.5)
    entry = json.loads((fresh / "fig-1.json").read_text(), parse_constant=not_json)
    assert entry["measured"] == {"r2": 0.5, "t": [1, 2], "df": [{"a": 1}], "nan": None}
    assert set(entry) == FIELDS
    assert set(entry["versions"]) == {"agop_book", "python", "numpy", "torch", "scikit-learn"}
    assert (fresh / "fig-1.png").read_bytes().startswith(b"\x89PNG")
    row = R.records().iloc[0]
    assert (row.id, row.seed, row.scale, row.device) == ("fig-1", 3, "quick", "cpu")
    assert row.fingerprint == "abc" and not list(fresh.glob(".*"))


def not_json(constant):
    pytest.fail(f"{constant} is not JSON")


def test_same_picture_same_bytes(fresh):
    save("one", blank_page())
    save("two", blank_page())
    assert (fresh / "one.png").read_bytes() == (fresh / "two.png").read_bytes()


def test_background_is_opaque_white(fresh):
    style()
    with plt.rc_context({"savefig.facecolor": "none", "savefig.transparent": False}):
        save("white", blank_page())
    image = plt.imread(fresh / "white.png")
    assert (image[0, 0] == 1).all()


BAD_IDS = ["", "A", "a b", "../a", "a--b", "a-", "a/b", None, "ä", "x" * 300]


@pytest.mark.parametrize("id", BAD_IDS)
def test_bad_id(id, fresh):
    with pytest.raises(ValueError, match="id="):
        save(id)
    assert not list(fresh.glob("*"))


@pytest.mark.parametrize("wrong, text", [
    (dict(measured=[1]), "measured"),
    (dict(paper=3), "paper"),
    (dict(measured={"f": {"g": len}}), r"measured\['f'\]\['g'\]"),
    (dict(fig=3), "fig"),
])
def test_bad_record(wrong, text, fresh):
    with pytest.raises(TypeError, match=text):
        save(**wrong)
    assert not (fresh / "a-b.json").exists() and not (fresh / "a-b.png").exists()


@pytest.mark.parametrize("key, text", [(["y"], "no 'y'"), (list("x" * 6), "at most 5")])
def test_bad_key(key, text, fresh):
    with pytest.raises(ValueError, match=f"key.*{text}"):
        save(key=key)
    assert not list(fresh.glob("*"))


def test_axes_are_recorded_as_their_figure(fresh):
    save("axes", blank_page().add_subplot())
    assert list(R.records().id) == ["axes"]


def test_json_comes_last(fresh, monkeypatch):
    """Killed between the two files: a picture, but no record."""
    write = R.write_atomic

    def killed(path, data):
        if path.suffix == ".json": raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(R, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        save()
    assert (fresh / "a-b.png").exists() and R.records(fresh).empty


@pytest.mark.parametrize("text", ['{"id": "a', "", "[]", "3", '{"id": "a-b"}', "\xff"])
def test_foreign_json_is_passed_over(text, fresh):
    save("whole")
    save("a-b")
    (fresh / "a-b.json").write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="a-b.json is left out"):
        assert list(R.records(fresh).id) == ["whole"]


def test_json_without_picture_is_no_record(fresh):
    save()
    (fresh / "a-b.png").unlink()
    with pytest.warns(UserWarning, match="no picture"):
        found = R.records(fresh)
    assert found.empty and FIELDS <= set(found.columns)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


def nested(values):
    return st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3)


json_like = st.recursive(scalars, nested, max_leaves=8)
SLOW_DISK = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(max_examples=50, **SLOW_DISK)
@given(value=json_like)
def test_any_measurement_becomes_strict_json(value, fresh):
    save(measured={"x": value})
    text = (fresh / "a-b.json").read_text()
    back = json.loads(text, parse_constant=not_json)["measured"]["x"]
    if not isinstance(value, float) or math.isfinite(value):
        assert type(back) is type(value)


@given(
    st.dictionaries(st.text(min_size=1), json_like, min_size=1, max_size=4),
    st.none() | st.text() | st.dictionaries(st.text(min_size=1), st.floats(), max_size=3),
)
def test_any_record_can_be_tabulated(measured, paper):
    table = paper_table(measured, paper)
    assert set(table.columns) <= {"here", "paper"}
    assert all(isinstance(short(value), str) for row in table.values for value in row)


# --- files of others

def edited(folder, **changes):
    save("a-b")
    path = folder / "a-b.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


WRONG = [
    dict(versions=[]), dict(measured=[1]), dict(measured="x"), dict(paper=[1]), dict(caption=None),
    dict(caption={"a": 1}), dict(data=3), dict(scale="huge"), dict(scale=[]), dict(device=None),
    dict(seconds="long"), dict(seconds=[1]), dict(id="other"), dict(id=["a-b"]),
    dict(caption="x" * 5_000_000),
]


@pytest.mark.parametrize("changes", WRONG)
def test_records_that_are_not_whole_are_named_and_left_out(changes, fresh):
    save("whole", blank_page())
    path = edited(fresh, **changes)
    with pytest.warns(UserWarning, match="a-b.json is left out"):
        found = R.records(fresh)
    assert list(found.id) == ["whole"]
    with pytest.warns(UserWarning):
        assert gallery(fresh) is None
    with pytest.warns(UserWarning):
        assert R.read_record(path) is None


@pytest.mark.parametrize("depth", [30, 900, 100_000])
def test_deeply_nested_records_are_left_out(depth, fresh):
    path = edited(fresh, measured={"x": "HERE"})
    path.write_text(path.read_text().replace('"HERE"', "[" * depth + "]" * depth))
    with pytest.warns(UserWarning, match="a-b.json.*nested too deeply"):
        assert R.records(fresh).empty


def test_a_picture_that_is_none(fresh):
    save()
    (fresh / "a-b.png").write_bytes(b"<svg onload=planted()>")
    with pytest.warns(UserWarning, match="a-b.json.*no PNG"):
        assert R.records(fresh).empty


def test_records_of_the_book_raise_no_warning():
    folder = notebooks() / "records"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(R.records(folder)) == len(list(folder.glob("*.json"))) > 0


def test_the_books_records_are_found_where_one_has_none(fresh, monkeypatch):
    stored = R.records(notebooks() / "records")
    assert list(R.records().id) == list(stored.id)
    save("mine")
    assert list(R.records().id) == ["mine"]


def test_an_unwritable_folder_is_found_before_the_drawing(fresh):
    fresh.mkdir()
    (fresh / "results").write_text("a file")
    fig = Blank()
    fig.savefig = not_json                                     # which fails
    os.environ["AGOP_BOOK_OUT"] = str(fresh / "results/below")  # restored by the fixture
    with pytest.raises(PermissionError, match="AGOP_BOOK_OUT"):
        save("a", fig)
