"""Calls with a bandwidth give what they gave in the first edition, whose predictions are stored."""

import json
from pathlib import Path

import numpy as np
import pytest

from agop_book import rfm

CALLS = json.loads(Path(__file__).with_name("first_calls.json").read_text())


def table():
    "Ninety rows of five waves, and a target."
    i, j = np.arange(90.0)[:, None], np.arange(5.0)
    X = np.sin(1.7 * i * (j + 1) + j * j) + 0.5 * np.cos(0.3 * i + j)
    return X, X[:, 0] * X[:, 1] + X[:, 2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call['model']} {call['params']}")
def test_explicit_calls_are_those_of_the_first_edition(call):
    X, y = table()
    if call["model"] == "RFMClassifier":
        y = np.digitize(y, [-0.4, 0.4])
    model = getattr(rfm, call["model"])(device="cpu", **call["params"]).fit(X[:60], y[:60])
    found = model.outputs(X[60:70]) if hasattr(model, "classes_") else model.predict(X[60:70])
    np.testing.assert_allclose(found, call["outputs"], rtol=0, atol=1e-9)
