"""Print what the comparison costs over a bare cross-validation: whole processes, fresh store.

    python tests/benchmark_comparison.py                  the default data and folds
    python tests/benchmark_comparison.py --folds 2        2 repeats of the folds: does it run?
    python tests/benchmark_comparison.py --rows 100000    a table of 100,000 rows and 50 features

The ratios are what counts: absolute times differ with the machine.
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

import pandas as pd
from conftest import ROOT, edited
from sklearn.datasets import load_breast_cancer, make_classification

SCRIPT = (ROOT / "model_comparison.py").read_text()


def source(function):
    """Return the source of a function of the script."""
    return re.search(rf"^def {function}\(.*?\n(?=\n\n)", SCRIPT, re.M | re.S).group()


# The same candidates on the same folds, one after the other as in the script. Nothing is tracked,
# and no model is fitted on all rows.
BARE = f"""
import pandas as pd
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC, LinearSVC
import numpy as np

{source("make_candidates")}
{source("make_folds")}
{source("add_preprocessing")}

table = pd.read_csv("table.csv")
X, y = table.drop(columns="target"), table["target"].astype(str)
groups = pd.util.hash_pandas_object(X.astype(float), index=False)
train = groups % 1000 >= 200
X, y = X[train], y[train]
repeats = max(2, min(REPEATS, 15_000 // len(X)))
groups = pd.Series(range(len(y)))
folds = [fold for repeat in range(repeats) for fold in make_folds(y, groups, 5, 42 + repeat)]
for model in make_candidates(len(X), 42).values():
    print(cross_val_score(model, X, y, cv=folds, n_jobs=-1).mean().round(4))
"""


def make_table(rows):
    """Return a table with a column `target`: the breast cancer data, or one of so many rows."""
    if not rows:
        return load_breast_cancer(as_frame=True).frame
    X, y = make_classification(rows, n_features=50, n_informative=20, flip_y=0.05, random_state=42)
    return pd.DataFrame(X.round(4)).add_prefix("x").assign(target=y)


def seconds(text, table, *options):
    """Run a script in a folder with the table; return the seconds of wall time of the process."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "script.py").write_text(text)
        table.to_csv(Path(folder, "table.csv"), index=False)
        env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
        start = time.perf_counter()
        command = [sys.executable, "script.py", *options]
        subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folds", type=int, default=30, help="repeats of the five folds")
    parser.add_argument("--rows", type=int, help="rows of a made table; without: breast cancer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        script = edited(Path(folder), "model_comparison.py", REPEATS=args.folds).read_text()
    bare = f"REPEATS = {args.folds}\n{BARE}"
    table = make_table(args.rows)
    ratios = []
    for _ in range(args.rounds):  # in turn, so that a change in the machine meets both
        bare_seconds = seconds(bare, table)
        script_seconds = seconds(script, table, "--csv", "table.csv", "--target", "target")
        ratios.append(script_seconds / bare_seconds)
        times = f"bare {bare_seconds:.1f} s   script {script_seconds:.1f} s"
        print(f"{times}   ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
