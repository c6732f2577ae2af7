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

from agop_book.book import figures as F
from agop_book.devices import device


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
        device(name)


def test_device(monkeypatch):
    assert device("cpu") == device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device() == device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda'.*no GPU.*cpu"):
        device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device() == torch.device("cuda") and device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="cuda:2.*cuda:1"):
        device("cuda:2")
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "cpu")
    assert device() == torch.device("cpu")


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


# --- hostile input

HOSTILE = ["<script>planted()</script>", "<img src=x onerror=planted()>", "[a](javascript:planted())", "[b](<javascript:planted()>)", "[c](java&#115;cript&colon;planted())",
           "[d]\n\n[d]: JaVaScRiPt:planted()\n", "[e]( data:text/html,planted() )", "<javascript:planted()>", "[f](vbscript:planted())", "x <svg/onload=planted()>", "[g](\\javascript:planted())",
           "```{raw} html\n<script>planted()</script>\n```", "`a`{=html}", "{raw}`planted()`", "$\\href{javascript:planted()}{x}$", "$\\\\href{javascript:planted()}{x}$", "<!-- planted() -->", "<?planted()?>", "<{script}`>planted()"]


def rendered(text):
    "HTML of Markdown by a renderer that passes raw HTML and every link through."
    from nbconvert.filters.markdown_mistune import markdown2html_mistune
    return markdown2html_mistune(text)


def active(page):
    "What a browser would run in a page."
    from html.parser import HTMLParser
    found = []
    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag in ("script", "img", "svg", "iframe", "style"): found.append(tag)
            found.extend(f"{tag} {k}={v}" for k, v in attrs if k.startswith("on") or (v or "").strip().lower().startswith(("javascript:", "data:", "vbscript:")))
        def handle_comment(self, text): found.append("comment")
        def handle_pi(self, text): found.append("instruction")
    Reader().feed(page)
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_stored_markdown_cannot_run(text):
    page = rendered(F.safe_markdown(text))
    assert active(page) == [] and "\\href" not in page and "{raw}" not in page and "`{" not in F.safe_markdown(text)


def test_the_attacks_are_attacks():
    assert sum(bool(active(rendered(text))) for text in HOSTILE) >= 7


@given(st.text(alphabet="<>`~:{}[]()\\ \n\tajsJ&;#!/?=o-.", max_size=40))
def test_no_text_becomes_a_tag(text):
    assert not any(tag in rendered(F.safe_markdown(text)) for tag in ("<a>", "<j", "<s>", "<aj", "<!--", "<?", "<script"))


def test_harmless_markdown_stays():
    text = "**Bold**, *soft*, `x[0]`, $a < b$, [paper](https://doi.org/10.1126/x_(y)), [chapter](02_agop.ipynb#the-agop), ![p](figs/a.png), <https://a> 1 < 2 > 0\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    assert F.safe_markdown(text) == text.replace("<https", "< https") and rendered(F.safe_markdown(text)).count("<a ") == 3


def test_gallery_shows_a_hostile_record_harmlessly(monkeypatch):
    bad = "<script>planted()</script> [x](javascript:planted())"
    save("evil", caption=f"**Bold** {bad}", data=bad, measured={bad: bad, "deep": {bad: [bad]}}, paper={bad: bad}, seed=bad)
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *parts: shown.extend(parts))
    F.gallery()
    texts = [part.data for part in shown if hasattr(part, "_repr_markdown_")]
    assert len(texts) == 2 and "### evil" in texts[0] and "<strong>Bold</strong>" in rendered(texts[1])
    assert [active(rendered(text)) for text in texts] == [[], []]


def edited(folder, **changes):
    save("a-b")
    path = folder / "a-b.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize("changes", [dict(versions=[]), dict(measured=[1]), dict(measured="x"), dict(paper=[1]), dict(caption=None), dict(caption={"a": 1}), dict(data=3), dict(scale="huge"), dict(scale=[]),
                                     dict(device=None), dict(seconds="long"), dict(seconds=[1]), dict(id="other"), dict(id=["a-b"]), dict(caption="x" * 5_000_000)])
def test_records_that_are_not_whole_are_named_and_left_out(changes, fresh):
    save("whole")
    path = edited(fresh, **changes)
    with pytest.warns(UserWarning, match="a-b.json is left out"): found = F.records(fresh)
    assert list(found.id) == ["whole"] and F.gallery(fresh) is None
    with pytest.warns(UserWarning): assert F.read_record(path) is None


@pytest.mark.parametrize("depth", [30, 900, 100_000])
def test_deeply_nested_records_are_left_out(depth, fresh):
    path = edited(fresh, measured={"x": "HERE"})
    path.write_text(path.read_text().replace('"HERE"', "[" * depth + "]" * depth))
    with pytest.warns(UserWarning, match="a-b.json.*nested too deeply"): assert F.records(fresh).empty


def test_a_picture_that_is_none(fresh):
    save()
    (fresh / "a-b.png").write_bytes(b"<svg onload=planted()>")
    with pytest.warns(UserWarning, match="a-b.json.*no PNG"): assert F.records(fresh).empty


def test_records_of_the_book_raise_no_warning():
    import warnings
    folder = F._stored()
    if folder is None: pytest.skip("no stored records yet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(F.records(folder)) == len(list(folder.glob("*.json")))


def test_results_files_of_others_are_passed_over(fresh, counted):
    path = fresh / "results/s-quick.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(["[" * 100_000, '{"key": [], "row": {}}', '{"key": "a", "row": 3}', '{"key": "a", "row": {}, "time": "now"}', "3", "null"]) + "\n")
    assert list(F.sweep("s", square, [{"x": 2}], progress=False).value) == [4]


@pytest.mark.parametrize("call, error, words", [
    (lambda f: F.sweep("x" * 300, f, []), ValueError, "name="), (lambda f: F.sweep("../x", f, []), ValueError, "name="), (lambda f: F.sweep("s", 3, []), TypeError, "fn=3"),
    (lambda f: F.sweep("s", f, [3]), TypeError, "grid holds 3"), (lambda f: F.sweep("s", f, 3), TypeError, "grid must be"), (lambda f: F.sweep("s", f, [], version=f), TypeError, "version="),
    (lambda f: F.show_images(np.ones((2, 3, 3)), ncols=0), ValueError, "ncols=0"), (lambda f: F.show_images(np.ones((2, 3, 3)), ncols=-1), ValueError, "ncols=-1"),
    (lambda f: F.show_images(np.ones((2, 3, 3)), ncols=2**63), ValueError, "ncols=9223"), (lambda f: F.show_images(np.ones((2, 3, 3)), size=-1), ValueError, "size=-1"),
    (lambda f: F.show_images(np.ones((2, 3, 3)), size=float("nan")), ValueError, "size=nan"), (lambda f: F.show_matrix(np.ones((2, 2)), size=1e9), ValueError, "size=1"),
    (lambda f: F.show_images(np.ones((2, 4)), shape=(-2, -2)), ValueError, "shape=-2"), (lambda f: save("x" * 300), ValueError, "id=")])
def test_hostile_arguments_are_named(call, error, words, counted):
    with pytest.raises(error, match=words): call(counted)


# --- full disks

@pytest.fixture
def full_disk(monkeypatch):
    "Forcing anything to disk fails from now on."
    def full(descriptor): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)


def test_a_full_disk_loses_no_result(fresh, counted, full_disk):
    with pytest.warns(UserWarning, match="s-quick.jsonl cannot be written.*No space"): table = F.sweep("s", counted, [{"x": 2}, {"x": 3}], progress=False)
    assert list(table.value) == [4, 9] and (fresh / "results/s-quick.jsonl").read_bytes() == b""           # nothing torn


def test_an_unwritable_folder_is_found_before_the_work(fresh, counted):
    fresh.mkdir()
    (fresh / "results").write_text("a file")
    with pytest.raises(OSError): F.sweep("s", counted, [{"x": 2}], progress=False)
    assert counted.calls == 0
    fig = plt.figure()
    fig.savefig = lambda *a, **k: pytest.fail("drawn before the folder was looked at")
    os.environ["AGOP_BOOK_OUT"] = str(fresh / "results/below")                                               # restored by the fixture
    with pytest.raises(PermissionError, match="AGOP_BOOK_OUT"): F.record("a", fig, measured={}, paper=None, data="", caption="")


def test_folders_can_be_looked_at_by_many_threads(fresh):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(8) as pool: assert len(list(pool.map(lambda k: F.out_dir(), range(400)))) == 400
    assert not list(fresh.iterdir())


# --- output

def test_output_survives_encodings_and_readers_that_leave(tmp_path):
    import io
    import sys
    raw = io.BytesIO()
    outer, sys.stdout = sys.stdout, io.TextIOWrapper(raw, "ascii")
    try:
        with F.steady_output(): print("Fernández 数")
        sys.stdout.flush()
        assert raw.getvalue() == b"Fern\\xe1ndez \\u6570\n" and sys.stdout.errors == "strict"
    finally: sys.stdout = outer
