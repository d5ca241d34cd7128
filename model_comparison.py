"""Compare four classifiers with MLflow: which is best, how certain is it, what do they cost?

All are scored on the same folds, a 5-fold cross-validation that is repeated 30 times, on the
training part of scikit-learn's breast cancer data. The script then asks MLflow for the best
one, and computes how probable it is that each of the others is worse. Of those that are
probably as good as the best, it recommends one that answers fast. You will see that a scaled
logistic regression leads, that so few rows cannot tell how much better it is than the others,
and that it answers more than twice as fast as a forest.

    python model_comparison.py
    python model_comparison.py --csv customers.csv --target churned --metric f1
    python model_comparison.py --tuned RUN_ID

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment model-comparison
        run comparison                  best and recommended model, comparison.png, folds.csv
            run logistic_regression     for each candidate: its parameters; cv_… (on the folds),
            run svm                     test_… (on the hold-out), p_… and difference (to the best),
            run …                       fit_seconds, latency_ms, model_size_bytes; `model`
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
# matplotlib, scipy, skops and threadpoolctl come with these.

import hashlib
import logging
import os
import re
import shlex
import sqlite3
import sys
import timeit
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import closing
from functools import partial
from importlib import metadata
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import mlflow
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats
from sklearn.base import clone
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, get_scorer, make_scorer, precision_score, recall_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sqlalchemy.exc import SQLAlchemyError
from threadpoolctl import threadpool_limits

EXPERIMENT = "model-comparison"
SEED = 42  # for the folds and the models
TEST_SIZE = 0.2  # share of the rows held out: not used to choose a model
FOLDS = 5
REPEATS = 30  # the folds are shuffled anew this many times; a large table gets fewer

# Region of practical equivalence, in units of the metric: a difference of up to this does not
# matter.
ROPE = 0.01
# The recommended model may be worse than the best, by more than ROPE, with at most this
# probability.
RISK = 0.2
# Latencies up to this many times the lowest count as equal.
NOISE = 1.25

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
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.tree._tree.Tree",
]


def main(argv=None):
    args = parse_args(argv)
    metric = args.metric
    train, test = load_data(args.csv, args.target, args.id, TEST_SIZE)
    # Each repeat scores every row once. 15,000 scored rows make the means steady enough.
    repeats = max(2, min(REPEATS, 15_000 // len(train.X)))
    folds = []
    for repeat in range(repeats):
        folds += make_folds(train.y, train.groups, FOLDS, SEED + repeat)
    models = make_candidates(len(train.X), SEED)
    open_store(EXPERIMENT)
    if args.tuned is not None:
        models["tuned_forest"] = load_tuned_forest(args.tuned, train.dataset.digest, SEED)

    print(f"{len(models) - 1} candidates and a baseline, on {repeats} x {FOLDS} folds", flush=True)
    with mlflow.start_run(run_name="comparison") as comparison:
        comparison_id = comparison.info.run_id
        mlflow.log_params({"metric": metric, "folds": len(folds), "rope": ROPE})
        mlflow.log_input(train.dataset, context="training")
        mlflow.log_input(test.dataset, context="testing")
        fold_scores = pd.DataFrame()
        for name, model in models.items():
            scores = score_folds(model, train.X, train.y, SCORERS, folds)
            fold_scores[name] = scores[f"cv_{metric}"]
            log_candidate(comparison_id, name, model, scores, train, test)
            print(f"    {name:20} {metric} {fold_scores[name].mean():.4f}", flush=True)
        mlflow.log_text(fold_scores.to_csv(index_label="fold"), "folds.csv")

        ranked = find_best_models(comparison_id, metric)
        ranked["latency_ms"] = measure_latencies(ranked["model_uri"], train.X.head(1))
        log_against_best(ranked, fold_scores, folds, ROPE)

        # Ask again, now with what has just been logged.
        ranked = find_best_models(comparison_id, metric)
        best = ranked.index[0]
        recommended = recommend(ranked, RISK, NOISE)
        report = describe_comparison(ranked, recommended, metric)
        mlflow.set_tags({"best_model": best, "recommended_model": recommended})
        mlflow.set_tag("mlflow.note.content", report)
        mlflow.log_figure(draw_comparison(ranked, metric), "comparison.png")

    print(f"\n{report}\n")
    print(f'Load:  mlflow.pyfunc.load_model("{ranked.loc[best, "model_uri"]}")  # the best')
    print(where_to_look(comparison))
    if recommended is None:
        raise UserError(f"no candidate is shown to beat the baseline by more than {ROPE}")
    options = {"model-uri": ranked.loc[recommended, "model_uri"]} | vars(args) | {"tuned": None}
    print("Next: ", next_command("production_deployment.py", options))


def parse_args(argv):
    """Return the options of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="use this table, not the breast cancer data")
    parser.add_argument("--target", default="diagnosis", help="the column to predict")
    parser.add_argument("--id", metavar="COLUMN", help="keep rows with the same value together")
    parser.add_argument("--metric", choices=SCORERS, default="accuracy", help="what decides")
    parser.add_argument("--tuned", metavar="RUN_ID", help="compare the best of this search as well")
    return parser.parse_args(argv)


def make_candidates(n_rows, seed):
    """Return the models to compare, by name. One more candidate is one more line.

    Of equal scores the first one wins, so the simplest stands first.
    """
    svm = SVC()
    if n_rows > 10_000:  # the time that an SVC takes grows with the square of the rows
        svm = make_pipeline(Nystroem(random_state=seed), LinearSVC(random_state=seed))
    classifiers = {
        # Always predicts the most frequent class: who does not beat that has learned nothing.
        "baseline": DummyClassifier(),
        "logistic_regression": LogisticRegression(max_iter=1000),
        "svm": svm,
        "gradient_boosting": HistGradientBoostingClassifier(random_state=seed),
        "random_forest": RandomForestClassifier(random_state=seed),
    }
    return {name: add_preprocessing(model) for name, model in classifiers.items()}


def load_tuned_forest(search_id, rows, seed):
    """Return an unfitted forest with the best parameters of a search.

    Raises UserError unless the search is finished, and had the training rows of this digest.
    """
    search = mlflow.get_run(search_id)
    if search.info.status != "FINISHED" or search.data.params.get("rows") != rows:
        raise UserError(f"{search_id} is not a finished search on the training rows of this table")
    params = mlflow.artifacts.load_dict(f"runs:/{search_id}/best_params.json")
    print("Note: tuned_forest was chosen on these rows, so its scores on folds are a bit too good")
    return add_preprocessing(RandomForestClassifier(**params, random_state=seed))


def score_folds(model, X, y, scorers, folds):
    """Score a model on all folds, on all cores. Return a DataFrame with a row for each fold.

    Its columns are cv_METRIC for each of the `scorers`, and fit_seconds.
    """
    results = cross_validate(model, X, y, cv=folds, scoring=scorers, n_jobs=-1, error_score="raise")
    scores = pd.DataFrame({f"cv_{metric}": results[f"test_{metric}"] for metric in scorers})
    return scores.assign(fit_seconds=results["fit_time"])


def log_candidate(comparison_id, name, model, scores, train, test):
    """Log a candidate as a child of the active run: its folds, its model, its hold-out scores."""
    with mlflow.start_run(run_name=name, nested=True):
        mlflow.log_params(model[-1].get_params())
        fitted = clone(model).fit(train.X, train.y)
        logged = log_model(fitted, train.X, train.rule)
        # A query finds the model by these tags.
        tags = {"candidate": name, "comparison": comparison_id}
        mlflow.set_logged_model_tags(logged.model_id, tags)

        # Rounded, so that equal scores tie: sums in another order differ in their last bits.
        means = scores.mean().round(12).to_dict()
        mlflow.log_metrics(means, model_id=logged.model_id, dataset=train.dataset)

        served = mlflow.pyfunc.load_model(logged.model_uri)
        reloaded = served.get_raw_model()
        held_out = {f"test_{m}": scorer(reloaded, test.X, test.y) for m, scorer in SCORERS.items()}
        mlflow.log_metrics(held_out, model_id=logged.model_id, dataset=test.dataset)
        mlflow.log_metric("model_size_bytes", served.metadata.model_size_bytes)


def find_best_models(comparison_id, metric):
    """Ask MLflow for the models of a comparison. Return a DataFrame, the best model first.

    It has a row for each candidate, with its metrics, its model's URI and ID, and its run's ID.
    Of equal scores, the first candidate wins.
    """
    models = mlflow.search_logged_models(
        filter_string=f"tags.comparison = '{comparison_id}'",
        order_by=[
            {"field_name": f"metrics.cv_{metric}", "ascending": False},
            {"field_name": "creation_timestamp", "ascending": True},
        ],
        output_format="list",
    )
    rows = {}
    for model in models:
        row = {logged.key: logged.value for logged in model.metrics}
        row["model_uri"], row["model_id"] = model.model_uri, model.model_id
        row["run_id"] = model.source_run_id
        rows[model.tags["candidate"]] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def log_against_best(ranked, fold_scores, folds, rope):
    """Log to the run of each candidate its latency, and how it compares with the best.

    The best was chosen by these same scores, so its lead is a little too large.
    """
    best = ranked.index[0]
    for name, model in ranked.iterrows():
        metrics = correlated_t_test(fold_scores[name] - fold_scores[best], rope, folds)
        metrics["latency_ms"] = model["latency_ms"]
        mlflow.log_metrics(metrics, run_id=model["run_id"], model_id=model["model_id"])


def correlated_t_test(differences, rope, folds):
    """Compare two models by their scores on the same folds.

    Returns the mean difference and half of its 95 % interval, and the probabilities that the
    model is worse than the other, equivalent to it, and better. This is the Bayesian correlated
    t-test of Benavoli, Corani, Demšar and Zaffalon (Journal of Machine Learning Research 18,
    2017). `differences` are the scores of the model minus those of the other, on each of these
    `folds`. A difference of up to `rope`, in units of the score, counts as none.

    Folds share training rows, so their scores are correlated. The variance of the mean is
    therefore not variance / n, but variance * (1 / n + test rows / training rows) (Nadeau and
    Bengio, Machine Learning 52, 2003).
    """
    n = len(differences)
    if n != len(folds):
        raise ValueError(f"{n} differences, but {len(folds)} folds")
    variance = np.var(np.asarray(differences), ddof=1)
    if rope != 0 and not rope >= variance**0.5 / 100:
        raise ValueError(f"a rope of {rope} does not fit the scores: it has their unit")
    share = np.mean([len(test) / len(train) for train, test in folds])
    # The best differs from itself by zero on all folds, and SciPy has no scale of zero.
    scale = max((variance * (1 / n + share)) ** 0.5, 1e-12)
    difference = stats.t(df=n - 1, loc=np.mean(differences), scale=scale)
    return {
        "difference": difference.mean(),
        "difference_margin": difference.ppf(0.975) - difference.mean(),
        "p_worse": difference.cdf(-rope),
        "p_equivalent": difference.cdf(rope) - difference.cdf(-rope),
        "p_better": difference.sf(rope),
    }


def measure_latencies(model_uris, row, rounds=50):
    """Return the median times of predict() for one row, in milliseconds: without HTTP.

    The models take turns, each on one core, so that other work on this machine slows all of
    them down alike.
    """
    served = [mlflow.pyfunc.load_model(uri) for uri in model_uris]
    seconds = []
    with threadpool_limits(1):
        for _ in range(rounds):
            turn = [timeit.timeit(partial(model.predict, row), number=1) for model in served]
            seconds.append(turn)
    return 1000 * np.median(seconds, axis=0)


def recommend(ranked, risk, noise):
    """Return the name of the model to recommend, or None if the baseline may be as good as any.

    A model is good if it is worse than the best by more than ROPE with a probability of at
    most `risk`. It is fast if its latency is at most `noise` times the lowest of the good
    ones. Of those that are good and fast, the best score wins. `ranked` has the best first.
    """
    if ranked.loc["baseline", "p_worse"] < 1 - risk:
        return None
    good = ranked[(ranked["p_worse"] <= risk) | (ranked.index == ranked.index[0])]
    fast = good[good["latency_ms"] <= noise * good["latency_ms"].min()]
    return fast.index[0]


def describe_comparison(ranked, recommended, metric):
    """Return what a comparison found, as Markdown. `ranked` has the best first."""
    reason = f"as good as {ranked.index[0]}, or nearly so, and faster"
    if recommended == ranked.index[0]:
        reason = "the best, and none that is as good is clearly faster"
    if recommended is None:
        reason = "the baseline may be as good as the best"
    words = ["as good", "probably as good", "undecided", "probably worse", "worse"]
    verdicts = pd.cut(ranked["p_worse"], [-1, 0.05, 0.2, 0.8, 0.95, 1], labels=words)
    ranked = ranked.assign(verdict=verdicts.astype(object))
    ranked.iloc[0, -1] = "the best"
    choice = ranked[[f"cv_{metric}", "p_worse", "verdict", "latency_ms"]]
    scores = ranked[[*ranked.filter(like="cv_"), f"test_{metric}", "fit_seconds"]]
    return f"""Recommended: {recommended} ({reason})

{format_table(choice)}

p_worse is the probability, for this data set and this split, of being worse than the best by more
than {ROPE}. The best was chosen by these same scores, so its lead is a little too large.

The scores on the hold-out (test_), and means over the folds:

{format_table(scores)}"""


def format_table(table):
    """Return a DataFrame as indented text."""
    return indent(table.to_string(float_format="{:.4f}".format), "    ")


def draw_comparison(ranked, metric):
    """Return a figure: how far each model is from the best, with 95 % intervals."""
    models = ranked.drop("baseline")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(models["difference"], models.index, xerr=models["difference_margin"], fmt="o")
    axes.axvspan(-ROPE, ROPE, color="tab:green", alpha=0.15)
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric} minus that of the best, 95 % intervals")
    axes.set_title("In the green band, a difference does not matter")
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
