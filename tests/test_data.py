"""Chapter 90: every reader against small files in the published format, every way in which data can be absent or damaged, and the real sets."""
import functools
import gzip
import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agop_book.book import data
from agop_book.book.data import DataNotFound, Request, SETS, SubsetError, UnreadableData, available, load, low_rank, read_idx, read_task, tasks

REAL = next((folder for folder in (Path(os.environ.get("AGOP_BOOK_DATA") or "/nonexistent"), Path(__file__).resolve().parents[2] / "shared" / "data")
             if folder.is_dir()), None)
real = pytest.mark.skipif(REAL is None, reason="no real data: AGOP_BOOK_DATA is not set and ../shared/data does not exist")
EMBEDDED = [name for name, row in SETS.items() if not row.files]
rng = np.random.RandomState(0)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    "An empty data root; no cache of this machine can be seen."
    folder = tmp_path / "root"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGOP_BOOK_DATA", str(folder))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "scikit"))
    monkeypatch.setattr(data, "cache_dir", lambda: tmp_path / "cache")
    return folder


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def idx(values, kind=8):
    values = np.asarray(values)
    head = bytes([0, 0, kind, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return head + values.astype({8: "u1", 12: ">i4"}[kind]).tobytes()


def picture(path, value=0, size=(40, 30), kind="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(kind, size, value if kind == "L" else (value,) * 3).save(path)


def npz(path, **arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return write(path, stream.getvalue())


def pixels(*shape): return rng.randint(0, 256, shape).astype(np.uint8)


# --- embedded -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets_need_nothing(name, monkeypatch):
    monkeypatch.delenv("AGOP_BOOK_DATA")
    d = load(name)
    assert d.source == "embedded" and len(d) and d.label and d.name == name and d.split == "train"
    if SETS[name].modality in ("image", "table"):
        assert d.x.dtype == np.float32 and np.isfinite(d.x).all() and len(d.y) == len(d)
    if SETS[name].modality == "image": assert d.x.ndim == 4 and 0 <= d.x.min() and d.x.max() <= 1
    if SETS[name].modality in ("text", "names"): assert all(isinstance(part, str) and part for part in d.x)
    if d.classes is not None: assert d.y.dtype == np.int64 and set(d.y) == set(range(len(d.classes)))
    if SETS[name].held:
        whole, test = load(name, split="all"), load(name, split="test")
        assert len(d) + len(test) == len(whole)


def test_every_modality_has_an_embedded_set(): assert {SETS[name].modality for name in EMBEDDED} == {"image", "table", "text", "names"}


def test_made_splits_are_disjoint_and_complete():
    for shuffled in (True, False):
        row = replace(SETS["digits"], shuffled=shuffled)
        parts = [Request("digits", row, split).pick(101) for split in ("train", "test")]
        assert sorted(np.concatenate(parts)) == list(range(101))


def test_table_names_its_columns_and_keeps_the_target_type():
    d = load("diabetes")
    assert d.columns[2] == "bmi" and len(d.columns) == d.x.shape[1] and d.y.dtype == np.float64 and d.classes is None
    assert load("iris").classes == ["setosa", "versicolor", "virginica"]


def test_flat_is_a_view_and_subsets_are_nested():
    d = load("digits")
    assert d.flat.shape == (len(d), 64) and np.shares_memory(d.flat, d.x)
    a, b = d.subset(5, 3), d.subset(9, 3)
    assert (a.x == b.x[:5]).all() and (a.y == b.y[:5]).all() and a.label == d.label and len(a) == 5
    assert (load("digits", n=7, random_state=1).x == load("digits", n=7, random_state=1).x).all()
    assert (load("digits", n=7, random_state=1).x != load("digits", n=7, random_state=2).x).any()


def test_text_and_numbers():
    d = load("help_topics")
    assert d.y is None and d.text.startswith(d.x[0]) and d.subset(2).y is None
    with pytest.raises(TypeError, match="digits holds numbers"): load("digits").text


def test_size_crops_the_centre():
    d = load("sample_photos", size=32)
    assert d.x.shape == (2, 3, 32, 32)
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255                                   # white in the central square
    assert (np.asarray(data._square(Image.fromarray(image), 10)) == 255).all()
    assert load("digits", size=16).x.shape[2:] == (16, 16)


# --- synthetic ------------------------------------------------------------------------------------------------------------------------

def test_tutorial_task_is_exact():
    np.random.seed(1717)
    x, x_test = np.random.normal(size=(2000, 100)), np.random.normal(size=(10_000, 100))
    t = low_rank()
    assert (t.x == x).all() and (t.x_test == x_test).all() and t.y.shape == (2000, 1)
    assert (t.y[:, 0] == x[:, 0] * x[:, 1]).all() and (t.y_test[:, 0] == x_test[:, 0] * x_test[:, 1]).all()


@pytest.mark.parametrize("task", data.LOW_RANK)
def test_low_rank_depends_on_its_support_only(task):
    t = low_rank(task, n=20, d=6, n_test=3)
    f, support = data.LOW_RANK[task]
    other = rng.normal(size=t.x.shape)
    other[:, support] = t.x[:, support]
    assert np.allclose(f(other), t.y[:, 0]) and t.x_test.shape == (3, 6)
    for k in support:                                       # and on all of it
        moved = t.x.copy()
        moved[:, k] += 1
        assert not np.allclose(f(moved), t.y[:, 0])


@pytest.mark.parametrize("bad, words", [({"task": "x9"}, "task='x9'.*x1\\*x2"), ({"n": 0}, "n=0"), ({"d": 1}, "d=1.*>= 2"),
                                        ({"n_test": -1}, "n_test=-1"), ({"n": 2.5}, "n=2.5"), ({"n": True}, "n=True")])
def test_low_rank_bad_input(bad, words):
    with pytest.raises(ValueError, match=words): low_rank(**bad)


# --- asking for the wrong thing -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("names, options, words", [
    ((), {}, "names is empty"), (("mnits",), {}, "mnits.*did you mean 'mnist'"), (("cifar-10",), {}, "did you mean 'cifar10'"),
    (("zzz",), {}, "unknown set 'zzz'.*known are"), ((3,), {}, "unknown set 3"), (("digits/odd",), {}, "no variants"),
    (("emnist/greek",), {}, "emnist/letters"), (("uci121",), {}, "uci121/abalone"), (("uci121/../x",), {}, "unknown set"), (("uci121/*",), {}, "unknown set"),
    (("digits",), {"split": "valid"}, "split='valid': digits has the splits train, test, all"), (("mnist",), {"split": "all"}, "mnist has the splits train, test"),
    (("celeba", "digits"), {"split": "val"}, "digits has the splits"), (("digits",), {"n": 0}, "n=0"), (("digits",), {"n": -3}, "n=-3"),
    (("digits",), {"n": 1.5}, "n=1.5"), (("digits",), {"n": True}, "n=True"), (("digits",), {"n": 5000}, "n=5,000 is more than digits .train. has .1,347"),
    (("digits",), {"size": 0}, "size=0"), (("digits",), {"size": "big"}, "size='big'"), (("iris",), {"size": 8}, "size=8 for iris"),
])
def test_bad_requests_name_the_argument_and_the_remedy(names, options, words):
    with pytest.raises(ValueError, match=words): load(*names, **options)


def test_subset_larger_than_the_set():
    with pytest.raises(SubsetError, match="n=51 is more"): load("digits", n=50).subset(51)


# --- lookup ---------------------------------------------------------------------------------------------------------------------------

def digits_files(folder, n=6, prefix=("train", "train"), gz=False, kind=8):
    labels = np.arange(n) % 10 if kind == 8 else np.stack([np.arange(n) % 10] * 8, 1)
    x = pixels(n, 28, 28)
    pack, end = (gzip.compress, ".gz") if gz else (bytes, "")
    write(folder / f"{prefix[0]}-images-idx3-ubyte{end}", pack(idx(x)))
    write(folder / f"{prefix[1]}-labels-{'idx1-ubyte' if kind == 8 else 'idx2-int'}{end}", pack(idx(labels, kind)))
    return x


def test_order_of_preference_and_of_places(root, tmp_path):
    assert load("mnist", "digits").name == "digits"
    digits_files(tmp_path / "data" / "MNIST" / "raw", 4)
    assert load("mnist", "digits").source == "cache" and len(load("mnist")) == 4
    digits_files(root / "mnist", 6)
    assert load("mnist", "digits").source == "AGOP_BOOK_DATA" and len(load("mnist")) == 6
    assert load("digits", "mnist").name == "digits"


def test_not_found_names_set_places_and_remedy(root):
    with pytest.raises(DataNotFound) as error: load("celeba", "shakespeare")
    text = str(error.value)
    assert isinstance(error.value, FileNotFoundError)
    for words in ("celeba, shakespeare", str(root), "no celeba/img_align_celeba", "no tinyshakespeare/input.txt", "download=True", "agop_book[vision]", "'help_topics'"):
        assert words in text
    with pytest.raises(DataNotFound, match="sample_photos"): load("photos")


def test_data_folder_that_points_nowhere(monkeypatch, tmp_path):
    for place in (tmp_path / "nowhere", write(tmp_path / "file", "x")):
        monkeypatch.setenv("AGOP_BOOK_DATA", str(place))
        with pytest.warns(UserWarning, match="AGOP_BOOK_DATA=.*is not a folder"), pytest.raises(DataNotFound, match="absent|not a folder"): load("mnist")
        with pytest.warns(UserWarning): assert load("mnist", "digits").source == "embedded"


def test_unreadable_folder_and_file(root, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)       # the tests may run as a user for whom nothing is forbidden
    with pytest.raises(DataNotFound, match="no permission"): load("mnist")
    digits_files(root / "mnist")
    def forbidden(path): raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(data, "read_idx", forbidden)
    with pytest.raises(UnreadableData, match="mnist.*Permission denied"): load("mnist")


def test_available_without_data_opens_no_file(root, monkeypatch):
    digits_files(root / "mnist")
    def opened(*args, **options): raise AssertionError("available opened a file")
    for reader in ("read_idx", "read_task", "_download"): monkeypatch.setattr(data, reader, opened)
    table = available().set_index("name")
    assert list(table.columns) == ["modality", "n", "found", "remedy"] and len(table) == len(SETS)
    assert table.found["mnist"] == f"AGOP_BOOK_DATA: {root / 'mnist'}" and table.found["digits"] == "embedded" and table.found["svhn"] == "missing"
    assert (table.remedy[table.found == "missing"] != "").all() and (table.remedy[table.found != "missing"] == "").all()


# --- small files in the published formats -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name, at, train, test, kind", [
    ("mnist", "MNIST/raw", ("train", "train"), ("t10k", "t10k"), 8), ("mnist", "mnist", ("train", "train"), ("t10k", "t10k"), 8),
    ("fashion_mnist", "FashionMNIST/raw", ("train", "train"), ("t10k", "t10k"), 8),
    ("qmnist", "QMNIST/raw", ("qmnist-train",) * 2, ("qmnist-test",) * 2, 12)])
def test_idx_sets(root, name, at, train, test, kind, gz):
    for split, prefix in (("train", train), ("test", test)):
        x = digits_files(root / at, 12, prefix, gz, kind)
        d = load(name, split=split)
        assert d.x.shape == (12, 1, 28, 28) and np.allclose(d.x[:, 0] * 255, x, atol=1e-4) and d.y.tolist() == [*range(10), 0, 1]
        assert d.y.dtype == np.int64 and len(d.classes) == 10 and "(12 of " in d.label      # a part of it does not carry the full name
        assert len(load(name, split=split, n=3)) == 3


def test_emnist_is_upright_and_its_letters_count_from_zero(root):
    images = pixels(26, 28, 28)
    for kind, content in (("images-idx3", images), ("labels-idx1", np.arange(1, 27))):
        write(root / f"EMNIST/raw/emnist-letters-train-{kind}-ubyte", idx(content))
    d = load("emnist/letters")
    assert (d.y == np.arange(26)).all() and d.classes[0] == "a" and np.allclose(d.x[:, 0] * 255, images.transpose(0, 2, 1), atol=1e-4)
    assert d.label == "EMNIST (letters)"
    assert load("emnist").label == "EMNIST (letters)"               # the variant of the authors' code
    with pytest.raises(DataNotFound): load("emnist/balanced")


def test_idx_that_is_damaged(root):
    digits_files(root / "mnist", gz=True)
    path = root / "mnist/train-images-idx3-ubyte.gz"
    good = path.read_bytes()
    for content, words in ((good[:-40], "damaged gzip"), (b"not a gzip", "damaged gzip"), (gzip.compress(b"\1\2\3\4"), "not an idx file"), (gzip.compress(b""), "not an idx file"),
                           (gzip.compress(gzip.decompress(good)[:-1]), "promises.*the file has"), (gzip.compress(gzip.decompress(good) + b"x"), "promises"),
                           (gzip.compress(idx(pixels(5, 28, 28))), "does not match"), (gzip.compress(idx(pixels(6))), "does not match")):
        path.write_bytes(content)
        with pytest.raises(UnreadableData, match=words) as error: load("mnist", "digits")       # never silently the next set
        assert "train-images" in str(error.value)


def test_npz_sets(root):
    x = pixels(10, 32, 32, 3)
    npz(root / "cifar10_jpeg/test.npz", x=x, y=np.arange(10))
    d = load("cifar10_jpeg", split="test")
    assert d.label == "CIFAR-10 (JPEG subset) (10 of 1,000 samples)" and np.allclose(d.x, x.transpose(0, 3, 1, 2) / 255, atol=1e-6) and d.classes[9] == "truck"
    npz(root / "svhn_partial/svhn_train_first1083.npz", X=pixels(1083, 32, 32, 3), y=np.arange(1083) % 10)
    assert [len(load("svhn_crops", split=split)) for split in ("train", "test", "all")] == [800, 283, 1083]
    assert load("svhn_crops").label == "SVHN crops (first 1,083 training images)"


def test_npz_with_a_pickle_is_refused(root):
    npz(root / "cifar10_jpeg/train.npz", x=np.array([{"a": 1}], object), y=np.arange(1))
    with pytest.raises(UnreadableData, match="cifar10_jpeg.*pickle"): load("cifar10_jpeg")
    write(root / "cifar10_jpeg/train.npz", b"PK but not a zip file")
    with pytest.raises(UnreadableData, match="cifar10_jpeg"): load("cifar10_jpeg")
    npz(root / "cifar10_jpeg/train.npz", x=pixels(1, 32, 32, 3))
    with pytest.raises(UnreadableData, match="y"): load("cifar10_jpeg")


@pytest.mark.parametrize("at", ["", "svhn"])
def test_svhn_matlab(root, at):
    from scipy.io import savemat
    x = pixels(32, 32, 3, 5)
    (root / at).mkdir(exist_ok=True)
    savemat(root / at / "test_32x32.mat", {"X": x, "y": np.array([[1], [10], [9], [5], [10]], np.uint8)})
    d = load("svhn", split="test")
    assert d.y.tolist() == [1, 0, 9, 5, 0] and np.allclose(d.x * 255, x.transpose(3, 2, 0, 1), atol=1e-4) and d.label.startswith("SVHN (5 of 26,032")
    write(root / at / "test_32x32.mat", b"MATLAB 5.0 MAT-file, cut")
    with pytest.raises(UnreadableData, match="svhn"): load("svhn", split="test")


def test_imagenet32_opens_only_the_batches_it_needs(root, monkeypatch):
    x = [pixels(4, 3072) for _ in range(3)]
    for k in range(3): npz(root / f"imagenet32/train_data_batch_{k + 1}.npz", data=x[k], labels=np.arange(4 * k + 1, 4 * k + 5), mean=x[k].mean(0))
    d = load("imagenet32")
    assert (d.y == np.arange(12)).all() and np.allclose(d.x.reshape(12, -1) * 255, np.concatenate(x), atol=1e-4)
    one = load("imagenet32", n=1)
    assert (one.x[0] == d.x[one.y[0]]).all()
    npz(root / "imagenet32/val_data.npz", data=x[0], labels=[1, 1000, 3, 4], mean=x[0].mean(0))
    assert load("imagenet32", split="test").y.tolist() == [0, 999, 2, 3]


def test_class_folders_are_decoded_lazily(root, monkeypatch):
    for name in ("n01", "n02"):
        for k in range(5): picture(root / f"imagenet/train/{name}/{k}.JPEG", 40 * k, size=(50 + k, 70))
    decoded = []
    original = data._decode
    monkeypatch.setattr(data, "_decode", lambda path, size: decoded.append(path) or original(path, size))
    d = load("imagenet", n=3, size=16)
    assert d.x.shape == (3, 3, 16, 16) and len(decoded) == 3 and d.classes == ["n01", "n02"] and d.label.startswith("ImageNet (10 of")
    assert load("imagenet").x.shape == (10, 3, 224, 224) and load("imagenet").y.tolist() == [0] * 5 + [1] * 5
    write(root / "imagenet/train/n01/0.JPEG", b"not an image")
    with pytest.raises(UnreadableData, match="0.JPEG.*not a readable image"): load("imagenet")


def test_validation_images_without_class_folders(root):
    picture(root / "imagenet/val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UnreadableData, match="one folder of JPEG"): load("imagenet", split="test")


def test_caltech_leaves_out_the_background(root):
    for name in ("BACKGROUND_Google", "accordion", "ant"):
        for k in range(4): picture(root / f"caltech101/101_ObjectCategories/{name}/image_{k + 1:04d}.jpg", kind="L" if k else "RGB")
    d = load("caltech101", split="all", size=24)
    assert d.classes == ["accordion", "ant"] and d.x.shape == (8, 3, 24, 24) and len(load("caltech101")) == 6


def test_photos(root):
    for name in ("n01622779_great_grey_owl", "n01514859_hen"): picture(root / f"photos/{name}.jpg", 100, (256, 300))
    d = load("photos")
    assert d.x.shape == (2, 3, 224, 224) and d.classes == ["hen", "great grey owl"] and d.label == "2 photographs (ImageNet samples)"
    picture(root / "photos/my_cat.jpg")
    assert load("photos").label == "3 photographs"          # no longer ImageNet's alone


def both_ways(root, image, **options):
    "What `load` and `as_photos` make of one image file, as `(3, h, w)`."
    from agop_book.patches import as_photos
    path = root / "imagenet/train/a/1.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return [load("imagenet", size=8).x[0], as_photos(path)[0].numpy()]


@pytest.mark.parametrize("image, kind", [
    (Image.fromarray(np.full((8, 8), 16384, np.uint16)), "PNG"),
    (Image.fromarray(np.full((8, 8), 16384, np.uint16)), "TIFF"),
    (Image.fromarray(np.full((8, 8), 0.25, np.float32)), "TIFF"),
    (Image.new("RGBA", (8, 8), (0, 0, 0, 191)), "PNG"),
    (Image.new("LA", (8, 8), (0, 191)), "PNG"),
], ids=lambda v: getattr(v, "mode", v))
def test_a_quarter_of_white_in_every_kind_of_file(root, image, kind):
    for x in both_ways(root, image, format=kind): assert np.abs(x - 0.25).max() < 1 / 255


def test_transparent_pixels_are_white(root):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    for x in both_ways(root, palette, format="PNG", transparency=1): assert (x == 1).all()
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    for x in both_ways(root, clear, format="PNG"): assert (x == 1).all()


def test_photographs_are_upright(root):
    values = np.zeros((8, 8, 3), np.uint8)
    values[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6                                  # turn clockwise: left becomes top
    for x in both_ways(root, Image.fromarray(values), format="PNG", exif=exif):
        assert (x[:, :4] == 1).all() and (x[:, 4:] == 0).all()


@pytest.mark.parametrize("values", [
    np.full((8, 8), 300.0, np.float32), np.full((8, 8), np.nan, np.float32),
    np.full((8, 8), 70_000, np.int32),
], ids=["large", "nan", "int32"])
def test_photographs_without_a_known_white_are_refused(root, values):
    from agop_book.patches import as_photos
    with pytest.raises(UnreadableData, match="1.png.*what is white"):
        both_ways(root, Image.fromarray(values), format="TIFF")
    with pytest.raises(UnreadableData, match="1.png.*what is white"):
        as_photos(root / "imagenet/train/a/1.png")


def test_a_row_of_your_own(root, monkeypatch):
    for k in range(10): picture(root / f"mine/{'cat' if k % 2 else 'dog'}/{k}.jpg", 10 * k)
    monkeypatch.setitem(SETS, "mine", data.Row("my photographs", "image", data._class_folders, {"all": None}, ("mine",), held=0.2, size=32))
    assert load("mine").x.shape == (8, 3, 32, 32) and load("mine", split="test").label == "my photographs" and "mine" in set(available().name)


def test_texts(root):
    whole = "\n\n".join(f"SPEAKER {i}:\nline {i}é" for i in range(20)) + "\n\n\nlast\n"
    write(root / "tinyshakespeare/input.txt", whole)
    assert load("shakespeare", split="all").text == whole
    assert load("shakespeare").text + "\n\n" + load("shakespeare", split="test").text == whole
    write(root / "tinystories/tinystories_sample.txt", "One.\n<|endoftext|>\nTwo.\n<|endoftext|>\ncut in the mid")
    d = load("tinystories", split="all")
    assert d.x.tolist() == ["One.", "Two."] and d.label == "TinyStories (2 stories)" and d.y is None
    for content in (b"", b"\xff\xfe\xff<|endoftext|>"):
        write(root / "tinystories/tinystories_sample.txt", content)
        with pytest.raises(UnreadableData, match="tinystories"): load("tinystories", split="all")


def test_names(root):
    write(root / "names/French.txt", "Abélard\nBéranger\n\n")
    write(root / "names/Greek.txt", "Adamou\n")
    d = load("names", split="all")
    assert d.x.tolist() == ["Abélard", "Béranger", "Adamou"] and d.y.tolist() == [0, 0, 1] and d.classes == ["French", "Greek"]
    assert d.label == "3 surnames of 2 languages"


def test_lines_of_names_end_at_newlines_alone(root):
    write(root / "names/French.txt", "\ufeffAbel\r\nBé\x0cr\nC\u2028d\u0085e\rFabre")
    for name in ("README.txt", "readme_names.txt", "LICENSE.txt", ".hidden.txt", "._French.txt"):
        write(root / "names" / name, "no name\n")
    write(root / "names/Greek.txt", "Adamou\n")
    d = load("names", split="all")
    assert d.x.tolist() == ["Abel", "Bé\x0cr", "C\u2028d\u0085e", "Fabre", "Adamou"]
    assert d.classes == ["French", "Greek"] and d.y.tolist() == [0, 0, 0, 0, 1]
    for name in ("French", "Greek"): (root / f"names/{name}.txt").unlink()
    with pytest.raises(UnreadableData, match="no file of names"): load("names")


def test_empty_stories_and_byte_order_marks_are_no_text(root):
    end = "<|endoftext|>"
    for start in ("", end, f"\ufeff \n{end}\n"):
        write(root / "tinystories/tinystories.txt", f"{start}One.{end} \n{end}{end}Two.{end}\n {end}")
        assert load("tinystories", split="all").x.tolist() == ["One.", "Two."]
    write(root / "tinyshakespeare/input.txt", "\ufeffA:\nx\n\nB:\ny")
    assert load("shakespeare", split="all").x.tolist() == ["A:\nx", "B:\ny"]


def test_hidden_folders_and_files_are_no_classes(root):
    for name in (".cache/1.png", "__MACOSX/1.png", "a/1.png", "a/._1.png", "b/1.png"):
        picture(root / "imagenet/train" / name)
    d = load("imagenet", size=8)
    assert d.classes == ["a", "b"] and len(d) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_pipes_are_no_files(root):
    digits_files(root / "mnist")
    path = root / "mnist/train-images-idx3-ubyte"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataNotFound, match="no mnist/train-images"): load("mnist")
    with pytest.raises(UnreadableData, match="not a file"): read_idx(path)
    picture(root / "imagenet/train/a/1.png")
    os.mkfifo(root / "imagenet/train/a/2.png")
    with pytest.raises(UnreadableData, match="2.png: not a file"): load("imagenet")


@pytest.mark.parametrize("bad", [-1, 2**32, 1.5, "0", True])
def test_a_bad_random_state_is_named(root, bad):
    for n in (None, 5):
        with pytest.raises(ValueError, match="random_state=") as error:
            load("digits", n=n, random_state=bad)
        assert not isinstance(error.value, UnreadableData)


def test_images_without_height(root):
    digits_files(root / "mnist")
    write(root / "mnist/train-images-idx3-ubyte", idx(np.zeros((6, 0, 28))))
    with pytest.raises(UnreadableData, match=r"train-images.*shape \(6, 1, 0, 28\)"): load("mnist")


# --- torchvision's readers, on its own layouts ------------------------------------------------------------------------------------------

@pytest.fixture
def vision(monkeypatch):
    "torchvision with its checks of the official md5 sums switched off."
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    def exists(path, md5=None): return os.path.isfile(path)
    for module in ("cifar", "stl10", "celeba"): monkeypatch.setattr(getattr(datasets, module), "check_integrity", exists)
    return datasets


@pytest.mark.parametrize("name, folder, key, meta", [("cifar10", "cifar-10-batches-py", "labels", ("batches.meta", "label_names")),
                                                     ("cifar100", "cifar-100-python", "fine_labels", ("meta", "fine_label_names"))])
def test_cifar(root, vision, name, folder, key, meta):
    import pickle                                           # to write the authors' format; the book itself never unpickles unchecked bytes
    x = pixels(3, 3072)
    for part in ([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]) if name == "cifar10" else ["train", "test"]:
        write(root / folder / part, pickle.dumps({"data": x, key: [0, 1, 1]}))
    write(root / folder / meta[0], pickle.dumps({meta[1]: ["airplane", "automobile"]}))
    d = load(name, split="test")
    assert np.allclose(d.x.reshape(3, -1) * 255, x, atol=1e-4) and d.y.tolist() == [0, 1, 1] and d.classes == ["airplane", "automobile"]
    assert d.label == f"{SETS[name].title} (3 of 10,000 samples)"
    assert len(load(name)) == (15 if name == "cifar10" else 3) and load(name, n=2).x.shape == (2, 3, 32, 32)


def test_pickles_with_wrong_checksums_are_never_opened(root, monkeypatch):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    import pickle
    def opened(*args, **options): raise AssertionError("an unchecked pickle was opened")
    monkeypatch.setattr(pickle, "load", opened)
    for part in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]: write(root / "cifar-10-batches-py" / part, b"evil")
    with pytest.raises(UnreadableData, match="cifar10.*corrupted"): load("cifar10", "digits")


def test_stl10(root, vision):
    x = pixels(4, 3, 96, 96)
    for part in ("train", "test"):
        write(root / f"stl10_binary/{part}_X.bin", x.transpose(0, 1, 3, 2).tobytes())         # columns first
        write(root / f"stl10_binary/{part}_y.bin", bytes([1, 10, 3, 4]))
    write(root / "stl10_binary/unlabeled_X.bin", b"")
    write(root / "stl10_binary/class_names.txt", "\n".join(data._CIFAR10))
    d = load("stl10", split="test")
    assert d.y.tolist() == [0, 9, 2, 3] and np.allclose(d.x * 255, x, atol=1e-4) and d.classes == data._CIFAR10


def test_celeba(root, vision):
    names = [f"{k:06d}.jpg" for k in range(1, 7)]      # two of each split: torchvision stumbles over a split of one
    for k, name in enumerate(names): picture(root / "celeba/img_align_celeba" / name, 50 * k, (178, 218))
    def table(name, rows, header=""): write(root / "celeba" / name, header + "".join(f"{image} {row}\n" for image, row in zip(names, rows)))
    table("list_eval_partition.txt", [0, 0, 1, 1, 2, 2])
    table("identity_CelebA.txt", [7, 7, 8, 9, 9, 9])
    table("list_bbox_celeba.txt", ["1 2 3 4"] * 6, "6\nimage_id x_1 y_1 width height\n")
    table("list_landmarks_align_celeba.txt", [" ".join("0123456789")] * 6, "6\n" + " ".join("abcdefghij") + "\n")
    table("list_attr_celeba.txt", ["1 -1"] * 4 + ["-1 1"] * 2, "6\nSmiling Eyeglasses \n")
    d = load("celeba")
    assert d.x.shape == (2, 3, 96, 96) and d.y.tolist() == [[1, 0], [1, 0]] and d.classes == ["Smiling", "Eyeglasses"]
    assert load("celeba", split="test", size=20).y.tolist() == [[0, 1], [0, 1]] and len(load("celeba", split="val")) == 2


def test_gtsrb(root, vision):
    for k, size in ((0, (30, 31)), (1, (50, 40))):
        for i in range(2): picture(root / f"gtsrb/GTSRB/Training/{k:05d}/{i:05d}.ppm", 90, size)
    assert load("gtsrb").x.shape == (4, 3, 32, 32) and load("gtsrb").y.tolist() == [0, 0, 1, 1]
    picture(root / "gtsrb/GTSRB/Final_Test/Images/00000.ppm", 10)
    write(root / "gtsrb/GT-final_test.csv", "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n00000.ppm;53;54;6;5;48;49;16\n")
    assert load("gtsrb", split="test").y.tolist() == [16]


def test_dtd(root, vision):
    for split in ("train", "val", "test"):
        write(root / f"dtd/dtd/labels/{split}1.txt", "banded/banded_1.jpg\ndotted/dotted_1.jpg\n")
    for name in ("banded", "dotted"): picture(root / f"dtd/dtd/images/{name}/{name}_1.jpg", size=(300, 320))
    d = load("dtd", split="val", size=48)
    assert d.x.shape == (2, 3, 48, 48) and d.classes == ["banded", "dotted"] and d.y.tolist() == [0, 1]


def pcam_files(root, part, content=b""):
    return [write(root / f"pcam/camelyonpatch_level_2_split_{part}_{xy}.h5", content) for xy in "xy"]


def test_pcam(root, vision, monkeypatch):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    x, y = pcam_files(root, "valid")
    with h5py.File(x, "w") as file: file["x"] = pixels(3, 96, 96, 3)
    with h5py.File(y, "w") as file: file["y"] = np.array([0, 1, 1], np.uint8).reshape(3, 1, 1, 1)
    d = load("pcam", split="val", n=2)
    assert d.x.shape == (2, 3, 96, 96) and set(d.y) <= {0, 1}
    with h5py.File(y, "w") as file: file["y"] = np.zeros((4, 1, 1, 1), np.uint8)
    with pytest.raises(UnreadableData, match="valid_x.h5.*expected bytes of shape .4, height"): load("pcam", split="val")
    with h5py.File(x, "w") as file: file.create_dataset("x", (4, 96, 96, 3), np.uint8, maxshape=(None, 96, 96, 3), chunks=(2**17, 96, 96, 3), compression="gzip")
    monkeypatch.setattr("agop_book.memory.free_memory", lambda device="cpu": 2**31)
    with pytest.raises(MemoryError, match="one block of .*valid_x.h5"): load("pcam", split="val")


def test_pcam_without_h5py(root, monkeypatch):
    pcam_files(root, "train")
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install h5py"): load("pcam")


def test_without_torchvision_the_error_names_the_extra(root, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "torchvision", None)
    write(root / "cifar-10-batches-py/data_batch_1", b"")
    for options in ({}, {"download": True}):
        with pytest.raises(ImportError, match=r"agop_book\[vision\]"): load("cifar10", **options)
    digits_files(root / "mnist")
    assert len(load("mnist")) == 6                          # what we read ourselves does not need it


# --- downloads ----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{it.server_port}"
        it.shutdown()


def test_download_is_checked_and_cached(server, monkeypatch, tmp_path):
    folder, url = server
    content = b"A:\nspeech\n\nB:\nspeech"
    write(folder / "input.txt", content)
    row = replace(SETS["shakespeare"], url=f"{url}/input.txt", sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(SETS, "shakespeare", row)
    with pytest.raises(DataNotFound): load("shakespeare")                                   # no network unless asked
    assert load("shakespeare", split="all", download=True).source == "download"
    (folder / "input.txt").unlink()
    assert load("shakespeare", split="all", download=True).source == "cache"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "input.txt"]


def test_download_with_a_wrong_checksum_is_refused(server, monkeypatch, tmp_path):
    folder, url = server
    write(folder / "input.txt", "forged")
    monkeypatch.setitem(SETS, "shakespeare", replace(SETS["shakespeare"], url=f"{url}/input.txt"))
    with pytest.raises(UnreadableData, match="shakespeare.*checksum"): load("shakespeare", "help_topics", download=True)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_download_that_fails_goes_on_to_the_next_name(server, monkeypatch):
    monkeypatch.setitem(SETS, "shakespeare", replace(SETS["shakespeare"], url=f"{server[1]}/absent.txt"))
    assert load("shakespeare", "help_topics", download=True).name == "help_topics"
    with pytest.raises(DataNotFound, match="download failed.*404"): load("shakespeare", download=True)
    with pytest.raises(DataNotFound, match="no checksum of it is known"): load("names", download=True)


def test_torchvision_downloads_into_the_cache(server, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    folder, url = server
    files = []
    for part, kind, content in (("train", "images-idx3", pixels(3, 28, 28)), ("train", "labels-idx1", [1, 2, 3]),
                                ("t10k", "images-idx3", pixels(3, 28, 28)), ("t10k", "labels-idx1", [1, 2, 3])):
        packed = gzip.compress(idx(content))
        write(folder / f"{part}-{kind}-ubyte.gz", packed)
        files.append((f"{part}-{kind}-ubyte.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "mirrors", [url + "/"])
    monkeypatch.setattr(datasets.MNIST, "resources", [(name, "0" * 32) for name, _ in files])
    with pytest.raises(UnreadableData, match="mnist.*checksum"): load("mnist", download=True)
    monkeypatch.setattr(datasets.MNIST, "resources", files)
    d = load("mnist", download=True)
    assert d.source == "download" and d.y.tolist() == [1, 2, 3] and load("mnist").source == "cache"


# --- the 121 tasks --------------------------------------------------------------------------------------------------------------------------

def task_files(root, name="toy", n=8, d=2, classes=2, test=0):
    folder = root / "uci121" / name
    facts = f"n_entradas= {d}\nn_clases= {classes}\nn_arquivos= {1 + bool(test)}\nfich1= {name}_train_R.dat\nn_patrons1= {n}\n"
    if test: facts += f"fich2= {name}_test_R.dat\nn_patrons2= {test}\n"
    write(folder / f"{name}.txt", facts)
    for part, rows in (("train", n), ("test", test)):
        lines = [f"{i + 1}\t" + "\t".join(f"{v:.3f}" for v in rng.normal(size=d)) + f"\t{i % classes}" for i in range(rows)]
        if rows: write(folder / f"{name}_{part}_R.dat", "\t" + "\t".join(f"f{k}" for k in range(d)) + "\tclase\n" + "\n".join(lines) + "\n")
    half = n // 2
    write(folder / "conxuntos.dat", " ".join(map(str, range(half))) + "\n" + " ".join(map(str, range(half, n))) + "\n")
    write(folder / "conxuntos_kfold.dat", "0 1 2 3 4 5\n6 7\n" * 4)
    return folder


def test_task_and_its_splits(root):
    t = read_task(task_files(root, test=3))
    assert t.x.shape == (8, 2) and t.x_test.shape == (3, 2) and t.y.dtype == np.int64 and t.n_classes == 2
    assert t.train.tolist() == [0, 1, 2, 3] and t.validation.tolist() == [4, 5, 6, 7] and len(t.folds) == 4 and t.folds[0][1].tolist() == [6, 7]
    d = load("uci121/toy")
    assert d.x.dtype == np.float32 and np.allclose(d.x, t.x) and d.label == "toy (of the 121 tasks)" and len(load("uci121/toy", split="test")) == 3
    task_files(root, "single")
    assert read_task(root / "uci121/single").x_test is None
    with pytest.raises(ValueError, match="no separate test table"): load("uci121/single", split="test")
    write(root / "uci121/RECONSTRUCTED.txt", "single/single_R.dat  from elsewhere\n")
    assert load("uci121/single").label.endswith("rebuilt from another source") and "rebuilt" not in load("uci121/toy").label
    assert set(tasks()) == {"toy", "single"} and available().set_index("name").n["uci121"] == "2 tasks"
    with pytest.raises(DataNotFound, match="did you mean single"): load("uci121/singel")


@pytest.mark.parametrize("file, change, words", [
    ("toy_train_R.dat", lambda s: s.replace("\t1\n", "\t7\n", 1), r"_R.dat, line 3: class 7 is not one of 0 .. 1"),
    ("toy_train_R.dat", lambda s: s.replace("\t0\n", "\t0.5\n", 1), r"line 2: class 0.5"),
    ("toy_train_R.dat", lambda s: s.replace("\n4\t", "\n4\tabc\t", 1), r"line 5: not a row of numbers"),
    ("toy_train_R.dat", lambda s: s.replace("\n5\t", "\n5\t1.5\t", 1), r"line 6: 5 columns, expected 4"),
    ("toy_train_R.dat", lambda s: s[:s.index("\n7\t") + 5], r"line 8: "),
    ("toy_train_R.dat", lambda s: s[:s.index("\n6\t") + 1], r"line 6: the file ends after 5 rows, expected 8"),
    ("toy_train_R.dat", lambda s: "", r"ends after 0 rows"),
    ("toy_train_R.dat", lambda s: s.replace("\n3\t", "\nnan\t", 1), r"line 4: a value is not finite"),
    ("conxuntos.dat", lambda s: s.replace("7", "8"), r"conxuntos.dat, line 2: \['8'\] is not an index of one of the 8 samples"),
    ("conxuntos.dat", lambda s: s.replace("0", "-1"), r"conxuntos.dat, line 1: \['-1'\]"),
    ("conxuntos.dat", lambda s: s.splitlines()[0], r"1 lines of indices, expected 2"),
    ("conxuntos_kfold.dat", lambda s: s + "1 2\n", r"9 lines of indices, expected 8"),
    ("conxuntos.dat", lambda s: s.replace("1", "0"), r"conxuntos.dat, line 1: index 0 stands more than once"),
    ("conxuntos.dat", lambda s: s.replace("5", "3"), r"conxuntos.dat, line 2: 1 samples such as 3 are also in line 1"),
    ("conxuntos_kfold.dat", lambda s: s[::-1].replace("7 6", "7 7", 1)[::-1].lstrip(), r"conxuntos_kfold.dat, line 8: index 7 stands"),
    ("conxuntos_kfold.dat", lambda s: s.replace("6 7", "6 5", 1), r"conxuntos_kfold.dat, line 2: 1 samples such as 5 are also in line 1"),
    ("toy.txt", lambda s: s.replace("n_clases= 2", ""), r"toy.txt, line 1: no integer n_clases"),
    ("toy.txt", lambda s: s.replace("n_clases= 2", "n_clases= 3"), r"toy.txt, line 1: n_clases= 3, but no row is of class 2"),
    ("toy.txt", lambda s: s.replace("n_entradas= 2", "n_entradas= two"), r"n_entradas= in this file \(it has 'two'\)"),
])
def test_malformed_task_names_file_and_line(root, file, change, words):
    folder = task_files(root)
    (folder / file).write_text(change((folder / file).read_text()))
    with pytest.raises(UnreadableData, match=words): read_task(folder)
    with pytest.raises(UnreadableData, match=words): load("uci121/toy")


@pytest.mark.parametrize("file", ["conxuntos.dat", "conxuntos_kfold.dat", "toy.txt", "toy_test_R.dat"])
def test_missing_file_of_a_task_is_named(root, file):
    folder = task_files(root, test=3)
    (folder / file).unlink()
    with pytest.raises(UnreadableData, match=f"no {file}"): read_task(folder)


def test_incomplete_task_is_reported_missing(root):
    (task_files(root) / "conxuntos.dat").unlink()
    with pytest.raises(DataNotFound, match="no uci121/toy/conxuntos.dat"): load("uci121/toy")


# --- nonsense, bombs and paths --------------------------------------------------------------------------------------------------------------

def bomb(head):
    "A gzip of `head` and then half a gigabyte of zeros."
    stream, zeros = io.BytesIO(), bytes(2**24)
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(32): file.write(zeros)
    return stream.getvalue()


def capped(code, *args, gigabytes=0.4):
    "Run `code` in a process that may take so much address space beyond what its imports took."
    pytest.importorskip("resource", reason="no limits of memory here")
    start = ("import sys, torch, numpy, agop_book.memory, resource, psutil\nfrom agop_book.book import data\nfrom agop_book.book.data import *\n"
             f"top = psutil.Process().memory_info().vms + int({gigabytes} * 2**30)\nresource.setrlimit(resource.RLIMIT_AS, (top, top))\n")
    done = subprocess.run([sys.executable, "-c", start + code, *map(str, args)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


SHOW_ERROR = "try: print(len({}))\nexcept (UnreadableData, MemoryError) as error: print(type(error).__name__, error)\n"


def test_gzip_bombs_unpack_only_what_their_headers_promise(root):
    for name, promise in (("small", 28), ("large", 2**31)):
        head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (128, promise, 28))
        write(root / f"{name}.gz", bomb(head))
    small, large = capped("".join(SHOW_ERROR.format(f"read_idx({str(root / name)!r})") for name in ("small.gz", "large.gz")), gigabytes=0.4).splitlines()
    assert small == f"UnreadableData {root / 'small.gz'}: its header promises 100,368 bytes for shape (128, 28, 28), the file has more: get it again"
    assert large.startswith(f"UnreadableData {root / 'large.gz'}: its header promises 7,696,581,394,448 bytes") and "at most" in large


def test_idx_with_a_short_file_and_a_long_promise(root):
    path = write(root / "a-idx1-ubyte", bytes([0, 0, 8, 4]) + b"\xff" * 16)
    with pytest.raises(UnreadableData, match="a-idx1-ubyte.*promises"): read_idx(path)
    with pytest.raises(UnreadableData, match="a-idx1-ubyte.*not an idx"): read_idx(write(path, bytes([0, 0, 8, 4, 0])))
    assert read_idx(write(path, idx(np.zeros((0, 3))))).shape == (0, 3)


def test_npz_bomb_and_npz_that_lies(root, monkeypatch):
    import zipfile
    path = root / "cifar10_jpeg/train.npz"
    path.parent.mkdir()
    def pack(n, blocks):
        "An archive whose images are `blocks` times 16 MB of zeros."
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            with file.open("x.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (n, 32, 32, 3)})
                for _ in range(blocks): member.write(bytes(2**24))
            with file.open("y.npy", "w") as member: np.lib.format.write_array(member, np.zeros(n, np.int64))
    pack(5, 32)                                                    # half a gigabyte behind five images
    assert capped(SHOW_ERROR.format("load('cifar10_jpeg')"), gigabytes=0.4).strip() == "5"
    pack(2**16, 12)                                                # 201 MB, as promised
    monkeypatch.setattr("agop_book.memory.free_memory", lambda device="cpu": 2**27)
    with pytest.raises(MemoryError, match="unpacking the .* bytes that .*train.npz promises.*n="): load("cifar10_jpeg")
    pack(2**16, 1)
    with pytest.raises(UnreadableData, match="train.npz.*header of x promises"): load("cifar10_jpeg")


def test_matlab_bomb(root):
    import struct
    import zlib
    def variable(name, array, inflate=0):
        def element(kind, raw): return struct.pack("<II", kind, len(raw)) + raw + bytes(-len(raw) % 8)
        body = element(6, struct.pack("<II", 9, 0)) + element(5, struct.pack(f"<{array.ndim}i", *array.shape)) + element(1, name.encode()) + element(2, array.tobytes("F"))
        packed = zlib.compress(struct.pack("<II", 14, len(body)) + body + bytes(inflate), 1)
        return struct.pack("<II", 15, len(packed)) + packed
    head, x, y = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM", pixels(32, 32, 3, 4), np.array([[1], [2], [3], [10]], np.uint8)
    path = root / "train_32x32.mat"
    write(path, head + variable("X", x) + variable("y", y))
    d = load("svhn")
    assert d.y.tolist() == [1, 2, 3, 0] and np.allclose(d.x * 255, x.transpose(3, 2, 0, 1), atol=1e-4)
    write(path, head + variable("X", x, 2**26) + variable("y", y))
    with pytest.raises(UnreadableData, match="train_32x32.mat.*promises 12,[0-9]{3} bytes and unpacks to more"): load("svhn")
    write(path, (head + variable("X", x) + variable("y", y))[:-20])
    with pytest.raises(UnreadableData, match="train_32x32.mat"): load("svhn")


@pytest.mark.parametrize("labels, words", [([200] * 6, "label 200 of sample 0"), ([0, 1, 2, 3, 4, 10], "label 10 of sample 5"), (np.arange(7), r"labels of shape \(7,\)|does not match")])
def test_idx_labels_that_are_no_classes(root, labels, words):
    digits_files(root / "mnist", 6)
    write(root / "mnist/train-labels-idx1-ubyte", idx(labels))
    with pytest.raises(UnreadableData, match=words) as error: load("mnist")
    assert "-idx" in str(error.value)


def test_idx_labels_below_the_first_class(root):
    write(root / "qmnist/qmnist-train-images-idx3-ubyte", idx(pixels(3, 28, 28)))
    path = write(root / "qmnist/qmnist-train-labels-idx2-int", idx(np.array([[5] * 8, [-5] * 8, [3] * 8]), 12))
    with pytest.raises(UnreadableData, match="label -5 of sample 1") as error: load("qmnist")
    assert str(path) in str(error.value)
    for kind, content in (("images-idx3", pixels(2, 28, 28)), ("labels-idx1", [0, 1])): write(root / f"EMNIST/raw/emnist-letters-train-{kind}-ubyte", idx(content))
    with pytest.raises(UnreadableData, match="label 0 of sample 0.*1 .. 26"): load("emnist/letters")


@pytest.mark.parametrize("change, words", [
    (dict(y=np.arange(5) + 200), "label 200"), (dict(y=np.array([0, 1, 2, 3, -5])), "label -5 of sample 4"), (dict(y=np.array([2**40] * 5)), "label 1099511627776"),
    (dict(y=np.array([2**63 + 5] * 5, np.uint64)), "label 9223372036854775813"), (dict(y=np.array([0, 1, np.nan, 2, 3])), "label nan of sample 2"),
    (dict(y=np.array([0, 1, 1.5, 2, 3])), "label 1.5"), (dict(y=np.arange(6)), r"labels of shape \(6,\) for 5 samples"), (dict(y=np.zeros((5, 2), int)), r"labels of shape \(5, 2\)"),
    (dict(y=np.array(list("abcde"))), "no numbers"), (dict(x=rng.rand(5, 32, 32, 3)), "type float64, expected bytes"), (dict(x=pixels(5, 3, 32, 32)), r"expected bytes of shape \(n, height, width, 3\)"),
    (dict(x=pixels(0, 32, 32, 3), y=np.arange(0)), "images of shape"), (dict(x=pixels(5, 3072)), r"images of shape \(5, 3072\)")])
def test_npz_nonsense_names_the_file(root, change, words):
    path = npz(root / "cifar10_jpeg/train.npz", **{**dict(x=pixels(5, 32, 32, 3), y=np.arange(5)), **change})
    with pytest.raises(UnreadableData, match=words) as error: load("cifar10_jpeg", "digits")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("change, words", [(dict(labels=[1, 2, 3, 1001]), "label 1001"), (dict(labels=[0, 1, 2, 3]), "label 0 of sample 0"), (dict(labels=[1, 2, 3]), "labels of shape"),
                                           (dict(data=pixels(4, 3072) / 255), "expected bytes of shape"), (dict(data=pixels(4, 768)), "expected bytes of shape")])
def test_imagenet32_nonsense_names_the_batch(root, change, words):
    npz(root / "imagenet32/train_data_batch_1.npz", data=pixels(4, 3072), labels=np.arange(1, 5))
    path = npz(root / "imagenet32/train_data_batch_2.npz", **{**dict(data=pixels(4, 3072), labels=np.arange(1, 5)), **change})
    with pytest.raises(UnreadableData, match=words) as error: load("imagenet32")
    assert str(path) in str(error.value)


def test_texts_that_are_no_texts(root):
    story = b"Once.\n<|endoftext|>\nTwice.\n<|endoftext|>\n"
    path = root / "tinystories/tinystories_sample.txt"
    for content, words in ((gzip.compress(story), "no sample"), (story.replace(b"T", b"\0"), "zero bytes"), (b"no mark at all", "no sample"), (story.decode().encode("utf-16"), "no sample|not a text")):
        write(path, content)
        with pytest.raises(UnreadableData, match=words) as error: load("tinystories", split="all")
        assert str(path) in str(error.value)
    write(root / "names/French.txt", "Abel\n")
    for content, words in ((b"\n \n", "no name"), (b"\xff\xfe", "UTF-8"), (b"A\0b", "zero bytes")):
        path = write(root / "names/Greek.txt", content)
        with pytest.raises(UnreadableData, match=words) as error: load("names")
        assert str(path) in str(error.value)
    write(root / "names/Greek.txt", "Adamou\n")
    assert len(load("names", split="all")) == 2


def test_a_set_too_small_to_split_is_said(root):
    write(root / "names/French.txt", "Abel\n")
    with pytest.raises(UnreadableData, match="French.txt.*no sample for split='train' among the 1"): load("names")


@pytest.mark.parametrize("x, y, classes, words", [
    (rng.rand(4, 8, 8, 3), np.arange(4), None, r"images of shape \(4, 8, 8, 3\)"), (rng.rand(4, 3, 8, 8) * 255, None, None, "outside"), (rng.rand(4, 3, 8, 8) * np.nan, None, None, "outside"),
    (pixels(4, 8, 8), np.arange(5), list("abcde"), "5 labels for 4"), (pixels(4, 8, 8), np.arange(4), list("abc"), "label 3 of sample 3"), (pixels(4, 8, 8), np.full((4, 2), 2), list("ab"), "not 0 or 1"),
    (pixels(0, 8, 8), None, None, "no sample"), (pixels(4, 8, 8), np.array([0, np.inf, 1, 2]), None, "label inf"), (pixels(4, 8, 8, 2), None, None, "images of shape")])
def test_whatever_a_reader_returns_is_checked(monkeypatch, x, y, classes, words):
    monkeypatch.setitem(SETS, "mine", data.Row("mine", "image", lambda request: (x, y, classes, None), {"train": None}))
    with pytest.raises(UnreadableData, match=words): load("mine")


def test_table_with_a_value_that_is_not_finite(monkeypatch):
    monkeypatch.setitem(SETS, "mine", data.Row("mine", "table", lambda request: (np.array([[1.0], [np.nan]]), np.array([0.5, 1]), None, None), {"train": None}))
    with pytest.raises(UnreadableData, match="mine.*not finite"): load("mine")


def test_image_bombs_are_named(root):
    import struct
    import zlib
    def chunk(kind, raw): return struct.pack(">I", len(raw)) + kind + raw + struct.pack(">I", zlib.crc32(kind + raw))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    path = write(root / "imagenet/train/a/1.png", b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))
    with pytest.raises(UnreadableData, match="not a readable image.*decompression bomb") as error: load("imagenet")
    assert str(path) in str(error.value)


def test_size_asks_for_memory_first(root):
    picture(root / "photos/a.jpg")
    for name in ("photos", "digits"):
        with pytest.raises(MemoryError, match=f"{name}.*10,000,000 x 10,000,000.*size="): load(name, size=10**7)
    with pytest.raises(MemoryError, match="features.*smaller n"): low_rank(d=2**40)


@pytest.mark.parametrize("call, words", [
    (lambda: load("digits", n=5, random_state=-1), "random_state=-1"), (lambda: load("digits").subset(3, random_state="a"), "random_state='a'"), (lambda: load("digits").subset(2**63), "n=9,223"),
    (lambda: load("digits").subset(True), "n=True"), (lambda: low_rank(n=2**63), "n=9223372036854775808"), (lambda: low_rank(random_state=2**32), "random_state=4294967296"),
    (lambda: load("uci121/.."), "unknown set"), (lambda: load("uci121/."), "unknown set")])
def test_hostile_counts_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words): call()


@pytest.mark.parametrize("file, old, new, words", [
    ("toy.txt", "n_clases= 2", "n_clases= 1200000000", "toy.txt, line 1: n_clases= 1200000000, but no row is of class 2"), ("toy.txt", "n_clases= 2", "n_clases= " + "9" * 5000, "toy.txt, line 1: no integer n_clases"),
    ("toy.txt", "n_clases= 2", "n_clases= 2\u00b2", "no integer n_clases"), ("toy.txt", "n_clases= 2", "n_clases= 0", "class"),
    ("toy.txt", "n_entradas= 2", "n_entradas= 400000000000", "train_R.dat, line 2: 4 columns, expected 400000000002"), ("toy.txt", "n_patrons1= 8", "n_patrons1= 400000000000", "train_R.dat, line 9: the file ends after 8 rows"),
    ("toy.txt", "n_patrons1= 8", "n_patrons1= 7", "train_R.dat, line 9: more than the 7 rows"), ("toy.txt", "n_arquivos= 1", "n_arquivos= 1000000000", "toy.txt, line 1: n_arquivos= 1000000000"), ("toy.txt", "n_arquivos= 1", "n_arquivos= 0", "n_arquivos= 0"),
    ("conxuntos.dat", "0 1", "0 " + "1" * 5000, "conxuntos.dat, line 1"), ("conxuntos.dat", "0 1", "0 \u00b2", "conxuntos.dat, line 1")])
def test_counts_of_a_task_that_no_file_can_hold(root, file, old, new, words):
    folder = task_files(root)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1), encoding="latin-1")
    with pytest.raises(UnreadableData, match=words): read_task(folder)


@pytest.mark.parametrize("name", ["../../secret", "../secret.dat", "/etc/passwd", "sub/x.dat", "..\\secret.dat", "..", "../toy/toy_train_R.dat"])
def test_a_task_reads_nothing_outside_its_folder(root, name):
    folder = task_files(root)
    for place in (root / "secret", root / "uci121/secret.dat", folder / "sub/x.dat", root / "uci121/toy/..\\secret.dat"): write(place, (folder / "toy_train_R.dat").read_bytes())
    (folder / "toy.txt").write_text((folder / "toy.txt").read_text().replace("toy_train_R.dat", name))
    with pytest.raises(UnreadableData, match="toy.txt, line 1: fich1= .* is not the name of a table beside it"): read_task(folder)


# --- the real sets ----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def real_root(monkeypatch): monkeypatch.setenv("AGOP_BOOK_DATA", str(REAL))


def real_or_skip(name, **options):
    try: return load(name, **options)
    except DataNotFound: pytest.skip(f"{name} is not in {REAL}")


@real
@pytest.mark.parametrize("name, split, n, shape, label", [
    ("mnist", "train", 60000, (1, 28, 28), "MNIST"), ("mnist", "test", 10000, (1, 28, 28), "MNIST"),
    ("cifar10_jpeg", "train", 5000, (3, 32, 32), "CIFAR-10 (JPEG subset)"), ("cifar10_jpeg", "test", 1000, (3, 32, 32), "CIFAR-10 (JPEG subset)"),
    ("svhn_crops", "all", 1083, (3, 32, 32), "SVHN crops (first 1,083 training images)"), ("photos", "train", 125, (3, 64, 64), "125 photographs (ImageNet samples)")])
def test_real_images(real_root, name, split, n, shape, label):
    d = real_or_skip(name, split=split, **({"size": 64} if name == "photos" else {}))
    assert d.x.shape == (n, *shape) and d.label == label and d.source == "AGOP_BOOK_DATA" and d.x.dtype == np.float32
    assert 0 <= d.x.min() and d.x.max() <= 1 and set(d.y) == set(range(len(d.classes)))


@real
def test_real_mnist_against_published_counts(real_root):
    d = real_or_skip("mnist")
    assert np.bincount(d.y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(d.x.mean() - 0.1307) < 1e-4 and abs(d.x.std() - 0.3081) < 1e-4


@real
def test_real_texts_and_names(real_root):
    d = real_or_skip("shakespeare", split="all")
    raw = (REAL / "tinyshakespeare/input.txt").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == SETS["shakespeare"].sha256 and d.text == raw.decode() and d.label == "Shakespeare (Tiny Shakespeare)"
    d = real_or_skip("names", split="all")
    assert len(d) == 20074 and len(d.classes) == 18
    d = real_or_skip("tinystories", split="all")
    assert len(d) == 2316 and d.x[-1][-1] in '.!?"'         # the cut story at the end is left out


@real
def test_every_real_task_parses_and_its_splits_make_sense(real_root):
    folders = tasks()
    if not folders: pytest.skip(f"no uci121 folder in {REAL}")
    assert len(folders) == 120 and "miniboone" not in folders
    lowest, tested = [], []
    for name, folder in folders.items():
        t = read_task(folder)
        everything = np.arange(len(t.x))
        assert (np.sort(np.concatenate([t.train, t.validation])) == everything).all(), name            # a partition
        for a, b in t.folds: assert len(np.union1d(a, b)) == len(a) + len(b), name                    # disjoint, nothing twice
        assert len(np.unique(t.y)) == t.n_classes or t.x_test is not None, name
        lowest.append(min(t.train.min(), t.validation.min()))
        tested.append(len(np.unique(np.concatenate([b for _, b in t.folds]))) / len(t.x))
    assert set(lowest) == {0}                               # indices count from 0 in every task
    assert 0.6 < np.median(tested) < 0.75                   # four draws, not a partition: 1 - (3/4)^4 = 0.68
