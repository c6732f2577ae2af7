"""Photographs: upright, in RGB, decoded only when picked, and refused where they are none."""

import struct
import zlib

import numpy as np
import pytest
from data_files import empty_root, picture, write
from PIL import Image

from agop_book.book import images
from agop_book.book.load import load
from agop_book.files import UnreadableData


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    return empty_root(tmp_path, monkeypatch)


def test_class_folders_are_decoded_lazily(root, monkeypatch):
    for name in ("n01", "n02"):
        for k in range(5):
            picture(root / f"imagenet/train/{name}/{k}.JPEG", 40 * k, size=(50 + k, 70))
    decoded, original = [], images.open_rgb

    def counted(path):
        decoded.append(path)
        return original(path)

    monkeypatch.setattr(images, "open_rgb", counted)
    d = load("imagenet", n=3, size=16)
    assert d.x.shape == (3, 3, 16, 16)
    assert len(decoded) == 3
    assert d.classes == ["n01", "n02"]
    assert d.label.startswith("ImageNet (10 of")
    assert load("imagenet").x.shape == (10, 3, 224, 224)
    assert load("imagenet").y.tolist() == [0] * 5 + [1] * 5
    write(root / "imagenet/train/n01/0.JPEG", b"not an image")
    with pytest.raises(UnreadableData, match="0.JPEG.*not a readable image"):
        load("imagenet")


def test_validation_images_without_class_folders(root):
    picture(root / "imagenet/val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UnreadableData, match="one folder of JPEG"):
        load("imagenet", split="test")


def test_caltech_leaves_out_the_background(root):
    for name in ("BACKGROUND_Google", "accordion", "ant"):
        for k in range(4):
            picture(
                root / f"caltech101/101_ObjectCategories/{name}/image_{k + 1:04d}.jpg",
                kind="L" if k else "RGB",
            )
    d = load("caltech101", split="all", size=24)
    assert d.classes == ["accordion", "ant"]
    assert d.x.shape == (8, 3, 24, 24)
    assert len(load("caltech101")) == 6


def test_photos(root):
    for name in ("n01622779_great_grey_owl", "n01514859_hen"):
        picture(root / f"photos/{name}.jpg", 100, (256, 300))
    d = load("photos")
    assert d.x.shape == (2, 3, 224, 224)
    assert d.classes == ["hen", "great grey owl"]
    assert d.label == "2 photographs (ImageNet samples)"
    picture(root / "photos/my_cat.jpg")
    assert load("photos").label == "3 photographs"  # no longer ImageNet's alone


def both_ways(root, image, **options):
    "What `load` and `as_photos` make of one image file, as `(3, h, w)`."
    from agop_book.photos import as_photos

    path = root / "imagenet/train/a/1.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return [load("imagenet", size=8).x[0], as_photos(path)[0].numpy()]


@pytest.mark.parametrize(
    "image, kind",
    [
        (Image.fromarray(np.full((8, 8), 16384, np.uint16)), "PNG"),
        (Image.fromarray(np.full((8, 8), 16384, np.uint16)), "TIFF"),
        (Image.fromarray(np.full((8, 8), 0.25, np.float32)), "TIFF"),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 191)), "PNG"),
        (Image.new("LA", (8, 8), (0, 191)), "PNG"),
    ],
    ids=lambda v: getattr(v, "mode", v),
)
def test_a_quarter_of_white_in_every_kind_of_file(root, image, kind):
    for x in both_ways(root, image, format=kind):
        assert np.abs(x - 0.25).max() < 1 / 255


def test_transparent_pixels_are_white(root):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    for x in both_ways(root, palette, format="PNG", transparency=1):
        assert (x == 1).all()
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    for x in both_ways(root, clear, format="PNG"):
        assert (x == 1).all()


def test_photographs_are_upright(root):
    values = np.zeros((8, 8, 3), np.uint8)
    values[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: left becomes top
    for x in both_ways(root, Image.fromarray(values), format="PNG", exif=exif):
        assert (x[:, :4] == 1).all() and (x[:, 4:] == 0).all()


@pytest.mark.parametrize(
    "values",
    [
        np.full((8, 8), 300.0, np.float32),
        np.full((8, 8), np.nan, np.float32),
        np.full((8, 8), 70_000, np.int32),
    ],
    ids=["large", "nan", "int32"],
)
def test_photographs_without_a_known_white_are_refused(root, values):
    from agop_book.photos import as_photos

    with pytest.raises(UnreadableData, match="1.png.*what is white"):
        both_ways(root, Image.fromarray(values), format="TIFF")
    with pytest.raises(UnreadableData, match="1.png.*what is white"):
        as_photos(root / "imagenet/train/a/1.png")


def test_hidden_folders_and_files_are_no_classes(root):
    for name in (".cache/1.png", "__MACOSX/1.png", "a/1.png", "a/._1.png", "b/1.png"):
        picture(root / "imagenet/train" / name)
    d = load("imagenet", size=8)
    assert d.classes == ["a", "b"] and len(d) == 2


def test_image_bombs_are_named(root):
    def chunk(kind, raw):
        return struct.pack(">I", len(raw)) + kind + raw + struct.pack(">I", zlib.crc32(kind + raw))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    content = b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b"")
    path = write(root / "imagenet/train/a/1.png", content)
    with pytest.raises(UnreadableData, match="not a readable image.*decompression bomb") as error:
        load("imagenet")
    assert str(path) in str(error.value)
