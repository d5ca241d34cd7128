"""Tune a random forest with MLflow: one parent run for the search, one child run a combination.

Tries a grid of 27 combinations on all cores, by five-fold cross-validation on the training part of
scikit-learn's breast cancer data. Asks MLflow which one was best, refits it and scores it once on
rows that no trial has seen. What you will see: the depth of the trees matters most, and a forest
at a fifth of the cost is within the noise of the best.

It leaves this in the store (sqlite:///mlflow.db, or MLFLOW_TRACKING_URI where that is set):

    experiment hyperparameter-tuning
    └── grid-search       best_* parameters, best_cv_accuracy, test_accuracy, grid.html, the `model`
        ├── coarse-0001   its parameters, cv_accuracy, cv_accuracy_std, fit_seconds
        └── …             up to coarse-0027, then with --refine refine-0001 and so on
"""

import contextlib
import logging
import os
import re
import shlex
import sqlite3
import sys
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version
from pathlib import Path
from urllib.request import urlopen

import mlflow
import pandas as pd
from joblib import Parallel, delayed, parallel_config
from mlflow.exceptions import MlflowException
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.model_selection import ParameterGrid, StratifiedKFold, cross_validate, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sqlalchemy.exc import SQLAlchemyError

EXPERIMENT = "hyperparameter-tuning"
SEED = 42  # of the split, the folds and the forests
TEST_SIZE = 0.2  # share of the rows that no trial sees
FOLDS = 5
PARAM_GRID = {  # from cheap to costly: of combinations with equal scores the first one wins
    "max_depth": [1, 3, 9],
    "max_features": [0.1, 0.3, 0.9],  # share of the features that each split chooses from
    "n_estimators": [20, 100, 300],
}


def run_trial(name, params, X, y):
    """Cross-validate one combination; return its name, its metrics and the error if it raised."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    model = with_preprocessing(RandomForestClassifier(**params, random_state=SEED))
    try:
        scores = cross_validate(model, X, y, cv=folds, scoring="accuracy", error_score="raise")
    except Exception as error:  # one bad combination must not end the search
        return name, {}, f"{type(error).__name__}: {error}"
    accuracy, seconds = scores["test_score"], scores["fit_time"].mean()  # for one of the fits
    # Rounded, so that equal means are equal: the last bits depend on the order of the sum.
    metrics = {"cv_accuracy": accuracy.mean().round(12), "cv_accuracy_std": accuracy.std()}
    return name, metrics | {"fit_seconds": seconds}, None


def start_trials(trials, X, y, backend="loky"):
    """Start to try the trials ({name: parameters}) on all cores; return the results to come.

    The workers train while this process logs what has finished: tracking costs next to nothing.
    """
    # The longest first: one that came last would leave the other cores idle.
    tasks = [delayed(run_trial)(name, trials[name], X, y) for name in reversed(trials)]
    with parallel_config(backend):
        return Parallel(n_jobs=-1, return_as="generator_unordered")(tasks)


def log_trials(results, trials, dataset):
    """Log and print each result as it comes: a child of the active run, visible at once."""
    start, total = time.perf_counter(), len(trials)
    print(f"{total} trials, the longest first", flush=True)
    with contextlib.closing(results):  # if this stops, so do the workers
        for done, (name, metrics, error) in enumerate(results, 1):
            with mlflow.start_run(run_name=name, nested=True, tags={"stage": name.split("-")[0]}):
                mlflow.log_params(trials[name])
                mlflow.log_metrics(metrics, dataset=dataset)
                if error:
                    mlflow.set_tag("error", error)
                    mlflow.end_run("FAILED")
            left = (time.perf_counter() - start) / done * (total - done)
            result = error or "accuracy {cv_accuracy:.4f} ± {cv_accuracy_std:.4f}".format(**metrics)
            line = f"{done:3}/{total} {left:4.0f} s left  {name}  {result}  {trials[name]}"
            print(line, flush=True)


def find_trials(parent, condition="attributes.status = 'FINISHED'"):
    """Return the parent's children as a DataFrame, best first; with equal scores, by their name."""
    runs = mlflow.search_runs(
        [parent.info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent.info.run_id}' AND {condition}",
        order_by=["metrics.cv_accuracy DESC", "attributes.run_name ASC"],
        output_format="list",
    )
    rows = [{"trial": r.info.run_name, **r.data.metrics, **r.data.params} for r in runs]
    return pd.DataFrame(rows, index=[r.info.run_id for r in runs])


def resumable(run_id, plan):
    """Return the names of the trials to keep of a search that was cut short; delete the others."""
    parent = mlflow.get_run(run_id)
    if parent.info.status == "FINISHED" or not plan.items() <= parent.data.params.items():
        raise ValueError(f"{run_id} is not an unfinished search of this grid on these rows")
    for trial_id in find_trials(parent, "attributes.status != 'FINISHED'").index:
        mlflow.delete_run(trial_id)  # it was cut short or failed, and is tried again
    return set(find_trials(parent).get("trial", []))


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


def named(stage, combinations):
    """Return {name: parameters}: names that sort by their place in the grid."""
    return {f"{stage}-{number:04}": params for number, params in enumerate(combinations, 1)}


def cheapest_within_one_se(trials):
    """Return the cheapest that the best does not beat by more than one standard error.

    The rule of Breiman et al., Classification and Regression Trees (1984), section 3.4.3.
    """
    best = trials.iloc[0]
    standard_error = best["cv_accuracy_std"] / (FOLDS - 1) ** 0.5
    close = trials[trials["cv_accuracy"] >= best["cv_accuracy"] - standard_error]
    return close.sort_values("fit_seconds").iloc[0]


def heat_map(trials, combinations):
    """Return the mean accuracies as a coloured HTML table: the last parameter across."""
    table = pd.DataFrame.from_dict(combinations, orient="index")
    *down, across = table.columns
    table["accuracy"] = trials.set_index("trial")["cv_accuracy"]
    table = table.pivot_table("accuracy", index=down, columns=across)
    style = table.style.background_gradient("Blues", axis=None).format("{:.4f}")
    return style.set_caption(f"Accuracy, mean over {FOLDS} folds").to_html()


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="learn from this table instead")
    parser.add_argument("--target", default="diagnosis", help="its column that holds the classes")
    parser.add_argument("--refine", action="store_true", help="go on with a finer grid")
    parser.add_argument("--resume", metavar="RUN_ID", help="continue a search that was cut short")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="train on this Dask cluster")
    args = parser.parse_args()
    start, done, backend = time.perf_counter(), set(), "dask" if args.scheduler else "loky"
    # joblib's warning about what workers did in vain, should the search end early.
    warnings.filterwarnings("ignore", r"\d+ tasks ")
    (X_train, y_train, train), (X_test, y_test, test) = load_data(args.csv, args.target)
    plan = {"grid": str(PARAM_GRID), "folds": f"{FOLDS}, seed {SEED}", "rows": train.digest}
    trials = coarse = named("coarse", ParameterGrid(PARAM_GRID))
    RandomForestClassifier().set_params(**coarse["coarse-0001"])  # raises if one is unknown
    if args.scheduler:
        try:
            from dask.distributed import Client
        except ImportError:
            raise ValueError("--scheduler needs Dask: pip install distributed") from None
        Client(args.scheduler, timeout=5)
    if args.resume:
        open_store(EXPERIMENT)
        done = resumable(args.resume, plan)
    todo = {name: params for name, params in coarse.items() if name not in done}
    results = start_trials(todo, X_train, y_train, backend)
    open_store(EXPERIMENT)  # a new one takes seconds: the workers train meanwhile

    with mlflow.start_run(run_id=args.resume, run_name="grid-search") as parent:
        mlflow.log_params(plan)
        log_rows(training=train, testing=test)
        try:
            log_trials(results, todo, train)
            found = find_trials(parent)
            if args.refine and len(found):
                fine = named("refine", refinement(coarse[found["trial"].iloc[0]], PARAM_GRID))
                todo = {name: params for name, params in fine.items() if name not in done}
                log_trials(start_trials(todo, X_train, y_train, backend), todo, train)
                trials, found = coarse | fine, find_trials(parent)
        except KeyboardInterrupt:
            for run_id in find_trials(parent, "attributes.status = 'RUNNING'").index:
                mlflow.MlflowClient().set_terminated(run_id, "KILLED")  # it was just being made
            while mlflow.active_run():
                mlflow.end_run("KILLED")
            command = shlex.join(["python", *sys.argv, "--resume", parent.info.run_id])
            parser.exit(130, f"\nStopped. The finished trials are kept; to go on: {command}\n")
        if found.empty:  # leaving the block by an exit marks the parent FAILED
            parser.exit(1, f"All {len(trials)} trials failed; their tag `error` says why\n")

        best, cheap = found.iloc[0], cheapest_within_one_se(found)
        best_params = trials[best["trial"]]
        model = with_preprocessing(RandomForestClassifier(**best_params, random_state=SEED))
        model_id = log_model(model.fit(X_train, y_train), X_train).model_id
        mlflow.log_params({f"best_{name}": value for name, value in best_params.items()})
        mlflow.log_metric("best_cv_accuracy", best["cv_accuracy"], model_id=model_id, dataset=train)
        score = model.score(X_test, y_test)
        mlflow.log_metric("test_accuracy", score, model_id=model_id, dataset=test)
        mlflow.log_metric("search_seconds", time.perf_counter() - start)
        mlflow.log_text(heat_map(found, coarse), "grid.html")

    metrics = mlflow.get_run(parent.info.run_id).data.metrics
    print(f"\nThe five best of {len(found)} trials, by their mean accuracy over {FOLDS} folds:")
    print(found.head().to_string(index=False, float_format="{:.4f}".format))
    print(f"\nBest parameters:   {best_params}")
    print(f"Hold-out accuracy: {metrics['test_accuracy']:.4f}")
    share, compute = cheap["fit_seconds"] / best["fit_seconds"], found["fit_seconds"].sum() * FOLDS
    print(f"Cheapest within one standard error: {cheap['trial']}, {share:.0%} of the time to fit")
    print(f"Cost: {compute:.0f} s of fitting in {metrics['search_seconds']:.0f} s\n")
    print_where_to_look(parent.info.experiment_id)
    own_data = ["--csv", args.csv, "--target", args.target] if args.csv else []
    script = str(Path(sys.argv[0]).with_name("model_comparison.py"))
    print("Next: ", shlex.join(["python", script, "--tuned", parent.info.run_id, *own_data]))


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
