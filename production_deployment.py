"""Take a model to production with MLflow: register, stage, check, promote, load, predict, undo.

A scaled logistic regression is trained on scikit-learn's breast cancer data and registered (with
--model-uri: any logged scikit-learn model). The new version gets the alias `staging`, is loaded and
has to pass a gate on rows that it has not seen; only then does the alias `production` move to it.

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment production-deployment
    └── deployment          the gate's figures, deployment_guide.md; `model` if it was trained here
    registered model breast-cancer-classifier
    └── version 1, 2, …     tagged with source, rows and gate; aliases staging, production, previous

Exit code 0: promoted, or rolled back. 1: refused by the gate. 2: bad input, or a store that fails.
"""

import contextlib
import logging
import os
import re
import shlex
import sqlite3
import sys
import timeit
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version
from pathlib import Path

import mlflow
import pandas as pd
import requests
from mlflow.models import EvaluationResult, MetricThreshold
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

EXPERIMENT = "production-deployment"
SEED = 42  # of the split
TEST_SIZE = 0.2  # share of the rows that the gate judges on
FOLDS = 5  # of tuning and comparison: a class with fewer rows is refused
GATE = {  # figures on the hold-out; a version that misses one of the limits is not promoted
    "accuracy": MetricThreshold(threshold=0.93, greater_is_better=True),
    "accuracy_gained": MetricThreshold(threshold=0.01, greater_is_better=True),  # on a constant
    "accuracy_lost": MetricThreshold(threshold=0.02, greater_is_better=False),  # to production
    "latency_ms": MetricThreshold(threshold=50, greater_is_better=False),  # for one row, median
    "answers_its_example": MetricThreshold(threshold=1, greater_is_better=True),
    "refuses_a_missing_column": MetricThreshold(threshold=1, greater_is_better=True),
}
TREE = "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor"
TRUSTED = ["numpy.dtype", "sklearn.tree._tree.Tree", TREE]  # what skops does not know: no code


def load_checked(model_uri, columns):
    """Return the loaded model; raise ValueError unless it is safe to load and for these columns."""
    model_id = mlflow.models.get_model_info(model_uri).model_id
    info = mlflow.models.get_model_info(f"models:/{model_id}")  # of what is going to be registered
    skops, loader = info.flavors.get("sklearn", {}), info.flavors.get("python_function", {})
    # MLflow trusts the types that the model itself names, and imports the loader that it names.
    safe = skops.get("serialization_format") == "skops" and not loader.keys() & {"code", "data"}
    safe = safe and set(skops.get("skops_trusted_types") or []) <= set(TRUSTED)
    if not safe or loader.get("loader_module") != "mlflow.sklearn":
        raise ValueError(f"{model_uri} could run code: log it as skops, of TRUSTED types")
    names = info.signature.inputs.input_names() if info.signature else []
    if names != list(columns) or loader.get("predict_fn", "predict") != "predict":
        raise ValueError(f"{model_uri} does not predict classes from the columns of the data")
    return mlflow.pyfunc.load_model(f"models:/{model_id}")


def judge(candidate, current, X, y):
    """Return the figures of GATE for a loaded model; current: that in production, or None."""
    accuracy = (candidate.predict(X) == y).mean()
    lost = (current.predict(X) == y).mean() - accuracy if current else 0.0
    seconds = timeit.repeat(lambda: candidate.predict(X.head(1)), number=1, repeat=50)
    figures = {  # rounded, as 0.98 - 0.96 is 0.020000000000000018
        "accuracy": accuracy,
        "accuracy_gained": round(accuracy - y.value_counts(normalize=True).max(), 12),
        "accuracy_lost": round(lost, 12),
        "latency_ms": pd.Series(seconds).median() * 1000,
        "answers_its_example": 0.0,
        "refuses_a_missing_column": 1.0,
    }
    with contextlib.suppress(mlflow.MlflowException, ValueError, TypeError):
        candidate.predict(candidate.input_example)
        figures["answers_its_example"] = 1.0
        candidate.predict(X.drop(columns=X.columns[0]))
        figures["refuses_a_missing_column"] = 0.0
    return figures


def point(client, name, aliases):
    """Point the aliases ({alias: version}) in this order; the legacy stage follows production."""
    for alias, number in aliases.items():
        try:
            client.set_registered_model_alias(name, alias, number)
        except mlflow.MlflowException:  # another deployment has just made it: now it can be moved
            client.set_registered_model_alias(name, alias, number)
    if "production" in aliases:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            # Stages are deprecated since MLflow 2.9 in favour of aliases. This one is set for those
            # who still load models:/NAME/Production; leave it out if nobody does. True: archive the
            # version that had it.
            client.transition_model_version_stage(name, aliases["production"], "Production", True)


# Indented lines are commands for a shell; `production` is looked up when they are run.
GUIDE = """# Deploy {name} version {number} from this store
    export MLFLOW_TRACKING_URI={store}
## REST API
    mlflow models serve --model-uri models:/{name}@production --env-manager local --host 127.0.0.1 --port 5001
When `curl http://127.0.0.1:5001/ping` answers, export in a second shell too, and send the example:

    mlflow artifacts download --artifact-uri models:/{name}@production/serving_input_example.json --dst-path request
    curl --fail http://127.0.0.1:5001/invocations --header 'Content-Type: application/json' --data @request/serving_input_example.json
It listens to this machine only: for others put a proxy with TLS and a login before it. Ctrl-C stops
it; restart it after a promotion, or see "Swap without downtime" in README.md.
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


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="learn from this table instead")
    parser.add_argument("--target", default="diagnosis", help="its column that holds the classes")
    parser.add_argument("--model-uri", help="deploy this logged model: models:/m-… or runs:/…")
    floor = GATE["accuracy"].threshold
    parser.add_argument("--min-accuracy", type=float, default=floor, help=f"instead of {floor}")
    parser.add_argument("--rollback", action="store_true", help="put `previous` into production")
    args = parser.parse_args()
    (X, y, train), (X_test, y_test, test) = load_data(args.csv, args.target)
    name = f"{train.name.removesuffix('-train')}-classifier"
    (store, look), client = open_store(EXPERIMENT), mlflow.MlflowClient()
    registered = client.search_registered_models(f"name = '{name}'")
    aliases = registered[0].aliases if registered else {}
    current, previous = aliases.get("production"), aliases.get("previous")
    if args.rollback:
        if None in (current, previous) or current == previous:
            raise ValueError(f"{name} has no previous version to roll back to")
        point(client, name, {"production": previous, "previous": current})
        print(f"Rolled {name} back from version {current} to version {previous}")
        return
    in_use = load_checked(f"models:/{name}/{current}", X) if current else None
    model_id = None if args.model_uri is None else load_checked(args.model_uri, X).model_id

    with mlflow.start_run(run_name="deployment") as run:
        with contextlib.suppress(mlflow.MlflowException):  # another makes it now: ask again
            mlflow.log_input(test, "testing")
        mlflow.log_input(test, "testing")
        if model_id is None:
            print("1. Train and log a model", flush=True)
            model = with_preprocessing(LogisticRegression(max_iter=1000), X)
            model_id = log_model(model.fit(X, y), X)
        print("2. Register it and give it the alias `staging`", flush=True)
        with contextlib.redirect_stderr(sys.stdout):  # MLflow reports success on stderr
            staged = mlflow.register_model(f"models:/{model_id}", name)
        point(client, name, {"staging": staged.version})
        print("3. Load what is staged and judge it on the hold-out")
        # By its number: another deployment may move the alias meanwhile.
        candidate = mlflow.pyfunc.load_model(f"models:/{name}/{staged.version}")
        figures = judge(candidate, in_use, X_test, y_test)
        mlflow.log_metrics(figures, model_id=model_id, dataset=test)
        figures, status = client.get_run(run.info.run_id).data.metrics, "passed"
        gate = GATE | {"accuracy": MetricThreshold(args.min_accuracy, greater_is_better=True)}
        for check, limit in gate.items():
            side = "at least" if limit.greater_is_better else "at most"
            print(f"   {check} {figures[check]:.4f}, {side} {limit.threshold}")
        try:
            mlflow.validate_evaluation_results(gate, EvaluationResult(figures, {}))
        except mlflow.MlflowException as error:  # each limit that is missed, in a line
            status = " ".join(["failed:", *str(error).splitlines()])
        tags = figures | {
            "source_run": staged.run_id,
            "judged_on": f"{test.name}, digest {test.digest}",
            "judged_at": pd.Timestamp.now("UTC").isoformat(timespec="seconds"),
            "judged_by": run.data.tags["mlflow.user"],
            "validation_status": status,
        }
        for key, value in tags.items():
            client.set_model_version_tag(name, staged.version, key, value)
        if status != "passed":  # leaving the block by an exit marks the run FAILED
            parser.exit(1, f"Version {staged.version} is refused, validation {status}\n")
        guide = GUIDE.format(name=name, number=staged.version, store=shlex.quote(store))
        mlflow.log_text(guide, "deployment_guide.md")
        print("4. Promote it: the alias `production` moves in one step", flush=True)
        before = {"previous": current} if current else {}
        point(client, name, before | {"production": staged.version})

    print("5. Load what is in production and predict rows of the hold-out")
    model, rows = mlflow.pyfunc.load_model(f"models:/{name}@production"), X_test.head()
    table = rows.iloc[:, :3].assign(actual=y_test, predicted=model.predict(rows))
    print(table.to_string(index=False), f"{guide}\nLook:  {look}", sep="\n\n")
    own_data = ["--csv", args.csv, "--target", args.target] if args.csv else []
    if current:
        print("Undo: ", shlex.join(["python", sys.argv[0], "--rollback", *own_data]))


# The rest is the same in all three scripts: rows, preprocessing, store, model, errors.
def load_data(csv=None, target="diagnosis"):
    """Yield features, labels and MLflow's data set: of the training part, then of the hold-out.

    Raises OSError or ValueError if the table cannot be read, or the target not be learnt from it.
    """
    demo = load_breast_cancer(as_frame=True)
    table = demo.data.assign(diagnosis=demo.target_names[demo.target])
    table = table if csv is None else pd.read_csv(csv, low_memory=False)
    name = "-".join(re.findall("[a-z0-9]+", Path(csv or "breast-cancer").stem.lower())) or "table"
    if target not in table or len(table.columns) < 2:
        raise ValueError(f"{name} needs {target!r} and more, but has {', '.join(map(repr, table))}")
    labels = table.pop(target).dropna().convert_dtypes().astype(str)  # in spite of gaps 1, not 1.0
    print(f"{name}: {len(labels)} of {len(table)} rows have a {target!r}", flush=True)
    least, count = int(FOLDS / (1 - TEST_SIZE)) + 1, labels.value_counts().tail().to_dict()
    if len(count) < 2 or min(count.values()) < least:
        raise ValueError(f"{target!r} needs 2 or more classes of {least} or more rows, has {count}")
    table = table.apply(lambda column: column.astype("float64", errors="ignore"))  # text stays
    for column in table.select_dtypes(exclude="number"):
        if table[column].dropna().str.match(r"\d{1,4}[-/.]\d\d?[-/.]\d{1,4}\b(?!\.)").all():
            raise ValueError(f"column {column!r} holds dates: turn them into numbers, such as days")
    with_preprocessing("passthrough", table).fit(table)  # raises if a number is infinite
    table = table.loc[labels.index].assign(**{target: labels})
    parts = train_test_split(table, test_size=TEST_SIZE, stratify=labels, random_state=SEED)
    for part, kind in zip(parts, ("train", "test"), strict=True):
        dataset = mlflow.data.from_pandas(part, targets=target, name=f"{name}-{kind}")
        yield part.drop(columns=target), part[target], dataset


def with_preprocessing(model, X):
    """Return a pipeline that takes raw rows like X: it fills gaps, scales numbers, encodes text."""
    numbers = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler())
    word = {"strategy": "constant", "keep_empty_features": True}  # of its own, for every gap
    gaps = [SimpleImputer(missing_values=gap, **word) for gap in (float("nan"), None)]  # JSON: None
    words = OneHotEncoder(handle_unknown="ignore", max_categories=20, sparse_output=False)
    numeric = (numbers, list(X.select_dtypes("number")))
    columns = make_column_transformer(numeric, remainder=make_pipeline(*gaps, words))
    return make_pipeline(columns, model)


def open_store(experiment):
    """Quieten MLflow, select or make the experiment, return store and web page. Raises OSError."""
    logging.disable(logging.INFO)  # MLflow reports every table that it makes; warnings still show
    logging.getLogger("mlflow.store.db.utils").disabled = True  # logs what it also raises
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # two lines for every run
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"  # on stderr, for every file
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # its own 7 take four minutes
    uri = mlflow.get_tracking_uri()
    place = re.sub("(//[^:/]*):[^@/]*@", r"\1:PASSWORD@", uri)
    lock = f"{uri.removeprefix('sqlite:///')}.lock" if uri.startswith("sqlite:///") else ":memory:"
    try:
        if uri.startswith("http"):
            requests.get(f"{uri}/health", timeout=5)  # instead of the minutes that MLflow waits
        with contextlib.closing(sqlite3.connect(lock, timeout=60)) as connection:
            connection.execute("BEGIN EXCLUSIVE")  # one process makes the tables, the others wait
            mlflow.set_experiment(experiment)
        number = mlflow.set_experiment(experiment).experiment_id  # if another process has made it
    except Exception as error:  # of the network, the file system or the database
        raise OSError(f"start, unlock or free the store {place}: {error}") from None
    ui = f"mlflow ui --backend-store-uri {place}  then open  http://127.0.0.1:5000"
    ui = place if uri.startswith("http") else ui
    return place, f"{ui}/#/experiments/{number}/runs?workflowType=machine_learning"


def log_model(model, X):
    """Log the fitted model to the active run, ready to be served; return its id."""
    packages = ["mlflow", "scikit-learn", "skops", "pandas", "numpy", "scipy"]
    return mlflow.sklearn.log_model(
        model,
        name="model",
        serialization_format="skops",  # a pickle can run any code when it is loaded
        skops_trusted_types=TRUSTED,
        signature=mlflow.models.infer_signature(X, model.predict(X)),
        input_example=X.head(),
        pip_requirements=[f"{package}=={version(package)}" for package in packages],
    ).model_id


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, mlflow.MlflowException, KeyboardInterrupt) as error:
        if isinstance(error, ValueError) and mlflow.last_active_run():
            raise  # the input was fine: this is not expected
        error = error.__cause__ or error  # such as a full disk, which MLflow's text does not name
        print(f"Stopped: {str(error) or 'by Ctrl-C'}".splitlines()[0], file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
