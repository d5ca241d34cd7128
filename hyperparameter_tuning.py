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

import argparse
import logging
import os
import sys
import time
from importlib.metadata import version
from urllib.request import urlopen

import mlflow
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


def describe(params):
    return "  ".join(f"{name}={value}" for name, value in params.items())


def run_trial(name, params, X, y):
    """Cross-validate one combination; return its name, its metrics and the error if it raised."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    try:
        model = RandomForestClassifier(**params, random_state=SEED)
        scores = cross_validate(model, X, y, cv=folds, scoring="accuracy", error_score="raise")
    except Exception as error:  # one bad combination must not end the search
        return name, {}, f"{type(error).__name__}: {error}"
    return (
        name,
        {
            # Rounded, so that equal scores are equal: the last bits depend on the order of the sum.
            "cv_accuracy": round(scores["test_score"].mean(), 12),
            "cv_accuracy_std": round(scores["test_score"].std(), 12),
            "fit_seconds": scores["fit_time"].mean(),  # for one fit: the mean over the folds
        },
        None,
    )


def search(combinations, X, y, dataset):
    """Try the combinations (name: parameters); each becomes a child of the active run.

    The workers train while this process logs each trial as soon as it has finished, so tracking
    costs next to nothing. The longest go first: one that came last would leave the cores idle.
    """
    results = Parallel(n_jobs=-1, return_as="generator_unordered")(
        delayed(run_trial)(name, params, X, y) for name, params in reversed(combinations.items())
    )
    start = time.perf_counter()
    for done, (name, metrics, error) in enumerate(results, 1):
        tags = {"stage": name.split("-")[0], "error": error or "none"}
        with mlflow.start_run(run_name=name, nested=True, tags=tags):
            mlflow.log_params(combinations[name])
            mlflow.log_metrics(metrics, dataset=dataset)
            if error:
                mlflow.end_run("FAILED")
        left = (time.perf_counter() - start) / done * (len(combinations) - done)
        result = error or "accuracy {cv_accuracy:.4f} ± {cv_accuracy_std:.4f}".format(**metrics)
        print(f"{done:3}/{len(combinations)}  {left:3.0f} s left  {name}  {result}", end="  ")
        print(describe(combinations[name]), flush=True)


def children(experiment_id, parent_id):
    """Return the parent's trials as a DataFrame, best first; with equal scores, by their name."""
    runs = mlflow.search_runs(
        [experiment_id],
        filter_string=f"tags.mlflow.parentRunId = '{parent_id}'",
        order_by=["metrics.cv_accuracy DESC", "attributes.run_name ASC"],
    )
    return runs.rename(columns=lambda name: name.removeprefix("tags.mlflow.").split(".")[-1])


def refinement(best, grid):
    """Return the combinations of the best values and those half-way to their neighbours."""
    axes = {}
    for name, values in grid.items():
        axes[name] = [best[name]]
        if all(type(value) in (int, float) for value in values):
            i = values.index(best[name])
            near = values[max(i - 1, 0) : i + 2]
            axes[name] = sorted({type(v)((v + best[name]) / 2) for v in near})
    return [params for params in ParameterGrid(axes) if params != best]


def cheapest_within_one_se(trials):
    """Return the cheapest trial whose score is within one standard error of the best one's.

    The rule of Breiman et al., Classification and Regression Trees (1984), section 3.4.3.
    """
    best = trials.iloc[0]
    standard_error = best["cv_accuracy_std"] / (FOLDS - 1) ** 0.5
    close = trials[trials["cv_accuracy"] >= best["cv_accuracy"] - standard_error]
    return close.sort_values("fit_seconds").iloc[0]


def heat_map(trials, grid):
    """Return a figure of the mean accuracies: the last parameter across, the others down."""
    *down, across = grid
    table = trials.astype(dict.fromkeys(grid, float)).pivot(
        index=down, columns=across, values="cv_accuracy"
    )
    figure = Figure(figsize=(7, 2 + len(table) / 2), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(table, aspect="auto"), label=f"accuracy, mean of {FOLDS} folds")
    axes.set(xlabel=across, ylabel=", ".join(down), title="Accuracy of every combination")
    axes.set_xticks(range(table.shape[1]), table.columns)
    axes.set_yticks(range(table.shape[0]), table.index)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    coarse = {f"coarse-{i:04}": params for i, params in enumerate(ParameterGrid(PARAM_GRID), 1)}
    plan = {"grid": str(PARAM_GRID), "rows": train.digest}
    try:
        RandomForestClassifier().set_params(**coarse["coarse-0001"])  # raises if one is unknown
        if args.scheduler:
            from dask.distributed import Client

            Client(args.scheduler, timeout=5)
        experiment_id = open_store(EXPERIMENT)
        if args.resume and not plan.items() <= mlflow.get_run(args.resume).data.params.items():
            raise ValueError(f"{args.resume} is not a search of this grid on these rows")
    except (ImportError, OSError, ValueError, MlflowException) as error:
        parser.exit(2, f"{parser.prog}: {str(error).splitlines()[0]}\n")

    start = time.perf_counter()
    with (
        parallel_config("dask" if args.scheduler else "loky"),
        mlflow.start_run(run_id=args.resume, run_name="grid-search") as parent,
    ):
        parent_id = parent.info.run_id
        mlflow.log_params(plan)
        mlflow.log_input(train, context="training")
        done = {}
        if args.resume:
            runs = children(experiment_id, parent_id)
            for run_id in runs.loc[runs["status"] != "FINISHED", "run_id"]:
                mlflow.delete_run(run_id)  # it was cut short, or failed: try it again
            done = set(runs.loc[runs["status"] == "FINISHED", "runName"])
        try:
            combinations = coarse
            search({n: p for n, p in coarse.items() if n not in done}, X_train, y_train, train)
            trials = children(experiment_id, parent_id)
            if args.refine:
                fine = refinement(coarse[trials.iloc[0]["runName"]], PARAM_GRID)
                fine = {f"refine-{i:04}": params for i, params in enumerate(fine, 1)}
                combinations = coarse | fine
                search({n: p for n, p in fine.items() if n not in done}, X_train, y_train, train)
                trials = children(experiment_id, parent_id)
        except KeyboardInterrupt:
            mlflow.end_run("KILLED")
            command = f"python {sys.argv[0]} {'--refine ' * args.refine}--resume {parent_id}"
            parser.exit(130, f"\nStopped. What has finished is kept; go on with: {command}\n")
        trials = trials[trials["status"] == "FINISHED"]
        if trials.empty:
            mlflow.end_run("FAILED")
            parser.exit(
                1, f"All {len(combinations)} trials failed; the runs' tag `error` says why\n"
            )

        best, cheap = trials.iloc[0], cheapest_within_one_se(trials)
        best_params = combinations[best["runName"]]
        model = RandomForestClassifier(**best_params, random_state=SEED).fit(X_train, y_train)
        model_id = log_model(model, X_train).model_id
        mlflow.log_params({f"best_{name}": value for name, value in best_params.items()})
        mlflow.set_tag("cheapest_within_one_se", cheap["runName"])
        scores = {"best_cv_accuracy": best["cv_accuracy"]}
        mlflow.log_metrics(scores, model_id=model_id, dataset=train)
        mlflow.log_input(test, context="testing")
        scores = {"test_accuracy": model.score(X_test, y_test)}
        mlflow.log_metrics(scores, model_id=model_id, dataset=test)
        mlflow.log_metric("search_seconds", time.perf_counter() - start)
        mlflow.log_figure(heat_map(trials[trials["stage"] == "coarse"], PARAM_GRID), "grid.png")
        table = trials[["runName", "cv_accuracy", "cv_accuracy_std", "fit_seconds", *PARAM_GRID]]
        mlflow.log_text(table.to_csv(index=False), "trials.csv")

    metrics = mlflow.get_run(parent_id).data.metrics
    print(f"\nThe five best of {len(trials)} trials, by their mean accuracy over {FOLDS} folds:")
    print(table.head().to_string(index=False, float_format="{:.4f}".format))
    print(f"\nBest parameters:    {describe(best_params)}")
    print(f"Hold-out accuracy:  {metrics['test_accuracy']:.4f}")
    saved = 1 - cheap["fit_seconds"] / best["fit_seconds"]
    print(
        f"Within one standard error of the best and {saved:.0%} cheaper to fit: {cheap['runName']}"
    )
    compute = trials["fit_seconds"].sum() * FOLDS
    print(f"Cost:               {compute:.0f} s of fitting in {metrics['search_seconds']:.0f} s")
    print_where_to_look(experiment_id)
    print("Next:  python model_comparison.py")


if __name__ == "__main__":
    main()
