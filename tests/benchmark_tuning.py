"""Print what tracking costs: whole processes over the same grid, folds and seed, side by side.

    python tests/benchmark_tuning.py               the default grid, 27 trials
    python tests/benchmark_tuning.py --scale 12    12 times the trees: a search of minutes
    python tests/benchmark_tuning.py --flat        the time to log a trial, for 27 to 2,000 trials

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
from pathlib import Path

import mlflow
from conftest import ROOT, edited

SCRIPT = (ROOT / "hyperparameter_tuning.py").read_text()
PIPELINE = re.search(r"^def with_preprocessing.*?\n(?=\n\n)", SCRIPT, re.M | re.S).group()
DATA = f"""
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
forest = with_preprocessing(RandomForestClassifier(random_state=42), X)
GRID = {{f"randomforestclassifier__{{name}}": values for name, values in GRID.items()}}
"""
SEARCH = """
GridSearchCV(forest, GRID, cv=folds, scoring="accuracy", n_jobs=-1).fit(X, y).score(X_test, y_test)
"""
AUTOLOG = """
import mlflow
mlflow.sklearn.autolog(max_tuning_runs=27)
"""
OPTUNA = """
import mlflow, optuna
from optuna_integration.mlflow import MLflowCallback
space = {name: list(values) for name, values in GRID.items()}
def objective(trial):
    params = {name: trial.suggest_categorical(name, values) for name, values in space.items()}
    return cross_val_score(forest.set_params(**params), X, y, cv=folds, n_jobs=-1).mean()
callback = MLflowCallback(tracking_uri="sqlite:///mlflow.db", metric_name="cv_accuracy")
study = optuna.create_study(direction="maximize", sampler=optuna.samplers.GridSampler(space))
study.optimize(objective, callbacks=[callback])
forest.set_params(**study.best_params).fit(X, y).score(X_test, y_test)
"""


def seconds(text, folder=None):
    """Run a script in an empty folder; return the seconds of wall time of the whole process."""
    if folder is None:
        with tempfile.TemporaryDirectory() as folder:
            return seconds(text, folder)
    Path(folder, "script.py").write_text(text)
    start = time.perf_counter()
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "script.py"]
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    return time.perf_counter() - start


def tuning(grid):
    """Return the text of hyperparameter_tuning.py with this grid at its top."""
    with tempfile.TemporaryDirectory() as folder:
        return edited(Path(folder), "hyperparameter_tuning.py", PARAM_GRID=grid).read_text()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=int, default=1, help="multiply the number of trees")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["autolog", "optuna"], help="compare with")
    parser.add_argument("--flat", action="store_true", help="vary the number of trials instead")
    args = parser.parse_args()
    if args.flat:
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
        return

    trees = [args.scale * trees for trees in (20, 100, 300)]
    grid = {"max_depth": [1, 3, 9], "max_features": [0.1, 0.3, 0.9], "n_estimators": trees}
    variants = {
        "bare": f"GRID = {grid}\n{DATA}{SEARCH}",
        "tuning": tuning(grid),
        "autolog": f"GRID = {grid}\n{AUTOLOG}{DATA}{SEARCH}",
        "optuna": f"GRID = {grid}\n{DATA}{OPTUNA}",
    }
    variants = {name: variants[name] for name in ["bare", "tuning", *args.only]}
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
