"A kept matrix against one learned anew: what is chosen, what leaks, and how gains are tested."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from agop_book.book import kept
from agop_book.book.gains import ARM_NAMES, group_gains, task_gains
from agop_book.book.kept import ARMS, PLACES, choose_metric, compare_arms, halves, stored_study
from agop_book.book.learners import MODELS
from agop_book.book.paired import holm, signed_rank_test
from agop_book.book.protocols import evaluate
from agop_book.book.tasks import drawn, fewer_rows, get_task, rows_and_folds, split_task
from agop_book.rfm import RFMClassifier

FEW = replace(MODELS["RFM"], grid=MODELS["RFM"].grid | {"reg": [1, 0.1], "rounds": [0, 1, 2]})
BASE = replace(FEW, grid=FEW.grid | {"rounds": [0]})


@pytest.fixture(scope="module")
def sized():
    "A table with one useful feature of ten, whose size decides."
    rng = np.random.default_rng(1)
    X = rng.standard_normal((240, 10))
    y = (abs(X[:, 0]) > 0.7).astype(int)
    return split_task("size", X, y)


def test_anew_and_laplace_are_the_benchmark(sized):
    rows = pd.DataFrame(compare_arms(sized, "given", FEW)).set_index("arm")
    assert np.isclose(rows.loc["M anew", "accuracy"], evaluate(sized, FEW)["accuracy"])
    assert np.isclose(rows.loc["Laplace", "accuracy"], evaluate(sized, BASE)["accuracy"])
    assert (rows["seen_right"] <= rows["seen"]).all()


def test_kept_is_a_fit_with_the_matrix_of_the_half(sized):
    choice = choose_metric(sized, sized.train, sized.validation, FEW)
    params = choice.rfm
    assert params["rounds"] > 0
    plain = dict(bandwidth=10.0, reg=params["reg"], metric="full", center=False, device="cpu")
    x = sized.x
    if params["unit_rows"]:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    half = RFMClassifier(**plain, n_iter=params["rounds"]).fit(x[sized.train], sized.y[sized.train])
    assert np.allclose(half.M_, choice.M)
    scores = [RFMClassifier(**plain, n_iter=0).fit(x[a], sized.y[a], M=half.M_)
              .score(x[b], sized.y[b]) for a, b in sized.folds]
    found = compare_arms(sized, "given", FEW)[ARMS.index("M kept")]
    assert np.allclose(found["folds"], scores)


def test_no_test_row_has_a_say_inside(sized, monkeypatch):
    calls = []

    def watched(task, train, validation, model):
        calls.append((train, validation))
        return choose_metric(task, train, validation, model)

    monkeypatch.setattr(kept, "choose_metric", watched)
    compare_arms(sized, "inside", FEW)
    assert len(calls) == 4
    for (train, validation), (fold, test) in zip(calls, sized.folds):
        assert set(train) | set(validation) == set(fold) and not set(train) & set(validation)
        assert not (set(train) | set(validation)) & set(test)
    with pytest.raises(ValueError, match="place='outside'"):
        compare_arms(sized, "outside", FEW)


def test_halves_share_classes():
    y = np.repeat([0, 1, 2], [50, 21, 4])
    a, b = halves(np.arange(75), y)
    assert len(set(a) & set(b)) == 0 and len(a) + len(b) == 75
    assert (abs(np.bincount(y[a]) - np.bincount(y[b])) <= 1).all()


def test_two_tables_have_nothing_to_leak(sized):
    two = replace(sized, x_test=sized.x[:40], y_test=sized.y[:40])
    given, inside = (compare_arms(two, place, FEW) for place in PLACES)
    assert [row["seen"] for row in given] == [0, 0, 0]
    assert [row["accuracy"] for row in given] == [row["accuracy"] for row in inside]


def test_fewer_rows():
    task = get_task("sklearn/digits")
    small = fewer_rows(task, most=300, above=1000)
    assert [len(a) for a, _ in small.folds] == [300] * 4 and len(small.train) == 200
    for (a, b), (whole, test) in zip(small.folds, task.folds):
        assert set(a) <= set(whole) and np.array_equal(b, test)
    assert fewer_rows(task) is task and np.array_equal(drawn([3, 1], 2), [1, 3])
    two = fewer_rows(replace(task, x_test=task.x[:50], y_test=task.y[:50]), 300, 1000)
    X, _, ((train, test),) = rows_and_folds(two)
    assert len(train) == 300 and np.array_equal(X[test], task.x[:50]) and train.max() < 1797


def test_signed_ranks_and_holm():
    rng = np.random.default_rng(0)
    gains = np.round(rng.normal(0.3, 1, 80), 1)    # ties and zeros
    W, p = signed_rank_test(gains)
    ranks = stats.rankdata(abs(gains))
    assert W == ranks[gains > 0].sum() - ranks[gains < 0].sum()
    assert abs(p - stats.wilcoxon(gains, zero_method="zsplit", method="asymptotic").pvalue) < 0.01
    assert signed_rank_test(np.zeros(9))[1] == 1.0
    p = rng.random(20) ** 3
    assert np.allclose(holm(p), multipletests(p, method="holm")[1])


def test_stored_study():
    rows = stored_study()
    assert rows is not None
    assert (rows.groupby(["task", "place"])["arm"].nunique() == 3).all()
    assert (rows["seen_right"] <= rows["seen"]).all()
    for protocol in ARM_NAMES:
        assert task_gains(rows, protocol)["gain"].notna().all()
    groups = group_gains(rows)["mean"]
    assert groups["M kept", "seen"] > groups["M kept", "unseen"] + 0.5    # the leak
    assert abs(groups["nested", "seen"] - groups["nested", "unseen"]) < 0.5    # the control
