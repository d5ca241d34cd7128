"""Print what tracking costs: whole processes over the same grid, folds and seed, side by side.

    python tests/benchmark_tuning.py               the default grid, 27 trials
    python tests/benchmark_tuning.py --scale 12    12 times the trees: a search of minutes

bare      scikit-learn's GridSearchCV, nothing tracked
tuning    hyperparameter_tuning.py
autolog   GridSearchCV with mlflow.sklearn.autolog
optuna    Optuna with MLflow's own storage, mlflow.optuna.MlflowStorage

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

from conftest import ROOT, edited

SCRIPT = (ROOT / "hyperparameter_tuning.py").read_text()
DATA = f"""
import numpy as np
import pandas as pd
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

{re.search(r"^def add_preprocessing.*?(?=^def )", SCRIPT, re.M | re.S)[0]}
data = load_breast_cancer(as_frame=True)
y = data.target.map(dict(enumerate(data.target_names)))
held_out = pd.util.hash_pandas_object(data.data, index=False) % 1000 < 200
X, y, X_test, y_test = data.data[~held_out], y[~held_out], data.data[held_out], y[held_out]
folds = StratifiedKFold(5, shuffle=True, random_state=42)
forest = add_preprocessing(RandomForestClassifier(random_state=42))
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
OPTUNA = """
import mlflow, optuna
from mlflow.optuna.storage import MlflowStorage
mlflow.set_tracking_uri("sqlite:///mlflow.db")
space = {name: list(values) for name, values in GRID.items()}
def objective(trial):
    params = {name: trial.suggest_categorical(name, values) for name, values in space.items()}
    return cross_val_score(forest.set_params(**params), X, y, cv=folds, n_jobs=-1).mean()
storage = MlflowStorage(experiment_id=mlflow.create_experiment("optuna"))
sampler = optuna.samplers.GridSampler(space)
options = {"study_name": "grid", "direction": "maximize"}
study = optuna.create_study(storage=storage, sampler=sampler, **options)
study.optimize(objective)
forest.set_params(**study.best_params).fit(X, y).score(X_test, y_test)
"""


def seconds(text):
    """Run a script in an empty folder; return the seconds of wall time of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "script.py").write_text(text)
        env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
        start = time.perf_counter()
        command = [sys.executable, "script.py"]
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
        return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=int, default=1, help="times the trees of each forest")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    trees = [args.scale * n for n in (20, 100, 300)]
    grid = {"max_depth": [1, 3, 9], "max_features": [0.1, 0.3, 0.9], "n_estimators": trees}
    with tempfile.TemporaryDirectory() as folder:
        script = edited(Path(folder), "hyperparameter_tuning.py", PARAM_GRID=grid).read_text()
    data = f"GRID = {grid}\n{DATA}"
    peers = {
        "bare": data + SEARCH,
        "tuning": script,
        "autolog": AUTOLOG + data + SEARCH,
        "optuna": data + OPTUNA,
    }
    times = {name: [] for name in peers}
    for _ in range(args.rounds):  # in turn, so that a change in the machine meets all of them
        for name, text in peers.items():
            times[name].append(seconds(text))
            print(f"{name:8} {times[name][-1]:6.1f} s", flush=True)
    for name in peers:
        ratios = [one / bare for one, bare in zip(times[name], times["bare"], strict=True)]
        print(f"{name:8} {statistics.median(ratios):.2f} x bare")


if __name__ == "__main__":
    main()
