"""Displays: what is on the axes is what was computed, text fits and is read as it is, bad input."""

import copy
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fitted_designs import Classifier, Regressor
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression

from agop_book.displays import RFMDisplay
from agop_book.explain import additivity_gap, directions, explain, feature_importances
from agop_book.explain import interactions

KINDS = ["importances", "directions", "interactions", "row", "rounds"]
LONG = "income of the household ($ per person, in prices of $2010)"


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(150, 12)), columns=[f"x{j}" for j in range(12)])
    X = X.rename(columns={"x1": LONG, "x2": "two\nlines " + "w" * 40})
    X["town"] = rng.choice(["Aachen", "Llanfairpwllgwyngyllgogerychwyrndrobwll"], 150)
    y = X["x0"] * X[LONG] + 2 * X["x5"] + (X["town"] == "Aachen")
    return X, y.to_numpy()


@pytest.fixture(scope="module")
def model(data):
    options = dict(validation_fraction=0.2, random_state=0, n_iter=2)
    return Regressor(bandwidth=5.0, reg=0.1, diag=True, **options).fit(*data)


@pytest.fixture(scope="module")
def flowers():
    X, y = load_iris(return_X_y=True, as_frame=True)
    names = load_iris().target_names
    three = Classifier(bandwidth=3.0, reg=0.1, n_iter=1).fit(X, names[y])
    two = Classifier(bandwidth=3.0, reg=0.1, n_iter=1).fit(X[50:], names[y[50:]])
    return X, three, two


def draw(model, X, kind, **options):
    return RFMDisplay.from_estimator(model, X, kind=kind, **options)


def labels(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def widths(ax):
    return np.array([bar.get_width() for bar in ax.patches])


@pytest.mark.parametrize("kind", KINDS)
def test_axes_and_figures(model, data, kind):
    display = draw(model, data[0], kind)
    assert isinstance(display, RFMDisplay) and display.kind == kind
    assert display.figure_ is display.ax_.figure
    assert display.ax_.get_xlabel()
    fig, ax = plt.subplots()
    count = len(plt.get_fignums())
    other = draw(model, data[0], kind, ax=ax)
    assert other.ax_ is ax and other.figure_ is fig and len(plt.get_fignums()) == count
    again = display.plot(ax=plt.subplots()[1], top=3)
    assert again is display and again.ax_ is not ax


@pytest.mark.parametrize("kind", KINDS)
def test_text_stays_inside_and_apart(model, data, kind):
    display = draw(model, data[0], kind, row=3)
    fig, ax = display.figure_, display.ax_
    fig.canvas.draw()
    low, high = sorted(ax.get_ylim())
    ticks = [t for t in ax.get_yticklabels() if low <= t.get_position()[1] <= high]
    shown = [text for text in [*ax.texts, *ticks, ax.xaxis.label] if text.get_text()]
    boxes = [text.get_window_extent() for text in shown]
    width, height = fig.canvas.get_width_height()
    for box in boxes:
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), shown[i]


@pytest.mark.parametrize("kind", ["importances", "interactions", "row", "directions"])
def test_names_are_short_and_no_mathematics(model, data, kind):
    display = draw(model, data[0], kind, top=20)
    display.figure_.canvas.draw()
    ticks = display.ax_.get_yticklabels()
    texts = [tick.get_text() for tick in ticks]
    assert max(map(len, texts)) <= 35 and not any("\n" in text for text in texts)
    assert any("…" in text and text.count("$") == 1 for text in texts)
    assert not any(tick.get_parse_math() for tick in ticks)


def test_importances(model, data):
    display = draw(model, None, "importances", top=4)
    found = feature_importances(model)
    table = display.table
    assert table["importance"].is_monotonic_decreasing
    assert dict(zip(table["feature"], table["importance"])) == dict(zip(data[0], found))
    assert labels(display.ax_)[0] == table["feature"][0]
    assert labels(display.ax_)[-1] == "9 others"
    assert np.allclose(widths(display.ax_)[:4], table["importance"][:4])
    assert widths(display.ax_).sum() == pytest.approx(1)
    every = labels(display.plot(top=12).ax_)
    assert len(every) == 13 and "1 others" not in every  # the last one has its own bar


def test_interactions_and_directions(model):
    pairs = draw(model, None, "interactions", top=5)
    pd.testing.assert_frame_equal(pairs.table, interactions(model))
    assert np.allclose(widths(pairs.ax_), pairs.table["strength"][:5])
    found = directions(model, 2)
    display = draw(model, None, "directions", k=2, top=6)
    assert np.array_equal(display.table.to_numpy(), found.vectors.to_numpy().T)
    picture = display.ax_.images[0].get_array()
    heaviest = np.argsort(-(found.vectors.to_numpy() ** 2).T @ found.shares, kind="stable")[:6]
    assert np.array_equal(picture, display.table.to_numpy()[heaviest])
    shares = [tick.get_text() for tick in display.ax_.get_xticklabels()]
    assert shares == [f"{i + 1}\n{share:.0%}" for i, share in enumerate(found.shares)]


def test_rounds(model, data, flowers):
    display = draw(model, None, "rounds")
    lines = {line.get_label(): line for line in display.ax_.lines}
    assert np.array_equal(lines["validation rows"].get_ydata(), model.history_["val_score"])
    assert np.array_equal(lines["training rows"].get_ydata(), model.history_["train_score"])
    assert set(lines["kept"].get_xdata()) == {model.best_round_}
    assert display.ax_.get_ylabel() == "R²"
    other = draw(flowers[1], None, "rounds").ax_
    assert other.get_ylabel() == "accuracy"
    assert [line.get_label() for line in other.lines] == ["training rows", "kept"]


def test_rounds_of_several_tries(model):
    "The try with the smallest loss is drawn as the one that was chosen, the others faintly."
    columns = ["round", "val_score", "loss"]
    rows = [(0, 0.1, 9), (0, 0.2, 8), (1, 0.3, 7), (0, 0.4, 6), (1, 0.6, 4), (2, 0.5, 5)]
    fitted = copy.copy(model)
    fitted.history_, fitted.best_round_ = pd.DataFrame(rows, columns=columns), 1
    display = draw(fitted, None, "rounds")
    lines = {line.get_label(): list(line.get_ydata()) for line in display.ax_.lines}
    assert lines["validation rows"] == [0.4, 0.6, 0.5] and lines["kept"] == [0, 1]
    assert lines["not chosen"] == [0.1] and lines["_not chosen"] == [0.2, 0.3]
    fitted.history_["loss"] = [1, 8, 7, 6, 4, 5]
    lines = {line.get_label(): line for line in draw(fitted, None, "rounds").ax_.lines}
    assert lines["not chosen"].get_ydata().tolist() == [0.2, 0.3]
    assert list(lines["validation rows"].get_ydata()) == [0.1]


@pytest.mark.parametrize("row", [0, 149, -1, np.int64(7)])
def test_one_row(model, data, row):
    X, _ = data
    display = draw(model, X, "row", row=row, top=20)
    place = range(150)[row]
    x = X.iloc[place : place + 1]
    facts, effects = display.facts, display.table["effect"]
    assert np.array_equal(effects, explain(model, x)[0])
    assert facts["end"] == pytest.approx(model.predict(x)[0], abs=1e-9)
    assert facts["gap"] == pytest.approx(additivity_gap(model, x)[0])
    assert facts["start"] + effects.sum() + facts["gap"] == pytest.approx(facts["end"])
    assert widths(display.ax_)[:13].sum() == pytest.approx(effects.sum())
    assert labels(display.ax_)[0] == "mean row" and labels(display.ax_)[-1] == "prediction"
    assert f"town = {x['town'].iloc[0]}"[:12] in " ".join(labels(display.ax_))
    assert display.ax_.get_xlabel() == "units of the target"


def test_bars_of_a_row_lead_from_the_start_to_the_end(model, data):
    display = draw(model, data[0], "row", steps=1, top=3)
    bars = display.ax_.patches
    assert labels(display.ax_)[-3:] == ["10 others", "not explained", "prediction"]
    place = display.facts["start"]
    for bar in bars:
        assert bar.get_x() == pytest.approx(place)
        place += bar.get_width()
    assert place == pytest.approx(display.facts["end"])


def test_a_row_of_a_classifier(flowers):
    X, three, two = flowers
    display = draw(three, X, "row", row=120)
    assert labels(display.ax_)[-1] == "score of virginica"
    other = draw(three, X, "row", row=120, output="setosa")
    assert np.array_equal(other.table["effect"], explain(three, X[120:121])[0, 0])
    assert other.facts["end"] == pytest.approx(three.decision_function(X)[120, 0], abs=1e-9)
    assert other.ax_.get_xlabel() == "decision function"
    binary = draw(two, X, "row", row=120)
    assert "virginica" in binary.facts["what"] and "versicolor" in binary.facts["what"]
    assert binary.facts["end"] == pytest.approx(two.decision_function(X)[120], abs=1e-9)


def test_rows_of_arrays_tensors_and_lists(flowers):
    X, three, _ = flowers
    frame = draw(three, X, "row", row=60)
    for rows in (X.to_numpy(), X.to_numpy().tolist(), torch.tensor(X.to_numpy())):
        other = draw(three, rows, "row", row=60)
        assert np.allclose(other.table["effect"], frame.table["effect"])
        assert labels(other.ax_) == labels(frame.ax_)


def test_several_outputs(data):
    X, y = data
    model = Regressor(n_iter=0).fit(X, np.stack([y, -2 * y], 1))
    first, second = (draw(model, X, "row", output=k) for k in (None, 1))
    assert labels(second.ax_)[-1] == "output 1"
    assert second.facts["end"] == pytest.approx(-2 * first.facts["end"])


BAD = [
    (dict(kind="shap"), "kind='shap'.*importances.*row"),
    (dict(kind="row", X=None), "kind='row'.*pass X"),
    (dict(kind="row", row=150), "row=150.*0 to 149"),
    (dict(kind="row", row=-151), "row=-151"),
    (dict(kind="row", row=1.5), "row=1.5.*whole number"),
    (dict(kind="row", row=float("nan")), "row=nan"),
    (dict(kind="row", row="first"), "row='first'"),
    (dict(kind="row", row=True), "row=True"),
    (dict(kind="row", output=3), r"output=3.*\[0\]"),
    (dict(kind="row", steps=0), "steps=0"),
    (dict(kind="directions", k=0), "k=0"),
    (dict(top=0), "top=0"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_arguments(model, data, options, message):
    with pytest.raises(ValueError, match=message):
        RFMDisplay.from_estimator(model, **{"X": data[0], **options})
    assert not plt.get_fignums()


def test_a_class_that_is_none(flowers):
    X, three, two = flowers
    with pytest.raises(ValueError, match="output='rose'.*'setosa', 'versicolor', 'virginica'"):
        draw(three, X, "row", output="rose")
    with pytest.raises(ValueError, match=r"output='versicolor'.*\['virginica'\]"):
        draw(two, X, "row", output="versicolor")


@pytest.mark.parametrize("kind", KINDS)
def test_other_models(data, kind):
    X = np.random.default_rng(0).normal(size=(30, 2))
    with pytest.raises(NotFittedError, match="Regressor"):
        draw(Regressor(), X, kind)
    with pytest.raises(TypeError, match="LinearRegression.*RFMRegressor"):
        draw(LinearRegression().fit(X, X[:, 0]), X, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_is_drawn(kind):
    X = np.random.default_rng(0).normal(size=(30, 3))
    model = Regressor(n_iter=0).fit(X, X[:, 0])
    model.machine_.coef = torch.zeros_like(model.machine_.coef)
    draw(model, X, kind).figure_.canvas.draw()


def test_matplotlib_is_imported_when_something_is_drawn():
    code = "import sys, agop_book.displays; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
