"""Take a model to production with MLflow: register, stage, validate, promote, predict, roll back.

A scaled logistic regression is trained on scikit-learn's breast cancer data and registered
(or, with --model-uri, a model that one of these scripts has logged). The new version gets the
alias `staging`. It is loaded back and must pass a gate on the hold-out, where it is also
compared with the version in production. Only then does the alias `production` move to it.

    python production_deployment.py
    python production_deployment.py --model-uri runs:/RUN_ID/model
    python production_deployment.py --csv customers.csv --target churned --metric f1
    python production_deployment.py --rollback
    python production_deployment.py --history

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment production-deployment
    ├── deployment          metrics of the gate, confusion.png, deployment_guide.md, `model`
    └── rollback            which version it put back into production
    registered model breast-cancer-classifier
    └── version 1, 2, …     with its verdict; aliases staging, production and previous

Exit code 0: promoted, rolled back, or history printed. 1: refused, or an unexpected error
(with its traceback). 2: bad input, or a store that fails. 130: Ctrl-C. `production` does not
move when a model is refused; after other errors, --history shows whether it moved.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "mlflow>=3.11.1,<3.18",
#     "scikit-learn>=1.7,<1.10",
#     "pandas>=2.2,<3.2",
#     "numpy>=1.26,<2.5",
# ]
# ///
# joblib, matplotlib, scipy, skops, SQLAlchemy and threadpoolctl come with these.

import hashlib
import logging
import os
import random
import re
import shlex
import signal
import sqlite3
import sys
import threading
import time
import timeit
import traceback
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import closing, contextmanager, redirect_stderr
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.parse import quote

import mlflow
import numpy as np
import pandas as pd
import sqlalchemy
from matplotlib.figure import Figure
from mlflow.models import EvaluationResult, MetricThreshold, Model
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_score,
    recall_score,
)
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

EXPERIMENT = "production-deployment"
SEED = 42  # for the split and the bootstrap
TEST_SIZE = 0.2  # share of the rows held out: for the gate
TOLERANCE = 0.02  # how far a score may fall below production's

# A version is promoted only if every metric is within its limit.
GATE = {
    # The score on the hold-out. This limit is for the breast cancer data.
    "score": MetricThreshold(threshold=0.93, greater_is_better=True),
    # The score minus that of always answering the most frequent class.
    "above_baseline": MetricThreshold(threshold=0.01, greater_is_better=True),
    # The score of the version in production minus this score.
    "below_production": MetricThreshold(threshold=TOLERANCE, greater_is_better=False),
    # The probability that this version is really worse by more than TOLERANCE.
    "p_below_production": MetricThreshold(threshold=0.2, greater_is_better=False),
    # The best score of all versions promoted so far (same metric and rows) minus this score.
    # Without this limit, many small losses could add up.
    "below_best_ever": MetricThreshold(threshold=TOLERANCE, greater_is_better=False),
    # The median time of predict() for one row, in this process: without HTTP.
    "latency_ms": MetricThreshold(threshold=50, greater_is_better=False),
    # Whether it answers the example request saved with it: 1 or 0.
    "answers_its_example": MetricThreshold(threshold=1, greater_is_better=True),
    # Whether it refuses rows that lack a column: 1 or 0.
    "refuses_a_missing_column": MetricThreshold(threshold=1, greater_is_better=True),
}

# The choices of --metric: functions of the true and the predicted classes. Higher must be
# better: for a loss, return its negative, like scikit-learn's neg_ scorers. F1, precision and
# recall are macro averages, in which every class counts the same.
METRICS = {
    "accuracy": accuracy_score,
    "balanced_accuracy": balanced_accuracy_score,
    "f1": partial(f1_score, average="macro", zero_division=0),
    "precision": partial(precision_score, average="macro", zero_division=0),
    "recall": partial(recall_score, average="macro", zero_division=0),
}

# skops loads these types only if they are named. Loading them runs no code, but a damaged
# tree can crash the process that predicts with it (skops pull request 535).
TRUSTED = [
    "numpy.dtype",
    "sklearn.tree._tree.Tree",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
]


class UserError(Exception):
    """A reason to stop that the user can act on: one line on stderr, without a traceback."""

    exit_code = 2


class Refused(UserError):
    """There is no result to use: a model was refused, or everything that was tried failed."""

    exit_code = 1


def main(argv=None):
    args = parse_args(argv)
    name = registered_name(args.csv, args.target)
    if args.history:
        print_history(open_store(EXPERIMENT), name)
    elif args.rollback is not None:
        roll_back(open_store(EXPERIMENT), name, args.rollback)
    else:
        deploy(args, name)


def deploy(args, name):
    """Register a model as a new version, validate it, and promote it if it passes the gate.

    It keeps the alias `staging` either way. If it fails, `production` does not move.
    """
    check_skops()  # load_checked does it too, but only after the training
    train, test = load_data(args.csv, args.target, TEST_SIZE, SEED)
    experiment_id = open_store(EXPERIMENT)
    champion = load_champion(name, train, TRUSTED)
    if args.model_uri is not None:
        # Before the run starts, so that a model that fails here leaves no run.
        model_id = check_logged_model(args.model_uri, train, TRUSTED)

    with mlflow.start_run(run_name="deployment"):
        mlflow.log_param("metric", args.metric)
        log_rows(training=train, testing=test)
        if args.model_uri is None:
            model_id = train_model(train, TRUSTED)
        version = register(name, model_id, train)

        # Judge what will be served: the version, loaded from the registry.
        candidate = load_checked(f"models:/{name}/{version}", train.X.columns, TRUSTED)
        score = METRICS[args.metric]
        metrics = evaluate(candidate, train, test, score)
        metrics |= compare(candidate, champion.model, test, score, TOLERANCE, SEED)
        metrics |= compare_with_history(experiment_id, name, args.metric, test, metrics["score"])
        mlflow.log_metrics(metrics, model_id=model_id, dataset=test.dataset)
        mlflow.log_figure(draw_confusions(candidate, champion.model, test), "confusion.png")

        gate = choose_gate(GATE, metrics, args.min_score, args.csv)
        missed = missed_limits(metrics, gate)
        log_verdict(name, version, champion, metrics, gate, missed, test)
        if missed:
            # This ends the run with the status FAILED.
            raise Refused(f"version {version} misses a limit. {' '.join(missed)}")

        with one_promotion_at_a_time(experiment_id, name):
            promote(name, version, replaces=champion.version)
        guide = deployment_guide(name, version)
        mlflow.log_text(guide, "deployment_guide.md")

    print(predict_with_production(name, test, TRUSTED).to_string(index=False))
    print(f"\n{guide}")
    print(where_to_look(experiment_id))
    if champion.version is not None:
        print("Undo: ", command_line("production_deployment.py", "--rollback", args=args))


def parse_args(argv):
    """Return the options of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--csv",
        metavar="FILE",
        help="use this table, not the breast cancer data; the model is named after it",
    )
    add("--target", default="diagnosis", help="the column to predict")
    add("--metric", choices=METRICS, default="accuracy", help="how the gate scores a model")
    add("--model-uri", help="deploy this logged model: models:/m-… or runs:/RUN_ID/model")
    add("--min-score", type=float, help="the lowest score that passes the gate")
    add("--history", action="store_true", help="print who promoted or rolled back what, and exit")
    add(
        "--rollback",
        nargs="?",
        const="previous",
        metavar="VERSION",
        help="put the previous version, or VERSION, back into production, and exit",
    )
    return parser.parse_args(argv)


def registered_name(csv, target):
    """Return the name of the registered model, such as customers-churned-classifier."""
    if csv is None:
        return "breast-cancer-classifier"
    return f"{table_name(csv)}-{to_name(target)}-classifier"


class Champion(NamedTuple):
    """The version in production."""

    version: str | None  # None if there is none
    model: mlflow.pyfunc.PyFuncModel | None  # None as well if it cannot be used


def load_champion(name, train, trusted_types):
    """Return the Champion of a registered model.

    One that cannot be used, such as a pickle or one for other columns, does not block a
    better model: a note is printed, and the candidate is not compared with it. Raises
    UserError if its files cannot be fetched.
    """
    version = get_aliases(name).get("production")
    if version is None:
        return Champion(None, None)
    model_uri = f"models:/{name}/{version}"
    try:
        model = load_checked(model_uri, train.X.columns, trusted_types)
        check_predictions(model, model_uri, train)
    except UnusableModel as error:
        print(f"Note: the candidate is not compared with version {version} in production: {error}")
        return Champion(version, None)
    if trained_on_other_rows(model.model_id, train):
        print(
            f"Note: version {version} in production may have been trained on rows of the hold-out"
        )
    return Champion(version, model)


def train_model(train, trusted_types):
    """Fit a logistic regression on the training rows, log it, and return its model ID."""
    print("Training a model and logging it", flush=True)
    model = add_preprocessing(LogisticRegression(max_iter=1000), train.X)
    return log_model(model.fit(train.X, train.y), train.X, trusted_types)


def register(name, model_id, train):
    """Register a logged model as a new version with the alias `staging`, and return its number."""
    print("Registering it as a new version with the alias `staging`", flush=True)
    with redirect_stderr(sys.stdout):  # MLflow reports success on stderr
        registered = mlflow.register_model(f"models:/{model_id}", name)
    set_alias(name, "staging", registered.version)
    description = (
        f"Predicts `{train.y.name}`: {', '.join(sorted(train.y.unique()))}.\n\n"
        f"Load it with `mlflow.pyfunc.load_model('models:/{name}@production')`.\n\n"
        f"It takes these columns: {', '.join(train.X.columns)}."
    )
    client = mlflow.MlflowClient()
    client.update_registered_model(name, description)
    rows = "known" if training_digests(model_id) else "unknown"
    client.set_model_version_tag(name, registered.version, "training_rows", rows)
    return str(registered.version)


def evaluate(model, train, test, score):
    """Return the metrics of a loaded model, on the hold-out: see GATE for their meaning."""
    print("Evaluating the staged version on the hold-out", flush=True)
    model_score = score(test.y, model.predict(test.X))
    baseline = DummyClassifier().fit(train.X, train.y)
    baseline_score = score(test.y, baseline.predict(test.X))
    return {
        "score": model_score,
        "above_baseline": rounded_difference(model_score, baseline_score),
        "latency_ms": median_latency_ms(model, test.X),
        "answers_its_example": float(answers_its_example(model)),
        "refuses_a_missing_column": float(refuses_a_missing_column(model, test.X)),
    }


def compare(candidate, champion_model, test, score, tolerance, seed):
    """Return the metrics that compare a candidate with the champion; {} if there is none."""
    if champion_model is None:
        return {}
    predicted = candidate.predict(test.X)
    champion_predicted = champion_model.predict(test.X)
    below = rounded_difference(score(test.y, champion_predicted), score(test.y, predicted))
    p_below = probability_of_loss(test.y, predicted, champion_predicted, score, tolerance, seed)
    return {"below_production": below, "p_below_production": p_below}


def compare_with_history(experiment_id, name, metric, test, candidate_score):
    """Return how far a score is below the best of all versions promoted so far.

    These have been scored on the same hold-out by the same metric. A version that a rollback
    took out of production counts as well: delete its run to forget it. One whose training
    rows are unknown does not count: it may have seen the hold-out. Returns no metric if there
    is none yet.
    """
    promoted = mlflow.search_runs(
        [experiment_id],
        f"tags.registered_model = '{name}' AND tags.outcome = 'promoted'"
        f" AND tags.holdout_digest = '{test.dataset.digest}' AND params.metric = '{metric}'",
        output_format="list",
    )
    known = mlflow.MlflowClient().search_model_versions(
        f"name = '{name}' AND tags.training_rows = 'known'"
    )
    versions = {str(version.version) for version in known}
    scores = [run.data.metrics["score"] for run in promoted if run.data.tags["version"] in versions]
    if not scores:
        return {}
    return {"below_best_ever": rounded_difference(max(scores), candidate_score)}


def probability_of_loss(y, predicted, champion_predicted, score, tolerance, seed, draws=1000):
    """Return how probable it is that a candidate is worse by more than `tolerance`.

    A paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993): both
    are scored on the same rows, which are drawn anew, with replacement, `draws` times. As
    the hold-out is stratified, each class keeps its number of rows.
    """
    # Numbers are scored faster than text. Their order is that of the classes.
    codes, _ = pd.factorize(np.concatenate([y, predicted, champion_predicted]), sort=True)
    y, predicted, champion_predicted = np.split(codes, 3)
    rows_by_class = [np.flatnonzero(y == code) for code in np.unique(y)]
    rng = np.random.default_rng(seed)
    worse = 0
    for _ in range(draws):
        rows = np.concatenate([rng.choice(own, size=len(own)) for own in rows_by_class])
        loss = rounded_difference(
            score(y[rows], champion_predicted[rows]), score(y[rows], predicted[rows])
        )
        worse += loss > tolerance
    return worse / draws


def median_latency_ms(model, X):
    """Return the median time of predict() for one row, in milliseconds."""
    row = X.head(1)
    seconds = timeit.repeat(lambda: model.predict(row), number=1, repeat=50)
    return 1000 * float(np.median(seconds))


def answers_its_example(model):
    """Return True if a loaded model answers the example request saved with it."""
    if model.input_example is None:
        return False
    try:
        model.predict(model.input_example)
    except (mlflow.MlflowException, ValueError, TypeError):
        return False
    return True


def refuses_a_missing_column(model, X):
    """Return True if a loaded model refuses rows without one of its columns."""
    try:
        model.predict(X.drop(columns=X.columns[0]))
    except (mlflow.MlflowException, ValueError):
        return True
    return False


def rounded_difference(a, b):
    """Return a - b, rounded: 0.98 - 0.96 must be 0.02, and not 0.020000000000000018."""
    return round(a - b, 12)


def draw_confusions(candidate, champion_model, test):
    """Return a figure: the confusion matrices of the candidate and, beside it, the champion."""
    models = {"The candidate": candidate}
    if champion_model is not None:
        models["The version in production"] = champion_model
    figure = Figure(figsize=(5 * len(models), 4.5), layout="constrained")
    all_axes = np.atleast_1d(figure.subplots(1, len(models)))
    for axes, (title, model) in zip(all_axes, models.items(), strict=True):
        draw_confusion(axes, test.y, model.predict(test.X), title)
    return figure


def draw_confusion(axes, y, predicted, title):
    """Draw the confusion matrix: in each cell the number of rows, and its share of the class."""
    classes = sorted(y.unique())
    counts = confusion_matrix(y, predicted, labels=classes)
    shares = counts / counts.sum(axis=1, keepdims=True)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    # Many classes need small letters; empty cells stay empty, so that errors catch the eye.
    size = min(10, 80 / len(classes))
    for (row, column), count in np.ndenumerate(counts):
        if count > 0:
            share = shares[row, column]
            color = "white" if share > 0.5 else "black"
            text = f"{count}\n{share:.0%}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
    rotation = 90 if sum(map(len, classes)) > 30 else 0
    axes.set_xticks(range(len(classes)), classes, rotation=rotation)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="Predicted class", ylabel="True class")
    axes.set_title(title)


def choose_gate(gate, metrics, min_score, csv):
    """Return the limits that apply, by metric.

    A limit without a metric is left out: a first version, for instance, is compared with
    nothing. The limit for the score is for the breast cancer data: another table has none,
    unless `min_score` gives one.
    """
    limits = {name: limit for name, limit in gate.items() if name in metrics}
    if min_score is not None:
        limits["score"] = MetricThreshold(threshold=min_score, greater_is_better=True)
    elif csv is not None:
        print("Note: this table has no minimum score; set one with --min-score", flush=True)
        limits.pop("score")
    return limits


def missed_limits(metrics, gate):
    """Return a line for each limit that the metrics miss, as MLflow words it."""
    try:
        mlflow.validate_evaluation_results(
            validation_thresholds=gate, candidate_result=EvaluationResult(metrics, artifacts={})
        )
    except mlflow.MlflowException as error:
        return str(error).splitlines()
    return []


def log_verdict(name, version, champion, metrics, gate, missed, test):
    """Print the verdict, and write it to the version and to the active run.

    The run's tag `outcome` is read by compare_with_history and print_history. It is "refused"
    or "passed" here. promote() sets "unfinished" before it moves the aliases, and "promoted"
    after.
    """
    table = format_gate(metrics, gate)
    print(table.to_string(index=False), flush=True)
    verdict = "failed" if missed else "passed"
    # A champion that cannot be used was not compared.
    compared_with = "none" if champion.model is None else champion.version
    description = (
        f"This version {verdict} the gate on {test.dataset.name} (digest {test.dataset.digest}). "
        f"Production version it was compared with: {compared_with}.\n\n{to_markdown(table)}"
    )
    client = mlflow.MlflowClient()
    client.update_model_version(name, version, description)
    client.set_model_version_tag(name, version, "validation_status", verdict)
    client.set_model_version_tag(name, version, "compared_with", compared_with)
    mlflow.set_tags(
        {
            "registered_model": name,
            "version": version,
            "champion": champion.version or "none",
            "holdout_digest": test.dataset.digest,
            "outcome": "refused" if missed else "passed",
            "mlflow.note.content": description,
        }
    )


def format_gate(metrics, gate):
    """Return the metrics and their limits as a table of text."""
    rows = []
    for name, value in metrics.items():
        row = {"metric": name, "value": f"{value:.4f}", "limit": "none", "margin": ""}
        if name in gate:
            limit = gate[name]
            side = "at least" if limit.greater_is_better else "at most"
            sign = 1 if limit.greater_is_better else -1
            row["limit"] = f"{side} {limit.threshold:g}"
            row["margin"] = f"{sign * (value - limit.threshold):+.4f}"
        rows.append(row)
    return pd.DataFrame(rows)


def to_markdown(table):
    """Return a DataFrame of text as a Markdown table."""
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@contextmanager
def one_promotion_at_a_time(experiment_id, name, patience=60):
    """Wait until no other run promotes a version of this model, and let others wait for this one.

    The registry has no lock. So each run first tags itself as promoting, and then searches
    for others. Of two runs, at least one sees the other and steps back. A tag counts for
    `patience` seconds, as its run may have been killed: a promotion must be faster than that,
    and the clocks of two machines must agree. Raises UserError if others are still promoting
    after that time.
    """
    run_id = mlflow.active_run().info.run_id
    claims = f"tags.promoting = '{name}' AND attributes.status = 'RUNNING'"
    deadline = time.time() + patience
    while True:
        mlflow.set_tags({"promoting": name, "promoting_since": time.time()})
        found = mlflow.search_runs([experiment_id], claims, output_format="list")
        others = [
            run
            for run in found
            if run.info.run_id != run_id
            and float(run.data.tags["promoting_since"]) > time.time() - patience
        ]
        if not others:
            break
        mlflow.delete_tag("promoting")
        other_id = others[0].info.run_id
        if time.time() > deadline:
            raise UserError(f"run {other_id} is promoting a version of {name}")
        print(f"Waiting for run {other_id}, which is promoting a version as well", flush=True)
        time.sleep(random.uniform(0.1, 2))
    try:
        yield
    finally:
        mlflow.delete_tag("promoting")


def promote(name, version, replaces, outcome="promoted"):
    """Point `production` at a version, and `previous` at `replaces`, which is None for a first one.

    Raises Refused, and moves nothing, if the version in production is not `replaces`.
    """
    current = get_aliases(name).get("production")
    if current != replaces:
        mlflow.set_tag("outcome", "refused")
        raise Refused(f"version {current} was promoted in the meantime; run this again")
    print(f"Moving the alias `production` to version {version}", flush=True)
    client = mlflow.MlflowClient()
    mlflow.set_tag("outcome", "unfinished")  # what --history shows if this process is killed here
    if replaces is not None:
        # If the process is killed between the two set_alias, both aliases point at this old
        # version. previous_version() then follows the tag `replaces` of this old version.
        client.set_model_version_tag(name, version, "replaces", replaces)
        client.set_model_version_tag(name, replaces, "was_in_production", "yes")
        set_alias(name, "previous", replaces)
    set_alias(name, "production", version)
    client.set_model_version_tag(name, version, "was_in_production", "yes")
    mlflow.set_tag("outcome", outcome)
    set_legacy_stage(name, version)


def set_legacy_stage(name, version):
    """Set the stage Production, for those who still load models:/NAME/Production.

    MLflow deprecated stages in 2.9, in favour of aliases. Leave this out if unused.
    """
    client = mlflow.MlflowClient()
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            client.transition_model_version_stage(
                name, version, "Production", archive_existing_versions=True
            )
    except (AttributeError, mlflow.MlflowException) as error:
        print(f"Note: the alias has moved, but the legacy stage could not be set: {error}")


# Indented lines are shell commands. Those with @production take the version that the alias
# points at when they start; the others take this version.
GUIDE = """# Deploy {name} version {number} from this store

    export MLFLOW_TRACKING_URI={store}

## REST API

    mlflow models serve --model-uri models:/{name}@production --env-manager local --host 127.0.0.1 --port 5001

When `curl http://127.0.0.1:5001/ping` answers, export the variable in a second shell too, and send
the example request:

    mlflow artifacts download --artifact-uri models:/{name}@production/serving_input_example.json --dst-path request
    curl --fail http://127.0.0.1:5001/invocations --header 'Content-Type: application/json' --data @request/serving_input_example.json

It listens on this machine only. For others, put a proxy with TLS and authentication in front of it.
Ctrl-C stops it. Restart it after a promotion, or see "Swap without downtime" in README.md.

## Batch

    mlflow models predict --model-uri models:/{name}@production --env-manager local --content-type json --input-path request/serving_input_example.json --output-path predictions.json

## Docker (needs a Docker engine; https://docs.docker.com/reference/cli/docker)

    mlflow models generate-dockerfile --model-uri models:/{name}/{number} --env-manager local --output-directory image
    docker build --tag {name}:{number} image
    docker run --rm --publish 127.0.0.1:5001:8080 {name}:{number}

## Amazon SageMaker (needs boto3, the ARN of an AWS ROLE, a BUCKET, and the Docker image in a REGISTRY of ECR in the same REGION; https://mlflow.org/docs/latest/ml/deployment)

    mlflow deployments create --target sagemaker:/REGION --name {name} --model-uri models:/{name}/{number} --config execution_role_arn=ROLE --config bucket=BUCKET --config image_url=REGISTRY/{name}:{number}

## Azure ML (needs az with its ml extension; https://learn.microsoft.com/azure/machine-learning/how-to-deploy-mlflow-models-online-endpoints)

    mlflow artifacts download --artifact-uri models:/{name}/{number} --dst-path model
    az configure --defaults group=GROUP workspace=WORKSPACE
    az ml model create --name {name} --version {number} --type mlflow_model --path model
    az ml online-endpoint create --name ENDPOINT
    echo '{{"name": "v{number}", "endpoint_name": "ENDPOINT", "model": "azureml:{name}:{number}", "instance_type": "Standard_DS3_v2", "instance_count": 1}}' > deployment.yml
    az ml online-deployment create --file deployment.yml --all-traffic

## Google Vertex AI (needs gcloud with a project, and the Docker image in a REGISTRY; https://cloud.google.com/sdk/gcloud/reference/ai/models/upload)

    gcloud ai models upload --region REGION --model-id {name}-{number} --display-name {name} --container-image-uri REGISTRY/{name}:{number} --container-ports 8080 --container-predict-route /invocations --container-health-route /ping
    gcloud ai endpoints create --region REGION --endpoint-id {name} --display-name {name}
    gcloud ai endpoints deploy-model {name} --region REGION --model {name}-{number} --display-name v{number} --traffic-split 0=100

## Databricks (needs databricks, and the model in Unity Catalog as a VERSION of main.ml.{name}; https://docs.databricks.com/dev-tools/cli/reference/serving-endpoints-commands)

    databricks serving-endpoints create --json '{{"name": "{name}", "config": {{"served_entities": [{{"entity_name": "main.ml.{name}", "entity_version": "VERSION", "workload_size": "Small", "scale_to_zero_enabled": true}}]}}}}'

## Kubernetes with KServe (needs kubectl, and the Docker image in a REGISTRY; https://kserve.github.io/website/docs/model-serving/predictive-inference/frameworks)

    echo '{{"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {{"name": "{name}"}}, "spec": {{"predictor": {{"containers": [{{"name": "kserve-container", "image": "REGISTRY/{name}:{number}", "ports": [{{"containerPort": 8080}}]}}]}}}}}}' | kubectl apply -f -
"""  # noqa: E501


def deployment_guide(name, version):
    """Return the commands that deploy a version, as Markdown. They are for a POSIX shell."""
    store = shlex.quote(hide_secrets(mlflow.get_tracking_uri()))
    return GUIDE.format(name=name, number=version, store=store)


def predict_with_production(name, test, trusted_types):
    """Return rows of the hold-out, their class, and what the version in production predicts."""
    print("Predicting rows of the hold-out with the version in production\n", flush=True)
    model = load_checked(f"models:/{name}@production", test.X.columns, trusted_types)
    rows = test.X.head()
    return rows.iloc[:, :3].assign(actual=test.y.head(), predicted=model.predict(rows))


# The two other commands: roll back, and look back.


def roll_back(experiment_id, name, to):
    """Put an earlier version back into production: `to` is its number, or "previous".

    A second rollback to "previous" undoes the first. A rollback skips the gate. Raises
    UserError if the version is in production already, or has never been.
    """
    aliases = get_aliases(name)
    current = aliases.get("production")
    target = previous_version(name, aliases) if to == "previous" else to
    if current is None:
        raise UserError(f"{name} has no version in production to roll back from")
    if target is None:
        raise UserError(f"{name} has no previous version to roll back to")
    found = mlflow.MlflowClient().get_model_version(name, target)
    target = str(found.version)  # as MLflow writes it: 2 for 02
    if target == current:
        raise UserError(f"version {target} of {name} is already in production")
    if to != "previous" and "was_in_production" not in found.tags:
        raise UserError(f"version {target} of {name} was never in production")

    with mlflow.start_run(run_name="rollback"):
        mlflow.set_tags({"registered_model": name, "version": target, "champion": current})
        with one_promotion_at_a_time(experiment_id, name):
            promote(name, target, replaces=current, outcome="rolled back")
    print(f"Rolled {name} back from version {current} to version {target}")


def previous_version(name, aliases):
    """Return the version that was in production before the present one, or None."""
    version = aliases.get("previous")
    if version is not None and version == aliases.get("production"):
        # A promotion was killed before it moved `production`.
        version = mlflow.MlflowClient().get_model_version(name, version).tags.get("replaces")
    return version


def print_history(experiment_id, name):
    """Print who promoted or rolled back which version, when, and what was refused."""
    runs = mlflow.search_runs(
        [experiment_id],
        f"tags.registered_model = '{name}'",
        order_by=["attributes.start_time ASC"],
    )
    if runs.empty:
        raise UserError(f"{name} was never deployed from this store")
    table = pd.DataFrame(
        {
            "when": runs["start_time"].dt.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "who": runs["tags.mlflow.user"],
            "what": runs["tags.outcome"].fillna("unfinished"),
            "version": runs["tags.version"],
            "champion": runs["tags.champion"],
            "run": runs["run_id"],
        }
    )
    print(table.to_string(index=False))


# Helpers: move the aliases, and check a model before it is loaded.


def get_aliases(name):
    """Return the aliases of a registered model and the versions that they point at."""
    # A search, because a get raises an error if there is no such model.
    found = mlflow.search_registered_models(filter_string=f"name = '{name}'")
    if not found:
        return {}
    return {alias: str(version) for alias, version in found[0].aliases.items()}


def set_alias(name, alias, version):
    """Point an alias at a version."""
    client = mlflow.MlflowClient()
    try:
        client.set_registered_model_alias(name, alias, version)
    except mlflow.MlflowException:
        # Two deployments may make this alias at the same moment: one of them gets an error,
        # but only once.
        client.set_registered_model_alias(name, alias, version)


class UnusableModel(UserError):
    """A model that could run code, is broken, or does not fit the data."""


def check_logged_model(model_uri, train, trusted_types):
    """Return the model ID of a logged model that may be deployed.

    Raises UserError if it may not be loaded, and Refused if it was trained on other rows than
    these: the hold-out may be among them, and its score would be too good.
    """
    model = load_checked(model_uri, train.X.columns, trusted_types)
    check_predictions(model, model_uri, train)
    model_id = model.model_id
    logged = mlflow.get_logged_model(model_id)  # raises an error if this store does not have it
    # This ID is from the model's own files, which could name another model. So compare it
    # with the URI, which holds a model ID (models:/m-…) or the ID of its run (runs:/…).
    if model_uri.startswith(("models:/m-", "runs:/")):
        id_in_uri = model_uri.split("/")[1]
        if id_in_uri not in (model_id, logged.source_run_id):
            raise UserError(f"{model_uri} has the ID of another model, {model_id}")
    if not training_digests(model_id):
        print("Note: the model's training rows are unknown; if it has seen the hold-out, its score")
        print("      is too good", flush=True)
    if trained_on_other_rows(model_id, train):
        raise Refused(f"{model_uri} was trained on other rows, perhaps on the hold-out")
    return model_id


def check_predictions(model, model_uri, train):
    """Raise UnusableModel unless a model predicts, and only classes of the training rows."""
    try:
        predicted = set(model.predict(train.X.head()))
    except Exception as error:
        raise UnusableModel(f"{model_uri} does not predict: {error}") from error
    others = predicted - set(train.y)
    if others:
        raise UnusableModel(
            f"{model_uri} predicts {others.pop()!r}, which is not one of the classes"
        )


def load_checked(model_uri, columns, trusted_types):
    """Fetch a model, check the copy, and load that same copy.

    Raises UnusableModel if it could run code, cannot be loaded, or takes other columns.
    """
    check_skops()
    with TemporaryDirectory() as folder:
        path = fetch_model(model_uri, folder)
        try:
            reason = why_unsafe(path, trusted_types)
            if reason:
                raise UnusableModel(f"{model_uri} could run code: {reason}")
            info = Model.load(path)
            names = info.signature.inputs.input_names() if info.signature else []
            if names != list(columns):
                raise UnusableModel(f"{model_uri} takes other columns than the data has")
            if info.flavors["python_function"].get("predict_fn", "predict") != "predict":
                raise UnusableModel(f"{model_uri} does not predict classes")
            return mlflow.pyfunc.load_model(str(path))
        except UserError:
            raise
        except Exception as error:
            # A broken or forged file can raise anything.
            raise UnusableModel(f"{model_uri} cannot be loaded: {error}") from error


def check_skops():
    """Raise UserError if skops is older than 0.14, the oldest release that is tested here.

    Releases before 0.12 can run code from a file that they load (CVE-2025-54412, -54413).
    """
    major, minor = metadata.version("skops").split(".")[:2]
    if (int(major), int(minor)) < (0, 14):
        raise UserError("skops is older than 0.14; run: pip install --upgrade skops")


def fetch_model(model_uri, folder):
    """Download a model into a folder, and return its path. Raises UserError if that fails."""
    try:
        path = Path(mlflow.artifacts.download_artifacts(model_uri, dst_path=folder))
    except Exception as error:
        raise UserError(f"cannot fetch {model_uri}: {error}") from error
    if not (path / "MLmodel").exists():
        raise UserError(f"cannot fetch {model_uri}: its files are gone")
    return path


def trained_on_other_rows(model_id, train):
    """Return True if the store knows that a model was trained on other rows than these."""
    digests = training_digests(model_id)
    return bool(digests) and digests != {train.dataset.digest}


def training_digests(model_id):
    """Return the digests of the data sets that a model was trained on; none if unknown."""
    if model_id is None:  # it was saved, but not logged
        return set()
    try:
        run_id = mlflow.get_logged_model(model_id).source_run_id
        if run_id is None:  # it was logged outside of a run
            return set()
        run = mlflow.get_run(run_id)
    except mlflow.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # it was deleted
            return set()
        raise
    # The context is "training" from log_rows, and "train" from MLflow's autologging.
    return {
        dataset_input.dataset.digest
        for dataset_input in run.inputs.dataset_inputs
        if {"training", "train"} & {tag.value for tag in dataset_input.tags}
    }


# What a model of these scripts consists of. Anything else makes a model unusable.
MODEL_FILES = {
    "MLmodel",
    "conda.yaml",
    "input_example.json",
    "model.skops",
    "python_env.yaml",
    "registered_model_meta",
    "requirements.txt",
    "serving_input_example.json",
}
FLAVORS = {
    "sklearn": {"pickled_model": "model.skops", "serialization_format": "skops"},
    "python_function": {
        "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
        "loader_module": "mlflow.sklearn",
        "model_path": "model.skops",
    },
}
# Settings of a flavor that may have any value, or that have a check of their own.
FREE_SETTINGS = {"sklearn_version", "skops_trusted_types", "python_version", "predict_fn"}

# The packages that a server may install for a model. Any other could run code of its own.
PACKAGES = (
    "mlflow|scikit-learn|skops|pandas|numpy|scipy|joblib|threadpoolctl|cloudpickle|psutil"
    "|python|pip|setuptools|wheel"
)
# What a line of the files that list them may be: a package, a key of the YAML, or
# "-r requirements.txt". Any index, address, path or other option of pip is refused.
ENVIRONMENT_LINE = re.compile(
    rf"""
    (\s*-\ )?
    ( ({PACKAGES}) ((==|<=|=)[\w.]+)?
    | python:\ '?\d[\w.+]*'?
    | name:\ [\w-]+
    | channels: | conda-forge | dependencies: | build_dependencies: | pip:
    | -r\ requirements\.txt
    )?""",
    re.VERBOSE,
)


def why_unsafe(path, trusted_types):
    """Return why the model in a folder may not be loaded or served, or None if it may."""
    for file in path.rglob("*"):
        if file.relative_to(path).as_posix() not in MODEL_FILES or file.is_symlink():
            return f"it has the file {file.name}"

    flavors = Model.load(path).flavors
    if set(flavors) != set(FLAVORS):
        return f"it has the flavors {', '.join(flavors)}"
    for name, flavor in flavors.items():
        # MLflow writes unused settings as null or as an empty list.
        settings = {k: v for k, v in flavor.items() if v and k not in FREE_SETTINGS}
        python_version = flavor.get("python_version", "3")
        if settings != FLAVORS[name] or not re.fullmatch(r"\d[\w.+]*", python_version):
            return f"its flavor {name} is not that of a skops file"
    # MLflow trusts the types that a model itself names.
    other_types = set(flavors["sklearn"].get("skops_trusted_types") or []) - set(trusted_types)
    if other_types:
        return f"it has the types {', '.join(other_types)}"

    for name in ("requirements.txt", "conda.yaml", "python_env.yaml"):
        for line in (path / name).read_text().splitlines():
            if not ENVIRONMENT_LINE.fullmatch(line):
                return f"{name} has the line {line!r}"
    return None


# The rest is the same in all three scripts, so you need to read it only once. It loads the
# rows, logs the model, opens the store, and turns errors and Ctrl-C into exit codes.


class Rows(NamedTuple):
    """Rows of a table, and the MLflow data set that describes them."""

    X: pd.DataFrame  # the features
    y: pd.Series  # the classes, as text
    dataset: mlflow.entities.Dataset


def load_data(csv=None, target="diagnosis", test_size=0.2, seed=42):
    """Load a table and split it into training rows and hold-out rows, stratified by class.

    The table is a CSV file with a header, or scikit-learn's breast cancer data. Rows without
    a class are left out. Numbers and true/false become floats, which can be missing; text
    stays text. Returns two Rows. Raises UserError if the table or its target cannot be used.

    The split is random, which is right only for rows that do not depend on each other.
    """
    name = table_name(csv)
    table = read_table(csv)
    if target not in table or len(table.columns) < 2:
        columns = ", ".join(repr(column) for column in table)
        raise UserError(
            f"{name} needs a column {target!r} (--target) and others beside it, but has {columns}"
        )

    # Classes are text, and so are predictions. convert_dtypes() keeps class 1 from becoming
    # "1.0" in a column with gaps. scikit-learn is faster with objects than with pandas' text.
    labels = table[target].dropna().convert_dtypes().astype(str).astype(object)
    features = table.drop(columns=target).loc[labels.index]
    features = features.apply(lambda column: column.astype("float64", errors="ignore"))
    print(f"{name}: {len(labels)} of {len(table)} rows have a {target!r}", flush=True)
    if len(labels) < len(table):
        point_out_missing_classes(csv, table[target])
    check_labels(labels)
    check_features(features)

    parts = train_test_split(
        features, labels, test_size=test_size, stratify=labels, random_state=seed
    )
    X_train, X_test, y_train, y_test = parts
    return make_rows(X_train, y_train, f"{name}-train"), make_rows(X_test, y_test, f"{name}-test")


def table_name(csv):
    """Return a short name for a CSV file, or for the breast cancer data if it is None."""
    return "breast-cancer" if csv is None else to_name(Path(csv).stem)


def to_name(text):
    """Return a text as a name for MLflow: its words in lower case, joined by hyphens."""
    words = re.findall("[a-z0-9]+", text.lower())
    return "-".join(words) or "table"


def read_table(csv):
    """Return a CSV file, or the breast cancer data if it is None, as a DataFrame."""
    if csv is None:
        data = load_breast_cancer(as_frame=True)
        return data.data.assign(diagnosis=data.target_names[data.target])
    try:
        return pd.read_csv(csv, low_memory=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {csv}: {error}") from error


def point_out_missing_classes(csv, labels):
    """Print words that pandas takes for missing, because one may be meant as a class."""
    if csv is None or not Path(csv).is_file():
        return
    text = pd.read_csv(csv, dtype=str, keep_default_na=False)[labels.name]
    for word in sorted(set(text[labels.isna().to_numpy()]) - {""}):
        print(f"Note: {word!r} counts as a missing {labels.name!r}; if it is a class, rename it")


def check_labels(labels, min_rows=7):
    """Raise UserError unless there are two classes or more, each of `min_rows` rows or more.

    Of seven rows, five or more are in the training part: one for each of five folds.
    """
    counts = labels.value_counts()
    if len(counts) < 2 or counts.min() < min_rows:
        raise UserError(
            f"{labels.name!r} needs 2 or more classes of {min_rows} or more rows each, "
            f"but the rarest have {counts.tail().to_dict()}"
        )


def check_features(features):
    """Raise UserError if a number is infinite. Point out columns that may identify a row."""
    numbers = features.select_dtypes("number")
    infinite = numbers.columns[np.isinf(numbers).any()]
    if len(infinite):
        raise UserError(f"column {infinite[0]!r} has infinite numbers: leave those cells empty")
    for column in features:
        values = features[column].dropna()
        if column in numbers:
            identifies = values.is_unique and (values % 1 == 0).all()
        else:
            identifies = values.nunique() > 0.9 * len(values)
        if len(values) > 20 and identifies:
            print(f"Note: {column!r} differs in nearly every row; if it identifies rows, drop it")


def make_rows(X, y, name):
    """Return Rows with an MLflow data set of this name."""
    quieten_mlflow()
    table = pd.concat([X, y], axis="columns")
    # MLflow's own digest leaves out rows after the first 10,000, and text columns with gaps.
    row_hashes = pd.util.hash_pandas_object(table).to_numpy()
    content = str(list(table)).encode() + row_hashes.tobytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    return Rows(X, y, mlflow.data.from_pandas(table, targets=y.name, name=name, digest=digest))


def add_preprocessing(model, X):
    """Return a pipeline of the model that takes raw rows with the columns of X.

    A missing number becomes the mean of its column; then all numbers are scaled. Missing text
    is a category of its own. A text column becomes up to 20 one-hot columns: where there
    are more values, the rarest share one. Values not seen in training become all zeros.
    """
    numbers = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler())
    constant = {"strategy": "constant", "keep_empty_features": True}
    text = make_pipeline(
        # A gap is NaN in a table, and None in a request as JSON.
        SimpleImputer(missing_values=np.nan, **constant),
        SimpleImputer(missing_values=None, **constant),
        OneHotEncoder(handle_unknown="ignore", max_categories=20, sparse_output=False),
    )
    columns = make_column_transformer(
        (numbers, list(X.select_dtypes("number"))),
        (text, list(X.select_dtypes(exclude="number"))),
    )
    return make_pipeline(columns, model)


def log_rows(**rows):
    """Log data sets as inputs of the active run, as in log_rows(training=train, testing=test)."""
    inputs = {
        "datasets": [part.dataset for part in rows.values()],
        "contexts": list(rows),
        "tags_list": [None] * len(rows),
    }
    try:
        mlflow.log_inputs(**inputs)
    except mlflow.MlflowException:
        # Another process has logged the same new rows at the same moment, and MLflow has
        # refused to store them twice. They are stored now, so a second call finds them.
        mlflow.log_inputs(**inputs)


def log_model(model, X, trusted_types):
    """Log a fitted model to the active run, ready to be served, and return its model ID.

    X are the rows that it was trained on. The first five become its input example. If the
    pipeline uses other packages, add them to `packages`, and to PACKAGES in
    production_deployment.py, which refuses all others.
    """
    packages = ["mlflow", "scikit-learn", "skops", "pandas", "numpy", "scipy"]
    logged = mlflow.sklearn.log_model(
        model,
        name="model",
        # A pickle can run any code when it is loaded. Skops loads the types that it knows,
        # and those that are named here.
        serialization_format="skops",
        skops_trusted_types=trusted_types,
        signature=mlflow.models.infer_signature(X, model.predict(X.head())),
        input_example=X.head(),
        pip_requirements=[f"{package}=={metadata.version(package)}" for package in packages],
    )
    return logged.model_id


def open_store(experiment):
    """Select an experiment in the store of MLFLOW_TRACKING_URI, or in mlflow.db in this folder.

    Store and experiment are made if they do not exist. Returns the ID of the experiment.
    Raises UserError if the store cannot be opened.
    """
    for name in ("MLFLOW_RUN_ID", "MLFLOW_REGISTRY_URI"):
        if os.environ.get(name):
            raise UserError(f"unset {name}: this script selects its runs and its registry itself")
    if not mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri(f"sqlite:///{Path('mlflow.db').resolve()}")
    quieten_mlflow()

    uri = mlflow.get_tracking_uri()
    # Later calls are retried for a minute, as a server may restart. Those below are not.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    try:
        with impatient_requests(), one_process_at_a_time(uri):
            connect_once(uri)
            mlflow.set_experiment(experiment)
            # Twice: if another process makes it at the same moment, the first call returns
            # it, but does not select it.
            return mlflow.set_experiment(experiment).experiment_id
    except Exception as error:
        message = f"cannot open the store {uri} (down, locked, full, or a wrong login?): {error}"
        raise UserError(message) from error


def quieten_mlflow():
    """Leave warnings and errors on stderr, but no messages about progress."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # This one logs the errors that it also raises.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # This one warns if there is no pip, as in the environments that uv makes.
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
    # MLflow looks for the commit of a script. Where git is missing, it prints much advice.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@contextmanager
def impatient_requests():
    """Let requests to a server that does not answer fail after seconds, not minutes."""
    settings = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "PGCONNECT_TIMEOUT": "5",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def connect_once(uri):
    """Raise an error if the store is a database server that cannot be reached.

    MLflow itself would try for 100 seconds, in silence.
    """
    if uri.startswith(("postgresql", "mysql", "mssql")):
        sqlalchemy.create_engine(uri).connect().close()


@contextmanager
def one_process_at_a_time(uri):
    """Let one process make the tables of a new SQLite store, while others wait for it.

    The lock is an SQLite database of its own. That works on every system, and if the process
    ends, so does the lock.
    """
    if not uri.startswith("sqlite:///"):
        yield
        return
    lock = sqlalchemy.make_url(uri).database + ".lock"
    with closing(sqlite3.connect(lock, timeout=60)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


def where_to_look(experiment_id, order_by="attributes.start_time"):
    """Return how to open the runs of an experiment in the MLflow UI, the highest first."""
    uri = mlflow.get_tracking_uri()
    page = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    page += f"&orderByKey={quote(order_by)}&orderByAsc=false"
    if uri.startswith("http"):
        return f"Look:  {hide_secrets(uri)}/{page}"
    command = shlex.join(["mlflow", "ui", "--backend-store-uri", hide_secrets(uri)])
    return f"Look:  {command}\n       then open http://127.0.0.1:5000/{page}"


def command_line(script, *options, args):
    """Return the command that starts a script of this folder on the same data and metric."""
    path = Path(sys.argv[0]).with_name(script)
    # A notebook's argv[0] is a file of Jupyter, with no script beside it.
    command = ["python", str(path if path.is_file() else script), *options]
    if args.csv is not None:
        command += ["--csv", args.csv, "--target", args.target]
    if args.metric != "accuracy":
        command += ["--metric", args.metric]
    return shlex.join(command)


def hide_secrets(uri):
    """Return the address of a store without its user, password, token and options."""
    scheme, mark, rest = uri.partition("://")
    if not mark or scheme == "sqlite":
        return uri
    _, at, place = rest.rpartition("@")
    place = place.partition("?")[0]  # only now, as a password may contain a "?"
    return f"{scheme}://USER:PASSWORD@{place}" if at else f"{scheme}://{place}"


def run_as_program(main):
    """Run `main` and return an exit code; errors that the user can fix become one line on stderr.

    0: done. 1: refused. 2: bad input, or a store that fails. 130: Ctrl-C. An unexpected error
    keeps its traceback, and Python then exits with 1, too.
    """
    signal.signal(signal.SIGINT, interrupt_after_mlflow_call)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # "?" for a letter that the terminal cannot show
    try:
        main()
        return 0
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # already stopping
        message = str(error) or "by Ctrl-C"
        code = 130
    except UserError as error:
        message = str(error)
        code = error.exit_code
    except (OSError, mlflow.MlflowException) as error:
        # The cause names the trouble, such as a full disk, better than MLflow's own text.
        message = str(error.__cause__ or error)
        code = 2
    uri = mlflow.get_tracking_uri()
    message = message.replace(uri, hide_secrets(uri))
    print("Stopped:", message.partition("\n")[0], file=sys.stderr)
    return code


def interrupt_after_mlflow_call(signal_number, frame, deadline=None):
    """Let Ctrl-C stop the program, but only after a call of MLflow that is under way.

    Otherwise, a write that is cut short leaves a run RUNNING, or the database locked. After
    half a minute, it stops all the same: a server may be unreachable. Functions that you copy
    from this script do not need it.
    """
    deadline = deadline or time.monotonic() + 30
    modules = [one.f_globals.get("__name__", "") for one, _ in traceback.walk_stack(frame)]
    in_mlflow = any(module.split(".")[0] == "mlflow" for module in modules)
    if not in_mlflow or time.monotonic() >= deadline:
        raise KeyboardInterrupt
    again = partial(interrupt_after_mlflow_call, deadline=deadline)
    signal.signal(signal_number, again)
    retry = threading.Timer(0.05, signal.raise_signal, [signal_number])
    retry.daemon = True
    retry.start()


if __name__ == "__main__":
    sys.exit(run_as_program(main))
