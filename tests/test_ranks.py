"Statistics over a benchmark, its CSV file, and published tables."

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from agop_book.book.protocols import PROTOCOLS
from agop_book.book.ranks import (
    accuracy_table,
    critical_difference,
    friedman,
    gains_over,
    pairwise,
    rank_diagram,
    ranking,
)
from agop_book.book.results import read_published, read_results, save_results, stored_results
from agop_book.files import UnreadableData


def table(values, models="abc"):
    rows = [(f"t{i}", m, v) for i, row in enumerate(values) for m, v in zip(models, row)]
    return pd.DataFrame(rows, columns=["task", "model", "accuracy"])


# --- statistics


def test_scores_by_hand():
    s = ranking(table([[1.0, 0.9, 0.5], [0.5, 0.5, 0.46], [0.0, 0.0, 0.0]]))
    assert s.loc["a", "rank"] == (1 + 1.5 + 2) / 3 and s.loc["c", "rank"] == (3 + 3 + 2) / 3
    assert s.index[0] == "a"
    assert np.isclose(s.loc["c", "PMA"], 100 * (0.5 + 0.92 + 0) / 3)
    assert np.isclose(s.loc["c", "P90"], 100 / 3) and np.isclose(s.loc["b", "P95"], 100 / 3)


def test_missing_accuracies():
    rows = table([[1.0, 0.9, np.nan], [0.5, 0.4, 0.3]])
    assert ranking(rows)["tasks"].tolist() == [1, 1, 1]
    assert np.isclose(accuracy_table(rows, fill=True).loc["t0", "c"], 0.95)
    with pytest.raises(ValueError, match="fill=True"):
        ranking(table([[1.0, np.nan, 0.5]]))
    with pytest.raises(ValueError, match="two rows for the task.*select one protocol"):
        ranking(pd.concat([rows, rows]))


def test_tests_agree_with_scipy():
    values = np.random.default_rng(0).normal(0.8, 0.05, (40, 3)) + [0, 0, 0.04]
    rows = table(values)
    assert np.isclose(friedman(rows)[1], stats.friedmanchisquare(*values.T).pvalue)
    with pytest.raises(ValueError, match="at least 3 models"):
        friedman(table(values[:, :2], "ab"))
    bonferroni = pairwise(rows, correction="bonferroni")
    for pair in ("ac", "ba"):
        columns = ["abc".index(model) for model in pair]
        alone = stats.wilcoxon(*values[:, columns].T).pvalue
        assert np.isclose(bonferroni.loc[pair[0], pair[1]], min(1, 3 * alone))
    # three models that are the same
    assert pairwise(table(np.repeat(values[:, :1], 3, 1))).to_numpy().min() == 1


def test_rank_diagram_says_what_it_compares():
    values = np.random.default_rng(0).normal(0.8, 0.05, (40, 3)) + [0, 0, 0.04]
    fig, ax = plt.subplots()
    title = rank_diagram(table(values), ax).get_title()
    assert title == f"mean rank over 40 tasks; critical difference {critical_difference(3, 40):.2f}"
    plt.close(fig)


def test_critical_difference_of_demsar():
    assert abs(critical_difference(5, 30) - 2.728 * (30 / 180) ** 0.5) < 1e-3


def test_gains_over_a_base():
    rows = gains_over(table([[0.5, 0.6, 0.5], [0.5, 0.4, 0.5], [0.5, 0.9, 0.5]]), "a")
    assert rows.loc["b", ["won", "equal", "lost"]].tolist() == [2, 0, 1]
    assert np.isclose(rows.loc["b", "largest gain"], 40) and rows.loc["b", "on"] == "t2"
    assert rows.loc["c", "p"] == 1
    with pytest.raises(ValueError, match="no model 'Laplce' in results.*there are a, b, c"):
        gains_over(table([[1, 2, 3]]), "Laplce")


SAME = table([[1, 2, 3]] * 4)
HOSTILE = [
    (lambda: critical_difference(1, 10), "k=1"),
    (lambda: critical_difference(3, 0), "n=0"),
    (lambda: critical_difference(3, 10, 2), "alpha=2"),
    (lambda: critical_difference(3, 10, np.nan), "alpha=nan"),
    (lambda: pairwise(SAME, "hulm"), "correction='hulm'"),
    (lambda: rank_diagram(SAME, None, alpha=-1), "alpha=-1"),
    (lambda: accuracy_table(pd.DataFrame({"task": ["a"]})), "no column accuracy, model"),
]


@pytest.mark.parametrize("call, words", HOSTILE, ids=[words for _, words in HOSTILE])
def test_hostile_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- the file of a benchmark


def test_csv_round_trip(tmp_path):
    good = dict(task="t", model="good", protocol="published", accuracy=0.75, error=None)
    rows = pd.DataFrame(
        [
            {**good, "folds": [0.5, 1.0], "chosen": [{"reg": 1}]},
            {**good, "model": "moody", "accuracy": None, "error": "RuntimeError: bad mood"},
        ]
    )
    save_results(rows, tmp_path / "rows.csv")
    back = read_results(tmp_path / "rows.csv").set_index("model")
    assert back.loc["good", "chosen"] == [{"reg": 1}] and back.loc["good", "folds"] == [0.5, 1.0]
    assert back.loc["good", "accuracy"] == 0.75 and back.loc["good", "error"] is None
    assert back.loc["moody", "error"] == "RuntimeError: bad mood"
    assert np.isnan(back.loc["moody", "accuracy"]) and back.loc["moody", "folds"] is None
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UnreadableData, match="no column accuracy"):
        read_results(tmp_path / "other.csv")
    with pytest.raises(FileNotFoundError, match="no results at"):
        read_results(tmp_path / "none.csv")


HEAD = "task,model,protocol,accuracy,folds,chosen,error\n"


@pytest.mark.parametrize(
    "text, words",
    [
        (HEAD + "a,b,published,0.5,[0.5,,\n", "folds is not JSON"),
        (HEAD + f"a,b,published,0.5,{'[' * 100_000},,\n", "folds is not JSON"),
        (HEAD + "a,b,published,high,[],,\n", "accuracy is no number"),
        ("a,b\n1,2,3\n4,5,6,7\n", "not a table|no column"),
        ("", "not a table"),
        ("task,model,protocol,accuracy\n", "no column chosen, error, folds"),
    ],
    ids=["cut off", "deep", "a word", "ragged", "empty", "no columns"],
)
def test_hostile_results_files(tmp_path, text, words):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(UnreadableData, match=f"r.csv.*({words})"):
        read_results(tmp_path / "r.csv")


def test_stored_results_are_the_whole_run():
    stored = stored_results()
    if stored is None:
        pytest.skip("no stored results")
    assert not stored.duplicated(["task", "model", "protocol"]).any()
    for protocol, (_, models) in PROTOCOLS.items():
        sizes = stored[stored["protocol"] == protocol].groupby("model").size()
        assert sizes.to_dict() == dict.fromkeys(models, 120)
    given = stored[stored["protocol"] == "published"]
    assert given["task"].nunique() == 120 and given["n"].max() == 67_557
    assert "miniboone" not in set(given["task"])
    assert (given["error"].isna() == given["accuracy"].notna()).all()


# --- published tables


def test_published_accuracies(tmp_path):
    path = tmp_path / "results.txt"
    for header in ("problem rforest_R svm_C", "rforest_R\tsvm_C"):
        path.write_text(f"{header}\nabalone 62.3 --\n\nt0   96.0\t97.3\n")
        theirs = read_published(path)
        assert theirs["accuracy"].tolist()[::2] == [0.623, 0.96]
        assert theirs["accuracy"].isna().sum() == 1
        assert set(theirs["model"]) == {"rforest_R", "svm_C"}
    together = ranking(pd.concat([table([[1.0, 0.9, 0.5]]), theirs]))
    assert len(together) == 5 and together["tasks"].max() == 1
    assert len(ranking(theirs, fill=True)) == 2


@pytest.mark.parametrize(
    "text, words",
    [
        ("a b\nt 1 2 3\n", "line 1: 2 classifiers for 3 accuracies"),
        ("a b\nt 1 2\nu 1\n", "line 3: 1 accuracies, expected 2"),
        ("a b\nt 1 x\n", "line 2: 'x' is not a number.*b on t"),
        ("a b\nt 1 200\n", "line 2: 200 is not a percentage"),
        ("", "found 0 lines"),
    ],
)
def test_malformed_published_table(tmp_path, text, words):
    (tmp_path / "r.txt").write_text(text)
    with pytest.raises(UnreadableData, match=words):
        read_published(tmp_path / "r.txt")
    with pytest.raises(FileNotFoundError, match="no table of published"):
        read_published(tmp_path / "none.txt")
