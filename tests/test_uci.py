"""The 121 tasks: one of them written out, and everything that can be wrong with its files."""

import numpy as np
import pytest
from data_files import empty_root, rng, write

from agop_book.book.load import available, load
from agop_book.book.sources import DataNotFound
from agop_book.files import UnreadableData
from agop_book.book.uci import read_task, tasks


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    return empty_root(tmp_path, monkeypatch)


def task_files(root, name="toy", n=8, d=2, classes=2, test=0):
    "A task of random numbers in the published format; `test`: rows of its separate test table."
    folder = root / "uci121" / name
    facts = f"n_entradas= {d}\nn_clases= {classes}\nn_arquivos= {1 + bool(test)}\n"
    for k, (part, rows) in enumerate((("train", n), ("test", test)), 1):
        if rows:
            facts += f"fich{k}= {name}_{part}_R.dat\nn_patrons{k}= {rows}\n"
            write(folder / f"{name}_{part}_R.dat", table(rows, d, classes))
    write(folder / f"{name}.txt", facts)
    train, validation = range(n // 2), range(n // 2, n)
    write(folder / "conxuntos.dat", f"{spaced(train)}\n{spaced(validation)}\n")
    write(folder / "conxuntos_kfold.dat", "0 1 2 3 4 5\n6 7\n" * 4)
    return folder


def spaced(numbers):
    return " ".join(map(str, numbers))


def table(rows, d, classes):
    lines = ["\t".join(["", *(f"f{k}" for k in range(d)), "clase"])]
    for i in range(rows):
        values = [f"{v:.3f}" for v in rng.normal(size=d)]
        lines.append("\t".join([str(i + 1), *values, str(i % classes)]))
    return "\n".join(lines) + "\n"


def test_task_and_its_splits(root):
    t = read_task(task_files(root, test=3))
    assert t.x.shape == (8, 2)
    assert t.x_test.shape == (3, 2)
    assert t.y.dtype == np.int64
    assert t.n_classes == 2
    assert t.train.tolist() == [0, 1, 2, 3]
    assert t.validation.tolist() == [4, 5, 6, 7]
    assert len(t.folds) == 4
    assert t.folds[0][1].tolist() == [6, 7]
    d = load("uci121/toy")
    assert d.x.dtype == np.float32
    assert np.allclose(d.x, t.x)
    assert d.label == "toy (of the 121 tasks)"
    assert len(load("uci121/toy", split="test")) == 3
    task_files(root, "single")
    assert read_task(root / "uci121/single").x_test is None
    with pytest.raises(ValueError, match="no separate test table"):
        load("uci121/single", split="test")
    write(root / "uci121/RECONSTRUCTED.txt", "single/single_R.dat  from elsewhere\n")
    assert load("uci121/single").label.endswith("rebuilt from another source")
    assert "rebuilt" not in load("uci121/toy").label
    assert set(tasks()) == {"toy", "single"}
    assert available().set_index("name").n["uci121"] == "2 tasks"
    with pytest.raises(DataNotFound, match="did you mean 'single"):
        load("uci121/singel")


@pytest.mark.parametrize(
    "file, change, words",
    [
        (
            "toy_train_R.dat",
            lambda s: s.replace("\t1\n", "\t7\n", 1),
            r"_R.dat, line 3: class 7 is not one of 0 .. 1",
        ),
        ("toy_train_R.dat", lambda s: s.replace("\t0\n", "\t0.5\n", 1), r"line 2: class 0.5"),
        (
            "toy_train_R.dat",
            lambda s: s.replace("\n4\t", "\n4\tabc\t", 1),
            r"line 5: not a row of numbers",
        ),
        (
            "toy_train_R.dat",
            lambda s: s.replace("\n5\t", "\n5\t1.5\t", 1),
            r"line 6: 5 columns, expected 4",
        ),
        ("toy_train_R.dat", lambda s: s[: s.index("\n7\t") + 5], r"line 8: "),
        (
            "toy_train_R.dat",
            lambda s: s[: s.index("\n6\t") + 1],
            r"line 6: the file ends after 5 rows, expected 8",
        ),
        ("toy_train_R.dat", lambda s: "", r"ends after 0 rows"),
        (
            "toy_train_R.dat",
            lambda s: s.replace("\n3\t", "\nnan\t", 1),
            r"line 4: a value is not finite",
        ),
        (
            "conxuntos.dat",
            lambda s: s.replace("7", "8"),
            r"conxuntos.dat, line 2: \['8'\] is not an index of one of the 8 samples",
        ),
        ("conxuntos.dat", lambda s: s.replace("0", "-1"), r"conxuntos.dat, line 1: \['-1'\]"),
        ("conxuntos.dat", lambda s: s.splitlines()[0], r"1 lines of indices, expected 2"),
        ("conxuntos_kfold.dat", lambda s: s + "1 2\n", r"9 lines of indices, expected 8"),
        (
            "conxuntos.dat",
            lambda s: s.replace("1", "0"),
            r"conxuntos.dat, line 1: index 0 stands more than once",
        ),
        (
            "conxuntos.dat",
            lambda s: s.replace("5", "3"),
            r"conxuntos.dat, line 2: 1 samples such as 3 are also in line 1",
        ),
        (
            "conxuntos_kfold.dat",
            lambda s: s[::-1].replace("7 6", "7 7", 1)[::-1].lstrip(),
            r"conxuntos_kfold.dat, line 8: index 7 stands",
        ),
        (
            "conxuntos_kfold.dat",
            lambda s: s.replace("6 7", "6 5", 1),
            r"conxuntos_kfold.dat, line 2: 1 samples such as 5 are also in line 1",
        ),
        (
            "toy.txt",
            lambda s: s.replace("n_clases= 2", ""),
            r"toy.txt, line 1: no integer n_clases",
        ),
        (
            "toy.txt",
            lambda s: s.replace("n_clases= 2", "n_clases= 3"),
            r"toy.txt, line 1: n_clases= 3, but no row is of class 2",
        ),
        (
            "toy.txt",
            lambda s: s.replace("n_entradas= 2", "n_entradas= two"),
            r"n_entradas= in this file \(it has 'two'\)",
        ),
    ],
)
def test_malformed_task_names_file_and_line(root, file, change, words):
    folder = task_files(root)
    (folder / file).write_text(change((folder / file).read_text()))
    with pytest.raises(UnreadableData, match=words):
        read_task(folder)
    with pytest.raises(UnreadableData, match=words):
        load("uci121/toy")


@pytest.mark.parametrize(
    "file", ["conxuntos.dat", "conxuntos_kfold.dat", "toy.txt", "toy_test_R.dat"]
)
def test_missing_file_of_a_task_is_named(root, file):
    folder = task_files(root, test=3)
    (folder / file).unlink()
    with pytest.raises(UnreadableData, match=f"no {file}"):
        read_task(folder)


def test_incomplete_task_is_reported_missing(root):
    (task_files(root) / "conxuntos.dat").unlink()
    with pytest.raises(DataNotFound, match="no uci121/toy/conxuntos.dat"):
        load("uci121/toy")


@pytest.mark.parametrize(
    "file, old, new, words",
    [
        (
            "toy.txt",
            "n_clases= 2",
            "n_clases= 1200000000",
            "toy.txt, line 1: n_clases= 1200000000, but no row is of class 2",
        ),
        (
            "toy.txt",
            "n_clases= 2",
            "n_clases= " + "9" * 5000,
            "toy.txt, line 1: no integer n_clases",
        ),
        ("toy.txt", "n_clases= 2", "n_clases= 2\u00b2", "no integer n_clases"),
        ("toy.txt", "n_clases= 2", "n_clases= 0", "class"),
        (
            "toy.txt",
            "n_entradas= 2",
            "n_entradas= 400000000000",
            "train_R.dat, line 2: 4 columns, expected 400000000002",
        ),
        (
            "toy.txt",
            "n_patrons1= 8",
            "n_patrons1= 400000000000",
            "train_R.dat, line 9: the file ends after 8 rows",
        ),
        ("toy.txt", "n_patrons1= 8", "n_patrons1= 7", "train_R.dat, line 9: more than the 7 rows"),
        (
            "toy.txt",
            "n_arquivos= 1",
            "n_arquivos= 1000000000",
            "toy.txt, line 1: n_arquivos= 1000000000",
        ),
        ("toy.txt", "n_arquivos= 1", "n_arquivos= 0", "n_arquivos= 0"),
        ("conxuntos.dat", "0 1", "0 " + "1" * 5000, "conxuntos.dat, line 1"),
        ("conxuntos.dat", "0 1", "0 \u00b2", "conxuntos.dat, line 1"),
    ],
)
def test_counts_of_a_task_that_no_file_can_hold(root, file, old, new, words):
    folder = task_files(root)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1), encoding="latin-1")
    with pytest.raises(UnreadableData, match=words):
        read_task(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../../secret",
        "../secret.dat",
        "/etc/passwd",
        "sub/x.dat",
        "..\\secret.dat",
        "..",
        "../toy/toy_train_R.dat",
    ],
)
def test_a_task_reads_nothing_outside_its_folder(root, name):
    folder = task_files(root)
    for place in (
        root / "secret",
        root / "uci121/secret.dat",
        folder / "sub/x.dat",
        root / "uci121/toy/..\\secret.dat",
    ):
        write(place, (folder / "toy_train_R.dat").read_bytes())
    (folder / "toy.txt").write_text(
        (folder / "toy.txt").read_text().replace("toy_train_R.dat", name)
    )
    with pytest.raises(
        UnreadableData, match="toy.txt, line 1: fich1= .* is not the name of a table beside it"
    ):
        read_task(folder)
