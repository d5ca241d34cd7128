"""Hyperparameter tuning: what is found, failures, interruptions, resuming, a Dask cluster."""

import contextlib
import inspect
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import (
    ROOT,
    SOON,
    assert_one_line,
    assert_success,
    children,
    edited,
    parents,
    run,
    store,
    user_env,
)
from joblib import parallel_config
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sklearn.datasets import load_diabetes, make_classification
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.metrics import f1_score, mean_absolute_error
from sklearn.model_selection import (
    KFold,
    ParameterGrid,
    StratifiedKFold,
    cross_val_score,
    train_test_split,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hyperparameter_tuning as tuning

SCRIPT = "hyperparameter_tuning.py"
EXPERIMENT = "hyperparameter-tuning"
SMALL_GRID = {"max_depth": [2, 8], "n_estimators": [5, 20, 80]}
SLOW_GRID = {"max_depth": [2, 8], "n_estimators": [100, 150, 200, 250]}  # enough to interrupt


# How the tests search: in this process, or in one of their own that they can interrupt.


@pytest.fixture(scope="module")
def new_store(tmp_path_factory):
    """A store without runs. To make one takes seconds, so the tests copy this one."""
    folder = tmp_path_factory.mktemp("new-store")
    client = store(folder)
    client.create_experiment("another")
    return folder / "mlflow.db"


@pytest.fixture
def folder(new_store, tmp_path, monkeypatch):
    """The working folder of a test that searches in this process: it holds a store."""
    shutil.copy(new_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    store(tmp_path)
    return tmp_path


def search(*args, grid=SMALL_GRID):
    """Search in this process, one trial after the other; leave nothing behind but the runs."""
    ctrl_c = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, parallel_config("sequential"):
        patch.setattr(tuning, "PARAM_GRID", grid)
        try:
            tuning.main([*args])
        finally:
            assert mlflow.active_run() is None
            # It may wait for a call of MLflow's: then it is a partial of the same handler.
            now = signal.getsignal(signal.SIGINT)
            assert getattr(now, "func", now) is getattr(ctrl_c, "func", ctrl_c)


def search_as_program(capsys, *args, grid=SMALL_GRID):
    """Search in this process as the program does; return what a finished process would have."""
    capsys.readouterr()
    ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        code = tuning.run_as_program(lambda: search(*args, grid=grid))
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
    out, err = capsys.readouterr()
    return SimpleNamespace(returncode=code, stdout=out, stderr=err)


def start(*command, cwd, env=None, **options):
    """Start a command in the background, what it prints going to files; the caller ends it."""
    with open(cwd / "stdout.txt", "w") as stdout, open(cwd / "stderr.txt", "w") as stderr:
        return subprocess.Popen(
            command, cwd=cwd, env=env or user_env(), stdout=stdout, stderr=stderr, **options
        )


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def finished(folder):
    """Return the finished trials of the only search in the folder, by name."""
    if "/8 " not in (folder / "stdout.txt").read_text():
        return {}  # nobody may open a new store while its tables are being made
    store(folder)
    trials = children(parents(EXPERIMENT)[0])
    return {name: trial for name, trial in trials.items() if trial.info.status == "FINISHED"}


def group_is_gone(process):
    """Return True if no process of the group that this one has led is left."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


# What a search finds, logs and prints.


@pytest.fixture(scope="module")
def searched(new_store, tmp_path_factory):
    """A search that has finished: its folder, its run, its trials, and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    shutil.copy(new_store, folder)
    store(folder)
    with open(folder / "stdout.txt", "w") as file, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with contextlib.redirect_stdout(file):
            search()
    (parent,) = parents(EXPERIMENT)
    printed = (folder / "stdout.txt").read_text()
    return SimpleNamespace(folder=folder, parent=parent, trials=children(parent), printed=printed)


def best_of(trials):
    """Return the name of the best trial: of equal scores, the first."""
    return min(trials, key=lambda name: (-trials[name].data.metrics["cv_accuracy"], name))


def mean_scores(trials, name):
    """Return the mean score of the trials with each value of a parameter, in the grid's order."""
    scores = {str(value): [] for value in SMALL_GRID[name]}
    for trial in trials.values():
        scores[trial.data.params[name]].append(trial.data.metrics["cv_accuracy"])
    return {value: np.mean(scores[value]) for value in scores}


def test_the_cheapest_within_one_standard_error_and_the_cost_are_printed(searched):
    metrics = {name: trial.data.metrics for name, trial in searched.trials.items()}
    best = metrics[best_of(searched.trials)]
    # The standard error of a mean of 5 is s / √5, where s has 4 degrees of freedom.
    floor = best["cv_accuracy"] - best["cv_accuracy_std"] * (5 / 4) ** 0.5 / 5**0.5
    close = {name: m for name, m in metrics.items() if m["cv_accuracy"] >= floor}
    cheapest = min(close, key=lambda name: close[name]["fit_seconds"])
    share = metrics[cheapest]["fit_seconds"] / best["fit_seconds"]
    line = rf"^Cheapest +{cheapest}\b.* standard error\b.* {share:.0%} of "
    assert re.search(line, searched.printed, re.M)

    compute = 5 * sum(m["fit_seconds"] for m in metrics.values())  # five folds a trial
    wall = searched.parent.data.metrics["session_seconds"]
    line = rf"^Cost +{compute:.0f} s of fitting\b.* {wall:.0f} s$"
    assert re.search(line, searched.printed, re.M)
    info = searched.parent.info
    assert 0 < (info.end_time - info.start_time) / 1000 < wall + 3


def test_the_standard_error_is_that_of_a_mean_of_n_folds():
    """With NumPy's deviation over n, the squares are divided by n - 1: not by n, not by more."""
    ranked = pd.DataFrame(
        {
            "tags.mlflow.runName": ["best", "within", "beyond n - 1", "far off"],
            "metrics.cv_f1": [0.9, 0.8905, 0.8895, 0.7],
            "metrics.cv_f1_std": [0.02, 0.5, 0.5, 0.5],  # only that of the best counts
            "metrics.fit_seconds": [9.0, 3.0, 2.0, 1.0],
        }
    )
    # 0.02 / √4 = 0.0100, but 0.02 / √5 = 0.0089; and of ten folds 0.02 / √9 = 0.0067.
    cheapest = tuning.cheapest_within_one_standard_error
    assert cheapest(ranked, "f1", 5)["tags.mlflow.runName"] == "within"
    assert cheapest(ranked, "f1", 10)["tags.mlflow.runName"] == "best"
    assert cheapest(ranked, "f1", 4)["tags.mlflow.runName"] == "beyond n - 1"  # 0.0115


def test_the_heat_map_shows_every_combination_of_the_grid(searched):
    store(searched.folder)
    page = mlflow.artifacts.load_text(f"{searched.parent.info.artifact_uri}/grid.html")
    trials = sorted(searched.trials.items())
    expected = [f"{trial.data.metrics['cv_accuracy']:.6f}" for _, trial in trials]
    assert "background-color" in page
    assert re.findall(r"<td[^>]*>([\d.]+)</td>", page) == expected


def test_it_says_which_parameter_matters_and_where_the_best_lies_at_the_edge(searched):
    data, printed = searched.parent.data, searched.printed
    spreads = {}
    for name in SMALL_GRID:
        means = mean_scores(searched.trials, name).values()
        spreads[name] = max(means) - min(means)
        assert data.metrics[f"spread_{name}"] == pytest.approx(spreads[name])
    order = sorted(spreads, key=spreads.get, reverse=True)
    line = ".*".join(f"{name} {spreads[name]:.4f}" for name in order)
    assert re.search(rf"^Influence +{line}", printed, re.M)

    best = searched.trials[best_of(searched.trials)].data.params
    edges = {}
    for name, values in SMALL_GRID.items():
        if best[name] == str(values[0]):
            edges[name] = "smallest"
        if best[name] == str(values[-1]):
            edges[name] = "largest"
    assert "max_depth" in edges, "of two values each is at an edge"
    for name in SMALL_GRID:
        assert edges.get(name, "") in data.tags.get(f"edge_{name}", "")
        assert (f"edge_{name}" in data.tags) == (name in edges)
        advice = re.search(rf"^At the edge +{name}: (.*)$", printed, re.M)
        assert (advice and advice[1]) == data.tags.get(f"edge_{name}")


def test_values_at_the_edge_are_the_least_and_the_greatest_of_some_numbers():
    """The order of the list does not matter. Texts, switches and single values have no edge."""
    grid = {
        "least": [1, 2, 3],
        "greatest": [0.1, 0.5],
        "in_between": [1, 2, 3],
        "least_of_unsorted": [5, 1, 9],
        "unsorted": [9, 1, 5],
        "single": [7],
        "text": ["gini", "entropy"],
        "number_or_none": [3, None],
        "switch": [True, False],
        "below_no_limit": [3, 1, None],
        "least_of_no_limit": [3, 1, None],
    }
    params = dict(zip(grid, [1, 0.5, 2, 1, 5, 7, "gini", 3, True, 3, 1], strict=True))
    edges = tuning.values_at_the_edge(params, grid)
    least = {"least", "least_of_unsorted", "least_of_no_limit"}
    assert set(edges) == least | {"greatest"}
    for name in least:
        assert "smallest" in edges[name] and "larg" not in edges[name]
        assert edges[name].startswith("1 ")
    assert "largest" in edges["greatest"] and edges["greatest"].startswith("0.5 ")


def test_the_metric_decides_which_trial_is_best(folder, capsys):
    """On a table with few of one class, balanced weights cost accuracy and gain F1."""
    X, y = make_classification(400, 5, weights=[0.85], class_sep=0.5, flip_y=0.1, random_state=3)
    table = pd.DataFrame(X, columns=list("abcde")).assign(y=np.array(["no", "yes"])[y])
    table.to_csv(folder / "rare.csv", index=False)
    grid = {"class_weight": [None, "balanced"], "max_depth": [2, 4], "n_estimators": [5]}
    args = ("--csv", "rare.csv", "--target", "y")
    search(*args, "--metric", "f1", grid=grid)
    printed = capsys.readouterr().out
    search(*args, grid=grid)
    by_f1, by_accuracy = parents(EXPERIMENT)

    # pandas.read_csv, as the script has read it: the digits that the file holds.
    table = pd.read_csv(folder / "rare.csv")
    X, X_test, y, y_test = train_test_split(
        table[[*"abcde"]], table["y"], test_size=0.2, stratify=table["y"], random_state=42
    )
    folds = StratifiedKFold(5, shuffle=True, random_state=42)
    trials, scores = children(by_f1), {}
    for number, params in enumerate(ParameterGrid(grid), start=1):
        model = make_pipeline(StandardScaler(), RandomForestClassifier(**params, random_state=42))
        f1 = cross_val_score(model, X, y, cv=folds, scoring="f1_macro")
        trial = trials[f"trial-{number:04}"]
        assert trial.data.metrics["cv_f1"] == pytest.approx(f1.mean(), abs=1e-9)
        assert trial.data.metrics["cv_f1_std"] == pytest.approx(f1.std(), abs=1e-9)
        scores[number] = (f1.mean(), params, model)
    f1, params, model = max(scores.values(), key=lambda entry: entry[0])
    data = by_f1.data
    assert {name: data.params[f"best_{name}"] for name in grid} == {
        name: repr(value) for name, value in params.items()
    }
    assert data.params["best_class_weight"] != by_accuracy.data.params["best_class_weight"]
    test_f1 = f1_score(y_test, model.fit(X, y).predict(X_test), average="macro")
    constant = f1_score(y_test, ["no"] * len(y_test), average="macro", zero_division=0)
    assert data.metrics["best_cv_f1"] == pytest.approx(f1, abs=1e-9)
    assert data.metrics["test_f1"] == pytest.approx(test_f1, abs=1e-9)
    assert data.metrics["baseline_test_f1"] == pytest.approx(constant, abs=1e-9)
    assert data.params["metric"] == "f1" and not [key for key in data.metrics if "accura" in key]

    assert re.search(rf"^Hold-out +f1 {test_f1:.4f}$", printed, re.M)
    assert re.search(rf"^Baseline +f1 {constant:.4f}\b", printed, re.M)
    (step,) = re.findall(r"^Next: +(.*)$", printed, re.M)
    handed_on = ["--tuned", by_f1.info.run_id, *args, "--metric", "f1"]
    assert shlex.split(step)[2:] == handed_on


def copied(*names, **others):
    """Return functions pasted from the script, with its imports but none of its settings.

    Other names take the place of what they import or call.
    """
    imports = {
        name: value
        for name, value in vars(tuning).items()
        if not name.isupper() and getattr(value, "__module__", "") != tuning.__name__
    }
    namespace = imports | others
    for name in names:
        exec(inspect.getsource(getattr(tuning, name)), namespace)
    return SimpleNamespace(**namespace)


def test_functions_copied_into_a_regression_find_the_least_error(folder):
    """The score is an error's negative. Three names are replaced: model, folds and baseline."""

    def score(y, predicted):
        return -mean_absolute_error(y, predicted)

    def make_forest(params, X, seed):
        return RandomForestRegressor(**params, random_state=seed)

    pasted = copied(
        *("TrialResult", "try_trial", "run_trial", "log_trial", "find_best_trials", "log_best"),
        *("refit_best", "log_model", "cheapest_within_one_standard_error"),
        make_forest=make_forest,
        StratifiedKFold=KFold,
        DummyClassifier=DummyRegressor,
    )
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=42)
    train = tuning.make_rows(X_train, y_train, "diabetes-train")
    test = tuning.make_rows(X_test, y_test, "diabetes-test")
    grid = {"max_depth": [1, 3, 6], "n_estimators": [5, 40]}
    trials = {f"trial-{n}": params for n, params in enumerate(ParameterGrid(grid))}
    options = {"metric": "error", "score": score, "n_folds": 5, "seed": 42}
    mlflow.set_experiment("regression")
    with mlflow.start_run() as parent:
        for name, params in trials.items():
            trial = pasted.try_trial(name, params, X_train, y_train, **options)
            pasted.log_trial(trial, train.dataset)
        ranked = pasted.find_best_trials(parent.info.run_id, "error")
        best = ranked.iloc[0]
        best_params = trials[best["tags.mlflow.runName"]]
        pasted.log_best(best, best_params, "error", train)
        pasted.refit_best(best_params, train, test, "error", score, 42, tuning.TRUSTED)

    errors, folds = {}, KFold(5, shuffle=True, random_state=42)
    for name, params in trials.items():
        model = RandomForestRegressor(**params, random_state=42)
        scores = cross_val_score(
            model, X_train, y_train, cv=folds, scoring="neg_mean_absolute_error"
        )
        errors[name] = (-scores.mean(), scores.std())
    assert list(ranked["tags.mlflow.runName"]) == sorted(errors, key=errors.get)
    best_error, deviation = min(errors.values())
    highest = best_error + deviation / 4**0.5  # one standard error more
    close = ranked[[errors[name][0] <= highest for name in ranked["tags.mlflow.runName"]]]
    assert 1 < len(close) < len(ranked)
    cheapest = pasted.cheapest_within_one_standard_error(ranked, "error", 5)
    assert cheapest["metrics.fit_seconds"] == close["metrics.fit_seconds"].min()
    assert cheapest["run_id"] in set(close["run_id"])

    metrics = mlflow.get_run(parent.info.run_id).data.metrics
    assert metrics["best_cv_error"] == pytest.approx(-best_error)
    model = make_forest(best_params, X, 42).fit(X_train, y_train)
    assert metrics["test_error"] == pytest.approx(score(y_test, model.predict(X_test)))
    constant = score(y_test, [y_train.mean()] * len(y_test))
    assert metrics["baseline_test_error"] == pytest.approx(constant)
    assert metrics["test_error"] > metrics["baseline_test_error"]


def test_log_trial_makes_a_child_of_whatever_run_is_active(folder):
    X, y = make_classification(random_state=0)
    dataset = tuning.make_rows(pd.DataFrame(X), pd.Series(y, name="y"), "any").dataset
    good = tuning.TrialResult(
        "good", {"max_depth": 3}, {"cv_f1": 0.5, "fit_seconds": 0.1}, error=""
    )
    bad = tuning.TrialResult("bad", {"max_depth": -1}, {}, error="ValueError: max_depth")
    mlflow.set_experiment("another")
    with mlflow.start_run(run_name="my own") as outer:
        with mlflow.start_run(run_name="inner", nested=True) as inner:
            tuning.log_trial(good, dataset)
            tuning.log_trial(bad, dataset)
            assert mlflow.active_run().info.run_id == inner.info.run_id
        mlflow.log_param("mine", 1)
    assert set(children(mlflow.get_run(outer.info.run_id))) == {"inner"}
    trials = children(inner)
    assert set(trials) == {"good", "bad"}
    assert trials["good"].info.status == "FINISHED"
    assert trials["good"].data.metrics == {"cv_f1": 0.5, "fit_seconds": 0.1}
    assert trials["good"].inputs.dataset_inputs[0].dataset.name == "any"
    assert trials["bad"].info.status == "FAILED"
    assert trials["bad"].data.tags["error"] == "ValueError: max_depth"
    assert trials["bad"].data.params == {"max_depth": "-1"}
    assert mlflow.get_run(outer.info.run_id).info.status == "FINISHED"
    assert mlflow.get_run(outer.info.run_id).data.params == {"mine": "1"}


def test_the_best_is_found_among_more_trials_than_a_page_holds(folder):
    """MLflow answers 1,000 runs at the most at a time; the best of these is the oldest."""
    client = mlflow.MlflowClient()
    experiment = client.create_experiment("many")
    parent = client.create_run(experiment)
    for name, score in (("trial-0000", 0.75), ("trial-0001", 0.5)):
        tags = {"mlflow.parentRunId": parent.info.run_id}
        trial = client.create_run(experiment, tags=tags, run_name=name)
        client.log_metric(trial.info.run_id, "cv_accuracy", score)
        client.set_terminated(trial.info.run_id)
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database, database:
        for number in range(2, 1005):  # through the client it takes a minute
            copy_run(database, trial.info.run_id, f"{number:032}", f"trial-{number:04}")
    trials = tuning.find_best_trials(parent.info.run_id, "accuracy")
    assert list(trials["tags.mlflow.runName"]) == [f"trial-{number:04}" for number in range(1005)]


def copy_run(database, run_id, new_id, new_name):
    """Copy a run within a store of MLflow's: its row in every table that has one."""
    for table in ("runs", "tags", "metrics", "latest_metrics"):
        rows = database.execute(f"SELECT * FROM {table} WHERE run_uuid = ?", [run_id])
        columns = [column[0] for column in rows.description]
        for row in rows.fetchall():
            new = dict(zip(columns, row, strict=True))
            new["run_uuid"] = new_id
            if table == "runs":
                new["name"] = new_name
            elif new.get("key") == "mlflow.runName":
                new["value"] = new_name
            marks = ", ".join("?" * len(new))
            database.execute(f"INSERT INTO {table} VALUES ({marks})", [*new.values()])


# Failures and bad input.


def test_a_trial_that_raises_is_a_failed_child_and_the_search_goes_on(folder, capsys):
    search(grid={"max_depth": [-1, 3], "n_estimators": [5]})
    (parent,) = parents(EXPERIMENT)
    trials = children(parent)
    assert trials["trial-0001"].info.status == "FAILED"
    error = trials["trial-0001"].data.tags["error"]
    assert "max_depth" in error and "trial-0001  " + error[:30] in capsys.readouterr().out
    assert trials["trial-0002"].info.status == "FINISHED"
    assert parent.info.status == "FINISHED" and parent.data.params["best_max_depth"] == "3"


def test_all_trials_raise(folder, capsys):
    """Exit code 1, and all runs are FAILED."""
    ended = search_as_program(capsys, grid={"max_depth": [-1, -2], "n_estimators": [5]})
    assert_one_line(ended, "all 2 trials failed", code=1)
    (parent,) = parents(EXPERIMENT)
    assert parent.info.status == "FAILED"
    assert {trial.info.status for trial in children(parent).values()} == {"FAILED"}


def test_an_unknown_parameter_in_the_grid_ends_in_one_line(folder, capsys):
    ended = search_as_program(capsys, grid={"max_dept": [1, 2]})
    assert_one_line(ended, "PARAM_GRID", "max_dept")
    assert mlflow.get_experiment_by_name(EXPERIMENT) is None


@pytest.mark.parametrize("name", ["MLFLOW_RUN_ID", "MLFLOW_REGISTRY_URI"])
def test_a_setting_that_would_misdirect_the_runs_ends_in_one_line(
    name, folder, capsys, monkeypatch
):
    """With MLFLOW_RUN_ID, MLflow would write the first trial over the search (issue 15713)."""
    own = mlflow.MlflowClient().create_run("0")
    values = {"MLFLOW_RUN_ID": own.info.run_id, "MLFLOW_REGISTRY_URI": "sqlite:///other.db"}
    monkeypatch.setenv(name, values[name])
    assert_one_line(search_as_program(capsys), f"unset {name}")
    monkeypatch.delenv(name)
    assert mlflow.get_experiment_by_name(EXPERIMENT) is None
    unchanged = mlflow.get_run(own.info.run_id)
    assert unchanged.data.params == {} and unchanged.info.status == "RUNNING"
    assert not (folder / "other.db").exists()


# Interrupted searches, and how they go on.


def outcome(parent):
    """Return what must not depend on the way to it: parameters, states and scores."""
    scores = ("best_cv_accuracy", "test_accuracy")
    return (
        parent.info.status,
        parent.data.params,
        [parent.data.metrics[score] for score in scores],
        {
            name: (trial.info.status, trial.data.params, trial.data.metrics.get("cv_accuracy"))
            for name, trial in children(parent).items()
        },
    )


@pytest.fixture(scope="module")
def uninterrupted(new_store, tmp_path_factory):
    """The outcome of a search that is left alone, in this process: what every other equals."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copy(new_store, folder)
    store(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        search(grid=SLOW_GRID)
    (parent,) = parents(EXPERIMENT)
    return outcome(parent)


def test_ctrl_c_keeps_what_has_finished_and_prints_how_to_go_on(tmp_path, uninterrupted):
    script = edited(tmp_path, SCRIPT, PARAM_GRID=SLOW_GRID)
    process = start(sys.executable, script, cwd=tmp_path, start_new_session=True)
    wait_until(lambda: len(finished(tmp_path)) >= 2)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers as well
    assert process.wait(timeout=SOON) == 130
    kept = finished(tmp_path)
    (parent,) = parents(EXPERIMENT)
    assert parent.info.status == "KILLED"
    assert not [t for t in children(parent).values() if t.info.status == "RUNNING"]
    said = (tmp_path / "stderr.txt").read_text()
    command = re.fullmatch(r"Stopped: by Ctrl-C; to resume: (python .*)\n", said)
    resumed = subprocess.run(
        shlex.split(command[1]), cwd=tmp_path, env=user_env(), capture_output=True, text=True
    )
    assert_success(resumed)
    assert f"/{8 - len(kept)} " in resumed.stdout, "only what is missing is run"
    (parent,) = parents(EXPERIMENT)
    assert outcome(parent) == uninterrupted
    again = finished(tmp_path)
    assert {t.info.run_id for t in kept.values()} <= {t.info.run_id for t in again.values()}


@pytest.mark.parametrize(
    ("write", "number"),
    [
        ("create_run", 1),  # the search's own run
        ("log_batch", 1),  # its settings
        ("log_inputs", 1),  # its rows
        ("create_run", 3),  # the second trial
        ("log_batch", 5),  # its scores
        ("update_run_info", 2),  # its end
    ],
)
def test_ctrl_c_during_a_write_leaves_it_whole_and_none_running(
    write, number, folder, capsys, monkeypatch
):
    """As a rule, Ctrl-C in the middle of a write leaves a run RUNNING, or SQLite locked."""
    calls = 0
    original = getattr(SqlAlchemyStore, write)

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(SqlAlchemyStore, write, interrupted)
    ended = search_as_program(capsys, grid={"n_estimators": [20, 21, 22, 23, 24, 25]})
    assert_one_line(ended, "Stopped: ", code=130)
    assert_whole(folder)
    (parent,) = parents(EXPERIMENT)
    trials = children(parent)
    assert {trial.info.status for trial in trials.values()} <= {"FINISHED"}
    assert len(trials) < 6
    if trials:
        assert parent.info.status == "KILLED" and "to resume: " in ended.stderr


def assert_whole(folder):
    """The store in the folder has no run RUNNING and no trial half logged, and can be written."""
    store(folder)
    runs = mlflow.search_runs(experiment_names=[EXPERIMENT], output_format="list")
    assert "RUNNING" not in {one.info.status for one in runs}
    for one in runs:
        if one.info.run_name.startswith("trial-") and one.info.status == "FINISHED":
            assert one.data.params and len(one.data.metrics) == 3
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    client = mlflow.MlflowClient()
    client.set_terminated(client.create_run("0").info.run_id)


def test_ctrl_c_after_the_last_trial_costs_none_of_them(folder, capsys, monkeypatch):
    """While the best is refitted and logged. The resumed search has that to do, and no more."""
    search()
    (whole,) = parents(EXPERIMENT)
    log_model = tuning.log_model

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return log_model(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "log_model", interrupted)
        assert_one_line(search_as_program(capsys), "Stopped: by Ctrl-C; to resume: ", code=130)
    assert_whole(folder)
    _, parent = parents(EXPERIMENT)
    assert parent.info.status == "KILLED"
    before = {trial.info.run_id for trial in children(parent).values()}
    assert len(before) == 6
    with monkeypatch.context() as patch:  # a second time, the command is no longer than the first
        patch.setattr(tuning, "log_model", interrupted)
        again = search_as_program(capsys, "--resume", parent.info.run_id)
    assert_one_line(again, f"hyperparameter_tuning.py --resume {parent.info.run_id}\n", code=130)
    assert again.stderr.count("--resume") == 1
    resumed = search_as_program(capsys, "--resume", parent.info.run_id)
    assert_success(resumed)
    assert {trial.info.run_id for trial in children(parent).values()} == before
    assert outcome(mlflow.get_run(parent.info.run_id)) == outcome(whole)


def bare_machine(folder):
    """Return the environment of a machine without pgrep, git and psutil."""
    (folder / "psutil.py").write_text("raise ImportError('not on this machine')\n")
    return user_env(PYTHONPATH=str(folder), PATH=str(folder))


def test_ctrl_c_at_random_moments_on_a_full_and_on_a_bare_machine(tmp_path, new_store):
    """Also while a new store is made. Without psutil and pgrep, joblib does not end its workers."""
    moments = random.Random(seed := random.randrange(10**6))
    print(f"{seed=}")  # shown where the test fails
    grid = {"max_depth": [2, 8], "n_estimators": [200] * 10}
    processes = {}
    try:
        for number in range(4):
            folder = tmp_path / str(number)
            folder.mkdir()
            if number % 2:
                shutil.copy(new_store, folder)
            env = bare_machine(folder) if number < 2 else user_env()
            command = (sys.executable, edited(folder, SCRIPT, PARAM_GRID=grid))
            processes[folder] = start(*command, cwd=folder, env=env, start_new_session=True)
        for folder in processes:
            # From the first line on, Ctrl-C is the script's own business.
            wait_until((folder / "stdout.txt").read_text)
            time.sleep(moments.uniform(0, 2))
        for folder, process in processes.items():
            print(f"{folder.name}: {(folder / 'stdout.txt').read_text().splitlines()[-1]}")
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SOON / 2)
            if process.poll() is None:  # it was starting the workers, which are to ignore Ctrl-C
                os.killpg(process.pid, signal.SIGINT)
            code = process.wait(timeout=SOON)
            said = (folder / "stderr.txt").read_text()
            assert_one_line(SimpleNamespace(returncode=code, stderr=said), "Stopped: ", code=130)
            wait_until(lambda process=process: group_is_gone(process))
            if (folder / "mlflow.db").exists():
                assert_whole(folder)
    finally:
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_resume_after_a_kill(tmp_path, uninterrupted):
    script = edited(tmp_path, SCRIPT, PARAM_GRID=SLOW_GRID)
    process = start(sys.executable, script, cwd=tmp_path, start_new_session=True)
    wait_until(lambda: len(finished(tmp_path)) >= 3)
    process.kill()
    process.wait()
    os.killpg(process.pid, signal.SIGKILL)  # its workers, which nobody is left to end
    (parent,) = parents(EXPERIMENT)
    assert parent.info.status == "RUNNING"
    # As if the kill had come while this trial was being logged.
    tags = {"mlflow.parentRunId": parent.info.run_id}
    client = mlflow.MlflowClient()
    client.create_run(parent.info.experiment_id, tags=tags, run_name="trial-0001")
    an_hour_passes(tmp_path)
    assert_success(run(script, "--resume", parent.info.run_id, cwd=tmp_path))
    (parent,) = parents(EXPERIMENT)
    assert outcome(parent) == uninterrupted


def an_hour_passes(folder):
    """Put the runs in the store in this folder back by an hour."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        for column in ("start_time", "end_time"):
            database.execute(f"UPDATE runs SET {column} = {column} - 3600000")


def test_a_search_that_still_runs_elsewhere_is_not_resumed(folder):
    """Its trials have been logged just now, so the one that is RUNNING is not cut short."""
    client = mlflow.MlflowClient()
    experiment = mlflow.set_experiment(EXPERIMENT).experiment_id
    search_id = client.create_run(experiment, run_name="grid-search").info.run_id
    client.log_param(search_id, "metric", "f1")
    tags = {"mlflow.parentRunId": search_id}
    client.create_run(experiment, tags=tags, run_name="trial-0001")
    with pytest.raises(tuning.UserError, match=search_id):
        tuning.unfinished_trials(search_id, {"trial-0001": {}}, {"metric": "f1"})
    assert "trial-0001" in children(mlflow.get_run(search_id)), "it is left alone"


def test_of_two_who_resume_a_search_the_second_is_refused(folder):
    """The first has just begun: nothing has been logged for an hour."""
    client = mlflow.MlflowClient()
    experiment = mlflow.set_experiment(EXPERIMENT).experiment_id
    search_id = client.create_run(experiment, run_name="grid-search").info.run_id
    an_hour_passes(folder)
    assert tuning.unfinished_trials(search_id, {"trial-0001": {}}, {}) == {"trial-0001": {}}
    with pytest.raises(tuning.UserError, match="may still be running"):
        tuning.unfinished_trials(search_id, {"trial-0001": {}}, {})


def test_what_cannot_be_resumed_ends_in_one_line_and_stays_as_it_is(searched, capsys, monkeypatch):
    """An unknown ID; a search of another grid or metric, or a finished one; other runs."""
    monkeypatch.chdir(searched.folder)
    client = store(searched.folder)
    search_id = searched.parent.info.run_id
    trial_id = searched.trials["trial-0001"].info.run_id
    other_id = client.create_run("0", run_name="comparison").info.run_id
    client.set_terminated(other_id, "KILLED")
    killed_id = client.create_run("0").info.run_id
    for name, value in searched.parent.data.params.items():
        client.log_param(killed_id, name, value)
    client.set_terminated(killed_id, "KILLED")
    before = searched.parent.data.to_dictionary()

    assert_one_line(search_as_program(capsys, "--resume", "0" * 32), "0" * 32)
    for run_id, args, grid in [
        (search_id, (), SMALL_GRID),
        (trial_id, (), SMALL_GRID),
        (other_id, (), SMALL_GRID),
        (killed_id, (), SLOW_GRID),
        (killed_id, ("--metric", "f1"), SMALL_GRID),
    ]:
        ended = search_as_program(capsys, "--resume", run_id, *args, grid=grid)
        assert_one_line(ended, run_id, "cannot resume")
    after = mlflow.get_run(search_id)
    assert after.info.status == "FINISHED" and after.data.to_dictionary() == before
    assert [one.info.run_id for one in parents(EXPERIMENT)] == [search_id]
    assert client.get_run(killed_id).info.status == "KILLED"


# Recipes of the README.


def recipe(word):
    """Return the only Python code in the README that has this word in it."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    (found,) = (block for block in blocks if word in block)
    return found


def test_the_readme_refines_around_the_best(searched, tmp_path):
    """It takes the newest finished search of these rows and this grid, and no other."""
    edited(tmp_path, SCRIPT, PARAM_GRID=SMALL_GRID)
    shutil.copy(searched.folder / "mlflow.db", tmp_path)
    (tmp_path / "refine.py").write_text(recipe("near = "))
    client = store(tmp_path)
    (coarse,) = parents(EXPERIMENT)
    other = client.create_run(coarse.info.experiment_id).info.run_id  # newer, of other rows
    for key, value in coarse.data.params.items():
        value = {"training_digest": "other", "best_max_depth": "999"}.get(key, value)
        client.log_param(other, key, value)
    client.set_terminated(other)
    assert_success(run(tmp_path / "refine.py", cwd=tmp_path))
    coarse, _, fine = parents(EXPERIMENT)
    best = {name: int(coarse.data.params[f"best_{name}"]) for name in SMALL_GRID}
    tried = [{k: int(v) for k, v in t.data.params.items()} for t in children(fine).values()]
    assert best in tried and len(tried) > 1
    for name, values in SMALL_GRID.items():
        i = values.index(best[name])
        near = values[max(i - 1, 0) : i + 2]
        allowed = {best[name]} | {(value + best[name]) // 2 for value in near}
        assert {trial[name] for trial in tried} == allowed
    assert fine.data.metrics["best_cv_accuracy"] >= coarse.data.metrics["best_cv_accuracy"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_dask_cluster_does_the_same_search_and_may_lose_a_worker(
    tmp_path, new_store, uninterrupted
):
    edited(tmp_path, SCRIPT, PARAM_GRID=SLOW_GRID)
    shutil.copy(new_store, tmp_path)
    port = str(free_port())
    readme = (ROOT / "README.md").read_text().replace("8786", port)
    scheduler, worker = re.findall(r"^(dask .*)$", readme, re.M)
    (tmp_path / "on_dask.py").write_text(recipe("parallel_config(").replace("8786", port))
    folders = [tmp_path / name for name in ("scheduler", "worker-1", "worker-2")]
    for folder in folders:
        folder.mkdir()
    processes = [start(*scheduler.split(), cwd=folders[0])]
    try:
        processes += [start(*worker.split(), cwd=folder) for folder in folders[1:]]
        on_dask = start(sys.executable, "on_dask.py", cwd=tmp_path)
        processes.append(on_dask)
        wait_until(lambda: len(finished(tmp_path)) >= 3 or on_dask.poll())
        processes[1].kill()
        assert on_dask.wait(timeout=120) == 0
        assert (tmp_path / "stderr.txt").read_text() == ""
    finally:
        for process in processes:
            process.kill()
            process.wait()
    store(tmp_path)
    (parent,) = parents(EXPERIMENT)
    assert outcome(parent) == uninterrupted
