"""Value-AGOP against the Jacobian, groups of words at the ends of directions, and bad arguments."""
import importlib.util
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agop_book.book.language import Tokens, word_tokens
from agop_book.book.models import gpt2
from agop_book.coloured import colour
from agop_book.hub import hub_language, load_transformers
from agop_book.streams import value_inputs
from agop_book.heads import Direction, ValueHeads, logit_root
from agop_book.tokens import agreement, token_groups, token_scores, whole_words

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
TEXT = "the cat sat on the mat and the dog ate a bone near the old red barn while a bird sang " * 12
EXACT = dict(probes=None, random_state=0, progress=False)
ROUGH = dict(probes=2, random_state=0, progress=False)


@pytest.fixture(scope="module")
def tokens():
    return word_tokens(TEXT)


@pytest.fixture(scope="module")
def heads(tokens):
    torch.manual_seed(0)
    model = gpt2(len(tokens), 8, n_layer=2, n_head=2, n_embd=12).double().eval()
    return ValueHeads(model, tokens, tokens.encode(TEXT)[:160].reshape(-1, 8), **EXACT)


def brute_force(model, ids, layer, rows):
    """AGOP of the value weight in some rows of a layer for queries, keys and values.

    From autograd's Jacobian of the logits with respect to a shift of its input alone."""
    is_conv1d = type(layer).__name__ == "Conv1D"  # GPT-2's keeps (in, out)
    weight = layer.weight.detach()
    W = (weight.T if is_conv1d else weight)[rows]

    def shifted(shift, one):
        def add(module, args, out):
            return out + torch.zeros_like(out).index_add(-1, rows, (shift @ W.T)[None])

        hook = layer.register_forward_hook(add)
        try:
            return model(one[None]).logits
        finally:
            hook.remove()

    total = 0
    for one in ids:
        at = torch.zeros(len(one), W.shape[1], dtype=W.dtype)
        J = torch.autograd.functional.jacobian(lambda s: shifted(s, one), at).flatten(0, -2)
        total = total + J.T @ J / len(ids)
    return total


def close(A, B):
    return (A - B).abs().max() < 1e-10 * B.abs().max()


def test_agop_without_logits_is_that_of_the_logits():
    torch.manual_seed(1)
    model = gpt2(11, 5, n_layer=2, n_head=2, n_embd=8).double().eval()
    ids = torch.randint(11, (3, 5))
    model.lm_head.register_forward_pre_hook(lambda *args: pytest.fail("logits were computed"))
    heads = ValueHeads(model, None, ids, probes=None, progress=False)
    model.lm_head._forward_pre_hooks.clear()
    for site, layer in zip(heads.sites, heads.table.layer):
        rows = torch.arange(4) + 2 * 8 + site.head * 4
        brute = brute_force(model, ids, model.transformer.h[layer - 1].attn.c_attn, rows)
        assert close(site.agop(), brute)
        values, V = torch.linalg.eigh(brute)
        head = site.head + 1
        found = torch.stack([heads.direction(layer, head, i).vector for i in range(1, 5)])
        eye = torch.eye(4, dtype=found.dtype)
        assert torch.allclose((found @ V.flip(1)[:, :4]).abs(), eye, atol=1e-5)
        assert abs(heads.direction(layer, head).share - values[-1] / values.sum()) < 1e-8
        right = torch.linalg.svd(site.W)[2]
        second = heads.direction(layer, head, 2, "singular").vector
        assert torch.allclose((second @ right.T).abs(), torch.eye(8).double()[1], atol=1e-8)


def test_logit_root_over_blocks_and_probes_are_unbiased():
    W = torch.randn(37, 6, dtype=torch.float64)
    assert torch.allclose(logit_root(W, rows=5) @ logit_root(W), W.T @ W)
    torch.manual_seed(2)
    model = gpt2(30, 6, n_layer=1, n_head=2, n_embd=8).double().eval()
    ids = torch.randint(30, (4, 6))
    both = (ValueHeads(model, None, ids, **EXACT | {"probes": p}) for p in (None, 2000))
    exact, rough = (heads.sites[0].agop() for heads in both)
    assert (exact - rough).norm() < 0.1 * exact.norm()


class Largest(TorchDispatchMode):
    "Remembers the largest tensor that is made, weights of a model and views of them excepted."

    def __init__(self, model):
        super().__init__()
        self.size = 0
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        owned = [t for t in made if t.untyped_storage().data_ptr() not in self.weights]
        self.size = max([self.size, *(t.numel() for t in owned)])
        return out


def test_the_sweep_holds_nothing_as_long_as_the_vocabulary():
    sizes = []
    for vocab in (5_000, 50_000):
        torch.manual_seed(0)
        model = gpt2(vocab, 8, n_layer=1, n_head=2, n_embd=8).eval()
        ids = torch.randint(1000, (4, 8))
        with Largest(model) as seen:
            ValueHeads(model, None, ids, probes=2, progress=False)
        sizes.append(seen.size)
    assert sizes[0] == sizes[1] == 4096 * 8, sizes  # a block of the vocabulary in float64


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "1", 2**63])
def test_bad_counts_are_named(heads, tokens, bad):
    model, ids = heads.model, tokens.encode(TEXT)[:16].reshape(2, 8)
    for name in ("batch_size", "probes"):
        with pytest.raises(ValueError, match=f"{name}="):
            ValueHeads(model, tokens, ids, **ROUGH | {name: bad})
    with pytest.raises(ValueError, match="k="):
        agreement(heads, bad)
    with pytest.raises(ValueError, match="k="):
        heads.directions(bad)


def test_whole_words():
    line = "A cat didn't see the Cat, 3 cats' unbelievable tales. The cat! " * 3
    cut = re.compile(r" didn| unbe|lievable| ?\w+|\s|[^\w\s]").findall
    tokens = Tokens(line, cut, label="pieces")
    table = whole_words(tokens, tokens.encode(line), min_count=3)
    assert set(table.index) == {"cat", "see", "the", "tales"}
    assert table["count"].is_monotonic_decreasing
    assert [tokens.decode([i]).strip().lower() for i in table["id"]] == list(table.index)
    with pytest.raises(ValueError, match="min_count=100"):
        whole_words(tokens, tokens.encode(line), min_count=100)
    with pytest.raises(ValueError, match="empty"):
        whole_words(tokens, [])


def test_groups_are_the_ends_of_the_projection(heads, tokens):
    words = whole_words(tokens, tokens.encode(TEXT), 2)
    d = heads.direction(2, 2)
    table = token_groups([d], words, 4)
    U = value_inputs(heads.model, words["id"].to_numpy())[1]
    p = pd.Series(((U - U.mean(0)) @ d.vector).detach().numpy(), index=words.index)
    assert table.words[0] == list(p.nlargest(4).index)
    assert table.words[1] == list(p.nsmallest(4).index)
    scaled = (p / p.std(ddof=0)).nlargest(4)
    np.testing.assert_allclose(table.projections[0], scaled, atol=1e-3)
    scores = token_scores([d, heads.direction(1, 1)], words)
    assert list(scores.columns) == [d.label, "layer 1, head 1, value-AGOP eigenvector 1"]
    np.testing.assert_allclose(scores[d.label], p / p.std(ddof=0), atol=1e-6)
    for size in (1, len(words)):
        with pytest.raises(ValueError, match=f"size={size}"):
            token_groups([d], words, size)


def test_tables_of_groups(heads, tokens):
    words = whole_words(tokens, tokens.encode(TEXT), 2)
    every = token_groups(heads.directions(6), words, 2)
    assert len(every) == 2 * 2 * 6 * 2
    assert list(every) == [
        "kind", "layer", "head", "direction", "share", "spread", "end", "words", "projections"
    ]
    axes = torch.eye(12, dtype=torch.float64)
    whole = [Direction(heads, 1, 1, i, v) for i, v in enumerate(axes, 1)]
    assert abs(token_groups(whole, words, 2).spread.mean() - 1) < 1e-6
    known = value_inputs(heads.model, words["id"].to_numpy())
    known[:, 0] = torch.nan
    groups = token_groups(heads.directions(2), words, 3, reads=known)
    assert words.index[0] not in sum(groups.words, [])
    scores = token_scores(heads.directions(2), words, reads=known)
    assert scores.iloc[0].isna().all() and scores.iloc[1:].notna().all(axis=None)
    np.testing.assert_allclose(scores.iloc[1:].std(ddof=0), 1, atol=1e-6)


def test_agreement(heads):
    table = agreement(heads, k=3)
    columns = ["leading", "shared", "leading_rotated", "shared_rotated"]
    assert len(table) == 4 and table[columns].stack().between(0, 1 + 1e-9).all()
    assert (table.chance == 0.5).all()
    kept = heads.sites[0].moments
    heads.sites[0].moments = torch.eye(6, dtype=torch.float64)[None]
    try:
        same = agreement(heads, k=3).iloc[0]
    finally:
        heads.sites[0].moments = kept
    assert min(same.leading, same.shared, same.leading_rotated) > 1 - 1e-8


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Transformer(8, 2, 1, 1, 8), "gpt2"])
def test_models_without_values_to_look_at(tokens, model):
    with pytest.raises(ValueError, match="no attention values"):
        ValueHeads(model, tokens, torch.zeros(2, 8, dtype=int))


def test_texts_that_the_model_cannot_read(heads, tokens):
    model, ids = heads.model, tokens.encode(TEXT)[:16].reshape(2, 8)
    long, strange = tokens.encode(TEXT)[:18].reshape(2, 9), torch.tensor([[0, len(tokens)]])
    with pytest.raises(ValueError, match="data has texts of 9 tokens.*windows"):
        ValueHeads(model, tokens, long)
    outside = f"data has token number {len(tokens)}, outside the vocabulary"
    with pytest.raises(ValueError, match=outside):
        ValueHeads(model, tokens, strange)
    with pytest.raises(ValueError, match=r"ids\[None\]"):
        ValueHeads(model, tokens, ids[0])
    with pytest.raises(ValueError, match="of shape"):
        ValueHeads(model, tokens, ids[:0])


def test_directions_that_there_are_not(heads):
    with pytest.raises(IndexError, match="layer=3: choose one of 1 to 2"):
        heads.direction(3, 1)
    with pytest.raises(IndexError, match="head=0: choose one of 1 to 2"):
        heads.direction(1, 0)
    with pytest.raises(IndexError, match="index=7: choose one of 1 to 6"):
        heads.direction(1, 1, 7)
    with pytest.raises(IndexError, match="index=True"):
        heads.direction(1, 1, True)
    with pytest.raises(ValueError, match="kind='best': choose"):
        heads.direction(1, 1, 1, "best")
    with pytest.raises(ValueError, match="k=7: a head of this model has 6"):
        heads.directions(7)


def test_gpt_neo_as_the_papers_model(tokens):
    library = load_transformers()
    torch.manual_seed(0)
    config = library.GPTNeoConfig(
        vocab_size=len(tokens), hidden_size=12, num_layers=2, num_heads=2,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=8, window_size=4,
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0,
    )
    model = library.GPTNeoForCausalLM(config).eval()
    heads = ValueHeads(model, tokens, tokens.encode(TEXT)[:64].reshape(-1, 8), **ROUGH)
    assert list(heads.table.layer) == [1, 1, 2, 2] and list(heads.table["head"]) == [1, 2, 1, 2]
    value = model.transformer.h[0].attn.attention.v_proj
    assert torch.allclose(heads.sites[1].W, value.weight.double()[6:])
    assert len(colour("the cat", heads.direction(2, 2), in_place=True).pieces) == 2


@pytest.fixture
def bigcode():
    "A model of StarCoder's kind, which shares its values among all heads or does not."
    library = load_transformers()

    def make(shared):
        torch.manual_seed(0)
        config = library.GPTBigCodeConfig(
            vocab_size=9, n_positions=4, n_embd=12, n_layer=2, n_head=3, multi_query=shared,
            bos_token_id=0, eos_token_id=0,
        )
        model = library.GPTBigCodeForCausalLM(config).double().eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.5)
        return model

    return make


SHARED, OWN = (True, [16]), (False, [8, 20, 32])  # where the rows of values begin


@pytest.mark.parametrize("shared, starts", [SHARED, OWN])
def test_values_of_bigcode_are_not_its_keys(bigcode, shared, starts):
    "Multi-query: 12 query rows, one key, one value; else query, key, value of each head in turn."
    model, ids = bigcode(shared), torch.randint(9, (2, 4))
    heads = ValueHeads(model, None, ids, probes=None, progress=False)
    places = [(layer + 1, head + 1) for layer in range(2) for head in range(len(starts))]
    assert list(zip(heads.table.layer, heads.table["head"])) == places
    for site, layer in zip(heads.sites, heads.table.layer):
        read, rows = model.transformer.h[layer - 1].attn.c_attn, torch.arange(4) + starts[site.head]
        assert torch.equal(site.W, read.weight.detach()[rows])
        assert close(site.agop(), brute_force(model, ids, read, rows))
    assert heads.direction(2, len(starts)).head == len(starts)
    with pytest.raises(IndexError, match=f"head={len(starts) + 1}"):
        heads.direction(1, len(starts) + 1)


@pytest.mark.parametrize("shared, starts", [SHARED, OWN])
def test_without_its_values_a_layer_hands_over_nothing(bigcode, shared, starts):
    model, seen = bigcode(shared), []
    attention = model.transformer.h[1].attn
    with torch.no_grad():
        for start in starts:
            attention.c_attn.weight[start:start + 4] = 0
            attention.c_attn.bias[start:start + 4] = 0
    attention.c_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.randint(9, (2, 4)))
    assert not seen[0].any()


def save_model(folder):
    "A GPT-2 with the vocabulary of a byte-pair encoding, which is returned."
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<|endoftext|>"])
    folder.mkdir()
    model = gpt2(bpe.get_vocab_size(), 16, n_layer=1, n_head=2, n_embd=8)
    model.save_pretrained(folder)
    return bpe


def test_models_by_name_or_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="download=True"):
        hub_language("no-such/model-here")
    bpe = save_model(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        hub_language(tmp_path / "m")
    bpe.save_model(str(tmp_path / "m"))
    kind = '{"tokenizer_class": "GPT2Tokenizer"}'
    (tmp_path / "m/tokenizer_config.json").write_text(kind)
    model, tokens = hub_language(tmp_path / "m")
    ids = torch.as_tensor(tokens.encode(TEXT))
    heads = ValueHeads(model, tokens, ids[:64].reshape(-1, 16), **ROUGH)
    words = whole_words(tokens, ids, 5)
    assert {"cat", "dog"} <= set(words.index)
    assert len(token_groups(heads.directions(2), words, 3)) == 8
    line = "the cat sat near the old barn"
    shown = colour(line, heads.direction(1, 2), in_place=True)
    assert "".join(shown.pieces) == line and not model.training
