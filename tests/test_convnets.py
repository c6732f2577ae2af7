"""The convolutional networks of the book: their layers, their weights, their names."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from agop_book.book import convnets
from agop_book.book.convnets import (
    CifarResNet, SmallVGG, cifar_resnet, cnn, read_weights, squeezenet
)
from agop_book.book.data import DataNotFound, UnreadableData


@pytest.mark.parametrize("n", [0, -1, True, 2.5])
def test_a_bad_number_of_images_is_named(n):
    with pytest.raises(ValueError, match="n="):
        cnn("resnet20", False, n=n)


def test_resnets():
    net = CifarResNet(20).eval()
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 19
    with pytest.raises(ValueError, match="depth=21"):
        CifarResNet(21)
    with pytest.raises(ValueError, match="depth=44.*20, 32, 56"):
        cifar_resnet(44)
    a, b = (cifar_resnet(8, pretrained=False, random_state=s).conv1.weight for s in (0, 0))
    assert torch.equal(a, b)


def test_a_vgg_for_every_kind_of_image():
    "Layers by name, in the order in which they act, and outputs for all sizes."
    net = SmallVGG(1, 7, widths=(4, 6)).eval()
    assert [name for name, _ in net.named_children()] == [
        "pixels", "conv11", "bn11", "relu11", "conv12", "bn12", "relu12", "pool1",
        "conv21", "bn21", "relu21", "conv22", "bn22", "relu22", "pool2",
        "pool", "flat", "fc1", "relu", "fc2",
    ]
    for size in (8, 33):
        assert net(torch.rand(2, 1, size, size)).shape == (2, 7)


def test_absent_and_damaged_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(convnets, "data_roots", lambda: [("AGOP_BOOK_DATA", tmp_path)])
    with pytest.raises(DataNotFound, match="resnet20-12fca82f.th.*download=True"):
        cifar_resnet(20)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/resnet20-12fca82f.th").write_bytes(b"cut off")
    with pytest.raises(UnreadableData, match="get it again"):
        cifar_resnet(20)


def test_trained_weights_where_they_are():
    try:
        net, x, label = cnn("resnet20", n=16)
    except DataNotFound:
        pytest.skip("the CIFAR ResNet weights or images are not on this machine (AGOP_BOOK_DATA)")
    assert net(x).softmax(1).max(1).values.mean() > 0.8 and "CIFAR-10" in label


def test_squeezenet_takes_rgb():
    pytest.importorskip("torchvision")
    net = squeezenet(pretrained=False)
    assert net(torch.rand(1, 3, 64, 64)).shape == (1, 512)
    try:
        net = squeezenet()
    except DataNotFound:
        pytest.skip("the SqueezeNet weights are not on this machine (AGOP_BOOK_DATA)")
    raw = read_weights("squeezenet1_1_features_from_keras.pth")["features.0.weight"]
    x = torch.rand(1, 3, 9, 9)
    bgr = 255 * x.flip(1) - torch.tensor([104.0, 117, 124])[:, None, None]
    want = F.conv2d(bgr, raw, stride=2)
    found = F.conv2d(net.pixels(x), net.features[0].weight, stride=2)
    assert torch.allclose(want, found, rtol=1e-3, atol=1e-2)


def test_unknown_names_get_near_ones():
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="did you mean 'vgg"):
        cnn("vgg18")


def test_a_small_network_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path))
    monkeypatch.setenv("AGOP_BOOK_SCALE", "quick")
    net, x, label = cnn("vgg-digits")
    again, initial = cnn("vgg-digits").model, cnn("vgg-digits", pretrained=False)
    assert torch.equal(net(x), again(x)) and not torch.equal(net(x), initial.model(x))
    assert label.startswith("small VGG trained on scikit-learn digits")
    assert initial.label.startswith("untrained small VGG on scikit-learn digits")
    assert np.allclose(x.cpu(), initial.images.cpu())
