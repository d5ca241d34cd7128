"""Tune a random forest with MLflow: one parent run for the search, one child run a combination.

Tries 27 combinations by cross-validation on the training part of scikit-learn's breast cancer data,
asks MLflow which was best, refits it and scores it once on the hold-out. What you will see: the
depth of the trees matters most, and a fifth of the cost comes within the noise of the best.

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment hyperparameter-tuning
    └── grid-search       best_* parameters, best_cv_accuracy, test_accuracy, grid.html, the `model`
        └── trial-0001    … trial-0027: parameters, cv_accuracy, cv_accuracy_std, fit_seconds
"""

import contextlib
import logging
import os
import re
import shlex
import signal
import sqlite3
import sys
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import mlflow
import pandas as pd
import requests
from joblib import Parallel, delayed, parallel_config
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.model_selection import ParameterGrid, StratifiedKFold, cross_validate, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

EXPERIMENT = "hyperparameter-tuning"
SEED = 42  # of the split, the folds and the forests
TEST_SIZE = 0.2  # share of the rows that no trial sees
FOLDS = 5
PARAM_GRID = {  # cheap to costly: of equals the first wins, the last start first, else cores idle
    "max_depth": [1, 3, 9],
    "max_features": [0.1, 0.3, 0.9],  # share of the features that each split chooses from
    "n_estimators": [20, 100, 300],
}
TRUSTED = ["numpy.dtype", "sklearn.tree._tree.Tree"]  # types that skops does not know: no code


def run_trial(name, params, X, y):
    """Cross-validate one combination; return its name, its metrics and the error if it raised."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    model = with_preprocessing(RandomForestClassifier(**params, random_state=SEED), X)
    try:
        with parallel_config("sequential"):  # the trials are parallel, nothing within them
            scores = cross_validate(model, X, y, cv=folds, scoring="accuracy", error_score="raise")
    except Exception as error:  # one bad combination must not end the search
        return name, {}, f"{type(error).__name__}: {error}"
    accuracy, seconds = scores["test_score"], scores["fit_time"].mean()  # for one of the fits
    # Rounded, so that equal means are equal: the last bits depend on the order of the sum.
    metrics = {"cv_accuracy": accuracy.mean().round(12), "cv_accuracy_std": accuracy.std()}
    return name, metrics | {"fit_seconds": seconds}, None


def log_trial(parent, name, params, metrics, error, dataset):
    """Log one trial as a child of the run `parent`: FAILED if it has an error."""
    tags = {"error": error} if error else {}
    with mlflow.start_run(run_name=name, parent_run_id=parent.info.run_id, tags=tags):
        mlflow.log_params(params)
        mlflow.log_metrics(metrics, dataset=dataset)
        mlflow.end_run("FAILED" if error else "FINISHED")


def log_trials(results, trials, dataset):
    """Log and print each result as it comes: a child of the active run, visible at once."""
    start, total, parent = time.perf_counter(), len(trials), mlflow.active_run()
    # In a thread, which is waited for: Ctrl-C in the middle of a write would leave SQLite locked.
    with contextlib.closing(results), ThreadPoolExecutor(1) as thread:  # closed: no more workers
        for done, (name, metrics, error) in enumerate(results, 1):
            thread.submit(log_trial, parent, name, trials[name], metrics, error, dataset).result()
            left = (time.perf_counter() - start) * (total / done - 1)
            text = error or "accuracy {cv_accuracy:.4f} ± {cv_accuracy_std:.4f}".format(**metrics)
            print(f"{done:3}/{total} {left:4.0f} s left {name}  {text}  {trials[name]}", flush=True)


def find_trials(parent, status="FINISHED"):
    """Return the parent's children as a DataFrame, best first; with equal scores, by their name."""
    runs = mlflow.search_runs(
        [parent.info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent.info.run_id}' AND attributes.status = '{status}'",
        order_by=["metrics.cv_accuracy DESC", "attributes.run_name ASC"],
    )
    return runs.rename(columns=lambda name: name.split(".")[-1])


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="learn from this table instead")
    parser.add_argument("--target", default="diagnosis", help="its column that holds the classes")
    parser.add_argument("--resume", metavar="RUN_ID", help="continue a search that was cut short")
    args, start = parser.parse_args(), time.perf_counter()
    warnings.filterwarnings("ignore", r"\d+ tasks ")  # of joblib, should the search end early
    (X, y, train), (X_test, y_test, test) = load_data(args.csv, args.target)
    plan = {"grid": str(PARAM_GRID), "folds": f"{FOLDS}, seed {SEED}", "rows": train.digest}
    grid = pd.DataFrame(ParameterGrid(PARAM_GRID), dtype=object).to_dict("records")  # not NumPy's
    trials = todo = {f"trial-{n:04}": params for n, params in enumerate(grid, 1)}
    RandomForestClassifier().set_params(**trials["trial-0001"])  # raises if one is unknown
    if args.resume is not None or "MLFLOW_TRACKING_URI" in os.environ:
        open_store(EXPERIMENT)  # before the workers start: it may be unreachable
    if args.resume is not None:
        parent = mlflow.get_run(args.resume)
        if parent.info.status == "FINISHED" or not plan.items() <= parent.data.params.items():
            raise ValueError(f"{args.resume} is not an unfinished search of this grid and rows")
        for run_id in find_trials(parent, "RUNNING")["run_id"]:
            mlflow.delete_run(run_id)  # it was cut short
        done = set(find_trials(parent).get("runName", []))
        todo = {name: params for name, params in trials.items() if name not in done}
    print(f"{len(todo)} trials of {FOLDS} folds each", flush=True)
    tasks = [delayed(run_trial)(name, todo[name], X, y) for name in reversed(todo)]
    ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit it: no tracebacks
    results = Parallel(n_jobs=-1, return_as="generator_unordered")(tasks)  # starts, does not wait
    signal.signal(signal.SIGINT, ctrl_c)
    _, look = open_store(EXPERIMENT)  # a new one takes seconds: the workers train meanwhile
    with mlflow.start_run(run_id=args.resume, run_name="grid-search") as parent:
        mlflow.log_params(plan)
        with contextlib.suppress(mlflow.MlflowException):  # another makes them now: ask again
            mlflow.log_inputs([train, test], ["training", "testing"], [None, None])
        mlflow.log_inputs([train, test], ["training", "testing"], [None, None])
        try:
            log_trials(results, todo, train)
        except KeyboardInterrupt:
            mlflow.end_run("KILLED")
            command = shlex.join(["python", *sys.argv, "--resume", parent.info.run_id])
            parser.exit(130, f"\nStopped. The finished trials are kept; to go on: {command}\n")
        found = find_trials(parent)
        if found.empty:  # leaving the block by an exit marks the parent FAILED
            parser.exit(1, f"All {len(trials)} trials failed; their tag `error` says why\n")
        best, best_params = found.iloc[0], trials[found["runName"].iloc[0]]
        model = with_preprocessing(RandomForestClassifier(**best_params, random_state=SEED), X)
        model_id = log_model(model.fit(X, y), X)
        mlflow.log_params({f"best_{name}": repr(value) for name, value in best_params.items()})
        mlflow.log_metric("best_cv_accuracy", best["cv_accuracy"], model_id=model_id, dataset=train)
        score = model.score(X_test, y_test)
        mlflow.log_metric("test_accuracy", score, model_id=model_id, dataset=test)
        constant = y_test.value_counts(normalize=True).max()
        mlflow.log_metric("baseline_test_accuracy", constant, dataset=test)
        mlflow.log_metric("search_seconds", time.perf_counter() - start)
        *down, across = PARAM_GRID
        table = found.sort_values("runName").pivot_table("cv_accuracy", down, across, sort=False)
        mlflow.log_text(table.style.background_gradient("Blues", axis=None).to_html(), "grid.html")

    metrics = mlflow.get_run(parent.info.run_id).data.metrics
    # The rule of Breiman et al., Classification and Regression Trees (1984), section 3.4.3.
    floor = best["cv_accuracy"] - best["cv_accuracy_std"] / (FOLDS - 1) ** 0.5
    cheap = found[found["cv_accuracy"] >= floor].sort_values("fit_seconds").iloc[0]
    share, compute = cheap["fit_seconds"] / best["fit_seconds"], found["fit_seconds"].sum() * FOLDS
    columns = ["runName", "cv_accuracy", "cv_accuracy_std", "fit_seconds", *PARAM_GRID]
    print(f"\nThe five best of {len(found)} trials, by their mean accuracy over {FOLDS} folds:")
    print(found[columns].head().to_string(index=False, float_format="{:.4f}".format))
    print(f"\nBest parameters:   {best_params}\nHold-out accuracy: {metrics['test_accuracy']:.4f}")
    print(f"Baseline, always the most frequent class: {metrics['baseline_test_accuracy']:.4f}")
    print(f"Cheapest within one standard error: {cheap['runName']}, {share:.0%} of the time to fit")
    print(f"Cost: {compute:.0f} s of fitting in {metrics['search_seconds']:.0f} s\n\nLook:  {look}")
    own_data = ["--csv", args.csv, "--target", args.target] if args.csv else []
    script = str(Path(sys.argv[0]).with_name("model_comparison.py"))
    print("Next: ", shlex.join(["python", script, "--tuned", parent.info.run_id, *own_data]))


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
