"""Heads of a GPT-2: their matrices and moments against the library's sweep."""
import pytest
import torch

from agop_book.attention import deltas, head_moments, head_rows, head_weight
from agop_book.nfa import nfa

pytest.importorskip("transformers")

KINDS = ("query", "key", "value")


@pytest.fixture
def model():
    from agop_book.book.models import gpt2

    torch.manual_seed(0)
    return gpt2(7, 5, n_layer=2, n_head=3, n_embd=12).double().eval()


@pytest.fixture
def ids():
    return torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5]])


def test_rows_of_all_heads_fill_the_matrix(model):
    rows = [head_rows(model, kind, head) for kind in KINDS for head in (1, 2, 3)]
    places = [i for r in rows for i in range(r.start, r.stop)]
    assert places == list(range(36))
    with pytest.raises(ValueError, match="'output'"):
        head_rows(model, "output", 1)
    with pytest.raises(ValueError, match="head=0"):
        head_rows(model, "key", 0)


def test_a_heads_weight_makes_its_queries(model):
    u = torch.randn(4, 12, dtype=torch.float64)
    attn = model.transformer.h[1].attn.c_attn
    for kind in KINDS:
        rows = head_rows(model, kind, 3)
        out = attn(u) - attn.bias
        assert torch.allclose(u @ head_weight(model, 2, kind, 3).T, out[:, rows])


def test_one_set_of_gradients_for_each_output(model, ids):
    found = list(deltas(model, ids))
    assert len(found) == 5 * 7                     # positions x tokens
    assert all(g.shape == (2, 5, 36) for layers in found for g in layers)
    assert all(len(block.attn.c_attn._forward_hooks) == 0 for block in model.transformer.h)


def test_moments_give_the_agop_of_every_head(model, ids):
    C = head_moments(model, ids)
    _, sites = nfa(model, ids, matrices=True, progress=False)
    heads = [s for s in sites if s.kind in KINDS]
    assert len(heads) == 2 * 3 * 3
    for site in heads:
        layer, head = int(site.name.split(".")[2]) + 1, site.head + 1
        rows = head_rows(model, site.kind, head)
        W = head_weight(model, layer, site.kind, head)
        by_hand = W.T @ C[layer - 1][rows, rows] @ W
        assert torch.allclose(site.W.to(W), W)
        assert (site.agop() - by_hand).abs().max() < 1e-10 * by_hand.abs().max()
