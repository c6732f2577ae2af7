"""Who is query, key and value in real attention layers: told by names and configurations, checked by what the rows do."""

import importlib.util

import pytest
import torch
from test_nfa import brute
from torch import nn

from agop_book.nfa import nfa
from agop_book.roles import holder, row_blocks

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
IDS = torch.tensor([[3, 1, 4, 1, 5, 2], [2, 6, 5, 3, 0, 4]])
SMALL = dict(vocab_size=7, bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=False)
DEEP = dict(num_hidden_layers=1, max_position_embeddings=8)


def made(cls, config, **arguments):
    "A tiny model of transformers in float64, of which no weight or bias is zero by design."
    import transformers as tf

    torch.manual_seed(0)
    model = getattr(tf, cls)(getattr(tf, config)(**arguments)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model


# family -> (model, path of its first attention layer, its output projection, (query heads, key/value heads), causal)
FAMILIES = {}


def family(name, path, out, heads, cls, config, causal=True, data=None, **arguments):
    FAMILIES[name] = (
        lambda: made(cls, config, **arguments),
        path,
        out,
        heads,
        causal,
        IDS if data is None else data,
    )


def gpt(name, cls, heads=(4, 4), path="h.0.attn", out="c_proj", **arguments):
    family(
        name,
        path,
        out,
        heads,
        f"{cls}Model",
        f"{cls}Config",
        **{**SMALL, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 4, **arguments},
    )


WIDE = dict(hidden_size=16, num_attention_heads=4, intermediate_size=24, **DEEP, **SMALL)
IMAGES = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
gpt("GPT-2", "GPT2")
gpt("GPTBigCode, one key", "GPTBigCode", (4, 1), multi_query=True)
gpt("GPTBigCode, a key per head", "GPTBigCode", multi_query=False)
gpt("CodeGen", "CodeGen", out="out_proj", rotary_dim=4)
gpt("CodeGen, heads across parts", "CodeGen", (2, 2), out="out_proj", rotary_dim=8, n_head=2)
gpt("GPT-J", "GPTJ", out="out_proj", rotary_dim=4)
gpt("ImageGPT", "ImageGPT")
for _kv in (1, 2, 4):
    family(
        f"Phi-3, {_kv} keys",
        "layers.0.self_attn",
        "o_proj",
        (4, _kv),
        "Phi3Model",
        "Phi3Config",
        num_key_value_heads=_kv,
        **WIDE,
    )
family("GPT-NeoX", "layers.0.attention", "dense", (4, 4), "GPTNeoXModel", "GPTNeoXConfig", **WIDE)
family(
    "GPT-NeoX Japanese",
    "layers.0.attention",
    "dense",
    (4, 4),
    "GPTNeoXJapaneseModel",
    "GPTNeoXJapaneseConfig",
    hidden_size=16,
    num_attention_heads=4,
    intermediate_multiple_size=2,
    **DEEP,
    **SMALL,
)
family(
    "Bloom",
    "h.0.self_attention",
    "dense",
    (4, 4),
    "BloomModel",
    "BloomConfig",
    hidden_size=16,
    n_layer=1,
    n_head=4,
    **SMALL,
)
_falcon = dict(hidden_size=16, num_attention_heads=4, num_hidden_layers=1, **SMALL)
for _alibi in (False, True):
    _end = ", alibi" if _alibi else ""
    family(
        f"Falcon, one key{_end}",
        "h.0.self_attention",
        "dense",
        (4, 1),
        "FalconModel",
        "FalconConfig",
        multi_query=True,
        alibi=_alibi,
        **_falcon,
    )
    family(
        f"Falcon, a key per head{_end}",
        "h.0.self_attention",
        "dense",
        (4, 4),
        "FalconModel",
        "FalconConfig",
        multi_query=False,
        alibi=_alibi,
        **_falcon,
    )
    family(
        f"Falcon, new{_end}",
        "h.0.self_attention",
        "dense",
        (4, 2),
        "FalconModel",
        "FalconConfig",
        new_decoder_architecture=True,
        num_kv_heads=2,
        alibi=_alibi,
        **_falcon,
    )
family(
    "Persimmon", "layers.0.self_attn", "dense", (4, 4), "PersimmonModel", "PersimmonConfig", **WIDE
)
family(
    "MPT",
    "blocks.0.attn",
    "out_proj",
    (4, 4),
    "MptModel",
    "MptConfig",
    d_model=16,
    n_heads=4,
    n_layers=1,
    max_seq_len=8,
    expansion_ratio=2,
    **SMALL,
)
family(
    "DBRX",
    "blocks.0.norm_attn_norm.attn",
    "out_proj",
    (4, 2),
    "DbrxModel",
    "DbrxConfig",
    d_model=16,
    n_heads=4,
    n_layers=1,
    max_seq_len=8,
    attn_config=dict(kv_n_heads=2, clip_qkv=50.0, rope_theta=1e4),
    ffn_config=dict(ffn_hidden_size=8, hidden_size=16, moe_num_experts=2, moe_top_k=1),
    **SMALL,
)
family(
    "Phi",
    "layers.0.self_attn",
    "dense",
    (4, 2),
    "PhiModel",
    "PhiConfig",
    num_key_value_heads=2,
    **WIDE,
)
family(
    "Qwen2",
    "layers.0.self_attn",
    "o_proj",
    (4, 2),
    "Qwen2Model",
    "Qwen2Config",
    num_key_value_heads=2,
    **WIDE,
)
family(
    "Llama",
    "layers.0.self_attn",
    "o_proj",
    (4, 2),
    "LlamaModel",
    "LlamaConfig",
    num_key_value_heads=2,
    **WIDE,
)
family(
    "OPT",
    "decoder.layers.0.self_attn",
    "out_proj",
    (4, 4),
    "OPTModel",
    "OPTConfig",
    hidden_size=16,
    num_attention_heads=4,
    ffn_dim=24,
    word_embed_proj_dim=16,
    **DEEP,
    **SMALL,
)
family(
    "BERT",
    "encoder.layer.0.attention",
    "output.dense",
    (4, 4),
    "BertModel",
    "BertConfig",
    False,
    **{**WIDE, "pad_token_id": 0},
)
family(
    "DeBERTa",
    "encoder.layer.0.attention",
    "output.dense",
    (4, 4),
    "DebertaModel",
    "DebertaConfig",
    False,
    hidden_size=16,
    num_attention_heads=4,
    intermediate_size=24,
    num_hidden_layers=1,
    vocab_size=7,
)
family(
    "ModernBERT",
    "layers.0.attn",
    "Wo",
    (4, 4),
    "ModernBertModel",
    "ModernBertConfig",
    False,
    **{**WIDE, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "reference_compile": False},
)
family(
    "ViT",
    "layers.0.attention",
    "o_proj",
    (4, 4),
    "ViTModel",
    "ViTConfig",
    False,
    IMAGES,
    image_size=8,
    patch_size=4,
    num_channels=1,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=24,
)


class Moved:
    "What the heads of an attention layer give when rows of its projections give something else at one position."

    def __init__(self, model, out, data):
        self.model, self.out, self.data = model, out, data
        self.before = self()

    @torch.no_grad()
    def __call__(self, module=None, rows=None, at=None, by=None):
        "(heads, positions, width) of the first sample, before the output projection."
        seen, hooks = [], [self.out.register_forward_pre_hook(lambda m, args: seen.append(args[0]))]

        def add(m, args, y):
            y = y.clone()
            y[..., at, rows] += by
            return y

        if module is not None:
            hooks.append(module.register_forward_hook(add))
        self.model(self.data)
        for hook in hooks:
            hook.remove()
        return seen[0].reshape(len(self.data), -1, seen[0].shape[-1])[0]

    def places(self, heads, *change):
        "[(head, position), ...] that change."
        z = (self(*change) - self.before).unflatten(-1, (heads, -1)).abs().amax(-1)
        return {(h, t) for t, h in (z > 1e-9).nonzero().tolist()}


def located(site, module):
    "The rows of its module's weight that a site holds."
    W = module.weight.detach() if isinstance(module, nn.Linear) else module.weight.detach().T
    rows = (site.W[:, None] == W.double()[None]).all(-1)
    assert (rows.sum(1) == 1).all() and (rows.sum(0) <= 1).all()
    return rows.float().argmax(1)


@needs_transformers
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_do_what_their_role_says(name):
    build, path, out, (H, K), causal, data = FAMILIES[name]
    model = build()
    modules = dict(model.named_modules())
    _, sites = nfa(
        model, data, matrices=True, probes=2, rotations=0, random_state=0, progress=False
    )
    kinds = ("query", "key", "value")
    sites = sorted(
        [s for s in sites if s.name.startswith(f"{path}.") and s.kind in kinds],
        key=lambda s: kinds.index(s.kind),
    )
    assert [(s.kind, s.head) for s in sites] == [
        (kind, h) for kind, n in (("query", H), ("key", K), ("value", K)) for h in range(n)
    ]
    rows = [(s, modules[s.name], located(s, modules[s.name])) for s in sites]
    for module in {m for _, m, _ in rows}:  # no row twice, none left out
        found = torch.cat([r for _, m, r in rows if m is module])
        assert sorted(found.tolist()) == list(
            range(getattr(module, "out_features", None) or module.nf)
        )
    moved, at = Moved(model, modules[f"{path}.{out}"], data), 2
    for site, module, some in rows:
        by = torch.randn(len(some), dtype=torch.float64)
        group = (
            [site.head]
            if site.kind == "query"
            else range(site.head * H // K, (site.head + 1) * H // K)
        )
        places = moved.places(H, module, some, at, by)
        reached = (
            {at} if site.kind == "query" else set(range(at if causal else 0, len(moved.before)))
        )
        assert places == {(h, t) for h in group for t in reached}, (site.kind, site.head)
        once, twice = (moved(module, some, at, step * by) - moved.before for step in (1, 2))
        assert torch.allclose(2 * once, twice, atol=1e-9) == (
            site.kind == "value"
        )  # attention is linear in its values only
    with torch.no_grad():
        for site, module, some in rows:
            if site.kind != "value":
                continue
            if isinstance(module, nn.Linear):
                module.weight[some] = 0
            else:
                module.weight[:, some] = 0
            if module.bias is not None:
                module.bias[some] = 0
        for p in [getattr(modules[s.name.rpartition(".")[0]], "v_bias", None) for s in sites]:
            if p is not None:
                p.zero_()  # DeBERTa keeps this bias apart
    assert not moved().any()


@needs_transformers
@pytest.mark.parametrize(
    "name", ["Phi-3, 2 keys", "GPTBigCode, a key per head", "CodeGen", "Falcon, new"]
)
def test_agop_of_scattered_rows(name):
    build, path, *_, data = FAMILIES[name]
    model = build()
    modules = dict(model.named_modules())
    output = lambda y: y.last_hidden_state[..., :3]
    _, sites = nfa(
        model, data, matrices=True, output=lambda y, _: output(y), rotations=0, progress=False
    )
    sites = [
        s for s in sites if s.name.startswith(f"{path}.") and s.kind in ("query", "key", "value")
    ]
    for site in sites[::2]:
        want = brute(model, data, modules[site.name], located(site, modules[site.name]), output)
        assert (site.agop() - want).abs().max() <= 1e-10 * want.abs().max()


@needs_transformers
def test_kinds_of_unequal_width():
    "Layers of the gated delta rule and latent attention: kinds differ in their numbers of rows."
    model = made(
        "Qwen3NextModel",
        "Qwen3NextConfig",
        **WIDE,
        num_key_value_heads=2,
        head_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=3,
        linear_value_head_dim=5,
        layer_types=["linear_attention"],
        mlp_only_layers=[0],
    )
    layer, data = model.layers[0].linear_attn, IDS
    _, sites = nfa(
        model, data, matrices=True, probes=2, rotations=0, random_state=0, progress=False
    )
    sites = [s for s in sites if s.name.endswith("in_proj_qkvz")]
    assert [(s.kind, s.head, len(s.W)) for s in sites] == [
        ("query", 0, 3),
        ("query", 1, 3),
        ("key", 0, 3),
        ("key", 1, 3),
        *(("value", h, 5) for h in range(4)),
        *(("gate", h, 5) for h in range(4)),
    ]
    q, k, v, z, *_ = layer.fix_query_key_value_ordering(
        torch.arange(52.0)[None, None], torch.zeros(1, 1, 8)
    )
    stored = dict(
        zip(("query", "key", "value", "gate"), (t[0, 0] for t in (q, k, v, z)))
    )  # the model's own split of row numbers
    for site in sites:
        assert located(site, layer.in_proj_qkvz).tolist() == stored[site.kind][site.head].tolist()
    output = lambda y: y.last_hidden_state[..., :2]
    for site in nfa(
        model, data, matrices=True, output=lambda y, _: output(y), rotations=0, progress=False
    )[1]:
        if site.name.endswith("in_proj_qkvz") and site.head == 1:
            want = brute(model, data, layer.in_proj_qkvz, stored[site.kind][1].long(), output)
            assert (
                site.agop() - want
            ).abs().max() <= 1e-6 * want.abs().max()  # the rule computes in single precision


@needs_transformers
def test_latent_attention():
    model = made(
        "DeepseekV3Model",
        "DeepseekV3Config",
        **WIDE,
        num_key_value_heads=4,
        q_lora_rank=6,
        kv_lora_rank=5,
        qk_nope_head_dim=3,
        qk_rope_head_dim=2,
        v_head_dim=4,
        first_k_dense_replace=1,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=8,
    )
    layer = model.layers[0].self_attn
    blocks = row_blocks("layers.0.self_attn.kv_b_proj", layer.kv_b_proj, layer, 28, "linear")
    assert [(kind, head) for kind, head, _ in blocks] == [
        (kind, h) for kind in ("key", "value") for h in range(4)
    ]
    asked = row_blocks("layers.0.self_attn.q_b_proj", layer.q_b_proj, layer, 20, "linear")
    assert asked == [("query", h, slice(5 * h, 5 * h + 5)) for h in range(4)]
    moved = Moved(model, layer.o_proj, IDS)
    for kind, head, rows in blocks:
        by = torch.randn(3 if kind == "key" else 4, dtype=torch.float64)
        assert moved.places(4, layer.kv_b_proj, rows, 2, by) == {(head, t) for t in range(2, 6)}
        once, twice = (moved(layer.kv_b_proj, rows, 2, step * by) - moved.before for step in (1, 2))
        assert torch.allclose(2 * once, twice, atol=1e-9) == (kind == "value")
    with torch.no_grad():
        for kind, _, rows in blocks:
            if kind == "value":
                layer.kv_b_proj.weight[rows] = 0
    assert not moved().any()


@needs_transformers
def test_gated_queries():
    model = made(
        "Qwen3NextModel",
        "Qwen3NextConfig",
        **WIDE,
        num_key_value_heads=2,
        head_dim=4,
        layer_types=["full_attention"],
        mlp_only_layers=[0],
    )
    layer = model.layers[0].self_attn
    blocks = row_blocks("layers.0.self_attn.q_proj", layer.q_proj, layer, 32, "linear")
    assert [(kind, head) for kind, head, _ in blocks] == [
        (kind, h) for kind in ("query", "gate") for h in range(4)
    ]
    moved = Moved(model, layer.o_proj, IDS)
    for kind, head, rows in blocks:
        assert moved.places(4, layer.q_proj, rows, 2, torch.randn(4, dtype=torch.float64)) == {
            (head, 2)
        }
    shut = torch.cat([torch.arange(32)[r] for kind, _, r in blocks if kind == "gate"])
    assert not moved(layer.q_proj, shut, slice(None), -1e9).any()


@needs_transformers
def test_minimax_linear_attention_is_stored_by_head():
    model = made(
        "MiniMaxModel",
        "MiniMaxConfig",
        **WIDE,
        num_key_value_heads=2,
        head_dim=4,
        layer_types=["linear_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        block_size=4,
        experts_implementation="eager",
    )
    layer = model.layers[0].self_attn
    layer.norm.forward = lambda x: x  # it mixes heads
    blocks = row_blocks("layers.0.self_attn.qkv_proj", layer.qkv_proj, layer, 48, "linear")
    moved, gate = Moved(model, layer.out_proj, IDS), layer.out_proj.in_features
    assert gate == 16
    for kind, head, rows in blocks:
        by = torch.randn(4, dtype=torch.float64)
        assert moved.places(4, layer.qkv_proj, rows, 2, by) == {
            (head, t) for t in ([2] if kind == "query" else range(2, 6))
        }
    with torch.no_grad():
        for kind, _, rows in blocks:
            if kind == "value":
                layer.qkv_proj.weight[rows] = 0
    assert not moved().any()


@needs_transformers
def test_cross_attention_shares_two_kinds():
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    layer = (
        GPT2Attention(GPT2Config(n_embd=12, n_head=3), is_cross_attention=True, layer_idx=0)
        .double()
        .eval()
    )
    blocks = row_blocks("h.0.crossattention.c_attn", layer.c_attn, layer, 24, "linear")
    assert [(kind, head) for kind, head, _ in blocks] == [
        (kind, h) for kind in ("key", "value") for h in range(3)
    ]
    assert row_blocks("h.0.crossattention.q_attn", layer.q_attn, layer, 12, "linear") == [
        ("query", h, slice(4 * h, 4 * h + 4)) for h in range(3)
    ]
    x, seen = torch.randn(1, 5, 12, dtype=torch.float64), torch.randn(1, 4, 12, dtype=torch.float64)
    with torch.no_grad():
        layer.c_proj.weight.copy_(torch.eye(12))
        before = layer(x, encoder_hidden_states=seen)[0]
        for kind, head, rows in blocks:
            kept = layer.c_attn.weight.clone()
            layer.c_attn.weight[:, rows] = 0
            change = (layer(x, encoder_hidden_states=seen)[0] - before)[0].unflatten(
                -1, (3, 4)
            ).abs().amax((0, 2)) > 1e-12
            assert change.tolist() == [h == head for h in range(3)]
            layer.c_attn.weight.copy_(kept)
        for kind, _, rows in blocks:
            if kind == "value":
                layer.c_attn.weight[:, rows] = 0
        assert not layer(x, encoder_hidden_states=seen)[0].any()


@needs_transformers
def test_mixture_of_attention_shares_keys_and_values():
    model = made(
        "JetMoeModel",
        "JetMoeConfig",
        hidden_size=16,
        kv_channels=4,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        num_local_experts=2,
        intermediate_size=8,
        experts_implementation="eager",
        **DEEP,
        **SMALL,
    )
    layer, seen = model.layers[0].self_attention, []
    blocks = row_blocks("layers.0.self_attention.kv_proj", layer.kv_proj, layer, 16, "linear")
    assert blocks == [
        (kind, h, slice(8 * i + 4 * h, 8 * i + 4 * h + 4))
        for i, kind in enumerate(("key", "value"))
        for h in range(2)
    ]
    layer.experts.bias.data.zero_()
    layer.kv_proj.weight.data[8:] = 0
    layer.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    model(IDS)
    assert not seen[0].any()


@needs_transformers
def test_heads_of_grouped_convolutions():
    model = made(
        "SqueezeBertModel",
        "SqueezeBertConfig",
        hidden_size=16,
        embedding_size=16,
        num_attention_heads=4,
        intermediate_size=16,
        num_hidden_layers=1,
        vocab_size=7,
        q_groups=2,
        k_groups=2,
        v_groups=2,
    )
    layer = model.encoder.layers[0].attention
    assert labels(layer, "query", "attention.", "conv") == THIRDS[:4]  # two heads in a group
    layer.num_attention_heads, layer.attention_head_size = 1, 16
    assert labels(layer, "query", "attention.", "conv") == [
        ("query", None)
    ]  # one head in two groups


def test_a_configuration_that_refuses_is_not_asked_again():
    class Config:
        num_heads = 4

        @property
        def head_dim(self):
            raise RuntimeError("differs from layer to layer")

    layer = Owner(q_proj=nn.Linear(16, 16), config=Config())
    assert labels(layer, "q_proj") == THIRDS[:4]


@pytest.mark.parametrize("version", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
def test_swin(version):
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    layer = getattr(swin, version)(12, [4, 4], [0, 0], 3).double().eval()
    blocks = row_blocks("features.1.0.attn.qkv", layer.qkv, layer, 36, "linear")
    assert [(kind, head) for kind, head, _ in blocks] == [
        (kind, h) for kind in ("query", "key", "value") for h in range(3)
    ]
    assert row_blocks("features.1.0.attn.proj", layer.proj, layer, 12, "linear") == [
        ("attention-out", None, slice(0, 12))
    ]
    x = torch.randn(1, 4, 4, 12, dtype=torch.float64)
    x[..., 0] = 0
    x[0, 1, 2, 0] = 1  # column 0 of a weight acts at one pixel only
    with torch.no_grad():
        layer.proj.weight.copy_(torch.eye(12))
        for p in (layer.proj.bias, layer.qkv.bias):
            p.zero_()
        before = layer(x)
        for kind, head, rows in blocks:
            kept = layer.qkv.weight.clone()
            layer.qkv.weight[rows, 0] += torch.randn(4)
            change = (layer(x) - before)[0].unflatten(-1, (3, 4)).abs().amax(-1) > 1e-9
            assert change.any(0).any(0).tolist() == [h == head for h in range(3)]
            assert int(change.any(-1).sum()) == (1 if kind == "query" else 16)
            layer.qkv.weight.copy_(kept)
        for kind, _, rows in blocks:
            if kind == "value":
                layer.qkv.weight[rows] = 0
        assert not layer(x).any()


class Owner(nn.Module):
    "A module with layers and numbers of these names."

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def labels(layer, name="qkv", path="net.", kind="linear"):
    module = getattr(layer, name)
    return [
        (k, h)
        for k, h, _ in row_blocks(f"{path}{name}", module, layer, module.weight.shape[0], kind)
    ]


THIRDS = [(kind, h) for kind in ("query", "key", "value") for h in range(4)]
NOTHING = [("linear", None)]


@pytest.mark.parametrize(
    "layer,name,want",
    [
        (Owner(in_proj=nn.Linear(6, 48)), "in_proj", NOTHING),
        (Owner(in_proj=nn.Linear(16, 48)), "in_proj", NOTHING),
        (
            Owner(in_proj=nn.Linear(16, 48), num_heads=4, out_proj=nn.Linear(16, 16)),
            "in_proj",
            THIRDS,
        ),
        (
            Owner(in_proj=nn.Linear(16, 48), num_heads=4, A_log=nn.Parameter(torch.zeros(4))),
            "in_proj",
            NOTHING,
        ),
        (
            Owner(in_proj=nn.Linear(16, 48), num_heads=4, conv1d=nn.Conv1d(16, 16, 3)),
            "in_proj",
            NOTHING,
        ),
        (Owner(action_in_proj=nn.Linear(16, 48), num_heads=4), "action_in_proj", NOTHING),
        (Owner(qkv=nn.Linear(16, 48), num_heads=4, proj=nn.Linear(16, 16)), "qkv", THIRDS),  # timm
        (Owner(qkv=nn.Conv2d(16, 48, 1), num_heads=4), "qkv", THIRDS),
        (Owner(qkv=nn.Conv2d(48, 48, 3, groups=48), num_heads=4), "qkv", NOTHING),
        (
            Owner(to_qkv=nn.Linear(16, 96), heads=4, to_out=nn.Sequential(nn.Linear(32, 16))),
            "to_qkv",
            THIRDS,
        ),
        (
            Owner(qkv=nn.Linear(16, 48)),
            "qkv",
            [("query", None), ("key", None), ("value", None)],
        ),  # one head
        (
            Owner(qkv=nn.Linear(16, 24), num_heads=4, proj=nn.Linear(16, 16)),
            "qkv",
            NOTHING,
        ),  # 16 + 4 + 4, of which nothing is said
        (
            Owner(qkv=nn.Linear(16, 24), num_heads=4, head_dim=4, proj=nn.Linear(16, 16)),
            "qkv",
            [*THIRDS[:4], ("key", 0), ("value", 0)],
        ),
        (
            Owner(Wqkv=nn.Linear(16, 32), num_heads=4, num_heads_kv=2, head_dim=4),
            "Wqkv",
            [*THIRDS[:4], *[(k, h) for k in ("key", "value") for h in range(2)]],
        ),
        (
            Owner(qkv=nn.Linear(16, 64), num_heads=4, head_dim=4),
            "qkv",
            NOTHING,
        ),  # four of something
        (
            Owner(query_key_value=nn.Linear(16, 48), num_heads=4, head_dim=4),
            "query_key_value",
            NOTHING,
        ),  # stacked or by head?
        (Owner(to_kv=nn.Linear(16, 32), heads=4), "to_kv", THIRDS[4:]),
        (
            Owner(value=nn.Linear(16, 1), policy=nn.Linear(16, 4)),
            "value",
            NOTHING,
        ),  # an actor and its critic
        (Owner(q=nn.Linear(16, 4), v=nn.Linear(16, 1)), "q", NOTHING),
        (
            Owner(q=nn.Linear(16, 16), k=nn.Linear(16, 16), v=nn.Linear(16, 16), num_heads=4),
            "q",
            THIRDS[:4],
        ),
        (
            Owner(query=nn.Linear(16, 16), key=nn.Linear(16, 16), value=nn.Linear(16, 16)),
            "value",
            [("value", None)],
        ),
        (
            Owner(k_proj=nn.Linear(16, 8), num_heads=4, num_key_value_heads=2),
            "k_proj",
            [("key", 0), ("key", 1)],
        ),
        (Owner(q_proj=nn.Linear(16, 16), num_heads=True), "q_proj", [("query", None)]),
        (
            Owner(dense=nn.Linear(16, 16), out_proj=nn.Linear(16, 2)),
            "out_proj",
            NOTHING,
        ),  # a classifier
    ],
)
def test_what_is_said_and_what_is_not(layer, name, want):
    kind = "conv" if isinstance(getattr(layer, name), nn.Conv2d) else "linear"
    got = labels(layer, name, kind=kind)
    assert got == ([("conv", None)] if want == NOTHING and kind == "conv" else want)


@needs_transformers
@pytest.mark.parametrize(
    "name,sizes",
    [("Mamba", {}), ("Mamba2", dict(num_heads=4, head_dim=8, n_groups=1)), ("FalconMamba", {})],
)
def test_state_spaces_are_no_attention(name, sizes):
    model = made(
        f"{name}Model",
        f"{name}Config",
        hidden_size=16,
        state_size=4,
        num_hidden_layers=1,
        expand=2,
        vocab_size=7,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        **sizes,
    )
    mixer = model.layers[0].mixer
    for leaf in ("in_proj", "out_proj"):
        module = getattr(mixer, leaf)
        assert row_blocks(
            f"layers.0.mixer.{leaf}", module, mixer, module.out_features, "linear"
        ) == [("linear", None, slice(0, module.out_features))]


@needs_transformers
def test_a_short_convolution_is_no_attention():
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    layer = Lfm2ShortConv(
        Lfm2Config(
            hidden_size=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=1,
            layer_types=["conv"],
        ),
        0,
    )
    assert (
        labels(layer, "in_proj", "layers.0.conv.")
        == labels(layer, "out_proj", "layers.0.conv.")
        == NOTHING
    )


def test_blocks_hold_every_row_once():
    "Whatever the numbers: a property of all layouts."
    generator = torch.Generator().manual_seed(0)
    draw = lambda *numbers: numbers[int(torch.randint(len(numbers), (), generator=generator))]
    seen = set()
    classes = {
        name: type(name, (Owner,), {})
        for name in (
            "FalconAttention",
            "CodeGenAttention",
            "GPTBigCodeAttention",
            "Attention",
            "Qwen9Attention",
        )
    }
    for _ in range(600):
        K, group, w = draw(1, 2, 3), draw(1, 2, 4), draw(1, 2, 5)
        H, leaf, name = (
            K * group,
            draw("qkv", "c_attn", "qkv_proj", "query_key_value", "in_proj", "q_proj", "to_kv"),
            draw(*classes),
        )
        said = {
            a: v
            for a, v in dict(
                num_heads=H, num_key_value_heads=K, head_dim=w, mp_num=draw(1, 2, 4)
            ).items()
            if draw(True, True, False)
        }
        rows = draw((H + 2 * K) * w, 3 * H * w, 2 * K * w, H * w, 7)
        layer = classes[name](**{leaf: nn.Linear(H * w, rows)}, **said)
        blocks = row_blocks(f"x.{leaf}", getattr(layer, leaf), layer, rows, "linear")
        held = torch.cat([torch.arange(rows)[r] for *_, r in blocks])
        assert sorted(held.tolist()) == list(range(rows))
        for kind in {kind for kind, *_ in blocks}:
            numbers = [h for k, h, _ in blocks if k == kind]
            assert numbers == [None] or numbers == list(range(len(numbers)))
        seen.add((name, leaf, len(blocks) > 1))
    assert len(seen) > 40


def test_wrapped_layers_keep_their_role():
    class Low(nn.Module):
        "What adapters do: the layer itself one level down."

        def __init__(self, base):
            super().__init__()
            self.base_layer, self.lora_A = base, nn.ModuleDict({"default": nn.Linear(16, 2)})

        def forward(self, x):
            return self.base_layer(x)

    net = Owner(
        attn=Owner(
            q_proj=Low(nn.Linear(16, 16)),
            k_proj=nn.Linear(16, 16),
            v_proj=nn.Linear(16, 16),
            num_heads=4,
        )
    )
    modules = dict(net.named_modules())
    name = "attn.q_proj.base_layer"
    assert (
        holder(name, modules) is net.attn is holder("attn.q_proj", modules)
        and holder("attn", modules) is net
        and holder("", modules) is None
    )
    assert [
        b[:2] for b in row_blocks(name, modules[name], holder(name, modules), 16, "linear")
    ] == THIRDS[:4]
    low = "attn.q_proj.lora_A.default"
    assert row_blocks(low, modules[low], holder(low, modules), 2, "linear") == [
        ("linear", None, slice(0, 2))
    ]
    assert row_blocks("attn._orig_mod.q_proj", net.attn.k_proj, net.attn, 16, "linear")[1][:2] == (
        "query",
        1,
    )
    assert row_blocks("attn._orig_mod.c_proj", net.attn.k_proj, None, 16, "linear") == [
        ("attention-out", None, slice(0, 16))
    ]


def test_adapters_of_peft():
    peft, tf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = tf.LlamaModel(tf.LlamaConfig(num_key_value_heads=2, **WIDE))
    model = (
        peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
        .double()
        .eval()
    )
    table = nfa(model, IDS, probes=2, rotations=0, random_state=0, progress=False)
    held = table[table.site.str.contains("self_attn") & ~table.site.str.contains("lora")]
    want = [
        ("query", 0),
        ("query", 1),
        ("query", 2),
        ("query", 3),
        ("key", 0),
        ("key", 1),
        ("value", 0),
        ("value", 1),
        ("attention-out", None),
    ]
    assert [
        (k, None if h is None or h != h else int(h))
        for k, h in zip(held.kind, held["head"].astype(object).where(held["head"].notna(), None))
    ] == want


def test_layers_that_say_it_themselves():
    layer = nn.Linear(3, 4)
    layer.heads = [("reset", None), ("update", None)]
    assert row_blocks("l0.gates", layer, None, 4, "linear") == [
        ("reset", None, slice(0, 2)),
        ("update", None, slice(2, 4)),
    ]
    layer.heads, layer.kind = None, "recurrent"
    assert row_blocks("l0.hidden", layer, None, 4, "linear") == [("recurrent", None, slice(0, 4))]
    layer.heads, layer.kind = 2, 7  # attributes of something else
    assert row_blocks("q_proj", layer, layer, 4, "linear") == [
        ("query", 0, slice(0, 2)),
        ("query", 1, slice(2, 4)),
    ]


def test_torch_attention_has_the_rows_that_torch_reads():
    layer = nn.MultiheadAttention(12, 3)
    blocks = row_blocks("attend.in_proj", layer, None, 36, "linear")
    assert blocks == [
        (kind, h, slice(12 * i + 4 * h, 12 * i + 4 * h + 4))
        for i, kind in enumerate(("query", "key", "value"))
        for h in range(3)
    ]
    assert row_blocks("attend.out_proj", layer.out_proj, layer, 12, "linear") == [
        ("attention-out", None, slice(0, 12))
    ]


def test_a_weight_has_the_role_of_its_layer():
    "Names of parameters, where a function of the network multiplies with them."
    swin = Owner(
        attn=Owner(qkv=nn.Linear(16, 48), proj=nn.Linear(16, 16), num_heads=4),
        attend=nn.MultiheadAttention(16, 4, kdim=8),
    )
    modules = dict(swin.named_modules())
    for name, parent, want in [
        ("attn.qkv.weight", swin.attn, THIRDS),
        ("attend.q_proj_weight", swin.attend, THIRDS[:4]),
        ("attend.v_proj_weight", swin.attend, THIRDS[8:]),
    ]:
        assert holder(name, modules) is parent
        assert [b[:2] for b in row_blocks(name, None, parent, 4 * len(want), "linear")] == want


class Holder(nn.Module):
    "A module with linear maps of these names, and perhaps a query that is a parameter."

    def __init__(self, names, query=False):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(8, 8))
        if query:
            self.query = nn.Parameter(torch.zeros(8))


def kinds(path, parent):
    return {
        n: row_blocks(f"{path}.{n}", m, parent, 8, "linear")[0][0]
        for n, m in parent.named_children()
    }


def test_the_names_of_llama():
    assert kinds("layers.0.attention", Holder(["wq", "wk", "wv", "wo"])) == dict(
        wq="query", wk="key", wv="value", wo="attention-out"
    )
    assert kinds("block.0.layer.1.DenseReluDense", Holder(["wo"])) == dict(wo="mlp-out")  # T5


@pytest.mark.parametrize(
    "path, query, want",
    [("memory", False, "linear"), ("memory", True, None), ("attn", False, None)],
)
def test_key_and_value_without_a_query(path, query, want):
    found = kinds(path, Holder(["key", "value"], query))
    assert found == dict(key=want or "key", value=want or "value")
