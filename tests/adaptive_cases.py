"""Tables and settings that the tests of machines that adapt share."""

import numpy as np
import pandas as pd

from agop_book.rfm import RFMClassifier, RFMRegressor

TARGETS = {
    "linear": lambda X: X[:, :3] @ [1, 2, -1],
    "product": lambda X: X[:, 0] * X[:, 1] + X[:, 2],
    "wave": lambda X: np.sin(2 * X[:, 0]) + X[:, 1] ** 2,
}
WORDS = np.array(["low", "middle", "high"])


def table(n=150, seed=0, target="product", noise=0.1, d=5):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, TARGETS[target](X) + noise * rng.normal(size=n)


def words(y):
    return WORDS[np.digitize(y, [-0.7, 0.7])]


def frame(X):
    "With a category of two values."
    F = pd.DataFrame(X, columns=list("abcde"))
    F["kind"] = pd.Categorical(np.array(["u", "v"])[(X[:, 3] > 0).astype(int)])
    return F


def regressor(**params):
    return RFMRegressor(random_state=0, **params)


def classifier(**params):
    return RFMClassifier(random_state=0, **params)


def fitted(kind, X, y, **params):
    "A regressor or a classifier, fitted."
    weights = params.pop("sample_weight", None)
    if kind == "classes":
        return RFMClassifier(random_state=0, **params).fit(X, words(y), sample_weight=weights)
    return RFMRegressor(random_state=0, **params).fit(X, y, sample_weight=weights)


def answers(model, X):
    return model.predict_proba(X) if hasattr(model, "predict_proba") else model.predict(X)


def away(found, wanted):
    "The largest difference, over the spread of what is wanted."
    return np.abs(found - wanted).max() / np.std(wanted)


PLAIN = {"bandwidth": 4.0, "n_iter": 2}
SEARCHES = {
    "adaptive": {},
    "validated": {"validation_fraction": 0.3},
    "lists": {"bandwidth": [2.0, 4.0], "reg": [1e-3, 1e-1], "n_iter": 2},
    "plain": PLAIN,
}
