"""Patch-AGOP of convolutional networks: the networks, the operators, what they make of photographs of every kind."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from agop_book import patches
from agop_book.agop import matrix_power
from agop_book.book.sources import DataNotFound, UnreadableData
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
    for bad in (27, 2**63, True, 1.0):
        with pytest.raises(ValueError, match=f"direction={bad}.*0 to 26"): op.see(x, bad)


def test_grouped_convolutions():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 1)), torch.rand(2, 1, 4, 4)
    net = nn.Sequential(nn.Conv2d(1, 4, 1), *net).eval()
    op = patch_operators(net, x, "1")["1"]
    hidden = net[0](x).detach()
    u = F.unfold(hidden, 3).double()
    direct = torch.einsum("npj,pq,nqj->nj", u, op.matrix, u).sqrt()
    assert op.shape == (4, 3, 3) and torch.allclose(op.see(x, resize=False).flatten(1).double(), direct, rtol=1e-3)


def by_hand(u, conv, matrix):
    "sqrt(u^T matrix u) for every patch: pad as the layer does, cut out the patches one by one."
    height, width = ([d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2] if conv.padding == "same" else [0, 0] if conv.padding == "valid" else [p, p]
                     for p, d, k in zip((0, 0) if isinstance(conv.padding, str) else conv.padding, conv.dilation, conv.kernel_size))
    index = {"circular": lambda i, n: i % n, "reflect": lambda i, n: n - 1 - abs(n - 1 - abs(i)), "replicate": lambda i, n: min(max(i, 0), n - 1), "zeros": lambda i, n: i if 0 <= i < n else None}[conv.padding_mode]
    (h, w), rows = u.shape[2:], []
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
    for i in range(-height[0], h + height[1] - reach[0], conv.stride[0]):
        for j in range(-width[0], w + width[1] - reach[1], conv.stride[1]):
            at = [(index(i + a * conv.dilation[0], h), index(j + b * conv.dilation[1], w)) for a in range(conv.kernel_size[0]) for b in range(conv.kernel_size[1])]
            patch = torch.stack([u.new_zeros(u.shape[:2]) if None in (y, x) else u[:, :, y, x] for y, x in at], 2).flatten(1)
            rows.append((patch @ matrix * patch).sum(1).sqrt())
    return torch.stack(rows, 1)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("options", [dict(padding=2), dict(padding="same", dilation=(1, 2)), dict(padding=(2, 0), stride=(2, 1)), dict(padding=1, groups=3, stride=2), dict(padding="valid")], ids=str)
def test_a_view_pads_as_its_layer_does(mode, options):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, (3, 2), padding_mode=mode, **options)
    model, x = nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)).double().eval(), torch.rand(2, 3, 7, 6)
    R = torch.randn(18, 3, dtype=torch.float64)
    op = patches.PatchOperator("0", model, conv, R @ R.T)
    state = torch.random.get_rng_state()
    seen = op.see(x, resize=False)
    assert torch.equal(state, torch.random.get_rng_state()) and seen.shape[1:] == conv(x.double()).shape[2:]
    assert torch.allclose(seen.flatten(1).double(), by_hand(x.double(), conv, R @ R.T), rtol=1e-5)


def test_a_layer_that_is_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)
        def forward(self, x): return self.conv(input=x).mean((2, 3))
    net, R, x = Named().double().eval(), torch.rand(2, 27, dtype=torch.float64), torch.rand(1, 3, 5, 5)
    op = patches.PatchOperator("conv", net, net.conv, R.T @ R)
    assert torch.allclose(op.see(x, resize=False).flatten(1).double(), (R @ F.unfold(x.double(), 3)).norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("make", [torch.rand, np.random.default_rng(0).random])
def test_three_axes_are_one_picture_or_a_question(make):
    size = lambda *s: make(*s) if make is torch.rand else make(s)
    assert as_photos(size(3, 9, 8)).shape == (1, 3, 9, 8)                            # torchvision's convention
    for n in (3, 4):
        with pytest.raises(ValueError, match=rf"images has shape \({n}, 9, 8\): one picture of {n} channels, or {n} grey ones.*images\[None\].*images\[:, None\]"): as_photos(size(n, 9, 8), 1)
    x = size(3, 9, 8)
    assert as_photos(x[:, None], 1).shape == (3, 1, 9, 8) and as_photos(x[None], 1).shape == (1, 1, 9, 8)
    assert np.allclose(as_photos(x[:, None], 1)[1, 0], x[1])
    for shape in ((9, 8), (1, 9, 8)): assert as_photos(size(*shape), 1).shape == (1, 1, 9, 8)
    with pytest.raises(ValueError, match=r"batch of grey images pass images\[:, None\]"): as_photos(size(5, 9, 8), 1)


def test_grey_batches_reach_a_grey_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 7 * 6, 1)).eval()
    x = torch.rand(3, 9, 8)
    with pytest.raises(ValueError, match="or 3 grey ones"): patch_operators(net, x)
    op = patch_operators(net, x[:, None])["0"]
    assert op.see(x[:, None]).shape == (3, 9, 8)
    with pytest.raises(ValueError, match="or 3 grey ones"): op.see(x)


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


@pytest.mark.parametrize("image", [np.ones((5, 5)) * 1j, torch.ones(5, 5) * 1j, np.ma.masked_array(np.ones((5, 5)), np.eye(5)), np.full((5, 5), "2020", "datetime64[D]")])
def test_what_is_no_photograph(image):
    with pytest.raises((TypeError, ValueError), match="images (is complex|holds|has)"): as_photos(image)


def test_photographs_too_small_for_a_layer(net, x):
    with pytest.raises(ValueError, match="photos of 3 x 3 pixels .* to 2"): patch_operators(net, x)["2"].see(np.zeros((3, 3)))


def test_unknown_layers_and_networks_without_convolutions(net, x):
    vgg = SmallVGG().eval()
    with pytest.raises(ValueError, match="'conv14' .*did you mean 'conv"): patch_operators(vgg, x, "conv14")
    with pytest.raises(ValueError, match="has no 2d convolution"): patch_operators(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), x)


class Spare(nn.Module):
    "One convolution in use, one that is not, one that is used by its weight alone."

    def __init__(self):
        super().__init__()
        self.a, self.spare, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return F.conv2d(torch.tanh(self.a(x)), self.b.weight).mean((2, 3))


def test_a_layer_that_is_not_used_is_said(x):
    with pytest.warns(UserWarning, match="spare"): ops = patch_operators(Spare().eval(), x)
    for ask in (ops["spare"].directions, lambda: ops["spare"].see(x)):
        with pytest.raises(ValueError, match="spare is not used"): ask()
    with pytest.raises(ValueError, match="b is not used"): ops["b"].see(x)
    assert ops["a"].see(x).shape == (6, 16, 14)


@pytest.mark.parametrize("k", ["2", -1, 0, True, 2.5, None, 2**63])
def test_a_bad_number_of_directions_is_named(net, x, k):
    op = patch_operators(net, x, "0")["0"]
    with pytest.raises(ValueError, match="k="): op.directions(k)
    assert op.directions(100)[1].shape == (27, 3, 3, 3)


@pytest.mark.parametrize("layers", [3, [3], True, [None], 2.5])
def test_layers_that_are_no_names(net, x, layers):
    with pytest.raises(ValueError, match="layers"): patch_operators(net, x, layers)


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
    assert [name.removeprefix("base_model.model.") for name in ops] == list(plain) == ["0.0", "0.2"]
    for a, b in zip(ops.values(), plain.values()):
        assert torch.allclose(a.matrix, b.matrix, rtol=1e-3, atol=1e-5 * b.matrix.abs().max())
    view = ops["base_model.model.0.0"].see(x)
    assert torch.allclose(view, plain["0.0"].see(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n", [0, -1, True, 2.5])
def test_a_bad_number_of_images_is_named(n):
    with pytest.raises(ValueError, match="n="): cnn("resnet20", False, n=n)


def test_grids_take_one_path_and_ask_for_every_title(net, x, tmp_path):
    op = patch_operators(net, x, "0")["0"]
    Image.new("RGB", (16, 14)).save(tmp_path / "photo.png")
    for photo in (tmp_path / "photo.png", str(tmp_path / "photo.png")):
        assert len(layer_grid([op], photo).axes) == 2
    for titles in (["one"], [], "abcdef"):
        with pytest.raises(ValueError, match="titles"): layer_grid([op], x, titles)
    with pytest.raises(ValueError, match="photos is empty"): layer_grid([op], [])


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
