"""What the values of a GPT-2 read of tokens and of texts, and what is said of bad numbers."""
import importlib.util

import pytest
import torch

from agop_book.streams import layer_reads, text_reads, value_inputs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@pytest.fixture(scope="module")
def model():
    from agop_book.book.models import gpt2

    torch.manual_seed(0)
    return gpt2(19, 8, n_layer=2, n_head=2, n_embd=12).double().eval()


def heard(model, layer, ids):
    "What the layer norm before a layer's values hands out, by a hook of our own."
    seen = []
    norm = model.transformer.h[layer].ln_1
    hook = norm.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    model(ids)
    hook.remove()
    return seen[0]


def test_what_is_read_of_tokens(model):
    body = model.transformer
    E, P = body.wte.weight, body.wpe.weight
    norm = body.h[1].ln_1
    assert torch.allclose(value_inputs(model, [3, 1])[1], norm(E[[3, 1]] + P.mean(0)))
    text = torch.tensor([[3, 1, 3], [1, 1, 0]])
    seen = heard(model, 1, text)
    want = torch.stack([seen[text == 3].mean(0), seen[text == 1].mean(0)])
    found = value_inputs(model, [3, 1, 5], text)
    assert torch.allclose(found[1][:2], want)
    assert found[:, 2].isnan().all()
    assert torch.allclose(layer_reads(model, text)[1], seen)


def test_a_token_that_is_asked_for_twice(model):
    text = torch.tensor([[3, 1, 3], [1, 1, 0]])
    for where in (None, text):
        twice = value_inputs(model, [3, 1, 3], where)
        assert torch.equal(twice, value_inputs(model, [1, 3], where)[:, [1, 0, 1]])


NO_TOKENS = [
    [-1], [99], [], [0.5], [True], [[1]], None, "a", [None], torch.tensor([0.5]),
    torch.tensor([True]),
]


@pytest.mark.parametrize("ids", NO_TOKENS, ids=str)
def test_what_is_no_token_number(model, ids):
    for text in (None, torch.tensor([[3, 1]])):
        with pytest.raises(ValueError, match="ids"):
            value_inputs(model, ids, text)


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "1", 2**63])
def test_a_bad_batch_size_is_named(model, bad):
    with pytest.raises(ValueError, match="batch_size="):
        value_inputs(model, [1], torch.tensor([[3, 1]]), bad)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 11, 12, 13, 30])
def test_long_texts_are_read_in_windows_that_overlap_by_half(model, n):
    "Of each window but the first, the second half counts: positions that have four before them."
    ids = torch.randint(19, (n,), generator=torch.Generator().manual_seed(n))
    reads = text_reads(model, ids, 1)
    assert reads.shape == (n, 12)
    assert torch.allclose(reads[:8], heard(model, 1, ids[None, :8])[0])
    for start in range(4, n - 4, 4):
        want = heard(model, 1, ids[None, start:start + 8])[0, 4:]
        assert torch.allclose(reads[start + 4:start + 8], want)
