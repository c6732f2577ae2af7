"""Views of convolutional networks: what the border does to them, and how a view is measured."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from agop_book.book.views import available, border_ratio, concentration, first_operator, reflected
from agop_book.matrices import matrix_power


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@pytest.fixture
def x():
    return torch.rand(4, 3, 9, 8, generator=torch.Generator().manual_seed(1))


def test_reflection_changes_the_border_and_nothing_else(net, x):
    op = first_operator(net, x)
    zeros, mirror = (o.see(x, resize=False).double() for o in (op, reflected(op)))
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    patches = F.unfold(torch.from_numpy(padded), 3)
    direct = (matrix_power(op.matrix, 0.5) @ patches).norm(dim=1).reshape(mirror.shape)
    assert torch.allclose(mirror, direct, rtol=1e-4)
    assert torch.allclose(zeros[:, 1:-1, 1:-1], mirror[:, 1:-1, 1:-1], rtol=1e-4)
    assert (zeros[:, 0] - mirror[:, 0]).abs().max() > 0.01 * mirror.max()
    assert net[0].padding_mode == net[2].padding_mode == "zeros"


def test_a_view_is_measured_as_by_hand(x):
    views, ring, tenth = x[:, 0], [], []
    for view in views.double().numpy():
        edge = np.ones(view.shape, bool)
        edge[1:-1, 1:-1] = False
        ring.append(view[edge].mean() / view[~edge].mean())
        tenth.append(np.sort(view.ravel())[-(view.size // 10) :].sum() / view.sum())
    assert np.isclose(border_ratio(views), np.mean(ring), rtol=1e-5)
    assert np.isclose(concentration(views), np.mean(tenth), rtol=1e-5)


def test_networks_without_weights_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("AGOP_BOOK_DATA", str(tmp_path))
    networks, absent = available(["squeezenet", "vgg-digits"])
    assert list(networks) == ["vgg-digits"] and absent == ["squeezenet"]
