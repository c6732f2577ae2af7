"Whole families of the hub: transformers, mixtures of experts, adapters (tiny, random weights)."

import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import FEW, same
from torch import nn

from agop_book.nfa import nfa

pytestmark = pytest.mark.usefixtures("seed", "nothing_left_behind")


IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 0]])


SMALL = dict(
    vocab_size=7,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    use_cache=False,
    num_hidden_layers=2,
)


MOE = dict(
    hidden_size=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts_per_tok=2,
    max_position_embeddings=8,
)


def needs(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def hub(cls, config, **arguments):
    needs("transformers")
    import transformers

    if not hasattr(transformers, cls):
        pytest.skip(f"this transformers has no {cls}")
    config = getattr(transformers, config)(**{**SMALL, **arguments})
    config._experts_implementation = "eager"  # the grouped product of torch knows no float64
    model = getattr(transformers, cls)(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.4)
    return model, IDS


def swin():
    needs("torchvision")
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=3), torch.randn(
        2, 3, 8, 8
    )


def mixtral():
    return hub(
        "MixtralForCausalLM", "MixtralConfig", intermediate_size=6, num_local_experts=3, **MOE
    )


def olmoe():
    return hub("OlmoeForCausalLM", "OlmoeConfig", intermediate_size=6, num_experts=3, **MOE)


def gpt_oss():
    return hub(
        "GptOssForCausalLM",
        "GptOssConfig",
        intermediate_size=6,
        num_local_experts=3,
        head_dim=4,
        layer_types=["full_attention"] * 2,
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
        **MOE,
    )


def deepseek():
    return hub(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        intermediate_size=6,
        moe_intermediate_size=6,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=4,
        kv_lora_rank=4,
        qk_rope_head_dim=2,
        qk_nope_head_dim=4,
        v_head_dim=4,
        **{**MOE, "num_key_value_heads": 2},
    )


def deberta():
    "Its projections also act on a table of distances, which all samples share."
    return hub(
        "DebertaV2ForTokenClassification",
        "DebertaV2Config",
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=6,
        relative_attention=True,
        max_relative_positions=4,
        position_buckets=2,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        pad_token_id=0,
        max_position_embeddings=8,
    )


def mamba():
    return hub(
        "MambaForCausalLM",
        "MambaConfig",
        hidden_size=8,
        state_size=3,
        expand=2,
        conv_kernel=2,
        time_step_rank=2,
    )


def gpt2(**more):
    return hub(
        "GPT2LMHeadModel",
        "GPT2Config",
        n_positions=8,
        n_embd=6,
        n_layer=2,
        n_head=3,
        num_hidden_layers=2,
        **more,
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_transformers(reentrant):
    model, batch = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    want = nfa(model.eval(), batch, **FEW)
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    assert nfa(model.train(), batch, **FEW).equals(
        want
    )  # without dropout, training mode is harmless


class Shifts:
    "Zeros added to every input of some weights: the AGOP is made of the gradients at them."

    def __init__(self, sites):
        self.sites, self.leaves = sites, [[] for _ in sites]

    def __call__(self, x, w, y):
        "The output `y` = x w^T with the shifts of all sites whose rows stand in `w`."
        for site, leaves in zip(self.sites, self.leaves):
            rows, W = len(site.W), site.W
            if w.ndim != 2 or w.shape[1] != W.shape[1] or len(w) < rows:
                continue
            first = next(
                (r for r in range(0, len(w) - rows + 1) if torch.equal(w[r : r + rows], W)), None
            )
            if first is None:
                continue
            leaves.append(torch.zeros(*x.shape[:-1], W.shape[1], dtype=x.dtype, requires_grad=True))
            y = y + F.pad(
                torch.mul(leaves[-1].unsqueeze(-2), W).sum(-1), (first, len(w) - first - rows)
            )
        return y


def patched(monkeypatch, shifts):
    linear, addmm, matmul = F.linear, torch.addmm, torch.Tensor.__matmul__
    monkeypatch.setattr(
        F,
        "linear",
        lambda input, weight, bias=None: shifts(input, weight, linear(input, weight, bias)),
    )
    monkeypatch.setattr(torch, "addmm", lambda b, x, w: shifts(x, w.T, addmm(b, x, w)))

    def at(a, b):
        if b.ndim == 2:
            return shifts(a, b.T, matmul(a, b))
        return shifts(b.mT, a, matmul(a, b).mT).mT if a.ndim == 2 else matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", at)


def by_hand(model, batch, sites, monkeypatch, layers=()):
    "AGOP of every site, sample by sample; `layers`: [(module, matrix)] get zeros at their output."
    total = [0.0] * len(sites)
    for i in range(len(batch)):
        shifts = Shifts(sites)
        with monkeypatch.context() as patch:
            if not layers:
                patched(patch, shifts)
            hooks = [
                m.register_forward_hook(lambda m, args, out, W=W: shifts(args[0], W, out))
                for m, W in layers
            ]
            y = model(batch[i : i + 1])
            for hook in hooks:
                hook.remove()
        leaves = [leaf for some in shifts.leaves for leaf in some]
        for o in getattr(y, "logits", y).flatten():
            grads = iter(torch.autograd.grad(o, leaves, retain_graph=True, allow_unused=True))
            for k, some in enumerate(shifts.leaves):
                for g in (next(grads) for _ in some):
                    if g is not None:
                        total[k] = total[k] + g.flatten(0, -2).T @ g.flatten(0, -2) / len(batch)
    return total


@pytest.mark.parametrize(
    "build,least",
    [
        (swin, 1.0),
        (mixtral, 0.7),
        (olmoe, 0.7),
        (gpt_oss, 0.7),
        (deepseek, 0.7),
        (mamba, 0.85),
        (deberta, 1.0),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_family(build, least, monkeypatch):
    model, batch = build()
    model = model.double().eval()
    batch = batch.double() if batch.is_floating_point() else batch
    monkeypatch.setattr(
        torch, "float32", torch.float64
    )  # transformers takes norms and routes in single precision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an expert without a token, Mamba's A
        table, sites = nfa(model, batch, matrices=True, **FEW)
    counted = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.ndim > 1 and "embed" not in n and "bias" not in n
    )
    seen = sum(s.weight.numel() for s in sites if s.reached)
    assert table.attrs["coverage"] >= least and (
        build is mamba or table.attrs["coverage"] == pytest.approx(seen / counted)
    )
    sites = [s for s in sites if s.kind != "conv"]  # convolutions are in test_nfa
    for site, G in zip(sites, by_hand(model, batch, sites, monkeypatch)):
        assert torch.is_tensor(G) == site.reached, site.name
        if site.reached:
            assert same(site.agop(), G, 1e-8), site.name


def adapted(**options):
    needs("peft")
    import peft

    model, batch = gpt2()
    config = {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**config)).double().eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.normal_(0, 0.4)
    return model, batch


def in_state(state):
    "GPT-2 with adapters that are one, with magnitudes, two, merged or off."
    model, batch = adapted(use_dora=state == "dora")
    if state == "two":
        import peft

        more = peft.LoraConfig(r=1, target_modules=["c_fc"], fan_in_fan_out=True)
        model.add_adapter("more", more)
        model.base_model.set_adapter(["default", "more"])
        for n, p in model.named_parameters():
            if ".more." in n:
                nn.init.normal_(p, 0, 0.4)
        model.double().eval()
    if state == "merged":
        model.merge_adapter()
    if state == "off":
        model.base_model.disable_adapter_layers()
    return model, batch


def weights_by_hand(model, state):
    "[(name, layer, W0 + s B A), ...] from the formulas of LoRA and DoRA."
    layers = []
    for name, m in model.named_modules():
        if not hasattr(m, "lora_A"):
            continue
        W = m.base_layer.weight.detach().T.clone()
        for a in m.lora_A if state in ("apart", "two", "dora") else ():
            W += m.scaling[a] * m.lora_B[a].weight.detach() @ m.lora_A[a].weight.detach()
        if state == "dora":
            magnitude = m.lora_magnitude_vector["default"].weight.detach()
            W *= (magnitude / W.norm(dim=1))[:, None]
        layers.append((name, m, W))
    return layers


@pytest.mark.parametrize("state", ["apart", "dora", "two", "merged", "off"])
def test_adapters_are_part_of_the_weight(state, monkeypatch):
    model, batch = in_state(state)
    layers = weights_by_hand(model, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table, sites = nfa(model, batch, matrices=True, **FEW)
    plain, wanted = nfa(gpt2()[0].double().eval(), batch, matrices=True, **FEW)
    assert list(table.site.str.removeprefix("base_model.model.")) == list(plain.site)
    assert list(table.kind) == list(plain.kind) and list(table["head"]) == list(plain["head"])
    for name, _, W in layers:
        assert torch.allclose(
            torch.cat([s.W for s in sites if s.name == name]), W, rtol=0, atol=1e-12
        )
    exact = [s for s in sites if any(s.name == name for name, *_ in layers)]
    for site in exact:
        site.weight = torch.cat([W for n, _, W in layers if n == site.name])[_rows(site, layers)][
            None
        ]
    found = by_hand(model, batch, exact, monkeypatch, [(m, W) for _, m, W in layers])
    for site, G in zip(exact, found):
        assert same(site.agop(), G, 1e-8), site.name
    if state in ("apart", "two"):
        assert table.attrs["coverage"] == 1


def test_adapters_on_experts(monkeypatch):
    needs("peft")
    import peft

    model, batch = mixtral()
    targets = dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets)).double().eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, 0, 0.4)
    monkeypatch.setattr(torch, "float32", torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table, sites = nfa(model, batch, matrices=True, **FEW)
    ours = [s for s in sites if "experts.gate_up_proj[" in s.name]
    assert len(ours) >= 3 and not any("lora" in name for name in table.site)
    wrapper = next(m for m in model.modules() if type(m).__name__ == "ParamWrapper")
    merged = wrapper.get_param().detach() + wrapper.get_delta_weight("default").detach()
    for site in ours[:2]:
        assert "layers.0" in site.name and torch.allclose(site.W, merged[int(site.name[-2])])
    for site, G in zip(ours, by_hand(model, batch, ours, monkeypatch)):
        assert same(site.agop(), G, 1e-8), site.name


def _rows(site, layers):
    "Which rows of its layer a site is."
    W = next(W for n, _, W in layers if n == site.name)
    first = next(
        r
        for r in range(len(W))
        if torch.allclose(W[r : r + len(site.W)], site.W, rtol=0, atol=1e-12)
    )
    return slice(first, first + len(site.W))
