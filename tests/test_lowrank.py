"""Tasks with a known answer: exactly those of the tutorial, and of nothing but their support."""

import numpy as np
import pytest

from agop_book.book.lowrank import LOW_RANK, low_rank

rng = np.random.RandomState(0)


def test_tutorial_task_is_exact():
    np.random.seed(1717)
    x, x_test = np.random.normal(size=(2000, 100)), np.random.normal(size=(10_000, 100))
    t = low_rank()
    assert (t.x == x).all() and (t.x_test == x_test).all() and t.y.shape == (2000, 1)
    assert (t.y[:, 0] == x[:, 0] * x[:, 1]).all()
    assert (t.y_test[:, 0] == x_test[:, 0] * x_test[:, 1]).all()


@pytest.mark.parametrize("task", LOW_RANK)
def test_low_rank_depends_on_its_support_only(task):
    t = low_rank(task, n=20, d=6, n_test=3)
    f, support = LOW_RANK[task]
    other = rng.normal(size=t.x.shape)
    other[:, support] = t.x[:, support]
    assert np.allclose(f(other), t.y[:, 0]) and t.x_test.shape == (3, 6)
    for k in support:  # and on all of it
        moved = t.x.copy()
        moved[:, k] += 1
        assert not np.allclose(f(moved), t.y[:, 0])


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"task": "x9"}, "task='x9'.*x1\\*x2"),
        ({"n": 0}, "n=0"),
        ({"d": 1}, "d=1.*>= 2"),
        ({"n_test": -1}, "n_test=-1"),
        ({"n": 2.5}, "n=2.5"),
        ({"n": True}, "n=True"),
    ],
)
def test_low_rank_bad_input(bad, words):
    with pytest.raises(ValueError, match=words):
        low_rank(**bad)
