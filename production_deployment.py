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
        run deployment          metrics of the gate, confusion.png; `model`, if trained here;
                                deployment_guide.md, if promoted
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

import hashlib
import logging
import os
import re
import shlex
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

# A server that installs packages installs these, in the versions that are used here.
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
    gate = dict(GATE)
    if args.min_score is not None:
        gate["score"] = MetricThreshold(threshold=args.min_score, greater_is_better=True)
    models = {"baseline": DummyClassifier().fit(train.X, train.y)}  # the most frequent class
    replaces = get_aliases(name).get("production")  # the number of a version, or None
    if replaces is None or args.without_comparison:
        compared_with = "nothing"
        gate.pop("p_worse_than_production", None)
    else:
        compared_with = f"version {replaces}"
        print(f"To be compared with {compared_with}; --without-comparison deploys without that")
        models["production"] = load_model(f"models:/{name}/{replaces}", train)
    if args.model_uri is not None:
        # Before the run starts, so that a model that is refused here leaves nothing behind.
        load_model(args.model_uri, train)

    with mlflow.start_run(run_name="deployment") as deployment:
        mlflow.log_param("metric", args.metric)
        mlflow.log_input(train.dataset, context="training")
        mlflow.log_input(test.dataset, context="testing")
        version = register(name, args.model_uri or train_model(train))

        print("Judging it as it will be served: loaded from the registry", flush=True)
        models["candidate"] = candidate = load_model(f"models:/{name}/{version}", train)
        judged = judge(models, test.X, test.y)
        metrics = gate_metrics(judged, test.groups, METRICS[args.metric], SEED)
        metrics["latency_ms"] = median_latency_ms(candidate, test.X)
        mlflow.log_metrics(metrics, model_id=candidate.model_id, dataset=test.dataset)
        mlflow.log_figure(draw_confusion(judged), "confusion.png")

        metrics = mlflow.get_run(deployment.info.run_id).data.metrics  # as they are logged
        missed = missed_limits(metrics, gate)
        verdict = "failed" if missed else "passed"
        title = f"Version {version} {verdict} ({args.metric}; compared with {compared_with})"
        report = f"{title}\n\n{describe_margins(metrics, gate, len(judged))}"
        log_verdict(name, version, verdict, compared_with, report)
        print(f"\n{report}\n", flush=True)
        if missed:
            print(where_to_look(deployment))
            sys.exit(f"Refused: version {version} stays in staging. {' '.join(missed)}")
        promote(name, version, replaces)
        guide = GUIDE.format(name=name, number=version, store=hide_login(mlflow.get_tracking_uri()))
        mlflow.log_text(guide, "deployment_guide.md")

    print("Predicting rows of the hold-out with the version in production\n", flush=True)
    production = load_model(f"models:/{name}@production", train)
    rows = test.X.head()
    shown = rows.iloc[:, :3].assign(actual=test.y, predicted=production.predict(rows))
    print(shown.to_string(index=False))
    print(f"\n{guide}")
    print(where_to_look(deployment))
    if replaces is not None:
        print("Undo: ", shlex.join(["python", __file__, "--rollback", "--name", name]))


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
    name = f"{Path(csv).stem} {target} classifier".lower()
    return "-".join(re.findall("[a-z0-9]+", name))


def train_model(train):
    """Fit a logistic regression on the training rows, log it, and return its URI."""
    print("Training a model and logging it", flush=True)
    model = add_preprocessing(LogisticRegression(max_iter=1000)).fit(train.X, train.y)
    return log_model(model, train.X, train.rule).model_uri


def register(name, model_uri):
    """Register a logged model as a new version with the alias `staging`; return its number."""
    print("Registering it as a new version with the alias `staging`", flush=True)
    with redirect_stderr(sys.stdout):  # MLflow reports success on stderr
        version = mlflow.register_model(model_uri, name).version
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
    scores = {name: score(judged["actual"], judged[name]) for name in judged}
    candidate = scores["candidate"]
    if scores["actual"] < candidate:
        raise ValueError("the score of a perfect model is lower: of a loss, return the negative")
    # Rounded, because 0.98 - 0.96 must be 0.02, and not 0.020000000000000018.
    metrics = {"score": candidate, "above_baseline": round(candidate - scores["baseline"], 12)}
    if "production" in judged:
        losses = bootstrap_losses(judged, groups, score, seed)
        metrics["below_production"] = round(scores["production"] - candidate, 12)
        metrics["p_worse_than_production"] = (losses > 0).mean()
        # To reach 96 % (1.75 standard errors) in 8 cases of 10 takes 0.84 standard errors more.
        metrics["findable_loss"] = 2.6 * losses.std()
    return metrics


def bootstrap_losses(judged, groups, score, seed, draws=1000):
    """Return how far the candidate is below production in hold-outs drawn from this one.

    A paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993): groups
    of rows are drawn with replacement, and both models are scored on the same ones. The share
    of losses above zero estimates the probability that the candidate is worse.
    """
    # Equal rows of the table are scored once, and weighted by how often they are drawn. Kinds
    # are numbered, and drop_duplicates() lists them, in the order of their first rows.
    columns = ["actual", "candidate", "production"]
    kind = judged.groupby(columns, sort=False).ngroup()
    actual, candidate, production = judged[columns].drop_duplicates().to_numpy().T
    different, group = np.unique(groups, return_inverse=True)
    n_groups = len(different)
    rng = np.random.default_rng(seed)
    losses = []
    for _ in range(draws):
        times_drawn = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
        weights = np.bincount(kind, weights=times_drawn[group])
        weighted_score = partial(score, actual, sample_weight=weights)
        losses.append(weighted_score(production) - weighted_score(candidate))
    return np.round(losses, 12)


def median_latency_ms(model, X):
    """Return the median time of predict() for one row on one core, in milliseconds."""
    with threadpool_limits(1):
        seconds = timeit.repeat(partial(model.predict, X.head(1)), number=1, repeat=50)
    return 1000 * float(np.median(seconds))


def draw_confusion(judged):
    """Return a figure: how often each class was taken for which."""
    figure = Figure(layout="constrained")
    ConfusionMatrixDisplay.from_predictions(
        judged["actual"], judged["candidate"], ax=figure.subplots(), cmap="Blues", colorbar=False
    )
    return figure


def missed_limits(metrics, gate):
    """Return a line for each limit that is missed or has no metric, as MLflow words it."""
    try:
        mlflow.validate_evaluation_results(gate, EvaluationResult(metrics, artifacts={}))
    except mlflow.MlflowException as error:
        return str(error).splitlines()
    return []


def describe_margins(metrics, gate, n_rows):
    """Return how far each metric is within its limit, as Markdown."""
    table = pd.DataFrame({"value": metrics})
    for name, limit in gate.items():
        side, sign = ("at least", 1) if limit.greater_is_better else ("at most", -1)
        table.loc[name, "limit"] = f"{side} {limit.threshold:g}"
        table.loc[name, "margin"] = sign * (metrics.get(name, np.nan) - limit.threshold)
    text = indent(table.to_string(float_format="{:.4f}".format, na_rep=""), "    ")
    if "findable_loss" in metrics:
        # A few rows never reach 96 %: three that only production has right give 95 %.
        text += f"\n\nOn {n_rows} rows, a loss is found 8 times of 10 if it is larger than "
        text += "findable_loss and than 5 rows (or IDs)."
    return text


def log_verdict(name, version, verdict, compared_with, report):
    """Write the verdict, "passed" or "failed", to a version, and the report to the run as well."""
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


def roll_back(name, to):
    """Put an earlier version back into production: `to` is its number or its alias.

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
        return mlflow.MlflowClient().get_registered_model(name).aliases
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


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


def load_model(uri, rows):
    """Load a model that one of these scripts has logged, to be used on rows like these.

    Raises UserError if it could run code, takes other columns, knows other classes, or was
    trained with another rule by which rows are held out. What this check cannot do is in
    README.md.
    """
    try:
        # All that its flavors say must be as in our own models. Then no setting of theirs can make
        # MLflow run other code than scikit-learn's.
        info = mlflow.models.get_model_info(uri)
        flavors = info.flavors
        types = flavors["sklearn"].pop("skops_trusted_types", [])
        del flavors["sklearn"]["sklearn_version"], flavors["python_function"]["python_version"]
        if flavors != FLAVORS:
            raise UserError("it could run code, because it is not a plain skops file")
        if unknown := set(types) - set(TRUSTED):
            raise UserError(f"it could run code, as TRUSTED does not name {unknown}")
        requirements = Path(mlflow.pyfunc.get_model_dependencies(uri)).read_text().split()
        if not {line.partition("==")[0] for line in requirements} <= set(PACKAGES):
            raise UserError("a server would install other packages for it")
        held_out = (info.metadata or {}).get("held_out")
        if held_out != rows.rule:
            raise UserError(f"it may have seen the hold-out, as it held out {held_out}")
        if info.signature.inputs.input_names() != list(rows.X):
            raise UserError("it takes other columns than the table has")
        model = mlflow.pyfunc.load_model(uri)
        model.predict(rows.X.head())
        classes = set(model.get_raw_model().classes_)
        if classes != set(rows.y):
            raise UserError(f"it knows other classes: {classes}")
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
    name = "breast-cancer" if csv is None else Path(csv).stem
    table = read_table(csv, id_column)
    keys = [target] if id_column is None else [target, id_column]
    if target == id_column or not set(keys) < set(table):
        raise UserError(f"{name} needs columns {keys} and others, but has {list(table)}")
    complete = table.dropna(subset=keys)
    y = read_classes(complete[target])
    X = complete.drop(columns=keys).apply(lambda column: column.astype("float64", errors="ignore"))
    if np.isinf(X.select_dtypes("number")).any(axis=None):
        raise UserError(f"{name} has infinite numbers: leave those cells empty")

    # Equal rows have the same hash. With an ID, so do all rows of the same ID. It is hashed as
    # text; 12 becomes 12.0 where some program has read it as a number.
    identity = X
    if id_column is not None:
        identity = complete[id_column].astype(str).str.removesuffix(".0").to_frame()
    groups = pd.util.hash_pandas_object(identity, index=False)
    held_out = is_held_out(groups, test_size)
    print(f"{name}: {len(y)} of {len(table)} rows can be used, {held_out.sum()} are held out")
    check_split(y, groups, held_out, test_size)
    rule = f"{test_size} of the rows, by a hash of {id_column or 'the features'}"
    train = select_rows(X, y, groups, ~held_out, f"{name}-train", rule)
    test = select_rows(X, y, groups, held_out, f"{name}-test", rule)
    return train, test


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


def is_held_out(groups, share):
    """Return True for about this share of the groups.

    `groups` are hashes from `pd.util.hash_pandas_object`. It hashes 1 unlike 1.0, so make
    numbers floats first. A row that is held out stays held out when the table grows, so that
    no later model has trained on it. A random split would hand the rows held out today to the
    next training. Géron, Hands-On Machine Learning, chapter 2, splits by the hash of an
    identifier.
    """
    return groups % 1000 < 1000 * share


def check_split(y, groups, held_out, test_size):
    """Raise UserError unless the hold-out has its share, and each class enough training rows."""
    if abs(held_out.mean() - test_size) > 0.1:
        raise UserError(
            f"the hold-out would be {held_out.mean():.0%} of the rows, as there are too few "
            "different rows or IDs; --id names a column that tells rows apart"
        )
    in_training = groups.mask(held_out).groupby(y).nunique()
    if len(in_training) < 2 or in_training.min() < 5:
        raise UserError(
            f"{y.name!r} needs 2 or more classes with 5 or more training rows (or IDs) each, "
            f"but has {in_training.nsmallest().to_dict()}"
        )


def select_rows(X, y, groups, mask, name, rule):
    """Return the Rows for which the mask is True, with an MLflow data set of this name."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # without git, no advice about it
    table = X[mask].assign(**{y.name: y[mask]})
    # MLflow's own digest leaves out all rows but the first 10,000.
    hashes = pd.util.hash_pandas_object(table, index=False)
    digest = hashlib.sha256(hashes.to_numpy()).hexdigest()[:16]
    dataset = mlflow.data.from_pandas(table, targets=y.name, name=name, digest=digest)
    return Rows(X[mask], y[mask], groups[mask], dataset, rule)


def add_preprocessing(model):
    """Return a pipeline of the model that takes raw rows, with text and gaps.

    A missing number becomes the mean of its column; then all numbers are scaled. A text column
    becomes up to 20 one-hot columns; missing text is a value of its own.
    """
    is_number = make_column_selector(dtype_include="number")
    numbers = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler())
    text = make_pipeline(
        # Missing text is NaN in a table, and None in a request as JSON.
        SimpleImputer(strategy="constant", keep_empty_features=True),
        SimpleImputer(missing_values=None, strategy="constant", keep_empty_features=True),
        OneHotEncoder(handle_unknown="ignore", max_categories=20, sparse_output=False),
    )
    return make_pipeline(make_column_transformer((numbers, is_number), remainder=text), model)


def log_model(model, X, rule):
    """Log a model to the active run, ready to be served. Returns MLflow's ModelInfo.

    X are the rows that it was fitted on. The rule by which rows were held out goes with it.
    """
    return mlflow.sklearn.log_model(
        model,
        name="model",
        serialization_format="skops",  # a pickle can run any code when it is loaded
        skops_trusted_types=TRUSTED,
        signature=mlflow.models.infer_signature(X, model.predict(X.head())),
        input_example=X.head(),
        pip_requirements=[f"{package}=={metadata.version(package)}" for package in PACKAGES],
        metadata={"held_out": rule},
    )


def open_store(experiment):
    """Select an experiment in the store of MLFLOW_TRACKING_URI, or in mlflow.db in this folder.

    Lets MLflow print errors only, and give up on a dead server within seconds.
    """
    logging.getLogger("mlflow").setLevel("ERROR")
    logging.getLogger("alembic").setLevel("ERROR")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
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
    page += "?workflowType=machine_learning"
    store = hide_login(mlflow.get_tracking_uri())
    if store.startswith("http"):
        return f"Look:  {store}/{page}"
    return f'Look:  mlflow ui --backend-store-uri "{store}"\n       http://127.0.0.1:5000/{page}'


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
