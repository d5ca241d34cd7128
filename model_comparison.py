"""Compare four classifiers with MLflow: the same folds, rows and metrics, one child run for each.

Random forest, gradient boosting, logistic regression and a support vector machine are
cross-validated on the training part of scikit-learn's breast cancer data. MLflow is then asked
which one was best; the hold-out scores beside it decide nothing. What you will see: on 30 clean
numeric features the two scaled linear-algebra models match the tree ensembles, and train in a
hundredth of the time.

Run it, then look at the runs with the command that it prints:

    python model_comparison.py

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment model-comparison
    └── comparison               the name of the best, best_cv_accuracy
        ├── random_forest        accuracy, f1, precision and recall on the hold-out, the same
        ├── gradient_boosting    four with cv_ in front (mean over the folds), fit_seconds,
        ├── logistic_regression  the parameters, and the fitted model `model`
        └── svm
"""

import argparse
import logging
import os
from importlib.metadata import version
from urllib.request import urlopen

import mlflow
from mlflow.exceptions import MlflowException
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, get_scorer, make_scorer, precision_score, recall_score
from sklearn.model_selection import StratifiedKFold, cross_validate, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

EXPERIMENT = "model-comparison"
SEED = 42  # of the split, the folds and the models
TEST_SIZE = 0.2  # share of the rows that decides nothing
FOLDS = 5
CANDIDATES = {  # a fifth candidate is one more line
    "random_forest": RandomForestClassifier(random_state=SEED),
    "gradient_boosting": HistGradientBoostingClassifier(random_state=SEED),
    "logistic_regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    "svm": make_pipeline(StandardScaler(), SVC(random_state=SEED)),
}
# "macro": the mean over the classes, each counting the same, however many there are.
MACRO = {"average": "macro", "pos_label": None, "zero_division": 0}
SCORERS = {
    "accuracy": get_scorer("accuracy"),
    "f1": make_scorer(f1_score, **MACRO),
    "precision": make_scorer(precision_score, **MACRO),
    "recall": make_scorer(recall_score, **MACRO),
}
PACKAGES = ["mlflow", "scikit-learn", "skops", "pandas", "numpy", "scipy"]  # that the model needs
TRUSTED = [  # skops asks about each type that it does not know
    "sklearn.tree._tree.Tree",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
]


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


def cross_validated(model, X, y):
    """Return the model's metrics over the folds: the mean of each score, and seconds to fit."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)  # the same for every model
    scores = cross_validate(model, X, y, cv=folds, scoring=SCORERS, n_jobs=-1, error_score="raise")
    # Rounded, so that equal scores are equal: the last bits depend on the order of the sum.
    metrics = {f"cv_{name}": round(scores[f"test_{name}"].mean(), 12) for name in SCORERS}
    return metrics | {"fit_seconds": scores["fit_time"].mean()}


def log_candidate(name, model, parts, train, test):
    """Cross-validate, fit, score and log one candidate: a child run of the active run."""
    X_train, X_test, y_train, y_test = parts
    with mlflow.start_run(run_name=name, nested=True):
        mlflow.log_params(model.get_params(deep=False))
        mlflow.log_input(train, context="training")
        mlflow.log_input(test, context="testing")
        cv_metrics = cross_validated(model, X_train, y_train)
        model.fit(X_train, y_train)
        test_metrics = {key: score(model, X_test, y_test) for key, score in SCORERS.items()}
        model_id = log_model(model, X_train).model_id
        mlflow.log_metrics(cv_metrics, model_id=model_id, dataset=train)
        mlflow.log_metrics(test_metrics, model_id=model_id, dataset=test)


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


def ranking(experiment_id, parent_id):
    """Return the parent's children as a DataFrame, best first; with equal scores, by name."""
    return mlflow.search_runs(
        [experiment_id],
        filter_string=f"tags.mlflow.parentRunId = '{parent_id}'",
        order_by=["metrics.cv_accuracy DESC", "attributes.run_name ASC"],
    )


def print_table(runs):
    """Print the runs with their scores over the folds and on the hold-out, and the fit time."""
    columns = {"tags.mlflow.runName": "model"}
    columns |= {f"metrics.cv_{name}": f"cv {name}" for name in SCORERS}
    columns |= {f"metrics.{name}": name for name in SCORERS}
    columns |= {"metrics.fit_seconds": "fit (s)"}
    table = runs[list(columns)].rename(columns=columns)
    print("\nModels, best first (cv: mean over the folds of the training part; else: hold-out):")
    print(table.to_string(index=False, float_format="{:.4f}".format))


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
    parts = X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=TEST_SIZE, stratify=y, random_state=SEED
    )
    train = as_dataset(X_train, y_train, f"{data_name}-train")
    test = as_dataset(X_test, y_test, f"{data_name}-test")

    with mlflow.start_run(run_name="comparison") as parent:
        for number, (name, model) in enumerate(CANDIDATES.items(), 1):
            print(f"{number}/{len(CANDIDATES)}  {name}", flush=True)
            log_candidate(name, model, parts, train, test)
        runs = ranking(experiment_id, parent.info.run_id)
        best = runs.iloc[0]
        mlflow.log_param("best_model", best["tags.mlflow.runName"])
        mlflow.log_metric("best_cv_accuracy", best["metrics.cv_accuracy"])

    print_table(runs)
    print(f"\nBest model:        {best['tags.mlflow.runName']}, by its accuracy over the folds")
    print(f"Load it:           mlflow.sklearn.load_model('runs:/{best['run_id']}/model')")
    print_where_to_look(experiment_id)
    print("Next:              python production_deployment.py")


if __name__ == "__main__":
    main()
