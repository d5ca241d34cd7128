"""One's own table: what may stand in it, what may not, and the three scripts one after another."""

import ast
import os
import re
import shutil
import subprocess

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import (
    ROOT,
    SCRIPTS,
    SOON,
    Code,
    assert_one_line,
    assert_success,
    children,
    edited,
    parents,
    run,
    store,
    user_env,
)
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

TARGET = "class, of it"
ONE_CORE = {"LOKY_MAX_CPU_COUNT": "1"}  # of so few trials and folds it is the faster way
README = (ROOT / "README.md").read_text()


def odd_table():
    """Return 300 rows of what tables hold: gaps, text, yes and no, odd names, empty columns."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 300)
    table = pd.DataFrame(
        {
            'größe, "cm"': kind * 5 + rng.normal(0, 0.6, 300),
            "it's a count": rng.integers(0, 9, 300),
            "farbe": np.array(["rot", "grün", None, "blau"], dtype=object)[rng.integers(0, 4, 300)],
            "active": np.array([True, False, None], dtype=object)[rng.integers(0, 3, 300)],
            "last": kind == 2,
            "empty": np.nan,
            "seldom": np.array([None] * 3 + ["once"] + [None] * 296, dtype=object),
            TARGET: np.array(["a b", "ü", "1"], dtype=object)[kind],
        }
    )
    table.loc[::9, "empty"] = np.nan
    table.loc[1::9, "it's a count"] = None
    table.loc[::50, TARGET] = None
    return table


def chain(folder, *args):
    """Run the README's line that chains the three scripts, with small settings, on these args."""
    (line,) = re.findall(r"^.*\| follow .*$", README, re.M)
    (function,) = re.findall(r"^follow\(\) .*$", README, re.M)
    numpys = Code('{"max_features": ["sqrt", "log2"], "n_estimators": pd.Series([5, 20]).values}')
    edited(folder, SCRIPTS[0], PARAM_GRID=numpys)
    few = {"logistic_regression": LogisticRegression(max_iter=1000), "svm": LinearSVC()}
    edited(folder, SCRIPTS[1], REPEATS=2, CANDIDATES=few)
    shutil.copy(ROOT / SCRIPTS[2], folder)
    first = f"python {SCRIPTS[0]}"
    assert first in line
    command = f"{function}\n{line.replace(first, ' '.join((first, *args)))}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=user_env(**ONE_CORE),
        capture_output=True,
        text=True,
    )


def digests(run_):
    return {d.dataset.name: d.dataset.digest for d in run_.inputs.dataset_inputs}


def check_chain(folder, data):
    """The three sessions in the folder hand on from one to the next, on the same rows."""
    client = store(folder)
    (search,), (comparison,), (deployment,) = map(
        parents, ("hyperparameter-tuning", "model-comparison", "production-deployment")
    )
    candidates = children(comparison)
    tuned = candidates["tuned_forest"].data.params
    best = {k[5:]: v for k, v in search.data.params.items() if k.startswith("best_")}
    best = {name: str(ast.literal_eval(value)) for name, value in best.items()}
    assert best and best.items() <= tuned.items()
    assert digests(search) == digests(candidates["svm"])
    assert set(digests(search)) == {f"{data}-train", f"{data}-test"}
    assert digests(deployment).items() <= digests(search).items()
    winner = candidates[comparison.data.params["best_model"]]
    version = client.get_model_version_by_alias(f"{data}-classifier", "production")
    assert version.run_id == winner.info.run_id
    return mlflow.pyfunc.load_model(f"models:/{data}-classifier@production")


def test_the_line_that_chains_the_three_on_the_default_data(tmp_path):
    process = chain(tmp_path)
    assert process.returncode == 0, process.stderr
    check_chain(tmp_path, "breast-cancer")


def test_the_line_that_chains_the_three_on_a_csv(tmp_path):
    table = odd_table()
    table.assign(large=[10**20 * (row % 7) for row in range(300)]).to_csv(
        tmp_path / "Kunden 2026.csv", index=False
    )
    process = chain(tmp_path, "--csv", "'Kunden 2026.csv'", "--target", f"'{TARGET}'")
    assert process.returncode == 0 and "Warning" not in process.stderr, process.stderr
    assert f"kunden-2026: 294 of 300 rows have a '{TARGET}'" in process.stdout
    model = check_chain(tmp_path, "kunden-2026")

    # The model that is served takes raw rows: with gaps, and with text that it has never seen.
    raw = table.assign(large=1e20).dropna(subset=[TARGET]).head(20)
    raw.loc[raw.index[3], "farbe"] = "violett"
    request = raw.drop(columns=TARGET).to_json(orient="split", index=False)
    (tmp_path / "raw.json").write_text(f'{{"dataframe_split": {request}}}')
    options = "--env-manager local --content-type json --input-path raw.json --output-path out.json"
    uri = "models:/kunden-2026-classifier@production"
    process = subprocess.run(
        ["mlflow", "models", "predict", "--model-uri", uri, *options.split()],
        cwd=tmp_path,
        env=user_env(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db"),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    answers = pd.read_json(tmp_path / "out.json", dtype=False)["predictions"].astype(str)
    assert (answers.to_numpy() == raw[TARGET].to_numpy()).mean() >= 0.9
    # A gap in a request, None, is the same to it as one in a table, nan.
    rows, words = raw.drop(columns=TARGET), ("farbe", "seldom")
    rows = rows.assign(**{n: rows[n].astype("float64") for n in rows if n not in words})
    gap = [
        rows.assign(farbe=pd.Series([value] * 20, rows.index, dtype=object))
        for value in (None, np.nan)
    ]
    assert list(model.predict(gap[0])) == list(model.predict(gap[1]))


ROWS = {"x": range(60), "y": ["a", "b"] * 30}
UNUSABLE = {
    "missing": (None, "y", "No such file"),
    "empty": ("", "y", "No columns"),
    "not a table": ("y\n1\n1,2\n", "y", "Expected 1 fields in line 3"),
    "not text": (b"\x89PNG", "y", "can't decode"),
    "unknown target": (ROWS, "z", "table needs 'z' and more, but has 'x', 'y'"),
    "no features": ({"y": ["a", "b"] * 30}, "y", "table needs 'y' and more, but has 'y'"),
    "infinite": (ROWS | {"x": [np.inf, *range(59)]}, "y", "contains infinity"),
    "one class": (ROWS | {"y": "a"}, "y", "'y' needs 2 or more classes"),
    "a rare class": (ROWS | {"y": ["a"] * 55 + ["b"] * 5}, "y", "7 or more rows"),
    "a continuous target": (ROWS, "x", "'x' needs 2 or more classes"),
    "dates": (ROWS | {"when": "2026-11-24"}, "y", "'when' holds dates"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_file_that_cannot_be_used_ends_in_one_line(case, tmp_path):
    content, target, words = UNUSABLE[case]
    if isinstance(content, dict):
        content = pd.DataFrame(content).to_csv(index=False)
    if isinstance(content, str):
        content = content.encode()
    if content is not None:
        (tmp_path / "table.csv").write_bytes(content)
    script = SCRIPTS[list(UNUSABLE).index(case) % 3]  # what reads it is the same in all three
    args = ("--csv", "table.csv", "--target", target)
    assert_one_line(run(script, *args, cwd=tmp_path, timeout=SOON), words)
    assert set(os.listdir(tmp_path)) <= {"table.csv"}


def test_what_is_no_search_of_these_rows_is_not_compared(main_job):
    store(main_job[0])
    (search, *_), (comparison, *_) = map(parents, ("hyperparameter-tuning", "model-comparison"))
    before = len(parents("model-comparison"))
    pd.DataFrame(ROWS).to_csv(main_job[0] / "table.csv", index=False)
    own = ("--csv", "table.csv", "--target", "y")
    for args in ((search.info.run_id, *own), (comparison.info.run_id,)):
        process = run(SCRIPTS[1], "--tuned", *args, cwd=main_job[0])
        assert_one_line(process, args[0], "not a finished search on these rows")
    assert_one_line(run(SCRIPTS[1], "--tuned", "0" * 32, cwd=main_job[0]), "0" * 32)
    assert len(parents("model-comparison")) == before


def test_the_support_vector_machine_scales_to_many_rows(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(12_600, 3)), columns=list("abc"))
    table["y"] = table["a"] * table["b"] > 0
    table.to_csv(tmp_path / "table.csv", index=False)
    script = edited(tmp_path, SCRIPTS[1], CANDIDATES=Code('{"svm": CANDIDATES["svm"]}'))
    assert_success(run(script, "--csv", "table.csv", "--target", "y", cwd=tmp_path))
    store(tmp_path)
    (comparison,) = parents("model-comparison")
    svm = children(comparison)["svm"]
    assert svm.data.metrics["cv_accuracy"] > 0.95


def test_the_ci_recipe_goes_by_exit_codes(tmp_path):
    few = {"logistic_regression": LogisticRegression(max_iter=1000)}
    (recipe,) = re.findall(r"^set -euo pipefail.*?^exit \$status$", README, re.M | re.S)
    edited(tmp_path, SCRIPTS[1], REPEATS=2, CANDIDATES=few)

    def job():
        return subprocess.run(
            ["bash", "-c", recipe],
            cwd=tmp_path,
            env=user_env(**ONE_CORE),
            capture_output=True,
            text=True,
        )

    shutil.copy(ROOT / SCRIPTS[2], tmp_path)
    process = job()
    assert_success(process)
    assert "is in production." in process.stdout
    floor = "MetricThreshold(threshold=0.999, greater_is_better=True)"
    edited(tmp_path, SCRIPTS[2], GATE=Code(f'{{"accuracy": {floor}}}'))
    process = job()
    assert_one_line(process, "Version 2 is refused", code=1)
    assert "production stays as it was." in process.stdout
    client = store(tmp_path)
    production = client.get_model_version_by_alias("breast-cancer-classifier", "production")
    assert str(production.version) == "1"
    (tmp_path / SCRIPTS[1]).write_text("raise SystemExit(2)")
    assert job().returncode == 2
    assert len(parents("production-deployment")) == 2
