"""The main job: three scripts in an empty folder, twice; is what they print and leave true?"""

import contextlib
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
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
    printed_table,
    run,
    store,
    user_env,
)
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    precision_recall_fscore_support,
)
from sklearn.model_selection import (
    ParameterGrid,
    StratifiedKFold,
    cross_val_score,
    train_test_split,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

NAME = "breast-cancer-classifier"
EXPERIMENTS = ("hyperparameter-tuning", "model-comparison", "production-deployment")
GRID = {
    "max_depth": [1, 3, 9],
    "max_features": [0.1, 0.3, 0.9],
    "n_estimators": [20, 100, 300],
}
# The simplest stands first: of equal scores the first one wins.
CANDIDATES = {
    "logistic_regression": LogisticRegression(max_iter=1000),
    "svm": SVC(random_state=42),
    "gradient_boosting": HistGradientBoostingClassifier(random_state=42),
    "random_forest": RandomForestClassifier(random_state=42),
}
SCORES = ("accuracy", "balanced_accuracy", "f1", "precision", "recall")
TEST_SCORES = {f"test_{name}" for name in SCORES}
CV_SCORES = {f"cv_{name}" for name in SCORES} | {f"cv_{name}_std" for name in SCORES}


@pytest.fixture(scope="module")
def rows():
    """The rows by the stated convention, made without the scripts' own code."""
    data = load_breast_cancer(as_frame=True)
    labels = data.target.map({0: "malignant", 1: "benign"})
    return train_test_split(data.data, labels, test_size=0.2, stratify=labels, random_state=42)


@pytest.fixture(scope="module")
def refitted(main_job, rows):
    """The models that the store should hold, by the name of their run: fitted on training rows."""
    store(main_job[0])
    (search, *_) = parents("hyperparameter-tuning")
    best = {name: type(GRID[name][0])(search.data.params[f"best_{name}"]) for name in GRID}
    models = CANDIDATES | {
        "grid-search": RandomForestClassifier(**best, random_state=42),
        "deployment": CANDIDATES["logistic_regression"],
    }
    X_train, _, y_train, _ = rows
    with threadpool_limits(1):  # threads that wait for a busy core take most of its time
        return {name: scaled(model).fit(X_train, y_train) for name, model in models.items()}


def close(value):
    return pytest.approx(value, abs=1e-9)


def scaled(model):
    """What the scripts' preprocessing comes to for a table of numbers without gaps."""
    return make_pipeline(StandardScaler(), model)


def folds():
    return StratifiedKFold(5, shuffle=True, random_state=42)


def models_of(run_):
    """Return the models logged in a run."""
    return [mlflow.get_logged_model(output.model_id) for output in run_.outputs.model_outputs]


def all_models():
    """Return every model in the store, by any script."""
    experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    return mlflow.search_logged_models(experiments, output_format="list")


def files_of(run_):
    return {file.path for file in mlflow.artifacts.list_artifacts(run_id=run_.info.run_id)}


def test_the_three_scripts_succeed_in_silence(main_job):
    for processes in main_job[1]:
        for process in processes:
            assert_success(process)


def test_the_store_holds_what_is_promised_and_no_more(main_job):
    """Two sessions of each script, each trial and candidate a child run, and their files."""
    folder, _ = main_job
    store(folder)
    experiments = {experiment.name for experiment in mlflow.search_experiments()}
    assert experiments == {"Default", *EXPERIMENTS}
    assert parents("Default") == []
    names = {f"trial-{number:04}" for number in range(1, 28)}
    for search in parents("hyperparameter-tuning"):
        trials = children(search)
        assert set(trials) == names and len(models_of(search)) == 1
        assert files_of(search) == {"grid.html", "search.png"}
        for trial in trials.values():
            assert trial.info.status == "FINISHED" and trial.outputs.model_outputs == []
            assert set(trial.data.params) == set(GRID)
            assert set(trial.data.metrics) == {"cv_accuracy", "cv_accuracy_std", "fit_seconds"}
    for comparison in parents("model-comparison"):
        candidates = children(comparison)
        assert set(candidates) == set(CANDIDATES)
        assert files_of(comparison) == {"comparison.csv", "comparison.png", "folds.csv"}
        for candidate in candidates.values():
            assert candidate.info.status == "FINISHED" and len(models_of(candidate)) == 1
            assert {key for key in candidate.data.metrics if key.startswith("test_")} == TEST_SCORES
            assert candidate.data.metrics.keys() > {"fit_seconds", "latency_ms_p50"} | CV_SCORES
    for deployment in parents("production-deployment"):
        assert children(deployment) == {} and len(models_of(deployment)) == 1
        assert files_of(deployment) == {"confusion.png", "deployment_guide.md"}
    for experiment in EXPERIMENTS:
        sessions = parents(experiment)
        assert len(sessions) == 2
        assert all(session.info.status == "FINISHED" for session in sessions)


def test_every_model_gives_its_logged_hold_out_accuracy_again(main_job, rows):
    store(main_job[0])
    _, X_test, _, y_test = rows
    logged = all_models()
    assert len(logged) == 2 * (1 + 4 + 1)
    for model in logged:
        metrics = {metric.key: metric for metric in model.metrics}
        name = (metrics.keys() & {"test_accuracy", "score"}).pop()
        assert metrics[name].dataset_name == "breast-cancer-test"
        predicted = mlflow.pyfunc.load_model(model.model_uri).predict(X_test)
        assert metrics[name].value == close(accuracy_score(y_test, predicted))


def test_every_model_has_learned_from_the_training_rows_and_no_others(main_job, rows, refitted):
    """Each is what the same estimator becomes, refitted on these rows: equal on every row."""
    store(main_job[0])
    X_train, X_test, _, _ = rows
    for model in all_models():
        expected = refitted[mlflow.get_run(model.source_run_id).info.run_name]
        loaded = mlflow.sklearn.load_model(model.model_uri)
        outputs = "decision_function" if hasattr(expected, "decision_function") else "predict_proba"
        for X in (X_train, X_test):
            assert np.allclose(getattr(loaded, outputs)(X), getattr(expected, outputs)(X))
            assert list(loaded.predict(X)) == list(expected.predict(X))


def test_every_model_is_safe_to_load_and_ready_to_serve(main_job):
    store(main_job[0])
    for model in all_models():
        info = mlflow.models.get_model_info(model.model_uri)
        assert model.name == "model"
        assert info.flavors["sklearn"]["serialization_format"] == "skops"
        assert len(info.signature.inputs.inputs) == 30 and info.signature.outputs is not None
        assert info.saved_input_example_info["serving_input_path"]
        files = Path(mlflow.artifacts.download_artifacts(model.model_uri))
        requirements = (files / "requirements.txt").read_text().split()
        assert all(re.fullmatch(r"[a-z-]+==[\d.]+", line) for line in requirements), requirements
        packages = {line.split("==")[0] for line in requirements}
        assert packages >= {"mlflow", "scikit-learn", "skops", "pandas", "numpy"}


def test_tuning_scores_are_those_of_scikit_learn_and_the_best_wins(main_job, rows, refitted):
    folder, sessions = main_job
    store(folder)
    X_train, X_test, y_train, y_test = rows
    grid = list(ParameterGrid(GRID))
    for search, processes in zip(parents("hyperparameter-tuning"), sessions, strict=True):
        trials = children(search)
        for number in (1, 13, 22):  # cheap ones; every trial takes the same way
            trial = trials[f"trial-{number:04}"].data
            assert trial.params == {key: str(value) for key, value in grid[number - 1].items()}
            model = scaled(RandomForestClassifier(**grid[number - 1], random_state=42))
            scores = cross_val_score(model, X_train, y_train, cv=folds())
            assert trial.metrics["cv_accuracy"] == close(scores.mean())
            assert trial.metrics["cv_accuracy_std"] == close(scores.std())
        ranked = sorted(trials.items(), key=lambda t: (-t[1].data.metrics["cv_accuracy"], t[0]))
        best = ranked[0][1].data
        params, metrics = search.data.params, search.data.metrics
        assert {key: params[f"best_{key}"] for key in GRID} == best.params
        assert metrics["best_cv_accuracy"] == best.metrics["cv_accuracy"]
        score = refitted["grid-search"].score(X_test, y_test)
        assert metrics["test_accuracy"] == close(score)

        printed = processes[0].stdout
        for number, (name, trial) in enumerate(sorted(trials.items())):
            score = "{cv_accuracy:.4f} ± {cv_accuracy_std:.4f}".format(**trial.data.metrics)
            values = ", ".join(f"{name}={value}" for name, value in grid[number].items())
            line = re.escape(f"{name}  accuracy {score}  {values}")
            assert re.search(rf"^ *\d+/27 .* s left  {line}$", printed, re.M)
        # The time left: that of the trials so far, for as many as are left (here after 14 of 27).
        left = [int(seconds) for seconds in re.findall(r"^ *\d+/27 +(\d+) s left", printed, re.M)]
        half = sorted(trial.info.end_time for trial in trials.values())[13] - search.info.start_time
        assert len(left) == 27 and left[-1] == 0
        assert abs(left[13] - half / 1000 * 13 / 14) < 3
        table = printed.split("The best of 27")[1].split("\n")[2:7]
        for line, (name, trial) in zip(table, ranked[:5], strict=True):
            score = "{cv_accuracy:.4f} ± {cv_accuracy_std:.4f}".format(**trial.data.metrics)
            fit = f"{trial.data.metrics['fit_seconds']:.3f} s"
            values = [trial.data.params[key] for key in GRID]
            assert line.split() == [name, *score.split(), *fit.split(), *values]
        values = ", ".join(f"{name}={params[f'best_{name}']}" for name in GRID)
        assert re.search(rf"^Best parameters +{re.escape(values)}$", printed, re.M)
        assert re.search(rf"^Hold-out .*{metrics['test_accuracy']:.4f}$", printed, re.M)
        share = (y_test == "benign").mean()
        assert metrics["baseline_test_accuracy"] == close(share)
        assert re.search(rf"^Baseline .*{share:.4f}\b", printed, re.M)


def test_tuning_logs_each_trial_as_soon_as_it_has_finished(main_job):
    store(main_job[0])
    for search in parents("hyperparameter-tuning"):
        ends = sorted(trial.info.end_time for trial in children(search).values())
        assert ends[13] - ends[0] > 0.2 * (search.info.end_time - search.info.start_time)


def test_comparison_scores_are_those_of_scikit_learn(main_job, rows, refitted):
    """On the hold-out, in the store and in print; the folds are the business of another file."""
    folder, sessions = main_job
    store(folder)
    _, X_test, _, y_test = rows
    for comparison, processes in zip(parents("model-comparison"), sessions, strict=True):
        candidates = children(comparison)
        table = printed_table(processes[1].stdout)
        assert set(table) == set(CANDIDATES)
        for name in CANDIDATES:
            metrics, printed = candidates[name].data.metrics, table[name]
            predicted = refitted[name].predict(X_test)
            macro = precision_recall_fscore_support(y_test, predicted, average="macro")
            assert metrics["test_accuracy"] == close(accuracy_score(y_test, predicted))
            expected = balanced_accuracy_score(y_test, predicted)
            assert metrics["test_balanced_accuracy"] == close(expected)
            for key, value in zip(("precision", "recall", "f1"), macro, strict=False):
                assert metrics[f"test_{key}"] == close(value)
                assert printed[key] == f"{metrics[f'cv_{key}']:.4f}"
            score = "{cv_accuracy:.4f} ± {cv_accuracy_std:.4f}".format(**metrics)
            assert printed["accuracy"] == score
            assert printed["hold-out"] == f"{metrics['test_accuracy']:.4f}"
            assert printed["against the best"] == candidates[name].data.tags["verdict"]
        # The sort is stable: of equal scores, the one that is listed first stays first.
        ranked = sorted(CANDIDATES, key=lambda n: -candidates[n].data.metrics["cv_accuracy"])
        assert comparison.data.params["best_model"] == ranked[0] == next(iter(table))
        assert list(table) == ranked
        assert re.search(rf"^Best +{ranked[0]}\b", processes[1].stdout, re.M)
        assert max(map(len, processes[1].stdout.split("\n\n")[1].split("\n"))) <= 120


def test_the_second_session_gives_the_same_answers(main_job):
    """Same winners, same scores, in print and in the store; only measured times may differ."""

    (first, _, third), (fourth, _, sixth) = main_job[1]
    pattern = re.compile(r"(trial-\d+  accuracy [\d.]+ ± [\d.]+)")
    assert sorted(pattern.findall(first.stdout)) == sorted(pattern.findall(fourth.stdout))
    for one, two, starts in (
        (first, fourth, ("Hold-out", "Best", "Influence", "At")),
        (third, sixth, ("score", "above_baseline")),
    ):
        for start in starts:
            lines = [
                [line.split() for line in text.stdout.splitlines() if line.split()[:1] == [start]]
                for text in (one, two)
            ]
            assert lines[0] == lines[1] != []
    store(main_job[0])
    for experiment in EXPERIMENTS:
        before, after = parents(experiment)
        for one, two in [(before, after), *zip_children(before, after)]:
            measured = re.compile("second|latency|size")
            first, second = (
                {k: v for k, v in run_.data.metrics.items() if not measured.search(k)}
                for run_ in (one, two)
            )
            # Only the second deployment has a version in production to be compared with: its equal.
            more = {k: v for k, v in second.items() if k not in first}
            assert second == first | more and all(value == 0 for value in more.values())
            assert bool(more) == (experiment == "production-deployment")


def zip_children(before, after):
    one, two = children(before), children(after)
    assert set(one) == set(two)
    return [(one[name], two[name]) for name in one]


def test_the_production_model_is_version_2_by_alias_and_by_stage(main_job, rows):
    client = store(main_job[0])
    _, X_test, _, y_test = rows
    name = NAME
    versions = {v.version: v for v in client.search_model_versions(f"name = '{name}'")}
    assert {str(number) for number in versions} == {"1", "2"}
    for alias in ("staging", "production"):
        assert str(client.get_model_version_by_alias(name, alias).version) == "2"
    stages = {str(number): v.current_stage for number, v in versions.items()}
    assert stages == {"1": "Archived", "2": "Production"}
    expected = None
    for uri in (f"models:/{name}@production", f"models:/{name}/Production"):
        predicted = list(mlflow.pyfunc.load_model(uri).predict(X_test))
        assert expected in (None, predicted)
        expected = predicted
    printed = main_job[1][1][2].stdout
    features = re.findall(r"^ *([\d.]+) +([\d.]+) +([\d.]+) +\w+ +\w+$", printed, re.M)
    assert [[float(text) for text in line] for line in features] == [
        [pytest.approx(value, rel=1e-3) for value in row] for row in X_test.iloc[:5, :3].to_numpy()
    ]
    actual_beside_predicted = re.findall(r"(benign|malignant) +(benign|malignant)$", printed, re.M)
    assert (
        actual_beside_predicted
        == list(zip(y_test, expected, strict=True))[: len(actual_beside_predicted)]
    )
    assert len(actual_beside_predicted) >= 3


def test_a_model_found_elsewhere_takes_the_same_way(main_job, rows, tmp_path):
    shutil.copy(main_job[0] / "mlflow.db", tmp_path)  # with comparisons, and their models' places
    client = store(tmp_path)
    comparison = parents("model-comparison")[0]
    candidates = children(comparison)
    X = rows[1]
    (forest,) = models_of(candidates["random_forest"])
    for number, (candidate, uri) in enumerate(
        {
            "svm": f"runs:/{candidates['svm'].info.run_id}/model",
            "random_forest": forest.model_uri,
        }.items(),
        3,
    ):
        assert_success(run(SCRIPTS[2], "--model-uri", uri, cwd=tmp_path))
        assert str(client.get_model_version_by_alias(NAME, "production").version) == str(number)
        deployed = mlflow.pyfunc.load_model(f"models:/{NAME}@production").predict(X)
        source = f"runs:/{candidates[candidate].info.run_id}/model"
        assert list(deployed) == list(mlflow.sklearn.load_model(source).predict(X))
        version = client.get_model_version(NAME, str(number))
        assert version.run_id == candidates[candidate].info.run_id
        (linked,) = models_of(candidates[candidate])
        assert {"score", "below_production", "cv_accuracy"} <= {
            metric.key for metric in linked.metrics
        }


WITHOUT_PIP = """
import importlib.metadata as metadata
version = metadata.version

def version_but_pip(name):
    if name == "pip":
        raise metadata.PackageNotFoundError(name)
    return version(name)

metadata.version = version_but_pip
"""


def test_an_environment_without_pip_as_uv_makes_them(tmp_path):
    """The model that it logs is deployed: a line `pip` without a version is nothing to fear."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_PIP)
    process = run(SCRIPTS[2], cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert_success(process)
    store(tmp_path)
    model_uri = f"models:/{NAME}@production"
    assert "- pip\n" in mlflow.artifacts.load_text(f"{model_uri}/conda.yaml")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_the_script_does_and_leaves(script, tmp_path):
    """In a terminal of Western Windows too, which cannot show the lines of the tree."""
    process = run(script, "--help", cwd=tmp_path, PYTHONIOENCODING="cp1252")
    assert_success(process)
    assert "It leaves this in the store" in process.stdout
    assert "experiment" in process.stdout and "??? " in process.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_absent_tracking_server_ends_in_one_line(script, tmp_path):
    with socket.socket() as probe:  # a port on which nothing listens
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    process = run(script, cwd=tmp_path, timeout=SOON, MLFLOW_TRACKING_URI=uri)
    assert_one_line(process, f"the store {uri}")
    assert list(tmp_path.iterdir()) == []


def test_a_tracking_server_that_hangs_ends_in_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes calls and never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = run(SCRIPTS[0], cwd=tmp_path, timeout=SOON, MLFLOW_TRACKING_URI=uri)
    assert_one_line(process, uri, "timed out")


def test_scripts_started_together_in_an_empty_folder_all_succeed(tmp_path):
    """On a bare server, too: without git and pgrep. Another project's experiment is left alone."""
    edited(tmp_path, SCRIPTS[0], PARAM_GRID={"max_depth": [1, 3], "n_estimators": [5]})
    few = Code("lambda n_rows, seed: {'forest': RandomForestClassifier(5), 'svm': SVC()}")
    edited(tmp_path, SCRIPTS[1], REPEATS=2, make_candidates=few)
    edited(tmp_path, SCRIPTS[2], GATE=Code("{'score': GATE['score']}"))  # not the speed
    folder = tmp_path / "empty"
    folder.mkdir()
    bare = user_env(PATH=str(Path(sys.executable).parent), MLFLOW_EXPERIMENT_NAME="another")
    assert shutil.which("git", path=bare["PATH"]) is None
    started = [
        subprocess.Popen(
            [sys.executable, tmp_path / script],
            cwd=folder,
            env=bare,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script in SCRIPTS
    ]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in started]
    assert [(code, err) for _, err, code in ended] == [(0, "")] * 3
    store(folder)
    assert mlflow.get_experiment_by_name("another") is None
    for experiment, count in zip(EXPERIMENTS, (2, 2, 0), strict=True):
        (parent,) = parents(experiment)
        runs = [parent, *children(parent).values()]
        assert len(runs) == 1 + count
        assert {one.info.status for one in runs} == {"FINISHED"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_store_that_cannot_be_made_ends_in_one_line(script, tmp_path):
    uri = f"sqlite:///{tmp_path}/absent/mlflow.db"
    process = run(script, cwd=tmp_path, timeout=SOON, MLFLOW_TRACKING_URI=uri)
    assert_one_line(process, f"the store {uri}", "unable to open")
    assert list(tmp_path.iterdir()) == []


def test_a_locked_store_ends_in_one_line(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        process = run(SCRIPTS[1], cwd=tmp_path, timeout=2 * SOON)
    assert_one_line(process, "locked", "sqlite:///", "mlflow.db", "database is locked")
