"""The sweep on every family of networks that the book names, against Jacobians.

Random weights, tiny instances, float64; the AGOP at the input of each weight, by autograd.
`python tests/test_families.py` prints the table of families with the largest error of each."""

import contextlib
import importlib.util
import inspect
import math
from functools import partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import agop_book.nfa as nfa_module
from agop_book.nfa import nfa
from agop_book.tensors import each

TOLERANCE = 1e-8


def has(package):
    return importlib.util.find_spec(package) is not None


# --- the other way: each use of each weight gets an input of its own -------------------------


def weight(m):
    "The matrix `(d_out, d_in)` that a module applies to its input, or to each patch of it."
    if isinstance(m, nn.modules.conv._ConvNd):
        return torch.block_diag(*m.weight.detach().flatten(1).unflatten(0, (m.groups, -1)))
    return m.weight.detach() if isinstance(m, nn.Linear) else m.weight.detach().T


class Shifts:
    "Zeros added to the input of every use of every site: `leaves` of one site, of all its uses."

    def __init__(self, sites):
        self.leaves, self.rows = [[] for _ in sites], {}
        for i, site in enumerate(sites):
            self.rows.setdefault(site.name, []).append(i)

    def moved(self, rows, W, spread):
        "What the shifts of the heads in `rows` add to the output of one use."
        parts = []
        for i, w in zip(rows, W.chunk(len(rows))):
            s = torch.zeros(*spread, W.shape[1], dtype=W.dtype, requires_grad=True)
            self.leaves[i].append(s)
            parts.append(s @ w.T)
        return torch.cat(parts, -1)

    def tap(self, rows):
        "A hook that adds them to what a layer gives."

        def hook(m, args, out):
            if not isinstance(m, nn.modules.conv._ConvNd):
                return out + self.moved(rows, weight(m), out.shape[:-1])
            new = self.moved(rows, weight(m), (len(out), out[0, 0].numel()))
            return out + new.transpose(1, 2).reshape(out.shape)

        return hook

    def attention(self, m, rows):
        "Self-attention of nn.MultiheadAttention (batch first, no mask), written out."
        W, b = m.in_proj_weight.detach().chunk(3), m.in_proj_bias.chunk(3)
        rows = [rows[j * m.num_heads : (j + 1) * m.num_heads] for j in range(3)]

        def project(u, W, b, rows):
            u = F.linear(u, W, b) + self.moved(rows, W, u.shape[:-1])
            return u.unflatten(-1, (m.num_heads, -1)).transpose(1, 2)

        def forward(q, k, v, **_):
            q, k, v = map(project, (q, k, v), W, b, rows)
            a = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            return m.out_proj((a @ v).transpose(1, 2).flatten(2)), None

        return forward

    @contextlib.contextmanager
    def of(self, model):
        "Inside, the model computes with the shifts."
        modules = dict(model.named_modules())
        with contextlib.ExitStack() as undo:
            for name, rows in self.rows.items():
                if name in modules:
                    undo.callback(modules[name].register_forward_hook(self.tap(rows)).remove)
                else:
                    m = modules[name.removesuffix("in_proj").rstrip(".")]
                    m.forward = self.attention(m, rows)
                    undo.callback(vars(m).pop, "forward")
            yield


def jacobians(model, batch, sites, output):
    "AGOP `(d_in, d_in)` of every site: gradients of each output with respect to its shifts alone."
    plain, shifts = output(model, batch), Shifts(sites)
    with shifts.of(model):
        y = output(model, batch)
    assert (y - plain).abs().max() <= 1e-9 * plain.abs().max()
    leaves, G = [s for one in shifts.leaves for s in one], [0.0] * len(sites)
    for o in y.flatten(1).sum(0):  # samples do not see each other
        grads = iter(torch.autograd.grad(o, leaves, retain_graph=True, allow_unused=True))
        for i, one in enumerate(shifts.leaves):
            for g in [next(grads) for _ in one]:
                if g is not None:
                    G[i] = G[i] + g.flatten(0, -2).T @ g.flatten(0, -2) / len(y)
    return G


def tensor(y):
    if isinstance(y, torch.Tensor):
        return y
    return next(v for k in ("logits", "last_hidden_state") if (v := y.get(k)) is not None)


def run(model, batch):
    return tensor(model(**batch) if isinstance(batch, dict) else model(batch))


def double(t):
    return t.double() if t.is_floating_point() else t


def errors(model, batch):
    "One row per site: the largest difference of the two AGOPs, relative to the largest entry."
    torch.manual_seed(0)
    model, batch = model.double().eval(), each(batch, double)
    table, sites = nfa(model, batch, matrices=True, progress=False)
    G = jacobians(model, batch, sites, run)
    assert [torch.is_tensor(g) for g in G] == list(table.reached)
    apart = [
        float((s.agop() - g).abs().max() / g.abs().max()) if s.reached else 0.0
        for s, g in zip(sites, G)
    ]
    return table.assign(error_of_agop=apart)


# --- the families ----------------------------------------------------------------------------

FAMILIES = {}


def family(name, needs="torch"):
    def keep(build):
        FAMILIES[name] = (build, needs)
        return build

    return keep


@contextlib.contextmanager
def narrow(module, by=16):
    "Inside, networks that a file of torchvision builds are as they are, but with narrow layers."

    def width(n):
        return n // by if n >= by else n

    class Narrow:
        def __getattr__(self, name):
            return getattr(nn, name)

        class Conv2d(nn.Conv2d):
            def __init__(self, d_in, d_out, *args, **options):
                super().__init__(width(d_in), width(d_out), *args, **options)

        class Linear(nn.Linear):
            def __init__(self, d_in, d_out, *args, **options):
                super().__init__(width(d_in), width(d_out), *args, **options)

        class BatchNorm2d(nn.BatchNorm2d):
            def __init__(self, n, *args, **options):
                super().__init__(width(n), *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "nn", Narrow())
        yield


def torchvision_net(name, size):
    from torchvision import models

    build = getattr(models, name)
    with narrow(inspect.getmodule(inspect.unwrap(build))):
        model = build(weights=None, num_classes=3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.5, 1)
            m.bias.data.normal_(0, 0.1)
    return model, torch.randn(2, 3, size, size)


for _name, _size in [
    ("alexnet", 64),
    *[(f"vgg{d}{bn}", 32) for d in (11, 13, 16, 19) for bn in ("", "_bn")],
    *[(f"resnet{d}", 32) for d in (18, 34, 50, 101, 152)],
]:
    FAMILIES[_name] = (partial(torchvision_net, _name, _size), "torchvision")


@family("vit_b_32", "torchvision")
def _():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=64,
        patch_size=32,
        num_layers=12,
        num_heads=12,
        hidden_dim=24,
        mlp_dim=96,
        num_classes=3,
    )
    nn.init.normal_(model.heads[0].weight)  # torchvision starts it at zero: nothing would flow back
    return model, torch.randn(2, 3, 64, 64)


@family("convnext_tiny", "torchvision")
def _():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    model = ConvNeXt(
        [
            CNBlockConfig(8, 16, 3),
            CNBlockConfig(16, 32, 3),
            CNBlockConfig(32, 64, 9),
            CNBlockConfig(64, None, 3),
        ],
        layer_scale=0.5,
        num_classes=3,
    )
    return model, torch.randn(2, 3, 64, 64)


IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 0]])
SMALL = dict(vocab_size=7, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def transformer(cls, config, batch, sharpen=True, **arguments):
    "A model of transformers; weights larger than its default, so that attention is not uniform."

    def make():
        import transformers as tf

        torch.manual_seed(0)
        model = getattr(tf, cls)(getattr(tf, config)(**arguments))
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1 and sharpen:
                    p.mul_(8)
        return model, batch

    return make


MASKED = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
for _name, _build in {
    "GPT-2": transformer(
        "GPT2LMHeadModel",
        "GPT2Config",
        IDS,
        n_positions=5,
        n_embd=12,
        n_layer=2,
        n_head=3,
        use_cache=False,
        **SMALL,
    ),
    "BERT": transformer(
        "BertModel",
        "BertConfig",
        MASKED,
        vocab_size=7,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=16,
        max_position_embeddings=8,
    ),
    "DistilBERT": transformer(
        "DistilBertModel",
        "DistilBertConfig",
        MASKED,
        vocab_size=7,
        dim=12,
        n_layers=2,
        n_heads=3,
        hidden_dim=16,
        max_position_embeddings=8,
    ),
    "Llama (grouped queries)": transformer(
        "LlamaForCausalLM",
        "LlamaConfig",
        IDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        use_cache=False,
        **SMALL,
    ),
    "ViT": transformer(
        "ViTForImageClassification",
        "ViTConfig",
        torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=16,
        num_labels=3,
    ),
    "T5 (encoder-decoder)": transformer(
        "T5ForConditionalGeneration",
        "T5Config",
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]},
        sharpen=False,
        vocab_size=7,
        d_model=12,
        d_kv=4,
        num_heads=3,
        num_layers=2,
        d_ff=16,
        use_cache=False,
        decoder_start_token_id=0,
        pad_token_id=0,
    ),
}.items():
    FAMILIES[_name] = (_build, "transformers")


@family("nn.MultiheadAttention")
def _():
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(12, 3, 16, dropout=0.1, batch_first=True),
        2,
        enable_nested_tensor=False,
    ), torch.randn(2, 5, 12)


@family("Conv2d: groups, stride, padding, dilation")
def _():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.GELU(),
        nn.Conv2d(6, 6, (3, 2), dilation=2, padding=2, groups=3),
        nn.GELU(),
        nn.Conv2d(6, 2, 3, stride=2),
    ), torch.randn(2, 4, 11, 11)


@family("Conv1d: groups, stride, padding, dilation")
def _():
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.GELU(),
        nn.Conv1d(6, 6, 3, dilation=2, padding=2, groups=3),
        nn.GELU(),
        nn.Conv1d(6, 2, 2, stride=2),
    ), torch.randn(2, 4, 15)


@family("tied weights")
def _():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    return model, torch.randn(4, 5)


@family("a module used twice")
def _():
    a = nn.Linear(5, 5)
    return nn.Sequential(a, nn.Tanh(), a, nn.Tanh(), nn.Linear(5, 3)), torch.randn(4, 5)


@family("weights through parametrize")
def _():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    parametrize.register_parametrization(model[0], "weight", _Double())
    nn.utils.parametrizations.weight_norm(model[2])
    nn.utils.parametrizations.orthogonal(model[4])
    return model, torch.randn(4, 5)


class _Double(nn.Module):
    def forward(self, W):
        return 2 * W


# --- the tests -------------------------------------------------------------------------------


def measure(name):
    build, _ = FAMILIES[name]
    torch.manual_seed(0)
    return errors(*build())


@pytest.mark.parametrize("name", FAMILIES)
def test_against_the_jacobian(name, monkeypatch):
    needs = FAMILIES[name][1]
    if not has(needs):
        pytest.skip(f"{needs} is not installed")
    # the correlations have tests of their own; roots of large matrices take time
    monkeypatch.setattr(nfa_module, "compare", lambda *args: {})
    table = measure(name)
    idle = ["pooler.dense"] if name == "BERT" else []  # its output is not among those pulled back
    assert list(table.site[~table.reached]) == idle
    assert table.error_of_agop.max() < TOLERANCE, table.loc[table.error_of_agop.idxmax()]


def largest_errors():
    "One row per family: number of weights (heads apart) and the largest error of an AGOP."
    rows = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nfa_module, "compare", lambda *args: {})
        for name, (_, needs) in FAMILIES.items():
            if has(needs):
                table = measure(name)
                rows[name] = {
                    "sites": len(table),
                    "kinds": ", ".join(table.kind.unique()),
                    "largest error": table.error_of_agop.max(),
                }
    return pd.DataFrame.from_dict(rows, orient="index")


if __name__ == "__main__":
    print(largest_errors().to_string(float_format="%.0e"))
