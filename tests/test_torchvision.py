"""torchvision's readers, on its own layouts."""

import os
import pickle  # to write the authors' format; the book itself never unpickles unchecked bytes
import sys

import numpy as np
import pytest
from data_files import digits_files, empty_root, picture, pixels, write

from agop_book.book import images
from agop_book.book.load import load
from agop_book.book.sets import SETS
from agop_book.files import UnreadableData


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    return empty_root(tmp_path, monkeypatch)


@pytest.fixture
def vision(monkeypatch):
    "torchvision with its checks of the official md5 sums switched off."
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")

    def exists(path, md5=None):
        return os.path.isfile(path)

    for module in ("cifar", "stl10", "celeba"):
        monkeypatch.setattr(getattr(datasets, module), "check_integrity", exists)
    return datasets


CIFAR10_BATCHES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]


@pytest.mark.parametrize(
    "name, folder, key, meta",
    [
        ("cifar10", "cifar-10-batches-py", "labels", ("batches.meta", "label_names")),
        ("cifar100", "cifar-100-python", "fine_labels", ("meta", "fine_label_names")),
    ],
)
def test_cifar(root, vision, name, folder, key, meta):
    x = pixels(3, 3072)
    for part in CIFAR10_BATCHES if name == "cifar10" else ["train", "test"]:
        write(root / folder / part, pickle.dumps({"data": x, key: [0, 1, 1]}))
    write(root / folder / meta[0], pickle.dumps({meta[1]: ["airplane", "automobile"]}))
    d = load(name, split="test")
    assert np.allclose(d.x.reshape(3, -1) * 255, x, atol=1e-4)
    assert d.y.tolist() == [0, 1, 1]
    assert d.classes == ["airplane", "automobile"]
    assert d.label == f"{SETS[name].title} (3 of 10,000 samples)"
    assert len(load(name)) == (15 if name == "cifar10" else 3)
    assert load(name, n=2).x.shape == (2, 3, 32, 32)


def test_pickles_with_wrong_checksums_are_never_opened(root, monkeypatch):
    pytest.importorskip("torchvision", reason="torchvision is not installed")

    def opened(*args, **options):
        raise AssertionError("an unchecked pickle was opened")

    monkeypatch.setattr(pickle, "load", opened)
    for part in [*CIFAR10_BATCHES, "batches.meta"]:
        write(root / "cifar-10-batches-py" / part, b"evil")
    with pytest.raises(UnreadableData, match="cifar10.*corrupted"):
        load("cifar10", "digits")


def test_stl10(root, vision):
    names = "airplane bird car cat deer dog horse monkey ship truck".split()
    x = pixels(4, 3, 96, 96)
    for part in ("train", "test"):
        columns_first = x.transpose(0, 1, 3, 2).tobytes()
        write(root / f"stl10_binary/{part}_X.bin", columns_first)
        write(root / f"stl10_binary/{part}_y.bin", bytes([1, 10, 3, 4]))
    write(root / "stl10_binary/unlabeled_X.bin", b"")
    write(root / "stl10_binary/class_names.txt", "\n".join(names))
    d = load("stl10", split="test")
    assert d.y.tolist() == [0, 9, 2, 3]
    assert np.allclose(d.x * 255, x, atol=1e-4)
    assert d.classes == names


def test_celeba(root, vision):
    # two of each split: torchvision stumbles over a split of one
    names = [f"{k:06d}.jpg" for k in range(1, 7)]
    for k, name in enumerate(names):
        picture(root / "celeba/img_align_celeba" / name, 50 * k, (178, 218))

    def table(name, rows, header=""):
        lines = [f"{image} {row}\n" for image, row in zip(names, rows)]
        write(root / "celeba" / name, header + "".join(lines))

    table("list_eval_partition.txt", [0, 0, 1, 1, 2, 2])
    table("identity_CelebA.txt", [7, 7, 8, 9, 9, 9])
    table("list_bbox_celeba.txt", ["1 2 3 4"] * 6, "6\nimage_id x_1 y_1 width height\n")
    landmarks = [" ".join("0123456789")] * 6
    table("list_landmarks_align_celeba.txt", landmarks, "6\na b c d e f g h i j\n")
    table("list_attr_celeba.txt", ["1 -1"] * 4 + ["-1 1"] * 2, "6\nSmiling Eyeglasses \n")
    d = load("celeba")
    assert d.x.shape == (2, 3, 96, 96)
    assert d.y.tolist() == [[1, 0], [1, 0]]
    assert d.classes == ["Smiling", "Eyeglasses"]
    assert load("celeba", split="test", size=20).y.tolist() == [[0, 1], [0, 1]]
    assert len(load("celeba", split="val")) == 2


def test_gtsrb(root, vision):
    for k, size in ((0, (30, 31)), (1, (50, 40))):
        for i in range(2):
            picture(root / f"gtsrb/GTSRB/Training/{k:05d}/{i:05d}.ppm", 90, size)
    assert load("gtsrb").x.shape == (4, 3, 32, 32) and load("gtsrb").y.tolist() == [0, 0, 1, 1]
    picture(root / "gtsrb/GTSRB/Final_Test/Images/00000.ppm", 10)
    write(
        root / "gtsrb/GT-final_test.csv",
        "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n00000.ppm;53;54;6;5;48;49;16\n",
    )
    assert load("gtsrb", split="test").y.tolist() == [16]


def test_dtd(root, vision):
    for split in ("train", "val", "test"):
        write(root / f"dtd/dtd/labels/{split}1.txt", "banded/banded_1.jpg\ndotted/dotted_1.jpg\n")
    for name in ("banded", "dotted"):
        picture(root / f"dtd/dtd/images/{name}/{name}_1.jpg", size=(300, 320))
    d = load("dtd", split="val", size=48)
    assert d.x.shape == (2, 3, 48, 48)
    assert d.classes == ["banded", "dotted"]
    assert d.y.tolist() == [0, 1]


def pcam_files(root, part, content=b""):
    name = f"pcam/camelyonpatch_level_2_split_{part}"
    return [write(root / f"{name}_{xy}.h5", content) for xy in "xy"]


def test_pcam(root, vision, monkeypatch):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    x, y = pcam_files(root, "valid")
    with h5py.File(x, "w") as file:
        file["x"] = pixels(3, 96, 96, 3)
    with h5py.File(y, "w") as file:
        file["y"] = np.array([0, 1, 1], np.uint8).reshape(3, 1, 1, 1)
    d = load("pcam", split="val", n=2)
    assert d.x.shape == (2, 3, 96, 96) and set(d.y) <= {0, 1}
    with h5py.File(y, "w") as file:
        file["y"] = np.zeros((4, 1, 1, 1), np.uint8)
    with pytest.raises(UnreadableData, match="valid_x.h5.*expected bytes of shape .4, height"):
        load("pcam", split="val")
    with h5py.File(x, "w") as file:
        shape, most, block = [(n, 96, 96, 3) for n in (4, None, 2**17)]
        options = dict(maxshape=most, chunks=block, compression="gzip")
        file.create_dataset("x", shape, np.uint8, **options)
    monkeypatch.setattr("agop_book.memory.free_memory", lambda device="cpu": 2**31)
    with pytest.raises(MemoryError, match="one block of .*valid_x.h5"):
        load("pcam", split="val")


def test_pcam_without_h5py(root, monkeypatch):
    pcam_files(root, "train")
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install h5py"):
        load("pcam")


def test_without_torchvision_the_error_names_the_extra(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    write(root / "cifar-10-batches-py/data_batch_1", b"")
    for options in ({}, {"download": True}):
        with pytest.raises(ImportError, match=r"agop_book\[vision\]"):
            load("cifar10", **options)
    digits_files(root / "mnist")
    assert len(load("mnist")) == 6  # what we read ourselves does not need it
