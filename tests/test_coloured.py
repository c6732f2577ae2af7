"""Coloured text: every letter shown, none of it acting as HTML, and what an argument cannot be."""
import importlib.util
import re
from html.parser import HTMLParser
from io import BytesIO

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from agop_book.coloured import Coloured, colour, in_one_figure, text_weights
from agop_book.streams import layer_reads, value_inputs
from agop_book.heads import ValueHeads

matplotlib.use("Agg")
TEXT = "the cat sat on the mat and the dog ate a bone near the old red barn while a bird sang " * 12


class Reader(HTMLParser):
    "What a browser would make of a page: tags, titles and text."

    def __init__(self):
        super().__init__()
        self.tags, self.titles = [], []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.titles += [v for k, v in attrs if k == "title"]
        self.text += "\n" * (tag == "br")

    def handle_data(self, data):
        self.text += data


def colours(shown):
    "Red, green, blue and opacity of every piece of the page."
    found = re.findall(r"rgba\((\d+), (\d+), (\d+), ([\d.]+)\)", shown._repr_html_())
    return [tuple(map(float, each)) for each in found]


def test_html_escapes_the_text_and_shows_all_of_it():
    text = '<script>alert("1 & 2")</script> it\'s\n<b onmouseover=x>'
    pieces = [text[i:i + 5] for i in range(0, len(text), 5)]
    shown = Coloured(pieces, np.linspace(-4, 4, len(pieces)), "<i>title</i>")
    page, reader = shown._repr_html_(), Reader()
    reader.feed(page)
    assert set(reader.tags) == {"div", "span", "br"} and "<script" not in page
    assert reader.text == "<i>title</i>" + text
    assert len(reader.titles) == len(pieces)
    assert reader.titles[-1].endswith("+4.00") and reader.titles[0].startswith("'<scri'")
    opacities = [opacity for *_, opacity in colours(shown)]
    assert max(opacities) == 0.6 and min(opacities) < 0.05


@pytest.mark.parametrize("piece", ["' onclick='x", '" onclick="x', "</span><img src=x>", "&lt;"])
def test_no_piece_gets_out_of_its_attribute(piece):
    reader = Reader()
    reader.feed(Coloured([piece], [1.0])._repr_html_())
    assert reader.tags == ["div", "div", "span"]
    assert reader.titles == [f"{piece!r}: +1.00"] and reader.text == piece


def light(colour):
    "Relative luminance of a colour (WCAG)."
    x = np.array(colour) / 255
    linear = np.where(x <= 0.03928, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return np.array([0.2126, 0.7152, 0.0722]) @ linear


LIGHT, DARK = ((255, 255, 255), (33, 37, 41)), ((18, 18, 18), (206, 214, 221))


@pytest.mark.parametrize("page, ink", [LIGHT, DARK])
def test_letters_can_be_read_on_light_and_dark_pages(page, ink):
    for *rgb, opacity in colours(Coloured(["a", "b"], [-9, 9])):
        ground = opacity * np.array(rgb) + (1 - opacity) * np.array(page)
        low, high = sorted((light(ink), light(ground)))
        assert (high + 0.05) / (low + 0.05) > 4.5


def test_the_picture_holds_every_letter_within_its_frame():
    text = "some words " * 30 + "a" * 250 + "\n\nnew $x_1^2$ line <b> \ufffd"
    pieces = re.findall(r"\s?\S+|\n", text)
    shown = Coloured(pieces, np.zeros(len(pieces)), "title")
    fig = shown.figure(columns=60)
    letters = [t for t in fig.axes[0].texts if t.get_text() != "title"]
    drawn = "".join(t.get_text() for t in letters).replace(" ", "")
    assert sorted(drawn) == sorted(re.sub(r"\s", "", text))
    places = [t.get_position() for t in letters]
    assert all(0 <= x <= 60 - len(t.get_text()) for t, (x, _) in zip(letters, places))
    assert max(y for _, y in places) < fig.axes[0].get_ylim()[0]
    plt.close(fig)
    picture = plt.imread(BytesIO(shown._repr_png_()))
    assert shown._repr_png_()[:4] == b"\x89PNG" and picture.shape[1] > picture.shape[0] > 20


def test_lines_break_where_the_text_breaks_and_where_a_row_is_full():
    fig = Coloured(["aa", " bb\n  cc", " ddd"], [0.0] * 3).figure(columns=6)
    places = {t.get_text(): t.get_position() for t in fig.axes[0].texts if t.get_text()}
    plt.close(fig)
    found = {word: (x, int(y)) for word, (x, y) in places.items()}
    assert found == {"aa": (0, 0), "bb": (3, 0), "cc": (2, 1), "ddd": (0, 2)}


def test_plain_text_marks_strong_pieces():
    shown = Coloured([" not", "strong"], [0.1, 3.0], "title")
    assert repr(shown) == "title\n not[[strong]]"
    fig = in_one_figure([shown, shown, shown])
    assert len(fig.axes) == 3
    plt.close(fig)


@pytest.fixture(scope="module")
def heads():
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    from agop_book.book.language import word_tokens
    from agop_book.book.models import gpt2

    torch.manual_seed(0)
    tokens = word_tokens(TEXT)
    model = gpt2(len(tokens), 8, n_layer=2, n_head=2, n_embd=12).double().eval()
    data = tokens.encode(TEXT)[:160].reshape(-1, 8)
    return ValueHeads(model, tokens, data, probes=None, random_state=0, progress=False)


@pytest.mark.parametrize("limit", [0, -1, np.nan, np.inf, "3", True, None])
def test_a_bad_limit_of_colours_is_named(heads, limit):
    with pytest.raises(ValueError, match="limit="):
        colour("the cat", heads.direction(1, 1), limit=limit)


def test_weights_of_a_text(heads):
    d, ids = heads.direction(2, 1), heads.tokens.encode(TEXT)[:160]
    pieces, weights = text_weights("the cat sat", d)
    assert pieces == ["the", " cat", " sat"]
    assert weights[1] == pytest.approx(text_weights(" cat", d)[1][0])  # no context
    alone = d.standard(value_inputs(heads.model, ids)[1])
    there = d.standard(layer_reads(heads.model, ids.reshape(-1, 8))[1].flatten(0, 1), True)
    for projections in (alone, there):
        assert abs(projections.mean()) < 1e-6
        assert abs(projections.std(correction=0) - 1) < 1e-6


def test_long_texts_are_read_in_windows(heads):
    d, ids = heads.direction(2, 1), heads.tokens.encode(TEXT)
    pieces, weights = text_weights(heads.tokens.decode(ids[:30]), d, in_place=True)
    assert len(pieces) == len(weights) == 30 and np.isfinite(weights).all()
    first = layer_reads(heads.model, ids[None, :8])[1, 0]
    np.testing.assert_allclose(weights[:8], d.standard(first, True), atol=1e-6)
    assert text_weights(heads.tokens.decode(ids[4:12]), d, in_place=True)[0] == pieces[4:12]
    second = layer_reads(heads.model, ids[None, 4:12])[1, 0, 4:]
    np.testing.assert_allclose(weights[8:12], d.standard(second, True), atol=1e-6)


def test_colour_says_what_is_wrong(heads):
    d = heads.direction(1, 1)
    assert isinstance(colour("the cat", d), Coloured)
    assert (colour("the cat", d, end="-").weights >= 0).all()
    assert "positive end, in place" in colour("the cat", d, end="+", in_place=True).title
    with pytest.raises(ValueError, match="text='' has nothing to colour"):
        colour("", d)
    with pytest.raises(ValueError, match="text=None"):
        colour(None, d)
    with pytest.raises(ValueError, match="zebra.*leave them out"):
        colour("the zebra", d)
    with pytest.raises(ValueError, match="end='left': choose"):
        colour("the cat", d, end="left")
    with pytest.raises(TypeError, match="Direction of ValueHeads"):
        colour("the cat", torch.ones(12))
