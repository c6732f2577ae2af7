"Default calls and tuned ones on raw tables: rows, resuming, standings, probabilities, the command."

import gzip
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from agop_book.book.load import load
from agop_book.book.peers import LEARNERS, REFERENCES, TUNED
from agop_book.book.peers import Learner, XRFMClassifier, XRFMRegressor
from agop_book.book.practice import joined_measures, main, measures, measures_text, read_measures
from agop_book.book.practice import stored_measures, tuned_measures
from agop_book.book.standings import calibration_error, draw_standings, score_table, scores_at
from agop_book.book.standings import standings
from agop_book.book.trials import STAND_INS, cross_validate, measure, practice_tasks
from agop_book.book.trials import read_split, read_task
from agop_book.files import UnreadableData
from agop_book.rfm import RFMRegressor

FAST = ["HistGradientBoosting", "RFM, bandwidth 10"]
SMALL = ["diabetes", "wine"]
FOREST = {"package": "scikit-learn", "module": "sklearn.ensemble", "stem": "RandomForest"}
TREE = FOREST | {"module": "sklearn.tree", "stem": "DecisionTree"}
SPACE = ({"max_depth": [1, 2, 3, 4, 5], "min_samples_leaf": [1, 2, 3, 4, 5]},)


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    "No data but what a test writes, and a folder of its own for results."
    data = tmp_path / "data"
    (data / "pmlb").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGOP_BOOK_DATA", str(data))
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "none"))
    monkeypatch.setattr("agop_book.book.sources.cache_dir", lambda: tmp_path / "cache")
    read_task.cache_clear()
    return data / "pmlb"


@pytest.fixture
def fits(monkeypatch):
    "The learners that were made, in order."
    monkeypatch.setitem(TUNED, "tree, tuned", Learner(**TREE, space=SPACE))
    made, real = [], Learner.make

    def make(self, *how):
        made.append(self)
        return real(self, *how)

    monkeypatch.setattr(Learner, "make", make)
    return made


def write(path, frame):
    with gzip.open(path, "wt") as file:
        frame.to_csv(file, sep="\t", index=False)


def people(n=60, name="target"):
    "Ages, incomes, and a category coded by the numbers 3, 5 and 9."
    rng = np.random.default_rng(0)
    x = {"age": rng.integers(18, 80, n), "income": rng.normal(4e4, 1e4, n)}
    return pd.DataFrame(x | {name: rng.choice([3, 5, 9], n)})


# --- tables


@pytest.mark.parametrize("name", ["target", "class"])
def test_tables_in_a_folder(places, name):
    frame = people(name=name)
    write(places / "cls__people.tsv.gz", frame)
    write(places / "reg__people.tsv.gz", frame)
    assert practice_tasks() == ["pmlb/cls__people", "pmlb/reg__people"]
    classes, numbers = (load(task, split="all") for task in practice_tasks())
    assert classes.classes == ["3", "5", "9"] and numbers.classes is None
    assert (np.array([3, 5, 9])[classes.y] == frame[name]).all() and (
        numbers.y == frame[name]
    ).all()
    assert classes.columns == ["age", "income"] and np.allclose(classes.x, frame.iloc[:, :2])


def test_a_table_without_a_target(places):
    write(places / "reg__odd.tsv.gz", people(name="outcome"))
    with pytest.raises(UnreadableData, match="reg__odd.*no column target or class"):
        load("pmlb/reg__odd")
    (places / "reg__cut.tsv.gz").write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(UnreadableData, match="reg__cut"):
        load("pmlb/reg__cut")
    with pytest.raises(ValueError, match="pmlb/reg__537_houses"):
        load("pmlb")


def test_stand_ins_where_there_are_no_tables():
    assert practice_tasks() == list(STAND_INS)
    kinds = {name: read_task(name)[2] for name in STAND_INS}
    assert sum(kinds.values()) == 4 and len(kinds) == 7
    widths = read_task("friedman2")[0].std(0)
    assert widths.max() > 100 * widths.min()  # in their own units
    with pytest.raises(ValueError, match="no table of numbers"):
        read_task("help_topics")


def test_the_rows_are_the_first_of_a_plain_split():
    X, y, regression = read_task("diabetes")
    a, b, c, d = train_test_split(X, y, test_size=0.25, random_state=3)
    got = read_split("diabetes", 50, 3)
    for found, expected in zip(got, (a[:50], c[:50], b, d)):
        assert (found == expected).all()
    assert got[4] and len(read_split("diabetes", 10**6, 3)[0]) == len(a)


# --- scores


def test_calibration_error_of_known_forecasters():
    y = np.array([1] * 8 + [0] * 2)
    for p, error in ((0.8, 0.0), (0.95, 0.15), (1.0, 0.2)):
        P = np.tile([1 - p, p], (10, 1))
        assert np.isclose(calibration_error(y, P, [0, 1]), error)
    two = np.array([[0.1, 0.9]] * 5 + [[0.7, 0.3]] * 5)  # right in 5 of 5, in 2 of 5
    assert np.isclose(calibration_error(y, two, [0, 1]), 0.5 * 0.1 + 0.5 * 0.3)
    assert calibration_error(np.array(["b"]), np.array([[0.0, 1.0]]), ["a", "b"]) == 0


class Fixed:
    "A classifier with the probabilities that it was given."

    def __init__(self, classes, P):
        self.classes_, self.P = np.array(classes), np.array(P)

    def predict(self, X):
        return self.classes_[self.P.argmax(1)][:, None]  # in a column, as CatBoost has it

    def predict_proba(self, X):
        return self.P


def test_a_class_that_training_lacked():
    model = Fixed([0, 2], [[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]])
    found = scores_at(model, np.zeros((3, 1)), np.array([0, 2, 1]), False)
    whole = [[0.5, 0, 0.5], [0.25, 0, 0.75], [0.9, 1e-15, 0.1]]
    assert np.isclose(found["log_loss"], log_loss([0, 2, 1], whole, labels=[0, 1, 2]))
    assert found["score"] == pytest.approx(2 / 3) and found["log_loss"] > 10
    alone = scores_at(Fixed([4], [[1.0]]), np.zeros((1, 1)), np.array([4]), False)
    assert [alone[name] for name in ("score", "log_loss", "ece")] == [1.0, 0.0, 0.0]


# --- one learner on one table


def test_scores_of_both_kinds():
    row = measure("friedman1", 200, 0, "HistGradientBoosting", {}, "any")
    assert row["error"] is None and row["kind"] == "regression" and 0.3 < row["score"] < 1
    assert row["fit"] > 0 and row["predict"] > 0 and row["log_loss"] is None
    assert (row["rows"], row["p"], row["device"]) == (200, 10, "cpu")
    row = measure("breast_cancer", 200, 0, "HistGradientBoosting", {}, "any")
    assert row["kind"] == "classification" and row["score"] > 0.9
    assert 0 < row["log_loss"] < 1 and 0 < row["ece"] < 0.2
    row = cross_validate("wine", 100, 0, "RFM, tuned", {"kernel": "gaussian", "n_iter": 0}, "any")
    assert row["error"] is None and row["score"] > 0.9
    assert measure("wine", 5000, 0, "HistGradientBoosting", {}, "any")["rows"] == 133


def test_whatever_a_learner_raises_is_its_row():
    row = measure("wine", 50, 0, "random forest", {"n_estimators": -1}, "any")
    assert "n_estimators" in row["error"] and row["score"] is None and row["kind"]
    row = cross_validate("wine", 50, 0, "RFM, tuned", {"n_iter": -1}, "any")
    assert "n_iter" in row["error"] and row["score"] is None


def test_scaled_learners_do_not_see_units():
    X, y, X_test, y_test, _ = read_split("friedman2", 150, 0)
    learner = REFERENCES["RFM, bandwidth 10"]
    plain = learner.make(True).fit(X, y).predict(X_test)
    far = learner.make(True).fit(X * [1, 1e3, 1e-3, 10], 7 + 100 * y)
    assert np.allclose(far.predict(X_test * [1, 1e3, 1e-3, 10]), 7 + 100 * plain, rtol=1e-6)


def test_calibration_with_classes_smaller_than_the_folds():
    rng = np.random.default_rng(0)
    y = np.r_[np.arange(60) % 2, [2, 2]]
    X = rng.normal(size=(62, 3)) + y[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = REFERENCES["RFM, calibrated"].make(False).fit(X, y)
    P = model.predict_proba(X)
    assert P.shape == (62, 3) and np.allclose(P.sum(1), 1) and (model.classes_ == [0, 1, 2]).all()


def test_versions_follow_calls_and_code(monkeypatch):
    forest = Learner(**FOREST)
    assert forest.version() == Learner(**FOREST).version() and "scikit-learn" in forest.version()
    assert forest.version() != Learner(**FOREST, options={"n_estimators": 3}).version()
    assert Learner("no-such-package", "nowhere", "No").version() is None
    ours, theirs = LEARNERS["RFM"].version(), forest.version()
    monkeypatch.setattr("agop_book.book.peers.closure", lambda sources: {"rfm": "changed"})
    assert LEARNERS["RFM"].version() != ours and forest.version() == theirs


@pytest.mark.parametrize("kind, table", [(XRFMRegressor, "friedman1"), (XRFMClassifier, "wine")])
def test_xrfm(kind, table):
    pytest.importorskip("xrfm", reason="xrfm is not installed")
    X, y, X_test, y_test, regression = read_split(table, 200, 0)
    mean, std = X.mean(0), X.std(0)
    labels = y if regression else np.array(["a", "b", "c"])[y]
    model = kind().fit((X - mean) / std, labels)
    answers = y_test if regression else np.array(["a", "b", "c"])[y_test]
    assert model.score((X_test - mean) / std, answers) > 0.7


# --- studies


def test_nothing_is_measured_twice_and_changes_are_noticed(fits, monkeypatch):
    first = measures(SMALL, FAST, sizes=[60], progress=False)
    assert len(fits) == 4 and first["error"].isna().all()
    assert measures(SMALL, FAST, sizes=[60], progress=False).equals(first) and len(fits) == 4
    measures(SMALL, FAST, sizes=[60, 80], seeds=[0, 1], progress=False)
    assert len(fits) == 16
    slower = Learner(**FOREST | {"stem": "HistGradientBoosting"}, options={"max_iter": 20})
    monkeypatch.setitem(LEARNERS, "HistGradientBoosting", slower)
    again = measures(SMALL, FAST, sizes=[60], progress=False)
    assert fits[16:] == [slower, slower] and len(again) == 4


def test_absent_packages_are_left_out_and_said(monkeypatch, capsys):
    monkeypatch.setitem(LEARNERS, "absent", Learner("no-such-package", "nowhere", "No"))
    rows = measures(["wine"], ["absent", *FAST], sizes=[50], progress=False)
    assert set(rows["model"]) == set(FAST)
    assert "left out: absent (pip install no-such-package)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of the models is installed"):
        measures(["wine"], ["absent"], sizes=[50], progress=False)


def test_regressions_are_not_calibrated():
    rows = measures(SMALL, ["RFM, calibrated"], sizes=[60], progress=False)
    assert rows["task"].tolist() == ["wine"] and rows["log_loss"].notna().all()


def test_a_stopped_search_goes_on_with_its_next_trial(monkeypatch, fits):
    models, real = ["tree, tuned"], Learner.make

    def stops(self, *how):
        if len(fits) == 8:
            raise KeyboardInterrupt
        return real(self, *how)

    monkeypatch.setattr(Learner, "make", stops)
    with pytest.raises(KeyboardInterrupt):
        tuned_measures(["wine"], models, n=60, trials=4, progress=False)
    assert len(fits) == 8  # two trials of three folds are whole
    monkeypatch.setattr(Learner, "make", real)
    fits.clear()
    (row,) = tuned_measures(["wine"], models, n=60, trials=4, progress=False).to_dict("records")
    assert len(fits) == 2 * 3 + 1 and row["error"] is None and row["search"] > 0
    (again,) = tuned_measures(["wine"], models, n=60, trials=4, progress=False).to_dict("records")
    assert again == row and len(fits) == 7


def test_the_best_trial_is_kept(tmp_path, fits):
    rows = tuned_measures(["wine"], ["tree, tuned"], n=60, trials=5, progress=False)
    (row,) = rows.to_dict("records")
    lines = (tmp_path / "out/results/practice-trials-quick.jsonl").read_text().splitlines()
    trials = [json.loads(line)["row"] for line in lines]
    best = max(trials, key=lambda trial: trial["score"])
    assert len(trials) == 5 and row["params"] == best["params"]
    assert trials[0]["params"] == {} and set(trials[1]["params"]) == set(SPACE[0])


@pytest.mark.parametrize("name", TUNED)
def test_every_trial_can_be_made(name):
    learner = TUNED[name]
    if learner.version() is None:
        pytest.skip(f"{learner.package} is not installed")
    trials = learner.trials(30, 0)
    assert trials[0] == {} and len(trials) == 30 and learner.trials(5, 0) == trials[:5]
    for params in trials:
        model = learner.make(True, 0, params)
        assert params or type(model).__name__.endswith("Regressor")


def test_the_first_trial_is_the_default_call():
    row = measure("friedman2", 100, 0, "HistGradientBoosting", {}, "any")
    tuned = measure("friedman2", 100, 0, "HistGradientBoosting, tuned", {}, "any")
    assert tuned["score"] == row["score"]
    assert isinstance(TUNED["RFM, tuned"].make(True, 0, {}), RFMRegressor)


# --- rows that are known


def test_rows_of_another_run_are_not_measured_again(fits, tmp_path, monkeypatch):
    first = measures(SMALL, FAST, sizes=[60], progress=False)
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path / "elsewhere"))
    path = tmp_path / "rows.csv"
    path.write_text(measures_text(first))
    options = dict(sizes=[60], progress=False)
    known = read_measures(path)
    again = measures(SMALL, FAST, **options, known=known)
    assert len(fits) == 4 and np.allclose(again["score"], first["score"], rtol=1e-5)
    assert again["error"].tolist() == [None] * 4
    stale = known.assign(version="an older one")
    measures(SMALL, FAST, **options, known=stale)
    assert len(fits) == 8


def test_rows_of_two_runs():
    known = rows_of({"a": [0.9, 0.7], "b": [0.5, 0.4]})
    found = rows_of({"b": [0.6, 0.3], "c": [0.1, 0.2]})
    rows = joined_measures(known, found)
    scores = rows.groupby("model")["score"].apply(list).to_dict()
    assert scores == {"a": [0.9, 0.7], "b": [0.6, 0.3], "c": [0.1, 0.2]}
    assert joined_measures(None, found).equals(found)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "params,error\n{},\n", "params,error\n{,\n"])
def test_other_tables_are_no_measures(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(UnreadableData, match="rows.csv: no measures of tables"):
        read_measures(path)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(models=["RMF"]), "unknown model 'RMF': did you mean 'RFM'"),
        (dict(tasks=[]), "tasks is empty"),
        (dict(tasks=["dibetes"]), "did you mean 'diabetes'"),
        (dict(sizes=[0]), "sizes=0"),
    ],
)
def test_hostile_options(options, words):
    with pytest.raises(ValueError, match=words):
        measures(**{"tasks": SMALL, "models": FAST, "progress": False, **options})


# --- standings


def rows_of(scores, kind="regression", n=1000):
    "Rows from a dict model -> scores of the tasks."
    return pd.DataFrame(
        {"kind": kind, "n": n, "task": f"t{k}", "model": model, "score": score, "seed": 0,
         "log_loss": 0.1 * k, "ece": 0.01, "fit": 2.0, "predict": 0.5, "error": None}
        for model, values in scores.items() for k, score in enumerate(values)
    )  # fmt: skip


def test_standings_of_a_hand_made_table():
    rows = rows_of({"a": [0.9, 0.8, 0.5], "b": [0.8, 0.8, 0.6], "c": [0.1, 0.2, 0.3]})
    found = standings(rows, "b").loc["regression", 1000]
    assert found["mean"].to_dict() == pytest.approx({"a": 2.2 / 3, "b": 2.2 / 3, "c": 0.2})
    assert found["rank"].to_dict() == pytest.approx({"a": 4.5 / 3, "b": 4.5 / 3, "c": 3})
    assert found["over b"].to_dict() == {"a": 1, "b": 0, "c": 0}
    assert found["log-loss"].to_dict() == pytest.approx(dict.fromkeys("abc", 0.1))
    assert found["fit seconds"].to_dict() == dict.fromkeys("abc", 6.0)


def test_standings_apart_by_kind_and_size_and_without_failed_tasks():
    whole = {"a": [0.9, 0.7], "b": [0.8, None]}
    parts = [rows_of(whole), rows_of(whole, "classification"), rows_of(whole, n=5000)]
    found = standings(pd.concat(parts), "HistGradientBoosting")
    assert len(found) == 6 and set(found["tables"]) == {1} and (found["rank"].max() == 2)
    assert not any(name.startswith("over") for name in found)


def test_models_without_any_score_are_left_out():
    none = [None, None]
    found = standings(rows_of({"a": [0.9, 0.7], "b": none, "c": [0.8, 0.6]}))
    assert found.index.get_level_values("model").tolist() == ["a", "c"]
    with pytest.raises(ValueError, match="no task has an accuracy of every model"):
        standings(rows_of({"a": [0.9, None], "b": [None, 0.7]}))


def test_seeds_are_averaged():
    rows = pd.concat([rows_of({"a": [0.9], "b": [0.5]}), rows_of({"a": [0.7], "b": [0.7]})])
    assert score_table(rows).loc["t0"].to_dict() == pytest.approx({"a": 0.8, "b": 0.6})


def test_diagrams():
    scores = {name: np.random.default_rng(k).random(8) for k, name in enumerate("abc")}
    fig = draw_standings(pd.concat([rows_of(scores), rows_of(scores, "classification")]))
    assert [ax.get_title()[:15] for ax in fig.axes] == ["classification,", "regression, 1,0"]
    assert "mean rank over 8 tasks" in fig.axes[0].get_title()


# --- the command and the stored run


def test_the_command(tmp_path, capsys):
    csv = tmp_path / "rows.csv"
    argv = ["wine", "--n", "60", "--csv", str(csv), "--model"]
    assert main([*argv, "random forest"]) == 0
    assert main([*argv, "HistGradientBoosting", "--trials", "1"]) == 0
    printed = capsys.readouterr().out
    assert "HistGradientBoosting, tuned" in printed and "over HistGradientBoosting" in printed
    rows = read_measures(csv)
    tuned = "HistGradientBoosting, tuned"
    assert rows["model"].tolist() == ["HistGradientBoosting", tuned, "random forest"]
    assert (rows["params"] == {}).all() and rows["error"].isna().all()
    capsys.readouterr()
    forest = rows["model"] == "random forest"
    equal = rows.assign(score=rows.loc[forest, "score"].item())
    csv.write_text(measures_text(equal[~forest]))  # the forest's row is that of the study
    assert main([*argv, "random forest"]) == 0 and 45 * equal["score"][0] % 1
    assert capsys.readouterr().out.count("   1.5   ") == 2
    csv.write_text("no rows\n")
    with pytest.raises(SystemExit):
        main([*argv, "random forest"])
    assert "no measures of tables" in capsys.readouterr().err
    assert csv.read_text() == "no rows\n"


def test_the_command_says_what_failed(monkeypatch, capsys, tmp_path):
    broken, csv = Learner(**FOREST, options={"n_estimators": -1}), tmp_path / "rows.csv"
    monkeypatch.setitem(LEARNERS, "broken", broken)
    command = ["wine", "--n", "50", "--model", "broken", "--csv", str(csv)]
    assert main([*command, "--model", "RFM"]) == 1
    said = capsys.readouterr()
    assert "broken on wine (50 rows): InvalidParameterError" in said.err and "RFM" in said.out
    assert main(command) == 1 and len(read_measures(csv)) == 2
    csv.unlink()
    assert main(command) == 1 and len(read_measures(csv)) == 1
    assert "no row has a score" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["wine", "--model", "RMF"], "did you mean 'RFM'"),
        (["wien"], "did you mean 'wine'"),
        (["wine", "--n", "3"], "sizes=3"),
        (["wine", "--csv", "nowhere/r.csv"], "--csv: no folder"),
    ],
)
def test_command_line_errors(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_the_stored_run_is_whole():
    stored = stored_measures()
    if stored is None:
        pytest.skip("no stored run")
    assert not stored.duplicated(["task", "n", "seed", "model"]).any()
    assert stored["error"].isna().all() and set(stored["n"]) == {1000, 5000}
    assert set(stored["model"]) <= set(LEARNERS | REFERENCES | TUNED)
    rows = stored[stored["model"].isin(LEARNERS)]
    assert set(rows["model"]) == set(LEARNERS) and rows["task"].nunique() == 30
    assert measures_text(stored).count("\n") == len(stored) + 1
