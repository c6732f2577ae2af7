"""Training once: the same weights again, resumed or loaded, and nothing else touched."""
import json

import numpy as np
import pytest
import torch
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import LRScheduler
from torch import nn

from agop_book.book import mlps
from agop_book.book.mlps import MLP, mlp_task, trained

X = np.random.RandomState(0).randn(200, 8).astype(np.float32)
Y = X[:, :3].argmax(1).astype(np.int64)


@pytest.fixture(autouse=True)
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path))
    monkeypatch.setenv("AGOP_BOOK_SCALE", "quick")
    return tmp_path / "weights"


class Dropped(nn.Module):
    def __init__(self, hidden=12, dtype=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 3))

    def forward(self, x): return self.layers(x)


def net(module=Dropped, kind=NeuralNetClassifier, **options):
    schedule = LRScheduler(policy=torch.optim.lr_scheduler.CosineAnnealingLR, T_max=30, step_every="batch")
    return kind(module, **{"criterion": nn.CrossEntropyLoss, "max_epochs": 12, "lr": 0.1, "verbose": 0, "optimizer": torch.optim.Adam, "callbacks": [schedule], **options})


def equal(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


class Epochs(list):
    "The epochs that are trained; training dies after the one set here."
    killed_after = None


@pytest.fixture
def epochs(monkeypatch):
    seen, original = Epochs(), mlps._Resume.on_epoch_end

    def on_epoch_end(self, net, **kwargs):
        self.every = 0
        original(self, net, **kwargs)
        seen.append(len(net.history))
        if len(net.history) == seen.killed_after: raise ConnectionError("killed")

    monkeypatch.setattr(mlps._Resume, "on_epoch_end", on_epoch_end)
    return seen


def test_the_second_call_loads_and_the_generators_stay(epochs):
    torch.manual_seed(5); np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = trained("a", net(), X, Y)
    assert len(epochs) == 12 and not first.module.training and not first.initial.training
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(6)
    again = trained("a", net(device="cpu", verbose=1), torch.from_numpy(X), torch.from_numpy(Y))
    assert len(epochs) == 12 and equal(first.module, again.module) and equal(first.initial, again.initial)
    assert first.history.equals(again.history) and {"epoch", "train_loss", "valid_acc"} <= set(first.history)
    assert not equal(first.module, first.initial)


@pytest.mark.parametrize("change, named", [(dict(lr=1.01e-4), "lr"), (dict(optimizer__eps=1e-7), "optimizer__eps"), (dict(module__dtype=torch.float64), "module__dtype"), (dict(module__hidden=13), "module__hidden"), (dict(callbacks=[]), "callbacks")])
def test_other_settings_train_anew_and_say_why(change, named, epochs):
    before = dict(max_epochs=2, lr=1e-4, optimizer__eps=1e-8, module__dtype=torch.float32)
    trained("a", net(**before), X, Y)
    with pytest.warns(UserWarning, match=named): trained("a", net(**before | change), X, Y)
    assert len(epochs) == 4


def test_other_data_and_seeds_train_anew(epochs):
    trained("a", net(), X, Y)
    with pytest.warns(UserWarning, match="x"): trained("a", net(), X + 1, Y)
    with pytest.warns(UserWarning, match="random_state"): trained("a", net(), X + 1, Y, random_state=1)
    assert len(epochs) == 36


def test_resumed_training_gives_the_same_weights(epochs, out):
    whole = trained("whole", net(), X, Y)
    epochs.killed_after = 7
    with pytest.raises(ConnectionError): trained("a", net(), X, Y)
    epochs.killed_after = None
    epochs.clear()
    resumed = trained("a", net(), X, Y)
    assert epochs == [8, 9, 10, 11, 12] and equal(whole.module, resumed.module)
    assert np.allclose(whole.history["train_loss"], resumed.history["train_loss"])
    assert [p.name for p in out.glob("a*")] == ["a-quick.safetensors"]


@pytest.mark.parametrize("suffix", ["safetensors", "part"])
def test_damaged_files_are_not_used(suffix, out, epochs):
    out.mkdir()
    (out / f"a-quick.{suffix}").write_bytes(b"cut off")
    if suffix == "part": trained("a", net(), X, Y)
    else:
        with pytest.warns(UserWarning, match="cannot be read"): trained("a", net(), X, Y)
    assert epochs == list(range(1, 13))


def test_a_forced_run_accepts_nothing_older(epochs, monkeypatch):
    trained("a", net(), X, Y)
    monkeypatch.setenv("AGOP_BOOK_SINCE", "9e9")
    trained("a", net(), X, Y)
    assert len(epochs) == 24


def test_half_precision_only_where_it_is_close(out):
    trained("small", net(MLP, module__d_in=8, module__d_out=3, module__width=20), X, Y)
    big = trained("huge", net(MLP, NeuralNetRegressor, module__d_in=8, module__d_out=1, module__width=20, criterion=nn.MSELoss, module__depth=1, module__init_scale=1e-6, max_epochs=1, lr=1e-12), X, X[:, :1])
    assert {p.stem: mlps.safe_open(p, "pt").get_tensor("1.weight").dtype for p in out.iterdir()} == {"small-quick": torch.float16, "huge-quick": torch.float32}
    assert big.module[1].weight.dtype == torch.float32


def test_dataset_without_y_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.b.weight = self.a.weight
        def forward(self, x): return {"logits": self.b(self.a(x))}

    class Language(NeuralNet):
        def get_loss(self, out, y, *args, **kwargs): return nn.functional.cross_entropy(out["logits"].transpose(1, 2), y)

    tokens = torch.randint(9, (40, 6), generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:])
    make = lambda: net(Tied, Language, train_split=None, max_epochs=2)
    first, again = (trained("t", make(), data).module for _ in range(2))
    assert again.b.weight is again.a.weight and equal(first, again)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="name='../x'"): trained("../x", net(), X, Y)
    with pytest.raises(ValueError, match="net.module"): trained("a", net(Dropped()), X, Y)
    with pytest.raises(FloatingPointError, match="'a'.*loss is.*lr"): trained("a", net(lr=1e30, optimizer=torch.optim.SGD), X, Y)
    with pytest.raises(ValueError, match="activation='swish'"): MLP(3, activation="swish")


def test_interruption_is_not_stored(out):
    class Stop(mlps.Callback):
        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt, match="3 of 12"): trained("a", net(callbacks=[Stop()]), X, Y)
    assert not (out / "a-quick.safetensors").exists()


@pytest.mark.parametrize("name", ["mnist", "svhn", "cifar10", "low-rank"])
def test_tasks_fit_their_networks(name, monkeypatch):
    monkeypatch.delenv("AGOP_BOOK_DATA", raising=False)
    task = mlp_task(name)
    task.net.set_params(max_epochs=1)
    module = trained(name, *task[:3]).module
    out = module(torch.from_numpy(task.x_test))
    assert len(out) == len(task.y_test) and task.label and abs(task.x.mean()) < 0.05
    assert out.shape[1] == (1 if name == "low-rank" else task.y.max() + 1)


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match="name='imagenet'.*mnist"): mlp_task("imagenet")


@pytest.mark.parametrize("activation", mlps.ACTIVATIONS)
def test_mlp_has_no_bias_unless_asked_and_scales(activation):
    torch.manual_seed(0); plain = MLP(6, width=5, depth=2, d_out=3, activation=activation)
    torch.manual_seed(0); small = MLP(6, width=5, depth=2, d_out=3, activation=activation, init_scale=0.1)
    assert all(torch.allclose(0.1 * p, q) for p, q in zip(plain.parameters(), small.parameters()))
    assert len(list(plain.parameters())) == 3 and plain(torch.randn(2, 2, 3)).shape == (2, 3)
    assert len(list(MLP(6, width=5, depth=2, bias=True).parameters())) == 6


def test_configurations_read_alike_in_every_session(out):
    trained("a", net(max_epochs=1, module__dtype={"b", "a"}), X, Y)
    about = json.loads(mlps.safe_open(out / "a-quick.safetensors", "pt").metadata()["about"])
    assert about["module__dtype"] == ["a", "b"] and about["optimizer"] == "Adam" and about["callbacks"][0][0] == "LRScheduler"
    assert not any(key.startswith("_") for key in about) and not {"device", "verbose"} & about.keys() and " at 0x" not in str(about)


# --- damage, full disks, hostile values

def flipped(path, byte, bit=0):
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


def test_no_flipped_bit_in_stored_weights_is_used(epochs, out):
    first = trained("a", net(max_epochs=2), X, Y)
    path = out / "a-quick.safetensors"
    whole, rng = path.read_bytes(), np.random.RandomState(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for byte in [*rng.choice(header, 25, replace=False), *rng.choice(np.arange(header, len(whole)), 25, replace=False)]:
        path.write_bytes(whole)
        flipped(path, byte, rng.randint(8))
        epochs.clear()
        with pytest.warns(UserWarning, match="a-quick.safetensors.*training anew"): again = trained("a", net(max_epochs=2), X, Y)
        assert epochs == [1, 2] and equal(first.module, again.module)


def test_no_flipped_bit_in_a_checkpoint_is_used(epochs, out):
    epochs.killed_after = 3
    with pytest.raises(ConnectionError): trained("a", net(max_epochs=4), X, Y)
    path, epochs.killed_after = out / "a-quick.part", None
    whole = path.read_bytes()
    for byte in np.random.RandomState(1).choice(len(whole), 12, replace=False):
        path.write_bytes(whole)
        flipped(path, byte, 5)
        (out / "a-quick.safetensors").unlink(missing_ok=True)
        epochs.clear()
        with pytest.warns(UserWarning, match="a-quick.part is refused"): trained("a", net(max_epochs=4), X, Y)
        assert epochs == [1, 2, 3, 4]


def test_weights_of_before_the_checksum_stay_valid(epochs, out):
    first = trained("a", net(max_epochs=2), X, Y)
    path = out / "a-quick.safetensors"
    with mlps.safe_open(path, "pt") as file: meta = file.metadata()
    del meta["sha256"]
    mlps.save_model(first.module, str(path), meta)
    epochs.clear()
    assert equal(first.module, trained("a", net(max_epochs=2), X, Y).module) and epochs == []


def test_the_table_names_every_file_that_travels_with_the_book():
    import hashlib
    from pathlib import Path
    folder = Path(mlps.agop_book.__file__).parents[1] / "nbs/weights"
    if not folder.is_dir(): pytest.skip("no stored weights beside the package")
    table = json.loads((folder / "sha256.json").read_text())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    assert table == found, "nbs/weights/sha256.json must hold the SHA-256 of every file of weights, as `sha256sum` prints it"


def test_a_damaged_file_that_travels_with_the_book_is_refused_by_name(epochs, out, tmp_path, monkeypatch):
    import hashlib
    first = trained("a", net(max_epochs=2), X, Y)
    home = tmp_path / "home/agop_book"
    (home / "nbs/weights").mkdir(parents=True)
    monkeypatch.setattr(mlps.agop_book, "__file__", str(home / "__init__.py"))
    path = home / "nbs/weights/a-quick.safetensors"
    with mlps.safe_open(out / "a-quick.safetensors", "pt") as file: meta = file.metadata()
    del meta["sha256"]                                                       # as the files that travel were written
    mlps.save_model(first.module, str(path), meta)
    (home / "nbs/weights/sha256.json").write_text(json.dumps({path.name: hashlib.sha256(path.read_bytes()).hexdigest()}))
    (out / "a-quick.safetensors").unlink()
    epochs.clear()
    assert equal(first.module, trained("a", net(max_epochs=2), X, Y).module) and epochs == []
    flipped(path, -3)
    with pytest.warns(UserWarning, match="home/agop_book/nbs/weights/a-quick.safetensors is refused: its checksum"): again = trained("a", net(max_epochs=2), X, Y)
    assert equal(first.module, again.module) and epochs == [1, 2]


def test_a_full_disk_loses_no_training(epochs, out, monkeypatch):
    whole = trained("whole", net(max_epochs=3), X, Y)
    def full(descriptor): raise OSError(28, "No space left on device")
    monkeypatch.setattr(mlps.os, "fsync", full)
    with pytest.warns(UserWarning) as said: kept = trained("a", net(max_epochs=3), X, Y)
    texts = [str(w.message) for w in said]
    assert any("in memory only" in t for t in texts) and any("training goes on without" in t for t in texts) and not list(out.glob("*a-quick*"))
    assert all(torch.allclose(p, q, atol=2e-3) for p, q in zip(kept.module.state_dict().values(), whole.module.state_dict().values())) and len(kept.history) == 3
    assert {p.dtype for p in kept.module.parameters()} == {torch.float32}


def test_a_folder_that_cannot_be_written_is_found_before_training(epochs, out, monkeypatch):
    def closed(path, name="path"): raise PermissionError(f"{name}: cannot be written")
    monkeypatch.setattr(mlps, "check_writable", closed)
    with pytest.raises(PermissionError, match="AGOP_BOOK_OUT"): trained("a", net(), X, Y)
    assert epochs == []


@pytest.mark.parametrize("call, error, words", [
    (lambda: trained("a", net(), X, Y, random_state=-1), ValueError, "random_state=-1"), (lambda: trained("a", net(), X, Y, random_state=2**63), ValueError, "random_state=9223"), (lambda: trained("a" * 200, net(), X, Y), ValueError, "name="),
    (lambda: MLP(0), ValueError, "d_in=0"), (lambda: MLP(3, depth=-1), ValueError, "depth=-1"), (lambda: MLP(3, width=2**63), ValueError, "width=9223372036854775808"), (lambda: MLP(3, d_out=1.5), ValueError, "d_out=1.5"),
    (lambda: MLP(3, init_scale=float("nan")), ValueError, "init_scale=nan"), (lambda: MLP(3, width=2_000_000), MemoryError, "weights.*smaller width"), (lambda: MLP(3, width=1, depth=2**31), MemoryError, "smaller width or depth")])
def test_hostile_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words): call()
