"""MNIST's format: every set of it, and the ways in which a file can be damaged, cut or a bomb."""

import gzip
import io
import os

import numpy as np
import pytest
from data_files import SHOW_ERROR, capped, digits_files, empty_root, idx, picture, pixels, write

from agop_book.book.load import load
from agop_book.book.readers import read_idx
from agop_book.book.sources import DataNotFound
from agop_book.files import UnreadableData


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    return empty_root(tmp_path, monkeypatch)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(
    "name, at, train, test, kind",
    [
        ("mnist", "MNIST/raw", ("train", "train"), ("t10k", "t10k"), 8),
        ("mnist", "mnist", ("train", "train"), ("t10k", "t10k"), 8),
        ("fashion_mnist", "FashionMNIST/raw", ("train", "train"), ("t10k", "t10k"), 8),
        ("qmnist", "QMNIST/raw", ("qmnist-train",) * 2, ("qmnist-test",) * 2, 12),
    ],
)
def test_idx_sets(root, name, at, train, test, kind, gz):
    for split, prefix in (("train", train), ("test", test)):
        x = digits_files(root / at, 12, prefix, gz, kind)
        d = load(name, split=split)
        assert d.x.shape == (12, 1, 28, 28)
        assert np.allclose(d.x[:, 0] * 255, x, atol=1e-4)
        assert d.y.tolist() == [*range(10), 0, 1]
        assert d.y.dtype == np.int64 and len(d.classes) == 10
        assert "(12 of " in d.label  # a part of it does not carry the full name
        assert len(load(name, split=split, n=3)) == 3


def test_emnist_is_upright_and_its_letters_count_from_zero(root):
    images = pixels(26, 28, 28)
    for kind, content in (("images-idx3", images), ("labels-idx1", np.arange(1, 27))):
        write(root / f"EMNIST/raw/emnist-letters-train-{kind}-ubyte", idx(content))
    d = load("emnist/letters")
    assert (d.y == np.arange(26)).all()
    assert d.classes[0] == "a"
    assert np.allclose(d.x[:, 0] * 255, images.transpose(0, 2, 1), atol=1e-4)
    assert d.label == "EMNIST (letters)"
    assert load("emnist").label == "EMNIST (letters)"  # the variant of the authors' code
    with pytest.raises(DataNotFound):
        load("emnist/balanced")


def test_idx_that_is_damaged(root):
    digits_files(root / "mnist", gz=True)
    path = root / "mnist/train-images-idx3-ubyte.gz"
    good = path.read_bytes()
    for content, words in (
        (good[:-40], "damaged gzip"),
        (b"not a gzip", "damaged gzip"),
        (gzip.compress(b"\1\2\3\4"), "not an idx file"),
        (gzip.compress(b""), "not an idx file"),
        (gzip.compress(gzip.decompress(good)[:-1]), "promises.*the file has"),
        (gzip.compress(gzip.decompress(good) + b"x"), "promises"),
        (gzip.compress(idx(pixels(5, 28, 28))), "does not match"),
        (gzip.compress(idx(pixels(6))), "does not match"),
    ):
        path.write_bytes(content)
        with pytest.raises(UnreadableData, match=words) as error:
            load("mnist", "digits")  # never silently the next set
        assert "train-images" in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_pipes_are_no_files(root):
    digits_files(root / "mnist")
    path = root / "mnist/train-images-idx3-ubyte"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataNotFound, match="no mnist/train-images"):
        load("mnist")
    with pytest.raises(UnreadableData, match="not a file"):
        read_idx(path)
    picture(root / "imagenet/train/a/1.png")
    os.mkfifo(root / "imagenet/train/a/2.png")
    with pytest.raises(UnreadableData, match="2.png: not a file"):
        load("imagenet")


def test_images_without_height(root):
    digits_files(root / "mnist")
    write(root / "mnist/train-images-idx3-ubyte", idx(np.zeros((6, 0, 28))))
    with pytest.raises(UnreadableData, match=r"train-images.*shape \(6, 1, 0, 28\)"):
        load("mnist")


def bomb(head):
    "A gzip of `head` and then half a gigabyte of zeros."
    stream, zeros = io.BytesIO(), bytes(2**24)
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(32):
            file.write(zeros)
    return stream.getvalue()


def test_gzip_bombs_unpack_only_what_their_headers_promise(root):
    for name, promise in (("small", 28), ("large", 2**31)):
        head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (128, promise, 28))
        write(root / f"{name}.gz", bomb(head))
    shows = [
        SHOW_ERROR.format(f"read_idx({str(root / name)!r})") for name in ("small.gz", "large.gz")
    ]
    small, large = capped("".join(shows)).splitlines()
    assert small == (
        f"UnreadableData {root / 'small.gz'}: its header promises 100,368 bytes for shape"
        " (128, 28, 28), the file has more: get it again"
    )
    promise = f"{root / 'large.gz'}: its header promises 7,696,581,394,448 bytes"
    assert large.startswith(f"UnreadableData {promise}") and "at most" in large


def test_idx_with_a_short_file_and_a_long_promise(root):
    path = write(root / "a-idx1-ubyte", bytes([0, 0, 8, 4]) + b"\xff" * 16)
    with pytest.raises(UnreadableData, match="a-idx1-ubyte.*promises"):
        read_idx(path)
    with pytest.raises(UnreadableData, match="a-idx1-ubyte.*not an idx"):
        read_idx(write(path, bytes([0, 0, 8, 4, 0])))
    assert read_idx(write(path, idx(np.zeros((0, 3))))).shape == (0, 3)


@pytest.mark.parametrize(
    "labels, words",
    [
        ([200] * 6, "label 200 of sample 0"),
        ([0, 1, 2, 3, 4, 10], "label 10 of sample 5"),
        (np.arange(7), r"labels of shape \(7,\)|does not match"),
    ],
)
def test_idx_labels_that_are_no_classes(root, labels, words):
    digits_files(root / "mnist", 6)
    write(root / "mnist/train-labels-idx1-ubyte", idx(labels))
    with pytest.raises(UnreadableData, match=words) as error:
        load("mnist")
    assert "-idx" in str(error.value)


def test_idx_labels_below_the_first_class(root):
    write(root / "qmnist/qmnist-train-images-idx3-ubyte", idx(pixels(3, 28, 28)))
    path = write(
        root / "qmnist/qmnist-train-labels-idx2-int",
        idx(np.array([[5] * 8, [-5] * 8, [3] * 8]), 12),
    )
    with pytest.raises(UnreadableData, match="label -5 of sample 1") as error:
        load("qmnist")
    assert str(path) in str(error.value)
    for kind, content in (("images-idx3", pixels(2, 28, 28)), ("labels-idx1", [0, 1])):
        write(root / f"EMNIST/raw/emnist-letters-train-{kind}-ubyte", idx(content))
    with pytest.raises(UnreadableData, match="label 0 of sample 0.*1 .. 26"):
        load("emnist/letters")
