"""The search: the one-standard-error rule, ties, resuming, failed trials, Ctrl-C."""

import re
import signal
import subprocess
import sys
import time

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import (
    ROOT,
    SCRIPTS,
    SOON,
    Code,
    assert_one_line,
    assert_success,
    children,
    edited,
    parents,
    run,
    store,
    user_env,
)
from sklearn.datasets import load_iris
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import make_scorer
from sklearn.model_selection import StratifiedKFold, cross_val_score

import hyperparameter_tuning as script

SCRIPT = SCRIPTS[0]
SMALL = {"max_depth": [1, 3], "n_estimators": [5]}


def ranked(*rows):
    return pd.DataFrame(rows, columns=["trial", "mean", "standard_error", "fit_seconds"])


# Steps, with a few rows.


def test_the_cheapest_is_within_one_standard_error_of_the_best():
    table = ranked(("a", 0.95, 0.02, 9.0), ("b", 0.931, 0.01, 3.0), ("c", 0.929, 0.03, 1.0))
    assert script.cheapest_within_one_standard_error(table, noise=1.5)["trial"] == "b"


def test_of_about_equal_fit_times_the_better_score_wins():
    table = ranked(("a", 0.95, 0.02, 9.0), ("b", 0.94, 0.01, 1.4), ("c", 0.935, 0.03, 1.0))
    assert script.cheapest_within_one_standard_error(table, noise=1.5)["trial"] == "b"
    assert script.cheapest_within_one_standard_error(table, noise=1.3)["trial"] == "c"


def test_a_trial_is_named_after_its_parameters():
    grid = {"b": [None, True], "a": ["sqrt", np.float64(0.1)]}
    assert list(script.make_trials(grid)) == [
        "a=sqrt, b=None",
        "a=sqrt, b=True",
        "a=0.1, b=None",
        "a=0.1, b=True",
    ]


def test_the_mean_score_with_each_value_is_that_of_its_trials():
    grid = {"depth": [1, None], "share": [0.1]}
    trials = script.make_trials(grid)
    table = ranked(("depth=None, share=0.1", 0.9, 0, 1), ("depth=1, share=0.1", 0.8, 0, 1))
    means = script.mean_scores(table, trials, grid)
    assert means["depth"].to_dict() == {"1": 0.8, "None": 0.9}
    assert means["share"].to_dict() == {"0.1": pytest.approx(0.85)}
    assert script.draw_search(means, "accuracy").axes


@pytest.fixture(scope="module")
def iris():
    X, y = load_iris(return_X_y=True, as_frame=True)
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(X, y))
    return X, y.astype(str).astype(object), folds


def test_any_estimators_are_scored_as_scikit_learn_does(iris):
    X, y, folds = iris
    models = {"trees": ExtraTreesClassifier(5, random_state=0), "linear": LogisticRegression()}
    results = script.run_trials(models, X, y, "f1", script.SCORERS["f1"], folds)
    results = {name: (metrics, error) for name, metrics, error in results}
    for name, model in models.items():
        metrics, error = results[name]
        scores = cross_val_score(model, X, y, cv=folds, scoring="f1_macro")
        assert error is None
        assert metrics["cv_f1"] == pytest.approx(scores.mean(), abs=1e-9)
        assert metrics["cv_f1_se"] == pytest.approx(scores.std(ddof=1) / 5**0.5)
        assert metrics["fit_seconds"] > 0


def test_a_scorer_that_returns_nan_fails_the_trial(iris):
    X, y, folds = iris
    scorer = make_scorer(lambda y, predicted: float("nan"))
    name, metrics, error = script.run_trial("t", LogisticRegression(), X, y, "m", scorer, folds)
    assert (metrics, error) == ({}, "ValueError: the scorer returned nan")


def test_a_failed_trial_keeps_its_own_words(iris):
    X, y, folds = iris
    scorer = make_scorer(lambda y, predicted: not_defined)  # noqa: F821
    *_, error = script.run_trial("t", LogisticRegression(), X, y, "m", scorer, folds)
    assert error == "NameError: name 'not_defined' is not defined"


# The script, with a small grid.


def test_of_equal_scores_the_first_by_name_wins(folder):
    """Trials finish in any order, and the last ones of the grid start first."""
    constant = Code("{'accuracy': make_scorer(lambda y, predicted: 0.5)}")
    edited(folder, SCRIPT, PARAM_GRID={"n_estimators": [3, 2, 1]}, SCORERS=constant)
    assert_success(run(folder / SCRIPT, cwd=folder))
    store(folder)
    (search,) = parents("hyperparameter-tuning")
    assert search.data.tags["best_trial"] == "n_estimators=1"
    assert mlflow.artifacts.load_dict(f"runs:/{search.info.run_id}/best_params.json") == {
        "n_estimators": 1
    }


def test_failed_trials_do_not_end_a_search_unless_all_fail(folder):
    edited(folder, SCRIPT, PARAM_GRID={"n_estimators": [5, 0]})
    process = run(folder / SCRIPT, cwd=folder)
    assert_success(process)
    store(folder)
    (search,) = parents("hyperparameter-tuning")
    trials = children(search)
    assert trials["n_estimators=0"].info.status == "FAILED"
    assert "n_estimators" in trials["n_estimators=0"].data.tags["error"]
    assert trials["n_estimators=5"].info.status == "FINISHED"
    assert search.data.tags["best_trial"] == "n_estimators=5"
    assert "InvalidParameterError" in process.stdout and "Best of 1 trials" in process.stdout

    edited(folder, SCRIPT, PARAM_GRID={"n_estimators": [0]})
    assert_one_line(run(folder / SCRIPT, cwd=folder), "all 1 trials failed", "n_estimators")
    assert [run_.info.status for run_ in parents("hyperparameter-tuning")] == ["FINISHED", "FAILED"]


def test_a_search_is_interrupted_resumed_widened_and_narrowed(folder):
    """Ctrl-C ends the run as FAILED, in silence; finished trials do not run again."""
    edited(folder, SCRIPT, PARAM_GRID={"max_depth": [1, 3, 9], "n_estimators": [5, 400]})
    process = subprocess.Popen(
        [sys.executable, folder / SCRIPT],
        cwd=folder,
        env=user_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    while not any(line.startswith("  2/6") for line in lines):
        lines.append(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SOON)
    assert process.returncode == 130
    assert "Traceback" not in errors
    store(folder)
    (search,) = parents("hyperparameter-tuning")
    assert search.info.status == "FAILED"
    before = children(search)
    assert {trial.info.status for trial in before.values()} <= {"FINISHED", "FAILED"}
    finished = {n: t.info.run_id for n, t in before.items() if t.info.status == "FINISHED"}
    assert len(finished) >= 2
    (resume,) = re.findall("--resume ([0-9a-f]{32})", "".join(lines))
    assert resume == search.info.run_id

    other = run(folder / SCRIPT, "--resume", resume, "--metric", "f1", cwd=folder)
    assert_one_line(other, "cannot resume", "'metric': 'accuracy'")
    resumed = run(folder / SCRIPT, "--resume", resume, cwd=folder)
    assert_success(resumed)
    assert f"1/{6 - len(finished)}  " in resumed.stdout
    assert "Best of 6 trials" in resumed.stdout
    after = {name: trial.info.run_id for name, trial in children(search).items()}
    assert finished.items() <= after.items() and len(after) == 6

    edited(folder, SCRIPT, PARAM_GRID={"max_depth": [3, 9, 12], "n_estimators": [5]})
    widened = run(folder / SCRIPT, "--resume", resume, cwd=folder)
    assert_success(widened)
    assert "1/1  " in widened.stdout and "Best of 3 trials" in widened.stdout
    (search,) = parents("hyperparameter-tuning")
    best = search.data.tags["best_trial"]
    assert search.info.status == "FINISHED" and "n_estimators=5" in best
    params = mlflow.artifacts.load_dict(f"runs:/{resume}/best_params.json")
    assert best == ", ".join(f"{name}={value}" for name, value in params.items())

    assert_one_line(run(folder / SCRIPT, "--resume", "0" * 32, cwd=folder), "0" * 32)
    other = run(folder / SCRIPT, "--resume", resume, "--metric", "f1", cwd=folder)
    assert_one_line(other, "cannot resume")
    (search,) = parents("hyperparameter-tuning")
    assert search.info.status == "FINISHED"  # what does not fit does no harm


def test_no_worker_outlives_an_interrupted_search(folder):
    process = subprocess.Popen(
        [sys.executable, ROOT / SCRIPT],
        cwd=folder,
        env=user_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not process.stdout.readline().startswith("  1/27"):
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=SOON)
    deadline = time.monotonic() + SOON
    alive = [process.pid]
    while alive and time.monotonic() < deadline:
        listed = subprocess.run(["ps", "-o", "pid=", "-s", str(process.pid)], capture_output=True)
        alive = listed.stdout.split()
        time.sleep(0.2)
    assert alive == []
