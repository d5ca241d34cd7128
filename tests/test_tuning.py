"""The search: the one-standard-error rule, ties, resuming, failed trials, Ctrl-C."""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import (
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
import model_comparison

SCRIPT = SCRIPTS[0]


def ranked(*rows):
    columns = ["trial", "mean", "standard_error", "fit_seconds"]
    return pd.DataFrame(rows, columns=columns).set_index("trial")


# Steps, with a few rows.


def test_the_cheapest_is_within_one_standard_error_of_the_best():
    table = ranked(("a", 0.95, 0.02, 9.0), ("b", 0.931, 0.01, 3.0), ("c", 0.929, 0.03, 1.0))
    assert script.cheapest_within_one_standard_error(table, noise=1.5).name == "b"


def test_of_about_equal_fit_times_the_better_score_wins():
    table = ranked(("a", 0.95, 0.02, 9.0), ("b", 0.94, 0.01, 1.4), ("c", 0.935, 0.03, 1.0))
    assert script.cheapest_within_one_standard_error(table, noise=1.5).name == "b"
    assert script.cheapest_within_one_standard_error(table, noise=1.3).name == "c"


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
    means = script.mean_scores(table, trials)
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


PLAIN = {"bootstrap": False, "max_depth": None, "max_features": "sqrt", "n_estimators": 3}
NUMPY = {"bootstrap": np.bool_(False), "max_features": np.float64(0.5), "n_estimators": np.int64(3)}


@pytest.mark.parametrize("params", [PLAIN, NUMPY])
def test_the_best_parameters_rebuild_the_forest_that_was_logged(params, folder, monkeypatch):
    monkeypatch.chdir(folder)  # where MLflow puts the files of a new experiment
    store(folder)
    mlflow.set_experiment(script.EXPERIMENT)
    train, test = script.load_data(None, "diagnosis", None, 0.2)
    forest, best = script.make_forest(params, 42), pd.Series({"mean": 0.9}, name="t")
    with mlflow.start_run() as search:
        mlflow.log_param("rows", train.dataset.digest)
        script.log_best(best, params, forest, train, test, "accuracy", script.SCORERS["accuracy"])
    tuned = model_comparison.load_tuned_forest(search.info.run_id, train.dataset.digest, 42)
    assert params.items() <= tuned[-1].get_params().items()
    logged = mlflow.sklearn.load_model(f"runs:/{search.info.run_id}/model")
    rebuilt = tuned.fit(train.X, train.y)
    assert np.array_equal(rebuilt.predict_proba(test.X), logged.predict_proba(test.X))


# The script, with a small grid.


def test_of_equal_scores_the_first_by_name_wins_and_a_failed_trial_does_not_count(folder):
    """Trials finish in any order, and the last ones of the grid start first."""
    constant = Code("{'accuracy': make_scorer(lambda y, predicted: 0.5)}")
    edited(folder, SCRIPT, PARAM_GRID={"n_estimators": [3, 2, 1, 0]}, SCORERS=constant)
    process = run(folder / SCRIPT, cwd=folder)
    assert_success(process)
    store(folder)
    (search,) = parents("hyperparameter-tuning")
    assert search.data.tags["best_trial"] == "n_estimators=1"
    best = mlflow.artifacts.load_dict(f"runs:/{search.info.run_id}/best_params.json")
    assert best == {"n_estimators": 1}
    trials = children(search)
    failed = trials.pop("n_estimators=0")
    assert (failed.info.status, failed.data.metrics) == ("FAILED", {})
    assert failed.data.tags["error"].startswith("InvalidParameterError: ")
    assert failed.data.tags["error"] in process.stdout
    assert {trial.info.status for trial in trials.values()} == {"FINISHED"}
    assert "Best of 3 trials" in process.stdout


def test_a_search_of_which_all_trials_fail_says_so_in_one_line(folder):
    edited(folder, SCRIPT, PARAM_GRID={"n_estimators": [0]})
    assert_one_line(run(folder / SCRIPT, cwd=folder), "all 1 trials failed", "n_estimators")
    store(folder)
    assert [search.info.status for search in parents("hyperparameter-tuning")] == ["FAILED"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, new_store):
    """A search after Ctrl-C: its folder, the finished process, and what it had printed."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copy(new_store, folder)
    edited(folder, SCRIPT, PARAM_GRID={"max_depth": [1, 3, 9], "n_estimators": [5, 200]})
    process = subprocess.Popen(
        [sys.executable, folder / SCRIPT],
        cwd=folder,
        env=user_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    printed = ""
    while "  2/6" not in printed:
        line = process.stdout.readline()
        assert line, process.communicate()
        printed += line
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SOON)
    return folder, process, printed, errors


def started_by(process):
    """Return what is alive of the session that a process leads."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            *_, session = stat.read_text().rpartition(")")[2].split()[:4]
            alive += [stat] if int(session) == process.pid else []
    return alive


def test_ctrl_c_ends_a_search_as_failed_in_silence_and_leaves_no_worker(interrupted):
    folder, process, _, errors = interrupted
    assert process.returncode == 130
    assert "Traceback" not in errors
    store(folder)
    (search,) = parents("hyperparameter-tuning")
    assert search.info.status == "FAILED"
    assert {trial.info.status for trial in children(search).values()} <= {"FINISHED", "FAILED"}
    deadline = time.monotonic() + SOON
    while started_by(process) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not started_by(process)


def test_an_interrupted_search_is_resumed_widened_and_narrowed(interrupted, monkeypatch):
    """Finished trials do not run again; of those, the ones of the grid of today count."""
    folder, _, printed, _ = interrupted
    store(folder)
    (resume,) = re.findall("--resume ([0-9a-f]{32})", printed)
    trials = children(mlflow.get_run(resume))
    finished = {n: t.info.run_id for n, t in trials.items() if t.info.status == "FINISHED"}
    assert len(finished) >= 2
    resumed = run(folder / SCRIPT, "--resume", resume, cwd=folder)
    assert_success(resumed)
    assert f"1/{6 - len(finished)}  " in resumed.stdout
    assert "Best of 6 trials" in resumed.stdout
    after = {name: trial.info.run_id for name, trial in children(mlflow.get_run(resume)).items()}
    assert finished.items() <= after.items() and len(after) == 6

    edited(folder, SCRIPT, PARAM_GRID={"max_depth": [3, 9, 12], "n_estimators": [5]})
    widened = run(folder / SCRIPT, "--resume", resume, cwd=folder)
    assert_success(widened)
    assert "1/1  " in widened.stdout and "Best of 3 trials" in widened.stdout
    (search,) = parents("hyperparameter-tuning")
    assert search.info.status == "FINISHED"
    trials = children(search)
    assert len(trials) == 7
    small = [name for name in trials if "=5" in name and "max_depth=1," not in name]
    best = min(small, key=lambda name: (-trials[name].data.metrics["cv_accuracy"], name))
    assert len(small) == 3 and search.data.tags["best_trial"] == best
    params = mlflow.artifacts.load_dict(f"runs:/{resume}/best_params.json")
    assert best == ", ".join(f"{name}={value}" for name, value in params.items())

    # What does not fit is refused, and does no harm to a search that is finished.
    refused = partial(pytest.raises, script.UserError, match="not a search with the settings")
    with refused():
        script.main(["--resume", resume, "--metric", "f1"])
    with refused():  # a run that is no search
        script.main(["--resume", trials[best].info.run_id])
    with monkeypatch.context() as changed, refused():
        changed.setattr(script, "FOLDS", 4)
        script.main(["--resume", resume])
    with pytest.raises(mlflow.MlflowException, match="0" * 32):
        script.main(["--resume", "0" * 32])
    (again,) = parents("hyperparameter-tuning")
    assert again.to_dictionary() == search.to_dictionary()
    (rows, _) = search.inputs.dataset_inputs
    assert search.data.params["rows"] == rows.dataset.digest
    assert search.data.params["folds"] == "5, shuffled with seed 42"
