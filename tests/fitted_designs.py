"""Recursive Feature Machines whose inputs pass through a design, for the tests of explanations.

Numbers are standardised, categories become one column a level; the machine sees the design only.
"""

import numpy as np
import pandas as pd

from agop_book.kernelrfm import KernelRFM
from agop_book.rfm import RFMClassifier, RFMRegressor
from agop_book.targets import Classification, Regression


class Design:
    "What `transform` makes of rows, and which input column each of its columns comes from."

    def __init__(self, frame):
        self.levels = {}
        for j, name in enumerate(frame.columns):
            if not pd.api.types.is_numeric_dtype(frame[name].dtype):
                self.levels[j] = sorted(frame[name].unique())
        parts = [self._raw(frame, j) for j in range(frame.shape[1])]
        self.groups_ = np.repeat(np.arange(len(parts)), [part.shape[1] for part in parts])
        self.blocks_ = [np.flatnonzero(self.groups_ == j) for j in self.levels]
        self.names_ = np.array(list(self._names(frame)), object)
        raw = np.concatenate(parts, 1)
        numbers = ~np.isin(self.groups_, list(self.levels))
        self.middle = np.where(numbers, raw.mean(0), 0.0)
        self.scale = np.where(numbers & (raw.std(0) > 0), raw.std(0), 1.0)

    def _raw(self, frame, j):
        column = frame.iloc[:, j].to_numpy()
        if j not in self.levels:
            return column.astype(np.float64)[:, None]
        return (column[:, None] == np.array(self.levels[j], object)).astype(np.float64)

    def _names(self, frame):
        for j, name in enumerate(frame.columns):
            yield from (f"{name}={level}" for level in self.levels.get(j, ()))
            if j not in self.levels:
                yield name

    def transform(self, X):
        frame = pd.DataFrame(X)
        raw = np.concatenate([self._raw(frame, j) for j in range(frame.shape[1])], 1)
        return (raw - self.middle) / self.scale


class Designed:
    "Mixed into an RFM: it is fitted to the design, and asked about rows of the input."

    def fit(self, X, y, weights=None):
        frame = pd.DataFrame(X)
        if not isinstance(X, pd.DataFrame):
            frame.columns = [f"x{j}" for j in frame.columns]
        self.design_ = Design(frame)
        Z = self.design_.transform(frame)
        self.weights_ = None if weights is None else np.asarray(weights, np.float64)
        super().fit(Z, y)
        self.n_features_in_ = frame.shape[1]
        if isinstance(X, pd.DataFrame):
            self.feature_names_in_ = np.array(frame.columns, object)
        share = np.ones(len(Z)) if weights is None else self.weights_
        self.reference_ = np.average(Z, axis=0, weights=share)
        self.spread_ = np.average((Z - self.reference_) ** 2, axis=0, weights=share)
        return self

    def design(self, X):
        if np.ndim(X) != 2 or np.shape(X)[1] != self.n_features_in_:
            raise ValueError(f"X has shape {np.shape(X)}; this model was fitted to "
                             f"{self.n_features_in_} features.")
        return self.design_.transform(X)

    def _outputs(self, X):
        return self._run(self.machine_, self.design(X))


class Regressor(Designed, Regression, KernelRFM):
    __init__ = RFMRegressor.__init__


class Classifier(Designed, Classification, KernelRFM):
    __init__ = RFMClassifier.__init__
