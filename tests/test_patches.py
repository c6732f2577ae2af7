"""Patch-AGOP of convolutional networks: the networks, the operators, what they make of photographs of every kind."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from agop_book import patches
from agop_book.agop import matrix_power
from agop_book.data import DataNotFound, UnreadableData
from agop_book.patches import CifarResNet, SmallVGG, as_photos, cifar_resnet, cnn, edge_filters, layer_grid, most_like, patch_operators


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, dilation=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double().eval()


@pytest.fixture
def x(): return torch.rand(6, 3, 16, 14, generator=torch.Generator().manual_seed(1))


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
    assert torch.allclose(op.see(x, 1, resize=False).flatten(1).double(), direct, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="direction=27.*0 to 26"): op.see(x, 27)


def test_grouped_convolutions():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 1)), torch.rand(2, 1, 4, 4)
    net = nn.Sequential(nn.Conv2d(1, 4, 1), *net).eval()
    op = patch_operators(net, x, "1")["1"]
    hidden = net[0](x).detach()
    u = F.unfold(hidden, 3).double()
    direct = torch.einsum("npj,pq,nqj->nj", u, op.matrix, u).sqrt()
    assert op.shape == (4, 3, 3) and torch.allclose(op.see(x, resize=False).flatten(1).double(), direct, rtol=1e-3)


def test_the_network_is_left_as_it_was(net, x):
    before = net(x.double())
    op = patch_operators(net, x)["2"]
    op.see(x)
    assert torch.equal(net(x.double()), before) and not net[2]._forward_pre_hooks and before.requires_grad


@pytest.mark.parametrize("image, shape", [(np.zeros((9, 8), np.uint8), (1, 3, 9, 8)), (np.zeros((9, 8, 4)), (1, 3, 9, 8)), (np.zeros((4, 9, 8)), (1, 3, 9, 8)), (np.zeros((3, 3, 4)), (1, 3, 3, 3)), (torch.zeros(3, 3, 4), (1, 3, 3, 4)), ([[0.0, 1.0]], (1, 3, 1, 2)), (np.zeros((2, 9, 8, 1)), (2, 3, 9, 8)),
                                          (Image.new("L", (8, 9)), (1, 3, 9, 8)), (Image.new("P", (8, 9)), (1, 3, 9, 8)), (torch.zeros(2, 3, 9, 8), (2, 3, 9, 8))])
def test_photographs_of_every_kind(image, shape): assert as_photos(image).shape == shape


def test_transparent_is_white_and_files_are_read(tmp_path):
    assert (as_photos(Image.new("RGBA", (3, 3), (0, 0, 0, 0))) == 1).all()
    Image.new("RGB", (4, 5), (255, 0, 0)).save(tmp_path / "red.png")
    assert as_photos(tmp_path / "red.png")[0, :, 0, 0].tolist() == [1, 0, 0]
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UnreadableData, match="text.png"): as_photos(tmp_path / "text.png")


@pytest.mark.parametrize("image, message", [(np.zeros(5), "shape"), (np.zeros((2, 5, 5)), "1, 3 or 4 channels"), (np.full((5, 5), 200.0), "divide by 255"), (np.full((5, 5), np.nan), "values")])
def test_bad_photographs(image, message):
    with pytest.raises(ValueError, match=message): as_photos(image)


def test_photographs_too_small_for_a_layer(net, x):
    with pytest.raises(ValueError, match="photos of 3 x 3 pixels .* to 2"): patch_operators(net, x)["2"].see(np.zeros((3, 3)))


def test_unknown_layers_and_networks_without_convolutions(net, x):
    vgg = SmallVGG().eval()
    with pytest.raises(ValueError, match="'conv14' .*did you mean 'conv"): patch_operators(vgg, x, "conv14")
    with pytest.raises(ValueError, match="has no 2d convolution"): patch_operators(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), x)


def test_textbook_filters_are_recognised_whatever_their_sign():
    for c, size in ((3, 3), (1, 3), (3, 7)):
        filters = edge_filters(c, size)
        found = most_like(-torch.stack(list(filters.values())))
        assert [name for name, _ in found] == list(filters) and np.allclose([v for _, v in found], 1)
        assert all(abs(f.sum()) < 1e-9 for name, f in filters.items() if name.endswith(("edge", "bar", "spot")))
    with pytest.raises(ValueError, match="size=1"): edge_filters(3, 1)


def test_grids(net, x):
    fig = layer_grid(patch_operators(net, x), [np.zeros((20, 30), np.uint8), x[0]], ["black", "noise"])
    assert len(fig.axes) == 6 and fig.axes[0].get_title() == "black"


def test_resnets():
    net = CifarResNet(20).eval()
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10) and sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 19
    with pytest.raises(ValueError, match="depth=21"): CifarResNet(21)
    with pytest.raises(ValueError, match="depth=44.*20, 32, 56"): cifar_resnet(44)
    a, b = (cifar_resnet(8, pretrained=False, random_state=s).conv1.weight for s in (0, 0))
    assert torch.equal(a, b)


def test_absent_and_damaged_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(patches, "data_roots", lambda: [("AGOP_BOOK_DATA", tmp_path)])
    with pytest.raises(DataNotFound, match="resnet20-12fca82f.th.*download=True"): cifar_resnet(20)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/resnet20-12fca82f.th").write_bytes(b"cut off")
    with pytest.raises(UnreadableData, match="get it again"): cifar_resnet(20)


def test_trained_weights_where_they_are():
    try: net, x, label = cnn("resnet20", n=16)
    except DataNotFound: pytest.skip("the CIFAR ResNet weights or images are not on this machine (AGOP_BOOK_DATA)")
    assert net(x).softmax(1).max(1).values.mean() > 0.8 and "CIFAR-10" in label


def test_squeezenet_takes_rgb():
    pytest.importorskip("torchvision")
    net = patches.squeezenet(pretrained=False)
    assert net(torch.rand(1, 3, 64, 64)).shape == (1, 512)
    try: net = patches.squeezenet()
    except DataNotFound: pytest.skip("the SqueezeNet weights are not on this machine (AGOP_BOOK_DATA)")
    raw = patches._weights("squeezenet1_1_features_from_keras.pth")["features.0.weight"]
    x = torch.rand(1, 3, 9, 9)
    bgr = 255 * x.flip(1) - torch.tensor([104.0, 117, 124])[:, None, None]
    assert torch.allclose(F.conv2d(bgr, raw, stride=2), F.conv2d(net.pixels(x), net.features[0].weight, stride=2), rtol=1e-3, atol=1e-2)


def test_unknown_names_get_near_ones():
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="did you mean 'vgg"): cnn("vgg18")


def test_a_small_network_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path)); monkeypatch.setenv("AGOP_BOOK_SCALE", "quick")
    (net, x, label), (again, *_), (initial, *_) = cnn("vgg-digits"), cnn("vgg-digits"), cnn("vgg-digits", pretrained=False)
    assert torch.equal(net(x), again(x)) and not torch.equal(net(x), initial(x)) and "digits" in label
