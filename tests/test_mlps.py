"""The networks of the lesson on MLPs, and what gradient flow of two linear layers conserves."""
import numpy as np
import pytest
import torch

from agop_book.book.mlps import ansatz_gap, balanced, flow, imbalance, velocity
from agop_book.book.perceptrons import ACTIVATIONS, MLP, power_table
from agop_book.nfa import nfa


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_has_no_bias_unless_asked_and_scales(activation):
    options = dict(width=5, depth=2, d_out=3, activation=activation)
    torch.manual_seed(0)
    plain = MLP(6, **options)
    torch.manual_seed(0)
    small = MLP(6, **options, init_scale=0.1)
    pairs = zip(plain.parameters(), small.parameters())
    assert all(torch.allclose(0.1 * p, q) for p, q in pairs)
    assert len(list(plain.parameters())) == 3 and plain(torch.randn(2, 2, 3)).shape == (2, 3)
    assert len(list(MLP(6, width=5, depth=2, bias=True).parameters())) == 6


@pytest.mark.parametrize("options, error, words", [
    (dict(d_in=3, activation="swish"), ValueError, "activation='swish'"),
    (dict(d_in=0), ValueError, "d_in=0"),
    (dict(d_in=3, depth=-1), ValueError, "depth=-1"),
    (dict(d_in=3, width=2**63), ValueError, "width=9223372036854775808"),
    (dict(d_in=3, d_out=1.5), ValueError, "d_out=1.5"),
    (dict(d_in=3, init_scale=float("nan")), ValueError, "init_scale=nan"),
    (dict(d_in=3, width=2_000_000), MemoryError, "weights.*smaller width"),
    (dict(d_in=3, width=1, depth=2**31), MemoryError, "smaller width or depth"),
])
def test_hostile_sizes_are_named(options, error, words):
    with pytest.raises(error, match=words):
        MLP(**options)


@pytest.fixture
def squares():
    "Second moments of a least-squares problem, 6 inputs and 3 outputs."
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 3))
    return x.T @ x / 50, y.T @ x / 50


def test_velocity_is_minus_the_gradient(squares):
    S, T = map(torch.from_numpy, squares)
    A = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    B = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    P = A @ B
    loss = ((P @ S) * P).sum() / 2 - (P * T).sum()
    wanted = torch.autograd.grad(-loss, (A, B))
    found = velocity(A, B, S, T)
    assert all(torch.allclose(a, b) for a, b in zip(wanted, found))


def test_flow_conserves_the_balance_and_so_the_ansatz(squares):
    S, T = squares
    rng = np.random.default_rng(0)
    times = np.linspace(0, 5, 6)
    P = 0.1 * rng.normal(size=(3, 6))
    path = flow(*balanced(P, 4, rng), S, T, times)
    assert np.allclose(path[0][0] @ path[0][1], P) and len(path) == 6
    assert max(ansatz_gap(A, B)[0] for A, B in path) < 1e-6
    assert np.linalg.norm(path[-1][0] @ path[-1][1] - P) > 0.1       # it did learn
    A, B = rng.normal(size=(3, 4)), rng.normal(size=(4, 6))
    path = flow(A, B, S, T, times)
    imbalances = [B @ B.T - A.T @ A for A, B in path]
    assert np.array_equal(imbalances, [imbalance(*pair) for pair in path])
    assert np.allclose(imbalances, imbalances[0], atol=1e-6)
    assert np.linalg.norm(imbalances[0]) > 1 and ansatz_gap(A, B)[0] > 0.1


def test_powers_of_balanced_linear_layers():
    "The power 1 / (L - l + 1) of layer l makes NFM and AGOP equal; others do not."
    rng = np.random.default_rng(0)
    turns = [np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(4)]
    sizes = np.geomspace(1, 0.3, 6)
    net = torch.nn.Sequential(*[torch.nn.Linear(6, 6, bias=False) for _ in range(3)]).double()
    with torch.no_grad():
        for layer, a, b in zip(net, turns, turns[1:]):
            layer.weight.copy_(torch.from_numpy(b * sizes @ a.T))
    x = torch.from_numpy(rng.normal(size=(4, 6)))
    _, sites = nfa(net.eval(), x, matrices=True, rotations=0, progress=False)
    table = power_table(sites, [1 / 3, 1 / 2, 1])
    for layer, best in {1: 1 / 3, 2: 1 / 2, 3: 1}.items():
        assert table[layer].idxmax() == best and table.loc[best, layer] > 1 - 1e-5
        assert table[layer].drop(best).max() < 0.999
