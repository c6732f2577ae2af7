"""Documents and names: found by their separators, in UTF-8 or not at all."""

import gzip

import pytest
from data_files import empty_root, write

from agop_book.book.load import load
from agop_book.files import UnreadableData


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    return empty_root(tmp_path, monkeypatch)


def test_texts(root):
    whole = "\n\n".join(f"SPEAKER {i}:\nline {i}é" for i in range(20)) + "\n\n\nlast\n"
    write(root / "tinyshakespeare/input.txt", whole)
    assert load("shakespeare", split="all").text == whole
    assert load("shakespeare").text + "\n\n" + load("shakespeare", split="test").text == whole
    write(
        root / "tinystories/tinystories_sample.txt",
        "One.\n<|endoftext|>\nTwo.\n<|endoftext|>\ncut in the mid",
    )
    d = load("tinystories", split="all")
    assert d.x.tolist() == ["One.", "Two."] and d.label == "TinyStories (2 stories)" and d.y is None
    for content in (b"", b"\xff\xfe\xff<|endoftext|>"):
        write(root / "tinystories/tinystories_sample.txt", content)
        with pytest.raises(UnreadableData, match="tinystories"):
            load("tinystories", split="all")


def test_names(root):
    write(root / "names/French.txt", "Abélard\nBéranger\n\n")
    write(root / "names/Greek.txt", "Adamou\n")
    d = load("names", split="all")
    assert d.x.tolist() == ["Abélard", "Béranger", "Adamou"]
    assert d.y.tolist() == [0, 0, 1]
    assert d.classes == ["French", "Greek"]
    assert d.label == "3 surnames of 2 languages"


def test_lines_of_names_end_at_newlines_alone(root):
    write(root / "names/French.txt", "\ufeffAbel\r\nBé\x0cr\nC\u2028d\u0085e\rFabre")
    for name in ("README.txt", "readme_names.txt", "LICENSE.txt", ".hidden.txt", "._French.txt"):
        write(root / "names" / name, "no name\n")
    write(root / "names/Greek.txt", "Adamou\n")
    d = load("names", split="all")
    assert d.x.tolist() == ["Abel", "Bé\x0cr", "C\u2028d\u0085e", "Fabre", "Adamou"]
    assert d.classes == ["French", "Greek"] and d.y.tolist() == [0, 0, 0, 0, 1]
    for name in ("French", "Greek"):
        (root / f"names/{name}.txt").unlink()
    with pytest.raises(UnreadableData, match="no file of names"):
        load("names")


def test_empty_stories_and_byte_order_marks_are_no_text(root):
    end = "<|endoftext|>"
    for start in ("", end, f"\ufeff \n{end}\n"):
        write(
            root / "tinystories/tinystories.txt", f"{start}One.{end} \n{end}{end}Two.{end}\n {end}"
        )
        assert load("tinystories", split="all").x.tolist() == ["One.", "Two."]
    write(root / "tinyshakespeare/input.txt", "\ufeffA:\nx\n\nB:\ny")
    assert load("shakespeare", split="all").x.tolist() == ["A:\nx", "B:\ny"]


def test_texts_that_are_no_texts(root):
    story = b"Once.\n<|endoftext|>\nTwice.\n<|endoftext|>\n"
    path = root / "tinystories/tinystories_sample.txt"
    for content, words in (
        (gzip.compress(story), "no sample"),
        (story.replace(b"T", b"\0"), "zero bytes"),
        (b"no mark at all", "no sample"),
        (story.decode().encode("utf-16"), "no sample|not a text"),
    ):
        write(path, content)
        with pytest.raises(UnreadableData, match=words) as error:
            load("tinystories", split="all")
        assert str(path) in str(error.value)
    write(root / "names/French.txt", "Abel\n")
    for content, words in ((b"\n \n", "no name"), (b"\xff\xfe", "UTF-8"), (b"A\0b", "zero bytes")):
        path = write(root / "names/Greek.txt", content)
        with pytest.raises(UnreadableData, match=words) as error:
            load("names")
        assert str(path) in str(error.value)
    write(root / "names/Greek.txt", "Adamou\n")
    assert len(load("names", split="all")) == 2
