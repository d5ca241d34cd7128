"""The main job, three scripts in an empty folder: is what they print and leave true?"""

import importlib
import io
import re
import shlex
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import SCRIPTS, assert_success, children, parents, store
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from sklearn.model_selection import ParameterGrid, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

NAME = "breast-cancer-classifier"
GRID = {"max_depth": [1, 3, 9], "max_features": [0.1, 0.3, 0.9], "n_estimators": [20, 100, 300]}
CANDIDATES = {
    "baseline": DummyClassifier(),
    "logistic_regression": LogisticRegression(max_iter=1000),
    "svm": SVC(),
    "gradient_boosting": HistGradientBoostingClassifier(random_state=42),
    "random_forest": RandomForestClassifier(random_state=42),
}


@pytest.fixture(scope="module")
def rows():
    """The rows by the stated rule, made without the scripts: X_train, X_test, y_train, y_test."""
    data = load_breast_cancer(as_frame=True)
    y = data.target.map({0: "malignant", 1: "benign"}).astype(object)
    held_out = pd.util.hash_pandas_object(data.data, index=False) % 1000 < 200
    assert held_out.sum() == 105
    return data.data[~held_out], data.data[held_out], y[~held_out], y[held_out]


@pytest.fixture(scope="module")
def refitted(main_job, rows):
    """The models that the store should hold, by the name of their run: fitted on training rows."""
    store(main_job[0])
    (search,) = parents("hyperparameter-tuning")
    best = mlflow.artifacts.load_dict(f"runs:/{search.info.run_id}/best_params.json")
    models = CANDIDATES | {
        "grid-search": RandomForestClassifier(**best, random_state=42),
        "deployment": CANDIDATES["logistic_regression"],
    }
    with threadpool_limits(1):  # threads that wait for a busy core take most of its time
        return {name: scaled(model).fit(rows[0], rows[2]) for name, model in models.items()}


def scaled(model):
    """What the scripts' preprocessing comes to for a table of numbers without gaps."""
    return make_pipeline(StandardScaler(), clone(model))


def close(value):
    return pytest.approx(value, abs=1e-9)


def all_models():
    """Return every model in the store, by any script."""
    experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    return mlflow.search_logged_models(experiments, output_format="list")


def files_of(run_):
    return {file.path for file in mlflow.artifacts.list_artifacts(run_id=run_.info.run_id)}


def test_the_scripts_succeed_in_silence(main_job):
    for process in main_job[1]:
        assert_success(process)


def test_no_line_is_wider_than_a_terminal(main_job):
    """Addresses, commands and the guide aside."""
    for process in main_job[1]:
        text = process.stdout.partition("# Deploy")[0]
        lines = [line for line in text.splitlines() if not re.match("Look|Next|Load|Undo", line)]
        assert max(map(len, lines)) <= 125


def test_the_store_holds_what_the_docstrings_promise_and_no_more(main_job):
    store(main_job[0])
    experiments = {experiment.name for experiment in mlflow.search_experiments()}
    names = {"hyperparameter-tuning", "model-comparison", "production-deployment"}
    assert experiments == {"Default", *names}
    assert parents("Default") == []

    (search,) = parents("hyperparameter-tuning")
    trials = children(search)
    assert set(trials) == {
        ", ".join(f"{name}={value}" for name, value in params.items())
        for params in ParameterGrid(GRID)
    }
    assert files_of(search) == {"best_params.json", "search.png"}
    (comparison,) = parents("model-comparison")
    candidates = children(comparison)
    assert set(candidates) == set(CANDIDATES)
    assert files_of(comparison) == {"comparison.png", "folds.csv"}
    deployments = parents("production-deployment")
    for deployment in deployments:
        assert files_of(deployment) == {"confusion.png", "deployment_guide.md"}
    assert len(deployments) == 2
    for one in (search, comparison, *deployments, *trials.values(), *candidates.values()):
        assert one.info.status == "FINISHED"
    aliases = mlflow.MlflowClient().get_registered_model(NAME).aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {
        "staging": "2",
        "production": "2",
        "previous": "1",
    }
    left = {path.name for path in main_job[0].iterdir()}
    assert left == {"mlflow.db", "mlflow.db.lock", "mlruns"}


def test_every_model_has_learned_from_the_training_rows_and_no_others(main_job, rows, refitted):
    """Each is what the same estimator becomes, refitted on these rows: equal on every row."""
    store(main_job[0])
    models = all_models()
    assert len(models) == 1 + len(CANDIDATES) + 2
    for model in models:
        expected = refitted[mlflow.get_run(model.source_run_id).info.run_name]
        loaded = mlflow.sklearn.load_model(model.model_uri)
        outputs = "decision_function" if hasattr(expected, "decision_function") else "predict_proba"
        for X in rows[:2]:
            assert np.allclose(getattr(loaded, outputs)(X), getattr(expected, outputs)(X))
            assert list(loaded.predict(X)) == list(expected.predict(X))


def test_every_model_gives_its_logged_hold_out_score_again(main_job, rows):
    """And the score is linked to the model and to the rows that were held out."""
    store(main_job[0])
    _, X_test, _, y_test = rows
    for model in all_models():
        metrics = {metric.key: metric for metric in model.metrics}
        predicted = mlflow.pyfunc.load_model(model.model_uri).predict(X_test)
        name = (metrics.keys() & {"test_accuracy", "score"}).pop()
        assert metrics[name].dataset_name == "breast-cancer-test"
        assert metrics[name].value == close(accuracy_score(y_test, predicted))
        if "test_f1" in metrics:
            macro = precision_recall_fscore_support(
                y_test, predicted, average="macro", zero_division=0
            )
            for key, value in zip(("precision", "recall", "f1"), macro, strict=False):
                assert metrics[f"test_{key}"].value == close(value)


def test_every_model_is_safe_to_load_and_ready_to_serve(main_job):
    store(main_job[0])
    for model in all_models():
        info = mlflow.models.get_model_info(model.model_uri)
        assert info.flavors["sklearn"]["serialization_format"] == "skops"
        assert info.metadata == {"held_out": "0.2 of the rows, by a hash of the features"}
        assert len(info.signature.inputs.inputs) == 30 and info.signature.outputs is not None
        assert info.saved_input_example_info["serving_input_path"]
        files = Path(mlflow.artifacts.download_artifacts(model.model_uri))
        requirements = (files / "requirements.txt").read_text().split()
        assert all(re.fullmatch(r"[a-z-]+==[\d.]+", line) for line in requirements), requirements


def test_the_scores_of_a_search_are_those_of_scikit_learn_and_the_best_wins(main_job, rows):
    folder, (process, *_) = main_job
    store(folder)
    X_train, X_test, y_train, y_test = rows
    (search,) = parents("hyperparameter-tuning")
    trials = children(search)
    folds = StratifiedKFold(5, shuffle=True, random_state=42)
    for params in list(ParameterGrid(GRID))[::9]:  # cheap ones; every trial takes the same way
        name = ", ".join(f"{key}={value}" for key, value in params.items())
        trial = trials[name].data
        assert trial.params == {key: str(value) for key, value in params.items()}
        model = scaled(RandomForestClassifier(**params, random_state=42))
        scores = cross_val_score(model, X_train, y_train, cv=folds)
        assert trial.metrics["cv_accuracy"] == close(scores.mean())
        assert trial.metrics["cv_accuracy_se"] == close(scores.std(ddof=1) / 5**0.5)

    ranked = sorted(trials, key=lambda name: (-trials[name].data.metrics["cv_accuracy"], name))
    assert search.data.tags["best_trial"] == ranked[0]
    best = trials[ranked[0]].data
    params = mlflow.artifacts.load_dict(f"runs:/{search.info.run_id}/best_params.json")
    assert {name: str(value) for name, value in params.items()} == best.params
    assert search.data.metrics["best_cv_accuracy"] == best.metrics["cv_accuracy"]
    baseline = DummyClassifier().fit(X_train, y_train).score(X_test, y_test)
    assert search.data.metrics["baseline_test_accuracy"] == close(baseline)

    printed = process.stdout
    assert search.data.tags["mlflow.note.content"] in printed
    assert f"Best of 27 trials: {ranked[0]}\n" in printed
    assert f"accuracy of the best: {search.data.metrics['test_accuracy']:.4f}\n" in printed
    script, tuned, *_ = shlex.split(printed.splitlines()[-1])[2:]
    assert script.endswith("model_comparison.py") and tuned == f"--tuned={search.info.run_id}"
    for name, trial in trials.items():
        assert f"accuracy {trial.data.metrics['cv_accuracy']:.4f}  {name}\n" in printed
    (cheapest,) = re.findall("^Cheapest within one standard error: (.*)$", printed, re.M)
    least = best.metrics["cv_accuracy"] - best.metrics["cv_accuracy_se"]
    good = [name for name in ranked if trials[name].data.metrics["cv_accuracy"] >= least]
    seconds = {name: trials[name].data.metrics["fit_seconds"] for name in good}
    assert cheapest == next(name for name in good if seconds[name] <= 1.5 * min(seconds.values()))
    score = trials[cheapest].data.metrics["cv_accuracy"]
    assert f"    with {score:.4f}, at " in printed
    rest = printed.partition("on the folds:\n\n")[2]
    rows = [re.split(" {1,}(?=0\\.)", line.strip())[0] for line in rest.splitlines()[1:6]]
    assert rows == ranked[:5]


def test_the_comparison_is_what_scikit_learn_says_and_what_is_logged(main_job, rows):
    folder, (_, process, *_) = main_job
    store(folder)
    X_train, _, y_train, _ = rows
    (comparison,) = parents("model-comparison")
    candidates = children(comparison)
    text = mlflow.artifacts.load_text(f"runs:/{comparison.info.run_id}/folds.csv")
    fold_scores = pd.read_csv(io.StringIO(text), index_col="fold")
    assert fold_scores.shape == (150, len(CANDIDATES))
    for repeat in (0, 29):
        folds = StratifiedKFold(5, shuffle=True, random_state=42 + repeat)
        for name in ("logistic_regression", "svm"):
            expected = cross_val_score(scaled(CANDIDATES[name]), X_train, y_train, cv=folds)
            assert list(fold_scores[name][5 * repeat :][:5]) == close(list(expected))
    for name, candidate in candidates.items():
        metrics = candidate.data.metrics
        assert metrics["cv_accuracy"] == close(fold_scores[name].mean())
        assert metrics["p_worse"] + metrics["p_equivalent"] + metrics["p_better"] == close(1)
        assert metrics["latency_ms"] > 0 and metrics["fit_seconds"] > 0
    best = max(candidates, key=lambda name: candidates[name].data.metrics["cv_accuracy"])
    assert comparison.data.tags["best_model"] == best == "logistic_regression"

    printed = process.stdout
    note = comparison.data.tags["mlflow.note.content"]
    assert note in printed
    recommended = comparison.data.tags["recommended_model"]
    assert note.startswith(f"Recommended: {recommended} (")
    choice, others = (note.split("\n\n")[part].splitlines()[1:] for part in (1, 4))
    order = sorted(candidates, key=lambda name: -candidates[name].data.metrics["cv_accuracy"])
    assert [line.split()[0] for line in choice] == [line.split()[0] for line in others] == order
    for name, short, line in zip(order, choice, others, strict=True):
        metrics = candidates[name].data.metrics
        _, score, *_, latency = short.split()
        assert float(score) == pytest.approx(metrics["cv_accuracy"], abs=6e-5)
        assert float(latency) == pytest.approx(metrics["latency_ms"], abs=6e-5)
        numbers = [metrics[f"cv_{key}"] for key in ("accuracy", "precision", "recall", "f1")]
        numbers += [metrics[key] for key in ("test_accuracy", "fit_seconds")]
        assert [float(text) for text in line.split()[1:]] == pytest.approx(numbers, abs=6e-5)
    (uri,) = re.findall(r'load_model\("(.*?)"\)', printed)
    assert mlflow.get_logged_model(uri.removeprefix("models:/")).tags["candidate"] == best
    script, option, *same = shlex.split(printed.splitlines()[-1])[2:]
    assert same == ["--target=diagnosis", "--metric=accuracy"]
    assert script.endswith("production_deployment.py") and option.startswith("--model-uri=models:/")
    assert mlflow.get_logged_model(option.partition("models:/")[2]).tags["candidate"] == recommended


def test_the_deployments_print_what_they_log(main_job, rows):
    folder, (*_, first, second) = main_job
    client = store(folder)
    old, new = parents("production-deployment")
    for deployment, process, number in ((old, first, "1"), (new, second, "2")):
        tags = deployment.data.tags
        assert tags["mlflow.note.content"] in process.stdout
        version = client.get_model_version(NAME, number)
        assert version.description == tags["mlflow.note.content"]
        assert version.tags["validation_status"] == "passed"
        guide = mlflow.artifacts.load_text(f"runs:/{deployment.info.run_id}/deployment_guide.md")
        assert guide in process.stdout
        for key, value in deployment.data.metrics.items():
            assert re.search(rf"^ +{key} +{re.escape(f'{value:.4f}')}", process.stdout, re.M), key
    assert "Version 1 passed (accuracy; compared with nothing)\n" in first.stdout
    assert "Version 2 passed (accuracy; compared with version 1)\n" in second.stdout
    assert client.get_model_version(NAME, "2").tags["compared_with"] == "version 1"
    metrics = new.data.metrics
    assert (metrics["below_production"], metrics["p_worse_than_production"]) == (0, 0)
    _, X_test, _, y_test = rows
    baseline = (y_test == "benign").mean()
    assert metrics["above_baseline"] == close(metrics["score"] - baseline)

    lines = second.stdout.partition("mean radius")[2].splitlines()[1:6]
    loaded = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    assert [line.split()[-2] for line in lines] == list(y_test[:5])
    assert [line.split()[-1] for line in lines] == list(loaded.predict(X_test[:5]))


def test_the_printed_addresses_are_those_of_the_runs(main_job):
    store(main_job[0])
    names = ("hyperparameter-tuning", "model-comparison", "production-deployment")
    runs = [run_ for name in names for run_ in parents(name)]
    for one, process in zip(runs, main_job[1], strict=True):
        address = f"#/experiments/{one.info.experiment_id}/runs/{one.info.run_id}?"
        look = 'Look:  mlflow ui --backend-store-uri "sqlite:///mlflow.db"\n       http://127.0.0.1:5000/'
        assert f"{look}{address}" in process.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_the_script_does_and_leaves(script, capsys):
    """In letters that a terminal of Western Windows has, too."""
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(script.removesuffix(".py")).main(["--help"])
    text = capsys.readouterr().out
    assert "It leaves this in the store" in text
    text.encode("cp1252")
