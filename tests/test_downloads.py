"""Downloads, from a server of this machine: checked, cached, and refused with a wrong checksum."""

import functools
import gzip
import hashlib
import http.server
import threading
from dataclasses import replace

import pytest
from data_files import empty_root, idx, pixels, write

from agop_book.book.load import load
from agop_book.book.sets import SETS
from agop_book.book.sources import DataNotFound
from agop_book.files import UnreadableData


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    return empty_root(tmp_path, monkeypatch)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{it.server_port}"
        it.shutdown()


def moved(monkeypatch, **changes):
    "The set of Shakespeare at another address."
    row = SETS["shakespeare"]
    row = replace(row, download=replace(row.download, **changes))
    monkeypatch.setitem(SETS, "shakespeare", row)


def test_download_is_checked_and_cached(server, monkeypatch, tmp_path):
    folder, url = server
    content = b"A:\nspeech\n\nB:\nspeech"
    write(folder / "input.txt", content)
    moved(monkeypatch, url=f"{url}/input.txt", sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(DataNotFound):
        load("shakespeare")  # no network unless asked
    assert load("shakespeare", split="all", download=True).source == "download"
    (folder / "input.txt").unlink()
    assert load("shakespeare", split="all", download=True).source == "cache"
    assert not [
        path
        for path in (tmp_path / "cache").rglob("*")
        if path.is_file() and path.name != "input.txt"
    ]


def test_download_with_a_wrong_checksum_is_refused(server, monkeypatch, tmp_path):
    folder, url = server
    write(folder / "input.txt", "forged")
    moved(monkeypatch, url=f"{url}/input.txt")
    with pytest.raises(UnreadableData, match="shakespeare.*checksum"):
        load("shakespeare", "help_topics", download=True)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_download_that_fails_goes_on_to_the_next_name(server, monkeypatch):
    moved(monkeypatch, url=f"{server[1]}/absent.txt")
    assert load("shakespeare", "help_topics", download=True).name == "help_topics"
    with pytest.raises(DataNotFound, match="download failed.*404"):
        load("shakespeare", download=True)
    with pytest.raises(DataNotFound, match="no checksum of it is known"):
        load("names", download=True)


def test_torchvision_downloads_into_the_cache(server, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    folder, url = server
    files = []
    for part, kind, content in (
        ("train", "images-idx3", pixels(3, 28, 28)),
        ("train", "labels-idx1", [1, 2, 3]),
        ("t10k", "images-idx3", pixels(3, 28, 28)),
        ("t10k", "labels-idx1", [1, 2, 3]),
    ):
        packed = gzip.compress(idx(content))
        write(folder / f"{part}-{kind}-ubyte.gz", packed)
        files.append((f"{part}-{kind}-ubyte.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "mirrors", [url + "/"])
    monkeypatch.setattr(datasets.MNIST, "resources", [(name, "0" * 32) for name, _ in files])
    with pytest.raises(UnreadableData, match="mnist.*checksum"):
        load("mnist", download=True)
    monkeypatch.setattr(datasets.MNIST, "resources", files)
    d = load("mnist", download=True)
    assert d.source == "download" and d.y.tolist() == [1, 2, 3] and load("mnist").source == "cache"


@pytest.mark.parametrize("name", ["emnist", "emnist/letters", "emnist/digits"])
def test_torchvision_is_asked_for_the_variant(monkeypatch, name):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    asked = []
    monkeypatch.setattr(datasets, "EMNIST", lambda **options: asked.append(options))
    with pytest.raises(DataNotFound):  # it brought nothing
        load(name, split="test", download=True)
    variant = name.partition("/")[2] or "letters"
    assert [(options["split"], options["train"]) for options in asked] == [(variant, False)]
