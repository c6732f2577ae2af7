"""Tokens, windows, and the small language models."""
import math

import pytest
import torch

from agop_book.book.sources import DataNotFound
from agop_book.book.language import (Tokens, gpt2_tokens, shakespeare_gpt2, tinystories_gpt2,
                                     windows, word_tokens)
from agop_book.hub import load_transformers
from agop_book.nfa import nfa

END = "<|endoftext|>"


@pytest.fixture
def alone(tmp_path, monkeypatch):
    "Quick scale, no data, an empty output folder."
    pytest.importorskip("transformers")
    for name in ("AGOP_BOOK_DATA", "AGOP_BOOK_SCALE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("make", [Tokens, word_tokens])
def test_tokens_give_back_the_text(make):
    text = "Once upon a time,\n\nthere was... a girl's\tcat (and  more)!" + END
    text += " Ünder \n  the  end "
    tokens = make(text)
    ids = tokens.encode(text)
    assert tokens.decode(ids) == text and ids.dtype == torch.int64
    assert sorted(set(ids.tolist())) == list(range(len(tokens)))
    with pytest.raises(ValueError, match="'q'"):
        tokens.encode("q")
    assert tokens.decode(tokens.encode("")) == ""


def test_gpt2_tokens_agree_with_transformers_and_are_trimmed(tmp_path, monkeypatch, alone):
    with pytest.raises(DataNotFound, match="word_tokens"):
        gpt2_tokens("a text")
    from tokenizers import ByteLevelBPETokenizer

    pairs = ByteLevelBPETokenizer()
    text = "the cat sat on the mat, the cat sat é " * 20
    pairs.train_from_iterator([text], vocab_size=290, special_tokens=[END])
    folder = tmp_path / "d/gpt2_bpe"
    folder.mkdir(parents=True)
    pairs.save_model(str(folder))
    monkeypatch.setenv("AGOP_BOOK_DATA", str(tmp_path / "d"))
    both = text + END + "the mat"
    tokens = gpt2_tokens(both)
    assert tokens.decode(tokens.encode(both)) == both and len(tokens) < 60
    assert END in tokens.pieces
    reader = load_transformers().GPT2TokenizerFast.from_pretrained(folder)
    assert [tokens.pieces[i] for i in tokens.encode(text)] == reader.tokenize(text)


def test_windows():
    x, y = windows(torch.arange(20), 6, 3)
    assert x.shape == y.shape == (5, 6) and (y == x + 1).all() and x[1, 0] == 3
    assert len(windows(torch.arange(20), 6)[0]) == 3
    with pytest.raises(ValueError, match="context=6"):
        windows(torch.arange(6), 6)


@pytest.mark.parametrize("bad", [0, -1, True, 2.5, "2", 2**63])
@pytest.mark.parametrize("name", ["context", "stride"])
def test_bad_windows_are_named(name, bad):
    arguments = dict(context=8, stride=4) | {name: bad}
    with pytest.raises(ValueError, match=f"{name}="):
        windows(torch.arange(100), **arguments)
    with pytest.raises(ValueError, match="ids must"):
        windows(torch.zeros(20, 2).long(), 8)


@pytest.mark.parametrize("ids", [[-1], [99], [1.5], [None], 3, "a", [[1]]], ids=str)
def test_numbers_that_are_no_tokens(ids):
    with pytest.raises(ValueError, match="ids"):
        Tokens("abc").decode(ids)


def test_numbers_of_every_kind_are_decoded():
    letters = Tokens("abc")
    kinds = [0, 2], (0, 2), letters.encode("ac"), letters.encode("ac").numpy()
    assert [letters.decode(ids) for ids in kinds] == ["ac"] * 4 and letters.decode([]) == ""


@pytest.mark.parametrize("make", [shakespeare_gpt2, tinystories_gpt2])
def test_language_models_learn_and_are_read_back(make, alone):
    play = make()
    before = play.perplexity(play.initial)
    assert play.perplexity() < before / 1.5
    assert abs(math.log(before) / math.log(len(play.tokens)) - 1) < 0.2
    ids = play.contexts(3)
    assert ids.shape == (3, play.model.config.n_positions)
    assert torch.equal(ids, play.contexts(3))
    assert not torch.equal(ids, play.contexts(3, random_state=1))
    prompt = play.tokens.decode(play.test[:3])
    text = play.write(prompt, n=40)                      # longer than the context
    assert text.startswith(prompt) and text == play.write(prompt, n=40)
    assert text != play.write(prompt, n=40, random_state=1)
    with pytest.raises(ValueError, match="empty"):
        play.write("")
    again = make()
    pairs = zip(play.model.parameters(), again.model.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)
    table = nfa(play.model, ids, initial=play.initial, probes=2, random_state=0, progress=False)
    kinds = {"query", "key", "value", "attention-out", "mlp-in", "mlp-out"}
    assert set(table.kind) >= kinds and table.reached.all()
