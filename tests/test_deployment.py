"""The deployment: the gate, the aliases, what is refused, and four months on a growing table."""

import os
import pwd
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import SCRIPTS, assert_one_line, parents, run, store
from mlflow.models import MetricThreshold
from sklearn.datasets import make_classification
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error
from sklearn.pipeline import make_pipeline

import production_deployment as script

SCRIPT = SCRIPTS[2]
NAME = "breast-cancer-classifier"


def judged(actual, baseline, candidate, production=None):
    """Return a table of predictions, from words of a letter for each row."""
    columns = {"actual": actual, "baseline": baseline, "candidate": candidate}
    if production is not None:
        columns["production"] = production
    return pd.DataFrame({name: list(word) for name, word in columns.items()})


def deploy(*args, **settings):
    """Run the script's main in this process and folder, with other settings for once."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(script, name, value)
        script.main(list(args))


def aliases(name=NAME):
    found = mlflow.MlflowClient().get_registered_model(name).aliases
    return {alias: str(version) for alias, version in found.items()}


class Forgetful(LogisticRegression):
    """Learns half of the classes' rows the wrong way round."""

    def fit(self, X, y):
        return super().fit(X, np.where(np.arange(len(y)) % 3 > 0, "benign", y))


@pytest.fixture
def here(folder, monkeypatch):
    """This process in a folder with an empty store."""
    monkeypatch.chdir(folder)
    store(folder)
    return folder


# The gate: functions of a table of predictions.


def test_the_metrics_of_the_gate():
    metrics = script.gate_metrics(
        judged("aabbb", "bbbbb", "aabba", "aabbb"), range(5), accuracy_score, 0
    )
    assert metrics["score"] == 0.8
    assert metrics["above_baseline"] == 0.2
    assert metrics["below_production"] == 0.2
    assert metrics["findable_loss"] == pytest.approx(2.6 * (0.2 * 0.8 / 5) ** 0.5, rel=0.1)
    first = script.gate_metrics(judged("aabbb", "bbbbb", "aabba"), range(5), accuracy_score, 0)
    assert first == {"score": 0.8, "above_baseline": 0.2}


@pytest.mark.parametrize(
    "score", [accuracy_score, partial(f1_score, average="macro", zero_division=0)]
)
def test_the_losses_are_those_of_a_plain_bootstrap(score):
    table = judged("aaaaaabbbbbbbb" * 5, "b" * 70, "aaaaabbbbbbbba" * 5, "aaaaaabbbbbbba" * 5)
    losses = script.bootstrap_losses(table, range(70), score, seed=1, draws=30)
    rng = np.random.default_rng(1)
    for loss in losses:
        drawn = table.iloc[rng.integers(70, size=70)]
        actual = drawn["actual"]
        expected = score(actual, drawn["production"]) - score(actual, drawn["candidate"])
        assert loss == pytest.approx(expected, abs=1e-9)
    assert len(losses) == 30 and len(set(losses)) > 5


def test_rows_of_one_customer_are_drawn_together():
    """Ten equal visits of each of 20 customers say no more than one visit of each."""
    once = judged("a" * 10 + "b" * 10, "b" * 20, "aaaaaaabbbbbbbbbbbaa", "aaaaaaaaabbbbbbbbbbb")
    visits = once.loc[once.index.repeat(10)]
    losses = script.bootstrap_losses(once, range(20), accuracy_score, seed=1, draws=100)
    grouped = script.bootstrap_losses(visits, visits.index, accuracy_score, seed=1, draws=100)
    assert list(grouped) == list(losses)
    alone = script.bootstrap_losses(visits, range(200), accuracy_score, seed=1, draws=100)
    assert alone.std() < losses.std() / 2


def test_the_bootstrap_takes_numbers_too():
    """In regression, where every row differs: 25 % of the draws, and not none."""
    rng = np.random.default_rng(0)
    actual = rng.normal(size=60)
    table = pd.DataFrame({"actual": actual, "production": actual + rng.normal(size=60)})
    table["candidate"] = actual + rng.normal(size=60)
    losses = script.bootstrap_losses(
        table, range(60), lambda *y, **weights: -mean_absolute_error(*y, **weights), seed=0
    )
    error = (table["candidate"] - actual).abs() - (table["production"] - actual).abs()
    assert losses.mean() == pytest.approx(error.mean(), abs=0.02)
    assert losses.std() == pytest.approx(error.std() / 60**0.5, rel=0.1)


def test_a_loss_that_is_not_negated_is_an_error():
    table = pd.DataFrame({"actual": [1.0, 2.0], "baseline": [1.5, 1.5], "candidate": [1.0, 2.1]})
    with pytest.raises(ValueError, match="of a loss, return the negative"):
        script.gate_metrics(table, range(2), mean_absolute_error, 0)


def test_a_version_that_predicts_the_same_is_worse_with_probability_zero():
    table = judged("aabbbb", "bbbbbb", "aabbba", "aabbba")
    assert script.gate_metrics(table, range(6), accuracy_score, 0)["p_worse_than_production"] == 0


@pytest.mark.parametrize(
    ("metric", "value", "passes"),
    [
        ("above_baseline", 0.01, True),
        ("above_baseline", 0.009, False),
        ("p_worse_than_production", 0.96, True),
        ("p_worse_than_production", 0.961, False),
        ("latency_ms", 50, True),
        ("latency_ms", 51, False),
    ],
)
def test_each_limit_lets_pass_and_refuses(metric, value, passes):
    metrics = {"above_baseline": 0.5, "p_worse_than_production": 0, "latency_ms": 3}
    missed = script.missed_limits(metrics | {metric: value}, script.GATE)
    assert (missed == []) == passes
    assert all(metric in line for line in missed)


def test_a_limit_without_its_metric_is_missed():
    gate = {"acuracy": MetricThreshold(threshold=0.5, greater_is_better=True)}
    assert len(script.missed_limits({"accuracy": 1}, gate)) == 1


def test_the_margins_say_how_far_each_metric_is_within_its_limit():
    metrics = {"score": 0.95, "latency_ms": 60.0, "findable_loss": 0.026}
    gate = {**script.GATE, "acuracy": script.GATE["latency_ms"]}
    text = script.describe_margins(metrics, gate, 500)
    assert re.search(r"^ +score +0.9500 *$", text, re.M)
    assert re.search(r"latency_ms +60.0000 +at most 50 +-10.0000", text)
    assert re.search(r"acuracy +at most 50 *$", text, re.M)
    assert text.endswith("if it is larger than findable_loss and than 5 rows (or IDs).")


# The registry: what moves, and what does not.


def test_a_refused_version_stays_in_staging(here):
    process = run(SCRIPT, "--min-score", "0.995", cwd=here)
    assert_one_line(process, "Refused: version 1", "score", code=1)
    (deployment,) = parents("production-deployment")
    assert deployment.info.status == "FAILED"
    assert aliases() == {"staging": "1"}
    version = mlflow.MlflowClient().get_model_version(NAME, "1")
    assert version.tags["validation_status"] == "failed"
    assert version.description.startswith("Version 1 failed (accuracy; compared with nothing)")
    with pytest.raises(script.UserError, match="has not passed the gate"):
        deploy("--rollback", "1")
    assert aliases() == {"staging": "1"}


def test_deployed_refused_rolled_back_and_forth(here, capsys):
    """A worse one is refused beside production; a team's own words about the model stay."""
    deploy()
    client = mlflow.MlflowClient()
    client.update_registered_model(NAME, "The team's own words")
    stage = client.get_model_version(NAME, "1").current_stage
    deploy()
    assert aliases() == {"staging": "2", "production": "2", "previous": "1"}
    assert stage == client.get_model_version(NAME, "2").current_stage == "Production"
    assert client.get_model_version(NAME, "1").current_stage == "Archived"
    assert "p_worse_than_production" in client.get_model_version(NAME, "2").description

    with pytest.raises(SystemExit, match="Refused: version 3 .* p_worse_than_production"):
        deploy(LogisticRegression=Forgetful, TRUSTED=[*script.TRUSTED, f"{__name__}.Forgetful"])
    assert aliases() == {"staging": "3", "production": "2", "previous": "1"}

    (undo,) = re.findall("^Undo:  (.*)$", capsys.readouterr().out, re.M)
    assert os.path.samefile(shlex.split(undo)[1], script.__file__)
    deploy(*shlex.split(undo)[2:])
    assert aliases() == {"staging": "3", "production": "1", "previous": "2"}
    assert client.get_model_version(NAME, "1").current_stage == "Production"
    deploy("--rollback")
    deploy("--rollback", "1", "--name", NAME)
    assert aliases()["production"] == "1"
    with pytest.raises(script.UserError, match="version 1 .* already in production"):
        deploy("--rollback", "1")
    with pytest.raises(mlflow.MlflowException, match="not found"):
        deploy("--rollback", "7")
    with pytest.raises(script.UserError, match="not passed the gate"):
        deploy("--rollback", "3")
    assert aliases() == {"staging": "3", "production": "1", "previous": "2"}
    rollbacks = mlflow.search_runs(
        experiment_names=[script.EXPERIMENT], filter_string="run_name = 'rollback'"
    )
    assert len(rollbacks) == 3 and set(rollbacks["status"]) == {"FINISHED"}
    assert client.get_registered_model(NAME).description == "The team's own words"

    # Production's version is deleted, and its alias with it: the previous one takes its place.
    client.transition_model_version_stage(NAME, "1", "Archived")
    client.delete_model_version(NAME, "1")
    if "production" not in aliases():  # MLflow 3.11 keeps an alias that leads nowhere
        deploy("--rollback")
        assert aliases() == {"staging": "3", "production": "2", "previous": "2"}
        with pytest.raises(script.UserError, match="already in production"):
            deploy("--rollback")


def test_nothing_to_roll_back_to_leaves_nothing(here):
    with pytest.raises(script.UserError, match="no previous version"):
        deploy("--rollback", "--name", "none")
    assert parents("production-deployment") == []


def logged_model(X, y, rule="0.2 of the rows, by a hash of the features"):
    """Log a logistic regression as the scripts do, and return its URI."""
    model = script.add_preprocessing(LogisticRegression(max_iter=1000)).fit(X, y)
    script.open_store("elsewhere")
    with mlflow.start_run():
        return script.log_model(model, X, rule).model_uri


@pytest.fixture
def registry(here):
    """Four versions of a model `m`, of the breast cancer data; none has an alias."""
    train, _ = script.load_data(None, "diagnosis", None, 0.2)
    uri = logged_model(train.X, train.y)
    client = mlflow.MlflowClient()
    for _ in range(4):
        version = mlflow.register_model(uri, "m").version
        client.set_model_version_tag("m", version, "validation_status", "passed")
    return client


def test_promote_compares_before_it_moves(registry):
    script.promote("m", 1, replaces=None)
    script.promote("m", "2", replaces=1)  # MLflow gives numbers, people write text
    assert aliases("m") == {"production": "2", "previous": "1"}
    for replaces in ("1", None):
        with pytest.raises(script.UserError, match="version 2 was promoted in the meantime"):
            script.promote("m", "3", replaces=replaces)
    with pytest.raises(script.UserError, match="already in production"):
        script.promote("m", 2, replaces="2")
    with pytest.raises(mlflow.MlflowException, match="not found"):
        script.promote("m", 9, replaces=2)
    registry.delete_model_version_tag("m", "3", "validation_status")
    with pytest.raises(script.UserError, match="3 of m has not passed"):
        script.promote("m", 3, replaces=2)
    assert aliases("m") == {"production": "2", "previous": "1"}


def test_a_promotion_that_dies_leaves_production_whole(registry, monkeypatch):
    """`previous` moves before `production`, so nothing is lost between the two calls."""
    script.promote("m", 1, replaces=None)
    move = mlflow.MlflowClient.set_registered_model_alias
    moved = []

    def move_once(client, name, alias, version):
        if moved:
            raise KeyboardInterrupt
        moved.append(alias)
        move(client, name, alias, version)

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_alias", move_once)
    with pytest.raises(KeyboardInterrupt):
        script.promote("m", 2, replaces=1)
    assert aliases("m") == {"production": "1", "previous": "1"}


def test_what_is_promoted_is_what_was_judged(here):
    """Also if another deployment stages its own version meanwhile."""
    train, test = script.load_data(None, "diagnosis", None, 0.2)
    script.open_store("elsewhere")
    constant = make_pipeline(DummyClassifier()).fit(train.X, train.y)
    with mlflow.start_run():
        other = script.log_model(constant, train.X, train.rule).model_uri
    register = script.register

    def stage_another(*args):
        version = register(*args)
        register(NAME, other)
        return version

    deploy(register=stage_another)
    assert aliases() == {"staging": "2", "production": "1"}
    version = mlflow.MlflowClient().get_model_version(NAME, "1")
    assert version.tags["validation_status"] == "passed"
    assert " 0.9905 " in version.description


def test_any_logged_model_is_deployed_through_the_same_gate(here, capsys):
    train, test = script.load_data(None, "diagnosis", None, 0.2)
    uri = logged_model(train.X, train.y)
    run_id = mlflow.get_logged_model(uri.removeprefix("models:/")).source_run_id
    deploy("--model-uri", uri)
    deploy("--model-uri", f"runs:/{run_id}/model", "--metric", "f1", "--name", "other")
    assert "Version 1 passed (f1; compared with nothing)" in capsys.readouterr().out
    deployed = mlflow.pyfunc.load_model("models:/other@production").predict(test.X)
    expected = mlflow.sklearn.load_model(uri).predict(test.X)
    assert list(deployed) == list(expected)
    (_, deployment) = parents("production-deployment")
    assert deployment.data.metrics["score"] == f1_score(test.y, expected, average="macro")
    assert deployment.data.params == {"metric": "f1"}


@pytest.mark.parametrize("uri", ["models:/m-0", "runs:/0/model", "models:/nothing@here", "x"])
def test_an_unknown_model_ends_in_one_line_and_leaves_no_run(uri, here):
    with pytest.raises(script.UserError, match="cannot be used"):
        deploy("--model-uri", uri)
    assert parents("production-deployment") == []
    assert mlflow.search_registered_models() == []


def champions(X, y):
    """Yield versions that cannot be compared with: what is wrong, and a model's URI."""
    yield "other columns", logged_model(X.iloc[:, 1:], y)
    yield "seen the hold-out", logged_model(X, y, rule="0.3 of the rows")
    yield "other classes", logged_model(X, y.str.upper())
    yield "other classes", logged_model(X, y.where(X.index % 5 > 0, y.str.upper()))
    path = logged_model(X, y)
    files = Path(mlflow.artifacts.download_artifacts(path))
    (files / "model.skops").write_bytes(b"cut short")
    yield "cannot be used", path


def test_a_champion_that_cannot_be_compared_with_is_not_replaced(here, capsys):
    """Unless one says so. Nothing is left of what is refused."""
    train, _ = script.load_data(None, "diagnosis", None, 0.2)
    client = mlflow.MlflowClient()
    for reason, uri in champions(train.X, train.y):
        number = mlflow.register_model(uri, NAME).version
        client.set_registered_model_alias(NAME, "production", number)
        with pytest.raises(script.UserError, match=reason):
            deploy()
        assert "--without-comparison" in capsys.readouterr().out
        assert aliases() == {"production": str(number)}
        assert mlflow.get_experiment_by_name("production-deployment") is None or (
            parents("production-deployment") == []
        )
    deploy("--without-comparison")
    version = client.get_model_version_by_alias(NAME, "production")
    assert int(version.version) == int(number) + 1
    assert version.tags["compared_with"] == "nothing"


def test_after_an_unexpected_error_the_run_is_failed(here):
    with pytest.raises(ZeroDivisionError):
        deploy(draw_confusion=lambda judged: 1 / 0)
    (deployment,) = parents("production-deployment")
    assert deployment.info.status == "FAILED"
    assert aliases() == {"staging": "1"}


# Four months, as a table grows.


@pytest.fixture
def postgres(tmp_path):
    """The address of a database on a PostgreSQL server of its own, if there is one."""
    (*_, bin_) = [None, *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    if bin_ is None:
        pytest.skip("no PostgreSQL here")
    folder = Path(tempfile.mkdtemp())
    user = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = {"user": "postgres", "group": "postgres"}
        os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
    call = partial(subprocess.run, check=True, cwd=folder, stdout=subprocess.DEVNULL, **user)
    call([bin_ / "initdb", "-D", folder / "db", "-A", "trust", "-U", "mlflow"])
    options = f"-k {folder} -c listen_addresses="
    call([bin_ / "pg_ctl", "-D", folder / "db", "-o", options, "-l", folder / "log", "-w", "start"])
    try:
        yield f"postgresql+psycopg2://mlflow:p%40ss@/postgres?host={folder}"
    finally:
        call([bin_ / "pg_ctl", "-D", folder / "db", "-m", "immediate", "stop"])
        shutil.rmtree(folder)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_four_months_of_a_growing_table(database, folder, request, monkeypatch, capsys):
    """In the third, the labels of all but the first 600 rows are shuffled: that one is refused.

    No version has ever been trained on a row of any month's hold-out.
    """
    uri = f"sqlite:///{folder}/mlflow.db"
    if database == "postgresql":
        uri = request.getfixturevalue("postgres")
    mlflow.set_tracking_uri(uri)
    X, y = make_classification(2000, n_informative=4, flip_y=0.02, class_sep=1.5, random_state=1)
    table = pd.DataFrame(X).add_prefix("x")
    table["leaves"] = np.where(y == 1, "yes", "no")
    wrong = table.copy()
    wrong.loc[600:, "leaves"] = table["leaves"][600:].sample(frac=1, random_state=1).to_numpy()

    held_out, promoted = set(), []
    options = ("--target", "leaves", "--name", "churn", "--min-score", "0.8")
    monkeypatch.chdir(folder)
    for month, (rows, source) in enumerate(
        [(1200, table), (1500, table), (1800, wrong), (2000, table)], start=1
    ):
        csv = folder / f"month_{month}.csv"
        source.head(rows).to_csv(csv, index=False)
        if month == 3:
            with pytest.raises(SystemExit, match="Refused: version 3"):
                deploy("--csv", str(csv), *options)
        else:
            deploy("--csv", str(csv), *options)
        promoted.append(aliases("churn")["production"])
        read = pd.read_csv(csv).drop(columns="leaves")
        hashes = pd.util.hash_pandas_object(read, index=False)
        test = set(hashes[hashes % 1000 < 200])
        trained = set(hashes) - test
        assert not trained & held_out  # rows held out earlier stay held out
        held_out |= test
    assert promoted == ["1", "2", "2", "4"]
    assert "p%40ss" not in capsys.readouterr().out
