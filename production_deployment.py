"""Take a model to production with MLflow: register, stage, check, promote, load, predict.

A scaled logistic regression is trained on scikit-learn's breast cancer data and registered. The
new version gets the alias `staging`, is loaded from there and has to reach MIN_ACCURACY on rows
that it has not seen; only then does the alias `production` move to it. The model in production
is loaded back and predicts, and a guide for this very version is printed: REST, Docker, cloud.
Run it again and version 2 takes the place of version 1.

Run it, then look at the model with the command that it prints:

    python production_deployment.py

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment production-deployment
    └── deployment                  cv_accuracy, test_accuracy, the model, deployment_guide.md
    registered model breast-cancer-classifier
    └── version 1, 2, …             one more a run; aliases `staging` and `production`, and the
                                    legacy stage Production

A model below MIN_ACCURACY stays in staging, production does not change, and the exit code is 1.
"""

import argparse
import contextlib
import logging
import os
import sys
import warnings
from importlib.metadata import version
from urllib.request import urlopen

import mlflow
from mlflow.exceptions import MlflowException
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

EXPERIMENT = "production-deployment"
SEED = 42  # of the split and the folds
TEST_SIZE = 0.2  # share of the rows that the gate checks a staged version on
FOLDS = 5
MIN_ACCURACY = 0.93  # on the hold-out; a version below it is not promoted
PACKAGES = ["mlflow", "scikit-learn", "skops", "pandas", "numpy", "scipy"]  # that the model needs
TRUSTED = []  # skops asks about each type that it does not know: here about none


def load_data():
    """Return 569 × 30 features, 569 labels (malignant or benign) and the data's name."""
    data = load_breast_cancer(as_frame=True)
    labels = data.target.map(dict(enumerate(data.target_names))).rename("diagnosis")
    return data.data, labels, "breast-cancer"


def as_dataset(X, y, name):
    """Return MLflow's record of these rows (name, digest, schema), to link metrics to."""
    return mlflow.data.from_pandas(X.assign(**{y.name: y}), targets=y.name, name=name)


def open_store(experiment):
    """Select the experiment, which is made if it is new, and return its id."""
    logging.disable(logging.INFO)  # MLflow reports every table that it makes; warnings still show
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # two lines for every run
    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):  # MLflow itself would retry an absent server for four minutes
        try:
            urlopen(f"{uri}/health", timeout=5).close()
        except OSError as error:
            raise OSError(f"no MLflow server answers at {uri}, start it: {error}") from error
    return mlflow.set_experiment(experiment).experiment_id


def register(model_uri, name):
    """Register the logged model as the next version of `name`; return the version number."""
    with contextlib.redirect_stderr(sys.stdout):  # MLflow reports success on stderr
        return mlflow.register_model(model_uri, name).version


def promote(client, name, new_version):
    """Put a version into production: the alias moves in one step, then the legacy stage."""
    client.set_registered_model_alias(name, "production", new_version)
    with warnings.catch_warnings():
        # Stages are deprecated since MLflow 2.9 in favour of aliases. This one is set for those
        # who still load models:/NAME/Production; leave it out if nobody does.
        warnings.simplefilter("ignore", FutureWarning)
        client.transition_model_version_stage(
            name, new_version, "Production", archive_existing_versions=True
        )


def print_predictions(model, X, y):
    """Print a few rows: three of the features, the actual class and the predicted one."""
    table = X.iloc[:, :3].assign(actual=y, predicted=model.predict(X))
    print(table.to_string(index=False))


def log_model(model, X):
    """Log the fitted model to the active run, ready to be served; return MLflow's ModelInfo."""
    return mlflow.sklearn.log_model(
        model,
        name="model",
        serialization_format="skops",  # a pickle can run any code when it is loaded
        skops_trusted_types=TRUSTED,
        signature=mlflow.models.infer_signature(X, model.predict(X)),
        input_example=X.head(),
        pip_requirements=[f"{package}=={version(package)}" for package in PACKAGES],
    )


def deployment_guide(name, version_number):
    """Return the steps that deploy this version: Markdown with commands for a POSIX shell."""
    uri = f"models:/{name}@production"
    return f"""# Deploy {name} version {version_number}

Every command below reads the model from the same store as the run that wrote this guide:

    export MLFLOW_TRACKING_URI={mlflow.get_tracking_uri()}

## 1. REST API on this machine

    mlflow models serve --model-uri {uri} --env-manager local --host 127.0.0.1 --port 5001

In a second shell, once `curl http://127.0.0.1:5001/ping` answers: fetch the example request that
is stored with the model, five raw rows, and send it.

    mlflow artifacts download --artifact-uri {uri}/serving_input_example.json --dst-path request
    curl http://127.0.0.1:5001/invocations --header 'Content-Type: application/json' \\
        --data @request/serving_input_example.json

Stop it with Ctrl-C. It listens to this machine alone: put a proxy with TLS and a login before it
when others are to reach it. It reads the alias once: start it anew after a promotion.

## 2. Docker

    mlflow models generate-dockerfile --model-uri {uri} --output-directory image --env-manager local
    docker build --tag {name}:{version_number} image
    docker run --rm --publish 127.0.0.1:5001:8080 {name}:{version_number}

The request is the same as in step 1.

## 3. Cloud

Amazon SageMaker (needs boto3, Docker, an AWS account with a bucket and an execution role):

    mlflow sagemaker build-and-push-container
    mlflow deployments create --target sagemaker --name {name} --model-uri {uri}

Azure ML (needs azureml-mlflow and a workspace whose tracking URI is exported):

    mlflow deployments create --target "$MLFLOW_TRACKING_URI" --name {name} --model-uri {uri}

Databricks (needs a workspace; register the model there, then serve it from its page):

    export MLFLOW_TRACKING_URI=databricks

Any platform that runs containers (Cloud Run, Kubernetes, ECS): push the image of step 2.
"""


def print_where_to_look(experiment_id):
    """Print the command and the link that show the runs in a browser."""
    uri = mlflow.get_tracking_uri()
    server = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    print(f"Look:  {server}/#/experiments/{experiment_id}/runs?workflowType=machine_learning")
    if server != uri:
        print(f"       after starting  mlflow ui --backend-store-uri {uri}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()

    X, y, data_name = load_data()
    try:
        experiment_id = open_store(EXPERIMENT)
    except (OSError, MlflowException) as error:
        parser.exit(2, f"{parser.prog}: {str(error).splitlines()[0]}\n")
    name = f"{data_name}-classifier"
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=TEST_SIZE, stratify=y, random_state=SEED
    )
    train = as_dataset(X_train, y_train, f"{data_name}-train")
    test = as_dataset(X_test, y_test, f"{data_name}-test")
    client = mlflow.MlflowClient()

    with mlflow.start_run(run_name="deployment") as run:
        print("1. Train and log", flush=True)
        mlflow.log_input(train, context="training")
        mlflow.log_input(test, context="testing")
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
        scores = {"cv_accuracy": cross_val_score(model, X_train, y_train, cv=folds).mean()}
        logged = log_model(model.fit(X_train, y_train), X_train)
        mlflow.log_metrics(scores, model_id=logged.model_id, dataset=train)

        print("2. Register and stage")
        new_version = register(logged.model_uri, name)
        client.set_registered_model_alias(name, "staging", new_version)

        print("3. Check what was staged, on the hold-out")
        staged = mlflow.pyfunc.load_model(f"models:/{name}@staging")
        scores = {"test_accuracy": accuracy_score(y_test, staged.predict(X_test))}
        mlflow.log_metrics(scores, model_id=logged.model_id, dataset=test)
        accuracy = mlflow.get_run(run.info.run_id).data.metrics["test_accuracy"]
        passed = accuracy >= MIN_ACCURACY
        status = "passed" if passed else "failed"
        client.set_model_version_tag(name, new_version, "validation_status", status)
        print(f"   accuracy {accuracy:.4f}, at least {MIN_ACCURACY} needed: {status}")

        if passed:
            print("4. Promote to production")
            promote(client, name, new_version)
            guide = deployment_guide(name, new_version)
            mlflow.log_text(guide, "deployment_guide.md")
    if not passed:
        sys.exit(1)

    print("5. Load from production and predict")
    print_predictions(
        mlflow.pyfunc.load_model(f"models:/{name}@production"), X_test.head(), y_test.head()
    )
    print()
    print(guide)
    print_where_to_look(experiment_id)


if __name__ == "__main__":
    main()
