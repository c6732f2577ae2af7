"""The networks that the lessons train: tasks for MLPs, transformers from configurations."""
import pytest
import torch

from agop_book.book.models import TokenLoss, gpt2, mlp_task, transformer_net, vit
from agop_book.book.train import trained
from agop_book.hub import load_transformers


@pytest.mark.parametrize("name", ["mnist", "svhn", "cifar10", "low-rank"])
def test_tasks_fit_their_networks(name, monkeypatch, tmp_path):
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path))
    for variable in ("AGOP_BOOK_DATA", "AGOP_BOOK_SCALE"):
        monkeypatch.delenv(variable, raising=False)
    task = mlp_task(name)
    task.net.set_params(max_epochs=1)
    module = trained(name, *task[:3]).module
    out = module(torch.from_numpy(task.x_test))
    assert len(out) == len(task.y_test) and task.label and abs(task.x.mean()) < 0.05
    assert out.shape[1] == (1 if name == "low-rank" else task.y.max() + 1)


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match="name='imagenet'.*mnist"):
        mlp_task("imagenet")


def small_gpt2(**options):
    pytest.importorskip("transformers")
    return gpt2(9, 8, **dict(n_layer=2, n_head=2, n_embd=8) | options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gpt2_is_causal_and_without_dropout(attention):
    model = small_gpt2(attention=attention).double()
    ids = torch.randint(9, (3, 8))
    a, b = model(ids).logits, model(ids).logits          # in training mode: nothing is dropped
    assert a.shape == (3, 8, 9) and torch.equal(a, b)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 9
    c = model(changed).logits
    assert (c - a)[:, :5].abs().max() < 1e-12 < (c - a)[:, 5:].abs().max()


def test_the_books_gelu_is_gpt2s_own():
    ours, library = small_gpt2().double().eval(), load_transformers()
    config = library.GPT2Config(vocab_size=9, n_positions=8, n_layer=2, n_head=2, n_embd=8,
                                bos_token_id=None, eos_token_id=None)
    theirs = library.GPT2LMHeadModel(config).double().eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(9, (2, 8))
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-12


def test_loss_is_that_of_transformers():
    model = small_gpt2(n_layer=1).eval()
    ids = torch.randint(9, (2, 8))
    ours = TokenLoss()(model(ids[:, :-1]), ids[:, 1:]).item()
    assert abs(ours - model(ids, labels=ids).loss.item()) < 1e-6


def test_vit_trains():
    pytest.importorskip("transformers")
    x = torch.rand(40, 1, 8, 8)
    y = (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long()
    net = transformer_net(vit, 40, batch_size=20, epochs=3, lr=1e-2, size=8, channels=1,
                          classes=2, patch=4, n_layer=1, n_head=2, n_embd=8)
    net.fit(x, y)
    assert net.history[-1, "train_loss"] < net.history[0, "train_loss"] + 0.1
    assert net.module_(x).logits.shape == (40, 2)


@pytest.mark.parametrize("make, good", [
    (gpt2, dict(vocab=5, context=4, n_layer=1, n_head=2, n_embd=8)),
    (vit, dict(size=8, channels=1, classes=2, patch=4, n_layer=1, n_head=2, n_embd=8)),
])
def test_bad_shapes_of_models_are_named(make, good):
    pytest.importorskip("transformers")
    for name in good:
        for bad in (0, -1, True, 2.5):
            with pytest.raises(ValueError, match=f"{name}="):
                make(**good | {name: bad})
    with pytest.raises(ValueError, match="n_embd=8 must be a multiple of n_head=5"):
        make(**good | {"n_head": 5})
    make(**{name: torch.tensor(value).numpy()[()] for name, value in good.items()})


def test_a_patch_must_divide_the_image():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="patch=5 must divide size=28"):
        vit(28, 1, 10, patch=5)
