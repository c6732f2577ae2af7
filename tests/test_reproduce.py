"""The command line on tiny books: what is kept, what is reported, what a kill leaves behind."""
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
from pathlib import Path

import nbformat
import psutil
import pytest

import agop_book
from agop_book.book import figures, reproduce as R

IMPORTS = "import os, time\nfrom pathlib import Path\nimport matplotlib.pyplot as plt\nfrom agop_book.book.figures import record, sweep, scale"


def fig(id, value="1"):
    return f"record('{id}', plt.figure(figsize=(1, 1)), measured=dict(value={value}), paper=dict(value=2), data='none', caption='c', seconds=1)"


def chapter(folder, name, *cells):
    folder.mkdir(exist_ok=True)
    nb = nbformat.v4.new_notebook()
    for i, source in enumerate(cells):
        make = nbformat.v4.new_markdown_cell if source.startswith("# ") else nbformat.v4.new_code_cell
        nb.cells.append(make(source, id=f"c{i}"))
    nbformat.write(nb, folder / f"{name}.ipynb")


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
        code = R.main([verb, *argv, *(["--out", str(out)] if out else [])], book)
    return code, o.getvalue(), e.getvalue()


def start(book, out, *argv):
    code = f"import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from agop_book.book.reproduce import main; sys.exit(main(chapters_in={str(book)!r}))"   # a shell's background job would ignore SIGINT
    return subprocess.Popen([sys.executable, "-c", code, "reproduce", "--out", str(out), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, seconds=90):
    stop = time.time() + seconds
    while not condition():
        assert time.time() < stop, "waited too long"
        time.sleep(0.05)


def stamps(out):
    return {p.name: p.stat().st_mtime_ns for p in out.glob("*.*") if p.suffix in (".json", ".png")}


# --- finding figures

def test_figures_are_found_by_reading(book):
    chapter(book, "01_a", "# A title\n> sub", "#| export\ndef f():\n    return record('never', 1)", "%matplotlib inline\n!ls\nx = 1",
            "if x:\n    %time 1\n    record('a-1', fig, measured={})", "#| eval: false\nrecord('skipped', fig)", "record(id='a-2', fig=1)", "%%bash\nrecord('x')", "this is ( not python")
    chapter(book, "index", "# Index")
    chapter(book, "zz", "# Last but one")
    a, z, index = R.chapters(book)
    assert (a.name, a.title, z.name, index.name) == ("01_a", "A title", "zz", "index")
    assert a.figures == {"never": 1, "a-1": 3, "a-2": 5}


def test_fingerprint_follows_code_not_prose(book):
    def of(*cells):
        chapter(book, "01_a", *cells)
        return R.chapters(book)[0].fingerprint
    base = of("# A", IMPORTS, "x = 1")
    assert base == of("# Another title", IMPORTS, "x = 1") == of("# A", IMPORTS, "x = 1", "#| eval: false\ny = 2")
    assert base != of("# A", IMPORTS, "x = 2")


def test_fingerprint_follows_imported_modules(book, monkeypatch, tmp_path):
    chapter(book, "01_a", "# A", "from agop_book.rfm import RFMRegressor")
    chapter(book, "02_b", "# B", "import agop_book.book.data")
    before = [c.fingerprint for c in R.chapters(book)]
    shutil.copytree(R._home(), tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    kernels = tmp_path / "copy/kernels.py"                          # rfm imports it, data does not
    kernels.write_text(kernels.read_text() + "\n# a comment\n")
    monkeypatch.setattr(R, "_home", lambda: tmp_path / "copy")
    assert before == [c.fingerprint for c in R.chapters(book)]
    kernels.write_text(kernels.read_text() + "changed = True\n")
    after = [c.fingerprint for c in R.chapters(book)]
    assert before[0] != after[0] and before[1] == after[1]


def test_the_books_own_chapters_can_be_read():
    own = R.chapters()
    assert own[-1].name == "index" and {"91_figures", "92_reproduce"} <= {c.name for c in own}
    ids = [id for c in own for id in c.figures]
    assert len(ids) == len(set(ids))


# --- wrong calls: exit code 2, the remedy, and nothing run

@pytest.fixture
def one(book):
    chapter(book, "01_a", "# A", "raise SystemExit('this must not run')", "record('rfm-lowrank', 1)")
    return book


@pytest.mark.parametrize("argv, text", [
    (["rfm-lowrnk"], "'rfm-lowrnk'.*did you mean rfm-lowrank"), (["zzz"], "'zzz'.*agop-book list"), (["--scale", "huge"], "'huge'.*quick, book, paper"),
    (["--device", "gpu"], "'gpu'.*auto, cpu, cuda"), (["--nonsense"], "nonsense"),
])
def test_wrong_call(one, out, argv, text):
    code, _, err = run(one, out, *argv)
    assert code == 2 and re.search(text, err) and not list(out.rglob("*.ipynb")) and "Traceback" not in err


def test_wrong_environment(one, out, monkeypatch):
    monkeypatch.setenv("AGOP_BOOK_SCALE", "big")
    assert run(one, out)[0] == 2
    monkeypatch.setenv("AGOP_BOOK_SCALE", "quick")
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "tpu")
    assert run(one, out)[0] == 2
    assert os.environ["AGOP_BOOK_SCALE"] == "quick" and "AGOP_BOOK_OUT" not in os.environ       # the call leaves no trace


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


def test_no_verb_is_an_error(capsys):
    assert R.main([]) == 2
    assert R.main(["--version"]) == 0 and agop_book.__version__ in capsys.readouterr().out


# --- a run

def test_run_keep_force(book, out, monkeypatch):
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1"), "assert not list(Path('.').iterdir())\nPath('left.txt').write_text('behind')",
            "#| eval: false\nraise RuntimeError", "assert os.environ['AGOP_BOOK_OUT'] and scale() == 'book' and os.environ['AGOP_BOOK_DEVICE'] == 'cpu'", fig("a-2", "scale()"))
    chapter(book, "02_b", "# B", "Path = 1")
    chapter(book, "index", "# I", "print('the gallery')")
    code, text, err = run(book, out, "--scale", "book")
    assert code == 0, err
    assert str(out / "report.html") in text and "seconds in all" in text
    assert {p.name for p in out.iterdir()} == {"a-1.json", "a-1.png", "a-2.json", "a-2.png", "chapters", "results", "report.html"}
    assert {p.name for p in (out / "chapters").iterdir()} == {"01_a.ipynb", "02_b.ipynb", "index.ipynb"}
    assert json.loads((out / "a-2.json").read_text())["measured"] == {"value": "book"}

    before = stamps(out)
    code, text, _ = run(book, out, "--scale", "book")
    assert code == 0 and stamps(out) == before and text.count("finished already") == 3

    code, text, _ = run(book, out, "a-1", "--scale", "book", "--force")
    after = stamps(out)
    assert code == 0 and after["a-1.json"] != before["a-1.json"] and after["a-2.json"] == before["a-2.json"]     # stopped after a-1

    monkeypatch.setattr(R, "_execute", lambda *a: pytest.fail("ran again"))
    assert run(book, out, "a-1", "a-2", "--scale", "book")[0] == 0
    listed = R.listing(out, book)
    assert list(listed.figure) == ["a-1", "a-2", "", ""] and list(listed.state[:2]) == ["finished (book)"] * 2


def test_changed_chapter_and_partial_json_are_run_again(book, out):
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1"))
    assert run(book, out)[0] == 0
    (out / "a-1.json").write_text((out / "a-1.json").read_text()[:-20])
    assert list(R.listing(out, book).state) == [""]
    assert run(book, out)[0] == 0 and json.loads((out / "a-1.json").read_text())["measured"] == {"value": 1}
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1", "5"))
    assert list(R.listing(out, book).state) == ["outdated (quick)"]
    code, text, _ = run(book, out)
    assert code == 0 and json.loads((out / "a-1.json").read_text())["measured"] == {"value": 5}


def test_failure_names_chapter_cell_and_line(book, out):
    chapter(book, "01_bad", "# A", "x = 1", "#| export\n\ndef f():\n    raise ValueError('too <small>')\nf()", "never = 1")
    chapter(book, "02_dead", "# B", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    chapter(book, "03_good", "# C", IMPORTS, fig("good"))
    code, text, err = run(book, out)
    assert code == 1
    assert "FAILED: 01_bad, cell 3 (def f():): ValueError: too <small>" in err and "Traceback" in err
    assert "02_dead, cell 2 (import os, signal)" in err and "kernel died" in err
    assert (out / "good.json").exists()                                               # the others still ran
    saved = nbformat.read(out / "chapters/01_bad.ipynb", 4)
    assert saved.cells[2].outputs[0].ename == "ValueError" and not saved.metadata.agop_book.complete
    page = (out / "report.html").read_text()
    assert "01_bad" in page and "too &lt;small&gt;" in page and "<small>" not in page
    code, text, _ = run(book, out)                                                     # failed ones are tried again, good ones kept
    assert code == 1 and "03_good: finished already" in text


def test_figure_that_is_never_recorded(book, out):
    chapter(book, "01_a", "# A", IMPORTS, "if False:\n    " + fig("ghost"))
    code, _, err = run(book, out, "ghost")
    assert code == 1 and "without recording ghost" in err
    assert run(book, out)[0] == 0                                                      # the chapter itself is fine ...
    assert "01_a: finished already" in run(book, out)[1]                               # ... and finished


def test_report_is_self_contained(book, out):
    chapter(book, "01_a", "# A & B", IMPORTS, "record('a-1', plt.figure(figsize=(1, 1)), measured={'r2': 0.51234}, paper={'r2': 0.6}, data='<x>', caption='**Bold** <script>', seed=7)")
    assert run(book, out)[0] == 0
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page and not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert "<td>0.5123</td><td>0.6</td>" in page and "&lt;x&gt;" in page and "<strong>Bold</strong> &lt;script&gt;" in page and "A &amp; B" in page
    assert "seed 7" in page and "prefers-color-scheme: dark" in page and 'name="viewport"' in page and "torch" in page


def test_kernel_is_this_interpreter(book, out, tmp_path, monkeypatch):
    """Another "python3" kernel, a profile with start-up files, another matplotlib backend: none of them matters."""
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps(dict(argv=["/bin/false"], display_name="wrong", language="python")))
    startup = tmp_path / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("polluted = True")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "svg")
    chapter(book, "01_a", "# A", f"import sys, agop_book\nassert sys.executable == {sys.executable!r}, sys.executable\nassert 'polluted' not in globals()\n"
            f"assert agop_book.__file__ == {agop_book.__file__!r}", "import matplotlib.pyplot as plt", "plt.plot([1]);")
    code, _, err = run(book, out)
    assert code == 0, err
    outputs = nbformat.read(out / "chapters/01_a.ipynb", 4).cells[-1].outputs
    assert any("image/png" in o.get("data", {}) for o in outputs)


# --- being killed

SLOW = ["# A", IMPORTS, "df = sweep('s', lambda x: {'y': x}, [{'x': 1}, {'x': 2}], version='1', progress=False)", fig("a-1", "df.seconds.tolist()"),
        "marker = Path(os.environ['AGOP_BOOK_OUT']) / 'go'\nPath('busy').write_text('')\nif not marker.exists(): time.sleep(600)", fig("a-2")]


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
        assert figures.read_record(path), f"{path} is half-written"
    assert {p.stem for p in out.glob("*.json")} == {"first", "a-1"} and (out / "report.html").exists()
    seconds = json.loads((out / "a-1.json").read_text())["measured"]["value"]
    before = stamps(out)
    (out / ".a-2.png.999999999.tmp").write_bytes(b"torn")
    (out / "go").write_text("")
    code, text, err = run(book, out)
    assert code == 0, err
    assert "00_first: finished already" in text and stamps(out)["first.json"] == before["first.json"]
    assert json.loads((out / "a-1.json").read_text())["measured"]["value"] == seconds           # the sweep's rows were kept
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
    assert "interrupted" in err and "Traceback" not in err and "never retrieved" not in err and "was destroyed" not in err
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert {p.name for p in out.glob("*.json")} == {"a-1.json"} and not list(out.rglob("*.tmp"))


# --- the other verbs

def test_list(book, out):
    chapter(book, "01_a", "# The title", "record('a-1', 1)\nrecord('a-2', 1)")
    chapter(book, "02_b", "# Nothing", "x = 1")
    code, text, _ = run(book, out, verb="list")
    assert code == 0 and not out.exists()                                            # listing writes nothing
    for word in ("01_a", "The title", "a-1", "a-2", "02_b"):
        assert word in text


def test_data(book, capsys):
    assert R.main(["data"]) == 0
    text = capsys.readouterr().out
    for name in ("celeba", "mnist", "digits"):
        assert name in text


def test_installed_command():
    command = Path(sys.executable).with_name("agop-book")
    if not command.exists():
        pytest.skip("agop_book is not installed in this environment")
    done = subprocess.run([command, "list"], capture_output=True, text=True)
    assert done.returncode == 0 and "92_reproduce" in done.stdout


def test_records_of_the_book_are_whole():
    """The records that travel with the notebooks: every one readable, its id made by some chapter."""
    folder = figures._stored()
    if folder is None:
        pytest.skip("no stored records yet")
    found = figures.records(folder)
    assert len(found) == len(list(folder.glob("*.json")))
    made = {id for c in R.chapters() for id in c.figures}
    assert set(found.id) <= made


# --- hostile records, terminals, disks

def test_foreign_records_do_not_end_the_report(book, out):
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1"))
    assert run(book, out)[0] == 0
    good = json.loads((out / "a-1.json").read_text())
    changes = dict(versions=[], scale="huge", measured=3, caption=["<script>"], nested={}, seconds={}, device=None)
    for k, (name, value) in enumerate(changes.items()):
        shutil.copy2(out / "a-1.png", out / f"x-{k}.png")
        text = json.dumps({**good, "id": f"x-{k}", name: value})
        (out / f"x-{k}.json").write_text(text if name != "nested" else text.replace('"measured": {', '"measured": {"deep": ' + "[" * 50_000 + "]" * 50_000 + ", "))
    (out / "chapters/99_x.ipynb").write_text("[" * 100_000)
    with pytest.warns(UserWarning, match="x-0.json is left out"): page = R.write_report(out, R.chapters(book)).read_text()
    assert 'id="a-1"' in page and "1 figure," in page and 'id="x-' not in page and "finished" in page
    for stamp in ([], {"complete": True}, {"scale": 3}, {"scale": "quick", "without": 5}, "x", None):
        (out / "chapters/01_a.ipynb").write_text(json.dumps({"metadata": {"agop_book": stamp}}))
        with pytest.warns(UserWarning): assert "not run" in R.write_report(out, R.chapters(book)).read_text()
        assert list(R.listing(out, book).state) == ["finished (quick)"]
    (out / "chapters/01_a.ipynb").write_text("[" * 100_000)
    assert list(R.listing(out, book).figure) == ["a-1"]


def test_a_hostile_record_runs_nothing_in_the_report(book, out):
    from html.parser import HTMLParser
    bad = '"><script>planted()</script><img src=x onerror="planted()"> [x](javascript:planted())'
    chapter(book, "01_a", f"# {bad}", IMPORTS, fig("a-1"), f"raise ValueError({bad!r})")
    assert run(book, out)[0] == 1
    good = json.loads((out / "a-1.json").read_text())
    (out / "a-1.json").write_text(json.dumps({**good, "caption": f"**Bold** `{bad}` ${bad}$ {bad}", "data": bad, "device": bad, "seed": bad, "versions": {bad: bad}, "measured": {bad: [bad, {bad: bad}]}, "paper": bad}))
    found = []
    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            values = " ".join(f"{k}={v}" for k, v in attrs)
            if tag in ("script", "svg", "iframe") or "planted" in values.replace("planted()</", "") or (tag == "img" and not dict(attrs)["src"].startswith("data:image/png")): found.append((tag, values[:80]))
    page = R.write_report(out, R.chapters(book), [R.Failure(bad, 1, bad, bad)]).read_text()
    Reader().feed(page)
    assert found == [] and "<strong>Bold</strong>" in page and "&lt;script&gt;" in page


def command(argv, redirect="", **environment):
    "Exit status of the command, of a shell line `command | redirect`, and what came out."
    line = f"{sys.executable} -c 'import sys; from agop_book.book.reproduce import main; sys.exit(main(sys.argv[1:]))' {argv} {redirect}"
    done = subprocess.run(["bash", "-c", f"{line}; echo status ${{PIPESTATUS[0]}} >&2"], capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": str(Path(agop_book.__file__).parents[1]), **environment})
    err = done.stderr.decode("latin-1")
    return int(re.search(r"status (\d+)", err)[1]), done.stdout, err


@pytest.mark.parametrize("encoding", ["ascii", "cp1251", "cp932"])
def test_the_command_in_any_encoding(encoding):
    code, text, err = command("data", PYTHONIOENCODING=encoding)
    assert code == 0 and b"Fern" in text and "Traceback" not in err and "Error" not in err


@pytest.mark.parametrize("argv", ["data", "--help"])
def test_a_reader_that_leaves(argv):
    code, _, err = command(argv, "2>&1 | true")
    assert code == 0 and err == "status 0\n"


def test_a_run_whose_reader_leaves_goes_on(book, out):
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1"))
    chapter(book, "02_b", "# B", IMPORTS, fig("b-1"))
    code = f"import sys; from agop_book.book.reproduce import main; sys.exit(main(['reproduce', '--out', {str(out)!r}], {str(book)!r}))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=write, timeout=120)
    os.close(write)
    assert done.returncode == 0 and {p.stem for p in out.glob("*.json")} == {"a-1", "b-1"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_said(book, out, monkeypatch):
    code, _, err = command("data", "> /dev/full")
    assert code == 1 and "agop-book: [Errno 28]" in err and "Traceback" not in err
    chapter(book, "01_a", "# A", IMPORTS, fig("a-1"))
    def full(path, data): raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(R, "write_atomic", full)
    code, _, err = run(book, out)
    assert code == 1 and "agop-book: [Errno 28] No space left on device" in err and (out / "a-1.json").exists()       # what was computed is kept


def test_temporary_names_of_the_dead_and_of_the_living(out):
    (out / "chapters").mkdir(parents=True)
    names = {".a.png.999999999.tmp": 0, f".a.png.{os.getpid()}.tmp": 1, f".01_a.{os.getpid()}.k3_x9.tmp": 1, ".01_a.999999999.k3_x9.tmp": 0, ".a.json.0123456789abcdef0123456789abcdef.tmp": 0, ".b.json.11111111111111111111111111111111.tmp": 1}
    for name in names: (out / "chapters" / name).write_text("")
    old = out / "chapters/.a.json.0123456789abcdef0123456789abcdef.tmp"
    os.utime(old, (time.time() - 7200,) * 2)
    R._sweep_stale(out)
    assert {p.name for p in (out / "chapters").iterdir()} == {name for name, stays in names.items() if stays}
