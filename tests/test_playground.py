"""The playground in a browser: the same numbers as the estimator's, and usable without a mouse."""

import numpy as np
import pytest
from sklearn.metrics import r2_score

from agop_book.book.live import live_page
from agop_book.book.playground import playground
from agop_book.rfm import RFMRegressor

READY = "window.playground && playground.state().rounds.length === 9"
STATE = """() => {
  const s = playground.state(), rows = X => X.map(x => Array.from(x));
  const set = part => ({X: rows(part.X), y: Array.from(part.y)});
  const rounds = s.rounds.map(r => ({...r, M: r.M && rows(r.M)}));
  return {bandwidth: s.bandwidth, reg: s.reg, train: set(s.train), test: set(s.test), rounds};
}"""
SET = """values => {
  for (const [id, value] of Object.entries(values)) document.getElementById(id).value = value;
  document.getElementById("n").dispatchEvent(new Event("input"));
}"""


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 800, "height": 560})
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda asked: page.problems.append(f"asked for {asked.url}"))
    page.set_content(live_page("playground.html"))
    page.wait_for_function(READY)
    yield page
    assert page.problems == []
    page.close()


def controls(target, n, k, noise, bandwidth, reg):
    "Values of the controls; those of bandwidth and ridge are powers of ten."
    return dict(target=target, n=n, k=k, noise=noise, bandwidth=bandwidth, reg=reg)


@pytest.mark.parametrize("values", [
    controls("product", 200, 14, 0.1, 1, -3),
    controls("product", 300, 30, 0.5, 1, -4),
    controls("wave", 100, 5, 0, -0.3, 0),
    controls("ring", 20, 1, 1, 1.7, -4),
])
def test_every_round_is_the_estimators(page, values):
    page.evaluate(SET, values)
    page.wait_for_function(READY)
    state = page.evaluate(STATE)
    X, y = map(np.array, state["train"].values())
    Z, z = map(np.array, state["test"].values())
    assert X.shape == (values["n"], 2 + values["k"])
    model = RFMRegressor(bandwidth=state["bandwidth"], reg=state["reg"], metric="full",
                         center=False, n_iter=8).fit(X, y)
    found = zip(state["rounds"], model.machines_, model.staged_predict(X), model.staged_predict(Z))
    for t, (ours, machine, fitted, predicted) in enumerate(found):
        assert abs(ours["train"] - r2_score(y, fitted)) < 1e-6
        assert abs(ours["test"] - r2_score(z, predicted)) < 1e-6
        if t:
            M = np.asarray(machine.M)
            assert np.abs(np.array(ours["M"]) - M).max() < 1e-6 * np.abs(M).max()
    assert t == 8


def test_keys_move_the_rounds_and_words_say_what_is_seen(page):
    page.locator("#round").focus()
    before = page.locator("#plane").get_attribute("aria-label")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    said = page.locator("[role=status]").inner_text()
    assert said.startswith("Round 3:") and "test data" in said
    assert page.locator("#plane").get_attribute("aria-label") != before
    for control in page.locator("input, select").all():
        assert page.locator(f"label[for={control.get_attribute('id')}]").count() == 1
    assert page.locator("canvas:not([aria-label])").count() == 0


def test_it_plays_by_itself_and_stops(page):
    page.locator("#play").focus()
    page.keyboard.press("Enter")
    assert page.locator("#play").inner_text() == "Pause"
    page.wait_for_function("document.getElementById('round').value >= 1")
    page.keyboard.press("Enter")
    assert page.locator("#play").inner_text() == "Play"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1100])
def test_nothing_is_wider_than_the_frame(page, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 560})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    white = "getComputedStyle(document.body).backgroundColor == 'rgb(255, 255, 255)'"
    page.wait_for_function(f"({white}) == {str(scheme == 'light').lower()}")   # it takes a moment


def test_the_output_is_small_and_brings_a_still_picture():
    data, metadata = playground()._repr_mimebundle_()
    assert len(data["text/html"].encode()) < 60_000
    assert "src=" not in data["text/html"].replace('src="data:image/jpeg;base64,', "")
    assert data["image/jpeg"] in data["text/html"] and "GitHub" in data["text/html"]
    assert "test R2" in metadata["image/jpeg"]["alt"]
