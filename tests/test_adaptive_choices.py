"""Machines that adapt: what is chosen and kept, interruptions, failures, probabilities."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.metrics import log_loss

from adaptive_cases import PLAIN, SEARCHES, fitted, table, words
from agop_book.choices import TableSearch
from agop_book.kernels import Laplace
from agop_book.machines import KernelMachine
from agop_book.rfm import RFMClassifier, RFMRegressor

kinds = pytest.mark.parametrize("kind", ["numbers", "classes"])


# --- what is chosen


def squared_loss(f, y):
    return ((f - y) ** 2).mean()


def rounds_by_hand(bandwidth, diag, regs, X, y, X_val, y_val, n_iter):
    "Losses on validation rows, M by M, where every round goes on from the best ridge."
    M, eye = None, torch.eye(len(X), dtype=X.dtype)
    for _ in range(n_iter + 1):
        kernel = Laplace(bandwidth)
        K = kernel(X, X, M=M)
        made = [KernelMachine(kernel, X, torch.linalg.solve(K + reg * eye, y), M) for reg in regs]
        losses = [squared_loss(machine(X_val), y_val).item() for machine in made]
        yield from zip(losses, regs, [machine(X_val) for machine in made])
        M = made[int(np.argmin(losses))].agop(center=True, diag=diag)


def test_lists_are_searched_in_full():
    X, y = table(120)
    train, rest = slice(0, 80), slice(80, None)
    bandwidths, metrics, regs = [1.0, 3.0, 9.0], ["full", "diag"], [1e-6, 1e-2, 1.0]
    model = RFMRegressor(bandwidth=bandwidths, metric=metrics, reg=regs, n_iter=2, refit=False)
    model.fit(X[train], y[train], X[rest], y[rest])
    data = [torch.as_tensor(v) for v in (X[train], y[train, None], X[rest], y[rest, None])]
    tried = [
        (loss, bandwidth, metric, reg, f)
        for bandwidth, metric in product(bandwidths, metrics)
        for loss, reg, f in rounds_by_hand(bandwidth, metric == "diag", regs, *data, 2)
    ]
    loss, *chosen, f = min(tried, key=lambda found: found[0])
    row = model.history_.loc[model.history_["loss"].idxmin()]
    assert row["loss"] == pytest.approx(loss, rel=1e-6)
    assert [row["bandwidth"], row["metric"], row["reg"]] == chosen
    np.testing.assert_allclose(model.predict(X[rest]), f[:, 0], rtol=1e-6, atol=1e-9)


def test_a_list_in_folds_gives_the_plain_machine_of_its_choice():
    X, y = table(120)
    X, y = np.r_[X, X[:9]], np.r_[y, y[:9]]
    model = RFMRegressor(bandwidth=[4.0, 1e6], reg=[1e-2, 1e3], n_iter=0, random_state=0).fit(X, y)
    row = model.history_.loc[model.history_["loss"].idxmin()]
    assert (row["bandwidth"], row["reg"]) == (4.0, 1e-2)
    plain = RFMRegressor(bandwidth=4.0, reg=1e-2, n_iter=0).fit(X, y)
    np.testing.assert_allclose(model.predict(X), plain.predict(X), rtol=1e-8)


def test_the_best_of_the_history_is_kept():
    model = fitted("numbers", *table())
    assert model.best_round_ == model.history_["round"][model.history_["loss"].idxmin()]
    assert not fitted("numbers", *table(), n_iter=0).history_["round"].any()


@pytest.mark.parametrize("refit, params, n", [
    ("auto", {}, 150), (True, {}, 150), (False, {}, 105),
    ("auto", PLAIN, 105), (True, PLAIN, 150), (False, PLAIN, 105),
])  # fmt: skip
def test_refit(refit, params, n):
    model = fitted("numbers", *table(), refit=refit, validation_fraction=0.3, **params)
    assert len(model.machine_.centers) == n and model.score(*table(seed=1)) > 0.85
    assert model.predict(table(7)[0]).shape == (7,)


# --- interruptions and failures


@kinds
@pytest.mark.parametrize("after", [1, 2, 9])
def test_an_interrupted_fit_keeps_the_best_so_far(kind, after, monkeypatch):
    X, y = table()
    note, fits = TableSearch._note, []

    def interrupt(self, *args):
        note(self, *args)
        fits.append(self)
        if len(fits) == after:
            raise KeyboardInterrupt("now")

    monkeypatch.setattr(TableSearch, "_note", interrupt)
    make = {"numbers": RFMRegressor, "classes": RFMClassifier}[kind]
    model, target = make(random_state=0), {"numbers": y, "classes": words(y)}[kind]
    with pytest.raises(KeyboardInterrupt, match="now"):
        model.fit(X, target)
    assert len(model.history_) == after and model.score(X, target) > 0.8
    assert model.feature_importances_.sum() == pytest.approx(1)


FAILING = {
    "rows": lambda X, y: dict(X=X, y=y[:5]),
    "target": lambda X, y: dict(X=X, y=np.nan * y),
    "weights": lambda X, y: dict(X=X, y=y, sample_weight=-np.ones(len(y))),
    "M": lambda X, y: dict(X=X, y=y, M=np.eye(3)),
    "validation": lambda X, y: dict(X=X, y=y, X_val=X),
}


@pytest.mark.parametrize("reason", FAILING)
def test_a_failing_fit_leaves_the_earlier_one(reason):
    X, y = table()
    model = fitted("numbers", X, y)
    before, told = dict(vars(model)), model.predict(X)
    with pytest.raises(ValueError):
        model.fit(**FAILING[reason](X[:, :3], y))
    assert vars(model).keys() == before.keys()
    assert all(vars(model)[name] is value for name, value in before.items())
    assert np.array_equal(model.predict(X), told)


# --- probabilities


@pytest.mark.parametrize("search", SEARCHES)
def test_probabilities_add_up_and_agree_with_predict(search):
    X, y = table(noise=0.5)
    model = fitted("classes", X, y, **SEARCHES[search])
    p = model.predict_proba(X)
    assert p.shape == (len(X), 3) and (p > 0).all()
    np.testing.assert_allclose(p.sum(1), 1)
    assert (model.classes_[p.argmax(1)] == model.predict(X)).all()
    np.testing.assert_allclose(np.log(p), model.predict_log_proba(X))


def probabilities(logs, F):
    "The formula of the lesson: positive parts to a power, over their sum."
    power, floor = np.exp(logs)
    s = (F + np.sqrt(F**2 + floor**2)) ** power
    return s / s.sum(1, keepdims=True)


def test_probabilities_are_nearly_as_good_as_if_calibrated_on_the_test_rows():
    (X, y), (T, t) = table(500, noise=1.0), table(2000, seed=1, noise=1.0)
    model = fitted("classes", X, y)
    F = model.outputs(T)

    def loss(logs):
        return log_loss(words(t), probabilities(logs, F), labels=model.classes_)

    best = minimize(loss, np.log([1, 0.1]), method="Nelder-Mead").fun
    found = log_loss(words(t), model.predict_proba(T), labels=model.classes_)
    assert best - 1e-6 <= found < best + 0.02


def test_explicit_probabilities_are_calibrated_one_row_at_a_time():
    X, y = table(80, noise=1.0)
    model = fitted("classes", X, y, **PLAIN)
    machine, Y = model.machine_, (words(y)[:, None] == model.classes_).astype(float)
    K = machine.kernel(machine.centers, machine.centers, machine.M).numpy()
    F = np.zeros_like(Y)
    for i in range(len(X)):
        rest = np.arange(len(X)) != i
        system = K[np.ix_(rest, rest)] + 1e-3 * np.eye(len(X) - 1)
        F[i] = K[i, rest] @ np.linalg.solve(system, Y[rest])

    def loss(logs):
        return -np.log(probabilities(logs, F)[Y > 0]).mean()

    bounds = np.log([(0.1, 30), (1e-3, 3)])
    starts = product(np.log([0.5, 2.0]), np.log([0.01, 0.1, 1.0]))
    runs = [minimize(loss, x, method="Nelder-Mead", bounds=bounds) for x in starts]
    wanted = probabilities(min(runs, key=lambda run: run.fun).x, model.outputs(X))
    np.testing.assert_allclose(model.predict_proba(X), wanted, atol=2e-3)
