"Calls that multiply: a parameter in every function that is read."

import pytest
import torch
import torch.nn.functional as F
from networks import Net, compare, normal
from torch import nn

pytestmark = pytest.mark.usefixtures("seed", "nothing_left_behind")


def use_linear(W, u):
    return F.linear(u, W)


def use_at(W, u):
    return u @ W.T


def use_left(W, u):
    return (W @ u.mT).mT


def use_matmul(W, u):
    return torch.matmul(u, W.transpose(0, 1))


def use_einsum(W, u):
    return torch.einsum("...i,oi->...o", u, W)


def use_tensordot(W, u):
    return torch.tensordot(u, W, ([2], [1]))


def use_inner(W, u):
    return torch.inner(u, W)


def use_bmm(W, u):
    return torch.bmm(u, W.T.expand(len(u), -1, -1))


def use_baddbmm(W, u):
    return torch.baddbmm(u.new_zeros(1, 1, 1), u, W.T.expand(len(u), -1, -1))


def use_addmm(W, u):
    return torch.addmm(u.new_zeros(1), u.flatten(0, 1), W.T).unflatten(0, u.shape[:2])


def use_keywords(W, u):
    return F.linear(weight=W, input=u)


def use_conv(W, u):
    return F.conv1d(u.mT, W[:, :, None]).mT


def use_copy(W, u):
    return F.linear(u, W.t().contiguous().t().clone().to(torch.float64))


def use_detached(W, u):
    return F.linear(u, W.detach())


def use_data(W, u):
    return u @ W.data.T


def use_masked(W, u):
    return u @ (W * torch.ones_like(W).tril()).T


FUNCTIONS = [f for name, f in list(globals().items()) if name.startswith("use_")]


class Raw(Net):
    "A weight that is no module, used by one function after another layer."

    def __init__(self, use, d_in=4, d_out=3):
        super().__init__()
        self.first, self.W = nn.Linear(5, d_in), nn.Parameter(torch.randn(d_out, d_in))
        self.use = use

    def forward(self, x):
        return torch.tanh(
            self.use(self.W, self.at("W", torch.tanh(self.first(self.at("first", x)))))
        )


@pytest.mark.parametrize("shape", [(4, 3), (2, 6)], ids=["wide", "tall"])
@pytest.mark.parametrize("use", FUNCTIONS, ids=lambda f: f.__name__[4:])
def test_a_parameter_in_a_function(use, shape):
    model = Raw(use, *shape)
    table = compare(model, normal(3, 6, 5), {"W": "W", "first": "first"})
    assert table.attrs["coverage"] == 1 and list(table.d_out) == [shape[1], shape[0]]
