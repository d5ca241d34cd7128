"""Production deployment: gate, champion, rollback, history, races, kills, the guide, a load."""

import http.client
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import click
import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, assert_one_line, assert_success, parents, run, store, user_env
from mlflow.cli import cli
from scipy import stats
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

import production_deployment as script

SCRIPT = "production_deployment.py"
NAME = "breast-cancer-classifier"
# The metrics of a first version, and those of one that is compared with others as well.
FIRST = {"score", "above_baseline", "latency_ms", "answers_its_example", "refuses_a_missing_column"}
COMPARED = {"below_production", "p_below_production", "below_best_ever"}


def split():
    """Return the training and the hold-out rows, made without the script: X, X, y, y."""
    data = load_breast_cancer(as_frame=True)
    labels = data.target.map({0: "malignant", 1: "benign"})
    return train_test_split(data.data, labels, test_size=0.2, stratify=labels, random_state=42)


def hold_out():
    _, X, _, y = split()
    return X, y


def deploy(*argv):
    """Run the program in this process; return it as `run` does one of its own, but sooner."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before = signal.getsignal(signal.SIGINT)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = script.run_as_program(partial(script.main, argv))
    finally:
        signal.signal(signal.SIGINT, before)
        mlflow.end_run()  # after an unexpected error
    printed = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(argv, code, *printed)


def aliases(client):
    return {key: str(value) for key, value in client.get_registered_model(NAME).aliases.items()}


def stages(client):
    versions = client.search_model_versions(f"name = '{NAME}'")
    return {str(version.version): version.current_stage for version in versions}


def deployments():
    """Return the runs of the script, oldest first."""
    return parents(script.EXPERIMENT)


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """A deployed version 1: its folder and its guide, from the run's artifact."""
    folder = tmp_path_factory.mktemp("guide")
    process = run(SCRIPT, cwd=folder)
    assert_success(process)
    assert "Undo:" not in process.stdout  # there is nothing to go back to
    store(folder)
    (run_,) = deployments()
    text = mlflow.artifacts.load_text(f"{run_.info.artifact_uri}/deployment_guide.md")
    assert text in process.stdout
    return folder, text


@pytest.fixture
def deployed(guide, tmp_path, monkeypatch):
    """A folder whose store is a copy of that one."""
    shutil.copy(guide[0] / "mlflow.db", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path, store(tmp_path)


def log_for_deployment(model):
    """Log a model as another script would, with the rows that it was trained on; return its ID."""
    train, _ = script.load_data()
    with mlflow.start_run():
        script.log_rows(training=train)
        return script.log_model(model, train.X, script.TRUSTED)


def model_that_loses(rows):
    """Return the script's model with another intercept, so that it gets fewer rows right."""
    X, y = hold_out()
    model = mlflow.sklearn.load_model(f"models:/{NAME}/1")
    scores = model.decision_function(X)
    wanted = (model.predict(X) == y).sum() - rows
    between = np.sort(scores)[:-1] + np.diff(np.sort(scores)) / 2
    right = [(np.where(scores > cut, *model.classes_[::-1]) == y).sum() for cut in between]
    cut = min(between[np.equal(right, wanted)], key=abs)
    model[-1].intercept_ -= cut
    assert (model.predict(X) == y).sum() == wanted
    return model


def share_right(y, answers):
    """Return the accuracy, sooner than scikit-learn, which is asked a thousand times."""
    return (y == answers).mean()


# The gate.


def test_the_model_has_learned_from_the_training_rows_and_no_others(deployed):
    X_train, X_test, y_train, _ = split()
    refitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    refitted.fit(X_train, y_train)
    registered = mlflow.sklearn.load_model(f"models:/{NAME}/1")
    assert list(registered.predict(X_test)) == list(refitted.predict(X_test))
    # The answers alone could be the same by chance.
    for part in ("coef_", "intercept_"):
        learned, expected = getattr(registered[-1], part), getattr(refitted[-1], part)
        assert learned == pytest.approx(expected, abs=1e-6)
    assert registered.predict_proba(X_test) == pytest.approx(refitted.predict_proba(X_test))


def test_the_gate_figures_and_tags_are_true(deployed):
    _, client = deployed
    X, y = hold_out()
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    accuracy = (model.predict(X) == y).mean()
    (run_,) = deployments()
    figures = run_.data.metrics
    assert set(figures) == FIRST  # there was nothing to compare it with
    assert figures["score"] == pytest.approx(accuracy, abs=1e-9)
    assert figures["above_baseline"] == pytest.approx(accuracy - (y == "benign").mean(), abs=1e-9)
    assert figures["answers_its_example"] == figures["refuses_a_missing_column"] == 1
    version = client.get_model_version(NAME, "1")
    assert version.run_id == run_.info.run_id
    assert version.tags["validation_status"] == "passed"
    assert version.tags["compared_with"] == "none"
    digests = {d.dataset.name: d.dataset.digest for d in run_.inputs.dataset_inputs}
    assert set(digests) == {"breast-cancer-train", "breast-cancer-test"}
    tags = run_.data.tags
    assert tags["holdout_digest"] == digests["breast-cancer-test"]
    assert (tags["registered_model"], tags["version"]) == (NAME, "1")
    assert (tags["champion"], tags["outcome"]) == ("none", "promoted")
    assert run_.data.params == {"metric": "accuracy"}
    logged = mlflow.get_logged_model(run_.outputs.model_outputs[0].model_id)
    linked = {metric.key: metric.dataset_name for metric in logged.metrics}
    assert linked["score"] == linked["latency_ms"] == "breast-cancer-test"


def test_version_and_registered_model_describe_themselves(deployed):
    _, client = deployed
    X, _ = hold_out()
    (run_,) = deployments()
    description = client.get_model_version(NAME, "1").description
    assert "passed" in description and "compared with: none" in description
    assert run_.data.tags["holdout_digest"] in description
    assert run_.data.tags["mlflow.note.content"] == description
    lines = [line.strip("| ").split(" | ") for line in description.splitlines() if "|" in line]
    table = {line[0]: line for line in lines[2:]}
    assert set(table) == FIRST
    for name, (_, value, limit, margin) in table.items():
        figure, wanted = run_.data.metrics[name], script.GATE[name]
        assert value == f"{figure:.4f}"
        side = "at least" if wanted.greater_is_better else "at most"
        assert limit == f"{side} {wanted.threshold:g}"
        assert float(margin) == pytest.approx(abs(figure - wanted.threshold), abs=1e-4)

    description = client.get_registered_model(NAME).description
    assert "diagnosis" in description and "benign, malignant" in description
    assert all(column in description for column in X.columns)
    (line,) = re.findall("`(mlflow[.].*)`", description)
    model = eval(line, {"mlflow": mlflow})
    assert set(model.predict(X)) == {"benign", "malignant"}


def test_the_picture_shows_the_answers_of_both(deployed):
    train, test = script.load_data()
    candidate = mlflow.pyfunc.load_model(f"models:/{NAME}/1")
    champion = DummyClassifier().fit(train.X, train.y)
    figure = script.draw_confusions(candidate, champion, test)
    assert len(figure.axes) == 2
    for axes, model in zip(figure.axes, (candidate, champion), strict=True):
        counts = confusion_matrix(test.y, model.predict(test.X))
        shares = counts / counts.sum(axis=1, keepdims=True)
        shown = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
        for cell, count in np.ndenumerate(counts):
            text = f"{count}\n{shares[cell]:.0%}" if count else ""
            assert shown.get(cell, "") == text
        labels = [tick.get_text() for tick in axes.get_yticklabels()]
        assert labels == ["benign", "malignant"]
    assert len(script.draw_confusions(candidate, None, test).axes) == 1
    (run_,) = deployments()
    files = mlflow.artifacts.list_artifacts(run_id=run_.info.run_id)
    assert {file.path for file in files} == {"confusion.png", "deployment_guide.md"}


def test_a_refused_model_changes_nothing_in_production(deployed, monkeypatch):
    _, client = deployed
    limits = {"score": 0.999, "below_production": -0.5, "latency_ms": 0.0}
    for name, limit in limits.items():
        least = mlflow.models.MetricThreshold(threshold=limit, greater_is_better=name == "score")
        monkeypatch.setitem(script.GATE, name, least)
    process = deploy()
    assert_one_line(process, "version 2", code=1)
    run_ = deployments()[-1]
    assert run_.info.status == "FAILED"
    assert aliases(client) == {"production": "1", "staging": "2"}
    assert stages(client) == {"1": "Production", "2": "None"}
    version = client.get_model_version(NAME, "2")
    assert version.tags["validation_status"] == "failed" and "failed" in version.description
    assert version.tags["compared_with"] == "1"
    assert "compared with: 1" in version.description
    assert "was_in_production" not in version.tags
    assert run_.data.tags["outcome"] == "refused"
    rows = {line.split()[0]: line for line in process.stdout.splitlines() if " at " in line}
    assert set(rows) == set(run_.data.metrics) == FIRST | COMPARED
    for name, figure in run_.data.metrics.items():
        if name in limits:
            told = f"candidate model {name} = {figure}, {name} threshold = {limits[name]}."
            assert told in process.stderr
        else:
            assert f" {name} = " not in process.stderr
        assert f" {figure:.4f} " in rows[name]
        assert ("-" in rows[name].split()[-1]) == (name in limits)  # the margin


def test_a_bad_example_and_a_constant_answer_are_refused(deployed):
    X_train, _, y_train, _ = split()
    train, _ = script.load_data()
    model = DummyClassifier().fit(X_train, y_train)
    with mlflow.start_run():
        script.log_rows(training=train)
        info = mlflow.sklearn.log_model(
            model,
            name="model",
            serialization_format="skops",
            signature=mlflow.models.infer_signature(X_train, y_train.to_numpy()),
            pip_requirements=[f"mlflow=={mlflow.__version__}"],
        )
    process = deploy("--model-uri", info.model_uri, "--min-score", "0.5")
    assert_one_line(process, "answers_its_example = 0.0", "above_baseline = 0.0", code=1)
    assert deployments()[-1].data.metrics["refuses_a_missing_column"] == 1


# Champion and challenger.


def test_what_is_lost_is_against_the_model_in_production(deployed):
    X, y = hold_out()
    _, test = script.load_data()
    candidate = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    current = DummyClassifier().fit(X, y)
    lost = (current.predict(X) == y).mean() - (candidate.predict(X) == y).mean()
    figures = script.compare(candidate, current, test, share_right, 0.02, 42)
    assert lost < -0.1
    assert figures == {"below_production": pytest.approx(lost, abs=1e-9), "p_below_production": 0}
    figures = script.compare(current, candidate, test, share_right, 0.02, 42)
    assert figures == {"below_production": pytest.approx(-lost), "p_below_production": 1}
    assert script.compare(candidate, None, test, share_right, 0.02, 42) == {}


def answers_of_two(n, both, only_champion, only_candidate, classes=("no", "yes")):
    """Return true classes, and the answers of a candidate and of a champion, for n rows."""
    truth = np.array(classes * n)[:n]
    wrong = np.where(truth == "no", "yes", "no")
    order = np.random.default_rng(0).permutation(n)
    champion_right = order < both + only_champion
    candidate_right = (order < both) | (order >= n - only_candidate)
    candidate, champion = np.where([candidate_right, champion_right], truth, wrong)
    return pd.Series(truth), candidate, champion


@pytest.mark.parametrize("counts", [(2, 0), (3, 1), (6, 3), (1, 4), (10, 2), (0, 0)])
def test_the_probability_of_a_loss_is_that_of_two_other_ways(counts):
    """By counting exactly what the bootstrap draws at random, and by a Bayesian sign test."""
    n, tolerance, (only_champion, only_candidate) = 114, 0.02, counts
    # Of one class: each class keeps its number of rows, so that two are less simple to count.
    truth, candidate, champion = answers_of_two(
        n, 100, only_champion, only_candidate, classes=("no",)
    )
    arguments = (truth, candidate, champion, share_right, tolerance)
    p = script.probability_of_loss(*arguments, seed=42, draws=4000)
    assert p == script.probability_of_loss(*arguments, seed=42, draws=4000)

    # Rows that only one gets right: so many of them are drawn, of both kinds.
    kinds = [only_champion / n, only_candidate / n]
    exact = 0
    for a in range(40):
        for b in range(a):
            if a - b > tolerance * n:
                exact += stats.multinomial.pmf([a, b, n - a - b], n, [*kinds, 1 - sum(kinds)])
    assert p == pytest.approx(exact, abs=4 * (0.25 / 4000) ** 0.5)

    shares = [only_champion, only_candidate, n - only_champion - only_candidate]
    prior = [0.1, 0.1, 1]
    drawn = stats.dirichlet.rvs(np.add(shares, prior), 4000, random_state=0)
    assert p == pytest.approx((drawn[:, 0] - drawn[:, 1] > tolerance).mean(), abs=0.12)


def test_the_probability_of_a_loss_goes_by_the_metric():
    """A bootstrap over again, by counting, of the mean share of each class that is found."""
    truth, candidate, champion = answers_of_two(60, 40, 8, 2)
    truth[:30] = candidate[:30] = champion[:30] = "no"
    score = script.METRICS["balanced_accuracy"]
    p = script.probability_of_loss(truth, candidate, champion, score, 0.05, seed=1, draws=500)
    rng = np.random.default_rng(7)
    of_each = [np.flatnonzero(truth == name) for name in ("no", "yes")]
    rows = np.hstack([rng.choice(own, size=(4000, len(own))) for own in of_each])
    yes = truth.to_numpy()[rows] == "yes"

    def mean_share(answers):
        right = (answers == truth.to_numpy())[rows]
        return ((right & yes).sum(1) / yes.sum(1) + (right & ~yes).sum(1) / (~yes).sum(1)) / 2

    again = (mean_share(champion) - mean_share(candidate) > 0.05).mean()
    assert 0.2 < again < 0.95 and p == pytest.approx(again, abs=0.1)


def test_a_rare_class_is_in_every_draw():
    """Without it, macro averages would be over fewer classes: here, two wrong rows cost a third."""
    truth = pd.Series(["a"] * 80 + ["b"] * 33 + ["c"])
    champion = truth.to_numpy()
    candidate = np.where(truth.index.isin([0, 1]), "c", truth)
    p = [
        script.probability_of_loss(truth, candidate, champion, score, 0.02, seed=1)
        for score in (script.METRICS["recall"], script.METRICS["balanced_accuracy"])
    ]
    # Two of the 80 are 0.0083: more than 0.02 are lost if one draws five of them or more.
    assert p[0] == p[1] == pytest.approx(stats.binom.sf(4, 80, 2 / 80), abs=0.03)


def test_a_loss_of_exactly_the_tolerance_is_no_loss_of_more():
    """One row of 50 is 0.02, not a rounding error more."""
    truth, candidate, champion = answers_of_two(50, 48, 1, 0)
    X = pd.DataFrame({"row": range(50)})
    rows = script.make_rows(X, truth.rename("y"), "fifty")

    class Answers:
        def __init__(self, answers):
            self.answers = answers

        def predict(self, X):
            return self.answers[X["row"]]

    figures = script.compare(Answers(candidate), Answers(champion), rows, share_right, 0.02, 42)
    assert figures["below_production"] == 0.02
    gate = {"below_production": script.GATE["below_production"]}
    assert script.missed_limits({"below_production": 0.02}, gate) == []
    assert script.missed_limits({"below_production": 0.0201}, gate) != []


def test_a_loss_within_the_tolerance_by_luck_is_refused(deployed):
    """Two rows of 114 are less than 0.02. On other rows it would often be more."""
    _, client = deployed
    model_id = log_for_deployment(model_that_loses(2))
    process = deploy("--model-uri", f"models:/{model_id}")
    figures = deployments()[-1].data.metrics
    assert figures["below_production"] == figures["below_best_ever"] == pytest.approx(2 / 114)
    assert_one_line(process, " p_below_production = 0.", code=1)
    assert not re.search(r" (score|below_production|below_best_ever) = ", process.stderr)
    assert aliases(client)["production"] == "1"


@pytest.fixture(scope="module")
def small_losses(guide, tmp_path_factory):
    """A store where version 2 loses a row to 1, version 3 a row to 2, and 4 a row to 3.

    Returns the folder, and what the three deployments printed.
    """
    folder = tmp_path_factory.mktemp("losses")
    shutil.copy(guide[0] / "mlflow.db", folder)
    store(folder)
    processes = []
    for rows in (1, 2, 3):
        model_id = log_for_deployment(model_that_loses(rows))
        processes.append(deploy("--model-uri", f"models:/{model_id}"))
    return folder, processes


@pytest.fixture
def history(small_losses, tmp_path, monkeypatch):
    """A client of a copy of that store."""
    shutil.copy(small_losses[0] / "mlflow.db", tmp_path)
    monkeypatch.chdir(tmp_path)
    return store(tmp_path)


def test_small_losses_do_not_add_up(small_losses, history):
    second, third, fourth = small_losses[1]
    assert_success(second)
    assert_success(third)
    assert_one_line(fourth, " below_best_ever = ", code=1)
    assert not re.search(r" (score|below_production|p_below_production) = ", fourth.stderr)
    judged = [run_ for run_ in deployments() if "outcome" in run_.data.tags]
    for number, run_ in enumerate(judged):
        champion = str(number) if number else "none"
        compared_with = history.get_model_version(NAME, str(number + 1)).tags["compared_with"]
        assert compared_with == run_.data.tags["champion"] == champion
        if number:
            assert run_.data.metrics["below_best_ever"] == pytest.approx(number / 114)
            assert run_.data.metrics["below_production"] == pytest.approx(1 / 114)
    assert aliases(history) == {"production": "3", "previous": "2", "staging": "4"}


def test_the_best_is_that_of_the_same_metric_rows_and_model(history):
    """Other deployments say nothing about this one."""
    _, test = script.load_data()
    experiment_id = script.open_store(script.EXPERIMENT)
    ask = partial(script.compare_with_history, experiment_id)
    best = deployments()[0].data.metrics["score"]
    expected = {"below_best_ever": pytest.approx(best - 0.9)}
    assert ask(NAME, "accuracy", test, 0.9) == expected
    other_rows = script.make_rows(test.X.head(50), test.y.head(50), "other")
    for others in (("other", "accuracy", test), (NAME, "f1", test), (NAME, "accuracy", other_rows)):
        assert ask(*others, 0.9) == {}


def test_a_score_on_rows_that_the_model_may_have_seen_is_not_the_best_ever(deployed):
    """A tree that was trained on the hold-out as well, and does not say so, is right everywhere."""
    X_train, X_test, y_train, y_test = split()
    X, y = pd.concat([X_train, X_test]), pd.concat([y_train, y_test])
    with mlflow.start_run():
        model_id = script.log_model(DecisionTreeClassifier().fit(X, y), X, script.TRUSTED)
    process = deploy("--model-uri", f"models:/{model_id}")
    assert_success(process)
    assert "training rows are unknown" in process.stdout
    assert deployments()[-1].data.metrics["score"] == 1
    assert_success(deploy("--rollback"))
    assert_success(deploy())
    assert deployments()[-1].data.metrics["below_best_ever"] == 0


def test_a_version_in_production_whose_files_are_gone_ends_in_one_line(deployed):
    """Nothing is promoted without the comparison; a rollback leads out of it."""
    _, client = deployed
    assert_success(deploy())
    shutil.rmtree(mlflow.artifacts.download_artifacts(f"models:/{NAME}/2"))
    assert_one_line(deploy(), f"cannot fetch models:/{NAME}/2")
    assert aliases(client) == {"production": "2", "previous": "1", "staging": "2"}
    assert_success(deploy("--rollback"))
    assert_success(deploy())
    assert client.get_model_version(NAME, "3").tags["compared_with"] == "1"


def test_an_old_skops_ends_in_one_line_before_anything_is_made(tmp_path):
    """Python finds this version first, as it would if another package had asked for it."""
    metadata = tmp_path / "packages" / "skops-0.13.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: skops\nVersion: 0.13.0\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    process = run(SCRIPT, cwd=folder, PYTHONPATH=str(tmp_path / "packages"))
    assert_one_line(process, "skops", "pip install --upgrade skops")
    assert not [*folder.iterdir()]


# Rollback and history.


def test_roll_back_and_back_again(deployed, monkeypatch):
    """The printed command undoes a deployment, and another time it undoes itself.

    It runs on a machine without git, of which MLflow would complain.
    """
    folder, client = deployed
    bare = f"PATH={shlex.quote(str(Path(sys.executable).parent))}"
    monkeypatch.setattr(sys, "argv", [str(ROOT / SCRIPT)])
    assert_one_line(deploy("--rollback"), NAME, "no previous version")
    process = deploy()
    assert_success(process)
    (undo,) = re.findall("^Undo: +(python .*)$", process.stdout, re.M)
    assert aliases(client) == {"production": "2", "previous": "1", "staging": "2"}
    assert client.get_model_version(NAME, "2").tags["compared_with"] == "1"
    for old, new, roll_back in (("2", "1", shell), ("1", "2", deploy)):
        process = deploy("--rollback") if roll_back is deploy else shell(folder, bare, undo)
        assert_success(process)
        assert f"from version {old} to version {new}" in process.stdout
        assert aliases(client) == {"production": new, "previous": old, "staging": "2"}
        assert stages(client) == {new: "Production", old: "Archived"}
        run_ = deployments()[-1]
        assert (run_.info.run_name, run_.info.status) == ("rollback", "FINISHED")
        assert (run_.data.tags["version"], run_.data.tags["champion"]) == (new, old)
    client.delete_registered_model_alias(NAME, "production")
    before = aliases(client)
    assert_one_line(deploy("--rollback"), NAME, "no version in production")
    assert aliases(client) == before


def test_roll_back_to_any_version_that_was_in_production(history):
    """And to no other: version 4 was refused, version 5 is not there."""
    for wrong, words in (("4", "never in production"), ("5", ""), ("03", "already"), ("x", "")):
        assert_one_line(deploy("--rollback", wrong), words)
        assert aliases(history)["production"] == "3"
    assert_success(deploy("--rollback", "1"))
    assert aliases(history) == {"production": "1", "previous": "3", "staging": "4"}
    assert stages(history) == {"1": "Production", "2": "Archived", "3": "Archived", "4": "None"}
    assert_success(deploy("--rollback"))
    assert aliases(history) == {"production": "3", "previous": "1", "staging": "4"}


def test_nothing_ends_in_one_line(tmp_path, monkeypatch):
    """Neither a rollback nor a history is there before the first deployment."""
    monkeypatch.chdir(tmp_path)  # the store remembers where it was made
    client = store(tmp_path)
    assert_one_line(deploy("--rollback"), NAME, "no version in production")
    assert_one_line(deploy("--rollback", "1"), NAME)
    assert_one_line(deploy("--history"), NAME)
    assert client.search_registered_models() == [] and deployments() == []


def printed_history(process):
    """Return the rows of the printed table as dicts."""
    lines = process.stdout.replace("rolled back", "rolled-back").splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["when", "who"])
    names, rows = lines[start].split(), []
    for line in lines[start + 1 :]:
        *when, who, what, version, champion, run_id = line.split()
        cells = (" ".join(when), who, what, version, champion, run_id)
        rows.append(dict(zip(names, cells, strict=True)))
    return rows


def test_the_history_lists_promotions_refusals_and_rollbacks(history, monkeypatch):
    assert_success(deploy("--rollback", "1"))
    user = deployments()[0].data.tags["mlflow.user"]
    process = deploy("--history")
    assert_success(process)
    rows = printed_history(process)
    expected = [
        ("promoted", "1", "none"),
        ("promoted", "2", "1"),
        ("promoted", "3", "2"),
        ("refused", "4", "3"),
        ("rolled-back", "1", "3"),
    ]
    assert [(row["what"], row["version"], row["champion"]) for row in rows] == expected
    runs = [run_ for run_ in deployments() if "registered_model" in run_.data.tags]
    for row, run_ in zip(rows, runs, strict=True):
        assert row["run"] == run_.info.run_id and row["who"] == user
        started = pd.Timestamp(run_.info.start_time, unit="ms", tz="UTC")
        assert row["when"] == f"{started:%Y-%m-%d %H:%M:%S} UTC"


def test_the_history_says_when_a_rollback_failed_and_a_promotion_came_too_late(history):
    """Production moves after the comparison, and before the aliases are moved."""
    experiment_id = script.open_store(script.EXPERIMENT)
    for run_name, version in (("deployment", "2"), ("rollback", "1")):
        with pytest.raises(script.Refused), mlflow.start_run(run_name=run_name):
            tags = {"registered_model": NAME, "version": version, "champion": "2"}
            mlflow.set_tags(tags)
            with script.one_promotion_at_a_time(experiment_id, NAME):
                script.promote(NAME, version, replaces="2")
    assert aliases(history) == {"production": "3", "previous": "2", "staging": "4"}
    assert [row["what"] for row in printed_history(deploy("--history"))[4:]] == ["refused"] * 2


def test_a_client_without_stages_promotes_all_the_same(history, monkeypatch):
    """MLflow has announced that the call will go. The alias is what counts."""
    monkeypatch.delattr(mlflow.MlflowClient, "transition_model_version_stage")
    process = deploy("--rollback")
    assert_success(process)
    assert "legacy stage could not be set" in process.stdout
    assert aliases(history)["production"] == "2"
    assert deployments()[-1].data.tags["outcome"] == "rolled back"


# Own data.


def test_own_data_has_no_minimum_score_but_that_of_min_score(tmp_path, monkeypatch, capsys):
    """The limit of 0.93 is for the breast cancer data. The table then grows, and is split anew."""
    monkeypatch.chdir(tmp_path)
    client = store(tmp_path)
    random = np.random.default_rng(0)
    table = pd.DataFrame({"a": random.normal(size=400), "b": random.normal(size=400)})
    noisy = table["a"] + random.normal(size=400) > 0
    table["y"] = np.where(noisy, "yes", "no")
    table[:300].to_csv("own.csv", index=False)
    own = ("--csv", "own.csv", "--target", "y")
    process = deploy(*own)
    assert_success(process)
    assert "no minimum score" in process.stdout and "--min-score" in process.stdout
    limits = [line.split()[0] for line in process.stdout.splitlines() if " at " in line]
    assert set(limits) == FIRST - {"score"}
    score = deployments()[0].data.metrics["score"]
    assert re.search(rf"^ *score +{score:.4f} +none *$", process.stdout, re.M)
    assert 0.6 < deployments()[0].data.metrics["score"] < 0.93
    process = deploy(*own, "--min-score", "0.93")
    assert_one_line(process, "score = 0.", "score threshold = 0.93", code=1)
    assert "no minimum score" not in process.stdout

    table.to_csv("own.csv", index=False)
    process = deploy(*own)
    assert "version 1 in production may have been trained on rows of the hold-out" in process.stdout
    assert process.returncode in (0, 1)
    name = "own-y-classifier"
    assert client.get_model_version(name, "3").tags["compared_with"] == "1"
    assert "below_best_ever" not in deployments()[-1].data.metrics  # that was on other rows

    current = client.get_model_version_by_alias(name, "production").version
    table.drop(columns="b").to_csv("own.csv", index=False)
    process = deploy(*own)
    assert f"not compared with version {current} in production" in process.stdout
    assert "other columns" in process.stdout
    assert client.get_model_version(name, "4").tags["compared_with"] == "none"
    assert "below_production" not in deployments()[-1].data.metrics


# Races and kills.


FORKS = """
import json, os, sys
sys.path.insert(0, {root!r})
from functools import partial
import mlflow
import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store
import production_deployment as script
from mlflow.models import MetricThreshold

# What is imported or looked up once is so for all the processes below: it halves their time.
train, test = script.load_data()
model = script.add_preprocessing(script.LogisticRegression(), train.X).fit(train.X, train.y)
options = {{"serialization_format": "skops", "skops_trusted_types": script.TRUSTED}}
mlflow.sklearn.save_model(model, "any", pip_requirements=["numpy"], **options)
mlflow.pyfunc.load_model("any").predict(test.X)
script.draw_confusions(model, model, test).savefig("any.png")
# Six at once are slow, and none of what is tested here goes by chance.
script.GATE["latency_ms"] = MetricThreshold(threshold=10_000, greater_is_better=False)
script.probability_of_loss = partial(script.probability_of_loss, draws=20)

def counted(method):
    def call(*args, **kwargs):
        global left
        result = method(*args, **kwargs)
        left -= 1
        if left == 0:
            os._exit(9)  # as with kill -9: nothing is tidied up
        return result
    return call

for name in ("create_registered_model", "_create_model_version", "update_registered_model",
             "update_model_version", "set_registered_model_alias", "set_model_version_tag",
             "transition_model_version_stage", "log_batch", "set_tag", "delete_tag"):
    setattr(mlflow.MlflowClient, name, counted(getattr(mlflow.MlflowClient, name)))

def run(argv, folder, out, die_after, patience):
    global left
    left = die_after
    os.chdir(folder)
    sys.argv[1:] = argv
    sys.stdout = open(out, "w")
    sys.stderr = sys.stdout
    wait = script.one_promotion_at_a_time
    script.one_promotion_at_a_time = partial(wait, patience=patience)
    code = script.run_as_program(script.main)
    sys.stdout.flush()
    os._exit(code)

for line in sys.stdin:  # programs to be run at once, each in a process that need not import anew
    children = []
    for program in json.loads(line):
        pid = os.fork()
        if pid == 0:
            try:
                run(**program)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(99)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print(json.dumps(codes), flush=True)
"""


class Forks:
    """Runs the program in forks of one process, which has imported all that it needs."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKS.format(root=str(ROOT))],
            cwd=folder,
            env=user_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline()  # what load_data prints: it is ready soon
        self.folder = folder

    def run(self, *commands, folder, die_after=0, patience=60):
        """Run commands, each a list of arguments, at once; return [(exit code, printed)].

        With die_after = n, the process is killed after so many of its writes to the store.
        """
        outs = [self.folder / f"out-{number}" for number in range(len(commands))]
        programs = [
            {
                "argv": argv,
                "folder": str(folder),
                "out": str(out),
                "die_after": die_after,
                "patience": patience,
            }
            for argv, out in zip(commands, outs, strict=True)
        ]
        print(json.dumps(programs), file=self.process.stdin, flush=True)
        codes = json.loads(self.process.stdout.readline())
        return [(code, out.read_text()) for code, out in zip(codes, outs, strict=True)]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    driver = Forks(tmp_path_factory.mktemp("forks"))
    with driver.process:
        yield driver
        driver.process.stdin.close()


def assert_production_passed(client):
    """Production is a version that has passed the gate, can be loaded, and answers."""
    version = client.get_model_version(NAME, aliases(client)["production"])
    assert version.status == "READY" and version.tags["validation_status"] == "passed"
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    assert set(model.predict(hold_out()[0])) == {"benign", "malignant"}


def assert_rolls_back_to(expected, folder, forks, copy):
    """A rollback in a copy of the store leads to this version; None: there is none before."""
    copy.mkdir()
    shutil.copy(folder / "mlflow.db", copy)
    (outcome,) = forks.run(["--rollback"], folder=copy, patience=0.2)
    client = store(copy)
    if expected is None:
        assert outcome[0] == 2 and re.search("no (previous )?version", outcome[1])
    else:
        assert outcome[0] == 0, outcome[1]
        assert aliases(client)["production"] == expected
        assert_production_passed(client)
    store(folder)


@pytest.mark.parametrize("start", ["from nothing", "from version 3"])
def test_killed_after_any_write_production_stays_whole(start, forks, history, tmp_path):
    """Each deployment goes on from what a killed one has left, and lives one write longer.

    Production is always a version that has passed, and the next rollback goes to the version
    that was in production before.
    """
    # From version 3, the writes before the promotion change nothing that was not tried before.
    moves, step = ([None], 0) if start == "from nothing" else (["2", "3"], 7)
    earlier = set() if start == "from nothing" else {"1", "2", "3"}
    folder = tmp_path / "store"
    folder.mkdir()
    if start == "from version 3":
        shutil.copy(tmp_path / "mlflow.db", folder)
    client, code, killed_at = store(folder), None, []
    while code != 0 and not (start == "from nothing" and len(moves) == 3):
        step += 1
        ((code, printed),) = forks.run([], folder=folder, die_after=step, patience=0.2)
        assert code in (0, 9), printed
        registered = client.search_registered_models()
        names = aliases(client) if registered else {}
        if names.get("production") != moves[-1]:
            moves.append(names["production"])
            assert_production_passed(client)
        if names.get("production") == names.get("previous"):
            killed_at.append("between the aliases")
        if moves[-1] is not None:
            assert_rolls_back_to(moves[-2], folder, forks, tmp_path / f"copy-{step}")
            last = deployments()[-1].data.tags
            if last.get("version") == moves[-1]:
                assert last["outcome"] in ("unfinished", "promoted")
        if registered:
            versions = client.search_model_versions(f"name = '{NAME}'")
            been = {str(one.version) for one in versions if "was_in_production" in one.tags}
            assert been <= earlier | set(moves)
    assert "between the aliases" in killed_at and aliases(client)["production"] == moves[-1]
    if start == "from version 3":
        assert len(moves) >= 5 and moves[-1] == max(stages(client), key=int)
        assert stages(client)[moves[-1]] == "Production"
        assert list(stages(client).values()).count("Production") == 1


def test_a_rollback_killed_after_any_write_can_be_done_again(forks, history, tmp_path):
    """From version 3 to 2: afterwards one of them is in production, and the other comes next."""
    step, code, outcomes = 0, None, Counter()
    while code != 0:
        step += 1
        folder = tmp_path / f"store-{step}"
        folder.mkdir()
        shutil.copy(tmp_path / "mlflow.db", folder)
        ((code, printed),) = forks.run(["--rollback"], folder=folder, die_after=step)
        assert code in (0, 9), printed
        client = store(folder)
        production = aliases(client)["production"]
        outcomes[production] += 1
        assert_production_passed(client)
        assert_rolls_back_to({"3": "2", "2": "3"}[production], folder, forks, folder / "copy")
        last = deployments()[-1].data.tags
        if "outcome" in last and last["version"] == "2" and production == "2":
            assert last["outcome"] in ("unfinished", "rolled back")
    assert set(outcomes) == {"2", "3"} and step >= 7


def assert_no_promotion_is_lost(client):
    """Follow the history from the first promotion to the version that is in production now."""
    judged = [run_.data.tags for run_ in deployments() if "promoting_since" in run_.data.tags]
    moved = [tags for tags in judged if tags["outcome"] in ("promoted", "rolled back")]
    moved.sort(key=lambda tags: float(tags["promoting_since"]))
    before = "none"
    for tags in moved:
        assert tags["champion"] == before
        if tags["outcome"] == "promoted":
            version = client.get_model_version(NAME, tags["version"])
            assert version.tags["compared_with"] == before
            assert version.tags["validation_status"] == "passed"
        before = tags["version"]
    assert aliases(client)["production"] == before
    assert aliases(client)["previous"] == moved[-1]["champion"]
    return moved


AT_ONCE = [[]] * 6 + [["--rollback"]] * 2


def deploy_at_once(forks, folder, times):
    """Run six deployments and two rollbacks at once, `times` times; count how they ended."""
    endings = Counter()
    for _ in range(times):
        for argv, (code, printed) in zip(AT_ONCE, forks.run(*AT_ONCE, folder=folder), strict=True):
            assert code in (0, 1), printed
            assert code == 0 or "meantime" in printed, printed
            endings["rollback" if argv else "deployment", code] += 1
        assert_no_promotion_is_lost(mlflow.MlflowClient())
    return endings


def test_of_six_deployments_at_once_no_promotion_is_lost(forks, history, tmp_path):
    """Each that was promoted was judged against the version that it replaced.

    The others are refused. Rollbacks go on between them. Every version that was in production
    can be put back there. Run this by hand with TIMES=20.
    """
    times = int(os.environ.get("TIMES", "1"))
    endings = deploy_at_once(forks, tmp_path, times)
    print(endings)
    assert sum(endings.values()) == 8 * times
    # Of several at once, at least the first comes through.
    assert endings["deployment", 0] + endings["rollback", 0] >= times
    moved = assert_no_promotion_is_lost(history)
    production = aliases(history)["production"]
    for number in {tags["version"] for tags in moved[-5:]} - {production}:
        assert_success(deploy("--rollback", number))
        assert_production_passed(history)
    assert_no_promotion_is_lost(history)


def test_a_promotion_waits_for_another_but_not_for_a_dead_one(deployed):
    """A run that is killed while it promotes stays RUNNING for ever."""
    experiment_id = script.open_store(script.EXPERIMENT)
    client = mlflow.MlflowClient()
    other = client.create_run(experiment_id, run_name="other").info.run_id
    client.set_tag(other, "promoting", NAME)

    def promoting_since(seconds):
        client.set_tag(other, "promoting_since", time.time() - seconds)
        with mlflow.start_run(), script.one_promotion_at_a_time(experiment_id, NAME, patience=1):
            assert client.get_run(mlflow.active_run().info.run_id).data.tags["promoting"] == NAME

    with pytest.raises(script.UserError, match=other):
        promoting_since(-60)  # its next sign of life
    promoting_since(2)  # none any more
    with mlflow.start_run(), script.one_promotion_at_a_time(experiment_id, "another", patience=1):
        pass
    client.set_tag(other, "promoting_since", time.time() + 60)
    threading.Timer(0.5, client.delete_tag, [other, "promoting"]).start()
    with mlflow.start_run(), script.one_promotion_at_a_time(experiment_id, NAME, patience=30):
        assert "promoting" not in client.get_run(other).data.tags
    promoting = mlflow.search_runs([experiment_id], f"tags.promoting = '{NAME}'")
    assert promoting.empty  # nothing is left behind


def test_a_promotion_refuses_if_production_has_moved(history):
    before = aliases(history)
    for replaces in ("2", None):
        with pytest.raises(script.Refused, match="version 3"), mlflow.start_run():
            script.promote(NAME, "1", replaces=replaces)
        assert aliases(history) == before
    assert stages(history)["3"] == "Production"


# The guide: its commands are run as they are printed.


def section(guide, title):
    """Return the commands of a section of the guide: its indented lines."""
    text = guide.split(f"\n## {title}")[1].split("\n## ")[0]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def shell(folder, *commands, timeout=120):
    return subprocess.run(
        ["bash", "-ec", "\n".join(commands)],
        cwd=folder,
        env=user_env(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def served(guide):
    """The REST commands of the guide, run as printed: (port, the answer to the curl command)."""
    folder, text = guide
    export = re.search(r"^    (export .*)$", text, re.M).group(1)
    serve, download, curl = section(text, "REST API")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve, curl = serve.replace("5001", str(port)), curl.replace("5001", str(port))
    server = subprocess.Popen(
        ["bash", "-ec", f"{export}\nexec {serve}"],
        cwd=folder,
        env=user_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not answers(f"http://127.0.0.1:{port}/ping"):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        assert shell(folder, export, download).returncode == 0
        yield port, shell(folder, curl)
    finally:
        os.killpg(server.pid, signal.SIGINT)  # the guide's Ctrl-C
        server.wait(timeout=20)


def expected_answers(folder):
    store(folder)
    body = json.loads((folder / "request" / "serving_input_example.json").read_text())
    rows = pd.DataFrame(**body["dataframe_split"])
    return list(mlflow.pyfunc.load_model(f"models:/{NAME}@production").predict(rows))


def test_rest_answers_like_the_model(guide, served):
    _, answer = served
    if shutil.which("curl") is None:
        pytest.skip("no curl here, so the printed command cannot be run")
    assert answer.returncode == 0, answer.stderr
    line = answer.stdout.strip().splitlines()[-1]
    assert json.loads(line[line.index("{") :])["predictions"] == expected_answers(guide[0])


def test_the_readme_serves_by_the_same_commands(guide):
    """Those that `served` runs. The address of the store is that of the folder there."""
    text = (ROOT / "README.md").read_text()
    shown = text[text.index("**Serve it.**") : text.index("**The guide.**")]
    commands = re.findall(r"^((?:mlflow|curl) .*)$", shown, re.M)
    assert commands == section(guide[1], "REST API")
    assert "export MLFLOW_TRACKING_URI=sqlite:///mlflow.db" in shown


def test_batch_answers_like_the_model(guide, served):
    folder, text = guide
    export = re.search(r"^    (export .*)$", text, re.M).group(1)
    batch = shell(folder, export, *section(text, "Batch"))
    assert batch.returncode == 0, batch.stderr
    predictions = json.loads((folder / "predictions.json").read_text())["predictions"]
    assert predictions == expected_answers(folder)


def test_the_server_listens_on_loopback_only(served):
    port, _ = served
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port)}
    for address in addresses - {"127.0.0.1", "127.0.1.1", "::1"}:
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2).close()


def test_bad_requests_are_refused_and_the_server_goes_on(guide, served):
    port, _ = served
    good = json.loads((guide[0] / "request" / "serving_input_example.json").read_text())
    split = good["dataframe_split"]
    missing = {"columns": split["columns"][1:], "data": [row[1:] for row in split["data"]]}
    wrong = {"columns": split["columns"], "data": [["x", *row[1:]] for row in split["data"]]}
    bodies = {
        "malformed": '{"dataframe_split": ',
        "missing": json.dumps({"dataframe_split": missing}),
        "wrong type": json.dumps({"dataframe_split": wrong}),
        "empty": "",
    }

    def status(body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            data=body.encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            return urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code

    for name, body in bodies.items():
        assert 400 <= status(body) < 500, name
        assert status(json.dumps(good)) == 200


def test_eight_clients_lose_nothing(served):
    """8 × 250 requests of one row each, every answer compared; bounded in number and in time."""
    port, _ = served
    X, _ = hold_out()
    expected = mlflow.pyfunc.load_model(f"models:/{NAME}@production").predict(X)
    bodies = [
        json.dumps({"dataframe_split": X.iloc[[i]].to_dict(orient="split", index=False)})
        for i in range(len(X))
    ]
    deadline = time.monotonic() + 180

    def client(number):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        right = 0
        for request in range(250):
            assert time.monotonic() < deadline
            i = (number * 250 + request) % len(X)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/invocations", bodies[i], headers)
            answer = json.loads(connection.getresponse().read())
            right += answer == {"predictions": [expected[i]]}
        connection.close()
        return right

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(client, range(8))) == [250] * 8


def test_the_docker_context_serves_this_model(guide):
    folder, text = guide
    export = re.search(r"^    (export .*)$", text, re.M).group(1)
    generate, build, run_ = section(text, "Docker")
    process = shell(folder, export, generate)
    assert process.returncode == 0, process.stderr
    dockerfile = (folder / "image" / "Dockerfile").read_text()
    models = list((folder / "image").rglob("MLmodel"))
    assert len(models) == 1 and models[0].parent.name in dockerfile
    X, _ = hold_out()
    store(folder)
    production = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    packed = mlflow.pyfunc.load_model(str(models[0].parent))
    assert packed.metadata.model_id == production.metadata.model_id
    assert list(packed.predict(X)) == list(production.predict(X))
    requirements = (models[0].parent / "requirements.txt").read_text().split()
    assert all("==" in line for line in requirements)
    assert build.startswith(f"docker build --tag {NAME}:1 ") and f"{NAME}:1" in run_
    assert "--publish 127.0.0.1:" in run_


def test_every_mlflow_command_of_the_guide_exists(guide):
    _, text = guide
    commands = {line.strip() for line in re.findall(r"^    (mlflow .*)$", text, re.M)}
    assert len(commands) >= 6
    for command in commands:
        _, *words = shlex.split(command)
        known = cli
        while isinstance(known, click.Group):
            known = known.commands[words.pop(0)]
        options = {name for option in known.params for name in option.opts}
        assert {word for word in words if word.startswith("--")} <= options, command


def test_the_guide_names_this_version_and_every_platform(guide):
    _, text = guide
    assert text.startswith(f"# Deploy {NAME} version 1 from this store\n")
    for platform in ("SageMaker", "Azure ML", "Vertex AI", "Databricks", "KServe"):
        title = next(line for line in text.splitlines() if platform in line)
        assert title.startswith("## ") and "needs" in title and section(text, title[3:])
    (manifest,) = re.findall(r"echo '(.*)' \| kubectl", text)
    assert json.loads(manifest)["kind"] == "InferenceService"
    (served,) = re.findall(r"--json '(.*)'", text)
    entity = json.loads(served)["config"]["served_entities"][0]
    assert entity["entity_version"] == "VERSION"  # Unity Catalog has its own numbers
    assert not re.search(r"0\.0\.0\.0|--no-conda|enable-mlserver", text)


# The swap without downtime, as the README shows it.


def test_the_readme_snippet_swaps_without_a_failed_or_mixed_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the store remembers where it was made
    store(tmp_path)
    mlflow.set_experiment("swap")
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    (snippet,) = (block for block in blocks if "class LiveModel" in block)
    names = {}
    exec(snippet.split("\n\nmodel = ")[0], names)
    X, y = hold_out()
    client = mlflow.MlflowClient()
    client.create_registered_model(NAME)
    for number in ("1", "2"):  # each version says in every answer which one it is
        model = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, number + "-" + y)
        logged = mlflow.sklearn.log_model(
            model,
            name="model",
            serialization_format="skops",
            signature=mlflow.models.infer_signature(X, model.predict(X)),
            pip_requirements=["mlflow"],
        )
        client.create_model_version(NAME, logged.model_uri)
    mlflow.end_run()
    client.set_registered_model_alias(NAME, "production", "1")
    model = names["LiveModel"](NAME, interval=0.2)
    answers, failed, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            start = time.monotonic()
            try:
                answers.append((start, {answer[0] for answer in model.predict(X)}))
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for swap in range(10):
            version = ("2", "1")[swap % 2]
            client.set_registered_model_alias(NAME, "production", version)
            moved = time.monotonic()
            while not (answers and answers[-1][0] > moved and answers[-1][1] == {version}):
                assert time.monotonic() < moved + 0.2 + 5, "the new version does not answer"
                time.sleep(0.01)
    finally:
        stop.set()
        model.interval = 1e6  # its own thread sleeps while the other tests run
        for thread in threads:
            thread.join()
    assert all(len(versions) == 1 for _, versions in answers)  # none is mixed
    assert not failed and len(answers) > 100
