"""Compare four classifiers with MLflow: which is best, how certain is it, what do they cost?

All are scored on the same folds, a 5-fold cross-validation that is repeated 30 times, on the
training part of scikit-learn's breast cancer data. The script then asks MLflow for the best
one, and computes how probable it is that each of the others is worse, or practically the
same. Of those that are practically as good as the best, it recommends one that answers fast.
You will see that a scaled logistic regression leads, that an SVM is practically the same, and
that both answer more than twice as fast as a forest.

    python model_comparison.py
    python model_comparison.py --csv customers.csv --target churned --metric f1
    python model_comparison.py --tuned RUN_ID

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment model-comparison
    └── comparison               best_model, recommended_model, comparison.csv and .png, folds.csv
        ├── logistic_regression  ┐
        ├── svm                  │ parameters; metrics cv_… (folds), test_… (hold-out) and p_…;
        ├── gradient_boosting    │ fit_seconds, latency_ms_p50 and other costs; the model `model`
        └── random_forest        ┘
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

import ast
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
import timeit
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
from joblib import Parallel, cpu_count, delayed
from matplotlib.figure import Figure
from scipy import stats
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_score,
    recall_score,
)
from sklearn.model_selection import RepeatedStratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC, LinearSVC
from threadpoolctl import threadpool_limits

EXPERIMENT = "model-comparison"
SEED = 42  # for the split, the folds, the models and the rows that are timed
TEST_SIZE = 0.2  # share of the rows held out: not used to choose a model
FOLDS = 5
# The folds are shuffled anew this many times, so that the scores hardly depend on how. A
# large table needs fewer: see make_folds.
REPEATS = 30

# Region of practical equivalence: a difference of up to this does not matter.
ROPE = 0.01
# The recommended model may be worse than the best by more than ROPE with at most this
# probability, and fail to beat the baseline with at most this one. The verdicts use it, too.
RISK = 0.2
# Latencies up to this many times the lowest count as equal.
NOISE = 1.1

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
    train, test = load_data(args.csv, args.target, TEST_SIZE, SEED)  # each has X, y and dataset
    candidates = make_candidates(len(train.X), SEED)
    experiment_id = open_store(EXPERIMENT)
    if args.tuned is not None:
        candidates["tuned_forest"] = load_tuned_forest(args.tuned, train, SEED)

    folds = make_folds(train, FOLDS, REPEATS, SEED)
    print(f"{len(candidates)} candidates on {len(folds) // FOLDS} x {FOLDS} folds each", flush=True)
    with mlflow.start_run(run_name="comparison") as comparison:
        comparison_id = comparison.info.run_id
        log_rows(training=train, testing=test)

        deciding_metric = {metric: METRICS[metric]}
        baseline = score_folds(DummyClassifier(), train.X, train.y, folds, deciding_metric)
        # A row for each fold. Each candidate adds a column.
        fold_scores = pd.DataFrame({"baseline": baseline[metric]})

        with start_scoring(candidates, folds, train, METRICS) as (results, expected_seconds):
            for result in show_progress(results, expected_seconds, metric):
                params = candidates[result.name].get_params()
                if log_candidate(result, params, train, test, METRICS, TRUSTED):
                    fold_scores[result.name] = result.scores[metric]

        models = find_best_models(experiment_id, comparison_id, metric, train)
        if not models:
            raise Refused("every candidate failed; the tag `error` of its run says why")

        log_probabilities(models, fold_scores, ROPE, RISK, FOLDS)
        # No fit is running any more, so these are the times of the models alone.
        log_serving_costs(models, train, SEED)

        # Ask again, now for runs, with the probabilities and costs logged since.
        runs = load_runs(experiment_id, comparison_id, metric)
        recommended = recommend(runs, RISK, NOISE)
        log_choice(runs, recommended, fold_scores, metric, train)
        log_report(runs, fold_scores, models[0], test, metric, ROPE, FOLDS)

    print_report(comparison_id, runs, metric, ROPE)
    print(how_to_load_the_best(experiment_id, comparison_id, metric, train))
    print(where_to_look(experiment_id, f"metrics.`cv_{metric}`"))
    if recommended is None:
        raise Refused("the best is not shown to beat the baseline, so none should be deployed")
    model_uri = f"runs:/{recommended['run_id']}/model"
    print("Next: ", command_line("production_deployment.py", "--model-uri", model_uri, args=args))


def parse_args(argv):
    """Return the options of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="use this table, not the breast cancer data")
    parser.add_argument("--target", default="diagnosis", help="the column to predict")
    parser.add_argument(
        "--metric", choices=METRICS, default="accuracy", help="what decides which model is best"
    )
    parser.add_argument("--tuned", metavar="RUN_ID", help="compare the best of this search as well")
    return parser.parse_args(argv)


def make_candidates(n_rows, seed):
    """Return the models to compare, by name. A fifth candidate is one more line.

    Of equal scores the first one wins, so the simplest stands first.
    """
    if n_rows <= 10_000:
        svm = SVC()
    else:
        # The time that an SVC takes grows at least with the square of the rows.
        print("svm: LinearSVC on a Nystroem approximation of an RBF kernel, as there are many rows")
        svm = make_pipeline(Nystroem(random_state=seed), LinearSVC(random_state=seed))
    return {
        "logistic_regression": LogisticRegression(max_iter=1000),
        "svm": svm,
        "gradient_boosting": HistGradientBoostingClassifier(random_state=seed),
        "random_forest": RandomForestClassifier(random_state=seed),
    }


def load_tuned_forest(search_id, train, seed):
    """Return an unfitted forest with the best parameters of a search by hyperparameter_tuning.py.

    Raises UserError unless the search is finished, and was made on these rows.
    """
    search = mlflow.get_run(search_id)
    same_rows = search.data.params.get("training_digest") == train.dataset.digest
    if search.info.status != "FINISHED" or not same_rows:
        raise UserError(f"{search_id} is not a finished search on these rows")
    params = {
        key.removeprefix("best_"): ast.literal_eval(value)
        for key, value in search.data.params.items()
        if key.startswith("best_")
    }
    print("Note: tuned_forest was chosen on these rows, so its scores on the folds are a little")
    print("      too good; its score on the hold-out is not", flush=True)
    return RandomForestClassifier(**params, random_state=seed)


def make_folds(train, n_folds, max_repeats, seed):
    """Return for each fold two arrays of positions: rows to train on, rows to score on.

    The more rows, the fewer repeats: from `max_repeats` down to two.
    """
    # Each repeat scores every row once. 15,000 scored rows make the means steady enough.
    repeats = max(2, min(max_repeats, 15_000 // len(train.X)))
    splitter = RepeatedStratifiedKFold(n_splits=n_folds, n_repeats=repeats, random_state=seed)
    return list(splitter.split(train.X, train.y))


def score_folds(model, X, y, folds, metrics):
    """Score a model on all folds, one after another. Return a DataFrame with a row for each."""
    return pd.DataFrame([score_fold(model, X, y, fold, metrics) for fold in folds])


def score_fold(model, X, y, fold, metrics):
    """Fit a copy of the model on one part of a fold; return its scores on the other part."""
    train_rows, test_rows = fold
    started = time.perf_counter()
    fitted = clone(model).fit(X.iloc[train_rows], y.iloc[train_rows])
    fit_seconds = time.perf_counter() - started
    scores = score_predictions(y.iloc[test_rows], fitted.predict(X.iloc[test_rows]), metrics)
    return scores | {"fit_seconds": fit_seconds}


def score_predictions(y, predicted, metrics):
    """Return every metric of some predictions, by its name."""
    return {name: score(y, predicted) for name, score in metrics.items()}


class Result(NamedTuple):
    """What came of a candidate."""

    name: str
    model: object  # fitted on all training rows
    scores: pd.DataFrame  # a row for each fold; the metrics and fit_seconds as columns
    error: Exception | None  # if one was raised; then model and scores are empty


@contextmanager
def start_scoring(candidates, folds, train, metrics):
    """Score the candidates on all cores.

    Yields two: an iterator over their Results, in the same order, and the seconds that each
    is likely to take, by name. At the end of the `with` block, what still runs is stopped.
    """
    models = {name: add_preprocessing(model, train.X) for name, model in candidates.items()}
    first_fold, *other_folds = folds

    # All tasks stand in one queue, so that no core idles between two candidates. One fold of
    # each comes first, to estimate the time that the others take.
    tasks = [score_task(model, train, first_fold, metrics) for model in models.values()]
    for model in models.values():
        # The fit on all rows takes longest, so it goes first. At the end of the queue, it
        # would keep one core busy while the others idle.
        tasks.append(delayed(attempt)(model.fit, train.X, train.y))
        tasks += [score_task(model, train, fold, metrics) for fold in other_folds]

    # The workers use all cores, so this process should not add threads of its own.
    with threadpool_limits(1), run_in_parallel(tasks, "generator") as outcomes:
        # They come in the order of the tasks.
        first_scores = {name: next(outcomes) for name in models}
        results = collect_results(first_scores, outcomes, len(other_folds))
        yield results, estimate_seconds(first_scores, len(folds))


def score_task(model, train, fold, metrics):
    """Return the task of scoring a model on a fold, for joblib."""
    return delayed(attempt)(score_fold, model, train.X, train.y, fold, metrics)


def attempt(function, *args):
    """Return what the function returns or the exception that it raises, so that others go on."""
    try:
        return function(*args)
    except Exception as error:
        return error


def collect_results(first_scores, outcomes, n_others):
    """Yield the Result of each candidate, as soon as all of its outcomes are there.

    `outcomes` has, for each candidate in turn, its model and then its `n_others` other folds.
    """
    for name, first in first_scores.items():
        model = next(outcomes)
        others = [next(outcomes) for _ in range(n_others)]
        errors = [one for one in (model, first, *others) if isinstance(one, Exception)]
        if errors:
            yield Result(name, model=None, scores=pd.DataFrame(), error=errors[0])
        else:
            yield Result(name, model, pd.DataFrame([first, *others]), error=None)


def estimate_seconds(first_scores, n_fits):
    """Return how long each candidate takes on all cores, if its fits take as long as the first."""
    seconds = {}
    for name, scores in first_scores.items():
        failed = isinstance(scores, Exception)
        seconds[name] = 0 if failed else scores["fit_seconds"] * n_fits / cpu_count()
    return seconds


def show_progress(results, expected_seconds, metric):
    """Pass each result on, then print it and the time that is left.

    `expected_seconds` has the time that each candidate is likely to take, by its name.
    """
    total = len(expected_seconds)
    seconds_left = sum(expected_seconds.values())
    print(f"  0/{total} {seconds_left:4.0f} s left", flush=True)
    for done, result in enumerate(results, start=1):
        yield result  # the caller logs it
        seconds_left = max(0, seconds_left - expected_seconds[result.name])
        outcome = "failed"
        if result.error is None:
            scores = result.scores[metric]
            outcome = f"{metric} {scores.mean():.4f} ± {scores.std(ddof=0):.4f}"
        print(f"{done:3}/{total} {seconds_left:4.0f} s left  {result.name}  {outcome}", flush=True)


def log_candidate(result, params, train, test, metrics, trusted_types):
    """Log a candidate as a child of the active run: its folds, its model, and its hold-out scores.

    Returns True, or False if it failed: then the run is FAILED, and its tag `error` says why.
    """
    comparison_id = mlflow.active_run().info.run_id
    with mlflow.start_run(run_name=result.name, nested=True):
        mlflow.log_params(params)
        log_rows(training=train, testing=test)
        try:
            if result.error is not None:
                raise result.error  # to be logged like an error of the next two lines
            model_id = log_model(result.model, train.X, trusted_types)
            test_scores = score_logged_model(model_id, test, metrics)
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            mlflow.set_tag("error", f"{type(error).__name__}: {first_line}")
            mlflow.end_run("FAILED")  # the `with` block leaves a run that has ended as it is
            return False

        cv_scores = summarize_folds(result.scores)
        mlflow.log_metrics(cv_scores, model_id=model_id, dataset=train.dataset)
        mlflow.log_metrics(test_scores, model_id=model_id, dataset=test.dataset)
        # The model will be found by these tags.
        tags = {"candidate": result.name, "comparison": comparison_id}
        mlflow.set_logged_model_tags(model_id, tags)
        return True


def score_logged_model(model_id, test, metrics):
    """Return the scores of a logged model on the hold-out, as test_METRIC."""
    predicted = mlflow.pyfunc.load_model(f"models:/{model_id}").predict(test.X)
    scores = score_predictions(test.y, predicted, metrics)
    return {f"test_{name}": score for name, score in scores.items()}


def summarize_folds(scores):
    """Return mean (cv_METRIC) and deviation (cv_METRIC_std) of the folds, and fit_seconds."""
    summary = {"fit_seconds": scores["fit_seconds"].mean()}
    for metric in scores.columns.drop("fit_seconds"):
        # Rounded, so that equal scores tie: sums in another order differ in their last bits.
        summary[f"cv_{metric}"] = round(scores[metric].mean(), 12)
        summary[f"cv_{metric}_std"] = scores[metric].std(ddof=0)
    return summary


def find_best_models(experiment_id, comparison_id, metric, train):
    """Ask MLflow for the models of a comparison. Return a list of LoggedModel, the best first.

    Of equal scores, the first candidate in the list wins. Failed candidates are left out.
    """
    best_first = {
        "field_name": f"metrics.cv_{metric}",
        "ascending": False,
        "dataset_name": train.dataset.name,
        "dataset_digest": train.dataset.digest,
    }
    earliest_first = {"field_name": "creation_timestamp", "ascending": True}
    return mlflow.search_logged_models(
        [experiment_id],
        filter_string=f"tags.comparison = '{comparison_id}'",
        order_by=[best_first, earliest_first],
        output_format="list",
    )


def log_probabilities(models, fold_scores, rope, risk, n_folds):
    """Log how each model compares with the best, models[0], and with the baseline.

    `fold_scores` has a row for each fold, and a column for each model and the baseline. The
    best was chosen by these same scores, so its lead is a little too large.
    """
    best = models[0].tags["candidate"]
    for model in models:
        name = model.tags["candidate"]
        p = probabilities(fold_scores[name] - fold_scores[best], rope, n_folds)
        above = fold_scores[name] - fold_scores["baseline"]
        p["p_above_baseline"] = probabilities(above, rope=0, n_folds=n_folds)["p_better"]
        mlflow.log_metrics(p, run_id=model.source_run_id)
        verdict = say_verdict(p, name == best, risk)
        mlflow.MlflowClient().set_tag(model.source_run_id, "verdict", verdict)


def probabilities(differences, rope, n_folds):
    """Return the probabilities that a model is worse than another, practically the same, or better.

    This is the Bayesian correlated t-test of Benavoli, Corani, Demšar and Zaffalon (Journal
    of Machine Learning Research 18, 2017). `differences` are the scores of the one model
    minus those of the other, on the same folds of (repeated) cross-validation with `n_folds`
    folds. A difference of up to `rope` counts as none.
    """
    posterior = posterior_of_mean(differences, n_folds)
    p_worse = posterior.cdf(-rope)
    p_better = posterior.sf(rope)
    return {"p_worse": p_worse, "p_equivalent": 1 - p_worse - p_better, "p_better": p_better}


def posterior_of_mean(differences, n_folds):
    """Return the posterior of the mean difference, a Student t distribution from scipy.stats.

    Folds share training rows, so their scores are correlated. The variance of the mean is
    therefore not variance / n, but variance * (1 / n + test rows / training rows) (Nadeau and
    Bengio, Machine Learning 52, 2003).
    """
    n = len(differences)
    variance = differences.var(ddof=1) * (1 / n + 1 / (n_folds - 1))
    # The best differs from itself by zero on all folds, and SciPy has no scale of zero.
    return stats.t(df=n - 1, loc=differences.mean(), scale=max(variance**0.5, 1e-12))


def say_verdict(p, is_best, risk):
    """Put the probabilities of a model, against the best and against the baseline, into words."""
    if p["p_above_baseline"] < 1 - risk:
        return "not shown to beat the baseline"
    if is_best:
        return "the best"
    # With 95 % or more, leave out "probably".
    if p["p_worse"] >= 0.95:
        return f"worse, {p['p_worse']:.0%}"
    if p["p_worse"] >= 1 - risk:
        return f"probably worse, {p['p_worse']:.0%}"
    # No mean is above that of the best, so that P(better) is at most P(worse). The rest,
    # which is most, is P(equivalent).
    if p["p_worse"] <= risk:
        return f"practically the same, {p['p_equivalent']:.0%}"
    return f"undecided, P(worse) = {p['p_worse']:.0%}"


def log_serving_costs(models, train, seed):
    """Log what each model costs to serve, to its run."""
    for model in models:
        served = mlflow.pyfunc.load_model(model.model_uri)
        costs = measure_serving_cost(served, train.X, seed)
        options = {"run_id": model.source_run_id, "model_id": model.model_id}
        mlflow.log_metrics(costs, dataset=train.dataset, **options)


def measure_serving_cost(served, X, seed):
    """Return latency and throughput on one core, and size, of a model as MLflow serves it.

    `served` comes from mlflow.pyfunc.load_model: such a model checks each row before it
    predicts. The latency is that of predict() for one row, in this process: without HTTP.
    """
    row = X.head(1)
    batch = X.sample(10_000, replace=True, random_state=seed)
    with threadpool_limits(1):
        timeit.timeit(lambda: served.predict(row), number=10)  # warm up
        single = timeit.repeat(lambda: served.predict(row), number=1, repeat=60)
        whole = timeit.repeat(lambda: served.predict(batch), number=1, repeat=3)
    return {
        "latency_ms_p50": 1000 * np.quantile(single, 0.50),
        "latency_ms_p95": 1000 * np.quantile(single, 0.95),
        "rows_per_second": len(batch) / min(whole),
        "model_size_bytes": served.metadata.model_size_bytes,
    }


def load_runs(experiment_id, comparison_id, metric):
    """Ask MLflow for the runs of a comparison. Return a DataFrame with all that was logged.

    The best is first, as in `find_best_models`; candidates that failed are last.
    """
    return mlflow.search_runs(
        [experiment_id],
        f"tags.mlflow.parentRunId = '{comparison_id}'",
        order_by=[f"metrics.cv_{metric} DESC", "attributes.start_time ASC"],
    )


def recommend(runs, risk, noise):
    """Return the run to recommend: the best of those that are good and fast, or None.

    A run is good if it is worse than the best by more than ROPE with a probability of at most
    `risk`, and better than the baseline with one of at least `1 - risk`. It is fast if its
    latency is at most `noise` times the lowest of the good ones. `runs` has the best first.
    """
    as_good = runs["metrics.p_worse"] <= risk
    above_baseline = runs["metrics.p_above_baseline"] >= 1 - risk
    good = runs[as_good & above_baseline]
    if good.empty:
        return None
    latency = good["metrics.latency_ms_p50"]
    fast = good[latency <= noise * latency.min()]
    return fast.iloc[0]


def log_choice(runs, recommended, fold_scores, metric, train):
    """Log to the active run which model is the best, which is recommended, and the baseline."""
    recommended_name = "none" if recommended is None else recommended["tags.mlflow.runName"]
    mlflow.log_param("best_model", runs["tags.mlflow.runName"].iloc[0])
    mlflow.log_param("recommended_model", recommended_name)
    best_score = runs[f"metrics.cv_{metric}"].iloc[0]
    mlflow.log_metric(f"best_cv_{metric}", best_score, dataset=train.dataset)
    baseline_score = fold_scores["baseline"].mean()
    mlflow.log_metric(f"baseline_cv_{metric}", baseline_score, dataset=train.dataset)


def log_report(runs, fold_scores, best, test, metric, rope, n_folds):
    """Log the report to the active run: two tables, a picture and a description."""
    names = runs["tags.mlflow.runName"].rename("model")
    numbers = runs.filter(like="metrics.").rename(columns=lambda c: c.removeprefix("metrics."))
    full_table = numbers.assign(verdict=runs["tags.verdict"]).set_index(names)
    mlflow.log_text(full_table.to_csv(), "comparison.csv")
    mlflow.log_text(fold_scores.to_csv(index_label="fold"), "folds.csv")

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    differences_axes, costs_axes, matrix_axes = figure.subplots(1, 3)
    draw_differences(differences_axes, fold_scores, list(names), metric, rope, n_folds)
    draw_costs(costs_axes, runs, metric)
    predicted = mlflow.pyfunc.load_model(best.model_uri).predict(test.X)
    draw_confusion(matrix_axes, test.y, predicted, f"{names.iloc[0]} on the hold-out")
    mlflow.log_figure(figure, "comparison.png")

    mlflow.set_tag("mlflow.note.content", to_markdown(format_candidates(runs, metric)))


def draw_differences(axes, fold_scores, names, metric, rope, n_folds):
    """Draw how far each model is from the first one, with 95 % intervals and the ROPE."""
    for name in names:
        if name in fold_scores:
            posterior = posterior_of_mean(fold_scores[name] - fold_scores[names[0]], n_folds)
            low, high = posterior.interval(0.95)
            axes.plot([low, high], [name, name], color="tab:blue", linewidth=3)
            axes.plot(posterior.mean(), name, "o", color="tab:blue", markersize=9)
    axes.axvspan(-rope, rope, color="tab:green", alpha=0.15)
    axes.margins(y=0.15)
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=5)
    axes.set(xlabel=f"{metric} minus that of the best")
    axes.set_title("95 % intervals: in the green band,\na difference does not matter")


def draw_costs(axes, runs, metric):
    """Draw score against latency, with a line through those that no other model beats in both."""
    points = runs.dropna(subset="metrics.latency_ms_p50").sort_values("metrics.latency_ms_p50")
    latency = points["metrics.latency_ms_p50"]
    score = points[f"metrics.cv_{metric}"]
    # From fast to slow, a model is on the line if it scores higher than every faster one.
    best_of_faster = score.cummax().shift(fill_value=-np.inf)
    front = score > best_of_faster
    axes.plot(latency, score, "o", color="lightgray", markersize=9)
    axes.plot(latency[front], score[front], "o--", color="tab:blue", markersize=9)
    for name, x, y in zip(points["tags.mlflow.runName"], latency, score, strict=True):
        beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (x, y), fontsize="small", **beside)
    axes.margins(y=0.1)
    axes.set_xlim(left=0, right=1.6 * latency.max())  # room for the names
    axes.set(xlabel="Latency of one row, median (ms)", ylabel=f"Cross-validated {metric}")
    axes.set_title("Blue: no other model is\nboth better and faster")


def draw_confusion(axes, y, predicted, title):
    """Draw the confusion matrix: in each cell the number of rows, and its share of the class."""
    classes = sorted(y.unique())
    counts = confusion_matrix(y, predicted, labels=classes)
    shares = counts / counts.sum(axis=1, keepdims=True)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    # Many classes need small letters; empty cells stay empty, so that errors catch the eye.
    size = min(10, 80 / len(classes))
    for (row, column), count in np.ndenumerate(counts):
        if count > 0:
            share = shares[row, column]
            color = "white" if share > 0.5 else "black"
            text = f"{count}\n{share:.0%}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
    rotation = 90 if sum(map(len, classes)) > 30 else 0
    axes.set_xticks(range(len(classes)), classes, rotation=rotation)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="Predicted class", ylabel="True class")
    axes.set_title(title)


def format_candidates(runs, metric):
    """Return a table to be printed: a row for each model, the best first, with units."""
    others = [name for name in ("accuracy", "precision", "recall", "f1") if name != metric]
    others = others[:3]  # as many as fit on a line
    rows = []
    for _, run in runs.iterrows():
        row = {"model": run["tags.mlflow.runName"]}
        if run["status"] == "FAILED":
            row["against the best"] = f"failed: {run['tags.error']}"
        else:
            numbers = run.rename(lambda column: column.removeprefix("metrics."))
            mean = numbers[f"cv_{metric}"]
            row[metric] = f"{mean:.4f} ± {numbers[f'cv_{metric}_std']:.4f}"
            for name in others:
                row[name] = f"{numbers[f'cv_{name}']:.4f}"
            row["hold-out"] = f"{numbers[f'test_{metric}']:.4f}"
            row["against the best"] = run["tags.verdict"]
            row["fit"] = f"{numbers['fit_seconds']:.3f} s"
            row["latency"] = f"{numbers['latency_ms_p50']:.1f} ms"
            row["size"] = f"{numbers['model_size_bytes'] / 1e6:.1f} MB"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def to_markdown(table):
    """Return a DataFrame of text as a Markdown table."""
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_report(comparison_id, runs, metric, rope):
    """Print what the comparison found, read back from MLflow."""
    data = mlflow.get_run(comparison_id).data
    print()
    print(format_candidates(runs, metric).to_string(index=False))
    baseline = data.metrics[f"baseline_cv_{metric}"]
    print(f"\nBaseline     {metric} {baseline:.4f}, always the most frequent class")
    print(f"Best         {data.params['best_model']}, by its mean {metric} over the folds")
    recommended = data.params["recommended_model"]
    if recommended == "none":
        reason = "the best is not shown to beat the baseline"
    elif recommended == data.params["best_model"]:
        reason = "the best; no model that is practically the same is clearly faster"
    else:
        reason = "the fastest that is practically the same as the best"
    print(f"Recommended  {recommended}: {reason}")

    print(f"\nPercentages are probabilities; a difference of up to {rope} counts as none.")
    print("They are for this data set and this split. The best was chosen by the same scores, so")
    print("its lead is a little too large. Precision, recall and F1 are means over the classes.")
    gain = data.metrics[f"best_cv_{metric}"] - baseline
    if gain < 3 * rope:
        print(f"Note: the best is only {gain:.4f} above the baseline, so small differences matter:")
        print("      choose another --metric, such as balanced_accuracy, or a smaller ROPE")


def how_to_load_the_best(experiment_id, comparison_id, metric, train):
    """Return code that loads the best model of a comparison, in any process with this store."""
    return f"""
Load the model with the best {metric} in any process with the same tracking URI:

    import mlflow

    best = mlflow.search_logged_models(
        experiment_ids=["{experiment_id}"],
        filter_string="tags.comparison = '{comparison_id}'",
        order_by=[
            {{
                "field_name": "metrics.cv_{metric}",
                "ascending": False,
                "dataset_name": "{train.dataset.name}",
                "dataset_digest": "{train.dataset.digest}",
            }},
            {{"field_name": "creation_timestamp", "ascending": True}},
        ],
        output_format="list",
    )[0]
    model = mlflow.pyfunc.load_model(best.model_uri)
"""


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
