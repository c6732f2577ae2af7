"""npz and mat files: the sets, pickles, bombs and headers that lie."""

import struct
import zipfile
import zlib

import numpy as np
import pytest
from data_files import SHOW_ERROR, capped, empty_root, npz, pixels, rng, write
from scipy.io import savemat

from agop_book.book.load import load
from agop_book.files import UnreadableData


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    return empty_root(tmp_path, monkeypatch)


def test_npz_sets(root):
    x = pixels(10, 32, 32, 3)
    npz(root / "cifar10_jpeg/test.npz", x=x, y=np.arange(10))
    d = load("cifar10_jpeg", split="test")
    assert d.label == "CIFAR-10 (JPEG subset) (10 of 1,000 samples)"
    assert np.allclose(d.x, x.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    assert d.classes[9] == "truck"
    npz(
        root / "svhn_partial/svhn_train_first1083.npz",
        X=pixels(1083, 32, 32, 3),
        y=np.arange(1083) % 10,
    )
    sizes = [len(load("svhn_crops", split=split)) for split in ("train", "test", "all")]
    assert sizes == [800, 283, 1083]
    assert load("svhn_crops").label == "SVHN crops (first 1,083 training images)"


def test_npz_with_a_pickle_is_refused(root):
    npz(root / "cifar10_jpeg/train.npz", x=np.array([{"a": 1}], object), y=np.arange(1))
    with pytest.raises(UnreadableData, match="cifar10_jpeg.*pickle"):
        load("cifar10_jpeg")
    write(root / "cifar10_jpeg/train.npz", b"PK but not a zip file")
    with pytest.raises(UnreadableData, match="cifar10_jpeg"):
        load("cifar10_jpeg")
    npz(root / "cifar10_jpeg/train.npz", x=pixels(1, 32, 32, 3))
    with pytest.raises(UnreadableData, match="y"):
        load("cifar10_jpeg")


@pytest.mark.parametrize("at", ["", "svhn"])
def test_svhn_matlab(root, at):
    x = pixels(32, 32, 3, 5)
    (root / at).mkdir(exist_ok=True)
    savemat(
        root / at / "test_32x32.mat", {"X": x, "y": np.array([[1], [10], [9], [5], [10]], np.uint8)}
    )
    d = load("svhn", split="test")
    assert d.y.tolist() == [1, 0, 9, 5, 0]
    assert np.allclose(d.x * 255, x.transpose(3, 2, 0, 1), atol=1e-4)
    assert d.label.startswith("SVHN (5 of 26,032")
    write(root / at / "test_32x32.mat", b"MATLAB 5.0 MAT-file, cut")
    with pytest.raises(UnreadableData, match="svhn"):
        load("svhn", split="test")


def test_imagenet32_opens_only_the_batches_it_needs(root, monkeypatch):
    x = [pixels(4, 3072) for _ in range(3)]
    for k in range(3):
        npz(
            root / f"imagenet32/train_data_batch_{k + 1}.npz",
            data=x[k],
            labels=np.arange(4 * k + 1, 4 * k + 5),
            mean=x[k].mean(0),
        )
    d = load("imagenet32")
    assert (d.y == np.arange(12)).all()
    assert np.allclose(d.x.reshape(12, -1) * 255, np.concatenate(x), atol=1e-4)
    one = load("imagenet32", n=1)
    assert (one.x[0] == d.x[one.y[0]]).all()
    npz(root / "imagenet32/val_data.npz", data=x[0], labels=[1, 1000, 3, 4], mean=x[0].mean(0))
    assert load("imagenet32", split="test").y.tolist() == [0, 999, 2, 3]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(y=np.arange(5) + 200), "label 200"),
        (dict(y=np.array([0, 1, 2, 3, -5])), "label -5 of sample 4"),
        (dict(y=np.array([2**40] * 5)), "label 1099511627776"),
        (dict(y=np.array([2**63 + 5] * 5, np.uint64)), "label 9223372036854775813"),
        (dict(y=np.array([0, 1, np.nan, 2, 3])), "label nan of sample 2"),
        (dict(y=np.array([0, 1, 1.5, 2, 3])), "label 1.5"),
        (dict(y=np.arange(6)), r"labels of shape \(6,\) for 5 samples"),
        (dict(y=np.zeros((5, 2), int)), r"labels of shape \(5, 2\)"),
        (dict(y=np.array(list("abcde"))), "no numbers"),
        (dict(x=rng.rand(5, 32, 32, 3)), "type float64, expected bytes"),
        (dict(x=pixels(5, 3, 32, 32)), r"expected bytes of shape \(n, height, width, 3\)"),
        (dict(x=pixels(0, 32, 32, 3), y=np.arange(0)), "images of shape"),
        (dict(x=pixels(5, 3072)), r"images of shape \(5, 3072\)"),
    ],
)
def test_npz_nonsense_names_the_file(root, change, words):
    path = npz(
        root / "cifar10_jpeg/train.npz",
        **{**dict(x=pixels(5, 32, 32, 3), y=np.arange(5)), **change},
    )
    with pytest.raises(UnreadableData, match=words) as error:
        load("cifar10_jpeg", "digits")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(labels=[1, 2, 3, 1001]), "label 1001"),
        (dict(labels=[0, 1, 2, 3]), "label 0 of sample 0"),
        (dict(labels=[1, 2, 3]), "labels of shape"),
        (dict(data=pixels(4, 3072) / 255), "expected bytes of shape"),
        (dict(data=pixels(4, 768)), "expected bytes of shape"),
    ],
)
def test_imagenet32_nonsense_names_the_batch(root, change, words):
    npz(root / "imagenet32/train_data_batch_1.npz", data=pixels(4, 3072), labels=np.arange(1, 5))
    path = npz(
        root / "imagenet32/train_data_batch_2.npz",
        **{**dict(data=pixels(4, 3072), labels=np.arange(1, 5)), **change},
    )
    with pytest.raises(UnreadableData, match=words) as error:
        load("imagenet32")
    assert str(path) in str(error.value)


def pack(path, n, blocks):
    "An archive that promises `n` images and has `blocks` times 16 MB of zeros for them."
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, 32, 32, 3)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("x.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(blocks):
                member.write(bytes(2**24))
        with file.open("y.npy", "w") as member:
            np.lib.format.write_array(member, np.zeros(n, np.int64))


def test_npz_bomb_and_npz_that_lies(root, monkeypatch):
    path = root / "cifar10_jpeg/train.npz"
    path.parent.mkdir()
    pack(path, 5, 32)  # half a gigabyte behind five images
    assert capped(SHOW_ERROR.format("load('cifar10_jpeg')")).strip() == "5"
    pack(path, 2**16, 12)  # 201 MB, as promised
    monkeypatch.setattr("agop_book.memory.free_memory", lambda device="cpu": 2**27)
    with pytest.raises(MemoryError, match="unpacking the .* bytes that .*train.npz promises.*n="):
        load("cifar10_jpeg")
    pack(path, 2**16, 1)
    with pytest.raises(UnreadableData, match="train.npz.*header of x promises"):
        load("cifar10_jpeg")


def element(kind, raw):
    "One part of a variable in a MATLAB 5 file."
    return struct.pack("<II", kind, len(raw)) + raw + bytes(-len(raw) % 8)


def variable(name, array, inflate=0):
    "A compressed variable of bytes, with `inflate` zeros behind it that its length does not count."
    shape = struct.pack(f"<{array.ndim}i", *array.shape)
    parts = [struct.pack("<II", 9, 0), shape, name.encode(), array.tobytes("F")]
    body = b"".join(element(kind, raw) for kind, raw in zip((6, 5, 1, 2), parts))
    packed = zlib.compress(struct.pack("<II", 14, len(body)) + body + bytes(inflate), 1)
    return struct.pack("<II", 15, len(packed)) + packed


def test_matlab_bomb(root):
    head = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    x = pixels(32, 32, 3, 4)
    y = variable("y", np.array([[1], [2], [3], [10]], np.uint8))
    path = write(root / "train_32x32.mat", head + variable("X", x) + y)
    d = load("svhn")
    assert d.y.tolist() == [1, 2, 3, 0]
    assert np.allclose(d.x * 255, x.transpose(3, 2, 0, 1), atol=1e-4)
    write(path, head + variable("X", x, 2**26) + y)
    words = "train_32x32.mat.*promises 12,[0-9]{3} bytes and unpacks to more"
    with pytest.raises(UnreadableData, match=words):
        load("svhn")
    write(path, (head + variable("X", x) + y)[:-20])
    with pytest.raises(UnreadableData, match="train_32x32.mat"):
        load("svhn")
