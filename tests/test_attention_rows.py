"""Who is query, key and value in real attention layers, checked by what the rows do."""

import importlib.util
from functools import partial

import pytest
import torch
from test_nfa import brute
from test_roles import NOTHING, THIRDS, labels, named
from torch import nn

from agop_book.nfa import nfa
from agop_book.roles import row_blocks

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


# family -> (model, path of its first attention layer, its output projection,
#            (query heads, key/value heads), causal, data)
FAMILIES = {}


def family(name, path, out, heads, cls, config, causal=True, data=None, **arguments):
    build = partial(made, cls, config, **arguments)
    FAMILIES[name] = (build, path, out, heads, causal, IDS if data is None else data)


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
    "What the heads of an attention layer give when rows of its projections change at one place."

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


KINDS = ("query", "key", "value")


FAST = dict(matrices=True, probes=2, rotations=0, random_state=0, progress=False)


def projections(model, data, path, **options):
    "The sites of queries, keys and values of one layer."
    _, sites = nfa(model, data, **{**FAST, **options})
    sites = [s for s in sites if s.name.startswith(f"{path}.") and s.kind in KINDS]
    return sorted(sites, key=lambda s: KINDS.index(s.kind))


@torch.no_grad()
def without_values(rows):
    "Set the values to zero: [(site, module, its rows), ...]."
    for site, module, some in rows:
        if site.kind != "value":
            continue
        linear = isinstance(module, nn.Linear)
        (module.weight if linear else module.weight.T)[some] = 0
        if module.bias is not None:
            module.bias[some] = 0


def moves_as_its_kind(site, moved, change, heads, causal):
    "A query decides what its own position receives, a key or value what all receive from it."
    H, K = heads
    module, some, at, by = change
    group, reached = [site.head], {at}
    if site.kind != "query":
        group = range(site.head * H // K, (site.head + 1) * H // K)
        reached = range(at if causal else 0, len(moved.before))
    assert moved.places(H, *change) == {(h, t) for h in group for t in reached}
    once, twice = (moved(module, some, at, step * by) - moved.before for step in (1, 2))
    linear = torch.allclose(2 * once, twice, atol=1e-9)  # attention is so in its values only
    return linear == (site.kind == "value")


@needs_transformers
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_do_what_their_role_says(name):
    build, path, out, (H, K), causal, data = FAMILIES[name]
    model = build()
    modules = dict(model.named_modules())
    sites = projections(model, data, path)
    counted = [(kind, h) for kind, n in zip(KINDS, (H, K, K)) for h in range(n)]
    assert [(s.kind, s.head) for s in sites] == counted
    rows = [(s, modules[s.name], located(s, modules[s.name])) for s in sites]
    for module in {m for _, m, _ in rows}:  # no row twice, none left out
        found = torch.cat([r for _, m, r in rows if m is module])
        d_out = getattr(module, "out_features", None) or module.nf
        assert sorted(found.tolist()) == list(range(d_out))
    moved = Moved(model, modules[f"{path}.{out}"], data)
    for site, module, some in rows:
        change = module, some, 2, torch.randn(len(some), dtype=torch.float64)
        assert moves_as_its_kind(site, moved, change, (H, K), causal), (site.kind, site.head)
    without_values(rows)
    for name in {site.name.rpartition(".")[0] for site in sites}:
        v_bias = getattr(modules[name], "v_bias", None)  # DeBERTa keeps this bias apart
        if v_bias is not None:
            v_bias.data.zero_()
    assert not moved().any()


def some_outputs(count):
    def output(y, batch=None):
        return y.last_hidden_state[..., :count]

    return output


@needs_transformers
@pytest.mark.parametrize(
    "name", ["Phi-3, 2 keys", "GPTBigCode, a key per head", "CodeGen", "Falcon, new"]
)
def test_agop_of_scattered_rows(name):
    build, path, *_, data = FAMILIES[name]
    model, output = build(), some_outputs(3)
    modules = dict(model.named_modules())
    for site in projections(model, data, path, output=output, probes=None)[::2]:
        want = brute(model, data, modules[site.name], located(site, modules[site.name]), output)
        assert (site.agop() - want).abs().max() <= 1e-10 * want.abs().max()


def gated_delta():
    "A layer of the gated delta rule."
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
    return model, model.layers[0].linear_attn


def fused(model, **options):
    _, sites = nfa(model, IDS, **{**FAST, **options})
    return [s for s in sites if s.name.endswith("in_proj_qkvz")]


def stored_rows(layer):
    "The model's own split of row numbers: {kind: numbers of each head}."
    numbers = torch.arange(52.0)[None, None]
    parts = layer.fix_query_key_value_ordering(numbers, torch.zeros(1, 1, 8))
    return {kind: t[0, 0].long() for kind, t in zip((*KINDS, "gate"), parts)}


@needs_transformers
def test_kinds_of_unequal_width():
    model, layer = gated_delta()
    sites, stored = fused(model), stored_rows(layer)
    sizes = {"query": (2, 3), "key": (2, 3), "value": (4, 5), "gate": (4, 5)}
    want = [(kind, h, width) for kind, (heads, width) in sizes.items() for h in range(heads)]
    assert [(s.kind, s.head, len(s.W)) for s in sites] == want
    for site in sites:
        assert located(site, layer.in_proj_qkvz).tolist() == stored[site.kind][site.head].tolist()


@needs_transformers
def test_agop_of_kinds_of_unequal_width():
    model, layer = gated_delta()
    output, stored = some_outputs(2), stored_rows(layer)
    for site in fused(model, output=output, probes=None):
        if site.head != 1:
            continue
        want = brute(model, IDS, layer.in_proj_qkvz, stored[site.kind][1], output)
        apart = (site.agop() - want).abs().max()  # the rule computes in single precision
        assert apart <= 1e-6 * want.abs().max()


def latent():
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
    return model, model.layers[0].self_attn


@torch.no_grad()
def zero_values(weight, blocks):
    for kind, _, rows in blocks:
        if kind == "value":
            weight[rows] = 0


@needs_transformers
def test_latent_attention():
    model, layer = latent()
    blocks = row_blocks("layers.0.self_attn.kv_b_proj", layer.kv_b_proj, layer, 28, "linear")
    assert named(blocks) == [(kind, h) for kind in ("key", "value") for h in range(4)]
    asked = row_blocks("layers.0.self_attn.q_b_proj", layer.q_b_proj, layer, 20, "linear")
    assert asked == [("query", h, slice(5 * h, 5 * h + 5)) for h in range(4)]
    moved = Moved(model, layer.o_proj, IDS)
    for kind, head, rows in blocks:
        by = torch.randn(3 if kind == "key" else 4, dtype=torch.float64)
        assert moved.places(4, layer.kv_b_proj, rows, 2, by) == {(head, t) for t in range(2, 6)}
        once, twice = (moved(layer.kv_b_proj, rows, 2, step * by) - moved.before for step in (1, 2))
        assert torch.allclose(2 * once, twice, atol=1e-9) == (kind == "value")
    zero_values(layer.kv_b_proj.weight, blocks)
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
    assert named(blocks) == [(kind, h) for kind in ("query", "gate") for h in range(4)]
    moved = Moved(model, layer.o_proj, IDS)
    for _, head, rows in blocks:
        by = torch.randn(4, dtype=torch.float64)
        assert moved.places(4, layer.q_proj, rows, 2, by) == {(head, 2)}
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
    layer.norm = nn.Identity()  # it mixes heads
    blocks = row_blocks("layers.0.self_attn.qkv_proj", layer.qkv_proj, layer, 48, "linear")
    moved = Moved(model, layer.out_proj, IDS)
    assert layer.out_proj.in_features == 16
    for kind, head, rows in blocks:
        by, reached = torch.randn(4, dtype=torch.float64), [2] if kind == "query" else range(2, 6)
        assert moved.places(4, layer.qkv_proj, rows, 2, by) == {(head, t) for t in reached}
    zero_values(layer.qkv_proj.weight, blocks)
    assert not moved().any()


@needs_transformers
def test_cross_attention_shares_two_kinds():
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    config = GPT2Config(n_embd=12, n_head=3)
    layer = GPT2Attention(config, is_cross_attention=True, layer_idx=0).double().eval()
    layer = layer.requires_grad_(False)
    blocks = row_blocks("h.0.crossattention.c_attn", layer.c_attn, layer, 24, "linear")
    assert named(blocks) == [(kind, h) for kind in ("key", "value") for h in range(3)]
    asked = row_blocks("h.0.crossattention.q_attn", layer.q_attn, layer, 12, "linear")
    assert asked == [("query", h, slice(4 * h, 4 * h + 4)) for h in range(3)]
    x, seen = torch.randn(1, 5, 12).double(), torch.randn(1, 4, 12).double()
    layer.c_proj.weight.copy_(torch.eye(12))
    before, weight = layer(x, encoder_hidden_states=seen)[0], layer.c_attn.weight
    for _, head, rows in blocks:
        kept = weight.clone()
        weight[:, rows] = 0
        change = layer(x, encoder_hidden_states=seen)[0] - before
        heads = change[0].unflatten(-1, (3, 4)).abs().amax((0, 2)) > 1e-12
        assert heads.tolist() == [h == head for h in range(3)]
        weight.copy_(kept)
    zero_values(weight.T, blocks)
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


@pytest.mark.parametrize("version", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
def test_swin(version):
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    layer = getattr(swin, version)(12, [4, 4], [0, 0], 3).double().eval().requires_grad_(False)
    blocks = row_blocks("features.1.0.attn.qkv", layer.qkv, layer, 36, "linear")
    assert named(blocks) == [(kind, h) for kind in KINDS for h in range(3)]
    out = row_blocks("features.1.0.attn.proj", layer.proj, layer, 12, "linear")
    assert out == [("attention-out", None, slice(0, 12))]
    x = torch.randn(1, 4, 4, 12, dtype=torch.float64)
    x[..., 0] = 0
    x[0, 1, 2, 0] = 1  # column 0 of a weight acts at one pixel only
    layer.proj.weight.copy_(torch.eye(12))
    layer.proj.bias.zero_(), layer.qkv.bias.zero_()
    before, weight = layer(x), layer.qkv.weight
    for kind, head, rows in blocks:
        kept = weight.clone()
        weight[rows, 0] += torch.randn(4)
        change = (layer(x) - before)[0].unflatten(-1, (3, 4)).abs().amax(-1) > 1e-9
        assert change.any(0).any(0).tolist() == [h == head for h in range(3)]
        assert int(change.any(-1).sum()) == (1 if kind == "query" else 16)
        weight.copy_(kept)
    zero_values(weight, blocks)
    assert not layer(x).any()


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


def test_adapters_of_peft():
    peft, tf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = tf.LlamaModel(tf.LlamaConfig(num_key_value_heads=2, **WIDE))
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    model = peft.get_peft_model(base, config).double().eval()
    _, sites = nfa(model, IDS, **FAST)
    held = [s for s in sites if "self_attn" in s.name and "lora" not in s.name]
    heads = [(kind, h) for kind, n in zip(KINDS, (4, 2, 2)) for h in range(n)]
    assert [(s.kind, s.head) for s in held] == [*heads, ("attention-out", None)]
