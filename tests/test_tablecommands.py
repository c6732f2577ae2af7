"""agop-book fit and agop-book predict: what they leave, what they say, and how they end."""
import errno
import signal

import numpy as np
import pandas as pd
import pytest

from agop_book.cli import main
from agop_book.convrfm import ConvRFMRegressor
from agop_book.rfm import RFMClassifier, RFMRegressor

N = 200
FIT = "fit t.parquet --target y --columns a,b,kind --categorical kind --out m.safetensors"


@pytest.fixture(autouse=True)
def in_a_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "cpu")


@pytest.fixture
def table():
    "A table in t.parquet, and what is in it."
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"id": range(N), "a": rng.normal(size=N), "b": rng.normal(size=N),
                          "kind": rng.choice(["u", "v"], N), "w": rng.integers(1, 3, N)})
    frame["y"] = frame["a"] * np.where(frame["kind"] == "u", 1, -1)
    frame["label"] = np.where(frame["y"] > 0, "plus", "minus")
    frame.to_parquet("t.parquet")
    return frame


@pytest.fixture
def model(table):
    "A small regressor in m.safetensors."
    X = table[["a", "b", "kind"]].astype({"kind": "category"})
    fitted = RFMRegressor(bandwidth=3.0, n_iter=1).fit(X, table["y"])
    fitted.save("m.safetensors")
    return fitted


def run(line, capsys):
    "Exit code, standard output and standard error of a command."
    code = main(line.split())
    said = capsys.readouterr()
    return code, said.out, said.err


def test_fit_and_predict(table, capsys):
    code, out, err = run(FIT + " --weight w --seed 3 --memory-limit 2GB", capsys)
    assert code == 0 and not err
    assert out.startswith("200 rows in ") and "R2 0.9" in out and "model in m.safetensors" in out
    model = RFMRegressor.load("m.safetensors")
    X = table[["a", "b", "kind"]].astype({"kind": "category"})
    again = RFMRegressor(random_state=3, device="cpu").fit(X, table["y"], sample_weight=table["w"])
    np.testing.assert_allclose(model.predict(X), again.predict(X), rtol=1e-10)

    code, out, err = run("predict m.safetensors t.parquet --out p.parquet --keep id,y", capsys)
    assert code == 0 and not err
    assert out.startswith("200 rows in ") and "predictions in p.parquet" in out
    found = pd.read_parquet("p.parquet")
    assert list(found) == ["id", "y", "prediction"] and found["id"].tolist() == list(range(N))
    np.testing.assert_allclose(found["prediction"], model.predict(X), rtol=1e-10)


def test_classes(table, capsys):
    argv = FIT.replace("target y", "target label")
    code, out, err = run(argv, capsys)
    assert code == 2 and "which are classes: add --classify" in err and not out
    code, out, err = run(argv + " --classify", capsys)
    assert code == 0 and "accuracy " in out
    X = table[["a", "b", "kind"]].astype({"kind": "category"})
    model = RFMClassifier.load("m.safetensors")
    assert run("predict m.safetensors t.parquet --out p.npy", capsys)[0] == 0
    assert np.load("p.npy").tolist() == model.predict(X).tolist()
    assert run("predict m.safetensors t.parquet --proba --out p.parquet", capsys)[0] == 0
    found = pd.read_parquet("p.parquet")
    np.testing.assert_allclose(found[["minus", "plus"]], model.predict_proba(X), rtol=1e-10)


@pytest.mark.parametrize("labels", [[True, False], pd.Categorical(["x", "y"])])
def test_classes_that_are_no_words(labels, capsys):
    pd.DataFrame({"a": [1.0, 2.0], "y": labels}).to_parquet("t.parquet")
    code, _, err = run("fit t.parquet --target y --out m.safetensors", capsys)
    assert code == 2 and "add --classify" in err


def test_arrays_and_csv(table, capsys):
    X, y = table[["a", "b"]].to_numpy(), table["y"].to_numpy()
    np.save("X.npy", X)
    np.save("y.npy", y)
    assert run("fit X.npy --target y.npy --out m.safetensors", capsys)[0] == 0
    assert run("predict m.safetensors X.npy --out p.npy", capsys)[0] == 0
    wanted = RFMRegressor.load("m.safetensors").predict(X)
    np.testing.assert_allclose(np.load("p.npy"), wanted, rtol=1e-10)
    table.to_csv("t.csv", index=False)
    assert run("predict m.safetensors t.csv --columns a,b --out q.parquet", capsys)[0] == 0
    np.testing.assert_allclose(pd.read_parquet("q.parquet")["prediction"], wanted, rtol=1e-10)
    assert run("fit t.csv --target y,b --columns a,w --out m.safetensors", capsys)[0] == 0
    assert RFMRegressor.load("m.safetensors").predict(table[["a", "w"]]).shape == (N, 2)


def test_several_files(table, tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    for i in range(2):
        table[i * 100:(i + 1) * 100].to_parquet(f"shards/{i}.parquet")
    for data in ("shards", "shards/*.parquet"):
        assert run(FIT.replace("t.parquet", data), capsys)[0] == 0
        code, out, _ = run(f"predict m.safetensors {data} --out p.npy", capsys)
        assert code == 0 and out.startswith("200 rows")


@pytest.mark.parametrize("change, message", [
    (("--target y", "--target yy"), "target='yy' is no column: did you mean 'y'"),
    (("--columns a,b,kind", "--columns a,bb,kind"), "columns='bb' is no column"),
    (("--target y", "--target y --weight ww"), "weight='ww' is no column: did you mean 'w'"),
    (("t.parquet", "nowhere.parquet"), "nowhere.parquet: no such file"),
    (("t.parquet", "nowhere.csv"), "nowhere.csv: no such file"),
    (("m.safetensors", "nowhere/m.safetensors"), "--out: no folder"),
    (("--target y", "--target y --memory-limit much"), "--memory-limit much: write a size"),
    (("--target y", "--target y --device gpu"), "device='gpu' is unknown"),
    (("--target y", ""), "--target"),
])
def test_wrong_calls_of_fit(table, change, message, capsys):
    code, out, err = run(FIT.replace(*change), capsys)
    assert code == 2 and message in err and "Traceback" not in err and not out


def test_wrong_data(table, capsys):
    code, _, err = run(FIT.replace("--categorical kind ", ""), capsys)
    assert code == 1 and "agop-book: column 'kind' of t.parquet holds strings" in err
    table.loc[77, "y"] = np.nan
    table.to_parquet("t.parquet")
    code, _, err = run(FIT, capsys)
    assert code == 1 and "y is nan in row 77 (t.parquet)" in err
    code, _, err = run(FIT.replace("m.safetensors", "m.safetensors --memory-limit 1kB"), capsys)
    assert code == 1


def test_wrong_calls_of_predict(model, capsys):
    X = np.random.default_rng(0).normal(size=(20, 1, 8, 8))
    ConvRFMRegressor(n_iter=0).fit(X, X[:, 0, 0, 0]).save("conv.safetensors")
    for line, message in (
        ("m.safetensors t.parquet --out p.csv", "must end in .npy or .parquet"),
        ("m.safetensors t.parquet --out p.npy --keep id", "needs a .parquet file"),
        ("m.safetensors t.parquet --out p.parquet --keep ix", "keep='ix' is no column"),
        ("m.safetensors t.parquet --out p.npy --proba", "holds a regressor"),
        ("m.safetensors t.parquet --out nowhere/p.npy", "--out: no folder"),
        ("m.safetensors nowhere --out p.npy", "nowhere: no such file"),
        ("nowhere.safetensors t.parquet --out p.npy", "no model file at"),
        ("t.parquet t.parquet --out p.npy", "not a complete model file"),
        ("conv.safetensors t.parquet --out p.npy", "holds 'ConvRFMRegressor'; the command opens"),
    ):
        code, out, err = run(f"predict {line}", capsys)
        assert code == 2 and message in err and not out, line
    pd.DataFrame({"a": [1.0], "b": 1.0}).to_parquet("t.parquet")
    code, _, err = run("predict m.safetensors t.parquet --out p.npy", capsys)
    assert code == 2 and "columns='kind' is no column" in err


@pytest.mark.parametrize("stop, code", [((), 130), ((signal.SIGTERM,), 143)])
def test_interrupted_while_predicting(model, monkeypatch, tmp_path, capsys, stop, code):
    def predict(self, X):
        raise KeyboardInterrupt(*stop)
    monkeypatch.setattr(RFMRegressor, "predict", predict)
    (tmp_path / "p.npy").write_bytes(b"old")
    found, _, err = run("predict m.safetensors t.parquet --out p.npy", capsys)
    assert found == code
    assert "agop-book: interrupted after 0 of 200 rows; p.npy is as it was." in err
    assert (tmp_path / "p.npy").read_bytes() == b"old"
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


def test_interrupted_while_fitting(table, monkeypatch, tmp_path, capsys):
    def stop(*arguments, **named):
        raise KeyboardInterrupt
    monkeypatch.setattr(RFMRegressor, "fit", stop)
    code, _, err = run(FIT, capsys)
    assert code == 130 and "interrupted. Nothing is saved." in err
    code, _, err = run(FIT + " --checkpoint c.safetensors", capsys)
    assert code == 130 and "Finished rounds are in c.safetensors" in err
    assert not (tmp_path / "m.safetensors").exists()


def test_a_disk_that_fills(model, monkeypatch, capsys):
    def predict(self, X):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(RFMRegressor, "predict", predict)
    code, _, err = run("predict m.safetensors t.parquet --out p.npy", capsys)
    assert code == 1 and "[Errno 28] No space left on device, after 0 of 200 rows" in err
