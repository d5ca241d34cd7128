"""Compare four classifiers with MLflow: which is best, is it by chance, and what do they cost?

Each is scored on the same 150 folds of the training part of scikit-learn's breast cancer data.
MLflow is asked which is best, a test which others cannot be told from it, and the one of those
that answers fastest is recommended. What you will see: the scaled logistic regression leads, even
150 folds cannot tell the other three from it, and it answers twice as fast as the forest.

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment model-comparison
    └── comparison               best_model, recommended_model, baseline_cv_accuracy; the table
        │                        (description, comparison.csv), folds.csv, comparison.png
        ├── random_forest        cv_accuracy, cv_f1, cv_precision, cv_recall (means over all folds
        ├── gradient_boosting    of all repeats; _std beside them); the four without cv_ on the
        ├── logistic_regression  hold-out, which decides nothing; p_vs_best, p_vs_baseline;
        └── svm                  fit_seconds, latency_ms_p50 …; parameters; the model `model`
"""

import ast
import contextlib
import logging
import os
import re
import shlex
import sqlite3
import sys
import timeit
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from urllib.request import urlopen

import mlflow
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException
from scipy import stats
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, precision_recall_fscore_support
from sklearn.model_selection import RepeatedStratifiedKFold, cross_validate, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sqlalchemy.exc import SQLAlchemyError
from threadpoolctl import threadpool_limits

EXPERIMENT = "model-comparison"
SEED = 42  # of the split, the folds and the models
TEST_SIZE = 0.2  # share of the rows that decides nothing
FOLDS = 5
REPEATS = 30  # of the folds, each time shuffled anew; fewer from 500 rows on
ALPHA = 0.05  # a p-value below it counts as a difference
NOISE = 1.1  # latencies of up to so many times the fastest count as equal to it
METRICS = ["accuracy", "precision", "recall", "f1"]
COSTS = ["fit_seconds", "latency_ms_p50", "latency_ms_p95", "rows_per_second", "model_size_bytes"]
CANDIDATES = {  # a fifth candidate is one more line; of equal scores the last one wins
    "random_forest": RandomForestClassifier(random_state=SEED),
    "gradient_boosting": HistGradientBoostingClassifier(random_state=SEED),
    "logistic_regression": LogisticRegression(max_iter=1000),
    "svm": SVC(random_state=SEED),
}
LARGE_SVM = make_pipeline(  # in its place from 10,000 rows on: an SVC would take hours
    Nystroem(n_components=300, random_state=SEED), LinearSVC(random_state=SEED)
)


def tuned_forest(run_id, rows):
    """Return the forest that hyperparameter_tuning.py found best on these rows (their digest)."""
    params = mlflow.get_run(run_id).data.params
    best = {key[5:]: value for key, value in params.items() if key.startswith("best_")}
    if params.get("rows") != rows or not best:
        raise ValueError(f"{run_id} is not a finished search on these rows")
    best = {key: ast.literal_eval(value) for key, value in best.items()}
    return RandomForestClassifier(**best, random_state=SEED)


def score(model, X, y):
    """Return METRICS; all but the accuracy are means over the classes, each counting the same."""
    predicted = model.predict(X)
    means = precision_recall_fscore_support(y, predicted, average="macro", zero_division=0)[:3]
    return dict(zip(METRICS, (accuracy_score(y, predicted), *means), strict=True))


def score_folds(model, X, y):
    """Return the METRICS and the fit_time of each fold, a row a fold, the same for every model."""
    repeats = max(2, min(REPEATS, 15_000 // len(X)))  # many rows tell as much in fewer folds
    folds = RepeatedStratifiedKFold(n_splits=FOLDS, n_repeats=repeats, random_state=SEED)
    table = cross_validate(model, X, y, cv=folds, scoring=score, n_jobs=-1, error_score="raise")
    return pd.DataFrame(table).rename(columns=lambda name: name.removeprefix("test_"))


def log_candidate(name, model, parts):
    """Score, fit, log and time one candidate: a child of the active run, FAILED if it raises.

    Returns its accuracy on each fold, None if it failed.
    """
    (X_train, y_train, train), (X_test, y_test, test) = parts
    tags = {"comparison": mlflow.active_run().info.run_id, "candidate": name}
    run = mlflow.start_run(run_name=name, nested=True)
    try:
        with run:
            mlflow.log_params(model.get_params(deep=False))
            log_rows(training=train, testing=test)
            model = with_preprocessing(model)
            folds = score_folds(model, X_train, y_train)
            model_id = log_model(model.fit(X_train, y_train), X_train).model_id
            # Rounded, so that equal scores are equal: the last bits depend on the order of the sum.
            metrics = {f"cv_{key}": round(folds[key].mean(), 12) for key in METRICS}
            metrics |= {f"cv_{key}_std": round(folds[key].std(ddof=0), 12) for key in METRICS}
            metrics["fit_seconds"] = folds["fit_time"].mean()
            rest = score(model, X_test, y_test) | serving_cost(f"models:/{model_id}", X_test)
            mlflow.log_metrics(metrics, model_id=model_id, dataset=train)
            mlflow.log_metrics(rest, model_id=model_id, dataset=test)
            mlflow.set_logged_model_tags(model_id, tags)
    except Exception as error:  # MLflow has marked the run FAILED; the other candidates go on
        mlflow.MlflowClient().set_tag(run.info.run_id, "verdict", f"FAILED: {error!r}")
        return None
    return folds["accuracy"]


def serving_cost(model_uri, X):
    """Time a model as MLflow serves it, on one core: through pyfunc, which checks each row."""
    model = mlflow.pyfunc.load_model(model_uri)
    rows = cycle([X.iloc[[i]] for i in range(len(X))])
    batch = X.sample(10_000, replace=True, random_state=SEED)
    with threadpool_limits(1):  # the first ten calls warm up
        single = timeit.repeat(lambda: model.predict(next(rows)), number=1, repeat=70)[10:]
        batches = timeit.repeat(lambda: model.predict(batch), number=1, repeat=3)
    return {
        "latency_ms_p50": np.percentile(single, 50) * 1000,
        "latency_ms_p95": np.percentile(single, 95) * 1000,
        "rows_per_second": len(batch) / np.median(batches),
        "model_size_bytes": model.metadata.model_size_bytes,
    }


def p_values(scores, reference):
    """Return how likely each column (a row a fold) is so far from the reference by chance.

    The corrected resampled t-test (Nadeau and Bengio, Machine Learning 52:239-281, 2003): folds
    share training rows, so the variance of a mean is 1/n + test rows / training rows of theirs,
    not 1/n. Then Holm's correction for several tests (Scandinavian Journal of Statistics 6, 1979).
    """
    differences, n = scores.sub(reference, axis=0), len(scores)
    t = differences.mean() / (differences.var() * (1 / n + 1 / (FOLDS - 1))) ** 0.5
    p = pd.Series(2 * stats.t.sf(t.fillna(0).abs(), n - 1), t.index).sort_values()
    return (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1)


def log_verdicts(runs, accuracy, baseline):
    """Log to each candidate's run what the tests say of it; `runs` has the best one first."""
    best = runs.index[0]
    vs_best = p_values(accuracy.drop(columns=best), accuracy[best])
    vs_baseline = p_values(accuracy, baseline)
    for name, scores in accuracy.items():
        p = {"p_vs_best": vs_best.get(name, 1.0), "p_vs_baseline": vs_baseline[name]}
        verdict = "not told from the best" if p["p_vs_best"] >= ALPHA else "worse than the best"
        if p["p_vs_baseline"] >= ALPHA or scores.mean() <= baseline.mean():
            verdict = "no better than the baseline"
        mlflow.log_metrics(p, run_id=runs.loc[name, "run_id"])
        mlflow.MlflowClient().set_tag(runs.loc[name, "run_id"], "verdict", verdict)


def find_candidates(parent):
    """Return the parent's children as a DataFrame, best first; with equal scores, the newest."""
    runs = mlflow.search_runs(
        [parent.info.experiment_id],
        filter_string=f"tags.mlflow.parentRunId = '{parent.info.run_id}'",
        order_by=["metrics.cv_accuracy DESC", "attributes.start_time DESC"],
    )
    runs = runs.rename(columns=lambda name: name.removeprefix("tags.mlflow.").split(".")[-1])
    return runs.set_index("runName")


def recommend(runs):
    """Return the name of the fastest run not told from the best, `none` if no run is any good."""
    good = runs[runs["verdict"] == "not told from the best"]
    fast = good[good["latency_ms_p50"] <= NOISE * good["latency_ms_p50"].min()]
    return fast.index[0] if len(fast) else "none"


def draw(runs, accuracy, baseline, y, predicted):
    """Return a figure: the folds' accuracies, accuracy against latency, a confusion matrix."""
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    spread, trade, confusion = figure.subplots(1, 3)
    spread.boxplot(accuracy[runs.index], showmeans=True)
    spread.axhline(baseline, linestyle="--", color="gray")
    spread.set_xticks(range(1, len(runs) + 1), runs.index, rotation=15)
    spread.set_title(f"Accuracy on {len(accuracy)} folds (dashed: baseline, {baseline:.3f})")
    for name, run in runs.iterrows():
        point = run["latency_ms_p50"], run["cv_accuracy"], run["cv_accuracy_std"]
        trade.errorbar(*point, fmt="o", capsize=4, alpha=0.8, label=name)
    trade.legend()
    trade.set(xlabel="milliseconds for one row (median)", title="Accuracy (± std) and latency")
    ConfusionMatrixDisplay.from_predictions(y, predicted, ax=confusion, colorbar=False)
    confusion.set_title(f"Hold-out rows as seen by {runs.index[0]}")
    return figure


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="learn from this table instead")
    parser.add_argument("--target", default="diagnosis", help="its column that holds the classes")
    parser.add_argument("--tuned", metavar="RUN_ID", help="compare the best of this search as well")
    args, candidates = parser.parse_args(), CANDIDATES.copy()
    parts = tuple(load_data(args.csv, args.target))
    (X_train, y_train, train), (X_test, y_test, test) = parts
    open_store(EXPERIMENT)
    if args.tuned:
        candidates["tuned_forest"] = tuned_forest(args.tuned, train.digest)
    if len(X_train) > 10_000 and "svm" in candidates:
        candidates["svm"] = LARGE_SVM

    with mlflow.start_run(run_name="comparison") as parent:
        log_rows(training=train, testing=test)
        accuracy = {}
        try:
            baseline = score_folds(DummyClassifier(), X_train, y_train)["accuracy"]
            for number, (name, model) in enumerate(candidates.items(), 1):
                print(f"{number}/{len(candidates)}  {name}", flush=True)
                accuracy[name] = log_candidate(name, model, parts)
        except KeyboardInterrupt:
            mlflow.end_run("KILLED")
            parser.exit(130, "\nStopped; nothing has been compared.\n")
        accuracy = pd.DataFrame({n: folds for n, folds in accuracy.items() if folds is not None})
        if accuracy.empty:  # leaving the block by an exit marks the parent FAILED
            parser.exit(1, "Every candidate failed; the tag `verdict` of its run says why\n")

        query = {  # for models, not runs: what is logged with model_id and dataset belongs to them
            "experiment_ids": [parent.info.experiment_id],
            "filter_string": f"tags.comparison = '{parent.info.run_id}'",
            "order_by": [{"field_name": "metrics.cv_accuracy", "ascending": False}],
            "output_format": "list",
        }
        best = mlflow.search_logged_models(**query)[0]
        log_verdicts(find_candidates(parent), accuracy, baseline)
        runs = find_candidates(parent)
        chosen = {"best_model": best.tags["candidate"], "recommended_model": recommend(runs)}
        mlflow.log_params(chosen)
        summary = {"best_cv_accuracy": runs["cv_accuracy"].iloc[0]}
        mlflow.log_metrics(summary | {"baseline_cv_accuracy": baseline.mean()}, dataset=train)
        predicted = mlflow.pyfunc.load_model(best.model_uri).predict(X_test)
        figure = draw(runs[runs.index.isin(accuracy)], accuracy, baseline.mean(), y_test, predicted)
        mlflow.log_figure(figure, "comparison.png")
        mlflow.log_text(accuracy.assign(baseline=baseline).to_csv(index_label="fold"), "folds.csv")
        scores = ["cv_accuracy", "cv_accuracy_std", *(f"cv_{key}" for key in METRICS[1:]), *METRICS]
        tests = ["p_vs_best", "p_vs_baseline", *COSTS, "verdict"]
        mlflow.log_text(runs[scores + tests].to_csv(), "comparison.csv")
        whole = dict.fromkeys(["rows_per_second", "model_size_bytes"], "{:.0f}".format)
        style = {"float_format": "{:.4f}".format, "formatters": whole, "index_names": False}
        text = f"{runs[scores].to_string(**style)}\n\n{runs[tests].to_string(**style)}"
        text += f"\n\nBaseline, always the most frequent class: cv_accuracy {baseline.mean():.4f}"
        mlflow.set_tag("mlflow.note.content", f"```\n{text}\n```")

    print(f"\n{text}\n")
    print(f"Best model, by its cross-validated accuracy: {chosen['best_model']}")
    print(f"Recommended, the fastest not told from it: {chosen['recommended_model']}")
    print("Load the best, in any process with the same tracking URI, after `import mlflow`:")
    arguments = ", ".join(f"{key}={value!r}" for key, value in query.items())
    print(f"  best = mlflow.search_logged_models({arguments})[0]")
    print("  model = mlflow.pyfunc.load_model(best.model_uri)")
    print_where_to_look(parent.info.experiment_id)
    own_data = ["--csv", args.csv, "--target", args.target] if args.csv else []
    script = str(Path(sys.argv[0]).with_name("production_deployment.py"))
    print("Next: ", shlex.join(["python", script, "--model-uri", best.model_uri, *own_data]))


# The rest is the same in all three scripts: rows, preprocessing, store, model.

PACKAGES = ["mlflow", "scikit-learn", "skops", "pandas", "numpy", "scipy"]  # that the model needs
TRUSTED = [  # skops loads no other type that it does not know: it could run code
    "numpy.dtype",
    "sklearn.compose._column_transformer.make_column_selector",
    "sklearn.tree._tree.Tree",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
]


def load_data(csv=None, target="diagnosis"):
    """Yield features, labels and MLflow's data set: of the training part, then of the hold-out.

    Of a CSV file, or of scikit-learn's breast cancer data (569 rows × 30 features). Raises OSError
    or ValueError if it cannot be read, or if no classifier can learn the target from it.
    """
    data = load_breast_cancer(as_frame=True)
    name, table = "breast-cancer", data.data.assign(diagnosis=data.target_names[data.target])
    if csv:
        name = "-".join(re.findall("[a-z0-9]+", Path(csv).stem.lower())) or "table"
        table = pd.read_csv(csv, low_memory=False)
    if target not in table:
        raise ValueError(f"no column {target!r} in {name}, only {', '.join(map(repr, table))}")
    labels = table.pop(target).dropna().convert_dtypes().astype(str)  # in spite of gaps 1, not 1.0
    if gaps := len(table) - len(labels):
        print(f"{gaps} of {len(table)} rows have no {target!r} and are left out")
    count = labels.value_counts()
    if len(count) < 2 or count.min() * (1 - TEST_SIZE) < FOLDS:
        least = f"needs 2 or more classes of {FOLDS / (1 - TEST_SIZE):.0f} or more rows"
        raise ValueError(f"{target!r} {least}, has {count.tail().to_dict()}")
    numbers = table.convert_dtypes().select_dtypes(["number", "boolean"])
    table = table.astype(dict.fromkeys(numbers, "float64"))  # which can hold a gap
    for column in table.select_dtypes(exclude="number"):
        if table[column].dropna().str.match(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}").all():
            raise ValueError(f"column {column!r} holds dates: turn them into numbers, such as days")
    table = table.loc[labels.index].assign(**{target: labels})
    parts = train_test_split(table, test_size=TEST_SIZE, stratify=labels, random_state=SEED)
    for part, kind in zip(parts, ("train", "test"), strict=True):
        dataset = mlflow.data.from_pandas(part, targets=target, name=f"{name}-{kind}")
        yield part.drop(columns=target), part[target], dataset


def with_preprocessing(model):
    """Return a pipeline that takes raw rows: it fills gaps, scales numbers and encodes text."""
    numbers = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler())
    fill = {"strategy": "constant", "fill_value": "missing"}
    text = make_pipeline(
        SimpleImputer(**fill),  # a gap in a table, then one in a request
        SimpleImputer(missing_values=None, **fill),
        OneHotEncoder(handle_unknown="ignore", max_categories=20, sparse_output=False),
    )
    columns = make_column_transformer(
        (numbers, make_column_selector(dtype_include="number")),
        (text, make_column_selector(dtype_exclude="number")),
    )
    return make_pipeline(columns, model)


def open_store(experiment):
    """Select the experiment, which is made if it is new; return its id. Raises OSError."""
    logging.disable(logging.INFO)  # MLflow reports every table that it makes; warnings still show
    logging.getLogger("mlflow.store.db.utils").disabled = True  # logs what it also raises
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # two lines for every run
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"  # on stderr, for every file
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # its own 7 take four minutes
    import skops.io  # noqa: F401  log_model needs it: a pause of a second, better here than there

    uri = mlflow.get_tracking_uri()
    lock = f"{uri.removeprefix('sqlite:///')}.lock" if uri.startswith("sqlite:///") else ":memory:"
    try:
        if uri.startswith("http"):
            urlopen(f"{uri}/health", timeout=5).close()
        with contextlib.closing(sqlite3.connect(lock, timeout=60)) as connection:
            connection.execute("BEGIN EXCLUSIVE")  # one process makes the tables, the others wait
            mlflow.set_experiment(experiment)
        # Again: one that another process made in the same moment is returned, but not selected.
        return mlflow.set_experiment(experiment).experiment_id
    except (OSError, sqlite3.Error, SQLAlchemyError) as error:
        place = uri.split("@")[-1]  # without a password
        raise OSError(f"start, unlock or free the store {place}: {error}") from None


def log_rows(**rows):
    """Link data sets to the active run: log_rows(training=…, testing=…)."""
    inputs = list(rows.values()), list(rows), [None] * len(rows)
    with contextlib.suppress(MlflowException):  # another process is just making the same ones
        mlflow.log_inputs(*inputs)
    mlflow.log_inputs(*inputs)


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
    uri = re.sub("(//[^:/]*):[^@/]*@", r"\1:PASSWORD@", mlflow.get_tracking_uri())
    server = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    print(f"Look:  {server}/#/experiments/{experiment_id}/runs?workflowType=machine_learning")
    if server != uri:
        print(f"       after starting  mlflow ui --backend-store-uri {uri}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, MlflowException, SQLAlchemyError) as error:  # or the store fails
        if isinstance(error, ValueError) and mlflow.last_active_run():
            raise  # the input was fine: this is not expected
        while isinstance(error, MlflowException | SQLAlchemyError) and error.__cause__:
            error = error.__cause__  # such as a full disk, which the others do not name
        print(f"Stopped: {error}".splitlines()[0], file=sys.stderr)
        sys.exit(2)
