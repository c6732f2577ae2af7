"""Training once: the same weights again, resumed or loaded, and nothing else touched."""
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_model
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import Callback, LRScheduler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import agop_book
from agop_book.book.perceptrons import MLP
from agop_book.book.train import Checkpoints, trained

X = np.random.RandomState(0).randn(200, 8).astype(np.float32)
Y = X[:, :3].argmax(1).astype(np.int64)


class Epochs(Callback):
    "Notes the epochs that are trained; training dies after the one set here."
    seen, killed_after = [], None

    def on_epoch_begin(self, net, **kwargs):
        if len(net.history) - 1 == self.killed_after: raise ConnectionError("killed")

    def on_epoch_end(self, net, **kwargs):
        self.seen.append(len(net.history))


@pytest.fixture
def epochs(monkeypatch):
    "The epochs that are trained, with a checkpoint after each."
    monkeypatch.setattr(Epochs, "seen", [])
    monkeypatch.setattr(Checkpoints, "every", 0)
    return Epochs.seen


@pytest.fixture(autouse=True)
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path))
    monkeypatch.setenv("AGOP_BOOK_SCALE", "quick")
    return tmp_path / "weights"


class Dropped(nn.Module):
    def __init__(self, hidden=12, dtype=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Dropout(0.2),
                                    nn.Linear(hidden, 3))

    def forward(self, x):
        return self.layers(x)


def cosine():
    return LRScheduler(policy=CosineAnnealingLR, T_max=30, step_every="batch")


def net(module=Dropped, kind=NeuralNetClassifier, callbacks=None, **options):
    callbacks = [cosine()] if callbacks is None else callbacks
    defaults = dict(criterion=nn.CrossEntropyLoss, max_epochs=12, lr=0.1, verbose=0,
                    optimizer=torch.optim.Adam)
    return kind(module, **defaults | options, callbacks=[*callbacks, Epochs()])


def equal(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values())
    return all(torch.equal(p, q) for p, q in pairs)


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_second_call_loads_and_the_generators_stay(epochs):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = trained("a", net(), X, Y)
    assert len(epochs) == 12 and not first.module.training and not first.initial.training
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(6)
    again = trained("a", net(device="cpu", verbose=1), torch.from_numpy(X), torch.from_numpy(Y))
    assert len(epochs) == 12
    assert equal(first.module, again.module) and equal(first.initial, again.initial)
    assert first.history.equals(again.history)
    assert {"epoch", "train_loss", "valid_acc"} <= set(first.history)
    assert not equal(first.module, first.initial)


@pytest.mark.parametrize("change, named", [
    (dict(lr=1.01e-4), "lr"),
    (dict(optimizer__eps=1e-7), "optimizer__eps"),
    (dict(module__dtype=torch.float64), "module__dtype"),
    (dict(module__hidden=13), "module__hidden"),
    (dict(callbacks=[]), "callbacks"),
])
def test_other_settings_train_anew_and_say_why(change, named, epochs):
    before = dict(max_epochs=2, lr=1e-4, optimizer__eps=1e-8, module__dtype=torch.float32)
    trained("a", net(**before), X, Y)
    with pytest.warns(UserWarning, match=named):
        trained("a", net(**before | change), X, Y)
    assert len(epochs) == 4


def test_other_data_and_seeds_train_anew(epochs):
    trained("a", net(), X, Y)
    with pytest.warns(UserWarning, match="x"):
        trained("a", net(), X + 1, Y)
    with pytest.warns(UserWarning, match="random_state"):
        trained("a", net(), X + 1, Y, random_state=1)
    assert len(epochs) == 36


def one_cycle():
    return LRScheduler(policy=OneCycleLR, max_lr=0.1, total_steps=200, step_every="batch")


@pytest.mark.parametrize("schedule", [cosine, one_cycle])
def test_resumed_training_gives_the_same_weights(schedule, epochs, out, monkeypatch):
    options = dict(callbacks=[schedule()], iterator_train__shuffle=True)
    whole = trained("whole", net(**options), X, Y)
    monkeypatch.setattr(Epochs, "killed_after", 7)
    with pytest.raises(ConnectionError):
        trained("a", net(**options), X, Y)
    monkeypatch.setattr(Epochs, "killed_after", None)
    epochs.clear()
    resumed = trained("a", net(**options), X, Y)
    assert epochs == [8, 9, 10, 11, 12] and equal(whole.module, resumed.module)
    assert np.allclose(whole.history["train_loss"], resumed.history["train_loss"])
    assert [p.name for p in out.glob("a*")] == ["a-quick.safetensors"]


def test_checkpoints_are_rare(monkeypatch, out):
    monkeypatch.setattr(Epochs, "killed_after", 2)
    with pytest.raises(ConnectionError):
        trained("a", net(), X, Y)
    assert not list(out.glob("*"))


@pytest.mark.parametrize("suffix, said", [
    ("safetensors", "cannot be read"), ("part", "is refused")])
def test_damaged_files_are_not_used(suffix, said, out, epochs):
    out.mkdir()
    (out / f"a-quick.{suffix}").write_bytes(b"cut off")
    with pytest.warns(UserWarning, match=said):
        trained("a", net(), X, Y)
    assert epochs == list(range(1, 13))


def test_a_forced_run_accepts_nothing_older(epochs, monkeypatch):
    trained("a", net(), X, Y)
    monkeypatch.setenv("AGOP_BOOK_SINCE", "9e9")
    trained("a", net(), X, Y)
    assert len(epochs) == 24


def test_half_precision_only_where_it_is_close(out):
    sizes = dict(module__d_in=8, module__width=20)
    trained("small", net(MLP, **sizes, module__d_out=3), X, Y)
    tiny = dict(module__d_out=1, module__depth=1, module__init_scale=1e-6, max_epochs=1, lr=1e-12)
    line = net(MLP, NeuralNetRegressor, criterion=nn.MSELoss, **sizes, **tiny)
    big = trained("huge", line, X, X[:, :1])
    dtypes = {}
    for path in out.iterdir():
        with safe_open(path, "pt") as file:
            dtypes[path.stem] = file.get_tensor("1.weight").dtype
    assert dtypes == {"small-quick": torch.float16, "huge-quick": torch.float32}
    assert big.module[1].weight.dtype == torch.float32


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return {"logits": self.b(self.a(x))}


class Reader(NeuralNet):
    def get_loss(self, out, y, *args, **kwargs):
        return nn.functional.cross_entropy(out["logits"].transpose(1, 2), y)


def test_dataset_without_y_and_tied_weights():
    tokens = torch.randint(9, (40, 6), generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:])
    options = dict(train_split=None, max_epochs=2)
    first, again = (trained("t", net(Tied, Reader, **options), data).module for _ in range(2))
    assert again.b.weight is again.a.weight and equal(first, again)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="name='../x'"):
        trained("../x", net(), X, Y)
    with pytest.raises(ValueError, match="name="):
        trained("a" * 200, net(), X, Y)
    with pytest.raises(ValueError, match="net.module"):
        trained("a", net(Dropped()), X, Y)
    with pytest.raises(FloatingPointError, match="'a'.*loss is.*lr"):
        trained("a", net(lr=1e30, optimizer=torch.optim.SGD), X, Y)
    for bad in (-1, 2**63):
        with pytest.raises(ValueError, match=f"random_state={bad}"):
            trained("a", net(), X, Y, random_state=bad)


class Stop(Callback):
    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == 3: raise KeyboardInterrupt


def test_interruption_is_not_stored(out):
    with pytest.raises(KeyboardInterrupt, match="3 of 12"):
        trained("a", net(callbacks=[Stop()]), X, Y)
    assert not (out / "a-quick.safetensors").exists()


def test_configurations_read_alike_in_every_session(out):
    trained("a", net(max_epochs=1, module__dtype={"b", "a"}), X, Y)
    about = json.loads(metadata(out / "a-quick.safetensors")["about"])
    assert about["module__dtype"] == ["a", "b"] and about["optimizer"] == "Adam"
    assert about["callbacks"][0][0] == "LRScheduler"
    assert not any(key.startswith("_") for key in about)
    assert not {"device", "verbose"} & about.keys() and " at 0x" not in str(about)


# --- damage, full disks

def flipped(path, byte, bit=0):
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


def test_no_flipped_bit_in_stored_weights_is_used(epochs, out):
    first = trained("a", net(max_epochs=2), X, Y)
    path = out / "a-quick.safetensors"
    whole, rng = path.read_bytes(), np.random.RandomState(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*rng.choice(header, 25, replace=False),
              *rng.choice(np.arange(header, len(whole)), 25, replace=False)]
    for byte in places:
        path.write_bytes(whole)
        flipped(path, byte, rng.randint(8))
        epochs.clear()
        with pytest.warns(UserWarning, match="a-quick.safetensors.*training anew"):
            again = trained("a", net(max_epochs=2), X, Y)
        assert epochs == [1, 2] and equal(first.module, again.module)


def test_no_flipped_bit_in_a_checkpoint_is_used(epochs, out, monkeypatch):
    monkeypatch.setattr(Epochs, "killed_after", 3)
    with pytest.raises(ConnectionError):
        trained("a", net(max_epochs=4), X, Y)
    monkeypatch.setattr(Epochs, "killed_after", None)
    path = out / "a-quick.part"
    whole = path.read_bytes()
    for byte in np.random.RandomState(1).choice(len(whole), 12, replace=False):
        path.write_bytes(whole)
        flipped(path, byte, 5)
        (out / "a-quick.safetensors").unlink(missing_ok=True)
        epochs.clear()
        with pytest.warns(UserWarning, match="a-quick.part is refused"):
            trained("a", net(max_epochs=4), X, Y)
        assert epochs == [1, 2, 3, 4]


def without_checksum(module, meta, path):
    "Write a module as it was written before files had checksums."
    save_model(module, str(path), {k: v for k, v in meta.items() if k != "sha256"})


def test_weights_of_before_the_checksum_stay_valid(epochs, out):
    first = trained("a", net(max_epochs=2), X, Y)
    path = out / "a-quick.safetensors"
    without_checksum(first.module, metadata(path), path)
    epochs.clear()
    assert equal(first.module, trained("a", net(max_epochs=2), X, Y).module) and epochs == []


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_table_names_every_file_that_travels_with_the_book():
    folder = Path(agop_book.__file__).parents[1] / "nbs/weights"
    if not folder.is_dir():
        pytest.skip("no stored weights beside the package")
    table = json.loads((folder / "sha256.json").read_text())
    assert table == {path.name: sha256(path) for path in folder.glob("*.safetensors")}, (
        "nbs/weights/sha256.json must hold the SHA-256 of every file of weights")


@pytest.fixture
def home(tmp_path, monkeypatch):
    "Where weights that travel with the book are looked for."
    package = tmp_path / "home/agop_book"
    (package / "nbs/weights").mkdir(parents=True)
    monkeypatch.setattr(agop_book, "__file__", str(package / "__init__.py"))
    return package / "nbs/weights"


def test_a_damaged_file_that_travels_with_the_book_is_refused_by_name(epochs, out, home):
    first = trained("a", net(max_epochs=2), X, Y)
    path = home / "a-quick.safetensors"
    without_checksum(first.module, metadata(out / path.name), path)
    (home / "sha256.json").write_text(json.dumps({path.name: sha256(path)}))
    (out / path.name).unlink()
    epochs.clear()
    assert equal(first.module, trained("a", net(max_epochs=2), X, Y).module) and epochs == []
    flipped(path, -3)
    said = "home/agop_book/nbs/weights/a-quick.safetensors is refused: its checksum"
    with pytest.warns(UserWarning, match=said):
        again = trained("a", net(max_epochs=2), X, Y)
    assert equal(first.module, again.module) and epochs == [1, 2]


def test_a_full_disk_loses_no_training(epochs, out, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    whole = trained("whole", net(max_epochs=3), X, Y)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning) as said:
        kept = trained("a", net(max_epochs=3), X, Y)
    texts = [str(w.message) for w in said]
    assert any("in memory only" in t for t in texts)
    assert any("training goes on without" in t for t in texts)
    assert not list(out.glob("*a-quick*")) and len(kept.history) == 3
    pairs = zip(kept.module.state_dict().values(), whole.module.state_dict().values())
    assert all(torch.allclose(p, q, atol=2e-3) for p, q in pairs)
    assert {p.dtype for p in kept.module.parameters()} == {torch.float32}


def test_a_folder_that_cannot_be_written_is_found_before_training(epochs, monkeypatch):
    def closed(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", closed)
    with pytest.raises(PermissionError, match="AGOP_BOOK_OUT"):
        trained("a", net(), X, Y)
    assert epochs == []
