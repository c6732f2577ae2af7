"""Characters as numbers, and the networks that read them."""
import pytest
import torch
from torch.nn import functional as F

from agop_book.book.characters import CharLoss, CharRNN, char_codes, char_task


def test_characters():
    codes = char_codes(["ab", "bca"], "ab")
    assert codes.tolist() == [[2, 3, 0], [3, 1, 2]]
    assert char_codes(["abc"], "abc", 2).shape == (1, 2)
    assert CharRNN(4, "rnn", hidden=6)(codes).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="kind='gpt'"):
        CharRNN(4, "gpt")
    scores = torch.randn(2, 3, 4)
    wanted = F.cross_entropy(scores.reshape(6, 4), codes.reshape(6))
    assert torch.allclose(CharLoss()(scores, codes), wanted)


@pytest.mark.parametrize("embed", (None, 5))
def test_padding_changes_nothing(embed):
    codes = char_codes(["ab", "bca"], "ab")
    torch.manual_seed(0)
    model = CharRNN(4, "gru", hidden=6, layers=2, outputs=3, embed=embed).eval()
    alone = torch.cat([model(row[row != 0][None]) for row in codes])
    assert torch.allclose(model(codes), alone, atol=1e-6) and alone.shape == (2, 3)


@pytest.mark.parametrize("texts, options, message", [
    (["ab"], dict(length=-1), "length=-1"),
    (["ab"], dict(length=0), "length=0"),
    (["ab"], dict(length=True), "length=True"),
    (["ab"], dict(length=1.5), "length=1.5"),
    ([], {}, "texts holds no"),
    ([""], dict(length=3), "texts holds no"),
    ("ab", {}, "texts is one"),
])
def test_bad_texts_and_lengths_are_named(texts, options, message):
    with pytest.raises(ValueError, match=message):
        char_codes(texts, "abc", **options)
    assert char_codes(iter(["ab", "c"]), "abc").tolist() == [[2, 3], [4, 0]]


@pytest.mark.parametrize("name", ["vocab", "hidden", "layers", "outputs", "embed"])
def test_bad_sizes_of_networks_are_named(name):
    for bad in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match=f"{name}="):
            CharRNN(**dict(vocab=5) | {name: bad})


@pytest.mark.parametrize("task", ("names", "text"))
def test_tasks(task, monkeypatch):
    for name in ("AGOP_BOOK_DATA", "AGOP_BOOK_SCALE"):
        monkeypatch.delenv(name, raising=False)
    run = char_task(task, "lstm")
    net = run.net.set_params(max_epochs=1, callbacks=[]).fit(run.x[:64], run.y[:64])
    scores = torch.as_tensor(net.predict(run.x_test[:8]))
    assert torch.isfinite(scores).all() and len(run.x) == len(run.y)
    assert scores.shape[:-1] == run.y_test[:8].shape
    if task == "text":
        assert torch.equal(run.x[:, 1:], run.y[:, :-1])
        assert torch.equal(run.x[1:, 0], run.y[:-1, -1])


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match="task='images'"):
        char_task("images", "lstm")
