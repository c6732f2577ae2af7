"""How rows of a weight are shared out: what names and numbers say, and where they say nothing."""

import pytest
import torch
from torch import nn

from agop_book.roles import holder, row_blocks


class Owner(nn.Module):
    "A module with layers and numbers of these names."

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def named(blocks):
    "(kind, head) of each block."
    return [(kind, head) for kind, head, _ in blocks]


def labels(layer, name="qkv", path="net.", kind="linear"):
    module = getattr(layer, name)
    return named(row_blocks(f"{path}{name}", module, layer, module.weight.shape[0], kind))


THIRDS = [(kind, h) for kind in ("query", "key", "value") for h in range(4)]


NOTHING = [("linear", None)]


def test_a_configuration_that_refuses_is_not_asked_again():
    class Config:
        num_heads = 4

        @property
        def head_dim(self):
            raise RuntimeError("differs from layer to layer")

    layer = Owner(q_proj=nn.Linear(16, 16), config=Config())
    assert labels(layer, "q_proj") == THIRDS[:4]


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


LEAVES = ("qkv", "c_attn", "qkv_proj", "query_key_value", "in_proj", "q_proj", "to_kv")


CLASSES = ("FalconAttention", "CodeGenAttention", "GPTBigCodeAttention", "Attention")


def random_layout(draw):
    "(class, name of the weight, module that holds it, rows)."
    K, group, w = draw(1, 2, 3), draw(1, 2, 4), draw(1, 2, 5)
    H, leaf, name = K * group, draw(*LEAVES), draw(*CLASSES, "Qwen9Attention")
    numbers = dict(num_heads=H, num_key_value_heads=K, head_dim=w, mp_num=draw(1, 2, 4))
    said = {a: v for a, v in numbers.items() if draw(True, True, False)}
    rows = draw((H + 2 * K) * w, 3 * H * w, 2 * K * w, H * w, 7)
    layer = type(name, (Owner,), {})(**{leaf: nn.Linear(H * w, rows)}, **said)
    return name, leaf, layer, rows


def test_blocks_hold_every_row_once():
    "Whatever the numbers: a property of all layouts."
    generator, seen = torch.Generator().manual_seed(0), set()

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for _ in range(600):
        name, leaf, layer, rows = random_layout(draw)
        blocks = row_blocks(f"x.{leaf}", getattr(layer, leaf), layer, rows, "linear")
        held = torch.cat([torch.arange(rows)[r] for *_, r in blocks])
        assert sorted(held.tolist()) == list(range(rows))
        for kind in {kind for kind, *_ in blocks}:
            numbers = [h for k, h, _ in blocks if k == kind]
            assert numbers == [None] or numbers == list(range(len(numbers)))
        seen.add((name, leaf, len(blocks) > 1))
    assert len(seen) > 40


class Low(nn.Module):
    "What adapters do: the layer itself one level down."

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A = base, nn.ModuleDict({"default": nn.Linear(16, 2)})

    def forward(self, x):
        return self.base_layer(x)


def test_wrapped_layers_keep_their_role():
    k, v = nn.Linear(16, 16), nn.Linear(16, 16)
    attn = Owner(q_proj=Low(nn.Linear(16, 16)), k_proj=k, v_proj=v, num_heads=4)
    net = Owner(attn=attn)
    modules = dict(net.named_modules())
    name = "attn.q_proj.base_layer"
    assert holder(name, modules) is attn is holder("attn.q_proj", modules)
    assert holder("attn", modules) is net and holder("", modules) is None
    found = row_blocks(name, modules[name], holder(name, modules), 16, "linear")
    assert named(found) == THIRDS[:4]
    low = "attn.q_proj.lora_A.default"
    found = row_blocks(low, modules[low], holder(low, modules), 2, "linear")
    assert found == [("linear", None, slice(0, 2))]
    found = row_blocks("attn._orig_mod.q_proj", k, attn, 16, "linear")
    assert named(found)[1] == ("query", 1)
    found = row_blocks("attn._orig_mod.c_proj", k, None, 16, "linear")
    assert found == [("attention-out", None, slice(0, 16))]


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
