"""model_comparison.py: what it prints, stores and recommends is true, and one failure is no end."""

import io
import os
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
    assert_success,
    children,
    edited,
    parents,
    printed_table,
    store,
    user_env,
)
from scipy.stats import t as student_t
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from sklearn.model_selection import (
    RepeatedStratifiedKFold,
    cross_val_score,
    cross_validate,
    train_test_split,
)

NAMES = {"random_forest", "gradient_boosting", "logistic_regression", "svm"}
MACRO = {"average": "macro", "zero_division": 0}
DRIVER = """
import sys
sys.path.insert(0, {root!r})
import model_comparison as script
from sklearn.dummy import DummyClassifier
from sklearn.svm import SVC
{change}
if __name__ == "__main__":
    script.main()
"""
FEW = "script.REPEATS = 2"


def drive(folder, change, cores="1"):
    """Run the script with changed settings; return its exit code, stdout and stderr.

    Of so few folds one core is the faster way: it starts no other process.
    """
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT), change=change))
    command, env = [sys.executable, "driver.py"], user_env(LOKY_MAX_CPU_COUNT=cores)
    process = subprocess.run(
        command, cwd=folder, env=env, text=True, capture_output=True, timeout=120
    )
    return process.returncode, process.stdout, process.stderr


def csv(parent, name):
    """Return a CSV artifact of the run as a DataFrame, its first column as the index."""
    uri = f"{parent.info.artifact_uri}/{name}"
    return pd.read_csv(io.StringIO(mlflow.artifacts.load_text(uri)), index_col=0)


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


def test_table_equals_store_equals_stored_models(sessions, parts):
    X_train, X_test, y_train, y_test = parts
    for parent, printed in sessions:
        runs, table = children(parent), csv(parent, "comparison.csv")
        assert set(runs) == set(table.index) == NAMES
        for name, run in runs.items():
            metrics = run.data.metrics
            for key, value in table.drop(columns="verdict").loc[name].items():
                assert value == pytest.approx(metrics[key], abs=1e-9)
            predicted = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model").predict(X_test)
            assert metrics["accuracy"] == pytest.approx(accuracy_score(y_test, predicted), abs=1e-9)
            for key, scorer in [("f1", f1_score), ("precision", precision_score)]:
                expected = scorer(y_test, predicted, **MACRO)
                assert metrics[key] == pytest.approx(expected, abs=1e-9)
            expected = recall_score(y_test, predicted, **MACRO)
            assert metrics["recall"] == pytest.approx(expected, abs=1e-9)
            shown = printed_table(printed)[name]
            assert shown.pop("verdict") == run.data.tags["verdict"]
            assert set(shown) == set(table.columns) - {"verdict"}
            for key, text in shown.items():
                assert text == f"{metrics[key]:.{4 if metrics[key] < 1000 else 0}f}"
    # The folds can be had again from what is stored: a cheap model is enough to show it.
    run = children(sessions[0][0])["logistic_regression"]
    model = clone(mlflow.sklearn.load_model(f"runs:/{run.info.run_id}/model"))
    folds = RepeatedStratifiedKFold(n_splits=5, n_repeats=30, random_state=42)
    scoring = ["accuracy", "f1_macro", "precision_macro", "recall_macro"]
    table = cross_validate(model, X_train, y_train, cv=folds, scoring=scoring)
    for key in ("f1", "precision", "recall"):
        mean = table[f"test_{key}_macro"].mean()
        assert run.data.metrics[f"cv_{key}"] == pytest.approx(mean, abs=1e-9)
    assert 0.2 < table["fit_time"].mean() / run.data.metrics["fit_seconds"] < 5
    scores = table["test_accuracy"]
    assert np.allclose(scores, csv(sessions[0][0], "folds.csv")["logistic_regression"], atol=1e-9)
    assert run.data.metrics["cv_accuracy"] == pytest.approx(scores.mean(), abs=1e-9)
    assert run.data.metrics["cv_accuracy_std"] == pytest.approx(scores.std(), abs=1e-9)


def reference_p(a, b):
    """The corrected resampled t-test, written out for five folds."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n, mean = len(differences), sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return 2 * student_t.cdf(-abs(mean) / (variance * (1 / n + 0.2 / 0.8)) ** 0.5, n - 1)


def reference_holm(p):
    """Holm's step-down correction, written out."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, p[name] * (len(p) - rank)))
        corrected[name] = largest
    return corrected


def test_p_values_can_be_recomputed_from_the_stored_folds(sessions, parts):
    for parent, printed in sessions:
        folds, runs = csv(parent, "folds.csv"), children(parent)
        best = parent.data.params["best_model"]
        assert len(folds) == 150
        vs_best = {n: reference_p(folds[best], folds[n]) for n in NAMES - {best}}
        vs_baseline = {n: reference_p(folds["baseline"], folds[n]) for n in NAMES}
        for name, p in reference_holm(vs_best).items():
            assert runs[name].data.metrics["p_vs_best"] == pytest.approx(p, rel=1e-6)
        for name, p in reference_holm(vs_baseline).items():
            assert runs[name].data.metrics["p_vs_baseline"] == pytest.approx(p, rel=1e-6)
        assert parent.data.metrics["baseline_cv_accuracy"] == pytest.approx(
            folds["baseline"].mean()
        )
        shown = f"cv_accuracy {parent.data.metrics['baseline_cv_accuracy']:.4f}\n"
        assert f"always the most frequent class: {shown}" in printed
    splits = RepeatedStratifiedKFold(n_splits=5, n_repeats=30, random_state=42)
    expected = cross_val_score(DummyClassifier(), parts[0], parts[2], cv=splits)
    assert np.allclose(expected, csv(sessions[0][0], "folds.csv")["baseline"], atol=1e-9)


def test_the_printed_lines_load_the_winner_in_a_fresh_process(main_job, sessions):
    """Each session's lines find that session's winner, whatever else is in the store."""
    for parent, printed in sessions:
        lines = [line.strip() for line in printed.splitlines()]
        first = next(i for i, line in enumerate(lines) if line.startswith("best = "))
        code = "\n".join(["import mlflow", *lines[first : first + 2]])
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
    first, second = (parent.data for parent, _ in sessions)
    assert first.params["best_model"] == second.params["best_model"]
    assert first.metrics == second.metrics  # scores alone: nothing measured is on the parent


def test_costs_and_recommendation(sessions):
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
            if run.data.tags["verdict"] == "not told from the best":
                assert metrics["p_vs_best"] >= 0.05 > metrics["p_vs_baseline"]
                good[name] = metrics["latency_ms_p50"]
        fast = [name for name in good if good[name] <= 1.1 * min(good.values())]
        best = max(fast, key=lambda name: runs[name].data.metrics["cv_accuracy"])
        assert parent.data.params["recommended_model"] == best
        assert f"(within 10%) the fastest: {best}\n" in printed


def test_pictures_and_description(sessions):
    parent, printed = sessions[0]
    files = {file.path for file in mlflow.artifacts.list_artifacts(run_id=parent.info.run_id)}
    assert files == {"comparison.csv", "comparison.png", "folds.csv"}
    note = parent.data.tags["mlflow.note.content"].strip("`\n")
    assert note in printed


def test_shuffled_labels_beat_no_baseline(tmp_path):
    change = f"""{FEW}
load_data = script.load_data
def shuffled(*args):
    for X, y, dataset in load_data(*args):
        yield X, y.sample(frac=1, random_state=7).set_axis(y.index), dataset
script.load_data = shuffled"""
    code, out, err = drive(tmp_path, change)
    assert (code, err.count("\n")) == (1, 1) and "No candidate is shown to be better" in err
    assert "Next:" not in out
    store(tmp_path)
    (parent,) = parents("model-comparison")
    assert parent.info.status == "FINISHED"
    verdicts = {run.data.tags["verdict"] for run in children(parent).values()}
    assert verdicts == {"no better than the baseline"}
    assert parent.data.params["recommended_model"] == "none"


def test_a_candidate_that_raises_is_a_failed_child_and_a_row(tmp_path):
    change = (
        f"{FEW}\nscript.CANDIDATES['broken'] = SVC(C=-1)\ndel script.CANDIDATES['random_forest']"
    )
    code, out, err = drive(tmp_path, change, cores="2")
    assert (code, err) == (0, "")
    store(tmp_path)
    (parent,) = parents("model-comparison")
    states = {name: run.info.status for name, run in children(parent).items()}
    assert states.pop("broken") == "FAILED"
    assert set(states.values()) == {parent.info.status} == {"FINISHED"}
    assert printed_table(out)["broken"]["verdict"].startswith("FAILED: ")


def test_the_best_may_fail_at_the_end(tmp_path):
    change = f"""{FEW}
import mlflow
del script.CANDIDATES["random_forest"], script.CANDIDATES["gradient_boosting"]
score = script.score
def failing(model, X, y):
    if mlflow.active_run().info.run_name == "logistic_regression" and len(X) == 114:
        raise RuntimeError("late")  # at the hold-out: what decides has been logged
    return score(model, X, y)
script.score = failing"""
    code, out, err = drive(tmp_path, change)
    assert (code, err) == (0, "")
    store(tmp_path)
    (parent,) = parents("model-comparison")
    states = {name: run.info.status for name, run in children(parent).items()}
    assert states == {"logistic_regression": "FAILED", "svm": "FINISHED"}
    assert "late" in printed_table(out)["logistic_regression"]["verdict"]
    svm = children(parent)["svm"].data.metrics["cv_accuracy"]
    assert parent.data.params["best_model"] == "svm"
    assert parent.data.metrics["best_cv_accuracy"] == svm


def test_one_that_is_always_like_the_best_counts_as_a_test(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from model_comparison import p_values

    rng = np.random.default_rng(0)
    best = pd.Series(rng.normal(0.9, 0.01, 20))
    others = pd.DataFrame({"twin": best, "worse": best - rng.normal(0.01, 0.01, 20)})
    expected = min(1, 2 * reference_p(best, others["worse"]))
    p = p_values(others, best)
    assert p["twin"] == 1.0 and p["worse"] == pytest.approx(expected)


def test_all_candidates_failing_is_exit_code_1(tmp_path):
    code, _, err = drive(tmp_path, f"{FEW}\nscript.CANDIDATES = {{'broken': SVC(C=-1)}}")
    assert code == 1
    assert err.count("\n") == 1 and "Every candidate failed" in err
    store(tmp_path)
    (parent,) = parents("model-comparison")
    assert {parent.info.status, children(parent)["broken"].info.status} == {"FAILED"}


def test_ctrl_c_leaves_no_run_running(tmp_path):
    process = subprocess.Popen(
        [sys.executable, edited(tmp_path, "model_comparison.py", REPEATS=500)],
        cwd=tmp_path,
        env=user_env(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert "breast-cancer" in process.stdout.readline()
    assert "baseline" in process.stdout.readline()
    assert "random_forest" in process.stdout.readline()
    time.sleep(1)  # into the folds
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "Stopped: by Ctrl-C\n")
    store(tmp_path)
    (parent,) = parents("model-comparison")
    runs = [parent, *children(parent).values()]
    assert {run.info.status for run in runs} == {"FAILED"} and len(runs) == 2
