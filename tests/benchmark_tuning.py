"""Print what tracking costs: whole processes over the same grid, folds and seed, side by side.

    python tests/benchmark_tuning.py               the default grid, 27 trials
    python tests/benchmark_tuning.py --scale 12    12 times the trees: a search of minutes
    python tests/benchmark_tuning.py --flat        the time to log a trial, for 27 to 2,000 trials
    python tests/benchmark_tuning.py --tiny        4 trials of one tree: does everything run?

bare      scikit-learn's GridSearchCV, nothing tracked
tuning    hyperparameter_tuning.py
autolog   GridSearchCV with mlflow.sklearn.autolog
optuna    Optuna with MLflow's own storage, mlflow.optuna.MlflowStorage
callback  Optuna with its MLflowCallback: deprecated, and gone from optuna-integration 6.0
ray       Ray Tune with its MLflowLoggerCallback: timed where `ray[tune]` is installed

Needs tests/requirements.txt. The ratios are what counts: absolute times differ with the machine.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import mlflow
from conftest import ROOT, edited

SCRIPT = (ROOT / "hyperparameter_tuning.py").read_text()
PIPELINE = re.search(r"^def add_preprocessing.*?\n(?=\n\n)", SCRIPT, re.M | re.S).group()
DATA = f"""
import numpy as np
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
{PIPELINE}
data = load_breast_cancer(as_frame=True)
y = data.target.map(dict(enumerate(data.target_names)))
X, X_test, y, y_test = train_test_split(data.data, y, test_size=0.2, stratify=y, random_state=42)
folds = StratifiedKFold(5, shuffle=True, random_state=42)
forest = add_preprocessing(RandomForestClassifier(random_state=42), X)
GRID = {{f"randomforestclassifier__{{name}}": values for name, values in GRID.items()}}
"""
SEARCH = """
search = GridSearchCV(forest, GRID, cv=folds, scoring="accuracy", n_jobs=-1).fit(X, y)
search.score(X_test, y_test)
"""
AUTOLOG = """
import mlflow
mlflow.set_tracking_uri("sqlite:///mlflow.db")
mlflow.sklearn.autolog(max_tuning_runs=27)
"""
OBJECTIVE = """
import mlflow, optuna
mlflow.set_tracking_uri("sqlite:///mlflow.db")
space = {name: list(values) for name, values in GRID.items()}
def objective(trial):
    params = {name: trial.suggest_categorical(name, values) for name, values in space.items()}
    return cross_val_score(forest.set_params(**params), X, y, cv=folds, n_jobs=-1).mean()
"""
STORAGE = """
from mlflow.optuna.storage import MlflowStorage
storage = MlflowStorage(experiment_id=mlflow.create_experiment("optuna"))
callbacks = []
"""
CALLBACK = """
from optuna_integration.mlflow import MLflowCallback
storage = None
callbacks = [MLflowCallback(tracking_uri="sqlite:///mlflow.db", metric_name="cv_accuracy")]
"""
STUDY = """
sampler = optuna.samplers.GridSampler(space)
study = optuna.create_study(
    study_name="grid", storage=storage, direction="maximize", sampler=sampler
)
study.optimize(objective, callbacks=callbacks)
forest.set_params(**study.best_params).fit(X, y).score(X_test, y_test)
"""
RAY = """
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
def objective(config):
    score = cross_val_score(forest.set_params(**config), X, y, cv=folds).mean()
    tune.report({"cv_accuracy": score})
callback = MLflowLoggerCallback(tracking_uri="sqlite:///mlflow.db", experiment_name="ray")
tuner = tune.Tuner(
    objective,
    param_space={name: tune.grid_search(list(values)) for name, values in GRID.items()},
    tune_config=tune.TuneConfig(metric="cv_accuracy", mode="max"),
    run_config=tune.RunConfig(callbacks=[callback], verbose=0),
)
best = tuner.fit().get_best_result()
forest.set_params(**best.config).fit(X, y).score(X_test, y_test)
"""
NEEDS = {"optuna": "optuna", "callback": "optuna_integration", "ray": "ray"}


def seconds(text, folder=None):
    """Run a script in an empty folder; return the seconds of wall time of the whole process."""
    if folder is None:
        with tempfile.TemporaryDirectory() as folder:
            return seconds(text, folder)
    Path(folder, "script.py").write_text(text)
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=env, capture_output=True, text=True
    )
    if process.returncode:
        raise SystemExit(process.stderr)
    return time.perf_counter() - start


def tuning(grid):
    """Return the text of hyperparameter_tuning.py with this grid at its top."""
    with tempfile.TemporaryDirectory() as folder:
        return edited(Path(folder), "hyperparameter_tuning.py", PARAM_GRID=grid).read_text()


def print_cost_of_logging():
    """Print how long it takes to log one trial, of searches with more and more trials."""
    os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # training must not take the logging's core
    for leaves, splits in ((27, 1), (20, 10), (200, 10)):
        grid = {"min_samples_leaf": leaves, "min_samples_split": splits}
        grid = {name: list(range(2, count + 2)) for name, count in grid.items()}
        with tempfile.TemporaryDirectory() as folder:
            seconds(tuning(grid | {"n_estimators": [1]}), folder)
            mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
            runs = mlflow.search_runs(experiment_names=["hyperparameter-tuning"])
        runs = runs[runs["tags.mlflow.parentRunId"].notna()]
        cost = (runs["end_time"] - runs["start_time"]).dt.total_seconds().median() * 1000
        print(f"{len(runs):5} trials  {cost:4.0f} ms to log one (median)", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=int, default=1, help="multiply the number of trees")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="compare with these, not with all")
    parser.add_argument("--flat", action="store_true", help="vary the number of trials instead")
    parser.add_argument("--tiny", action="store_true", help="a grid of seconds, once")
    args = parser.parse_args()
    if args.flat:
        print_cost_of_logging()
        return

    trees = [args.scale * trees for trees in (20, 100, 300)]
    grid = {"max_depth": [1, 3, 9], "max_features": [0.1, 0.3, 0.9], "n_estimators": trees}
    if args.tiny:
        grid = {"max_depth": [1, 3], "max_features": [0.1, 0.3], "n_estimators": [1]}
        args.repeats = 1
    start = f"GRID = {grid}\n"
    variants = {
        "bare": start + DATA + SEARCH,
        "tuning": tuning(grid),
        "autolog": start + AUTOLOG + DATA + SEARCH,
        "optuna": start + DATA + OBJECTIVE + STORAGE + STUDY,
        "callback": start + DATA + OBJECTIVE + CALLBACK + STUDY,
        "ray": start + DATA + RAY,
    }
    if args.only is not None:
        variants = {name: variants[name] for name in ["bare", "tuning", *args.only]}
    for name in [name for name in variants if not find_spec(NEEDS.get(name, "mlflow"))]:
        print(f"{name} is left out: the package {NEEDS[name]} is not installed")
        del variants[name]

    times = {name: [] for name in variants}
    for number in range(args.repeats):  # in turn, so that a change in the machine meets all
        for name, text in variants.items():
            times[name].append(seconds(text))
            print(f"round {number + 1}  {name:8} {times[name][-1]:6.1f} s", flush=True)
    bare = statistics.median(times["bare"])
    print("\n          median   of the bare search")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:8} {median:6.1f} s   {median / bare:.2f} ×")


if __name__ == "__main__":
    main()
