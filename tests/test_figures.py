"""Records, sweeps and pictures: bad input, and what must hold for any input."""
import json
import math
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agop_book import figures as F


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("AGOP_BOOK_SCALE", "AGOP_BOOK_DEVICE", "AGOP_BOOK_FINGERPRINT", "AGOP_BOOK_SINCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path / "out"))
    yield tmp_path / "out"
    plt.close("all")


def save(id="a-b", **kw):
    fig = plt.figure(figsize=(1, 1))
    F.record(id, fig, **{**dict(measured={"x": 1}, paper=None, data="none", caption="c"), **kw})
    plt.close(fig)


# --- scale, device, folder

def test_scale_and_pick(monkeypatch):
    assert F.scale() == "quick" and F.pick(quick=1, book=2, paper=3) == 1
    monkeypatch.setenv("AGOP_BOOK_SCALE", "paper")
    assert F.pick(quick=1, book=2, paper=3) == 3 and F.pick(quick=1) == 1
    assert F.pick(quick=1, book=None) is None          # None is a value, not "left out"
    monkeypatch.setenv("AGOP_BOOK_SCALE", "Quick")
    with pytest.raises(ValueError, match="'Quick'.*quick, book, paper"):
        F.scale()


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "mps", "CUDA"])
def test_unknown_device(name):
    with pytest.raises(ValueError, match="auto, cpu, cuda or cuda:N"):
        F.device(name)


def test_device(monkeypatch):
    assert F.device("cpu") == F.device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert F.device() == F.device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda'.*no GPU.*cpu"):
        F.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert F.device() == torch.device("cuda") and F.device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="cuda:2.*cuda:1"):
        F.device("cuda:2")
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "cpu")
    assert F.device() == torch.device("cpu")


def test_unwritable_folder(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path / "file" / "below"))
    with pytest.raises(PermissionError, match="cannot be written.*AGOP_BOOK_OUT"):
        F.out_dir()


def test_default_folder_is_here(monkeypatch, tmp_path):
    monkeypatch.delenv("AGOP_BOOK_OUT")
    assert F.out_dir() == tmp_path / "agop_book_out"


# --- records

def test_record_round_trip(fresh, monkeypatch):
    monkeypatch.setenv("AGOP_BOOK_FINGERPRINT", "abc")
    save("fig-1", measured={"r2": np.float32(0.5), "t": torch.tensor([1, 2]), "df": pd.DataFrame({"a": [1]}), "nan": float("nan")},
         paper={"r2": 0.6}, seed=np.int64(3), seconds=1.5)
    entry = json.loads((fresh / "fig-1.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert entry["measured"] == {"r2": 0.5, "t": [1, 2], "df": [{"a": 1}], "nan": None}
    assert set(entry) == {"id", "caption", "measured", "paper", "data", "scale", "device", "seed", "seconds", "versions", "fingerprint"}
    assert set(entry["versions"]) == {"agop_book", "python", "numpy", "torch", "scikit-learn"}
    assert (fresh / "fig-1.png").read_bytes().startswith(b"\x89PNG")
    row = F.records().iloc[0]
    assert (row.id, row.seed, row.scale, row.device, row.fingerprint) == ("fig-1", 3, "quick", "cpu", "abc")
    assert not list(fresh.glob(".*"))


def test_same_picture_same_bytes(fresh):
    save("one"), save("two")
    assert (fresh / "one.png").read_bytes() == (fresh / "two.png").read_bytes()


def test_background_is_opaque_white(fresh):
    F.style()
    with plt.rc_context({"savefig.facecolor": "none", "savefig.transparent": False}):
        save("white")
    image = plt.imread(fresh / "white.png")
    assert (image[0, 0] == 1).all()


@pytest.mark.parametrize("id", ["", "A", "a b", "../a", "a--b", "a-", "a/b", None, "ä"])
def test_bad_id(id, fresh):
    with pytest.raises(ValueError, match="id="):
        save(id)
    assert not list(fresh.glob("*")) if fresh.exists() else True


@pytest.mark.parametrize("wrong, text", [(dict(measured=[1]), "measured"), (dict(paper=3), "paper"), (dict(measured={"f": {"g": len}}), r"measured\['f'\]\['g'\]")])
def test_bad_record(wrong, text, fresh):
    with pytest.raises(TypeError, match=text):
        save(**wrong)
    assert not (fresh / "a-b.json").exists() and not (fresh / "a-b.png").exists()


def test_record_without_figure():
    with pytest.raises(TypeError, match="fig"):
        F.record("a", None, measured={}, paper=None, data="", caption="")


def test_json_comes_last(fresh, monkeypatch):
    """Killed between the two files: a picture, but no record."""
    write = F.write_atomic
    monkeypatch.setattr(F, "write_atomic", lambda path, data: (_ for _ in ()).throw(KeyboardInterrupt) if path.suffix == ".json" else write(path, data))
    with pytest.raises(KeyboardInterrupt):
        save()
    assert (fresh / "a-b.png").exists() and F.records(fresh).empty


@pytest.mark.parametrize("text", ['{"id": "a', "", "[]", "3", '{"id": "a-b"}', "\xff"])
def test_foreign_json_is_passed_over(text, fresh):
    save("whole")
    save("a-b")
    (fresh / "a-b.json").write_text(text, encoding="latin-1")
    assert list(F.records(fresh).id) == ["whole"]


def test_json_without_picture_is_no_record(fresh):
    save()
    (fresh / "a-b.png").unlink()
    assert F.records(fresh).empty and list(F.records(fresh).columns)


json_like = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                         lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3), max_leaves=8)


@given(json_like)
def test_any_measurement_becomes_strict_json(value):
    text = json.dumps(F._finite(F._plain(value)), allow_nan=False)
    back = json.loads(text)
    if not isinstance(value, float) or math.isfinite(value):
        assert type(back) is type(value)


@given(st.dictionaries(st.text(min_size=1), json_like, min_size=1, max_size=4), st.none() | st.text() | st.dictionaries(st.text(min_size=1), st.floats(), max_size=3))
def test_any_record_can_be_tabulated(measured, paper):
    table = F.paper_table(measured, paper)
    assert set(table.columns) <= {"here", "paper"}
    for row in table.values:
        [F._show(x) for x in row]


# --- sweeps

def square(x, power=2):
    square.calls += 1
    return {"value": float(x) ** power, "list": [x, x]}


@pytest.fixture
def counted():
    square.calls = 0
    return square


def test_sweep_resumes(fresh, counted):
    grid = [{"x": i} for i in range(5)]
    one = F.sweep("s", square, grid, progress=False)
    two = F.sweep("s", square, grid + [{"x": 9}], progress=False)
    assert square.calls == 6 and list(two.value) == [0, 1, 4, 9, 16, 81]
    pd.testing.assert_frame_equal(one, two.iloc[:5])
    assert (fresh / "results/s-quick.jsonl").read_text().count("\n") == 6


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 600))
def test_sweep_after_any_truncation(tmp_path_factory, cut):
    """However much of the file a crash takes, the result is the same."""
    square.calls = 0
    os.environ["AGOP_BOOK_OUT"] = str(tmp_path_factory.mktemp("out"))          # restored by the fixture
    grid = [{"x": i} for i in range(3)]
    whole = F.sweep("s", square, grid, progress=False)
    path = F.out_dir() / "results/s-quick.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-min(cut, len(data))])
    again = F.sweep("s", square, grid, progress=False)
    pd.testing.assert_frame_equal(whole.drop(columns="seconds"), again.drop(columns="seconds"))
    assert F.sweep("s", square, grid, progress=False).equals(again) and path.read_bytes().count(b"\n") == 3
    assert square.calls <= 6


def test_sweep_key(monkeypatch, counted):
    run = lambda **kw: F.sweep("s", square, [{"x": 1}], progress=False, **kw)
    run(), run(version="2"), run(version="2")
    assert square.calls == 2
    monkeypatch.setenv("AGOP_BOOK_SCALE", "book")                              # another file
    run()
    assert square.calls == 3
    monkeypatch.setenv("AGOP_BOOK_SINCE", "9e12")                              # --force
    run()
    assert square.calls == 4


def test_sweep_keeps_rows_before_a_failure(fresh):
    def fails(x):
        if x == 2:
            raise RuntimeError("no")
        return {"y": x}
    with pytest.raises(RuntimeError):
        F.sweep("s", fails, [{"x": i} for i in range(4)], progress=False)
    assert (fresh / "results/s-quick.jsonl").read_text().count("\n") == 2


def test_sweep_accepts_a_parameter_grid_and_arrays():
    from sklearn.model_selection import ParameterGrid
    got = F.sweep("s", lambda a, b: {"sum": np.float32(a + b), "v": np.arange(2)}, ParameterGrid({"a": np.arange(2), "b": [1.5]}), progress=False)
    assert list(got["sum"]) == [1.5, 2.5] and got.v[0] == [0, 1]


@pytest.mark.parametrize("call, error, text", [
    (lambda: F.sweep("a/b", square, []), ValueError, "name="),
    (lambda: F.sweep("s", square, {"x": [1]}), TypeError, "ParameterGrid"),
    (lambda: F.sweep("s", square, [{"x": len}]), TypeError, "grid: x"),
    (lambda: F.sweep("s", lambda x: 3, [{"x": 1}], progress=False), TypeError, "return a dict"),
    (lambda: F.sweep("s", lambda x: {"x": 3}, [{"x": 1}], progress=False), ValueError, r"\['x'\]"),
    (lambda: F.sweep("s", max, [{"x": 1}]), ValueError, "version="),
])
def test_bad_sweep(call, error, text):
    with pytest.raises(error, match=text):
        call()


# --- pictures

@pytest.mark.parametrize("images, kw, text", [
    (np.zeros((3, 3)), {}, "shape"), (np.zeros((2, 5, 3, 3)), {}, "shape"), (np.zeros((0, 3, 3)), {}, "empty"),
    (np.full((1, 2, 2), np.nan), {}, "NaN"), (np.zeros((2, 9)), dict(shape=(2, 4)), "rows of size"), (np.zeros((2, 3, 3)), dict(titles=["a"]), "titles"),
])
def test_bad_images(images, kw, text):
    with pytest.raises(ValueError, match=text):
        F.show_images(images, **kw)


@pytest.mark.parametrize("values", [np.zeros((1, 2, 2), complex), [[["a", "b"]]]])
def test_images_must_be_real_numbers(values):
    with pytest.raises(TypeError, match="real numbers"):
        F.show_images(values)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.sampled_from([(), (1,), (3,)]), st.integers(1, 5), st.integers(1, 5), st.sampled_from(["float32", "float64", "int64", "uint8", "bool"]))
def test_any_images(k, c, h, w, dtype):
    x = (np.random.default_rng(0).normal(size=(k, *c, h, w)) * 3).astype(dtype)
    for value in (x, torch.from_numpy(x)):
        fig = F.show_images(value, ncols=4)
        assert sum(bool(ax.images) for ax in fig.axes) == k
        plt.close(fig)


def test_sign_does_not_matter():
    v = torch.randn(2, 16, requires_grad=True, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        for image in [im for ax in F.show_images(sign * v, shape=(4, 4)).axes for im in ax.images]:
            low, high = image.get_clim()
            assert low == -high and np.isclose(high, np.abs(image.get_array()).max())


def test_show_matrix():
    fig = F.show_matrix([np.eye(3), -torch.eye(3)], ["a", "b"])
    assert [ax.get_title() for ax in fig.axes[:2]] == ["a", "b"]
    F.show_matrix(pd.DataFrame(np.eye(2), ["a", "b"], ["a", "b"]), "one")
    for wrong in (np.zeros(3), np.zeros((0, 0)), np.array([[np.inf]])):
        with pytest.raises(ValueError, match=r"matrices\[0\]"):
            F.show_matrix(wrong)
    with pytest.raises(ValueError, match="titles"):
        F.show_matrix([np.eye(2)], ["a", "b"])
    with pytest.raises(ValueError, match="empty"):
        F.show_matrix([])


def test_curves():
    df = pd.DataFrame({"n": [1, 1, 2, 2], "err": [1.0, 3.0, 2.0, 2.0], "m": ["a"] * 4})
    ax = F.curves(df, "n", "err", "m", spread="minmax")
    assert list(ax.lines[0].get_ydata()) == [2, 2]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1, 3)
    F.curves(df.iloc[:1], "n", "err")                                          # one run: no spread, no error
    with pytest.raises(KeyError, match="'x'.*not a column"):
        F.curves(df, "x", "err")
    with pytest.raises(ValueError, match="spread='range'"):
        F.curves(df, "n", "err", spread="range")


def test_gallery(fresh, monkeypatch):
    from IPython import display
    shown = []
    monkeypatch.setattr(display, "display", lambda *objects: shown.extend(objects))
    save("pipe", measured={"a|b": {"c": 1}}, paper="says | nothing", seconds=2)
    F.gallery()
    text = "".join(o.data for o in shown if isinstance(o, display.Markdown))
    assert "### pipe" in text and "a\\|b / c | 1" in text and "says \\| nothing" in text and "seconds: 2" in text
    assert any(isinstance(o, display.Image) for o in shown)
