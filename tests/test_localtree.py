"Trees of machines: where rows go, what a leaf holds, who answers, and the study that compares."

import numpy as np
import pytest
from joblib import parallel_config
from sklearn.base import clone
from sklearn.datasets import make_friedman1
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import NotFittedError

from agop_book.book import localtree
from agop_book.book.localtree import (
    LOCAL_TASKS,
    WAYS_TO_SPLIT,
    TreeRFM,
    find_cut,
    local_cost,
    local_study,
    stored_local_study,
)
from agop_book.rfm import RFMClassifier, RFMRegressor

QUICK = RFMRegressor(n_iter=1, validation_fraction=0.2)


@pytest.fixture(scope="module")
def rows():
    return make_friedman1(500, noise=0.5, random_state=0)


@pytest.fixture(scope="module")
def tree(rows):
    X, y = rows
    return TreeRFM(QUICK, leaf=110, sample=150, random_state=0).fit(X[:400], y[:400])


def test_every_row_goes_to_one_leaf_within_the_limit(rows, tree):
    X, _ = rows
    assert len(tree.leaves_) == 4 and max(map(len, tree.leaves_)) <= 110
    assert sorted(np.concatenate(tree.leaves_)) == list(range(400))
    found = tree.apply(X[:400])
    for number, some in enumerate(tree.leaves_):
        assert (found[some] == number).all()
    assert set(tree.apply(X[400:])) <= set(range(4))


def test_a_prediction_is_that_of_the_leaf(rows, tree):
    X, y = rows
    leaves, found = tree.apply(X[400:]), tree.predict(X[400:])
    assert found.shape == (100,)
    for number, model in enumerate(tree.models_):
        some = leaves == number
        assert model.solver == "cholesky" and len(model.machine_.centers) <= 110
        np.testing.assert_allclose(found[some], model.predict(X[400:][some]))
        again = clone(model).fit(X[tree.leaves_[number]], y[tree.leaves_[number]])
        np.testing.assert_allclose(again.predict(X[400:]), model.predict(X[400:]))


def test_rows_alone_and_together_go_the_same_way(rows, tree):
    X, _ = rows
    alone = [tree.apply(row[None])[0] for row in X[400:420]]
    assert alone == tree.apply(X[400:420]).tolist()


def test_joblib_fits_the_leaves(rows, tree):
    X, y = rows
    with parallel_config(backend="threading"):
        other = clone(tree).set_params(n_jobs=2).fit(X[:400], y[:400])
    np.testing.assert_allclose(other.predict(X[400:]), tree.predict(X[400:]), rtol=1e-6)


def test_a_small_table_is_one_leaf(rows):
    X, y = rows
    tree = TreeRFM(QUICK, leaf=400, random_state=0).fit(X[:100], y[:100])
    assert len(tree.models_) == 1 and not tree.apply(X).any()


def test_classes_keep_their_labels():
    rng = np.random.RandomState(0)
    X = rng.randn(400, 3)
    y = np.where(X[:, 0] < 0, "none", np.where(X[:, 1] > 0, "up", "down"))
    model = RFMClassifier(n_iter=1, validation_fraction=0.2)
    tree = TreeRFM(model, leaf=120, random_state=0).fit(X, y)
    assert np.mean(tree.predict(X) == y) > 0.9
    # where all rows of a leaf have one class, there is nothing to fit
    alone = [isinstance(m, DummyClassifier) for m in tree.models_]
    assert alone == [len(set(y[some])) == 1 for some in tree.leaves_]


def test_a_cut_finds_the_direction_that_counts():
    X = np.random.RandomState(0).randn(300, 4)
    w = np.array([1.0, 2.0, 0.0, 0.0])
    cut = find_cut(QUICK, X, np.tanh(X @ w), random_state=0)
    along = cut.design.transform(X) @ cut.direction
    assert abs(np.corrcoef(along, X @ w)[0, 1]) > 0.95
    assert cut.above(X).sum() == 150


def test_rows_that_no_direction_cuts_stay_together():
    X = np.zeros((300, 2))
    X[:20, 0] = 1                    # too few for a side of their own
    y = X[:, 0] + 0.1 * np.random.RandomState(0).randn(300)
    assert find_cut(QUICK, X, y, random_state=0) is None
    y = np.ones(300)
    assert find_cut(QUICK, np.random.RandomState(0).randn(300, 2), y, random_state=0) is None
    X[:150, 0] = 1                   # ties do not matter where there is a gap
    y = X[:, 0] + 0.1 * np.random.RandomState(0).randn(300)
    assert find_cut(QUICK, X, y, random_state=0).above(X).sum() == 150


def test_bad_input(rows):
    X, y = rows
    with pytest.raises(ValueError, match="leaf"):
        TreeRFM(QUICK, leaf=0).fit(X, y)
    with pytest.raises(NotFittedError):
        TreeRFM(QUICK).predict(X)


def toy_cost(task, seed, way, leaf):
    toy_cost.calls += 1
    return {"score": 0.5}


def test_the_study_keeps_its_rows(tmp_path, monkeypatch):
    toy_cost.calls = 0
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path))
    monkeypatch.setattr(localtree, "local_cost", toy_cost)
    found = local_study(["diabetes"], [0], [200], progress=False)
    assert list(found["way"]) == list(WAYS_TO_SPLIT) and list(found["leaf"]) == [0, 200, 200]
    assert local_study(["diabetes"], [0], [200], progress=False).equals(found)
    assert toy_cost.calls == 3


def test_a_cost_has_a_process_of_its_own():
    found = local_cost("diabetes", 0, "tree", 200)
    assert found["rows"] == 332 and found["leaves"] == 2 and found["score"] > 0.2
    assert found["fit"] > 0 and (found["peak"] is None or found["peak"] > 2**26)


def test_the_stored_run():
    rows = stored_local_study()
    assert set(rows["task"]) == set(LOCAL_TASKS) and set(rows["way"]) == set(WAYS_TO_SPLIT)
    assert not rows.duplicated(["task", "seed", "way", "leaf"]).any()
    assert rows["score"].notna().all()
