"""Tune a random forest with MLflow: one parent run for the search, one child run a combination.

Searches a grid of 27 combinations with five-fold cross-validation on the training part of
scikit-learn's breast cancer data, on all cores. Asks MLflow which one was best, refits it and
scores it once on rows that no trial has seen. What you will see: the depth of the trees matters
most, and a fifth of the best forest's work buys a score that the folds cannot tell from its own.

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment hyperparameter-tuning
    └── grid-search       best_* parameters, best_cv_accuracy, test_accuracy, the model `model`
        ├── coarse-0001   its parameters, cv_accuracy, cv_accuracy_std, fit_seconds
        └── …             and so on to coarse-0027; with --refine also refine-0001 and up
"""

import logging
import os
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version
from urllib.request import urlopen

import mlflow
import numpy as np
import pandas as pd
from joblib import Parallel, delayed, parallel_config
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import ParameterGrid, StratifiedKFold, cross_validate, train_test_split

EXPERIMENT = "hyperparameter-tuning"
SEED = 42  # of the split, the folds and the forests
TEST_SIZE = 0.2  # share of the rows that no trial sees
FOLDS = 5
PARAM_GRID = {  # from cheap to costly: of combinations with equal scores the first one wins
    "max_depth": [1, 3, 9],
    "max_features": [0.1, 0.3, 0.9],  # share of the features that each split chooses from
    "n_estimators": [20, 100, 300],
}
PACKAGES = ["mlflow", "scikit-learn", "skops", "pandas", "numpy", "scipy"]  # that the model needs
TRUSTED = ["sklearn.tree._tree.Tree"]  # skops asks about each type that it does not know


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


def run_trial(name, params, X, y):
    """Cross-validate one combination; return its name, its metrics and the error if it raised."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    model = RandomForestClassifier(**params, random_state=SEED)
    try:
        scores = cross_validate(model, X, y, cv=folds, scoring="accuracy", error_score="raise")
    except Exception as error:  # one bad combination must not end the search
        return name, {}, f"{type(error).__name__}: {error}"
    metrics = {
        # Rounded, so that equal scores are equal: the last bits depend on the order of the sum.
        "cv_accuracy": round(scores["test_score"].mean(), 12),
        "cv_accuracy_std": round(scores["test_score"].std(), 12),
        "fit_seconds": scores["fit_time"].mean(),  # for one fit: the mean over the folds
    }
    return name, metrics, None


def search(combinations, parent, X, y, dataset):
    """Try the combinations (name: parameters) that the active parent run has no result for yet.

    The workers train while this process logs each trial as soon as it has finished, so tracking
    costs next to nothing. The longest go first: one that came last would leave the cores idle.
    """
    done = set(finished_trials(parent).get("trial", []))
    todo = {name: params for name, params in combinations.items() if name not in done}
    results = Parallel(n_jobs=-1, return_as="generator_unordered")(
        delayed(run_trial)(name, params, X, y) for name, params in reversed(todo.items())
    )
    start = time.perf_counter()
    for number, (name, metrics, error) in enumerate(results, 1):
        with mlflow.start_run(run_name=name, nested=True, tags={"stage": name.split("-")[0]}):
            mlflow.log_params(todo[name])
            mlflow.log_metrics(metrics, dataset=dataset)
            if error:
                mlflow.set_tag("error", error)
                mlflow.end_run("FAILED")
        left = (time.perf_counter() - start) / number * (len(todo) - number)
        result = error or "accuracy {cv_accuracy:.4f} ± {cv_accuracy_std:.4f}".format(**metrics)
        print(
            f"{number:3}/{len(todo)} {left:4.0f} s left  {name}  {result}  {todo[name]}", flush=True
        )


def trial_runs(parent, condition):
    """Return the parent's children that meet the condition, best first; with equal scores, by name.

    The store sorts and mlflow.search_runs turns its pages: right for any number of trials.
    """
    return mlflow.search_runs(
        [parent.info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent.info.run_id}' AND {condition}",
        order_by=["metrics.cv_accuracy DESC", "attributes.run_name ASC"],
        output_format="list",
    )


def finished_trials(parent):
    """Return a DataFrame of the parent's finished trials, best first."""
    runs = trial_runs(parent, "attributes.status = 'FINISHED'")
    return pd.DataFrame({"trial": r.info.run_name, **r.data.metrics, **r.data.params} for r in runs)


def refinement(best, grid):
    """Return the combinations of the best numbers and those half-way to their grid neighbours."""
    axes = {}
    for name, values in grid.items():
        axes[name] = [best[name]]
        if all(type(value) in (int, float) for value in values):
            i = sorted(values).index(best[name])
            near = sorted(values)[max(i - 1, 0) : i + 2]  # so the grid's bounds are kept to
            axes[name] = sorted({type(value)((value + best[name]) / 2) for value in near})
    return [params for params in ParameterGrid(axes) if params not in list(ParameterGrid(grid))]


def cheapest_within_one_se(trials):
    """Return the cheapest trial whose score is within one standard error of the best one's.

    The rule of Breiman et al., Classification and Regression Trees (1984), section 3.4.3.
    """
    best = trials.iloc[0]
    standard_error = best["cv_accuracy_std"] / (FOLDS - 1) ** 0.5
    close = trials[trials["cv_accuracy"] >= best["cv_accuracy"] - standard_error]
    return close.sort_values("fit_seconds").iloc[0]


def heat_map(trials, combinations):
    """Return a figure of the mean accuracies: the last parameter across, the others down."""
    table = pd.DataFrame.from_dict(combinations, orient="index")
    *down, across = table.columns
    table["accuracy"] = trials.set_index("trial")["cv_accuracy"]
    table = table.pivot_table("accuracy", index=down, columns=across)
    figure = Figure(figsize=(7, 2 + len(table) / 2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(table, aspect="auto", cmap="Blues", alpha=0.6)
    axes.set(xlabel=across, ylabel=", ".join(down), title=f"Accuracy, mean over {FOLDS} folds")
    axes.set_xticks(range(table.shape[1]), table.columns)
    axes.set_yticks(range(table.shape[0]), table.index)
    for (row, column), accuracy in np.ndenumerate(table):
        axes.text(column, row, f"{accuracy:.4f}", ha="center", va="center")
    return figure


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


def print_where_to_look(experiment_id):
    """Print the command and the link that show the runs in a browser."""
    uri = mlflow.get_tracking_uri()
    server = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    print(f"Look:  {server}/#/experiments/{experiment_id}/runs?workflowType=machine_learning")
    if server != uri:
        print(f"       after starting  mlflow ui --backend-store-uri {uri}")


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--refine", action="store_true", help="go on with a finer grid")
    parser.add_argument("--resume", metavar="RUN_ID", help="continue a search that was cut short")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="train on this Dask cluster")
    args = parser.parse_args()
    X, y, data_name = load_data()
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=TEST_SIZE, stratify=y, random_state=SEED
    )
    train = as_dataset(X_train, y_train, f"{data_name}-train")
    test = as_dataset(X_test, y_test, f"{data_name}-test")
    plan = {"grid": str(PARAM_GRID), "rows": train.digest}
    try:
        coarse = {f"coarse-{i:04}": params for i, params in enumerate(ParameterGrid(PARAM_GRID), 1)}
        RandomForestClassifier().set_params(**coarse["coarse-0001"])  # raises if one is unknown
        if args.scheduler:
            from dask.distributed import Client

            Client(args.scheduler, timeout=5)
        open_store(EXPERIMENT)
        if args.resume:
            session = mlflow.get_run(args.resume)
            if not plan.items() <= session.data.params.items():
                raise ValueError(f"{args.resume} is not a search of this grid on these rows")
            if session.info.status == "FINISHED":
                raise ValueError(f"{args.resume} is complete, there is nothing to resume")
            for run in trial_runs(session, "attributes.status != 'FINISHED'"):
                mlflow.delete_run(run.info.run_id)  # it was cut short or failed: try it again
    except (ImportError, OSError, ValueError, MlflowException) as error:
        hint = ": pip install distributed" if isinstance(error, ImportError) else ""
        parser.exit(2, f"{parser.prog}: {str(error).splitlines()[0]}{hint}\n")

    start, combinations = time.perf_counter(), coarse
    with (
        parallel_config("dask" if args.scheduler else "loky"),
        mlflow.start_run(run_id=args.resume, run_name="grid-search") as parent,
    ):
        mlflow.log_params(plan)
        mlflow.log_input(train, context="training")
        try:
            search(coarse, parent, X_train, y_train, train)
            trials = finished_trials(parent)
            if args.refine and len(trials):
                finer = refinement(coarse[trials["trial"][0]], PARAM_GRID)
                combinations = coarse | {f"refine-{i:04}": p for i, p in enumerate(finer, 1)}
                search(combinations, parent, X_train, y_train, train)
                trials = finished_trials(parent)
        except KeyboardInterrupt:
            mlflow.end_run("KILLED")
            command = f"python {' '.join(sys.argv)} --resume {parent.info.run_id}"
            parser.exit(130, f"\nStopped. The finished trials are kept; to go on: {command}\n")
        if trials.empty:
            mlflow.end_run("FAILED")
            parser.exit(1, f"All {len(combinations)} trials failed; their tag `error` says why\n")

        best, cheap = trials.iloc[0], cheapest_within_one_se(trials)
        best_params = combinations[best["trial"]]
        model = RandomForestClassifier(**best_params, random_state=SEED).fit(X_train, y_train)
        model_id = log_model(model, X_train).model_id
        mlflow.log_params({f"best_{name}": value for name, value in best_params.items()})
        scores = {"best_cv_accuracy": best["cv_accuracy"]}
        mlflow.log_metrics(scores, model_id=model_id, dataset=train)
        mlflow.log_input(test, context="testing")
        scores = {"test_accuracy": model.score(X_test, y_test)}
        mlflow.log_metrics(scores, model_id=model_id, dataset=test)
        mlflow.log_metric("search_seconds", time.perf_counter() - start)
        mlflow.log_text(trials.to_csv(index=False), "trials.csv")
        mlflow.log_figure(heat_map(trials, coarse), "grid.png")

    metrics = mlflow.get_run(parent.info.run_id).data.metrics
    print(f"\nThe five best of {len(trials)} trials, by their mean accuracy over {FOLDS} folds:")
    print(trials.head().to_string(index=False, float_format="{:.4f}".format))
    print(f"\nBest parameters:   {best_params}")
    print(f"Hold-out accuracy: {metrics['test_accuracy']:.4f}")
    share = cheap["fit_seconds"] / best["fit_seconds"]
    print(
        f"Cheapest within one standard error: {cheap['trial']}, at {share:.0%} of the time to fit"
    )
    compute = trials["fit_seconds"].sum() * FOLDS
    print(f"Cost: {compute:.0f} s of fitting in {metrics['search_seconds']:.0f} s")
    print_where_to_look(parent.info.experiment_id)
    print("Next:  python model_comparison.py")


if __name__ == "__main__":
    main()
