"""Tune a random forest with MLflow: a parent run for the search, a child run for each trial.

27 combinations of three parameters are cross-validated on the training part of scikit-learn's
breast cancer data. The script then asks MLflow for the best one, refits it, and scores it
once on the hold-out. You will see that in this grid the depth of the trees matters most, and
that a forest within one standard error of the best trains in about a tenth of the time.

    python hyperparameter_tuning.py
    python hyperparameter_tuning.py --csv customers.csv --target churned --metric f1
    python hyperparameter_tuning.py --resume RUN_ID

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment hyperparameter-tuning
        run grid-search                 best trial and its scores, search.png, the model `model`
            run max_depth=1, …          for each trial: cv_accuracy, cv_accuracy_se, fit_seconds
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
# joblib, matplotlib and skops come with these.

import hashlib
import json
import logging
import os
import re
import shlex
import sqlite3
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import closing
from importlib import metadata
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import mlflow
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from sklearn.base import clone
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.metrics import f1_score, get_scorer, make_scorer, precision_score, recall_score
from sklearn.model_selection import (
    ParameterGrid,
    StratifiedGroupKFold,
    StratifiedKFold,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sqlalchemy.exc import SQLAlchemyError

EXPERIMENT = "hyperparameter-tuning"
SEED = 42  # for the folds and the forests
TEST_SIZE = 0.2  # share of the rows held out: not used by any trial
FOLDS = 5

# The values to try for each parameter.
PARAM_GRID = {
    "max_depth": [1, 3, 9],
    "max_features": [0.1, 0.3, 0.9],  # share of the features that each split chooses from
    "n_estimators": [20, 100, 300],
}

# Fit times up to this many times the lowest count as equal.
NOISE = 1.5

# The choices of --metric. Precision, recall and F1 are means over the classes, so that each
# class counts the same. A scorer returns more for a better model.
MACRO = {"average": "macro", "pos_label": None, "zero_division": 0}
SCORERS = {
    "accuracy": get_scorer("accuracy"),
    "precision": make_scorer(precision_score, **MACRO),
    "recall": make_scorer(recall_score, **MACRO),
    "f1": make_scorer(f1_score, **MACRO),
}

# A server that installs packages installs these, in the versions that are used here.
PACKAGES = ["mlflow", "scikit-learn", "skops", "pandas", "numpy", "scipy"]

# Types that skops loads only if they are named. Loading them runs no code.
TRUSTED = [
    "numpy.dtype",
    "sklearn.compose._column_transformer.make_column_selector",
    "sklearn.tree._tree.Tree",
]


def main(argv=None):
    args = parse_args(argv)
    metric = args.metric
    train, test = load_data(args.csv, args.target, args.id, TEST_SIZE)
    folds = make_folds(train.y, train.groups, FOLDS, SEED)
    trials = make_trials(PARAM_GRID)
    models = {name: make_forest(params, SEED) for name, params in trials.items()}

    open_store(EXPERIMENT)
    settings = {
        "metric": metric,
        "held_out": train.rule,
        "rows": train.dataset.digest,
        "folds": f"{FOLDS}, shuffled with seed {SEED}",
    }
    if args.resume is not None and mlflow.get_run(args.resume).data.params != settings:
        # Their scores would not compare.
        raise UserError(f"{args.resume} is not a search with the settings {settings}")

    with mlflow.start_run(run_id=args.resume, run_name="grid-search") as search:
        search_id = search.info.run_id
        print(f"{FOLDS} folds for each trial; if interrupted, go on with --resume {search_id}")
        mlflow.log_params(settings)
        mlflow.log_input(train.dataset, context="training")
        mlflow.log_input(test.dataset, context="testing")

        # A search that is resumed has finished trials already.
        finished = find_best_trials(search_id, metric, trials).index
        todo = {name: model for name, model in models.items() if name not in finished}
        results = run_trials(todo, train.X, train.y, metric, SCORERS[metric], folds)
        for number, (name, metrics, error) in enumerate(results, start=1):
            log_trial(name, trials[name], metrics, error, train.dataset)
            outcome = error or f"{metric} {metrics[f'cv_{metric}']:.4f}"
            print(f"{number:3}/{len(todo)}  {outcome}  {name}", flush=True)

        ranked = find_best_trials(search_id, metric, trials)
        if ranked.empty:
            raise UserError(f"all {len(trials)} trials failed; the last one with {error}")
        best = ranked.iloc[0]
        log_best(best, trials[best.name], models[best.name], train, test, metric, SCORERS[metric])

        cheapest = cheapest_within_one_standard_error(ranked, NOISE)
        means = mean_scores(ranked, trials)
        report = describe_search(search_id, ranked, cheapest, means, metric)
        mlflow.set_tag("mlflow.note.content", report)
        mlflow.log_figure(draw_search(means, metric), "search.png")

    print(f"\n{report}\n")
    print(where_to_look(search))
    options = {"tuned": search_id} | vars(args) | {"resume": None}
    print("Next: ", next_command("model_comparison.py", options))


def parse_args(argv):
    """Return the options of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="use this table, not the breast cancer data")
    parser.add_argument("--target", default="diagnosis", help="the column to predict")
    parser.add_argument("--id", metavar="COLUMN", help="keep rows with the same value together")
    parser.add_argument("--metric", choices=SCORERS, default="accuracy", help="what decides")
    parser.add_argument("--resume", metavar="RUN_ID", help="continue a search that was cut short")
    return parser.parse_args(argv)


def make_trials(grid):
    """Return {name of the trial: parameters}, for each combination of the grid.

    The name says what the parameters are, so that a search can be resumed with a wider grid.
    """
    trials = {}
    for params in ParameterGrid(grid):
        name = ", ".join(f"{parameter}={value}" for parameter, value in params.items())
        trials[name] = params
    return trials


def make_forest(params, seed):
    """Return an unfitted forest with these parameters, for raw rows."""
    return add_preprocessing(RandomForestClassifier(**params, random_state=seed))


def run_trials(models, X, y, metric, scorer, folds):
    """Cross-validate models on all cores; yield what `run_trial` returns, as each finishes.

    `models` are unfitted estimators by the name of their trial.
    """
    # The last trials of the grid have the deepest trees and take longest, so they start first.
    # Otherwise, one core would still be busy with them at the end, while the others idle.
    tasks = [
        delayed(run_trial)(name, models[name], X, y, metric, scorer, folds)
        for name in reversed(models)
    ]
    return Parallel(n_jobs=-1, return_as="generator_unordered")(tasks)


def run_trial(name, model, X, y, metric, scorer, folds):
    """Cross-validate a model. Return its name, its metrics, and None or what went wrong.

    The metrics are the mean score over the folds, the standard error of that mean (which
    treats the folds as independent), and the median time of one fit in seconds.
    """
    try:
        results = cross_validate(model, X, y, cv=folds, scoring=scorer, error_score="raise")
        scores = pd.Series(results["test_score"])
        if scores.hasnans:
            raise ValueError("the scorer returned nan")
    except Exception as error:  # one that fails must not end the search
        return name, {}, f"{type(error).__name__}: {error}"
    metrics = {
        # Rounded, so that equal scores tie: sums in another order differ in their last bits.
        f"cv_{metric}": round(scores.mean(), 12),
        f"cv_{metric}_se": scores.sem(),
        "fit_seconds": np.median(results["fit_time"]),
    }
    return name, metrics, None


def log_trial(name, params, metrics, error, dataset):
    """Log a trial as a child of the active run. If it failed, its tag `error` says why."""
    with mlflow.start_run(run_name=name, nested=True):
        mlflow.log_params(params)
        mlflow.log_metrics(metrics, dataset=dataset)
        if error:
            mlflow.set_tag("error", error)
            mlflow.end_run("FAILED")  # the `with` block leaves a run that has ended as it is


def find_best_trials(search_id, metric, names):
    """Ask MLflow for the finished trials of a search. Return a DataFrame, the best trial first.

    Of equal scores, the first by name wins. Only trials with one of these names count.
    """
    runs = mlflow.search_runs(
        filter_string=f"tags.mlflow.parentRunId = '{search_id}' AND status = 'FINISHED'",
        order_by=[f"metrics.cv_{metric} DESC", "attributes.run_name ASC"],
    )
    columns = {
        "tags.mlflow.runName": "trial",
        f"metrics.cv_{metric}": "mean",
        f"metrics.cv_{metric}_se": "standard_error",
        "metrics.fit_seconds": "fit_seconds",
    }
    ranked = runs.reindex(columns=columns).rename(columns=columns).set_index("trial")
    return ranked[ranked.index.isin(names)]


def log_best(best, params, model, train, test, metric, scorer):
    """Log the best trial to the active run; fit its model on all training rows, and log that too.

    The hold-out scores it and the baseline, which predicts the most frequent class, once each.
    """
    mlflow.set_tag("best_trial", best.name)
    # model_comparison.py reads this file. A grid may hold numbers of NumPy, which JSON lacks.
    mlflow.log_text(json.dumps(params, default=np.generic.item), "best_params.json")
    baseline = scorer(DummyClassifier().fit(train.X, train.y), test.X, test.y)
    # Before the model is logged, because MLflow links later metrics to it.
    mlflow.log_metric(f"best_cv_{metric}", best["mean"], dataset=train.dataset)
    mlflow.log_metric(f"baseline_test_{metric}", baseline, dataset=test.dataset)

    fitted = clone(model).fit(train.X, train.y)
    logged = log_model(fitted, train.X, train.rule)
    reloaded = mlflow.sklearn.load_model(logged.model_uri)
    score = scorer(reloaded, test.X, test.y)
    mlflow.log_metric(f"test_{metric}", score, model_id=logged.model_id, dataset=test.dataset)


def cheapest_within_one_standard_error(ranked, noise):
    """Return the trial that is fast to fit of those within one standard error of the best.

    `ranked` has the best trial first. Fit times up to `noise` times the lowest count as equal;
    of these, the best score wins. The rule is that of Breiman et al., Classification and
    Regression Trees (1984), section 3.4.3, which takes the simplest model instead.
    """
    best = ranked.iloc[0]
    close = ranked[ranked["mean"] >= best["mean"] - best["standard_error"]]
    fast = close[close["fit_seconds"] <= noise * close["fit_seconds"].min()]
    return fast.iloc[0]


def mean_scores(ranked, trials):
    """Return {parameter: Series}: the mean score of the trials with each of its values."""
    # As text, because None and True are values as well.
    params = pd.DataFrame(list(trials.values()), index=list(trials), dtype=object).map(str)
    scored = params.join(ranked["mean"])  # in the order of the grid
    return {name: scored.groupby(name, sort=False)["mean"].mean() for name in params}


def describe_search(search_id, ranked, cheapest, means, metric):
    """Return what a search found, read back from MLflow, as Markdown with indented tables."""
    metrics = mlflow.get_run(search_id).data.metrics
    best = ranked.iloc[0]
    share = cheapest["fit_seconds"] / best["fit_seconds"]
    return f"""Best of {len(ranked)} trials: {best.name}
Cheapest within one standard error: {cheapest.name}
    with {cheapest["mean"]:.4f}, at {share:.0%} of the fit time of the best

The first five by their mean {metric} on the folds:

{format_table(ranked.head().rename_axis(None))}

On the hold-out, {metric} of the best: {metrics[f"test_{metric}"]:.4f}
Of always answering the most frequent class: {metrics[f"baseline_test_{metric}"]:.4f}

The mean score with each value. A best one at the edge of its list: try values beyond it.

{format_table(pd.concat(means))}"""


def format_table(table):
    """Return a DataFrame or a Series as indented text."""
    return indent(table.to_string(float_format="{:.4f}".format), "    ")


def draw_search(means, metric):
    """Return a figure: the mean score of the trials with each value of each parameter."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for parameter, scores in means.items():
        axes.plot(scores, f"{parameter}=" + scores.index, marker="o")
    axes.invert_yaxis()
    axes.set_xlabel(f"Mean {metric} of the trials with this value")
    axes.set_title("The further apart its values, the more a parameter matters in this grid")
    return figure


def make_folds(y, groups, n_folds, seed):
    """Return folds as pairs of arrays: positions to train on, positions to score on.

    They are stratified by class. Rows of the same group stay on one side of each fold.
    """
    options = {"n_splits": n_folds, "shuffle": True, "random_state": seed}
    if groups.is_unique:
        return list(StratifiedKFold(**options).split(y, y))
    return list(StratifiedGroupKFold(**options).split(y, y, groups))


def next_command(script, options):
    """Return the command that goes on with another script. An option that is None is left out."""
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return shlex.join(["python", str(Path(sys.argv[0]).with_name(script)), *words])


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
