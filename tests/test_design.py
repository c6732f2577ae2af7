"Scales, columns and the design matrix: weights, units, wild rows, categories, holes, files."

import json
import warnings

import numpy as np
import pytest

from agop_book.columns import whole_codes, with_weight
from agop_book.design import Design, Identity, design_from_state
from agop_book.scales import SCALES, Score, bounded, weighted_means, weighted_quantiles

KINDS = ["clipped", "winsorised"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def mixed(n=240, seed=0):
    "Numbers of many kinds, a number with holes, whole numbers and two columns of codes."
    rng = np.random.default_rng(seed)
    X = np.column_stack(
        [
            rng.normal(1e6, 1e3, n),
            rng.lognormal(0, 2, n),
            rng.poisson(0.2, n) * 1e-7,
            rng.normal(size=n),
            rng.integers(-2, 3, n),
            rng.integers(0, 4, n),
            rng.integers(0, 3, n),
        ]
    )
    X[rng.random(n) < 0.2, 3] = np.nan
    X[rng.random(n) < 0.1, 4] = np.nan
    X[rng.random(n) < 0.1, 6] = np.nan
    return X, np.array([False] * 5 + [True] * 2)


def through_json(design):
    return design_from_state(json.loads(json.dumps(design.to_state())))


@pytest.mark.parametrize("weighted", [False, True])
def test_quantiles_are_those_of_numpy(weighted):
    rng = np.random.default_rng(0)
    X, weights = rng.integers(0, 9, (40, 6)).astype(float), rng.integers(1, 5, 40)
    levels = [0, 0.01, 0.25, 0.5, 0.75, 0.99, 1]
    rows = np.repeat(X, weights, axis=0) if weighted else X
    wanted = np.quantile(rows, levels, axis=0, method="inverted_cdf")
    found = weighted_quantiles(X, weights if weighted else None, levels)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("weights", [None, np.array([1.0, 2, 3, 1])])
def test_quantiles_and_means_leave_holes_out(weights):
    X = np.array([[1, np.nan], [np.nan, np.nan], [5, np.nan], [3, np.nan]])
    found = weighted_quantiles(X, weights, [0.5])
    assert found[0, 0] == (3 if weights is None else 5) and np.isnan(found[0, 1])
    mean = weighted_means(X[:, :1], weights)
    np.testing.assert_allclose(mean, 3 if weights is None else 19 / 5)


def test_margin_leaves_a_row_and_a_half_outside():
    x = np.arange(60.0)[:, None]
    np.testing.assert_array_equal(weighted_quantiles(x, None, (0.01, 0.99)), [[0], [59]])
    np.testing.assert_array_equal(weighted_quantiles(x, None, (0.01, 0.99), 1.5), [[1], [58]])
    x = np.arange(1000.0)[:, None]
    with_margin = weighted_quantiles(x, None, (0.01, 0.99), 1.5)
    np.testing.assert_array_equal(with_margin, weighted_quantiles(x, None, (0.01, 0.99)))
    np.testing.assert_array_equal(weighted_quantiles(x[:3], None, (0.01, 0.99), 1.5), [[0], [2]])


def test_winsorised_is_mean_and_deviation_between_quantiles():
    x = np.random.default_rng(0).lognormal(size=(500, 4))
    held = np.clip(x, *np.quantile(x, (0.01, 0.99), axis=0, method="inverted_cdf"))
    score = SCALES["winsorised"](x, None)
    np.testing.assert_allclose(score.centre, held.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(score.spread, held.std(axis=0), rtol=1e-12)


def test_clipped_is_median_and_quartiles():
    x = np.random.default_rng(0).normal(3, 2, size=(1001, 2))
    low, median, high = np.quantile(x, (0.25, 0.5, 0.75), axis=0, method="inverted_cdf")
    score = SCALES["clipped"](x, None)
    np.testing.assert_array_equal(score.centre, median)
    np.testing.assert_allclose(score.spread, (high - low) / 1.349, rtol=1e-12)


@pytest.mark.parametrize("clip", [3.0, 8.0])
def test_scores_stay_within_the_clip(clip):
    score = Score([1.0], [2.0], clip)
    x = np.array([[-1e300], [1 - 2e-6], [1], [1 + 2e-6], [1e300]])
    np.testing.assert_allclose(score(x)[:, 0], [-clip, -1e-6, 0, 1e-6, clip], rtol=1e-9)
    assert score.slope(x)[2] == 0.5 and (score.slope(x) >= 0).all()


@each_kind
@pytest.mark.parametrize("off", [1, 5, 100])
def test_spread_is_never_zero(kind, off):
    x = np.full((1000, 1), 0.1)
    x[:off, 0] = 0.1 + np.linspace(1, 2, off)
    score = SCALES[kind](x, None)
    assert 0.3 < score.spread[0] < 2.1
    for seed in range(20):
        x = np.random.default_rng(seed).integers(0, 2, (2 + seed, 1)).astype(float)
        if x.std() > 0:
            assert SCALES[kind](x, None).spread[0] > 0


@each_kind
def test_one_wild_row_hardly_moves_the_others(kind):
    rng = np.random.default_rng(0)
    x = np.column_stack(
        [rng.normal(size=600), rng.random(600), rng.lognormal(0, 0.5, 600), rng.poisson(2, 600)]
    )
    wild = x.copy()
    wild[17] = 1e6
    others = np.arange(600) != 17
    before, after = (SCALES[kind](rows, None)(rows)[others] for rows in (x, wild))
    assert np.abs(after - before).max() < 0.1
    before, after = (Design(kind).fit_transform(rows)[others] for rows in (x, wild))
    assert np.sqrt(np.mean((after - before) ** 2)) < 0.1


@each_kind
def test_one_wild_row_of_sixty_does_not_hide_the_others(kind):
    x = np.random.default_rng(0).normal(size=(60, 1))
    x[17] = 1e6
    assert Design(kind).fit_transform(x)[np.arange(60) != 17].std() > 0.6


@each_kind
@pytest.mark.parametrize("a, b", [(1e-9, 0), (1e5, -3e5), (0.3, 7)])
def test_units_do_not_matter(kind, a, b):
    X = np.random.default_rng(0).lognormal(size=(300, 3))
    X[:200, 2] = 1
    other = Design(kind).fit(a * X + b)
    np.testing.assert_allclose(
        other.transform(a * X + b), Design(kind).fit_transform(X), rtol=0, atol=1e-9
    )


@each_kind
@pytest.mark.parametrize("codes", [0, 8])
def test_weights_are_repetitions(kind, codes):
    X, categorical = mixed()
    weights = np.random.default_rng(1).integers(0, 3, len(X))
    weighted = Design(kind, codes).fit(X, categorical, weights)
    repeated = Design(kind, codes).fit(np.repeat(X, weights, axis=0), categorical)
    assert weighted.names_ == repeated.names_
    for method in ("transform", "derivatives"):
        one, two = (getattr(design, method)(X) for design in (weighted, repeated))
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)


@each_kind
def test_weights_are_repetitions_in_a_small_table(kind):
    X = np.random.default_rng(2).lognormal(size=(12, 3))
    weights = np.arange(12) % 3
    weighted = Design(kind).fit(X, None, weights).transform(X)
    repeated = Design(kind).fit(np.repeat(X, weights, axis=0)).transform(X)
    np.testing.assert_allclose(weighted, repeated, rtol=0, atol=1e-12)


@each_kind
@pytest.mark.parametrize("codes", [0, 8])
def test_columns_are_standardised(kind, codes):
    X, categorical = mixed()
    design = Design(kind, codes)
    Z = design.fit_transform(X, categorical)
    np.testing.assert_allclose(Z.mean(axis=0), 0, atol=1e-12)
    numbers = 4 if codes else 5
    seen = ~np.isnan(X[:, :numbers])
    spread = [Z[seen[:, j], j].std() for j in range(numbers)]
    np.testing.assert_allclose(spread, 1, rtol=1e-10)
    assert (Z[:, :numbers][~seen] == 0).all()
    assert Z.shape == (len(X), len(design.groups_)) and len(design.names_) == Z.shape[1]


@each_kind
def test_derivatives_are_differences(kind):
    X, categorical = mixed()
    design = Design(kind, codes=8).fit(X, categorical)
    slopes = design.derivatives(X)
    for j in range(4):
        step = np.zeros(7)
        step[j] = 1e-6 * np.nanstd(X[:, j])
        change = (design.transform(X + step) - design.transform(X - step)) / (2 * step[j])
        np.testing.assert_allclose(slopes[:, j], change[:, j], rtol=1e-4, atol=1e-7)
    assert (slopes[np.isnan(X[:, 3]), 3] == 0).all() and (slopes[:, 4:] == 0).all()


@each_kind
@pytest.mark.parametrize("codes", [0, 8])
def test_a_file_gives_the_same(kind, codes):
    X, categorical = mixed()
    design = Design(kind, codes).fit(X, categorical, names=list("abcdefg"))
    again = through_json(design)
    np.testing.assert_array_equal(again.transform(X), design.transform(X))
    np.testing.assert_array_equal(again.derivatives(X), design.derivatives(X))
    np.testing.assert_array_equal(again.groups_, design.groups_)
    assert (again.names_, again.numbers, again.codes) == (design.names_, kind, codes)
    assert [block.tolist() for block in again.blocks_] == [b.tolist() for b in design.blocks_]


def test_order_groups_and_blocks():
    X, categorical = mixed()
    design = Design().fit(X, categorical, names=list("abcdefg"), labels={6: ["red", "blue", "x"]})
    assert design.names_[:6] == ["a", "b", "c", "d", "e", "d missing"]
    assert design.names_[6:] == ["e missing", *(f"f={j}" for j in range(4))] + [
        f"g={value}" for value in ("red", "blue", "x", "missing")
    ]
    assert design.groups_.tolist() == [0, 1, 2, 3, 4, 3, 4] + [5] * 4 + [6] * 4
    assert [block.tolist() for block in design.blocks_] == [[7, 8, 9, 10], [11, 12, 13, 14]]


def test_unseen_and_missing_categories():
    design = Design().fit(np.array([[0.0], [1], [1], [np.nan]]), [True])
    shares = np.array([0.25, 0.5, 0.25])
    rows = design.transform(np.array([[0.0], [np.nan], [-1], [7]]))
    np.testing.assert_allclose(rows, [[1, 0, 0] - shares, [0, 0, 1] - shares, [0] * 3, [0] * 3])


def test_a_category_of_one_row():
    X = np.array([[0.0]] * 99 + [[1]])
    Z = Design().fit_transform(X, [True])
    np.testing.assert_allclose(Z[[0, 99]], [[0.01, -0.01], [-0.99, 0.99]])


def test_many_categories_share_a_column():
    X = np.arange(1000.0)[:, None]
    X[:300] = X[300:600]  # 300 to 599 are twice as heavy
    design = Design().fit(X, [True])
    assert len(design.names_) == 256 and design.names_[-1] == "x0=other"
    Z = design.transform(np.array([[999.0], [-1], [5000]]))
    assert (Z.argmax(axis=1) == 255).all()


def test_whole_codes():
    X, categorical = mixed()
    assert whole_codes(X, categorical, None, 8).tolist() == [False] * 4 + [True] + [False] * 2
    assert whole_codes(X, None, None, 8).tolist() == [False] * 4 + [True] * 3
    assert whole_codes(X, None, None, 4).tolist() == [False] * 5 + [True] * 2
    assert not whole_codes(X, None, None, 0).any()
    two = np.array([[0.0, 1, np.nan, np.inf], [1, 2, np.nan, 1], [1, 3, np.nan, 2], [0, 4, 1, 3]])
    assert whole_codes(two, None, None, 4).tolist() == [False, True, False, False]
    weights = np.array([1, 1, 0, 0])
    assert not whole_codes(two, None, weights, 4).any()


def test_numbers_as_categories():
    X = np.array([[-1.0], [3], [2], [2], [np.nan], [50]])
    weights = np.array([1, 1, 1, 1, 1, 0])
    design = Design(codes=8).fit(X, None, weights, names=["rooms"])
    assert design.names_ == ["rooms=-1", "rooms=2", "rooms=3", "rooms=missing"]
    assert [block.tolist() for block in design.blocks_] == [[0, 1, 2, 3]]
    shares = np.array([0.2, 0.4, 0.2, 0.2])
    np.testing.assert_allclose(design.transform(X)[[0, 4]], [[1, 0, 0, 0], [0, 0, 0, 1]] - shares)
    unseen = np.array([[50.0], [-2], [2.5], [-1e9]])
    for fitted in (design, through_json(design)):
        assert (fitted.transform(unseen) == 0).all()
    assert (design.derivatives(X) == 0).all()


def test_few_or_broken_values_stay_numbers():
    X = np.random.default_rng(0).integers(0, 2, (50, 2)).astype(float)
    X[:, 1] = np.arange(50) % 5 / 2
    assert Design(codes=8).fit(X).blocks_ == []
    assert Design().fit(np.arange(50.0)[:, None] % 5).blocks_ == []


def test_empty_and_constant_columns():
    X = np.column_stack([np.full(9, np.nan), np.ones(9), np.arange(9.0), np.full(9, np.nan)])
    with pytest.warns(UserWarning, match="no value at all in column 'a', 'd'; left out"):
        design = Design().fit(X, [False, False, False, True], names=list("abcd"))
    assert design.names_ == ["c"] and design.groups_.tolist() == [2]
    assert design.transform(np.zeros((2, 4))).shape == (2, 1)


def test_constant_with_holes_keeps_the_holes():
    design = Design().fit(np.array([[1.0], [np.nan], [1]]), names=["a"])
    assert design.names_ == ["a missing"]
    np.testing.assert_allclose(design.transform(np.array([[1.0], [np.nan]]))[:, 0], [-1 / 3, 2 / 3])


@each_kind
def test_all_constant(kind):
    design = Design(kind, codes=8)
    Z = design.fit_transform(np.full((5, 3), 0.1))
    assert (Z == 0).all() and Z.shape == (5, 1)
    assert design.names_ == ["constant"] and design.groups_.tolist() == [0]
    assert through_json(design).transform(np.ones((2, 3))).shape == (2, 1)


@each_kind
def test_wide_tables(kind):
    X = np.random.default_rng(0).normal(size=(20, 10_000))
    Z = Design(kind, codes=8).fit_transform(X)
    assert Z.shape == X.shape
    np.testing.assert_allclose(Z.std(axis=0), 1)


@each_kind
def test_numbers_of_any_size(kind):
    X = np.random.default_rng(0).normal(size=(400, 4)) * [1e-300, 1e300, 1e307, 1]
    X[:8, 3] = np.finfo(float).max
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Z = Design(kind).fit_transform(X)
    assert np.isfinite(Z).all()
    np.testing.assert_allclose(Z.std(axis=0), 1)
    assert np.abs(bounded(X)).max() == 1e300


@pytest.mark.parametrize("dtype", [np.float32, np.int64, bool])
def test_dtypes(dtype):
    X = (np.random.default_rng(0).integers(0, 5, (60, 3)) % (2 if dtype is bool else 5)).astype(
        dtype
    )
    for codes in (0, 8):
        design = Design(codes=codes)
        Z = design.fit_transform(X)
        assert Z.dtype == (np.float32 if dtype is np.float32 else np.float64)
        wanted = Design(codes=codes).fit_transform(X.astype(float))
        np.testing.assert_allclose(Z, wanted, rtol=1e-5, atol=1e-6)
        assert design.derivatives(X).shape == Z.shape


def test_rows_without_weight_are_none():
    X, weights = with_weight(np.arange(6.0).reshape(3, 2), [0, 2, 1])
    assert X.tolist() == [[2, 3], [4, 5]] and weights.tolist() == [2, 1]
    with pytest.raises(ValueError, match="sample_weight is 0 for every row"):
        Design().fit(np.ones((3, 2)), None, [0, 0, 0])


def test_identity():
    X = np.arange(6.0).reshape(3, 2)
    design = Identity()
    assert design.fit_transform(X, names=["a", "b"]) is X
    assert design.groups_.tolist() == [0, 1] and design.blocks_ == []
    again = through_json(design)
    assert again.transform(X) is X and again.names_ == ["a", "b"]
    assert (again.derivatives(X) == 1).all()
