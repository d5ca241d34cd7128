"""Compare four classifiers with MLflow: which is best, is it by chance, and what do they cost?

Each is scored on the same 150 folds of the training part of scikit-learn's breast cancer data.
MLflow is asked which is best, a test which others cannot be told from it, and the best of those
that answer fastest is recommended. What you will see: the scaled logistic regression leads, even
150 folds cannot tell the other three from it, and it answers twice as fast as the forest.

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment model-comparison
    └── comparison               best_model, recommended_model; folds.csv, comparison.csv and .png
        ├── random_forest        cv_accuracy, cv_f1, cv_precision, cv_recall (means over all folds,
        ├── gradient_boosting    cv_accuracy_std beside them); without cv_ on the hold-out, which
        ├── logistic_regression  decides nothing; p_vs_best, p_vs_baseline; fit_seconds,
        └── svm                  latency_ms_p50 …; parameters; the model `model`
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
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version
from pathlib import Path

import mlflow
import pandas as pd
import requests
from matplotlib.figure import Figure
from scipy import stats
from sklearn.compose import make_column_transformer
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
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

EXPERIMENT = "model-comparison"
SEED = 42  # of the split, the folds and the models
TEST_SIZE = 0.2  # share of the rows that decides nothing
FOLDS = 5
REPEATS = 30  # of the folds, each time shuffled anew; fewer from 500 rows on
ALPHA = 0.05  # a p-value below it counts as a difference
NOISE = 1.1  # latencies of up to so many times the fastest count as equal to it
METRICS = ["accuracy", "precision", "recall", "f1"]
COLUMNS = ["cv_accuracy", "cv_accuracy_std", *(f"cv_{key}" for key in METRICS[1:]), *METRICS]
COLUMNS += ["p_vs_best", "p_vs_baseline", "fit_seconds", "latency_ms_p50", "latency_ms_p95"]
COLUMNS += ["rows_per_second", "model_size_bytes", "verdict"]
CANDIDATES = {  # a fifth candidate is one more line; of equal scores the last one wins
    "random_forest": RandomForestClassifier(random_state=SEED),
    "gradient_boosting": HistGradientBoostingClassifier(random_state=SEED),
    "logistic_regression": LogisticRegression(max_iter=1000),
    # An SVC's kernel, approximated: of 100,000 rows an SVC would take hours.
    "svm": make_pipeline(Nystroem(random_state=SEED), LinearSVC(random_state=SEED)),
}
TREE = "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor"
TRUSTED = ["numpy.dtype", "sklearn.tree._tree.Tree", TREE]  # what skops does not know: no code


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


def serving_cost(model_id, X):
    """Time a model as MLflow serves it, on one core: through pyfunc, which checks each row."""
    model = mlflow.pyfunc.load_model(f"models:/{model_id}")
    batch = X.sample(10_000, replace=True, random_state=SEED)
    with threadpool_limits(1):  # the first ten calls warm up
        single = timeit.repeat(lambda: model.predict(X.head(1)), number=1, repeat=70)[10:]
        whole = timeit.repeat(lambda: model.predict(batch), number=1, repeat=3)
    p50, p95 = pd.Series(single).quantile([0.50, 0.95]) * 1000
    return {
        "latency_ms_p50": p50,
        "latency_ms_p95": p95,
        "rows_per_second": len(batch) / min(whole),
        "model_size_bytes": model.metadata.model_size_bytes,
    }


def log_candidate(name, model, parts, comparison):
    """Score, fit, time and log a candidate; parts: of load_data. Return its folds' accuracy."""
    (X, y, train), (X_test, y_test, test) = parts
    mlflow.log_params(model.get_params())
    model = with_preprocessing(model, X)
    folds = score_folds(model, X, y)
    model_id = log_model(model.fit(X, y), X)
    # Rounded, so that equal scores are equal: the last bits depend on the order of the sum.
    metrics = folds[METRICS].mean().round(12).add_prefix("cv_").to_dict()
    metrics["cv_accuracy_std"] = folds["accuracy"].std(ddof=0)
    metrics["fit_seconds"] = folds["fit_time"].mean()
    mlflow.log_metrics(metrics | serving_cost(model_id, X), model_id=model_id, dataset=train)
    mlflow.log_metrics(score(model, X_test, y_test), model_id=model_id, dataset=test)
    mlflow.set_logged_model_tags(model_id, {"candidate": name, "comparison": comparison})
    return folds["accuracy"]


def p_values(scores, reference):
    """Return how likely each column (a row a fold) is so far from the reference by chance.

    The corrected resampled t-test (Nadeau and Bengio, Machine Learning 52:239-281, 2003): folds
    share training rows, so the variance of a mean is 1/n + test rows / training rows of theirs,
    not 1/n. Then Holm's correction for several tests (Scandinavian Journal of Statistics 6, 1979).
    """
    differences, n = scores.sub(reference, axis=0), len(scores)
    t = differences.mean() / (differences.var() * (1 / n + 1 / (FOLDS - 1))) ** 0.5
    p = pd.Series(2 * stats.t.sf(t.abs(), n - 1), t.index).fillna(1).sort_values()
    return (p * [*range(len(p), 0, -1)]).cummax().clip(upper=1)


def draw(runs, folds, y, predicted):
    """Return a figure: the folds' accuracies, accuracy against latency, a confusion matrix."""
    figure = Figure(figsize=(16, 5), layout="constrained")
    spread, trade, matrix = figure.subplots(1, 3)
    folds.boxplot(ax=spread, rot=15).set_title("Accuracy over the folds")
    points = runs.pivot_table("cv_accuracy", "latency_ms_p50", "runName")
    points.plot(ax=trade, style="o", title="Mean accuracy by latency")
    ConfusionMatrixDisplay.from_predictions(y, predicted, ax=matrix, colorbar=False)
    matrix.set_title("Hold-out rows as the best model sees them")
    return figure


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="learn from this table instead")
    parser.add_argument("--target", default="diagnosis", help="its column that holds the classes")
    parser.add_argument("--tuned", metavar="RUN_ID", help="compare the best of this search as well")
    args, candidates = parser.parse_args(), CANDIDATES.copy()
    parts = (X, y, train), (X_test, y_test, test) = tuple(load_data(args.csv, args.target))
    warnings.filterwarnings("ignore", "n_components >")  # Nystroem's: of few rows it takes all
    _, look = open_store(EXPERIMENT)
    if args.tuned is not None:
        run = mlflow.get_run(args.tuned)
        if run.info.status != "FINISHED" or run.data.params.get("rows") != train.digest:
            raise ValueError(f"{args.tuned} is not a finished search on these rows")
        best = {k[5:]: ast.literal_eval(v) for k, v in run.data.params.items() if k[:5] == "best_"}
        candidates["tuned_forest"] = RandomForestClassifier(**best, random_state=SEED)

    with mlflow.start_run(run_name="comparison") as parent:
        with contextlib.suppress(mlflow.MlflowException):  # another makes them now: ask again
            mlflow.log_inputs([train, test], ["training", "testing"], [None, None])
        mlflow.log_inputs([train, test], ["training", "testing"], [None, None])
        print(f"0/{len(candidates)}  baseline", flush=True)
        baseline, scores = score_folds(DummyClassifier(), X, y)["accuracy"], {}
        for number, (name, model) in enumerate(candidates.items(), 1):
            print(f"{number}/{len(candidates)}  {name}, {len(baseline)} folds", flush=True)
            with mlflow.start_run(run_name=name, nested=True):
                try:
                    scores[name] = log_candidate(name, model, parts, parent.info.run_id)
                except Exception as error:  # the others go on
                    mlflow.set_tag("verdict", f"FAILED: {error!r}")
                    mlflow.end_run("FAILED")
        if not scores:  # leaving the block by an exit marks the parent FAILED
            parser.exit(1, "Every candidate failed; the tag `verdict` of its run says why\n")

        # Models, not runs: what is logged with model_id and dataset belongs to the model.
        ids, session = [parent.info.experiment_id], parent.info.run_id
        query = {"experiment_ids": ids, "filter_string": f"tags.comparison = '{session}'"}
        query["order_by"] = [{"field_name": "metrics.cv_accuracy", "ascending": False}]
        models = mlflow.search_logged_models(**query, output_format="list")
        best, scores = models[0].tags["candidate"], pd.DataFrame(scores)
        vs_best = p_values(scores.drop(columns=best), scores[best])
        vs_baseline = p_values(scores, baseline)
        for model in models:
            name, run_id = model.tags["candidate"], model.source_run_id
            p = {"p_vs_best": vs_best.get(name, 1.0), "p_vs_baseline": vs_baseline[name]}
            verdict = "not told from the best" if p["p_vs_best"] >= ALPHA else "worse than the best"
            if p["p_vs_baseline"] >= ALPHA or scores[name].mean() <= baseline.mean():
                verdict = "no better than the baseline"
            mlflow.log_metrics(p, run_id=run_id)
            mlflow.MlflowClient().set_tag(run_id, "verdict", verdict)
        # The same by run: also those that failed. Either puts the newest of equal scores first.
        children = f"tags.mlflow.parentRunId = '{session}'"
        runs = mlflow.search_runs(ids, children, order_by=["metrics.cv_accuracy DESC"])
        runs = runs.rename(columns=lambda name: name.split(".")[-1])
        good = runs[runs["verdict"] == "not told from the best"]
        fast = good[good["latency_ms_p50"] <= NOISE * good["latency_ms_p50"].min()]
        recommended = fast["runName"].iloc[0] if len(fast) else "none"
        mlflow.log_params({"best_model": best, "recommended_model": recommended})
        mlflow.log_metric("best_cv_accuracy", scores[best].mean().round(12), dataset=train)
        mlflow.log_metric("baseline_cv_accuracy", baseline.mean(), dataset=train)
        predicted = mlflow.pyfunc.load_model(models[0].model_uri).predict(X_test)
        folds = scores.assign(baseline=baseline)
        mlflow.log_figure(draw(runs, folds, y_test, predicted), "comparison.png")
        mlflow.log_text(folds.to_csv(index_label="fold"), "folds.csv")
        table = runs.set_index("runName")[COLUMNS]
        mlflow.log_text(table.to_csv(), "comparison.csv")
        style = {"float_format": lambda x: f"{x:.{4 if x < 1000 else 0}f}", "max_colwidth": 30}
        text = table.T.to_string(index_names=False, **style)
        text += f"\n\nBaseline, always the most frequent class: cv_accuracy {baseline.mean():.4f}"
        mlflow.set_tag("mlflow.note.content", f"```\n{text}\n```")

    print(f"\n{text}\n\nBest model, by its cross-validated accuracy: {best}")
    print(f"Recommended, not told from it and (within {NOISE - 1:.0%}) the fastest: {recommended}")
    print("Load the best, in any process with the same tracking URI, after `import mlflow`:")
    print(f"  best = mlflow.search_logged_models(**{query}, output_format='list')[0]")
    print(f"  model = mlflow.pyfunc.load_model(best.model_uri)\n\nLook:  {look}")
    if recommended == "none":
        parser.exit(1, "No candidate is shown to be better than the baseline: deploy none\n")
    own_data = ["--csv", args.csv, "--target", args.target] if args.csv else []
    script = str(Path(sys.argv[0]).with_name("production_deployment.py"))
    print("Next: ", shlex.join(["python", script, "--model-uri", models[0].model_uri, *own_data]))


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
