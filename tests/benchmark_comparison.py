"""Print what the comparison costs over a bare cross-validation: whole processes, fresh store.

python tests/benchmark_comparison.py
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "model_comparison.py"
PIPELINE = re.search(
    r"^def with_preprocessing.*?\n(?=\n\n)", SCRIPT.read_text(), re.M | re.S
).group()
# The same candidates on the same folds, candidates and folds in parallel, nothing tracked.
BARE = f"""
from joblib import Parallel, delayed
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedStratifiedKFold, cross_validate, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC

{PIPELINE}

X, y = load_breast_cancer(as_frame=True, return_X_y=True)
X, _, y, _ = train_test_split(X, y, test_size=0.2, stratify=y, random_state=42)
models = [
    DummyClassifier(),
    RandomForestClassifier(random_state=42),
    HistGradientBoostingClassifier(random_state=42),
    LogisticRegression(max_iter=1000),
    make_pipeline(Nystroem(random_state=42), LinearSVC(random_state=42)),
]
folds = list(RepeatedStratifiedKFold(n_splits=5, n_repeats=30, random_state=42).split(X, y))
scoring = "accuracy"
Parallel(n_jobs=-1)(
    delayed(cross_validate)(with_preprocessing(model, X), X, y, cv=[fold], scoring=scoring)
    for model in models
    for fold in folds
)
"""


def seconds(*command):
    """Run the command in an empty folder and return how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        return time.perf_counter() - start


for _ in range(3):
    bare, script = seconds("-c", BARE), seconds(SCRIPT)
    print(f"bare {bare:.1f} s   script {script:.1f} s   ratio {script / bare:.2f}", flush=True)
