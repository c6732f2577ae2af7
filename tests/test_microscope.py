"""The microscopes in a browser: what they show is what the operators and scores say."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from agop_book.book.convnets import cnn
from agop_book.book.microscope import photo_microscope, token_microscope
from agop_book.operators import patch_operators

NAMES = ["a wedge", "noise"]


@pytest.fixture(scope="module")
def operators():
    vgg = cnn("vgg-digits")
    return patch_operators(vgg.model, vgg.images, ["conv11", "conv22"], random_state=0)


@pytest.fixture(scope="module")
def photos():
    wedge = torch.linspace(0, 1, 64).expand(3, 64, 64).triu()
    return torch.stack([wedge, torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))])


@pytest.fixture
def opened(browser):
    pages = []

    def opened(live):
        pages.append(page := browser.new_page(viewport={"width": 700, "height": 600}))
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.route(re.compile(r"^(?!data:)"), lambda route: page.problems.append(route.request.url))
        page.set_content(live.page)
        page.wait_for_function("window.microscope && microscope.ready()")
        return page

    yield opened
    for page in pages:
        assert page.problems == []
        page.close()


def put(page, control, value):
    page.locator(f"#{control}").fill(str(value))


def test_photographs_are_seen_as_the_operators_see_them(opened, operators, photos):
    page = opened(photo_microscope(operators, photos, NAMES, directions=2))
    for layer, operator in enumerate(operators.values()):
        for direction, number in enumerate((None, 0, 1)):
            put(page, "layer", layer)
            put(page, "direction", direction)
            page.get_by_role("button", name="noise").click()
            shown = np.array(page.evaluate("microscope.tile()")).reshape(32, 32)
            seen = F.adaptive_avg_pool2d(operator.see(photos[1:], number), 32)[0].numpy()
            assert np.abs(shown - 255 * seen / seen.max()).mean() < 4
    said = page.locator("[role=status]").inner_text()
    share = operator.directions(2)[0][1]
    assert "noise" in said and "conv22" in said and f"2, {100 * share:.0f} %" in said


def test_a_click_asks_how_a_place_is_seen(opened, operators, photos):
    page = opened(photo_microscope(operators, photos, NAMES))
    box = page.locator("#photo").bounding_box()
    place = 16.5 / 32                                            # the middle of a tile's pixel
    page.mouse.click(box["x"] + place * box["width"], box["y"] + place * box["height"])
    here = np.array(page.evaluate("microscope.tile()")).reshape(32, 32)[16, 16]
    assert f"At the ring: {here / 2.55:.0f} %" in page.locator("[role=status]").inner_text()


def test_names_and_photographs_have_to_agree(operators, photos):
    with pytest.raises(ValueError, match="names: 1 for 2 photographs"):
        photo_microscope(operators, photos, ["one"])


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(60)] + ["cat", "<b>"]
    columns = ["layer 1, head 1, direction 1", "layer 2, head 1, direction 1"]
    return pd.DataFrame(rng.normal(size=(62, 2)), words, columns)


def test_words_are_sorted_as_their_scores_are(opened, scores):
    page = opened(token_microscope(scores, "The cat saw word7 </script> and Word8."))
    page.get_by_role("button", name="cat", exact=True).click()
    put(page, "direction", 1)
    column = scores.iloc[:, 1]
    plus = page.locator("#plus").inner_text().split(", ")
    assert set(plus[:8]) <= set(column.nlargest(11).index)
    said = page.locator("[role=status]").inner_text()
    assert f"{abs(column['cat']):.1f} standard deviations" in said and "cat" in said
    assert page.locator("#story").inner_text() == "The cat saw word7 </script> and Word8."
    strongest = scores.loc["cat"].abs().idxmax()
    assert page.locator("#best button").first.inner_text().startswith(strongest)
    page.locator("#best button").first.click()
    assert strongest in page.locator("[role=status]").inner_text()


def test_a_text_without_known_words_is_refused(scores):
    with pytest.raises(ValueError, match="text holds none"):
        token_microscope(scores, "Nothing here")


def test_both_are_small_and_usable_on_a_telephone(opened, operators, photos, scores):
    for live in (photo_microscope(operators, photos, NAMES), token_microscope(scores, "A cat.")):
        assert len(live.html()) < 120_000
        page = opened(live)
        page.set_viewport_size({"width": 320, "height": 600})
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        assert page.locator("button:not([aria-label])").evaluate_all(
            "found => found.every(b => b.textContent.trim())")
