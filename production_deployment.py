"""Take a model to production with MLflow: register, stage, validate, promote, predict, roll back.

A scaled logistic regression is trained on scikit-learn's breast cancer data and registered
(or, with --model-uri, a model that one of these scripts has logged). The new version gets the
alias `staging`. It is loaded back, and must pass a gate on the hold-out, where it is also
compared with the version in production. Only then does the alias `production` move to it.
Whoever loads models:/breast-cancer-classifier@production then gets the new version.

    python production_deployment.py
    python production_deployment.py --model-uri runs:/RUN_ID/model
    python production_deployment.py --csv customers.csv --target churned --metric f1
    python production_deployment.py --rollback

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment production-deployment
        run deployment          metrics of the gate, confusion.png, deployment_guide.md, `model`
        run rollback            which version it put back into production
    registered model breast-cancer-classifier
        version 1, 2, …         with its verdict; aliases staging, production and previous

Exit code 0: promoted or rolled back. 1: refused. 2: bad input, or a store that fails.
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
# matplotlib, skops and threadpoolctl come with these.

import logging
import os
import re
import sqlite3
import sys
import timeit
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import closing, redirect_stderr
from functools import partial
from importlib import metadata
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import mlflow
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from mlflow.models import EvaluationResult, MetricThreshold
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    accuracy_score,
    f1_score,
    precision_score,
    recall_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sqlalchemy.exc import SQLAlchemyError
from threadpoolctl import threadpool_limits

EXPERIMENT = "production-deployment"
SEED = 42  # for the bootstrap
TEST_SIZE = 0.2  # share of the rows held out: for the gate

# A version is promoted only if every metric is within its limit.
GATE = {
    # The score on the hold-out minus that of always answering the most frequent class.
    "above_baseline": MetricThreshold(threshold=0.01, greater_is_better=True),
    # The probability that this version is worse than the one in production. A version that is
    # as good is refused at most 5 times of 100, from 100 rows (or IDs) on. One that is worse may
    # pass: how large a loss must be to be found is printed.
    "p_worse_than_production": MetricThreshold(threshold=0.96, greater_is_better=False),
    # The median time of predict() for one row, in this process: without HTTP.
    "latency_ms": MetricThreshold(threshold=50, greater_is_better=False),
}

# The choices of --metric: functions of the true and the predicted classes, and of weights.
# They return more for a better model. Precision, recall and F1 are means over the classes, so
# that each class counts the same.
MACRO = {"average": "macro", "zero_division": 0}
METRICS = {
    "accuracy": accuracy_score,
    "precision": partial(precision_score, **MACRO),
    "recall": partial(recall_score, **MACRO),
    "f1": partial(f1_score, **MACRO),
}

# A server installs these packages, in the versions that are used here.
PACKAGES = ["mlflow", "scikit-learn", "skops", "pandas", "numpy", "scipy"]

# Types that skops loads only if they are named. Loading them runs no code.
TRUSTED = [
    "numpy.dtype",
    "sklearn.compose._column_transformer.make_column_selector",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.tree._tree.Tree",
]


def main(argv=None):
    args = parse_args(argv)
    name = args.name or registered_name(args.csv, args.target)
    if args.rollback is not None:
        open_store(EXPERIMENT)
        roll_back(name, args.rollback)
        return

    train, test = load_data(args.csv, args.target, args.id, TEST_SIZE)
    open_store(EXPERIMENT)
    replaces = get_aliases(name).get("production")  # the number of a version, or None
    production = None  # what that version predicts for the hold-out
    if replaces is None or args.without_comparison:
        others = [model.name for model in mlflow.search_registered_models(max_results=5)]
        print(f"{name} is compared with nothing. Models here, the first five: {others}; see --name")
    else:
        production = predict_with_champion(name, train, test)
    if args.model_uri is not None:
        # Before the run starts, so that a model that is refused here leaves nothing behind.
        load_model(args.model_uri, train.X, train.rule, PACKAGES, TRUSTED)

    with mlflow.start_run(run_name="deployment") as deployment:
        mlflow.log_param("metric", args.metric)
        mlflow.log_input(train.dataset, context="training")
        mlflow.log_input(test.dataset, context="testing")
        version = register(name, args.model_uri or train_model(train))

        print("Judging it as it will be served: loaded from the registry", flush=True)
        candidate = load_model(f"models:/{name}@staging", train.X, train.rule, PACKAGES, TRUSTED)
        baseline = DummyClassifier().fit(train.X, train.y)  # always the most frequent class
        judged = judge({"baseline": baseline, "candidate": candidate}, test.X, test.y)
        if production is not None:
            judged["production"] = production
        metrics = gate_metrics(judged, test.groups, METRICS[args.metric], SEED)
        metrics["latency_ms"] = median_latency_ms(candidate, test.X)
        mlflow.log_metrics(metrics, model_id=candidate.model_id, dataset=test.dataset)
        metrics = mlflow.get_run(deployment.info.run_id).data.metrics  # as they are logged
        mlflow.log_figure(draw_confusion(judged), "confusion.png")

        if get_aliases(name)["staging"] != version:
            raise UserError("another deployment has staged a version since; run this again")
        gate = choose_gate(GATE, "production" in judged, args.min_score)
        missed = missed_limits(metrics, gate)
        compared_with = f"version {replaces}" if "production" in judged else "nothing"
        title = f"Version {version} by {args.metric}, compared with {compared_with}"
        report = describe_verdict(title, metrics, gate, missed, len(judged))
        log_verdict(name, version, compared_with, report, missed)
        print(f"\n{report}\n", flush=True)
        if missed:
            sys.exit(f"Refused: version {version} stays in staging. {' '.join(missed)}")
        promote(name, version, replaces)
        guide = GUIDE.format(name=name, number=version, store=hide_login(mlflow.get_tracking_uri()))
        mlflow.log_text(guide, "deployment_guide.md")

    print(predict_with_production(name, train, test).to_string(index=False))
    print(f"\n{guide}")
    print(where_to_look(deployment))
    if replaces is not None:
        print(f"Undo:  python production_deployment.py --rollback --name {name}")


def parse_args(argv):
    """Return the options of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--csv", metavar="FILE", help="use this table, not the breast cancer data")
    add("--target", default="diagnosis", help="the column to predict")
    add("--id", metavar="COLUMN", help="keep rows with the same value together")
    add("--metric", choices=METRICS, default="accuracy", help="how the gate scores a model")
    add("--name", help="the registered model; without it, named after the table and the target")
    add("--model-uri", help="deploy this logged model: models:/m-… or runs:/RUN_ID/model")
    add("--min-score", type=float, help="the lowest score that passes the gate")
    add("--without-comparison", action="store_true", help="ignore the version in production")
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
    return f"{table_name(csv)}-{re.sub('[^a-z0-9]+', '-', target.lower())}-classifier"


def predict_with_champion(name, train, test):
    """Return what the version in production predicts for the hold-out.

    Raises UserError if it cannot be compared with, so that it is not replaced by a worse one.
    """
    try:
        champion = load_model(f"models:/{name}@production", train.X, train.rule, PACKAGES, TRUSTED)
        classes = set(champion.get_raw_model().classes_)
        if classes != set(train.y):
            raise UserError(f"the version in production knows other classes: {classes}")
    except UserError as error:
        raise UserError(f"{error}; --without-comparison promotes without it") from error
    return champion.predict(test.X)


def train_model(train):
    """Fit a logistic regression on the training rows, log it, and return its URI."""
    print("Training a model and logging it", flush=True)
    model = add_preprocessing(LogisticRegression(max_iter=1000)).fit(train.X, train.y)
    return log_model(model, train.X, train.rule, PACKAGES, TRUSTED).model_uri


def register(name, model_uri):
    """Register a logged model as a new version with the alias `staging`; return its number."""
    print("Registering it as a new version with the alias `staging`", flush=True)
    with redirect_stderr(sys.stdout):  # MLflow reports success on stderr
        version = str(mlflow.register_model(model_uri, name).version)
    mlflow.MlflowClient().set_registered_model_alias(name, "staging", version)
    return version


def judge(models, X, y):
    """Return a table with a row for each row of X: `actual`, and what each model predicts.

    `models` are fitted models by the name of their column.
    """
    predictions = {name: model.predict(X) for name, model in models.items()}
    return pd.DataFrame({"actual": y, **predictions})


def gate_metrics(judged, groups, score, seed):
    """Return the metrics of a table of predictions: actual, baseline, candidate, production.

    The last may be missing. Rows of the same group belong together. `score` is a function of
    true values, predictions and sample_weight; more is better.
    """
    candidate = score(judged["actual"], judged["candidate"])
    if score(judged["actual"], judged["actual"]) < candidate:
        raise ValueError("the score of a perfect model is lower: of a loss, return the negative")
    baseline = score(judged["actual"], judged["baseline"])
    # Rounded, because 0.98 - 0.96 must be 0.02, and not 0.020000000000000018.
    metrics = {"score": candidate, "above_baseline": round(candidate - baseline, 12)}
    if "production" in judged:
        losses = bootstrap_losses(judged, groups, score, seed)
        production = score(judged["actual"], judged["production"])
        metrics["below_production"] = round(production - candidate, 12)
        metrics["p_worse_than_production"] = float((losses > 0).mean())
        metrics["below_production_se"] = losses.std()
    return metrics


def bootstrap_losses(judged, groups, score, seed, draws=1000):
    """Return how far the candidate is below production in hold-outs drawn from this one.

    A paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993): groups
    of rows are drawn with replacement, and both models are scored on the same ones. The share
    of losses above zero estimates the probability that the candidate is worse.
    """
    # Equal rows of the table are scored once, and weighted by how often they are drawn.
    columns = ["actual", "candidate", "production"]
    kind = judged.groupby(columns).ngroup()
    actual, candidate, production = judged[columns].groupby(kind).first().to_numpy().T
    different, group = np.unique(groups, return_inverse=True)
    n_groups = len(different)
    rng = np.random.default_rng(seed)
    losses = []
    for _ in range(draws):
        times_drawn = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
        weights = np.bincount(kind, weights=times_drawn[group])
        production_score = score(actual, production, sample_weight=weights)
        losses.append(production_score - score(actual, candidate, sample_weight=weights))
    return np.round(losses, 12)


def median_latency_ms(model, X):
    """Return the median time of predict() for one row on one core, in milliseconds."""
    with threadpool_limits(1):
        seconds = timeit.repeat(partial(model.predict, X.head(1)), number=1, repeat=50)
    return 1000 * float(np.median(seconds))


def draw_confusion(judged):
    """Return a figure: the confusion matrices of the candidate and, beside it, of production."""
    names = judged.columns.intersection(["candidate", "production"])
    figure = Figure(figsize=(5 * len(names), 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        ConfusionMatrixDisplay.from_predictions(
            judged["actual"], judged[name], ax=axes, cmap="Blues", colorbar=False
        )
        axes.set_title(name)
    return figure


def choose_gate(gate, is_compared, min_score):
    """Return the limits that apply: if nothing is compared with, none that compares."""
    gate = dict(gate)
    if not is_compared:
        gate.pop("p_worse_than_production", None)
    if min_score is not None:
        gate["score"] = MetricThreshold(threshold=min_score, greater_is_better=True)
    return gate


def missed_limits(metrics, gate):
    """Return a line for each limit that is missed or has no metric, as MLflow words it."""
    try:
        mlflow.validate_evaluation_results(gate, EvaluationResult(metrics, artifacts={}))
    except mlflow.MlflowException as error:
        return str(error).splitlines()
    return []


def describe_verdict(title, metrics, gate, missed, n_rows):
    """Return the verdict, and how far each metric is from its limit, as Markdown."""
    table = pd.DataFrame({"value": metrics}).assign(limit="", margin="")
    for name, limit in gate.items():
        side, sign = ("least", 1) if limit.greater_is_better else ("most", -1)
        margin = sign * (metrics.get(name, np.nan) - limit.threshold)
        table.loc[name, ["limit", "margin"]] = f"at {side} {limit.threshold:g}", f"{margin:+.4f}"
    table = indent(table.to_string(float_format="{:.4f}".format), "    ")
    verdict = "misses a limit" if missed else "passes the gate"
    report = f"{title}: {verdict}\n\n{table}"
    if "below_production_se" in metrics:
        # One-sided 96 %, and 80 %: 1.75 + 0.84 standard errors. But 96 % also takes four rows
        # that only production has right; of a loss of five, they are found 8 times of 10.
        found = f"{2.6 * metrics['below_production_se']:.3f}"
        report += f"\n\nOn {n_rows} rows, a loss is found 8 times of 10, unless it is smaller than "
        report += f"{found}, or than 5 rows."
    return report


def log_verdict(name, version, compared_with, report, missed):
    """Write the verdict to the version and to the active run."""
    verdict = "failed" if missed else "passed"
    client = mlflow.MlflowClient()
    client.update_model_version(name, version, report)
    client.set_model_version_tag(name, version, "validation_status", verdict)
    client.set_model_version_tag(name, version, "compared_with", compared_with)
    mlflow.set_tags({"registered_model": name, "version": version, "validation_status": verdict})
    mlflow.set_tag("mlflow.note.content", report)


def promote(name, version, replaces):
    """Point `production` at a version, and `previous` at the one that it replaces.

    Raises UserError, and moves nothing, if `production` is no longer at the version that it
    `replaces` (None: at no version). The registry has no lock, so somebody else may have
    promoted another one. It is an error, too, if the version is in production already, or
    lacks the verdict of `log_verdict` that it has passed the gate.
    """
    client = mlflow.MlflowClient()
    if client.get_model_version(name, version).tags.get("validation_status") != "passed":
        raise UserError(f"version {version} of {name} has not passed the gate")
    current = get_aliases(name).get("production")
    if str(current) != str(replaces):  # MLflow returns numbers or text, for the same version
        raise UserError(f"version {current} was promoted in the meantime; run this again")
    if str(current) == str(version):
        raise UserError(f"version {version} of {name} is already in production")
    print(f"Moving the alias `production` to version {version}", flush=True)
    if current is not None:
        client.set_registered_model_alias(name, "previous", current)
    client.set_registered_model_alias(name, "production", version)

    # For those who still load models:/NAME/Production. MLflow deprecated stages in 2.9, and
    # some registries have none.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        try:
            client.transition_model_version_stage(name, version, "Production", True)
        except mlflow.MlflowException as error:
            print(f"Note: the alias has moved, but the legacy stage could not be set: {error}")


def predict_with_production(name, train, test):
    """Return rows of the hold-out, their class, and what the version in production predicts."""
    print("Predicting rows of the hold-out with the version in production\n", flush=True)
    model = load_model(f"models:/{name}@production", train.X, train.rule, PACKAGES, TRUSTED)
    rows = test.X.head()
    return rows.iloc[:, :3].assign(actual=test.y.head(), predicted=model.predict(rows))


def roll_back(name, to):
    """Put an earlier version back into production: `to` is its number, or "previous".

    A second rollback to "previous" undoes the first. Raises UserError if there is no previous
    version, or as `promote` does.
    """
    aliases = get_aliases(name)
    if to == "previous" and to not in aliases:
        raise UserError(f"{name} has no previous version to roll back to")
    version = aliases.get(to, to)
    promote(name, version, replaces=aliases.get("production"))
    with mlflow.start_run(run_name="rollback"):
        mlflow.set_tags({"registered_model": name, "version": version})


def get_aliases(name):
    """Return {alias: version} of a registered model, and {} if there is no such model."""
    try:
        aliases = mlflow.MlflowClient().get_registered_model(name).aliases
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    return {alias: str(version) for alias, version in aliases.items()}


# Indented lines are shell commands. Those with @production take the version that the alias
# points at when they start; the others take this version.
GUIDE = """# Deploy {name} version {number} from this store

    export MLFLOW_TRACKING_URI="{store}"

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


# What these scripts' models say of themselves, versions and trusted types aside.
FLAVORS = {
    "python_function": {
        "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
        "loader_module": "mlflow.sklearn",
        "model_path": "model.skops",
        "predict_fn": "predict",
    },
    "sklearn": {
        "code": None,
        "pickled_model": "model.skops",
        "serialization_format": "skops",
    },
}


def load_model(uri, X, rule, packages, trusted_types):
    """Load a model that one of these scripts has logged.

    Raises UserError if it could run code, does not take the rows X, or was trained with
    another rule by which rows are held out. What this check cannot do is in README.md.
    """
    try:
        # All that its flavors say must be as in our own models. Then no setting of theirs can make
        # MLflow run other code than scikit-learn's.
        info = mlflow.models.get_model_info(uri)
        flavors = {name: dict(flavor) for name, flavor in info.flavors.items()}
        types = flavors["sklearn"].pop("skops_trusted_types", [])
        del flavors["sklearn"]["sklearn_version"], flavors["python_function"]["python_version"]
        if flavors != FLAVORS:
            raise UserError("it could run code, because it is not a plain skops file")
        if unknown := set(types) - set(trusted_types):
            raise UserError(f"it could run code, as TRUSTED does not name {unknown}")
        requirements = Path(mlflow.pyfunc.get_model_dependencies(uri)).read_text().split()
        if not {line.partition("==")[0] for line in requirements} <= set(packages):
            raise UserError("a server would install other packages for it")
        held_out = (info.metadata or {}).get("held_out")
        if held_out != rule:
            raise UserError(f"it may have seen the hold-out, as it held out {held_out}")
        if info.signature.inputs.input_names() != list(X):
            raise UserError("it takes other columns than the table has")
        model = mlflow.pyfunc.load_model(uri)
        model.predict(X.head())
        return model
    except Exception as error:  # a broken or forged file can raise anything
        reason = error if isinstance(error, UserError) else repr(error)
        raise UserError(f"{uri} cannot be used: {reason}") from error


# The rest is the same in all three scripts, so you need to read it only once.


class UserError(Exception):
    """A reason to stop that the user can act on: one line on stderr, without a traceback."""


class Rows(NamedTuple):
    """Rows of a table, and what describes them."""

    X: pd.DataFrame  # the features: numbers as floats, everything else as text
    y: pd.Series  # the classes, as text
    groups: pd.Series  # rows with the same number stay together in every split
    dataset: mlflow.entities.Dataset
    rule: str  # by which rows are held out


def load_data(csv, target, id_column, test_size):
    """Load a table, and split it into training rows and hold-out rows. Returns two Rows.

    The table is a CSV file with a header, or scikit-learn's breast cancer data if `csv` is
    None. Rows without a class or an ID are left out. Raises UserError if the table cannot be
    used.
    """
    name = table_name(csv)
    table = read_table(csv, id_column)
    keys = [target] if id_column is None else [target, id_column]
    if target == id_column or not set(keys) < set(table):
        raise UserError(f"{name} needs columns {keys} and others, but has {list(table)}")
    complete = table.dropna(subset=keys)
    y = read_classes(complete[target])
    features = complete.drop(columns=target)
    features = features.apply(lambda column: column.astype("float64", errors="ignore"))
    X = features.drop(columns=keys, errors="ignore")
    if np.isinf(X.select_dtypes("number")).any(axis=None):
        raise UserError(f"{name} has infinite numbers: leave those cells empty")

    # Equal rows have the same hash. With an ID, so do all rows of the same ID. It is hashed as
    # text; 12 becomes 12.0 where some program has read it as a number.
    groups = hash_rows(features)
    if id_column is not None:
        ids = complete[id_column].astype(str).str.removesuffix(".0")
        groups = hash_rows(ids.to_frame())
    held_out = is_held_out(groups, test_size)
    print(f"{name}: {len(y)} of {len(table)} rows can be used, {held_out.sum()} are held out")
    check_split(y, groups, held_out, test_size)
    rule = f"{test_size} of the rows, by a hash of {id_column or 'the features'}"
    train = select_rows(X, y, groups, ~held_out, f"{name}-train", rule)
    test = select_rows(X, y, groups, held_out, f"{name}-test", rule)
    return train, test


def table_name(csv):
    """Return a short name for a CSV file, or for the breast cancer data if it is None."""
    if csv is None:
        return "breast-cancer"
    return re.sub("[^a-z0-9]+", "-", Path(csv).stem.lower()).strip("-") or "table"


def read_table(csv, id_column):
    """Return a CSV file, or the breast cancer data if it is None, as a DataFrame."""
    if csv is None:
        data = load_breast_cancer(as_frame=True)
        return data.data.assign(diagnosis=data.target_names[data.target])
    try:
        return pd.read_csv(csv, low_memory=False, dtype={id_column: str})
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {csv}: {error}") from error


def read_classes(column):
    """Return a column without gaps as text. Raises UserError if it looks like a quantity."""
    if pd.api.types.is_numeric_dtype(column) and column.nunique() > 30:
        raise UserError(f"{column.name!r} has {column.nunique()} numbers: too many for classes")
    # convert_dtypes() keeps class 1 from becoming "1.0" in a column that had gaps.
    return column.convert_dtypes().astype(str).astype(object)


def hash_rows(table):
    """Return a number for each row of a table, which depends on nothing but its values."""
    # A column of whole numbers holds fractions as soon as one of them is missing.
    numbers = dict.fromkeys(table.select_dtypes("number"), "float64")
    return pd.util.hash_pandas_object(table.astype(numbers), index=False)


def is_held_out(groups, share):
    """Return True for about this share of the groups (numbers from `hash_rows`).

    A row that is held out stays held out when the table grows, so that no later model has
    trained on it. A random split would hand the rows held out today to the next training.
    Géron, Hands-On Machine Learning, chapter 2, splits by the hash of an identifier.
    """
    return groups % 1000 < 1000 * share


def check_split(y, groups, held_out, test_size, n_folds=5):
    """Raise UserError unless the hold-out has its share, and each class enough training rows."""
    if abs(held_out.mean() - test_size) > 0.1:
        raise UserError(
            f"the hold-out would be {held_out.mean():.0%} of the rows, as they are few or many are "
            "equal: name a column that tells them apart with --id"
        )
    in_training = groups[~held_out].groupby(y[~held_out]).nunique()
    if y.nunique() < 2 or len(in_training) < y.nunique() or in_training.min() < n_folds:
        raise UserError(
            f"{y.name!r} needs 2 or more classes with {n_folds} or more different training rows "
            f"each, but has {in_training.sort_values().head().to_dict()}"
        )


def select_rows(X, y, groups, mask, name, rule):
    """Return the Rows for which the mask is True, with an MLflow data set of this name."""
    quieten_mlflow()
    table = X[mask].assign(**{y.name: y[mask]})
    # Depends on groups and order, as the folds do. MLflow's own digest leaves out the rows
    # after the first 10,000.
    hashes = (hash_rows(table) ^ groups[mask]).to_numpy()
    digest = f"{(hashes * np.arange(1, len(table) + 1, dtype='uint64')).sum():x}"
    dataset = mlflow.data.from_pandas(table, targets=y.name, name=name, digest=digest)
    return Rows(X[mask], y[mask], groups[mask], dataset, rule)


def add_preprocessing(model):
    """Return a pipeline of the model that takes raw rows, with text and gaps.

    A missing number becomes the mean of its column; then all numbers are scaled. A text column
    becomes up to 20 one-hot columns; missing text is a value of its own.
    """
    numbers = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler())
    text = make_pipeline(
        # Missing text is NaN in a table, and None in a request as JSON.
        SimpleImputer(missing_values=np.nan, strategy="constant", keep_empty_features=True),
        SimpleImputer(missing_values=None, strategy="constant", keep_empty_features=True),
        OneHotEncoder(handle_unknown="ignore", max_categories=20, sparse_output=False),
    )
    columns = make_column_transformer(
        (numbers, make_column_selector(dtype_include="number")),
        (text, make_column_selector(dtype_exclude="number")),
    )
    return make_pipeline(columns, model)


def log_model(model, X, rule, packages, trusted_types):
    """Log a model to the active run, ready to be served. Returns MLflow's ModelInfo.

    X are the rows that it was fitted on. The rule by which rows were held out goes with it.
    """
    return mlflow.sklearn.log_model(
        model,
        name="model",
        serialization_format="skops",  # a pickle can run any code when it is loaded
        skops_trusted_types=trusted_types,
        signature=mlflow.models.infer_signature(X, model.predict(X.head())),
        input_example=X.head(),
        pip_requirements=[f"{package}=={metadata.version(package)}" for package in packages],
        metadata={"held_out": rule},
    )


def quieten_mlflow():
    """Let MLflow print errors only, and give up on a dead server within seconds."""
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # without git, no advice about it
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def open_store(experiment):
    """Select an experiment in the store of MLFLOW_TRACKING_URI, or in mlflow.db in this folder."""
    quieten_mlflow()
    if not mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
        # Two processes that make the tables of a new database at once would break it.
        with closing(sqlite3.connect("mlflow.db.lock", timeout=60)) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            mlflow.search_experiments(max_results=1)
    mlflow.set_experiment(experiment)


def where_to_look(run):
    """Return how to open the page of a run in the MLflow UI."""
    page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    store = hide_login(mlflow.get_tracking_uri())
    server, command = "http://127.0.0.1:5000", f'mlflow ui --backend-store-uri "{store}"\n       '
    if store.startswith("http"):
        server, command = store, ""
    return f"Look:  {command}{server}/{page}?workflowType=machine_learning"


def hide_login(text):
    """Return a text without the logins in its addresses."""
    return re.sub(r"//[^/\s]*@", "//USER:PASSWORD@", text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, sqlite3.Error, SQLAlchemyError, mlflow.MlflowException) as error:
        first_line = hide_login(str(error)).partition("\n")[0]
        print(f"Stopped: {first_line}", file=sys.stderr)
        sys.exit(2)
