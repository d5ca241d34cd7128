"""Take a model to production with MLflow: register, stage, validate, promote, predict, roll back.

A scaled logistic regression is trained on scikit-learn's breast cancer data and registered (with
--model-uri: any logged scikit-learn model). The new version gets the alias `staging`. It is loaded
and has to pass a gate on the hold-out, beside the version that is in production. Only then does the
alias `production` move to it.

    python production_deployment.py
    python production_deployment.py --model-uri runs:/RUN_ID/model
    python production_deployment.py --csv customers.csv --target churned --metric f1
    python production_deployment.py --rollback
    python production_deployment.py --history

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment production-deployment
    └── deployment          figures of the gate, gate.png, deployment_guide.md, perhaps a `model`
    registered model breast-cancer-classifier
    └── version 1, 2, …     with its verdict; aliases staging, production and previous

Exit code 0: promoted, or rolled back. 1: refused. 2: bad input, or a store that fails.
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
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import closing, contextmanager, redirect_stderr
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.parse import quote, unquote

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
SEED = 42  # of the split
TEST_SIZE = 0.2  # share of the rows that the gate judges on

TOLERANCE = 0.02  # how much lower than production's a score may be

# The limits that a version has to keep to be promoted, on the figures that `main` collects.
GATE = {
    # The score on the hold-out; for your own data, --min-score.
    "score": MetricThreshold(threshold=0.93, greater_is_better=True),
    # What it gains on the answer that is most frequent.
    "gained": MetricThreshold(threshold=0.01, greater_is_better=True),
    # What it loses to production, and the probability that it loses more than the tolerance.
    "lost": MetricThreshold(threshold=TOLERANCE, greater_is_better=False),
    "p_lost": MetricThreshold(threshold=0.2, greater_is_better=False),
    # What it loses to the best score of all that have been in production: small losses add up.
    "lost_to_best": MetricThreshold(threshold=TOLERANCE, greater_is_better=False),
    # For a request of one row, median.
    "latency_ms": MetricThreshold(threshold=50, greater_is_better=False),
    # 1 for yes, 0 for no.
    "answers_its_example": MetricThreshold(threshold=1, greater_is_better=True),
    "refuses_a_missing_column": MetricThreshold(threshold=1, greater_is_better=True),
}

# What --metric offers: functions of the true and the predicted classes. The greater score is the
# better one, everywhere: an error would stand here as its negative, as in scikit-learn's scorers.
METRICS = {
    "accuracy": accuracy_score,
    "balanced_accuracy": balanced_accuracy_score,
    "f1": partial(f1_score, average="macro", zero_division=0),
    "precision": partial(precision_score, average="macro", zero_division=0),
    "recall": partial(recall_score, average="macro", zero_division=0),
}

# Types that skops does not know, and may load all the same: they run no code.
TRUSTED = [
    "numpy.dtype",
    "sklearn.tree._tree.Tree",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
]


class UserError(Exception):
    """Something that the user can mend. The program ends in one line, without a traceback."""

    exit_code = 2


class Refused(UserError):
    """Nothing is good enough to go on with."""

    exit_code = 1


def main(argv=None):
    args = parse_args(argv)
    train, test = load_data(args.csv, args.target, TEST_SIZE, SEED)
    experiment_id = open_store(EXPERIMENT)
    name = train.dataset.name.removesuffix("-train") + "-classifier"
    if args.history:
        print_history(experiment_id, name)
        return
    if args.rollback is not None:
        rollback(experiment_id, name, args.rollback)
        return

    gate = set_min_score(GATE, args.min_score, args.csv)
    champion = load_champion(name, train, TRUSTED)
    model_id = find_logged_model(args.model_uri, train, TRUSTED)

    with mlflow.start_run(run_name="deployment"):
        log_rows(training=train, testing=test)
        if model_id is None:
            model_id = train_model(train, TRUSTED)
        version = register(name, model_id, train)

        # What will be served is what is judged: the version, loaded from the registry.
        candidate = load_checked(f"models:/{name}/{version}", train.X.columns, TRUSTED)
        score = METRICS[args.metric]
        figures = evaluate(candidate, train, test, score)
        figures |= compare(candidate, champion.model, test, score, TOLERANCE, SEED)
        figures |= compare_with_history(experiment_id, name, args.metric, test, figures["score"])
        log_figures(figures, model_id, args.metric, test)
        missed = missed_limits(figures, gate)
        record_verdict(name, version, champion, candidate, figures, gate, missed, test)
        if missed:
            raise Refused(f"version {version} misses a limit. {' '.join(missed)}")

        with one_promotion_at_a_time(experiment_id, name):
            promote(name, version, replaces=champion.version)
        guide = deployment_guide(name, version)
        mlflow.log_text(guide, "deployment_guide.md")

    print(predict_with_production(name, test, TRUSTED).to_string(index=False))
    print(f"\n{guide}")
    print(where_to_look(experiment_id))
    print_undo(champion, args)


def parse_args(argv):
    """Return the options of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--csv", metavar="FILE", help="learn from this table instead")
    add("--target", default="diagnosis", help="its column that holds the classes")
    add("--metric", choices=METRICS, default="accuracy", help="what the gate's score is")
    add("--model-uri", help="deploy this logged model: models:/m-… or runs:/RUN_ID/model")
    add("--min-score", type=float, help="the least score that the gate asks for")
    add("--history", action="store_true", help="print what was deployed and rolled back, and end")
    add(
        "--rollback",
        nargs="?",
        const="previous",
        metavar="VERSION",
        help="put the previous version back into production, or this one that was there before",
    )
    return parser.parse_args(argv)


def set_min_score(gate, min_score, csv):
    """Return the gate with another least score.

    The least score of GATE is for the breast cancer data. A version for other data is held to
    the baseline and to production, unless a least score is given for it.
    """
    if min_score is not None:
        limit = MetricThreshold(threshold=min_score, greater_is_better=True)
        return {**gate, "score": limit}
    if csv is None:
        return gate
    print("The gate asks for no least score; --min-score sets one", flush=True)
    return {name: limit for name, limit in gate.items() if name != "score"}


class Champion(NamedTuple):
    """The version in production. Both are None if there is none."""

    version: str | None
    model: mlflow.pyfunc.PyFuncModel | None  # None as well if it may not be loaded


def load_champion(name, train, trusted_types):
    """Return the Champion of a registered model.

    One that may not be loaded, such as a pickle, must not stand in the way of a better one: it is
    pointed out, and nothing is compared with it.
    """
    number = get_aliases(name).get("production")
    if number is None:
        return Champion(None, None)
    try:
        model = load_checked(f"models:/{name}/{number}", train.X.columns, trusted_types)
    except UnsafeModel as error:
        print(f"Note: nothing is compared with production, because {error}")
        return Champion(number, None)
    if trained_on_other_rows(model.model_id, train):
        print(f"Note: version {number} in production may have seen these rows in its training")
    return Champion(number, model)


def get_aliases(name):
    """Return the aliases of a registered model and the versions that they point at."""
    found = mlflow.search_registered_models(filter_string=f"name = '{name}'")
    return {alias: str(number) for alias, number in found[0].aliases.items()} if found else {}


def find_logged_model(model_uri, train, trusted_types):
    """Return the ID of a logged model, after a check that it may be deployed; None for None.

    Raises UserError if it may not be loaded or is in no store, and Refused if it was trained on
    other rows than these: they may be those of the hold-out, and its score would be too good.
    """
    if model_uri is None:
        return None
    model_id = mlflow.models.get_model_info(model_uri).model_id
    load_checked(f"models:/{model_id}", train.X.columns, trusted_types)
    if not training_digests(model_id):
        print("Note: the store does not know which rows the model was trained on", flush=True)
    if trained_on_other_rows(model_id, train):
        raise Refused(f"{model_uri} was trained on other rows, and may have seen the hold-out")
    return model_id


def trained_on_other_rows(model_id, train):
    """Return True if the store knows that a model was trained on other rows than these."""
    digests = training_digests(model_id)
    return bool(digests) and digests != {train.dataset.digest}


def training_digests(model_id):
    """Return the digests of the data sets that a model was trained on, by its run in the store."""
    run = mlflow.get_run(mlflow.get_logged_model(model_id).source_run_id)
    return {
        dataset_input.dataset.digest
        for dataset_input in run.inputs.dataset_inputs
        if "training" in [tag.value for tag in dataset_input.tags]
    }


def train_model(train, trusted_types):
    """Fit a logistic regression on the training rows, log it, and return its model ID."""
    print("Train a model and log it", flush=True)
    model = add_preprocessing(LogisticRegression(max_iter=1000), train.X)
    return log_model(model.fit(train.X, train.y), train.X, trusted_types)


def register(name, model_id, train):
    """Register a logged model as a new version with the alias `staging`, and return its number."""
    print("Register it as a new version with the alias `staging`", flush=True)
    with redirect_stderr(sys.stdout):  # MLflow reports success on stderr
        registered = mlflow.register_model(f"models:/{model_id}", name)
    set_alias(name, "staging", registered.version)
    description = (
        f"Predicts `{train.y.name}`: {', '.join(sorted(train.y.unique()))}.\n\n"
        f"Load it with `mlflow.pyfunc.load_model('models:/{name}@production')`.\n\n"
        f"It takes these columns: {', '.join(train.X.columns)}."
    )
    mlflow.MlflowClient().update_registered_model(name, description)
    return str(registered.version)


def set_alias(name, alias, number):
    """Point an alias at a version."""
    client = mlflow.MlflowClient()
    try:
        client.set_registered_model_alias(name, alias, number)
    except mlflow.MlflowException:
        # Another deployment has made this alias at the same moment. Now it can be moved.
        client.set_registered_model_alias(name, alias, number)


class UnsafeModel(UserError):
    """A model that could run code when it is loaded or served."""


def load_checked(model_uri, columns, trusted_types):
    """Fetch a model, check the copy, and load that same copy.

    Raises UnsafeModel if it could run code, and UserError if it does not predict a class from
    these columns. A damaged file of trees can still crash the process: their indices are not
    checked when they are loaded (skops issue 535).
    """
    with TemporaryDirectory() as folder:
        path = Path(mlflow.artifacts.download_artifacts(model_uri, dst_path=folder))
        reason = why_unsafe(path, trusted_types)
        if reason:
            raise UnsafeModel(f"{model_uri} could run code: {reason}")
        info = Model.load(path)
        names = info.signature.inputs.input_names() if info.signature else []
        answers = info.flavors["python_function"].get("predict_fn", "predict")
        if names != list(columns) or answers != "predict":
            raise UserError(f"{model_uri} does not predict classes from the columns of the data")
        return mlflow.pyfunc.load_model(str(path))


# What a model of these scripts consists of. Everything else is refused.
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
FREE_SETTINGS = {"sklearn_version", "skops_trusted_types", "python_version", "predict_fn"}
# A line of the files that a server installs from: a package and its version, or one of the words
# between them. An index, an address, a path or an option of pip is none of these.
ENVIRONMENT_LINE = re.compile(
    r"(\s*- )?(\w[\w.-]*(==|<=|=)[\w.]+|python: [\d.']+|name: [\w-]+|conda-forge|pip|wheel"
    r"|setuptools|channels:|dependencies:|build_dependencies:|pip:|-r requirements.txt)?"
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
        settings = {key: flavor[key] for key in set(flavor) - FREE_SETTINGS if flavor[key]}
        if settings != FLAVORS[name]:
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


def evaluate(model, train, test, score):
    """Return what is to be known of a loaded model alone, scored on the hold-out.

    score is its score, gained what the score is above that of the most frequent class, latency_ms
    the median time for a request of one row. The last two are 1 for yes and 0 for no.
    """
    print("Load the staged version and evaluate it on the hold-out", flush=True)
    model_score = score(test.y, model.predict(test.X))
    baseline = DummyClassifier().fit(train.X, train.y)
    baseline_score = score(test.y, baseline.predict(test.X))
    return {
        "score": model_score,
        "gained": difference(model_score, baseline_score),
        "latency_ms": median_latency_ms(model, test.X),
        "answers_its_example": float(answers_its_example(model)),
        "refuses_a_missing_column": float(refuses_a_missing_column(model, test.X)),
    }


def compare(candidate, champion, test, score, tolerance, seed):
    """Return what a candidate loses to the champion on the hold-out; nothing if that is None.

    lost is the difference of their scores, p_lost how probable it is to be above the tolerance.
    """
    if champion is None:
        return {"lost": 0.0, "p_lost": 0.0}
    answers = candidate.predict(test.X)
    champion_answers = champion.predict(test.X)
    lost = difference(score(test.y, champion_answers), score(test.y, answers))
    p_lost = probability_of_loss(test.y, answers, champion_answers, score, tolerance, seed)
    return {"lost": lost, "p_lost": p_lost}


def difference(a, b):
    """Return a - b, rounded: 0.98 - 0.96 is 0.020000000000000018, more than a limit of 0.02."""
    return round(a - b, 12)


def probability_of_loss(y, answers, champion_answers, score, tolerance, seed, draws=1000):
    """Return how probable it is that a candidate scores lower than a champion by more than this.

    A paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993): both are
    scored on the same rows, which are drawn anew, with replacement, `draws` times.
    """
    # Numbers are scored faster than text.
    codes, _ = pd.factorize(np.concatenate([y, answers, champion_answers]))
    y, answers, champion_answers = np.split(codes, 3)
    random_rows = np.random.default_rng(seed)
    worse = 0
    for _ in range(draws):
        rows = random_rows.integers(len(y), size=len(y))
        loss = difference(score(y[rows], champion_answers[rows]), score(y[rows], answers[rows]))
        worse += loss > tolerance
    return worse / draws


def median_latency_ms(model, X):
    """Return the median time of a request of one row, in milliseconds."""
    row = X.head(1)
    seconds = timeit.repeat(lambda: model.predict(row), number=1, repeat=50)
    return 1000 * float(np.median(seconds))


def answers_its_example(model):
    """Return True if a loaded model answers the example of a request that was saved with it."""
    try:
        model.predict(model.input_example)
    except (mlflow.MlflowException, ValueError, TypeError):
        return False
    return model.input_example is not None


def refuses_a_missing_column(model, X):
    """Return True if a loaded model refuses rows without one of its columns."""
    try:
        model.predict(X.drop(columns=X.columns[0]))
    except (mlflow.MlflowException, ValueError):
        return True
    return False


def compare_with_history(experiment_id, name, metric, test, score):
    """Return what a score loses to the best one on this hold-out that was ever in production.

    Small losses, each within the tolerance, must not add up.
    """
    promoted = mlflow.search_runs(
        [experiment_id],
        f"tags.registered_model = '{name}' AND tags.outcome = 'promoted'"
        f" AND tags.rows = '{test.dataset.digest}' AND params.metric = '{metric}'",
    )
    if promoted.empty:
        return {"lost_to_best": 0.0}
    return {"lost_to_best": difference(promoted["metrics.score"].max(), score)}


def log_figures(figures, model_id, metric, test):
    """Log the figures to the active run, linked to the model and to the hold-out."""
    mlflow.log_param("metric", metric)
    mlflow.log_metrics(figures, model_id=model_id, dataset=test.dataset)


def missed_limits(figures, gate):
    """Return a line for each limit that the figures miss, as MLflow words it."""
    try:
        mlflow.validate_evaluation_results(gate, EvaluationResult(figures, artifacts={}))
    except mlflow.exceptions.MlflowException as error:
        return str(error).splitlines()
    return []


def record_verdict(name, version, champion, candidate, figures, gate, missed, test):
    """Print the verdict, and write it to the version and to the active run.

    The tags are there to be searched by, the table and the picture to be looked at.
    """
    table = format_gate(figures, gate)
    print(table.to_string(index=False), flush=True)
    verdict = "failed" if missed else "passed"
    compared_with = "none" if champion.model is None else champion.version
    description = (
        f"The gate was {verdict} on {test.dataset.name} (digest {test.dataset.digest}), beside "
        f"version {compared_with} in production.\n\n{to_markdown(table)}"
    )
    client = mlflow.MlflowClient()
    client.update_model_version(name, version, description)
    client.set_model_version_tag(name, version, "validation_status", verdict)
    client.set_model_version_tag(name, version, "compared_with", compared_with)

    mlflow.log_figure(draw_answers(candidate, champion.model, test), "gate.png")
    mlflow.set_tags(
        {
            "registered_model": name,
            "version": version,
            "replaces": champion.version or "none",
            "rows": test.dataset.digest,
            "outcome": "refused" if missed else "passed",
            "mlflow.note.content": description,
        }
    )


def format_gate(figures, gate):
    """Return the figures and their limits as a table of text."""
    rows = []
    for name, limit in gate.items():
        side = "at least" if limit.greater_is_better else "at most"
        margin = figures[name] - limit.threshold
        if not limit.greater_is_better:
            margin = -margin
        rows.append(
            {
                "figure": name,
                "value": f"{figures[name]:.4f}",
                "limit": f"{side} {limit.threshold:g}",
                "margin": f"{margin:+.4f}",
                "verdict": "passed" if margin >= 0 else "missed",
            }
        )
    return pd.DataFrame(rows)


def to_markdown(table):
    """Return a DataFrame of text as a Markdown table."""
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw_answers(candidate, champion, test):
    """Return a figure: the confusion matrices of the candidate and, beside it, the champion."""
    models = {"The candidate": candidate}
    if champion is not None:
        models["The version in production"] = champion
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
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        color = "white" if share > 0.5 else "black"
        text = f"{count}\n{share:.0%}"
        axes.text(column, row, text, ha="center", va="center", color=color)
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="Predicted class", ylabel="True class")
    axes.set_title(title)


@contextmanager
def one_promotion_at_a_time(experiment_id, name, patience=60):
    """Wait until no other run promotes a version of this model, and let others wait for this one.

    The registry has no lock and no compare-and-set (MLflow issue 2169). So a run first writes down
    that it promotes, and then looks whether another one does: of two, at least one sees the other,
    and steps back. Raises UserError after `patience` seconds.
    """
    run_id = mlflow.active_run().info.run_id
    claims = f"tags.promoting = '{name}' AND attributes.status = 'RUNNING'"
    deadline = time.time() + patience
    while True:
        mlflow.set_tags({"promoting": name, "promoting_since": time.time()})
        found = mlflow.search_runs([experiment_id], claims, output_format="list")
        # A run that was killed while it promoted must not stand in the way for ever.
        others = [
            run
            for run in found
            if run.info.run_id != run_id
            and float(run.data.tags["promoting_since"]) > time.time() - patience
        ]
        if not others:
            break
        mlflow.delete_tag("promoting")
        if time.time() > deadline:
            raise UserError(f"run {others[0].info.run_id} is promoting a version of {name}")
        time.sleep(random.uniform(0.1, 1))
    try:
        yield
    finally:
        mlflow.delete_tag("promoting")


def promote(name, version, replaces):
    """Point `production` at a version, and `previous` at the version that it replaces, or None.

    Raises Refused, and moves nothing, if another version than `replaces` is in production.
    """
    current = get_aliases(name).get("production")
    if current != replaces:
        raise Refused(f"version {current} has come into production meanwhile; run this again")
    print(f"Move the alias `production` to version {version}", flush=True)
    client = mlflow.MlflowClient()
    client.set_model_version_tag(name, version, "was_in_production", "yes")
    if replaces is not None:
        # If this process is killed between the two moves, both aliases point at `replaces`. Then
        # the tag of that version still tells what was in production before it.
        client.set_model_version_tag(name, version, "replaces", replaces)
        set_alias(name, "previous", replaces)
    set_alias(name, "production", version)
    mlflow.set_tag("outcome", "promoted")
    set_legacy_stage(name, version)


def set_legacy_stage(name, version):
    """Set the stage Production, for those who still load models:/NAME/Production.

    MLflow has deprecated stages since 2.9, in favour of aliases. Leave this out if nobody does.
    """
    client = mlflow.MlflowClient()
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            client.transition_model_version_stage(
                name, version, "Production", archive_existing_versions=True
            )
    except (AttributeError, mlflow.MlflowException) as error:
        print(f"Note: the alias has moved, but the legacy stage could not be set: {error}")


def rollback(experiment_id, name, to):
    """Put a version that was in production back there: `to` is its number, or "previous".

    A second time, "previous" undoes the first. Raises UserError if there is no such version.
    """
    current = get_aliases(name).get("production")
    target = previous_version(name) if to == "previous" else to
    if current is None or target in (None, current):
        raise UserError(f"{name} has no previous version to roll back to")
    if "was_in_production" not in mlflow.MlflowClient().get_model_version(name, target).tags:
        raise UserError(f"version {target} of {name} was never in production")

    with mlflow.start_run(run_name="rollback"):
        mlflow.set_tags({"registered_model": name, "version": target, "replaces": current})
        with one_promotion_at_a_time(experiment_id, name):
            promote(name, target, replaces=current)
        mlflow.set_tag("outcome", "rolled back")
    print(f"Rolled {name} back from version {current} to version {target}")


def previous_version(name):
    """Return the version that was in production before the present one, or None."""
    aliases = get_aliases(name)
    number = aliases.get("previous")
    if number is not None and number == aliases.get("production"):
        # A promotion was killed before it moved `production`.
        number = mlflow.MlflowClient().get_model_version(name, number).tags.get("replaces")
    return number


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
            "what": runs["tags.outcome"],
            "version": runs["tags.version"],
            "replaces": runs["tags.replaces"],
            "run": runs["run_id"],
        }
    )
    print(table.to_string(index=False))


def predict_with_production(name, test, trusted_types):
    """Return rows of the hold-out, their class, and what the version in production predicts."""
    print("Load the version in production and predict rows of the hold-out\n", flush=True)
    model = load_checked(f"models:/{name}@production", test.X.columns, trusted_types)
    rows = test.X.head()
    return rows.iloc[:, :3].assign(actual=test.y, predicted=model.predict(rows))


def print_undo(champion, args):
    """Print how to put back the version that has just been replaced, if there was one."""
    if champion.version is not None:
        options = [] if args.csv is None else ["--csv", args.csv, "--target", args.target]
        print("Undo: ", shlex.join(["python", sys.argv[0], "--rollback", *options]))


# Indented lines are commands for a shell. The alias `production` is looked up when they are run.
GUIDE = """# Deploy {name} version {number} from this store

    export MLFLOW_TRACKING_URI={store}

## REST API

    mlflow models serve --model-uri models:/{name}@production --env-manager local --host 127.0.0.1 --port 5001

When `curl http://127.0.0.1:5001/ping` answers, export the variable in a second shell too, and send
the example of a request:

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

## Amazon SageMaker (needs boto3, Docker, an AWS role and bucket; https://mlflow.org/docs/latest/ml/deployment)

    mlflow sagemaker build-and-push-container
    mlflow deployments create --target sagemaker:/REGION --name {name} --model-uri models:/{name}/{number} --config execution_role_arn=ROLE --config bucket=BUCKET

## Azure ML (needs az with its ml extension; https://learn.microsoft.com/azure/machine-learning/how-to-deploy-mlflow-models-online-endpoints)

    mlflow artifacts download --artifact-uri models:/{name}/{number} --dst-path model
    az ml model create --name {name} --type mlflow_model --path model
    az ml online-endpoint create --name {name}
    az ml online-deployment create --name v{number} --endpoint-name {name} --model azureml:{name}@latest --instance-type Standard_DS3_v2 --instance-count 1 --all-traffic

## Google Vertex AI (needs gcloud, and the Docker image in a REGISTRY; https://cloud.google.com/sdk/gcloud/reference/ai/models/upload)

    gcloud ai models upload --region REGION --display-name {name} --container-image-uri REGISTRY/{name}:{number} --container-ports 8080 --container-predict-route /invocations --container-health-route /ping
    gcloud ai endpoints create --region REGION --display-name {name}
    gcloud ai endpoints deploy-model ENDPOINT --region REGION --model MODEL --display-name v{number}

## Databricks (needs databricks, and the model in Unity Catalog as main.ml.{name}; https://docs.databricks.com/dev-tools/cli/reference/serving-endpoints-commands)

    databricks serving-endpoints create {name} --json '{{"config": {{"served_entities": [{{"entity_name": "main.ml.{name}", "entity_version": "{number}", "workload_size": "Small", "scale_to_zero_enabled": true}}]}}}}'

## Kubernetes with KServe (needs kubectl, and the Docker image in a REGISTRY; https://kserve.github.io/website/docs/model-serving/predictive-inference/frameworks)

    echo '{{"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {{"name": "{name}"}}, "spec": {{"predictor": {{"containers": [{{"name": "kserve-container", "image": "REGISTRY/{name}:{number}", "ports": [{{"containerPort": 8080}}]}}]}}}}}}' | kubectl apply -f -
"""  # noqa: E501


def deployment_guide(name, version):
    """Return the commands that deploy a version, as Markdown. They are for a POSIX shell."""
    store = shlex.quote(hide_secrets(mlflow.get_tracking_uri()))
    return GUIDE.format(name=name, number=version, store=store)


# The rest is the same in all three scripts, so you need to read it only once:
# rows, model, store, and how a program ends.


class Rows(NamedTuple):
    """Rows of a table, and the MLflow data set that describes them."""

    X: pd.DataFrame  # the features
    y: pd.Series  # the classes, as text
    dataset: mlflow.entities.Dataset


def load_data(csv=None, target="diagnosis", test_size=0.2, seed=42):
    """Load a table and split it into training rows and hold-out rows, stratified by class.

    The table is a CSV file with a header, or scikit-learn's breast cancer data. Rows without a
    class are left out. Numbers and true/false become floats, which can hold gaps; text stays.
    Returns two Rows. Raises UserError if the table cannot be read, or the target not be learned.
    """
    name, table = read_table(csv)
    if target not in table or len(table.columns) < 2:
        columns = ", ".join(repr(column) for column in table)
        raise UserError(f"{name} needs {target!r} and more columns, but has {columns}")

    # As text, a class is the same in the table, in a request and in an answer.
    labels = table[target].dropna().convert_dtypes().astype(str)
    features = table.drop(columns=target).loc[labels.index]
    features = features.apply(lambda column: column.astype("float64", errors="ignore"))
    print(f"{name}: {len(labels)} of {len(table)} rows have a {target!r}", flush=True)
    check_labels(labels)
    check_features(features)

    parts = train_test_split(
        features, labels, test_size=test_size, stratify=labels, random_state=seed
    )
    X_train, X_test, y_train, y_test = parts
    return make_rows(X_train, y_train, f"{name}-train"), make_rows(X_test, y_test, f"{name}-test")


def read_table(csv):
    """Return the name and the DataFrame of a CSV file, or of the breast cancer data if None."""
    if csv is None:
        data = load_breast_cancer(as_frame=True)
        return "breast-cancer", data.data.assign(diagnosis=data.target_names[data.target])
    try:
        table = pd.read_csv(csv, low_memory=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {csv}: {error}") from error
    words = re.findall("[a-z0-9]+", Path(csv).stem.lower())
    return "-".join(words) or "table", table


def check_labels(labels, fewest=7):
    """Raise UserError unless there are two classes or more, each of `fewest` rows or more.

    Of seven rows, five or more are in the training part: one for each of five folds.
    """
    counts = labels.value_counts()
    if len(counts) < 2 or counts.min() < fewest:
        raise UserError(
            f"{labels.name!r} needs 2 or more classes of {fewest} or more rows each, "
            f"but the rarest have {counts.tail().to_dict()}"
        )


def check_features(features):
    """Raise UserError if a number is infinite; point out columns of nearly all different text."""
    numbers = features.select_dtypes("number")
    infinite = numbers.columns[np.isinf(numbers).any()]
    if len(infinite):
        raise UserError(f"column {infinite[0]!r} has infinite numbers: leave them empty")
    for column in features.select_dtypes(exclude="number"):
        different = features[column].nunique()
        if different > 0.9 * features[column].count() > 20:
            print(f"Note: column {column!r} has {different} different texts, which teach little.")


def make_rows(X, y, name):
    """Return Rows with an MLflow data set of this name."""
    table = pd.concat([X, y], axis="columns")
    return Rows(X, y, mlflow.data.from_pandas(table, targets=y.name, name=name))


def add_preprocessing(model, X):
    """Return a pipeline of the model that takes raw rows with the columns of X.

    In a number, a gap becomes the mean of its column; then all numbers are scaled. In text, a gap
    becomes a value of its own. Each of the 20 most frequent values of a column of text becomes a
    column of zeros and ones; a value that was never seen in training is ignored.
    """
    numbers = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler())
    gap_value = {"strategy": "constant", "keep_empty_features": True}
    text = make_pipeline(
        # A gap is NaN in a table, and None in a request as JSON.
        SimpleImputer(missing_values=np.nan, **gap_value),
        SimpleImputer(missing_values=None, **gap_value),
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
        # Another process has logged the same new rows at the same moment, and MLflow has refused
        # to store them twice. They are stored now, so a second call finds them.
        mlflow.log_inputs(**inputs)


def log_model(model, X, trusted_types):
    """Log a fitted model to the active run, ready to be served, and return its model ID.

    X are rows that it was trained on: the first five become its example of a request.
    """
    packages = ["mlflow", "scikit-learn", "skops", "pandas", "numpy", "scipy"]
    logged = mlflow.sklearn.log_model(
        model,
        name="model",
        # A pickle can run any code when it is loaded. Skops loads the types that it knows, and
        # those that are named here.
        serialization_format="skops",
        skops_trusted_types=trusted_types,
        signature=mlflow.models.infer_signature(X, model.predict(X)),
        input_example=X.head(),
        pip_requirements=[f"{package}=={version(package)}" for package in packages],
    )
    return logged.model_id


def open_store(experiment):
    """Select an experiment in the store of MLFLOW_TRACKING_URI, or in mlflow.db in this folder.

    Store and experiment are made if they do not exist. Returns the ID of the experiment. Raises
    UserError if the store cannot be opened.
    """
    for name in ("MLFLOW_RUN_ID", "MLFLOW_REGISTRY_URI"):
        if os.environ.get(name):
            raise UserError(f"unset {name}: this script makes its runs itself, all in one store")
    if not mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri(f"sqlite:///{Path('mlflow.db').resolve()}")
    quieten_mlflow()

    uri = mlflow.get_tracking_uri()
    try:
        with impatient_requests(), one_process_at_a_time(uri):
            return mlflow.set_experiment(experiment).experiment_id
    except Exception as error:
        message = f"start, unlock or free the store {uri}: {error}"
        raise UserError(message) from error


def quieten_mlflow():
    """Leave warnings and errors on stderr, but no messages about progress."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # This one logs the errors that it also raises.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Without git on the machine, MLflow's search for the commit prints a page of advice.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


@contextmanager
def impatient_requests():
    """Let a server that does not answer fail after seconds; later on, wait a minute for it."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    settings = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def one_process_at_a_time(uri):
    """Let one process make the tables of a new SQLite store, while others wait for it."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    lock = unquote(uri.removeprefix("sqlite:///")) + ".lock"
    with closing(sqlite3.connect(lock, timeout=60)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


def where_to_look(experiment_id, order_by="attributes.start_time"):
    """Return the lines that say how to open the runs of an experiment, the greatest first."""
    uri = mlflow.get_tracking_uri()
    page = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    page += f"&orderByKey={quote(order_by)}&orderByAsc=false"
    if uri.startswith("http"):
        return f"Look:  {hide_secrets(uri)}/{page}"
    command = shlex.join(["mlflow", "ui", "--backend-store-uri", hide_secrets(uri)])
    return f"Look:  {command}\n       then open http://127.0.0.1:5000/{page}"


def next_command(script, *options, args):
    """Return the line that says how to go on with another script, on the same data and metric."""
    if args.csv is not None:
        options += ("--csv", args.csv, "--target", args.target)
    if args.metric != "accuracy":
        options += ("--metric", args.metric)
    path = Path(sys.argv[0]).with_name(script)
    return "Next:  " + shlex.join(["python", str(path), *options])


def hide_secrets(uri):
    """Return the address of a store without user, password, token and options."""
    if "://" not in uri or uri.startswith("sqlite:"):
        return uri
    url = sqlalchemy.make_url(uri).set(query={})
    if url.username or url.password:
        url = url.set(username="USER", password="PASSWORD")
    return url.render_as_string(hide_password=False)


def run_as_program(main):
    """Run `main` and return the exit code; print what the user can mend in one line.

    0: done. 1: refused. 2: bad input, or a store that fails. 130: Ctrl-C. An unexpected error
    keeps its traceback.
    """
    signal.signal(signal.SIGINT, interrupt_outside_mlflow)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # "?" for a letter that the terminal cannot show
    try:
        main()
        return 0
    except KeyboardInterrupt as error:
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


def interrupt_outside_mlflow(signal_number, frame):
    """Let Ctrl-C stop the program, but never in the middle of a write of MLflow's.

    Such a write is finished first, so that no run is left RUNNING and no database locked.
    """
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] == "mlflow":
            retry = threading.Timer(0.05, signal.raise_signal, [signal_number])
            retry.daemon = True
            retry.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run_as_program(main))
