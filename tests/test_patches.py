"""Patch-AGOP of convolutional networks: the operators, and what is seen through them."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from agop_book.matrices import matrix_power
from agop_book.operators import PatchOperator, patch_operators
from agop_book.patches import edge_filters, most_like


@pytest.fixture
def net():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Conv2d(5, 4, 3, dilation=2)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    return nn.Sequential(first, nn.ReLU(), second, nn.Tanh(), *pool).double().eval()


@pytest.fixture
def x():
    return torch.rand(6, 3, 16, 14, generator=torch.Generator().manual_seed(1))


def test_a_view_is_the_norm_of_every_patch_under_the_operator(net, x):
    op = patch_operators(net, x)["2"]
    hidden = net[:2](x.double()).detach()
    direct = (matrix_power(op.matrix, 0.5) @ F.unfold(hidden, 3, dilation=2)).norm(dim=1)
    assert torch.allclose(op.see(x, resize=False).flatten(1).double(), direct, rtol=1e-4)
    assert op.see(x).shape == (6, 16, 14)


def test_one_direction_is_an_eigenvector_applied_to_patches(net, x):
    op = patch_operators(net, x, "0")["0"]
    shares, directions = op.directions(3)
    v = directions[1].flatten()
    assert torch.allclose(op.matrix @ v, shares[1] * op.matrix.trace() * v, atol=1e-10)
    direct = (v @ F.unfold(x.double(), 3, padding=1, stride=2)).abs()
    seen = op.see(x, 1, resize=False).flatten(1).double()
    assert torch.allclose(seen, direct, rtol=1e-4, atol=1e-6)
    for bad in (27, 2**63, True, 1.0):
        with pytest.raises(ValueError, match=f"direction={bad}.*0 to 26"):
            op.see(x, bad)


def test_grouped_convolutions():
    torch.manual_seed(0)
    grouped = nn.Conv2d(4, 6, 3, groups=2)
    x = torch.rand(2, 1, 4, 4)
    net = nn.Sequential(nn.Conv2d(1, 4, 1), grouped, nn.Flatten(), nn.Linear(24, 1)).eval()
    op = patch_operators(net, x, "1")["1"]
    u = F.unfold(net[0](x).detach(), 3).double()
    direct = torch.einsum("npj,pq,nqj->nj", u, op.matrix, u).sqrt()
    assert op.shape == (4, 3, 3)
    assert torch.allclose(op.see(x, resize=False).flatten(1).double(), direct, rtol=1e-3)


def padding_of(conv):
    "Pixels before and after, for rows and for columns."
    for k, d, axis in zip(conv.kernel_size, conv.dilation, (0, 1)):
        if conv.padding == "same":
            reach = d * (k - 1)
            yield reach // 2, reach - reach // 2
        else:
            p = 0 if conv.padding == "valid" else conv.padding[axis]
            yield p, p


PADS = {
    "circular": lambda i, n: i % n,
    "reflect": lambda i, n: n - 1 - abs(n - 1 - abs(i)),
    "replicate": lambda i, n: min(max(i, 0), n - 1),
    "zeros": lambda i, n: i if 0 <= i < n else None,
}


def by_hand(u, conv, matrix):
    "sqrt(u^T matrix u) for every patch: pad as the layer does, cut out the patches one by one."
    pad = PADS[conv.padding_mode]
    (h, w), (a, b) = u.shape[2:], conv.kernel_size
    (top, bottom), (left, right) = padding_of(conv)
    (dy, dx), (sy, sx) = conv.dilation, conv.stride
    rows = []
    for i in range(-top, h + bottom - dy * (a - 1), sy):
        for j in range(-left, w + right - dx * (b - 1), sx):
            at = [(pad(i + dy * y, h), pad(j + dx * x, w)) for y in range(a) for x in range(b)]
            none = u.new_zeros(u.shape[:2])
            pixels = [none if None in (y, x) else u[:, :, y, x] for y, x in at]
            patch = torch.stack(pixels, 2).flatten(1)
            rows.append((patch @ matrix * patch).sum(1).sqrt())
    return torch.stack(rows, 1)


OPTIONS = [
    dict(padding=2),
    dict(padding="same", dilation=(1, 2)),
    dict(padding=(2, 0), stride=(2, 1)),
    dict(padding=1, groups=3, stride=2),
    dict(padding="valid"),
]


@pytest.mark.parametrize("mode", PADS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_view_pads_as_its_layer_does(mode, options):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, (3, 2), padding_mode=mode, **options)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)]
    model = nn.Sequential(conv, nn.Tanh(), *pool).double().eval()
    x, R = torch.rand(2, 3, 7, 6), torch.randn(18, 3, dtype=torch.float64)
    op = PatchOperator("0", model, conv, R @ R.T)
    state = torch.random.get_rng_state()
    seen = op.see(x, resize=False)
    assert torch.equal(state, torch.random.get_rng_state())
    assert seen.shape[1:] == conv(x.double()).shape[2:]
    want = by_hand(x.double(), conv, R @ R.T)
    assert torch.allclose(seen.flatten(1).double(), want, rtol=1e-5)


class Named(nn.Module):
    "A convolution that is called by keyword."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x):
        return self.conv(input=x).mean((2, 3))


def test_a_layer_that_is_called_by_keyword():
    net, x = Named().double().eval(), torch.rand(1, 3, 5, 5)
    R = torch.rand(2, 27, dtype=torch.float64)
    op = PatchOperator("conv", net, net.conv, R.T @ R)
    want = (R @ F.unfold(x.double(), 3)).norm(dim=1)
    assert torch.allclose(op.see(x, resize=False).flatten(1).double(), want, rtol=1e-5)


def test_grey_batches_reach_a_grey_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 7 * 6, 1)).eval()
    x = torch.rand(3, 9, 8)
    with pytest.raises(ValueError, match="or 3 grey ones"):
        patch_operators(net, x)
    op = patch_operators(net, x[:, None])["0"]
    assert op.see(x[:, None]).shape == (3, 9, 8)
    with pytest.raises(ValueError, match="or 3 grey ones"):
        op.see(x)


def test_the_network_is_left_as_it_was(net, x):
    before = net(x.double())
    op = patch_operators(net, x)["2"]
    op.see(x)
    assert torch.equal(net(x.double()), before)
    assert not net[2]._forward_pre_hooks and before.requires_grad


def test_photographs_too_small_for_a_layer(net, x):
    op = patch_operators(net, x)["2"]
    with pytest.raises(ValueError, match="photos of 3 x 3 pixels .* to 2"):
        op.see(np.zeros((3, 3)))
    assert not net[2]._forward_pre_hooks


def test_unknown_layers_and_networks_without_convolutions(x):
    convs = {f"conv{i}": nn.Conv2d(3, 3, 1) for i in (11, 12, 21)}
    net = nn.Sequential()
    for name, conv in convs.items():
        net.add_module(name, conv)
    with pytest.raises(ValueError, match="'conv14' .*did you mean 'conv"):
        patch_operators(net.eval(), x, "conv14")
    with pytest.raises(ValueError, match="has no 2d convolution"):
        patch_operators(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), x)


class Spare(nn.Module):
    "One convolution in use, one that is not, one that is used by its weight alone."

    def __init__(self):
        super().__init__()
        self.a, self.spare = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.b = nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return F.conv2d(torch.tanh(self.a(x)), self.b.weight).mean((2, 3))


def test_a_layer_that_is_not_used_is_said(x):
    with pytest.warns(UserWarning, match="spare"):
        ops = patch_operators(Spare().eval(), x)
    for ask in (ops["spare"].directions, lambda: ops["spare"].see(x)):
        with pytest.raises(ValueError, match="spare is not used"):
            ask()
    with pytest.raises(ValueError, match="b is not used"):
        ops["b"].see(x)
    assert ops["a"].see(x).shape == (6, 16, 14)


@pytest.mark.parametrize("k", ["2", -1, 0, True, 2.5, None, 2**63])
def test_a_bad_number_of_directions_is_named(net, x, k):
    op = patch_operators(net, x, "0")["0"]
    with pytest.raises(ValueError, match="k="):
        op.directions(k)
    assert op.directions(100)[1].shape == (27, 3, 3, 3)


@pytest.mark.parametrize("layers", [3, [3], True, [None], 2.5])
def test_layers_that_are_no_names(net, x, layers):
    with pytest.raises(ValueError, match="layers"):
        patch_operators(net, x, layers)


def test_an_adapted_convolution_has_the_operator_of_the_sum(x):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Flatten())
    net = nn.Sequential(net, nn.Tanh()).eval()
    config = peft.LoraConfig(r=2, target_modules=["0.2"], init_lora_weights=False)
    adapted = peft.get_peft_model(net, config).eval()
    ops = patch_operators(adapted, x)
    merged = adapted.merge_and_unload().eval()
    plain = patch_operators(merged, x)
    names = [name.removeprefix("base_model.model.") for name in ops]
    assert names == list(plain) == ["0.0", "0.2"]
    for a, b in zip(ops.values(), plain.values()):
        assert torch.allclose(a.matrix, b.matrix, rtol=1e-3, atol=1e-5 * b.matrix.abs().max())
    view = ops["base_model.model.0.0"].see(x)
    assert torch.allclose(view, plain["0.0"].see(x), rtol=1e-3, atol=1e-5)


def test_textbook_filters_are_recognised_whatever_their_sign():
    for c, size in ((3, 3), (1, 3), (3, 7)):
        filters = edge_filters(c, size)
        found = most_like(-torch.stack(list(filters.values())))
        assert [name for name, _ in found] == list(filters)
        assert np.allclose([cosine for _, cosine in found], 1)
        detectors = [name for name in filters if name.endswith(("edge", "bar", "spot"))]
        assert all(abs(filters[name].sum()) < 1e-9 for name in detectors)
    with pytest.raises(ValueError, match="size=1"):
        edge_filters(3, 1)
