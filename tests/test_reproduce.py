"""Runs of tiny books: what is kept, what is reported, what a kill leaves behind."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import nbformat
import psutil
import pytest
from tinybooks import IMPORTS, chapter, fig, sidebar

import agop_book
from agop_book.book import reproduce as R
from agop_book.book.chapters import chapters
from agop_book.book.execute import Failure, remove_stale
from agop_book.book.records import read_record
from agop_book.book.report import write_report
from agop_book.cli import main


@pytest.fixture
def book(tmp_path):
    return tmp_path / "book"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("AGOP_BOOK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)


def run(book, out, *argv, verb="reproduce"):
    """Exit code, standard output, standard error of the command in this process."""
    o, e = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(o), contextlib.redirect_stderr(e):
        code = main([verb, *argv, "--out", str(out)], book)
    return code, o.getvalue(), e.getvalue()


# A shell's background job would ignore SIGINT.
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from agop_book.cli import main
sys.exit(main(chapters_in=sys.argv.pop(1)))
"""


def start(book, out, *argv):
    command = [sys.executable, "-c", START, str(book), "reproduce", "--out", str(out), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, seconds=90):
    stop = time.time() + seconds
    while not condition():
        assert time.time() < stop, "waited too long"
        time.sleep(0.05)


def stamps(out):
    return {p.name: p.stat().st_mtime_ns for p in out.glob("*.*") if p.suffix in (".json", ".png")}


def measured(out, id):
    return json.loads((out / f"{id}.json").read_text())["measured"]["value"]


# --- wrong calls: exit code 2, the remedy, and nothing run

@pytest.fixture
def one(book):
    chapter(book, "01_a", "# A", "raise SystemExit('must not run')", "record('rfm-lowrank', 1)")
    return book


@pytest.mark.parametrize("argv, text", [
    (["rfm-lowrnk"], "'rfm-lowrnk'.*did you mean 'rfm-lowrank'"),
    (["zzz"], "'zzz'.*agop-book list"),
    (["--scale", "huge"], "'huge'.*quick, book, paper"),
    (["--device", "gpu"], "'gpu'.*auto, cpu, cuda"),
    (["--nonsense"], "nonsense"),
])
def test_wrong_call(one, out, argv, text):
    code, _, err = run(one, out, *argv)
    assert code == 2 and re.search(text, err) and "Traceback" not in err
    assert not list(out.rglob("*.ipynb"))


def test_wrong_environment(one, out, monkeypatch):
    monkeypatch.setenv("AGOP_BOOK_SCALE", "big")
    assert run(one, out)[0] == 2
    monkeypatch.setenv("AGOP_BOOK_SCALE", "quick")
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "tpu")
    assert run(one, out)[0] == 2
    # the call leaves no trace
    assert os.environ["AGOP_BOOK_SCALE"] == "quick" and "AGOP_BOOK_OUT" not in os.environ


def test_gpu_asked_for_and_absent(one, out, monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(one, out, "--device", "cuda")
    assert code == 2 and "no GPU" in err and "cpu" in err


def test_unwritable_out(one, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        code, _, err = run(one, place)
        assert code == 2 and str(tmp_path / "file") in err and "--out" in err


def test_read_only_out(one, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert run(one, folder / "x")[0] == 2


def test_damaged_and_missing_chapters(book, out):
    book.mkdir()
    code, _, err = run(book, out)
    assert code == 2 and str(book) in err
    (book / "01_a.ipynb").write_text('{"cells": [')
    code, _, err = run(book, out)
    assert code == 2 and "01_a.ipynb is not a notebook" in err


# --- a run

CHECKED = ("assert not list(Path('.').iterdir())\nPath('left.txt').write_text('behind')\n"
           "assert os.environ['AGOP_BOOK_OUT'] and scale() == 'book'\n"
           "assert os.environ['AGOP_BOOK_DEVICE'] == 'cpu'")


def test_run_keep_force(book, out, monkeypatch):
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1"), CHECKED, "#| eval: false\nraise RuntimeError",
            fig("a-2", "scale()"))
    chapter(book, "02_b", "# B", "Path = 1")
    chapter(book, "index", "# I", "print('the gallery')")
    code, text, err = run(book, out, "--scale", "book")
    assert code == 0, err
    assert str(out / "report.html") in text and "seconds in all" in text
    assert {p.name for p in out.iterdir()} == {
        "a-1.json", "a-1.png", "a-2.json", "a-2.png", "chapters", "results", "report.html"}
    copies = {p.name for p in (out / "chapters").iterdir()}
    assert copies == {"01_a.ipynb", "02_b.ipynb", "index.ipynb"}
    assert measured(out, "a-2") == "book"
    before = stamps(out)
    code, text, _ = run(book, out, "--scale", "book")
    assert code == 0 and stamps(out) == before and text.count("finished already") == 3
    code, text, _ = run(book, out, "a-1", "--scale", "book", "--force")
    after = stamps(out)
    assert code == 0 and after["a-1.json"] != before["a-1.json"]
    assert after["a-2.json"] == before["a-2.json"]          # stopped after a-1
    monkeypatch.setattr(R, "run_chapter", lambda *a: pytest.fail("ran again"))
    assert run(book, out, "a-1", "a-2", "--scale", "book")[0] == 0
    listed = R.listing(out, book)
    assert list(listed.figure) == ["a-1", "a-2", "", ""]
    assert list(listed.state[:2]) == ["finished (book)"] * 2


def test_notebooks_in_folders_are_run_for_their_figures_only(book, out):
    "Executed copies lie in the folders that the notebooks have, and the index runs last."
    made = "assert Path(os.environ['AGOP_BOOK_OUT'], 'a-1.json').exists()"
    chapter(book, "index", "# I", IMPORTS, made)
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1"))
    chapter(book, "shop/engine", "# E", IMPORTS, fig("e-1"))
    sidebar(book, "[index.ipynb, 01_a.ipynb, {section: Shop, contents: [shop/engine.ipynb]}]")
    code, text, err = run(book, out)
    assert code == 0, err
    copies = {p.relative_to(out / "chapters").as_posix() for p in out.rglob("*.ipynb")}
    assert copies == {"index.ipynb", "01_a.ipynb"}
    assert list(R.listing(out, book).chapter) == ["01_a", "index"]
    assert run(book, out)[1].count("finished already") == 2
    assert run(book, out, "e-1")[0] == 0 and (out / "chapters/shop/engine.ipynb").exists()
    assert 'href="chapters/shop/engine.ipynb"' in (out / "report.html").read_text()


def test_changed_chapter_and_partial_json_are_run_again(book, out):
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1"))
    assert run(book, out)[0] == 0
    (out / "a-1.json").write_text((out / "a-1.json").read_text()[:-20])
    with pytest.warns(UserWarning, match="left out"):
        assert list(R.listing(out, book).state) == [""]
    with pytest.warns(UserWarning, match="left out"):
        assert run(book, out)[0] == 0 and measured(out, "a-1") == 1
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1", "5"))
    assert list(R.listing(out, book).state) == ["outdated (quick)"]
    assert run(book, out)[0] == 0 and measured(out, "a-1") == 5


def test_failure_names_chapter_cell_and_line(book, out):
    chapter(book, "01_bad", "# A", "x = 1",
            "#| export\n\ndef f():\n    raise ValueError('too <small>')\nf()", "never = 1")
    chapter(book, "02_dead", "# B", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    chapter(book, "03_good", "# C", IMPORTS, fig("good"))
    code, text, err = run(book, out)
    assert code == 1
    assert "FAILED: 01_bad, cell 3 (def f():): ValueError: too <small>" in err
    assert "Traceback" in err
    assert "02_dead, cell 2 (import os, signal)" in err and "kernel died" in err
    assert (out / "good.json").exists()                     # the others still ran
    saved = nbformat.read(out / "chapters/01_bad.ipynb", 4)
    assert saved.cells[2].outputs[0].ename == "ValueError"
    assert not saved.metadata.agop_book.complete
    page = (out / "report.html").read_text()
    assert "01_bad" in page and "too &lt;small&gt;" in page and "<small>" not in page
    code, text, _ = run(book, out)                          # failed ones are tried again
    assert code == 1 and "03_good: finished already" in text


def test_figure_that_is_never_recorded(book, out):
    chapter(book, "01_a", "# A", IMPORTS, "if False:\n    " + fig("ghost"))
    code, _, err = run(book, out, "ghost")
    assert code == 1 and "without recording ghost" in err
    assert run(book, out)[0] == 0                           # the chapter itself is fine ...
    assert "01_a: finished already" in run(book, out)[1]    # ... and finished


def test_report_is_self_contained(book, out):
    recorded = ("record('a-1', plt.figure(figsize=(1, 1)), measured={'r2': 0.51234}, "
                "paper={'r2': 0.6}, data='<x>', caption='**Bold** <script>', seed=7)")
    chapter(book, "01_a", "# A & B", IMPORTS, recorded)
    assert run(book, out)[0] == 0
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert "<td>0.5123</td><td>0.6</td>" in page and "&lt;x&gt;" in page
    assert "<strong>Bold</strong> &lt;script&gt;" in page and "A &amp; B" in page
    assert "seed 7" in page and "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page and "torch" in page


def test_kernel_is_this_interpreter(book, out, tmp_path, monkeypatch):
    """Another "python3" kernel, a profile with start-up files, another backend: none matters."""
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    wrong = dict(argv=["/bin/false"], display_name="wrong", language="python")
    (spec / "kernel.json").write_text(json.dumps(wrong))
    startup = tmp_path / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("polluted = True")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "svg")
    chapter(book, "01_a", "# A",
            f"import sys, agop_book\nassert sys.executable == {sys.executable!r}, sys.executable\n"
            "assert 'polluted' not in globals()\n"
            f"assert agop_book.__file__ == {agop_book.__file__!r}",
            "import matplotlib.pyplot as plt", "plt.plot([1]);")
    code, _, err = run(book, out)
    assert code == 0, err
    outputs = nbformat.read(out / "chapters/01_a.ipynb", 4).cells[-1].outputs
    assert any("image/png" in o.get("data", {}) for o in outputs)


# --- being killed

SLOW = [
    "# A",
    IMPORTS,
    "df = sweep('s', lambda x: {'y': x}, [{'x': 1}, {'x': 2}], version='1', progress=False)",
    fig("a-1", "df.seconds.tolist()"),
    "marker = Path(os.environ['AGOP_BOOK_OUT']) / 'go'\nPath('busy').write_text('')\n"
    "if not marker.exists(): time.sleep(600)",
    fig("a-2"),
]


def busy(out):
    return bool(list(out.glob("chapters/.01_a.*.tmp/empty/busy")))


def test_kill_and_resume(book, out):
    chapter(book, "00_first", "# F", IMPORTS, fig("first"))
    chapter(book, "01_a", *SLOW)
    process = start(book, out)
    until(lambda: busy(out))
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=20)[1], "a kernel outlived the command"
    for path in out.glob("*.json"):
        assert read_record(path), f"{path} is half-written"
    assert {p.stem for p in out.glob("*.json")} == {"first", "a-1"}
    assert (out / "report.html").exists()
    seconds = measured(out, "a-1")
    before = stamps(out)
    (out / ".a-2.png.999999999.tmp").write_bytes(b"torn")
    (out / "go").write_text("")
    code, text, err = run(book, out)
    assert code == 0, err
    assert "00_first: finished already" in text
    assert stamps(out)["first.json"] == before["first.json"]
    assert measured(out, "a-1") == seconds                  # the sweep's rows were kept
    assert not [p for p in out.rglob(".*") if p.name.endswith(".tmp")]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupt(book, out, name):
    chapter(book, "01_a", *SLOW)
    process = start(book, out)
    until(lambda: busy(out))
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if name == "SIGINT" else 143), err
    assert "interrupted" in err
    for noise in ("Traceback", "never retrieved", "was destroyed"):
        assert noise not in err
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert {p.name for p in out.glob("*.json")} == {"a-1.json"} and not list(out.rglob("*.tmp"))


def test_temporary_names_of_the_dead_and_of_the_living(out):
    (out / "chapters/shop").mkdir(parents=True)
    me = os.getpid()
    old = ".a.json.0123456789abcdef0123456789abcdef.tmp"
    stays = {f".a.png.{me}.tmp", f".01_a.{me}.k3_x9.tmp",
             ".b.json.11111111111111111111111111111111.tmp"}
    goes = {".a.png.999999999.tmp", ".01_a.999999999.k3_x9.tmp", old}
    for folder in (out / "chapters", out / "chapters/shop"):
        for name in stays | goes:
            (folder / name).write_text("")
        os.utime(folder / old, (time.time() - 7200,) * 2)
    remove_stale(out)
    for folder in (out / "chapters", out / "chapters/shop"):
        assert {p.name for p in folder.iterdir() if p.is_file()} == stays


# --- what there is, and hostile records

def test_list(book, out):
    chapter(book, "01_a", "# The title", "record('a-1', 1)\nrecord('a-2', 1)")
    chapter(book, "02_b", "# Nothing", "x = 1")
    code, text, _ = run(book, out, verb="list")
    assert code == 0 and not out.exists()                   # listing writes nothing
    for word in ("01_a", "The title", "a-1", "a-2", "02_b"):
        assert word in text


WRONG = dict(versions=[], scale="huge", measured=3, caption=["<script>"], seconds={}, device=None)
STAMPS = ([], {"complete": True}, {"scale": 3}, {"scale": "quick", "without": 5}, "x", None)


def plant(out):
    "Records that are none, beside the whole one of figure a-1."
    good = (out / "a-1.json").read_text()
    deep = "[" * 50_000 + "]" * 50_000
    texts = [json.dumps({**json.loads(good), name: value}) for name, value in WRONG.items()]
    texts.append(good.replace('"measured": {', '"measured": {"deep": ' + deep + ", "))
    for k, text in enumerate(texts):
        shutil.copy2(out / "a-1.png", out / f"x-{k}.png")
        (out / f"x-{k}.json").write_text(re.sub(r'"id": "a-1"', f'"id": "x-{k}"', text))
    (out / "chapters/99_x.ipynb").write_text("[" * 100_000)


@pytest.mark.filterwarnings("ignore:.*is left out")
def test_foreign_records_do_not_end_the_report(book, out):
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1"))
    assert run(book, out)[0] == 0
    plant(out)
    with pytest.warns(UserWarning, match="x-0.json is left out"):
        page = write_report(out, chapters(book)).read_text()
    assert 'id="a-1"' in page and "1 figure," in page and 'id="x-' not in page
    assert "finished" in page
    for stamp in STAMPS:
        text = json.dumps({"metadata": {"agop_book": stamp}})
        (out / "chapters/01_a.ipynb").write_text(text)
        with pytest.warns(UserWarning):
            assert "not run" in write_report(out, chapters(book)).read_text()
        assert list(R.listing(out, book).state) == ["finished (quick)"]
    (out / "chapters/01_a.ipynb").write_text("[" * 100_000)
    assert list(R.listing(out, book).figure) == ["a-1"]


class Reader(HTMLParser):
    "Collects what in a report would run."

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        values = " ".join(f"{k}={v}" for k, v in attrs)
        active = tag in ("script", "svg", "iframe")
        planted = "planted" in values.replace("planted()</", "")
        foreign = tag == "img" and not dict(attrs)["src"].startswith("data:image/png")
        if active or planted or foreign:
            self.found.append((tag, values[:80]))


def test_a_hostile_record_runs_nothing_in_the_report(book, out):
    bad = ('"><script>planted()</script><img src=x onerror="planted()"> '
           "[x](javascript:planted())")
    chapter(book, "01_a", f"# {bad}", IMPORTS, fig("a-1"), f"raise ValueError({bad!r})")
    assert run(book, out)[0] == 1
    good = json.loads((out / "a-1.json").read_text())
    hostile = dict(caption=f"**Bold** `{bad}` ${bad}$ {bad}", data=bad, device=bad, seed=bad,
                   versions={bad: bad}, measured={bad: [bad, {bad: bad}]}, paper=bad)
    (out / "a-1.json").write_text(json.dumps(good | hostile))
    page = write_report(out, chapters(book), [Failure(bad, 1, bad, bad)]).read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.found == []
    assert "<strong>Bold</strong>" in page and "&lt;script&gt;" in page


# --- terminals and disks

def test_a_run_whose_reader_leaves_goes_on(book, out):
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1"))
    chapter(book, "02_b", "# B", IMPORTS, fig("b-1"))
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", START, str(book), "reproduce", "--out", str(out)]
    done = subprocess.run(command, stdout=write, stderr=write, timeout=120)
    os.close(write)
    assert done.returncode == 0 and {p.stem for p in out.glob("*.json")} == {"a-1", "b-1"}


def test_a_full_disk_is_said(book, out, monkeypatch):
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1"))

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("agop_book.book.execute.write_atomic", full)
    code, _, err = run(book, out)
    assert code == 1 and "agop-book: [Errno 28] No space left on device" in err
    assert (out / "a-1.json").exists()                      # what was computed is kept
