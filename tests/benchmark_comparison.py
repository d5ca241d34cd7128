"""Print what the comparison costs over a bare cross-validation: whole processes, fresh store.

    python tests/benchmark_comparison.py              the default folds
    python tests/benchmark_comparison.py --folds 2    2 repeats of the folds: does it run at all?

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

from conftest import ROOT, edited

SCRIPT = (ROOT / "model_comparison.py").read_text()
PIPELINE = re.search(r"^def add_preprocessing.*?\n(?=\n\n)", SCRIPT, re.M | re.S).group()
# The same candidates in the same order on the same folds. All folds of all candidates stand in one
# queue, as in the script. Nothing is tracked, and no model is fitted on all rows.
BARE = f"""
import numpy as np
from joblib import Parallel, delayed
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedStratifiedKFold, cross_validate, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

{PIPELINE}

data = load_breast_cancer(as_frame=True)
y = data.target.map(dict(enumerate(data.target_names)))
X, _, y, _ = train_test_split(data.data, y, test_size=0.2, stratify=y, random_state=42)
models = [
    DummyClassifier(),
    LogisticRegression(max_iter=1000),
    SVC(random_state=42),
    HistGradientBoostingClassifier(random_state=42),
    RandomForestClassifier(random_state=42),
]
folds = list(RepeatedStratifiedKFold(n_splits=5, n_repeats=REPEATS, random_state=42).split(X, y))
results = Parallel(n_jobs=-1)(
    delayed(cross_validate)(add_preprocessing(model, X), X, y, cv=[fold], scoring="accuracy")
    for model in models
    for fold in folds
)
scores = np.concatenate([result["test_score"] for result in results]).reshape(len(models), -1)
print(*scores.mean(axis=1).round(4))
"""


def seconds(text):
    """Run a script in an empty folder; return the seconds of wall time of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "script.py").write_text(text)
        env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
        start = time.perf_counter()
        command = [sys.executable, "script.py"]
        subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folds", type=int, default=30, help="repeats of the five folds")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        script = edited(Path(folder), "model_comparison.py", REPEATS=args.folds).read_text()
    bare = f"REPEATS = {args.folds}\n{BARE}"
    ratios = []
    for _ in range(args.rounds):  # in turn, so that a change in the machine meets both
        bare_seconds = seconds(bare)
        script_seconds = seconds(script)
        ratios.append(script_seconds / bare_seconds)
        times = f"bare {bare_seconds:.1f} s   script {script_seconds:.1f} s"
        print(f"{times}   ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
