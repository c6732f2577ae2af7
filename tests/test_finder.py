"Which tap a weight belongs to: parts of parameters, experts, weights of layers used elsewhere."

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import FEW, Net, brute, compare, normal, same
from torch import nn

from agop_book.agop import agop
from agop_book.nfa import nfa

pytestmark = pytest.mark.usefixtures("seed", "nothing_left_behind")


class Parts(Net):
    "Pieces of one parameter: rows, columns, a transposed view, a function of it, all at once."

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        a, b = self.W.chunk(2)
        h = F.linear(self.at("a", x), a) + F.linear(self.at("b", x.sin()), b)
        h = torch.tanh(h) @ self.W[:3, 1:]
        return torch.tanh(self.at("d", h)) @ self.W.T[1:]


def test_parts_of_a_parameter():
    model, x = Parts().double(), normal(5, 4)
    table, sites = nfa(model, x, matrices=True, **FEW)
    assert list(table.site) == ["W[0:3]", "W[0:3, 1:4]", "W[:, 1:4]", "W[3:6]"]
    W = model.W.detach()
    want = {"W[0:3]": W[:3], "W[3:6]": W[3:], "W[0:3, 1:4]": W[:3, 1:].T, "W[:, 1:4]": W[:, 1:]}
    for site in sites:
        assert torch.equal(site.W, want[site.name])
    for name, at in (("W[0:3]", "a"), ("W[3:6]", "b")):
        assert same(next(s for s in sites if s.name == name).agop(), brute(model, x, at))


class Experts(Net):
    "Experts as one parameter with three axes: every sample's tokens go to two of them."

    def __init__(self, way):
        super().__init__()
        self.router, self.way = nn.Linear(4, 3), way
        self.up, self.down = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 5, 2))

    def forward(self, x):
        gates = self.router(self.at("router", x)).softmax(-1)
        return self.way(self, x, gates)


def one_by_one(m, x, gates):
    "As in transformers: the expert's number is a tensor, its tokens are gathered."
    out, top = x.new_zeros(*x.shape[:-1], 2), gates.topk(2).indices
    for e in torch.arange(3):
        at = (top == e).any(-1)
        if not at.any():
            continue
        h = torch.tanh(F.linear(m.at(f"up{int(e)}", x[at]), m.up[e]))
        out[at] += (m.at(f"down{int(e)}", h) @ m.down[e]) * gates[at][:, e, None]
    return out


def all_at_once(m, x, gates):
    "Every expert computes every token."
    each = torch.stack([m.at(f"up{e}", x.flatten(0, 1)) for e in range(3)])
    h = torch.tanh(torch.bmm(each, m.up.transpose(1, 2)))
    h = torch.stack([m.at(f"down{e}", part) for e, part in enumerate(h)])
    out = torch.baddbmm(x.new_zeros(1, 1, 2), h, m.down)
    return (out.unflatten(1, x.shape[:2]) * gates.movedim(-1, 0)[..., None]).sum(0)


def by_subscripts(m, x, gates):
    each = torch.stack([m.at(f"up{e}", x) for e in range(3)], 2)
    h = torch.tanh(torch.einsum("btei,eoi->bteo", each, m.up))
    h = torch.stack([m.at(f"down{e}", part) for e, part in enumerate(h.unbind(2))], 2)
    return torch.einsum("btei,eio->bteo", h, m.down).mul(gates[..., None]).sum(2)


def chosen(m, x, gates):
    "Every token brings the matrices of its expert along."
    e = gates.argmax(-1).flatten()
    u = x.flatten(0, 1)
    if m.cut is not None:
        u = sum(m.at(f"up{k}", u) * (e == k)[:, None] for k in range(3))
    h = torch.tanh(torch.bmm(m.up[e], u[..., None]))[..., 0]
    if m.cut is not None:
        h = sum(m.at(f"down{k}", h) * (e == k)[:, None] for k in range(3))
    out = torch.bmm(h[:, None], m.down[e].contiguous())[:, 0]
    return (out * gates.flatten(0, 1).amax(-1)[:, None]).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("way", [one_by_one, all_at_once, by_subscripts, chosen])
def test_experts(way):
    model = Experts(way)
    names = {
        "router": "router",
        **{f"{w}[{e}]": f"{w}{e}" for w in ("up", "down") for e in range(3)},
    }
    order = {
        n: names[n] for n in ("up[0]", "up[1]", "up[2]", "down[0]", "down[1]", "down[2]", "router")
    }
    table = compare(model, normal(3, 4, 4), order)
    assert table.attrs["coverage"] == 1


class Shared(Net):
    "One input for all experts: a product that is broadcast."

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.tanh(self.at("W", x) @ self.W.unsqueeze(0)[0]).square().sum(0)


def test_an_input_shared_by_experts():
    model, x = Shared().double(), normal(6, 4)
    table, sites = nfa(model, x, matrices=True, **FEW)
    assert list(table.site) == ["W[0]", "W[1]", "W[2]"]
    for site, W in zip(sites, model.W.detach()):
        each = [agop(lambda u, W=W: torch.tanh(u @ W).square(), x[i : i + 1]) for i in range(6)]
        assert same(site.agop(), sum(each) / 6)


class Grouped(nn.Module):
    "Experts that torch multiplies together, or one after the other."

    grouped = True

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x):
        own = x.sum(-1).abs().mul(7).long() % 3
        order, counts = own.argsort(stable=True), torch.bincount(own, minlength=3)
        if self.grouped:
            ends = counts.cumsum(0).to(torch.int32)
            h = torch._grouped_mm(x[order], self.W.mT, offs=ends)
        else:
            parts = x[order].split(counts.tolist())
            h = torch.cat([part @ self.W[e].T for e, part in enumerate(parts)])
        return torch.tanh(h)[order.argsort()]


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped_mm")
def test_grouped_experts_agree_with_single_ones():
    model, x, found = Grouped(), normal(12, 16).float(), []
    for model.grouped in (True, False):
        try:
            found.append(nfa(model, x, matrices=True, **FEW))
        except RuntimeError as e:
            pytest.skip(f"grouped_mm: {e}")
    (a, sites), (b, want) = found
    assert list(a.site) == list(b.site) == ["W[0]", "W[1]", "W[2]"] and a.attrs == b.attrs
    for s, w in zip(sites, want):
        assert torch.allclose(s.agop(), w.agop(), rtol=1e-4, atol=1e-6)


class Borrowed(Net):
    "A layer's weight, used by a function; another layer's by its own call."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Embedding(7, 3)

    def forward(self, x):
        h = torch.tanh(F.linear(self.at("a", x), self.a.weight, self.a.bias))
        return F.linear(self.at("c", torch.tanh(self.b(input=self.at("b", h)))), self.c.weight)


def test_the_weight_of_a_layer_in_a_function():
    table = compare(Borrowed(), normal(5, 4), {"a": "a", "b": "b", "c.weight": "c"})
    assert table.reached.all() and table.attrs["coverage"] == 1


class Pair(nn.Linear):
    "A linear layer that returns its bias apart, and masks its weight."

    def forward(self, u):
        return F.linear(u, self.weight * self.mask), self.bias


class Pairs(Net):
    def __init__(self):
        super().__init__()
        self.a, self.b = Pair(4, 5), Pair(5, 5)
        for m in (self.a, self.b):
            m.mask = torch.ones_like(m.weight).tril()

    def forward(self, x):
        y, b = self.a(self.at("a", x))
        return sum(self.b(self.at("b", torch.tanh(y + b))))


def test_a_layer_that_returns_a_tuple_and_masks_its_weight():
    model = Pairs()
    for m in (model.a, model.b):
        m.mask = m.mask.double()
    compare(model, normal(5, 4), {"a": "a", "b": "b"})
    _, sites = nfa(model, normal(5, 4), matrices=True, **FEW)
    assert torch.equal(sites[1].W, model.b.weight.detach().tril())


def test_two_layers_share_a_weight_transposed_and_not():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.enc, self.dec = nn.Linear(4, 4), nn.Linear(4, 4)
            self.dec.weight = self.enc.weight

        def forward(self, x):
            h = torch.tanh(self.dec(self.at("dec", torch.tanh(self.enc(self.at("enc", x))))))
            return torch.tanh(F.linear(self.at("back", h), self.enc.weight.t()))

    compare(Tied(), normal(5, 4), {"enc": "enc", "enc.weight": "back", "dec": "dec"})


def test_only_some_sites():
    model, x = Borrowed().double(), normal(5, 4)
    whole, some = nfa(model, x, **FEW), nfa(model, x, only="^[ac]", **FEW)
    assert (
        list(some.site) == ["a", "c.weight"]
        and np.allclose(some.pearson, whole.pearson[[0, 2]])
        and some.attrs["coverage"] == 1
    )


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from test_finder import FEW, Experts, nfa, normal, one_by_one
dist.init_process_group("gloo")
torch.manual_seed(0)
model, x = Experts(one_by_one).double(), normal(6, 4, 4)
rank, found = dist.get_rank(), []
for data in ([x] if rank else [], x.split(3)[rank]):         # at first one has no data
    table, sites = nfa(model, data, matrices=True, **FEW)
    found.append([s.agop() for s in sites] + [torch.tensor(table.attrs["coverage"])])
if not rank: torch.save(found, sys.argv[1])
dist.destroy_process_group()
"""


def test_processes_agree_on_what_was_found(two_processes):
    found = torch.load(two_processes(WORKER), weights_only=True)
    torch.manual_seed(0)
    table, sites = nfa(Experts(one_by_one).double(), normal(6, 4, 4), matrices=True, **FEW)
    for *some, share in found:
        assert float(share) == table.attrs["coverage"] and len(some) == len(sites)
        for a, b in zip(some, sites):
            assert same(a, b.agop())
