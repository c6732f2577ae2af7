"""load and its promises: embedded sets, splits, labels, errors; a set of your own; real sets."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from data_files import digits_files, empty_root, picture, pixels, rng, write
from PIL import Image

from agop_book.book import images, readers
from agop_book.book.load import available, load
from agop_book.book.lowrank import low_rank
from agop_book.book.uci import read_task, tasks
from agop_book.book.samples import Row, Samples, SubsetError
from agop_book.book.sets import SETS
from agop_book.book.sources import DataNotFound
from agop_book.files import UnreadableData

PLACES = (
    Path(os.environ.get("AGOP_BOOK_DATA") or "/nonexistent"),
    Path(__file__).resolve().parents[2] / "shared" / "data",
)
REAL = next((folder for folder in PLACES if folder.is_dir()), None)
real = pytest.mark.skipif(
    REAL is None,
    reason="no real data: AGOP_BOOK_DATA is not set and ../shared/data does not exist",
)
EMBEDDED = [name for name, row in SETS.items() if not row.files]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    return empty_root(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets_need_nothing(name, monkeypatch):
    monkeypatch.delenv("AGOP_BOOK_DATA")
    d = load(name)
    assert d.source == "embedded" and len(d) and d.label and d.name == name and d.split == "train"
    if SETS[name].modality in ("image", "table"):
        assert d.x.dtype == np.float32 and np.isfinite(d.x).all() and len(d.y) == len(d)
    if SETS[name].modality == "image":
        assert d.x.ndim == 4 and 0 <= d.x.min() and d.x.max() <= 1
    if SETS[name].modality in ("text", "names"):
        assert all(isinstance(part, str) and part for part in d.x)
    if d.classes is not None:
        assert d.y.dtype == np.int64 and set(d.y) == set(range(len(d.classes)))
    if SETS[name].held:
        whole, test = load(name, split="all"), load(name, split="test")
        assert len(d) + len(test) == len(whole)


def test_every_modality_has_an_embedded_set():
    assert {SETS[name].modality for name in EMBEDDED} == {"image", "table", "text", "names"}


def test_made_splits_are_disjoint_and_complete():
    for shuffled in (True, False):
        row = replace(SETS["digits"], shuffled=shuffled)
        parts = [row.rows(101, split) for split in ("train", "test")]
        assert sorted(np.concatenate(parts)) == list(range(101))


def test_table_names_its_columns_and_keeps_the_target_type():
    d = load("diabetes")
    assert d.columns[2] == "bmi"
    assert len(d.columns) == d.x.shape[1]
    assert d.y.dtype == np.float64
    assert d.classes is None
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
    with pytest.raises(TypeError, match="digits holds numbers"):
        load("digits").text


def test_size_crops_the_centre():
    d = load("sample_photos", size=32)
    assert d.x.shape == (2, 3, 32, 32)
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255  # white in the central square
    assert (np.asarray(images.square(Image.fromarray(image), 10)) == 255).all()
    assert load("digits", size=16).x.shape[2:] == (16, 16)


@pytest.mark.parametrize(
    "names, options, words",
    [
        ((), {}, "names is empty"),
        (("mnits",), {}, "mnits.*did you mean 'mnist'"),
        (("cifar-10",), {}, "did you mean 'cifar10'"),
        (("zzz",), {}, "unknown set 'zzz'.*known are"),
        ((3,), {}, "unknown set 3"),
        (("digits/odd",), {}, "no variants"),
        (("emnist/greek",), {}, "emnist/letters"),
        (("uci121",), {}, "uci121/abalone"),
        (("uci121/../x",), {}, "unknown set"),
        (("uci121/*",), {}, "unknown set"),
        (("digits",), {"split": "valid"}, "split='valid': digits has the splits train, test, all"),
        (("mnist",), {"split": "all"}, "mnist has the splits train, test"),
        (("celeba", "digits"), {"split": "val"}, "digits has the splits"),
        (("digits",), {"n": 0}, "n=0"),
        (("digits",), {"n": -3}, "n=-3"),
        (("digits",), {"n": 1.5}, "n=1.5"),
        (("digits",), {"n": True}, "n=True"),
        (("digits",), {"n": 5000}, "n=5,000 is more than digits .train. has .1,347"),
        (("digits",), {"size": 0}, "size=0"),
        (("digits",), {"size": "big"}, "size='big'"),
        (("iris",), {"size": 8}, "size=8 for iris"),
    ],
)
def test_bad_requests_name_the_argument_and_the_remedy(names, options, words):
    with pytest.raises(ValueError, match=words):
        load(*names, **options)


def test_subset_larger_than_the_set():
    with pytest.raises(SubsetError, match="n=51 is more"):
        load("digits", n=50).subset(51)


def test_order_of_preference_and_of_places(root, tmp_path):
    assert load("mnist", "digits").name == "digits"
    digits_files(tmp_path / "data" / "MNIST" / "raw", 4)
    assert load("mnist", "digits").source == "cache" and len(load("mnist")) == 4
    digits_files(root / "mnist", 6)
    assert load("mnist", "digits").source == "AGOP_BOOK_DATA" and len(load("mnist")) == 6
    assert load("digits", "mnist").name == "digits"


def test_not_found_names_set_places_and_remedy(root):
    with pytest.raises(DataNotFound) as error:
        load("celeba", "shakespeare")
    text = str(error.value)
    assert isinstance(error.value, FileNotFoundError)
    for words in (
        "celeba, shakespeare",
        str(root),
        "no celeba/img_align_celeba",
        "no tinyshakespeare/input.txt",
        "download=True",
        "agop_book[vision]",
        "'help_topics'",
    ):
        assert words in text
    with pytest.raises(DataNotFound, match="sample_photos"):
        load("photos")


def test_data_folder_that_points_nowhere(monkeypatch, tmp_path):
    for place in (tmp_path / "nowhere", write(tmp_path / "file", "x")):
        monkeypatch.setenv("AGOP_BOOK_DATA", str(place))
        with (
            pytest.warns(UserWarning, match="AGOP_BOOK_DATA=.*is not a folder"),
            pytest.raises(DataNotFound, match="absent|not a folder"),
        ):
            load("mnist")
        with pytest.warns(UserWarning):
            assert load("mnist", "digits").source == "embedded"


def test_unreadable_folder_and_file(root, monkeypatch):
    # the tests may run as a user for whom nothing is forbidden
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataNotFound, match="no permission"):
        load("mnist")
    digits_files(root / "mnist")

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(readers, "read_idx", forbidden)
    with pytest.raises(UnreadableData, match="mnist.*Permission denied"):
        load("mnist")


def test_available_without_data_opens_no_file(root, monkeypatch):
    digits_files(root / "mnist")

    def opened(*args, **options):
        raise AssertionError("available opened a file")

    with monkeypatch.context() as closed:
        closed.setattr("builtins.open", opened)
        closed.setattr("io.open", opened)  # of Path.open
        table = available().set_index("name")
    assert list(table.columns) == ["modality", "n", "found", "remedy"] and len(table) == len(SETS)
    assert table.found["mnist"] == f"AGOP_BOOK_DATA: {root / 'mnist'}"
    assert table.found["digits"] == "embedded"
    assert table.found["svhn"] == "missing"
    assert (table.remedy[table.found == "missing"] != "").all()
    assert (table.remedy[table.found != "missing"] == "").all()


@pytest.mark.parametrize("bad", [-1, 2**32, 1.5, "0", True])
def test_a_bad_random_state_is_named(root, bad):
    for n in (None, 5):
        with pytest.raises(ValueError, match="random_state=") as error:
            load("digits", n=n, random_state=bad)
        assert not isinstance(error.value, UnreadableData)


@pytest.mark.parametrize(
    "x, y, classes, words",
    [
        (rng.rand(4, 8, 8, 3), np.arange(4), None, r"images of shape \(4, 8, 8, 3\)"),
        (rng.rand(4, 3, 8, 8) * 255, None, None, "outside"),
        (rng.rand(4, 3, 8, 8) * np.nan, None, None, "outside"),
        (pixels(4, 8, 8), np.arange(5), list("abcde"), "5 labels for 4"),
        (pixels(4, 8, 8), np.arange(4), list("abc"), "label 3 of sample 3"),
        (pixels(4, 8, 8), np.full((4, 2), 2), list("ab"), "not 0 or 1"),
        (pixels(0, 8, 8), None, None, "no sample"),
        (pixels(4, 8, 8), np.array([0, np.inf, 1, 2]), None, "label inf"),
        (pixels(4, 8, 8, 2), None, None, "images of shape"),
    ],
)
def test_whatever_a_reader_returns_is_checked(monkeypatch, x, y, classes, words):
    def read(request):
        return Samples.of(x, y, classes=classes)

    monkeypatch.setitem(SETS, "mine", Row("mine", "image", read, {"train": None}))
    with pytest.raises(UnreadableData, match=words):
        load("mine")


def test_table_with_a_value_that_is_not_finite(monkeypatch):
    def read(request):
        return Samples.of(np.array([[1.0], [np.nan]]), np.array([0.5, 1]))

    monkeypatch.setitem(SETS, "mine", Row("mine", "table", read, {"train": None}))
    with pytest.raises(UnreadableData, match="mine.*not finite"):
        load("mine")


def test_size_asks_for_memory_first(root):
    picture(root / "photos/a.jpg")
    for name in ("photos", "digits"):
        with pytest.raises(MemoryError, match=f"{name}.*10,000,000 x 10,000,000.*size="):
            load(name, size=10**7)
    with pytest.raises(MemoryError, match="features.*smaller n"):
        low_rank(d=2**40)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: load("digits", n=5, random_state=-1), "random_state=-1"),
        (lambda: load("digits").subset(3, random_state="a"), "random_state='a'"),
        (lambda: load("digits").subset(2**63), "n=9,223"),
        (lambda: load("digits").subset(True), "n=True"),
        (lambda: low_rank(n=2**63), "n=9223372036854775808"),
        (lambda: low_rank(random_state=2**32), "random_state=4294967296"),
        (lambda: load("uci121/.."), "unknown set"),
        (lambda: load("uci121/."), "unknown set"),
    ],
)
def test_hostile_counts_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("given", [0, 3])
def test_a_reader_gives_the_rows_that_it_was_asked_for(monkeypatch, given):
    def read(request):
        return Samples(4, lambda rows: (np.zeros((given, 2)), None))

    monkeypatch.setitem(SETS, "mine", Row("mine", "table", read, {"train": 4}))
    with pytest.raises(UnreadableData, match=f"mine: {given} samples for the 4 that were wanted"):
        load("mine")


def test_adding_a_set_is_one_entry_in_one_table(root, monkeypatch):
    "A reader, a row, and everything else follows: the split, the label, the table of what is here."
    monkeypatch.setitem(SETS, "planets", None)  # undone after the test

    def planets(request):
        table = pd.read_csv(request.path())
        x = table[["distance"]].to_numpy(np.float32)
        return Samples.of(x, table["year"].to_numpy(), columns=["distance"])

    SETS["planets"] = Row(
        "the inner planets",
        "table",
        planets,
        n={"all": 4},
        files=("planets.csv",),
        held=0.25,
        remedy="write planets.csv",
    )
    with pytest.raises(DataNotFound, match="planets: no planets.csv\n  to get it: write planets"):
        load("planets")
    (root / "planets.csv").write_text("distance,year\n0.39,0.24\n0.72,0.62\n1,1\n1.52,1.88\n")
    d = load("planets")
    assert d.x.shape == (3, 1) and len(load("planets", split="test")) == 1
    assert d.label == "the inner planets" and d.columns == ["distance"]
    assert np.allclose(d.y, d.x[:, 0] ** 1.5, atol=0.01)
    assert available().set_index("name").found["planets"] == f"AGOP_BOOK_DATA: {root}"


def test_a_row_of_your_own(root, monkeypatch):
    for k in range(10):
        picture(root / f"mine/{'cat' if k % 2 else 'dog'}/{k}.jpg", 10 * k)
    row = Row(
        "my photographs",
        "image",
        images.class_folders,
        {"all": None},
        ("mine",),
        held=0.2,
        size=32,
    )
    monkeypatch.setitem(SETS, "mine", row)
    assert load("mine").x.shape == (8, 3, 32, 32)
    assert load("mine", split="test").label == "my photographs"
    assert "mine" in set(available().name)


def test_a_set_too_small_to_split_is_said(root):
    write(root / "names/French.txt", "Abel\n")
    with pytest.raises(UnreadableData, match="French.txt.*no sample for split='train' among the 1"):
        load("names")


@pytest.fixture
def real_root(monkeypatch):
    monkeypatch.setenv("AGOP_BOOK_DATA", str(REAL))


def real_or_skip(name, **options):
    try:
        return load(name, **options)
    except DataNotFound:
        pytest.skip(f"{name} is not in {REAL}")


@real
@pytest.mark.parametrize(
    "name, split, n, shape, label",
    [
        ("mnist", "train", 60000, (1, 28, 28), "MNIST"),
        ("mnist", "test", 10000, (1, 28, 28), "MNIST"),
        ("cifar10_jpeg", "train", 5000, (3, 32, 32), "CIFAR-10 (JPEG subset)"),
        ("cifar10_jpeg", "test", 1000, (3, 32, 32), "CIFAR-10 (JPEG subset)"),
        ("svhn_crops", "all", 1083, (3, 32, 32), "SVHN crops (first 1,083 training images)"),
        ("photos", "train", 125, (3, 64, 64), "125 photographs (ImageNet samples)"),
    ],
)
def test_real_images(real_root, name, split, n, shape, label):
    d = real_or_skip(name, split=split, **({"size": 64} if name == "photos" else {}))
    assert d.x.shape == (n, *shape)
    assert d.label == label
    assert d.source == "AGOP_BOOK_DATA"
    assert d.x.dtype == np.float32
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
    assert hashlib.sha256(raw).hexdigest() == SETS["shakespeare"].download.sha256
    assert d.text == raw.decode()
    assert d.label == "Shakespeare (Tiny Shakespeare)"
    d = real_or_skip("names", split="all")
    assert len(d) == 20074 and len(d.classes) == 18
    d = real_or_skip("tinystories", split="all")
    assert len(d) == 2316 and d.x[-1][-1] in '.!?"'  # the cut story at the end is left out


@real
def test_every_real_task_parses_and_its_splits_make_sense(real_root):
    folders = tasks()
    if not folders:
        pytest.skip(f"no uci121 folder in {REAL}")
    assert len(folders) == 120 and "miniboone" not in folders
    lowest, tested = [], []
    for name, folder in folders.items():
        t = read_task(folder)
        everything = np.arange(len(t.x))
        both = np.sort(np.concatenate([t.train, t.validation]))
        assert (both == everything).all(), name  # a partition
        for a, b in t.folds:
            assert len(np.union1d(a, b)) == len(a) + len(b), name  # disjoint, nothing twice
        assert len(np.unique(t.y)) == t.n_classes or t.x_test is not None, name
        lowest.append(min(t.train.min(), t.validation.min()))
        tested.append(len(np.unique(np.concatenate([b for _, b in t.folds]))) / len(t.x))
    assert set(lowest) == {0}  # indices count from 0 in every task
    assert 0.6 < np.median(tested) < 0.75  # four draws, not a partition: 1 - (3/4)^4 = 0.68
