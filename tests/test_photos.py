"""Photographs of every kind as a network takes them, and pictures of what is seen of them."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from agop_book.files import UnreadableData
from agop_book.operators import patch_operators
from agop_book.photos import as_photos, as_rgb, layer_grid


@pytest.mark.parametrize("family", ["torch", "numpy"])
def test_three_axes_are_one_picture_or_a_question(family):
    rng = np.random.default_rng(0)

    def size(*shape):
        x = rng.random(shape)
        return torch.from_numpy(x) if family == "torch" else x

    assert as_photos(size(3, 9, 8)).shape == (1, 3, 9, 8)  # torchvision's convention
    for n in (3, 4):
        question = (
            rf"images has shape \({n}, 9, 8\): one picture of {n} channels, or {n} grey ones"
            r".*images\[None\].*images\[:, None\]"
        )
        with pytest.raises(ValueError, match=question):
            as_photos(size(n, 9, 8), 1)
    x = size(3, 9, 8)
    assert as_photos(x[:, None], 1).shape == (3, 1, 9, 8)
    assert as_photos(x[None], 1).shape == (1, 1, 9, 8)
    assert np.allclose(as_photos(x[:, None], 1)[1, 0], x[1])
    for shape in ((9, 8), (1, 9, 8)):
        assert as_photos(size(*shape), 1).shape == (1, 1, 9, 8)
    with pytest.raises(ValueError, match=r"batch of grey images pass images\[:, None\]"):
        as_photos(size(5, 9, 8), 1)


KINDS = [
    (np.zeros((9, 8), np.uint8), (1, 3, 9, 8)),
    (np.zeros((9, 8, 4)), (1, 3, 9, 8)),
    (np.zeros((4, 9, 8)), (1, 3, 9, 8)),
    (np.zeros((3, 3, 4)), (1, 3, 3, 3)),
    (torch.zeros(3, 3, 4), (1, 3, 3, 4)),
    ([[0.0, 1.0]], (1, 3, 1, 2)),
    (np.zeros((2, 9, 8, 1)), (2, 3, 9, 8)),
    (Image.new("L", (8, 9)), (1, 3, 9, 8)),
    (Image.new("P", (8, 9)), (1, 3, 9, 8)),
    (torch.zeros(2, 3, 9, 8), (2, 3, 9, 8)),
]


@pytest.mark.parametrize("image, shape", KINDS)
def test_photographs_of_every_kind(image, shape):
    assert as_photos(image).shape == shape


def test_transparent_is_white_and_files_are_read(tmp_path):
    assert (as_photos(Image.new("RGBA", (3, 3), (0, 0, 0, 0))) == 1).all()
    Image.new("RGB", (4, 5), (255, 0, 0)).save(tmp_path / "red.png")
    assert as_photos(tmp_path / "red.png")[0, :, 0, 0].tolist() == [1, 0, 0]
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UnreadableData, match="text.png"):
        as_photos(tmp_path / "text.png")


def test_files_that_cannot_be_pictures(tmp_path):
    with pytest.raises(UnreadableData, match="not a file"):
        as_photos(tmp_path)
    with pytest.raises(UnreadableData, match="mine: numbers of mode 'F'.*what is white"):
        as_rgb(Image.fromarray(np.full((2, 2), 300.0, np.float32)), "mine")


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros(5), "shape"),
        (np.zeros((2, 5, 5)), "1, 3 or 4 channels"),
        (np.full((5, 5), 200.0), "divide by 255"),
        (np.full((5, 5), np.nan), "values"),
    ],
)
def test_bad_photographs(image, message):
    with pytest.raises(ValueError, match=message):
        as_photos(image)
    with pytest.raises(ValueError, match="channels=2"):
        as_photos(np.zeros((5, 5)), 2)


@pytest.mark.parametrize(
    "image",
    [
        np.ones((5, 5)) * 1j,
        torch.ones(5, 5) * 1j,
        np.ma.masked_array(np.ones((5, 5)), np.eye(5)),
        np.full((5, 5), "2020", "datetime64[D]"),
    ],
)
def test_what_is_no_photograph(image):
    with pytest.raises((TypeError, ValueError), match="images (is complex|holds|has)"):
        as_photos(image)


def test_arrays_need_neither_pillow_nor_matplotlib_nor_the_book():
    code = (
        "import sys\n"
        "sys.modules['PIL'] = None\n"
        "import numpy as np, agop_book.coloured, agop_book.patches, agop_book.photos as photos\n"
        "assert photos.as_photos(np.zeros((9, 8))).shape == (1, 3, 9, 8)\n"
        "assert 'matplotlib' not in sys.modules and 'agop_book.book' not in sys.modules\n"
        "try:\n    photos.as_photos('a.png')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout and "pillow" in done.stdout


@pytest.fixture
def operators():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3, stride=2), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(2)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
    return patch_operators(net, torch.rand(2, 3, 16, 14))


def test_grids(operators):
    photos = [np.zeros((20, 30), np.uint8), torch.rand(3, 16, 14)]
    fig = layer_grid(operators, photos, ["black", "noise"])
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ["black", "0", "2", "noise", "", ""]


def test_grids_take_one_path_and_ask_for_every_title(operators, tmp_path):
    op = operators["0"]
    Image.new("RGB", (16, 14)).save(tmp_path / "photo.png")
    for photo in (tmp_path / "photo.png", str(tmp_path / "photo.png")):
        assert len(layer_grid([op], photo).axes) == 2
    x = torch.rand(6, 3, 16, 14)
    for titles in (["one"], [], "abcdef"):
        with pytest.raises(ValueError, match="titles"):
            layer_grid([op], x, titles)
    with pytest.raises(ValueError, match="photos is empty"):
        layer_grid([op], [])
