"""Tune a random forest with MLflow: a parent run for the search, a child run for each trial.

27 combinations of three parameters are cross-validated on the training part of scikit-learn's
breast cancer data. The script then asks MLflow for the best one, refits it, and scores it
once on the hold-out. You will see that the depth of the trees matters most, and that a forest
within one standard error of the best trains in about a quarter of the best one's time.

    python hyperparameter_tuning.py
    python hyperparameter_tuning.py --csv customers.csv --target churned --metric f1
    python hyperparameter_tuning.py --resume RUN_ID

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment hyperparameter-tuning
    └── grid-search                  best parameters and scores, grid.html, search.png, `model`
        └── trial-0001 … trial-0027  parameters, cv_accuracy, cv_accuracy_std, fit_seconds
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
import multiprocessing
import os
import re
import shlex
import signal
import sqlite3
import sys
import threading
import time
import traceback
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import closing, contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import mlflow
import numpy as np
import pandas as pd
import sqlalchemy
from joblib import Parallel, delayed, parallel_config
from matplotlib.figure import Figure
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    precision_score,
    recall_score,
)
from sklearn.model_selection import (
    ParameterGrid,
    StratifiedKFold,
    cross_validate,
    train_test_split,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

EXPERIMENT = "hyperparameter-tuning"
SEED = 42  # for the split, the folds and the forests
TEST_SIZE = 0.2  # share of the rows held out: not used by any trial
FOLDS = 5  # with more of them, or a larger TEST_SIZE, raise min_rows in check_labels

# The values to try for each parameter.
PARAM_GRID = {
    "max_depth": [1, 3, 9],
    "max_features": [0.1, 0.3, 0.9],  # share of the features that each split chooses from
    "n_estimators": [20, 100, 300],
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
    metric = args.metric
    train, test = load_data(args.csv, args.target, TEST_SIZE, SEED)
    trials = make_trials(PARAM_GRID)
    settings = describe_search(PARAM_GRID, metric, FOLDS, SEED, train)

    experiment_id = open_store(EXPERIMENT)
    todo = trials
    if args.resume is not None:
        todo = unfinished_trials(args.resume, trials, settings)

    print(f"{len(todo)} trials of {FOLDS} folds each", flush=True)
    started = time.perf_counter()
    with mlflow.start_run(run_id=args.resume, run_name="grid-search") as search, resumable(args):
        search_id = search.info.run_id
        mlflow.log_params(settings)
        log_rows(training=train, testing=test)
        with start_trials(todo, train, metric, METRICS[metric], FOLDS, SEED) as results:
            for result in show_progress(results, metric, len(todo)):
                log_trial(result, train.dataset)

        ranked = find_best_trials(search_id, metric)
        if ranked.empty:
            raise Refused(f"all {len(trials)} trials failed; their tag `error` says why")

        best = ranked.iloc[0]
        # By the name of the run, because MLflow returns parameters as text.
        best_params = trials[best["tags.mlflow.runName"]]
        refit_best(best_params, train, test, metric, METRICS[metric], SEED, TRUSTED)
        log_grid(ranked, best_params, PARAM_GRID, metric)
        log_best(best, best_params, metric, train)
        mlflow.log_metric("session_seconds", time.perf_counter() - started)

    print_report(search_id, ranked, metric, PARAM_GRID, FOLDS)
    print(where_to_look(experiment_id, f"metrics.`cv_{metric}`"))
    print("Next: ", command_line("model_comparison.py", "--tuned", search_id, args=args))


def parse_args(argv):
    """Return the options of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="use this table, not the breast cancer data")
    parser.add_argument("--target", default="diagnosis", help="the column to predict")
    parser.add_argument(
        "--metric", choices=METRICS, default="accuracy", help="what decides which trial is best"
    )
    parser.add_argument("--resume", metavar="RUN_ID", help="continue a search that was cut short")
    return parser.parse_args(argv)


def make_trials(grid):
    """Return {name of the trial: parameters}, for each combination of the grid.

    Raises UserError if the forest does not know one of the parameters.
    """
    unknown = set(grid) - set(RandomForestClassifier().get_params())
    if unknown:
        raise UserError(f"PARAM_GRID: a random forest has no {', '.join(sorted(unknown))}")
    # Python's numbers only: log_best() logs repr(value), and model_comparison.py can read
    # "0.1" back, but not "np.float64(0.1)".
    lists = {name: [to_python(value) for value in values] for name, values in grid.items()}
    combinations = ParameterGrid(lists)
    return {f"trial-{number:04}": params for number, params in enumerate(combinations, start=1)}


def to_python(value):
    """Return a NumPy number as a Python number, and anything else unchanged."""
    return value.item() if isinstance(value, np.generic) else value


def describe_search(grid, metric, n_folds, seed, train):
    """Return the settings that a search and its continuation must share."""
    return {
        "grid": str(grid),
        "metric": metric,
        "folds": f"{n_folds}, seed {seed}",
        "training_digest": train.dataset.digest,
    }


def unfinished_trials(search_id, trials, settings, quiet_minutes=5):
    """Return the trials that an interrupted search still has to run.

    These are the trials that were never logged, and those that failed. A child run that is
    still RUNNING was cut short while it was logged: it is deleted, and its trial runs again.
    The search gets the tag `resumed_at`.

    Raises UserError if the search is finished, has other settings, or may still be running
    elsewhere: its status is RUNNING, and it was started, resumed or logged to in the last
    `quiet_minutes`. Pass more if one trial takes longer than that.
    """
    search = mlflow.get_run(search_id)
    if search.info.status == "FINISHED":
        raise UserError(f"cannot resume {search_id}: it is finished")
    # MLflow returns parameters as text, and the settings are text.
    if not settings.items() <= search.data.params.items():
        raise UserError(f"cannot resume {search_id}: it has other settings or rows")

    children = mlflow.search_runs(
        [search.info.experiment_id],
        f"tags.mlflow.parentRunId = '{search_id}'",
        output_format="list",
    )
    last_sign = max(run.info.start_time for run in [search, *children]) / 1000
    last_sign = max(last_sign, float(search.data.tags.get("resumed_at", 0)))
    if search.info.status == "RUNNING" and time.time() - last_sign < 60 * quiet_minutes:
        raise UserError(
            f"{search_id} may still be running; if it is not, try again in {quiet_minutes} minutes"
        )

    finished = set()
    for child in children:
        if child.info.status == "RUNNING":
            mlflow.delete_run(child.info.run_id)
        if child.info.status == "FINISHED":
            finished.add(child.info.run_name)
    mlflow.MlflowClient().set_tag(search_id, "resumed_at", time.time())
    return {name: params for name, params in trials.items() if name not in finished}


@contextmanager
def resumable(args):
    """On Ctrl-C, end the active run as KILLED, and say how to continue it."""
    search_id = mlflow.active_run().info.run_id
    try:
        yield
    except KeyboardInterrupt:
        mlflow.end_run("KILLED")  # otherwise, MLflow would call it FAILED
        command = command_line("hyperparameter_tuning.py", "--resume", search_id, args=args)
        raise KeyboardInterrupt(f"by Ctrl-C; to resume: {command}") from None


class TrialResult(NamedTuple):
    """What came of a trial."""

    name: str
    params: dict
    metrics: dict  # empty if it failed
    error: str  # empty if it did not fail


def start_trials(trials, train, metric, score, n_folds, seed):
    """Start the trials on all cores, as in `with start_trials(...) as results`.

    `results` is an iterator over their TrialResults, as they finish. At the end of the block,
    anything still running is stopped.
    """
    options = {"metric": metric, "score": score, "n_folds": n_folds, "seed": seed}
    # The last trials of this grid take longest, so they start first. Otherwise, one core
    # would still be busy with them at the end, while the others idle.
    tasks = [
        delayed(try_trial)(name, trials[name], train.X, train.y, **options)
        for name in reversed(trials)
    ]
    return run_in_parallel(tasks, "generator_unordered")


def try_trial(name, params, X, y, **options):
    """Return the TrialResult of a trial. One that raises must not end the search."""
    try:
        metrics = run_trial(params, X, y, **options)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        return TrialResult(name, params, {}, f"{type(error).__name__}: {first_line}")
    return TrialResult(name, params, metrics, error="")


def run_trial(params, X, y, metric, score, n_folds, seed):
    """Cross-validate a forest with these parameters and return its metrics.

    cv_METRIC and cv_METRIC_std are the mean and the standard deviation over the folds,
    fit_seconds is the mean time of one fit.
    """
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    model = make_forest(params, X, seed)

    # make_scorer(score) fails: it looks for a class 1, the default pos_label of f1_score, but
    # the classes are text.
    def scorer(fitted, X_fold, y_fold):
        return score(y_fold, fitted.predict(X_fold))

    # One core per trial, even if the caller has selected another joblib backend (Dask).
    with parallel_config("sequential"):
        results = cross_validate(model, X, y, cv=folds, scoring=scorer, error_score="raise")
    return {
        # Rounded, so that equal scores tie: sums in another order differ in their last bits.
        f"cv_{metric}": results["test_score"].mean().round(12),
        f"cv_{metric}_std": results["test_score"].std(),
        "fit_seconds": results["fit_time"].mean(),
    }


def make_forest(params, X, seed):
    """Return an unfitted forest with these parameters, for raw rows with the columns of X."""
    return add_preprocessing(RandomForestClassifier(**params, random_state=seed), X)


def show_progress(results, metric, total):
    """Pass each result on, then print it and the time that is left, which is too high at first."""
    started = time.perf_counter()
    for done, result in enumerate(results, start=1):
        yield result  # the caller logs it
        seconds_left = (time.perf_counter() - started) * (total - done) / done
        outcome = result.error
        if not outcome:
            mean = result.metrics[f"cv_{metric}"]
            deviation = result.metrics[f"cv_{metric}_std"]
            outcome = f"{metric} {mean:.4f} ± {deviation:.4f}"
        line = f"{done:3}/{total} {seconds_left:4.0f} s left  {result.name}  {outcome}"
        print(f"{line}  {format_params(result.params)}", flush=True)


def format_params(params):
    """Return parameters as they would appear in a call."""
    return ", ".join(f"{name}={value!r}" for name, value in params.items())


def log_trial(result, dataset):
    """Log a trial as a child of the active run. If it raised, it is FAILED, with a tag `error`."""
    with mlflow.start_run(run_name=result.name, nested=True):
        mlflow.log_params(result.params)
        mlflow.log_metrics(result.metrics, dataset=dataset)
        if result.error:
            mlflow.set_tag("error", result.error)
            mlflow.end_run("FAILED")  # otherwise, the `with` block would end it as FINISHED


def find_best_trials(search_id, metric):
    """Ask MLflow for the finished trials of a search. Return a DataFrame, the best trial first.

    Of equal scores, the first in the grid wins.
    """
    return mlflow.search_runs(
        [mlflow.get_run(search_id).info.experiment_id],
        f"tags.mlflow.parentRunId = '{search_id}' AND attributes.status = 'FINISHED'",
        order_by=[f"metrics.cv_{metric} DESC", "attributes.run_name ASC"],
    )


def refit_best(params, train, test, metric, score, seed, trusted_types):
    """Fit the best forest on all training rows, log it, and score it once on the hold-out.

    For comparison, also log the score of always predicting the most frequent class.
    """
    model = make_forest(params, train.X, seed).fit(train.X, train.y)
    model_id = log_model(model, train.X, trusted_types)
    test_score = score(test.y, model.predict(test.X))
    mlflow.log_metric(f"test_{metric}", test_score, model_id=model_id, dataset=test.dataset)
    baseline = DummyClassifier().fit(train.X, train.y)
    baseline_score = score(test.y, baseline.predict(test.X))
    mlflow.log_metric(f"baseline_test_{metric}", baseline_score, dataset=test.dataset)


def log_grid(ranked, best_params, grid, metric):
    """Log how much each parameter matters, where to widen the grid, and a table and picture."""
    means = mean_scores(ranked, grid, metric)
    for name, scores in means.items():
        mlflow.log_metric(f"spread_{name}", scores.max() - scores.min())
    for name, advice in values_at_the_edge(best_params, grid).items():
        mlflow.set_tag(f"edge_{name}", advice)
    table = scores_over_grid(ranked, grid, metric)
    mlflow.log_text(table.style.background_gradient("Blues", axis=None).to_html(), "grid.html")
    mlflow.log_figure(draw_search(table, means, metric), "search.png")


def mean_scores(ranked, grid, metric):
    """Return {parameter: Series}: the mean score of the trials with each of its values."""
    means = {}
    for name, values in grid.items():
        by_value = ranked.groupby(f"params.{name}")[f"metrics.cv_{metric}"].mean()
        means[name] = by_value.reindex([str(value) for value in values])
    return means


def values_at_the_edge(params, grid):
    """Return {name: advice} for each parameter whose value lies at the edge of the grid.

    A better value may lie beyond it.
    """
    edges = {}
    for name, values in grid.items():
        # True and False are not numbers here.
        numbers = [value for value in values if type(to_python(value)) in (int, float)]
        # None may stand for "no limit", which is beyond the largest number.
        if len(numbers) > 1 and params[name] == max(numbers) and None not in values:
            edges[name] = f"{params[name]} is the largest value tried; try larger ones"
        if len(numbers) > 1 and params[name] == min(numbers):
            edges[name] = f"{params[name]} is the smallest value tried; try smaller ones"
    return edges


def scores_over_grid(ranked, grid, metric):
    """Return the scores as a table: the last parameter of the grid across, the others down."""
    columns = {f"params.{name}": name for name in grid}
    in_grid_order = ranked.sort_values("tags.mlflow.runName").rename(columns=columns)
    *down, across = grid
    return in_grid_order.pivot_table(
        values=f"metrics.cv_{metric}", index=down, columns=across, sort=False
    )


def draw_search(table, means, metric):
    """Return a figure: the scores over the grid, and the mean score by each parameter's values."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    grid_axes, means_axes = figure.subplots(1, 2)

    row_names = [", ".join(row) if isinstance(row, tuple) else row for row in table.index]
    image = grid_axes.imshow(table, cmap="Blues", aspect="auto")
    figure.colorbar(image, ax=grid_axes, label=f"Cross-validated {metric}")
    grid_axes.set_xticks(range(len(table.columns)), table.columns)
    grid_axes.set_yticks(range(len(table)), row_names)
    grid_axes.set(xlabel=table.columns.name, ylabel=", ".join(map(str, table.index.names)))
    grid_axes.set_title("Every trial")

    for name, scores in means.items():
        means_axes.plot(scores, [name] * len(scores), marker="o")
        for position, (value, score) in enumerate(scores.items()):
            # Alternately above and below, so that the labels of close points do not overlap.
            offset = (0, 8 if position % 2 else -16)
            means_axes.annotate(
                value, xy=(score, name), xytext=offset, textcoords="offset points", ha="center"
            )
    means_axes.set(xlabel=f"Mean {metric} of the trials with this value")
    means_axes.set_title("The longer the line, the more the parameter matters in this grid")
    means_axes.margins(y=0.3)
    return figure


def log_best(best, params, metric, train):
    """Log the best trial to the active run: its parameters and its score."""
    # repr() quotes text, so that model_comparison.py can read the values back.
    mlflow.log_params({f"best_{name}": repr(value) for name, value in params.items()})
    score = best[f"metrics.cv_{metric}"]
    mlflow.log_metric(f"best_cv_{metric}", score, dataset=train.dataset)


def print_report(search_id, ranked, metric, grid, n_folds):
    """Print what a search found, read back from MLflow. `ranked` has the best trial first."""
    data = mlflow.get_run(search_id).data
    print(f"\nThe best of {len(ranked)} trials, by their mean {metric} over {n_folds} folds:")
    print(format_trials(ranked.head(), grid, metric).to_string(index=False))

    best_params = ", ".join(f"{name}={data.params[f'best_{name}']}" for name in grid)
    test_score = data.metrics[f"test_{metric}"]
    baseline_score = data.metrics[f"baseline_test_{metric}"]
    print(f"\nBest parameters  {best_params}")
    print(f"Hold-out         {metric} {test_score:.4f}")
    print(f"Baseline         {metric} {baseline_score:.4f}, always the most frequent class")

    cheapest = cheapest_within_one_standard_error(ranked, metric, n_folds)
    share = cheapest["metrics.fit_seconds"] / ranked["metrics.fit_seconds"].iloc[0]
    trial = cheapest["tags.mlflow.runName"]
    cheapest_note = f"within one standard error of the best, at {share:.0%} of its fit time"
    print(f"Cheapest         {trial}: {cheapest_note}")

    spreads = {name: data.metrics[f"spread_{name}"] for name in grid}
    by_spread = sorted(spreads, key=spreads.get, reverse=True)
    influence = ", ".join(f"{name} {spreads[name]:.4f}" for name in by_spread)
    print(f"Influence        {influence} (mean {metric}, best value minus worst)")
    for name in grid:
        if f"edge_{name}" in data.tags:
            print(f"At the edge      {name}: {data.tags[f'edge_{name}']}")

    fitting = n_folds * ranked["metrics.fit_seconds"].sum()
    session = data.metrics["session_seconds"]
    print(f"Cost             {fitting:.0f} s of fitting; this session took {session:.0f} s\n")


def cheapest_within_one_standard_error(ranked, metric, n_folds):
    """Return the trial that is fastest to fit of those within one standard error of the best.

    `ranked` has the best trial first. The rule is that of Breiman et al., Classification and
    Regression Trees (1984), section 3.4.3, which takes the simplest model instead. The
    standard error treats the folds as independent.
    """
    scores = ranked[f"metrics.cv_{metric}"]
    # The logged deviation has ddof=0. Divided by sqrt(n - 1), it is std(ddof=1) / sqrt(n).
    standard_error = ranked[f"metrics.cv_{metric}_std"].iloc[0] / (n_folds - 1) ** 0.5
    close = ranked[scores >= scores.iloc[0] - standard_error]
    return close.loc[close["metrics.fit_seconds"].idxmin()]


def format_trials(ranked, grid, metric):
    """Return a table of trials to be printed, with units."""
    means = ranked[f"metrics.cv_{metric}"].map("{:.4f}".format)
    deviations = ranked[f"metrics.cv_{metric}_std"].map("{:.4f}".format)
    table = pd.DataFrame({"trial": ranked["tags.mlflow.runName"]})
    table[metric] = means + " ± " + deviations
    table["fit"] = ranked["metrics.fit_seconds"].map("{:.3f} s".format)
    for name in grid:
        table[name] = ranked[f"params.{name}"]
    return table


@contextmanager
def run_in_parallel(tasks, return_as):
    """Run joblib's tasks on all cores, and yield a generator of their results.

    At the end of the `with` block, anything still running is stopped.
    """
    before = multiprocessing.active_children()
    # The workers inherit this: they leave Ctrl-C to this process, which stops them. While
    # they start, Ctrl-C is lost.
    ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        results = Parallel(n_jobs=-1, return_as=return_as)(tasks)
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
    # With neither psutil nor `pgrep`, joblib calls worker.kill(), which fails.
    for worker in set(multiprocessing.active_children()) - set(before):
        worker.kill = worker.terminate
    with warnings.catch_warnings():
        # joblib warns when tasks are abandoned, as after Ctrl-C.
        warnings.filterwarnings("ignore", module="joblib")
        try:
            yield results
        finally:
            results.close()


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
