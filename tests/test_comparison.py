"""model_comparison.py: what it prints, stores and recommends is true, and one failure is no end."""

import io
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from typing import NamedTuple

import benchmark_calibration
import mlflow
import numpy as np
import pandas as pd
import pytest
from baycomp import two_on_single
from conftest import (
    SOON,
    assert_success,
    children,
    edited,
    parents,
    printed_table,
    store,
    user_env,
)
from joblib import cpu_count
from matplotlib.figure import Figure
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, make_classification
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from sklearn.model_selection import (
    RepeatedStratifiedKFold,
    cross_val_score,
    cross_validate,
    train_test_split,
)
from sklearn.svm import SVC

import model_comparison as script

NAMES = {"random_forest", "gradient_boosting", "logistic_regression", "svm"}
ROPE, RISK, NOISE = 0.01, 0.2, 1.1  # as the README has them
CHANCES = ["p_worse", "p_equivalent", "p_better"]


def csv(parent, name):
    """Return a CSV artifact of the run as a DataFrame, its first column as the index."""
    uri = f"{parent.info.artifact_uri}/{name}"
    return pd.read_csv(io.StringIO(mlflow.artifacts.load_text(uri)), index_col=0)


def markdown_table(text):
    """Return the rows of a Markdown table, the header first, as lists of cells."""
    header, rule, *rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
    assert set(rule) == {"---"} and len({len(row) for row in [header, rule, *rows]}) == 1
    return [header, *rows]


@pytest.fixture(scope="module")
def parts():
    data = load_breast_cancer(as_frame=True)
    y = data.target.map(dict(enumerate(data.target_names)))
    return train_test_split(data.data, y, test_size=0.2, stratify=y, random_state=42)


@pytest.fixture(scope="module")
def sessions(main_job):
    """The two comparisons of the main job: their parents' runs and what they printed."""
    folder, jobs = main_job
    store(folder)
    for job in jobs:
        assert_success(job[1])
    return list(zip(parents("model-comparison"), [job[1].stdout for job in jobs], strict=True))


class Outcome(NamedTuple):
    """What a comparison returned, printed and logged."""

    code: int
    out: str
    err: str
    parent: mlflow.entities.Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for the store that the comparisons below share: it takes seconds to make one."""
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture
def compare(monkeypatch, capfd, folder):
    """A function that runs the comparison as a program, but in this process, and on few folds.

    One core is the faster way for so few: it starts no other process.
    """
    handler = signal.getsignal(signal.SIGINT)

    def run_script(*argv, candidates=None, cores=1):
        monkeypatch.setattr(script, "REPEATS", 2)
        if candidates is not None:
            monkeypatch.setattr(script, "make_candidates", lambda n_rows, seed: dict(candidates))
        monkeypatch.setenv("LOKY_MAX_CPU_COUNT", str(cores))
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        code = script.run_as_program(lambda: script.main([str(arg) for arg in argv]))
        out, err = capfd.readouterr()
        return Outcome(code, out, err, parents("model-comparison")[-1])

    yield run_script
    signal.signal(signal.SIGINT, handler)


def test_table_equals_store_equals_stored_models(sessions, parts):
    """What is printed, comparison.csv and the description are the metrics of the runs, and these
    are what scikit-learn's scorers make of the stored models and folds."""
    X_train, X_test, y_train, y_test = parts
    for parent, printed in sessions:
        runs, table = children(parent), csv(parent, "comparison.csv")
        assert set(runs) == set(table.index) == NAMES
        shown = printed_table(printed)
        for name, run in runs.items():
            metrics, verdict = run.data.metrics, run.data.tags["verdict"]
            assert table.loc[name, "verdict"] == verdict
            assert set(table.columns) == {*metrics, "verdict"}
            for key, value in table.drop(columns="verdict").loc[name].items():
                assert value == pytest.approx(metrics[key], abs=1e-9)
            predicted = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model").predict(X_test)
            recall = recall_score(y_test, predicted, average="macro")
            expected = {
                "accuracy": accuracy_score(y_test, predicted),
                "balanced_accuracy": recall,
                "f1": f1_score(y_test, predicted, average="macro"),
                "precision": precision_score(y_test, predicted, average="macro"),
                "recall": recall,
            }
            for key, score in expected.items():
                assert metrics[f"test_{key}"] == pytest.approx(score, abs=1e-9)
            assert shown[name] == {
                "accuracy": f"{metrics['cv_accuracy']:.4f} ± {metrics['cv_accuracy_std']:.4f}",
                "precision": f"{metrics['cv_precision']:.4f}",
                "recall": f"{metrics['cv_recall']:.4f}",
                "f1": f"{metrics['cv_f1']:.4f}",
                "hold-out": f"{metrics['test_accuracy']:.4f}",
                "against the best": verdict,
                "fit": f"{metrics['fit_seconds']:.3f} s",
                "latency": f"{metrics['latency_ms_p50']:.1f} ms",
                "size": f"{metrics['model_size_bytes'] / 1e6:.1f} MB",
            }
        ranked = sorted(NAMES, key=lambda name: -runs[name].data.metrics["cv_accuracy"])
        assert list(shown) == ranked == list(table.index)

        header, *rows = markdown_table(parent.data.tags["mlflow.note.content"])
        assert {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows} == shown
    # The folds can be had again from what is stored: a cheap model is enough to show it.
    run = children(sessions[0][0])["logistic_regression"]
    model = clone(mlflow.sklearn.load_model(f"runs:/{run.info.run_id}/model"))
    folds = RepeatedStratifiedKFold(n_splits=5, n_repeats=30, random_state=42)
    scoring = ["accuracy", "balanced_accuracy", "f1_macro", "precision_macro", "recall_macro"]
    table = cross_validate(model, X_train, y_train, cv=folds, scoring=scoring)
    for scorer in scoring:
        key, scores = scorer.removesuffix("_macro"), table[f"test_{scorer}"]
        assert run.data.metrics[f"cv_{key}"] == pytest.approx(scores.mean(), abs=1e-9)
        assert run.data.metrics[f"cv_{key}_std"] == pytest.approx(scores.std(), abs=1e-9)
    # In seconds, of one fit. The machine may have been much busier the one time than the other.
    assert 0.02 < table["fit_time"].mean() / run.data.metrics["fit_seconds"] < 50
    stored = csv(sessions[0][0], "folds.csv")["logistic_regression"]
    assert np.allclose(table["test_accuracy"], stored, atol=1e-9)


def test_what_is_printed_fits_and_says_how_far_it_is(sessions):
    """A line for each candidate with the time left, as they finish; a table of 120 columns."""
    for _, printed in sessions:
        lines = printed.splitlines()
        pattern = r" *(\d)/4 +(\d+) s left +(\w+)  accuracy (.*)$"
        done = [match.groups() for match in map(partial(re.match, pattern), lines) if match]
        assert [number for number, *_ in done] == ["1", "2", "3", "4"]
        assert {name: scores for *_, name, scores in done} == {
            name: row["accuracy"] for name, row in printed_table(printed).items()
        }
        (start,) = re.findall(r"^ *0/4 +(\d+) s left$", printed, re.M)
        left = [int(start), *(int(seconds) for _, seconds, *_ in done)]
        assert left == sorted(left, reverse=True) and left[-1] == 0
        first = next(i for i, line in enumerate(lines) if line.split()[:1] == ["model"])
        assert max(map(len, lines[first : lines.index("", first)])) <= 120
        assert "above the baseline" not in printed
        for word in ("Baseline ", "Best ", "Recommended "):
            assert sum(line.startswith(word) for line in lines) == 1


def test_probabilities_are_those_of_baycomp_by_the_stored_folds_alone(sessions, parts):
    """The Bayesian correlated t-test, as those who published it have programmed it."""
    for parent, printed in sessions:
        folds, runs = csv(parent, "folds.csv"), children(parent)
        assert len(folds) == 150 and set(folds) == {*NAMES, "baseline"}
        best = parent.data.params["best_model"]
        for name, run in runs.items():
            p = [run.data.metrics[chance] for chance in CHANCES]
            assert sum(p) == pytest.approx(1, abs=1e-12)
            if name == best:
                assert p == pytest.approx([0, 1, 0], abs=1e-15)
            expected = two_on_single(folds[best].values, folds[name].values, ROPE, runs=30)
            assert p == pytest.approx(expected, abs=1e-9)
            baseline, own = folds["baseline"].values, folds[name].values
            _, above = two_on_single(baseline, own, 0, runs=30)
            assert run.data.metrics["p_above_baseline"] == pytest.approx(above, abs=1e-9)
            assert run.data.metrics["cv_accuracy"] == pytest.approx(folds[name].mean(), abs=1e-9)
        mean = parent.data.metrics["baseline_cv_accuracy"]
        assert mean == pytest.approx(folds["baseline"].mean())
        (line,) = [line for line in printed.splitlines() if line.startswith("Baseline ")]
        assert f"accuracy {mean:.4f}" in line
    splits = RepeatedStratifiedKFold(n_splits=5, n_repeats=30, random_state=42)
    expected = cross_val_score(DummyClassifier(), parts[0], parts[2], cv=splits)
    assert np.allclose(expected, csv(sessions[0][0], "folds.csv")["baseline"], atol=1e-9)


def test_probabilities_of_equal_and_of_constant_differences_are_certain():
    for difference, expected in [(0, [0, 1, 0]), (-0.02, [1, 0, 0]), (0.02, [0, 0, 1])]:
        p = script.probabilities(pd.Series([float(difference)] * 10), ROPE, n_folds=5)
        assert [p[chance] for chance in CHANCES] == pytest.approx(expected, abs=1e-15)
    # The number of folds is that of the argument: with ten, a difference is surer than with five.
    differences = pd.Series(np.random.default_rng(0).normal(-0.02, 0.02, 20))
    for n_folds in (5, 10):
        p = script.probabilities(differences, ROPE, n_folds)
        expected = two_on_single(np.zeros(20), differences.values, ROPE, runs=20 // n_folds)
        assert [p[chance] for chance in CHANCES] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("p_worse", "p_above_baseline", "risk", "words"),
    [
        (0.97, 1.0, RISK, "worse.* 97%"),
        (0.95, 0.8, RISK, "worse.* 95%"),
        (0.94, 1.0, RISK, "probably worse.* 94%"),
        (0.80, 1.0, RISK, "probably worse.* 80%"),
        (0.79, 1.0, RISK, "undecided.* 79%"),
        (0.21, 1.0, RISK, "undecided.* 21%"),
        (0.20, 1.0, RISK, "practically the same.* 79%"),
        (0.00, 1.0, RISK, "practically the same.* 99%"),
        (0.97, 0.79, RISK, ".*baseline"),
        (0.00, 0.79, RISK, ".*baseline"),
        (0.30, 0.61, 0.4, "practically the same.* 69%"),
        (0.30, 0.61, 0.1, ".*baseline"),
    ],
)
def test_verdicts_say_the_probabilities_in_words(p_worse, p_above_baseline, risk, words):
    p = {"p_worse": p_worse, "p_better": 0.01, "p_above_baseline": p_above_baseline}
    p["p_equivalent"] = 1 - p["p_worse"] - p["p_better"]
    assert re.fullmatch(words, script.say_verdict(p, is_best=False, risk=risk))


def candidates_like(**columns):
    """Return candidates as MLflow ranks them, the best first; each is good if nothing is said."""
    n = len(next(iter(columns.values())))
    columns = {"p_worse": [0.0] * n, "p_above_baseline": [1.0] * n} | columns
    table = pd.DataFrame(columns).add_prefix("metrics.")
    return table.assign(**{"tags.mlflow.runName": list("abcdef"[:n])})


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        # Several are within the noise of the lowest: the first of them, which is the best, wins.
        ({"latency_ms_p50": [1.05, 1.0, 1.09, 1.02]}, "a"),
        ({"latency_ms_p50": [2.0, 1.09, 1.0, 1.05]}, "b"),
        ({"latency_ms_p50": [2.0, 1.11, 1.09, 1.0]}, "c"),
        # The fastest are too likely to be worse, or not shown to be above the baseline.
        ({"latency_ms_p50": [3.0, 2.0, 1.0], "p_worse": [0, 0.2, 0.21]}, "b"),
        ({"latency_ms_p50": [3.0, 2.0, 1.0], "p_above_baseline": [1, 0.8, 0.79]}, "b"),
        # One that failed has no numbers.
        ({"latency_ms_p50": [3.0, 2.0, math.nan], "p_worse": [0, 0.1, math.nan]}, "b"),
        ({"latency_ms_p50": [1.0, 2.0], "p_above_baseline": [0.79, 0.79]}, None),
        ({"latency_ms_p50": [1.0, 2.0], "p_worse": [0.21, math.nan]}, None),
    ],
)
def test_the_fastest_that_is_hardly_worse_is_recommended(columns, name):
    recommended = script.recommend(candidates_like(**columns), RISK, NOISE)
    assert (None if recommended is None else recommended["tags.mlflow.runName"]) == name


def test_what_risk_and_noise_are_is_up_to_the_caller():
    ranked = candidates_like(latency_ms_p50=[3.0, 2.0, 1.8], p_worse=[0, 0.1, 0.3])
    for risk, noise, name in [(0.05, 1.1, "a"), (0.1, 1.1, "b"), (0.3, 1.1, "c"), (0.3, 1.2, "b")]:
        assert script.recommend(ranked, risk, noise)["tags.mlflow.runName"] == name


@pytest.mark.parametrize(
    ("recommended", "reason"),
    [("a", "the best; no model"), ("b", "the fastest"), ("none", "the best is not shown")],
)
def test_the_report_says_why_a_model_is_recommended(recommended, reason, tmp_path, capsys):
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/report.db")
    try:
        experiment_id = mlflow.MlflowClient().create_experiment("report", str(tmp_path))
        with mlflow.start_run(experiment_id=experiment_id) as run:
            mlflow.log_params({"best_model": "a", "recommended_model": recommended})
            mlflow.log_metrics({"best_cv_accuracy": 0.9, "baseline_cv_accuracy": 0.5})
        failed = {"tags.mlflow.runName": "a", "status": "FAILED", "tags.error": "any"}
        script.print_report(run.info.run_id, pd.DataFrame([failed]), "accuracy", 0.01)
    finally:
        mlflow.set_tracking_uri(before)
    assert f"\nRecommended  {recommended}: {reason}" in capsys.readouterr().out


def test_the_expected_time_is_that_of_all_folds_on_all_cores():
    first = {"slow": {"fit_seconds": 2.0}, "failed": ValueError(), "fast": {"fit_seconds": 0.5}}
    seconds = script.estimate_seconds(first, 150)
    assert seconds == {"slow": 300 / cpu_count(), "failed": 0, "fast": 75 / cpu_count()}


def test_costs_and_recommendation(sessions):
    """What was measured is plausible; the recommended model follows from it, and is handed on."""
    for parent, printed in sessions:
        runs = children(parent)
        good = {}
        for name, run in runs.items():
            metrics = run.data.metrics
            assert 0 < metrics["latency_ms_p50"] <= metrics["latency_ms_p95"] < 1000
            assert metrics["rows_per_second"] > 1000 / metrics["latency_ms_p50"]
            model = mlflow.models.get_model_info(f"runs:/{run.info.run_id}/model")
            path = mlflow.artifacts.list_artifacts(f"models:/{model.model_id}")
            sizes = {file.path.split("/")[-1]: file.file_size for file in path}
            assert metrics["model_size_bytes"] >= max(sizes.values())
            assert metrics["model_size_bytes"] <= sum(sizes.values())
            if metrics["p_worse"] <= RISK and metrics["p_above_baseline"] >= 1 - RISK:
                assert run.data.tags["verdict"].startswith(("the best", "practically the same"))
                good[name] = metrics["latency_ms_p50"]
        fast = [name for name in good if good[name] <= NOISE * min(good.values())]
        best = max(fast, key=lambda name: runs[name].data.metrics["cv_accuracy"])
        assert parent.data.params["recommended_model"] == best
        assert re.search(rf"^Recommended +{best}\b", printed, re.M)
        (following,) = [line for line in printed.splitlines() if line.startswith("Next: ")]
        assert following.endswith(f" --model-uri runs:/{runs[best].info.run_id}/model")


def test_the_printed_lines_load_the_winner_in_a_fresh_process(main_job, sessions):
    """Each session's lines find that session's winner, whatever else is in the store."""
    for parent, printed in sessions:
        block = printed[printed.index("    import mlflow\n") : printed.index("\nLook: ")]
        code = textwrap.dedent(block)
        code += "\nprint(best.source_run_id, type(model).__name__)"
        command = [sys.executable, "-c", code]
        process = subprocess.run(
            command, cwd=main_job[0], env=user_env(), capture_output=True, text=True, timeout=60
        )
        runs = children(parent)
        best = max(runs.values(), key=lambda run: run.data.metrics["cv_accuracy"])
        assert process.stdout.split() == [best.info.run_id, "PyFuncModel"], process.stderr
        assert parent.data.params["best_model"] == best.info.run_name
        assert parent.data.metrics["best_cv_accuracy"] == best.data.metrics["cv_accuracy"]
        assert best.data.tags["verdict"] == "the best"
    first, second = (parent.data for parent, _ in sessions)
    assert first.params["best_model"] == second.params["best_model"]
    assert first.metrics == second.metrics  # scores alone: nothing measured is on the parent


def lines_of(axes):
    """Return the lines in a picture, as arrays of points."""
    return [line.get_xydata().astype(float) for line in axes.lines]


def test_pictures_show_the_intervals_the_front_and_the_counts():
    """On hand-made numbers: what can be read off the axes is what the numbers say."""
    rng = np.random.default_rng(1)
    scores = pd.DataFrame({"a": rng.normal(0.9, 0.02, 50), "b": rng.normal(0.88, 0.02, 50)})
    scores["a"] += 0.9 - scores["a"].mean()
    axes = Figure().subplots()
    script.draw_differences(axes, scores, ["a", "b", "failed"], "accuracy", ROPE, 5)
    differences = scores["b"] - scores["a"]
    # A reader of the interval must find 2.5 % of the probability on either side of it.
    low, high = next(line[:, 0] for line in lines_of(axes) if np.ptp(line[:, 0]) > 1e-6)
    for edge, share in ((low, 0.025), (high, 0.975)):
        below, _ = two_on_single(differences.values - edge, np.zeros(50), 0, runs=10)
        assert 1 - below == pytest.approx(share, abs=1e-6)
    assert any(line[0, 0] == pytest.approx(differences.mean()) for line in lines_of(axes))

    ranked = candidates_like(
        cv_f1=[0.9, 0.8, 0.7, 0.6, math.nan], latency_ms_p50=[5.0, 6.0, 2.0, 3.0, math.nan]
    )
    axes = Figure().subplots()
    script.draw_costs(axes, ranked, "f1")
    fronts = [line for line in lines_of(axes) if line.tolist() == [[2.0, 0.7], [5.0, 0.9]]]
    assert len(fronts) == 1
    assert {text.get_text() for text in axes.texts} == set("abcd")

    y = pd.Series(["no"] * 8 + ["yes"] * 4)
    axes = Figure().subplots()
    script.draw_confusion(axes, y, ["no"] * 7 + ["yes"] * 4 + ["no"], "of a")
    cells = {text.get_position(): text.get_text().split() for text in axes.texts}
    assert cells[0, 0] == ["7", "88%"] and cells[1, 1] == ["3", "75%"]
    assert cells[1, 0][0] == "1" and cells[0, 1][0] == "1"  # x is what was predicted
    assert [text.get_text() for text in axes.get_xticklabels()] == ["no", "yes"]


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory):
    """A table of which one class is 12 %, and the classes overlap."""
    X, y = make_classification(
        n_samples=500,
        n_features=6,
        n_informative=3,
        n_redundant=1,
        weights=[0.88],
        class_sep=0.6,
        random_state=0,
    )
    table = pd.DataFrame(X.round(3)).add_prefix("measure_")
    table["churned"] = np.where(y, "yes", "no")
    path = tmp_path_factory.mktemp("imbalanced") / "customers.csv"
    table.to_csv(path, index=False)
    return path


def test_the_metric_that_is_asked_for_decides(compare, imbalanced):
    """On imbalanced rows the best by F1 is another one than by accuracy. All metrics are logged."""
    code, out, err, parent = compare("--csv", imbalanced, "--target", "churned", "--metric", "f1")
    assert (code, err) == (0, "")

    table = pd.read_csv(imbalanced)
    X, y = table.drop(columns="churned"), table["churned"]
    assert 0.1 < (y == "yes").mean() < 0.14
    X_train, _, y_train, _ = train_test_split(X, y, test_size=0.2, stratify=y, random_state=42)
    folds = RepeatedStratifiedKFold(n_splits=5, n_repeats=2, random_state=42)
    runs, scores = children(parent), {}
    for name, run in runs.items():
        model = clone(mlflow.sklearn.load_model(f"runs:/{run.info.run_id}/model"))
        scoring = ["accuracy", "f1_macro"]
        results = cross_validate(model, X_train, y_train, cv=folds, scoring=scoring)
        scores[name] = results["test_f1_macro"]
        for key, scorer in [("accuracy", "accuracy"), ("f1", "f1_macro")]:
            mean = results[f"test_{scorer}"].mean()
            assert run.data.metrics[f"cv_{key}"] == pytest.approx(mean, abs=1e-9)
        for key in ("accuracy", "balanced_accuracy", "f1", "precision", "recall"):
            assert {f"cv_{key}", f"cv_{key}_std", f"test_{key}"} <= run.data.metrics.keys()
    best = max(scores, key=lambda name: scores[name].mean())
    by_accuracy = max(runs, key=lambda name: runs[name].data.metrics["cv_accuracy"])
    assert parent.data.params["best_model"] == best != by_accuracy
    assert parent.data.metrics["best_cv_f1"] == pytest.approx(scores[best].mean(), abs=1e-9)
    baseline = cross_val_score(DummyClassifier(), X_train, y_train, cv=folds, scoring="f1_macro")
    assert parent.data.metrics["baseline_cv_f1"] == pytest.approx(baseline.mean(), abs=1e-9)
    for name, run in runs.items():
        assert np.allclose(csv(parent, "folds.csv")[name], scores[name], atol=1e-9)
        expected = two_on_single(scores[best], scores[name], ROPE, runs=2)
        assert [run.data.metrics[p] for p in CHANCES] == pytest.approx(expected, abs=1e-9)

    shown = printed_table(out)
    assert next(iter(shown)) == best
    for name, run in runs.items():
        metrics = run.data.metrics
        assert shown[name]["f1"] == f"{metrics['cv_f1']:.4f} ± {metrics['cv_f1_std']:.4f}"
        assert shown[name]["accuracy"] == f"{metrics['cv_accuracy']:.4f}"
        assert shown[name]["hold-out"] == f"{metrics['test_f1']:.4f}"
    assert '"field_name": "metrics.cv_f1"' in out and "cv_f1" in out[out.index("Look: ") :]
    (following,) = [line for line in out.splitlines() if line.startswith("Next: ")]
    assert following.endswith(f" --csv {imbalanced} --target churned --metric f1")


def test_shuffled_labels_beat_no_baseline(compare, monkeypatch):
    """Of models that have learned nothing none is recommended, the best included: exit code 1."""
    load_data = script.load_data

    def load_shuffled(*args):
        for rows in load_data(*args):
            y = rows.y.sample(frac=1, random_state=7).set_axis(rows.y.index)
            yield rows._replace(y=y)

    monkeypatch.setattr(script, "load_data", load_shuffled)
    candidates = {"logistic_regression": LogisticRegression(max_iter=1000), "svm": SVC()}
    code, out, err, parent = compare(candidates=candidates)
    assert (
        (code, err.count("\n")) == (1, 1) and "the best is not shown" in err and "baseline" in err
    )
    assert "Next:" not in out
    assert re.search(r"^Note: the best is only -?0\.0\d+ above the baseline", out, re.M)
    assert parent.info.status == "FINISHED"
    for run in children(parent).values():
        assert "baseline" in run.data.tags["verdict"]
    assert parent.data.params["recommended_model"] == "none"


def test_one_that_raises_is_a_failed_row_and_of_equals_the_first_is_the_best(compare):
    """The other candidates go on. Two that are the same are practically the same, for certain."""
    model = LogisticRegression(max_iter=1000)
    candidates = {"listed_first": model, "broken": SVC(C=-1), "also": clone(model)}
    code, out, err, parent = compare(candidates=candidates, cores=2)
    assert (code, err) == (0, "")
    runs = children(parent)
    states = {name: run.info.status for name, run in runs.items()}
    assert states.pop("broken") == "FAILED"
    assert set(states.values()) == {parent.info.status} == {"FINISHED"}
    assert "InvalidParameterError" in runs["broken"].data.tags["error"]
    assert list(printed_table(out)) == ["listed_first", "also", "broken"]
    assert printed_table(out)["broken"]["against the best"].startswith("failed: ")
    assert re.search(r"^ *2/3 .* broken  failed$", out, re.M)
    assert parent.data.params["best_model"] == "listed_first"
    for name in ("listed_first", "also"):
        p = [runs[name].data.metrics[chance] for chance in CHANCES]
        assert p == pytest.approx([0, 1, 0], abs=1e-15)
    assert runs["also"].data.tags["verdict"] == "practically the same, 100%"


def test_the_best_may_fail_at_the_end(compare, monkeypatch):
    """It fails on the hold-out, when its folds are done: then the next one is the best."""
    score_predictions = script.score_predictions

    def failing(y, predicted, metrics):
        if len(y) == 114 and mlflow.active_run().info.run_name == "logistic_regression":
            raise RuntimeError("late")
        return score_predictions(y, predicted, metrics)

    monkeypatch.setattr(script, "score_predictions", failing)
    candidates = {"logistic_regression": LogisticRegression(max_iter=1000), "svm": SVC()}
    code, out, err, parent = compare(candidates=candidates)
    assert (code, err) == (0, "")
    states = {name: run.info.status for name, run in children(parent).items()}
    assert states == {"logistic_regression": "FAILED", "svm": "FINISHED"}
    assert "late" in printed_table(out)["logistic_regression"]["against the best"]
    svm = children(parent)["svm"].data.metrics["cv_accuracy"]
    assert parent.data.params["best_model"] == "svm"
    assert parent.data.metrics["best_cv_accuracy"] == svm
    assert parent.data.params["recommended_model"] == "svm"


def test_all_candidates_failing_is_exit_code_1(compare):
    code, _, err, parent = compare(candidates={"broken": SVC(C=-1)})
    assert code == 1
    assert err.count("\n") == 1 and "every candidate failed" in err
    assert {parent.info.status, children(parent)["broken"].info.status} == {"FAILED"}


def test_worse_is_hardly_ever_said_of_equals_and_mostly_of_four_points():
    """A small edition of benchmark_calibration.py, with candidates whose true skill is known."""
    equal = benchmark_calibration.count_verdicts(0, simulations=100)
    assert equal["worse"] <= 0.02 and equal["worse"] + equal["probably worse"] <= 0.1
    four_points = benchmark_calibration.count_verdicts(0.04, simulations=100)
    assert four_points["worse"] + four_points["probably worse"] >= 0.9


def test_ctrl_c_leaves_no_run_running_and_no_worker(tmp_path):
    process = subprocess.Popen(
        [sys.executable, edited(tmp_path, "model_comparison.py", REPEATS=4)],
        cwd=tmp_path,
        env=user_env(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    # The first is done and logged: the others are being scored, or logged.
    for line in itertools.takewhile(lambda line: "logistic_reg" not in line, process.stdout):
        assert "failed" not in line
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "Stopped: by Ctrl-C\n")
    store(tmp_path)
    (parent,) = parents("model-comparison")
    runs = children(parent)
    assert parent.info.status == "FAILED"
    assert runs.pop("logistic_regression").info.status == "FINISHED"
    assert {run.info.status for run in runs.values()} <= {"FINISHED", "FAILED"}
    deadline = time.monotonic() + SOON
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.2)
