"""Everything runs on a GPU and says what it says on the CPU, as far as an emulated device shows.

`make test-device` does the same with every notebook and every family of networks."""
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from device_cases import CASES, IMAGES, PLAIN, SHADES, X, Y
from emulated import OnDevice, emulated
from skorch import NeuralNetRegressor
from torch import nn

from agop_book.book.train import trained
from agop_book.convrfm import ConvRFMRegressor
from agop_book.devices import device, is_single
from agop_book.memory import free_memory
from agop_book.rfm import RFMClassifier, RFMRegressor

TESTS = Path(__file__).parent
LESSONS = ["03_rfm", "11_cntk"]   # 05 and all others take minutes: `make test-device`
DOUBLE = {   # cases that Apple's device cannot do, and what they are told
    "iterative": "the iterative solver needs float64",
    "by_sample": "a fit by sample needs float64",
    "all_centers": "a fit with every row a centre needs float64",
    "convolutional": "the matrix on patches of ConvRFMRegressor needs float64",
    "deep": "the matrix on patches of DeepRFMRegressor needs float64",
    "cntk": "a matrix on patches needs float64",
    "importances": "feature_importances needs float64",
    "with_probes": "the sum of outer products needs float64",
    "accumulated": "the sum of outer products needs float64",
    **{name: "the sum of outer products needs float64" for name in CASES if name[:4] == "nfa "},
}


def arrays(found):
    "Results as a list of numpy arrays."
    found = found if isinstance(found, tuple) else (found,)
    return [t.cpu().numpy() if isinstance(t, torch.Tensor) else np.asarray(t) for t in found]


def run(name, kind):
    "The arrays of a case on a device, or on the CPU."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "cpu": return arrays(CASES[name]("cpu"))
        with emulated(kind):
            return arrays(CASES[name](kind))


def compare(name, kind):
    for there, here in zip(run(name, kind), run(name, "cpu"), strict=True):
        assert there.shape == here.shape
        np.testing.assert_allclose(there, here, rtol=0, atol=2e-3 * np.nanmax(np.abs(here)))


@pytest.mark.parametrize("name", CASES)
def test_cuda_agrees_with_the_cpu(name):
    compare(name, "cuda")


@pytest.mark.parametrize("name", [name for name in CASES if name not in DOUBLE])
def test_apple_agrees_with_the_cpu(name):
    compare(name, "mps")


@pytest.mark.parametrize("name", DOUBLE)
def test_apple_refuses_what_needs_double_precision(name):
    with pytest.raises(ValueError, match=f"^{DOUBLE[name]}, which device='mps"):
        run(name, "mps")


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_loaded_model_predicts_what_it_predicted(kind, tmp_path):
    y = np.where(Y > 0, "up", "down")
    models = {"r": (RFMRegressor(**PLAIN, n_iter=1), X, Y), "c": (RFMClassifier(**PLAIN), X, y)}
    if kind == "cuda":
        images = ConvRFMRegressor(depth=2, n_iter=1, random_state=0), IMAGES, SHADES
        models["i"] = images
    for name, (model, rows, y) in models.items():
        with emulated(kind):
            model = model.set_params(device=kind).fit(rows, y)
            model.save(tmp_path / name)
            said = model.predict(rows)
            again = type(model).load(tmp_path / name).predict(rows)
        at_home = type(model).load(tmp_path / name).predict(rows)
        for other in (again, at_home):
            if other.dtype.kind == "U":
                assert (other == said).all()
            else:
                np.testing.assert_allclose(other, said, rtol=0, atol=1e-4 * np.abs(said).max())


def test_training_on_the_device_is_kept_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path))
    net = NeuralNetRegressor(Dropped, max_epochs=2, lr=0.1, train_split=None, verbose=0)
    target = Y[:, None]
    found = {}
    for place in ("cpu", "cuda"):
        with emulated("cuda"):
            for again in range(2):
                one = trained(f"net-{place}", net.set_params(device=place), X, target)
                weight = one.module.layer.weight
                assert isinstance(weight, OnDevice) == (place == "cuda")
                found[place, again] = weight.detach().cpu().numpy(), one.history
        assert np.array_equal(found[place, 0][0], found[place, 1][0])
    # another generator draws the weights that drop out, so the numbers differ, but not the start
    assert len(found["cuda", 0][1]) == len(found["cpu", 0][1]) == 2


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop, self.out = nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 1)

    def forward(self, x):
        return self.out(self.drop(self.layer(x).relu()))


def test_names_of_devices():
    with pytest.raises(ValueError, match="device='mps', but torch sees no Apple GPU here"):
        device("mps")
    with pytest.raises(ValueError, match="device='mps:1' is unknown"):
        device("mps:1")
    with emulated("mps"):
        assert device("mps").type == "mps" and is_single(device("mps"))
        assert device("auto").type == "cpu"         # Apple's device is taken when it is named
        assert 0 < free_memory("mps") <= 2**33
    with emulated("cuda"):
        assert device("auto").type == "cuda" and free_memory("cuda:0") == 2**33
        with pytest.raises(ValueError, match="torch sees only cuda:0 to cuda:0"):
            device("cuda:1")


@pytest.mark.parametrize("name", LESSONS)
def test_lesson(name, tmp_path):
    command = [sys.executable, str(TESTS / "on_device.py"), "cuda", str(tmp_path)]
    done = subprocess.run([*command, str(TESTS.parent / f"nbs/{name}.ipynb")], text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
