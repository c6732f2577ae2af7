"Tables as people have them: which columns are categories, and what becomes of every dtype."

import json
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.preprocessing import OrdinalEncoder

from agop_book.frames import FrameEncoder, categorical_mask

each_dates = pytest.mark.parametrize(
    "dates",
    [
        pd.Series(pd.to_datetime(["2020-01-01", "2021-01-01"])),
        pd.Series(pd.to_timedelta([1, 2], unit="D")),
        pd.Series(pd.period_range("2020", "2021", freq="Y")),
        pd.Series(pd.to_datetime(["2020-01-01", "2021-01-01"]).tz_localize("UTC")),
    ],
    ids=["datetime", "timedelta", "period", "zone"],
)


def homes():
    "A category, a number with a hole, yes and no."
    return pd.DataFrame(
        {
            "town": pd.Categorical(["Rome", "Oslo", None, "Rome"]),
            "m2": [70.0, 45, np.nan, 90],
            "lift": [True, False, True, True],
        }
    )


@pytest.mark.parametrize(
    "chosen", [["town"], [0], [True, False, False], np.array([0]), "from_dtype", ("town",)]
)
def test_ways_to_name_the_categories(chosen):
    assert categorical_mask(homes(), chosen).tolist() == [True, False, False]


@pytest.mark.parametrize("chosen", [None, [], [False] * 3])
def test_no_categories(chosen):
    assert not categorical_mask(homes(), chosen).any()
    assert not categorical_mask(np.zeros((2, 3)), "from_dtype").any()


@pytest.mark.parametrize(
    "chosen, said",
    [
        (["city"], "names 'city', which is no column of X; those are 'town', 'm2', 'lift'"),
        ([3], "names the column 3; X has 3 columns, 0 to 2"),
        ([-1], "names the column -1"),
        ([True], "mask of 1 entries, and X has 3 columns"),
        ("all", "categorical_features='all': must be None, 'from_dtype', a boolean mask"),
        ([0.5], "must be None, 'from_dtype'"),
        ([[0]], "must be None, 'from_dtype'"),
    ],
)
def test_wrong_choices(chosen, said):
    with pytest.raises(ValueError, match=said):
        FrameEncoder(chosen).fit(homes())


def test_names_need_a_frame():
    with pytest.raises(ValueError, match="X is an array without names; give indices or a mask"):
        FrameEncoder(["town"]).fit(np.zeros((3, 2)))


def test_frame_stays_a_frame():
    table = homes().set_index(pd.Index([5, 3, 8, 1]))
    rows = FrameEncoder().fit_transform(table)
    assert rows.columns.tolist() == ["town", "m2", "lift"] and rows.index.tolist() == [5, 3, 8, 1]
    wanted = [[1, 70, 1], [0, 45, 0], [np.nan, np.nan, 1], [1, 90, 1]]
    np.testing.assert_array_equal(rows, wanted)
    assert set(rows.dtypes) == {np.dtype(np.float64)}


def test_unseen_categories_and_holes():
    encoder = FrameEncoder().fit(homes())
    later = homes().assign(town=pd.Categorical(["Paris", None, "Oslo", "Rome"]))
    np.testing.assert_array_equal(encoder.transform(later)["town"], [-1, np.nan, 0, 1])
    words = homes().assign(town=["Paris", None, "Oslo", "Rome"])
    np.testing.assert_array_equal(encoder.transform(words)["town"], [-1, np.nan, 0, 1])


def test_only_categories_that_occur_in_the_order_of_the_dtype():
    sizes = pd.Categorical(["L", "S", "L"], categories=["S", "M", "L"], ordered=True)
    encoder = FrameEncoder().fit(pd.DataFrame({"size": sizes}))
    assert encoder.categories_ == {0: ["S", "L"]}


def test_codes_are_those_of_scikit_learn():
    words = np.array(["b", "a", np.nan, "c", "a"], dtype=object)[:, None]
    wanted = OrdinalEncoder().fit_transform(words)
    np.testing.assert_array_equal(FrameEncoder([0]).fit_transform(words), wanted)


def test_one_row_in_a_category():
    table = pd.DataFrame({"a": ["x"] * 9 + ["y"], "b": range(10)})
    rows = FrameEncoder(["a"]).fit_transform(table)
    assert rows["a"].tolist() == [0] * 9 + [1]


def test_all_missing_columns():
    table = pd.DataFrame({"a": [np.nan] * 3, "b": [None] * 3, "c": [1, 2, 3]})
    encoder = FrameEncoder(["b"]).fit(table)
    rows = encoder.transform(table)
    assert rows[["a", "b"]].isna().all(axis=None) and encoder.categories_ == {1: []}
    later = encoder.transform(table.assign(b=["x", None, "y"]))
    np.testing.assert_array_equal(later["b"], [-1, np.nan, -1])


def test_categories_that_are_numbers():
    X = np.array([[3.0, 1], [np.nan, 2], [5, 1]])
    encoder = FrameEncoder([0]).fit(X)
    np.testing.assert_array_equal(encoder.transform(X), [[0, 1], [np.nan, 2], [1, 1]])
    assert encoder.transform(np.array([[4.0, 7]])).tolist() == [[-1, 7]]


@pytest.mark.parametrize(
    "column",
    [
        pd.array([1, None, 3], "Int64"),
        pd.array([1, None, 3], "Float64"),
        pd.array([1, None, 3], "UInt8"),
        pd.Series([1, None, 3], dtype=object),
        pd.Series([1, np.nan, 3], dtype=np.float32),
    ],
    ids=["Int64", "Float64", "UInt8", "object", "float32"],
)
def test_numbers_with_holes_in_any_dtype(column):
    rows = FrameEncoder().fit_transform(pd.DataFrame({"a": column, "b": [1, 2, 3]}))
    np.testing.assert_array_equal(rows, [[1, 1], [np.nan, 2], [3, 3]])


def test_yes_and_no():
    yes = pd.array([True, None, False], "boolean")
    table = pd.DataFrame({"a": yes, "b": [True, False, True]})
    np.testing.assert_array_equal(
        FrameEncoder().fit_transform(table), [[1, 1], [np.nan, 0], [0, 1]]
    )
    np.testing.assert_array_equal(FrameEncoder(["a"]).fit_transform(table)["a"], [1, np.nan, 0])


@pytest.mark.parametrize("dtype", ["float32", "Float32"])
def test_single_precision_stays(dtype):
    table = pd.DataFrame({"a": pd.Series([1, 2, 3], dtype=dtype), "c": pd.Categorical(list("xyx"))})
    assert set(FrameEncoder().fit_transform(table).dtypes) == {np.dtype(np.float32)}
    assert set(FrameEncoder().fit_transform(table.assign(d=2**40)).dtypes) == {np.dtype("float64")}


@pytest.mark.parametrize("dtype", [object, "string", "category"])
def test_strings_are_refused_with_the_remedy(dtype):
    table = pd.DataFrame({"m2": [1, 2], "town": pd.Series(["Rome", "Oslo"], dtype=dtype)})
    with pytest.raises(ValueError, match="could not convert string to float") as error:
        FrameEncoder(None).fit_transform(table)
    said = str(error.value)
    word = "Oslo" if dtype == "category" else "Rome"
    assert f"in column 'town' (as '{word}' in 'town')" in said
    assert "X.astype({'town': 'category'})" in said and "categorical_features=['town']" in said
    rows = FrameEncoder().fit_transform(table.astype({"town": "category"}))
    assert rows["town"].tolist() == [1, 0]


def test_strings_in_lists():
    with pytest.raises(ValueError, match=r"Declare categories with categorical_features=\[0\]"):
        FrameEncoder().fit_transform(np.array([["a", 1], ["b", 2]], dtype=object)[:, [0]])
    assert FrameEncoder([0]).fit_transform([["b", 1], ["a", 2]]).tolist() == [[1, 1], [0, 2]]


def test_numbers_as_strings_are_strings():
    with pytest.raises(ValueError, match=r"numbers with X.astype\({'a': float}\)"):
        FrameEncoder().fit_transform(pd.DataFrame({"a": ["1", "2"]}))


@each_dates
def test_dates_are_refused(dates):
    table = pd.DataFrame({"m2": [1, 2], "sold": dates})
    with pytest.raises(TypeError, match="column 'sold' of X holds dates .*real numbers first"):
        FrameEncoder().fit_transform(table)


@each_dates
def test_dates_as_categories(dates):
    encoder = FrameEncoder(["sold"]).fit(pd.DataFrame({"m2": [1, 2], "sold": dates}))
    assert encoder.transform(pd.DataFrame({"m2": [1, 2], "sold": dates}))["sold"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="column 1 has the category .* this column strings"):
        encoder.to_state()


@pytest.mark.parametrize(
    "column, error, said",
    [
        ([1, [2]], TypeError, "column 'a' of X must hold real numbers"),
        ([1, 2j], ValueError, "column 'a' of X is complex"),
        ([1, np.inf], ValueError, r"infinity in column 'a' \(row 1\)"),
        (pd.array([None, -np.inf], "Float64"), ValueError, r"infinity in column 'a' \(row 1\)"),
    ],
    ids=["lists", "complex", "infinity", "infinity in Float64"],
)
def test_what_is_no_number(column, error, said):
    with pytest.raises(error, match=said):
        FrameEncoder().fit_transform(pd.DataFrame({"b": [1, 2], "a": column}))


def test_infinity_in_an_array():
    with pytest.raises(ValueError, match=r"infinity in column 1 \(row 0\)"):
        FrameEncoder().fit_transform(np.array([[1, np.inf]]))


def test_names_that_occur_twice():
    table = pd.DataFrame([[1, 2, 3]], columns=["a", "b", "a"])
    with pytest.raises(ValueError, match="more than one column of the name 'a'; rename them"):
        FrameEncoder().fit(table)


def test_what_others_complain_of_comes_back_as_it_came():
    encoder = FrameEncoder().fit(homes())
    for other in (homes()[["m2", "town", "lift"]], homes().drop(columns="m2"), [1, 2], "X", None):
        assert encoder.transform(other) is other
    for strange in (np.zeros(3), np.zeros((2, 2, 2)), [[1], [1, 2]]):
        assert FrameEncoder().fit_transform(strange) is strange


def test_plain_arrays_are_untouched():
    X = np.arange(6.0).reshape(3, 2)
    assert FrameEncoder().fit_transform(X) is X
    objects = X.astype(object)
    assert FrameEncoder().fit_transform(objects) is objects
    tensor = torch.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(FrameEncoder().fit_transform(tensor), tensor)
    assert FrameEncoder().fit_transform([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]


def test_names_that_are_no_strings():
    encoder = FrameEncoder([0]).fit(pd.DataFrame([["a", 1], ["b", 2]]))
    assert encoder.names_ is None
    assert encoder.transform(np.array([["b", 1]], dtype=object)).tolist() == [[1, 1]]


def test_ten_thousand_columns():
    X = np.random.default_rng(0).normal(size=(5, 10_000))
    table = pd.DataFrame(X).add_prefix("c").astype({"c7": "category"})
    rows = FrameEncoder().fit_transform(table)
    assert rows.shape == X.shape
    np.testing.assert_array_equal(np.delete(rows.to_numpy(), 7, axis=1), np.delete(X, 7, axis=1))
    np.testing.assert_array_equal(rows["c7"], X[:, 7].argsort().argsort())


@pytest.mark.parametrize("data", [homes(), np.array([[1.0, 2], [2, 3]]), [1, 2]])
def test_a_file_gives_the_same(data):
    encoder = FrameEncoder().fit(data)
    state = json.loads(json.dumps(encoder.to_state()))
    again = FrameEncoder.from_state(state)
    assert again.names_ == encoder.names_ and again.categories_ == encoder.categories_
    assert np.array_equal(again.categorical_, encoder.categorical_)
    one, two = again.transform(data), encoder.transform(data)
    np.testing.assert_array_equal(np.asarray(one, float), np.asarray(two, float))


@pytest.mark.skipif(
    find_spec("polars") is None or find_spec("pyarrow") is None, reason="needs polars and pyarrow"
)
def test_polars():
    import polars as pl

    towns = ["Rome", "Oslo", None]
    table = pl.DataFrame(
        {
            "town": pl.Series(towns, dtype=pl.Categorical),
            "kind": pl.Series(towns, dtype=pl.Enum(["Rome", "Oslo"])),
            "m2": [1, None, 3],
            "lift": [True, None, False],
        }
    )
    rows = FrameEncoder().fit_transform(table)
    assert rows.columns.tolist() == ["town", "kind", "m2", "lift"]
    np.testing.assert_array_equal(rows["kind"], [0, 1, np.nan])
    assert rows["town"].nunique() == 2 and rows["town"].isna().tolist() == [False, False, True]
    np.testing.assert_array_equal(rows[["m2", "lift"]], [[1, 1], [np.nan, np.nan], [3, 0]])
    with pytest.raises(ValueError, match="X holds strings in column 'town'"):
        FrameEncoder(None).fit_transform(table.select(pl.col("town").cast(pl.String)))
