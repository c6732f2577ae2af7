"What the tests of nfa share: networks that say what goes into their weights, and the oracle."

import torch
from torch import nn

from agop_book.nfa import nfa


FEW = dict(rotations=0, progress=False, random_state=0)


def normal(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    "A network that says what goes into a weight: `self.at(name, u)`, which the oracle replaces."

    cut = None

    def at(self, name, u):
        return u if self.cut is None else self.cut(name, u)


def brute(model, x, name):
    "AGOP at the input of one weight: a leaf for each input, one sample and one output at a time."
    total = 0
    for i in range(len(x)):
        leaves = []

        def cut(at, u):
            if at != name:
                return u
            leaves.append(u.detach().clone().requires_grad_())
            return leaves[-1] + (u - u.detach())

        model.cut = cut
        y = model(x[i : i + 1]).flatten()
        model.cut = None
        for o in y:
            for g in torch.autograd.grad(o, leaves, retain_graph=True, allow_unused=True):
                if g is not None:
                    total = total + g.flatten(0, -2).T @ g.flatten(0, -2) / len(x)
    return total


def same(a, b, tol=1e-10):
    return a.shape == b.shape and float((a - b).abs().max()) <= tol * float(b.abs().max())


def compare(model, x, sites, **kw):
    "The table, every site against its oracle; `sites`: name in the table -> name in `at`."
    model = model.double().eval()
    table, found = nfa(model, x, matrices=True, **FEW, **kw)
    assert list(table.site) == list(sites)
    for site in found:
        assert same(site.agop(), brute(model, x, sites[site.name])), site.name
    return table


def small():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()


class Unheard(torch.autograd.Function):
    "A product that nobody can hear."

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(W)
        return x @ W

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.saved_tensors[0].T, None
