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
from sklearn.pipeline import Pipeline
from sklearn.svm import SVC

import hyperparameter_tuning
import model_comparison
import production_deployment

MODULES = (hyperparameter_tuning, model_comparison, production_deployment)
TARGET = "class, of it"
NAME = "kunden-2026-class-of-it-classifier"
ONE_CORE = {"LOKY_MAX_CPU_COUNT": "1"}  # of so few trials and folds it is the faster way
README = (ROOT / "README.md").read_text()
FEW = Code("lambda n_rows, seed: {'logistic_regression': LogisticRegression(), 'svm': LinearSVC()}")


def odd_table():
    """Return 300 rows of what tables hold: gaps, text, dates, yes and no, odd names, no values."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 300)
    table = pd.DataFrame(
        {
            'größe, "cm"': kind * 5 + rng.normal(0, 0.6, 300),
            "it's a count": rng.integers(0, 9, 300),
            "farbe": np.array(["rot", "grün", None, "blau"], dtype=object)[rng.integers(0, 4, 300)],
            "since": pd.date_range("2026-01-01", periods=300, freq="D").strftime("%Y-%m-%d"),
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


def shell(command, folder, **env):
    """Run a command in bash, as a user does who pastes it."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=user_env(**ONE_CORE, **env),
        capture_output=True,
        text=True,
        timeout=120,
    )


def chain(folder, command):
    """Run the README's line that chains the three scripts, with small settings."""
    (line,) = re.findall(r"^.*\| follow .*$", README, re.M)
    (function,) = re.findall(r"^follow\(\) .*$", README, re.M)
    numpys = Code('{"max_features": ["sqrt", "log2"], "n_estimators": pd.Series([5, 20]).values}')
    edited(folder, SCRIPTS[0], PARAM_GRID=numpys)
    edited(folder, SCRIPTS[1], REPEATS=2, make_candidates=FEW)
    shutil.copy(ROOT / SCRIPTS[2], folder)
    first = f"python {SCRIPTS[0]}"
    assert first in line
    return shell(f"{function}\n{line.replace(first, command)}", folder)


def digests(run_):
    return {d.dataset.name: d.dataset.digest for d in run_.inputs.dataset_inputs}


def check_chain(folder, data, metric, name):
    """The three sessions in the folder hand on from one to the next, on the same rows."""
    client = store(folder)
    (search,), (comparison,), (deployment,) = map(
        parents, ("hyperparameter-tuning", "model-comparison", "production-deployment")
    )
    candidates = children(comparison)
    tuned = candidates["tuned_forest"].data.params
    best = {
        name.removeprefix("best_"): str(ast.literal_eval(value))
        for name, value in search.data.params.items()
        if name.startswith("best_")
    }
    assert best and best.items() <= tuned.items()
    assert digests(search) == digests(candidates["svm"]) == digests(deployment)
    assert set(digests(search)) == {f"{data}-train", f"{data}-test"}
    assert search.data.params["metric"] == deployment.data.params["metric"] == metric
    best_score = max(run_.data.metrics[f"cv_{metric}"] for run_ in candidates.values())
    assert comparison.data.metrics[f"best_cv_{metric}"] == best_score
    recommended = candidates[comparison.data.params["recommended_model"]]
    version = client.get_model_version_by_alias(name, "production")
    assert version.run_id == recommended.info.run_id


def test_the_line_that_chains_the_three_on_the_default_data(tmp_path):
    process = chain(tmp_path, f"python {SCRIPTS[0]}")
    assert process.returncode == 0, process.stderr
    check_chain(tmp_path, "breast-cancer", "accuracy", "breast-cancer-classifier")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The chain on one's own table, in a folder with a space and a letter: folder, table, chain."""
    folder = tmp_path_factory.mktemp("own") / "a b é"
    folder.mkdir()
    table = odd_table()
    # Numbers that are too large for 64 bits, and a column that identifies the row.
    large = [10**20 * (row % 7) for row in range(300)]
    names = [f"Kunde {row}" for row in range(300)]
    table.assign(large=large, kunde=names).to_csv(folder / "Kunden 2026.csv", index=False)
    options = f"--csv 'Kunden 2026.csv' --target '{TARGET}' --metric f1"
    process = chain(folder, f"python '{folder / SCRIPTS[0]}' {options}")
    return folder, table.assign(large=1e20, kunde=names), process


def test_the_line_that_chains_the_three_on_a_csv(own):
    folder, _, process = own
    assert process.returncode == 0 and "Warning" not in process.stderr, process.stderr
    assert f"kunden-2026: 294 of 300 rows have a '{TARGET}'" in process.stdout
    check_chain(folder, "kunden-2026", "f1", NAME)
    # Text that is different in nearly every row is pointed out: names, and dates as text.
    named = re.findall("^Note: '(.+)' differs in nearly every row", process.stdout, re.M)
    assert named == ["since", "kunde"]
    # Nothing is left beside the folder, and in it only what is promised.
    assert os.listdir(folder.parent) == [folder.name]
    made = {"mlflow.db", "mlflow.db.lock", "mlruns"}
    assert set(os.listdir(folder)) - {"__pycache__"} == made | {*SCRIPTS, "Kunden 2026.csv"}


def test_the_model_that_is_served_takes_raw_rows(own, tmp_path):
    """With gaps and with text that it has never seen, by the guide's command as it is printed."""
    folder, table, process = own
    raw = table.dropna(subset=[TARGET]).head(20)
    raw.loc[raw.index[3], "farbe"] = "violett"
    request = raw.drop(columns=TARGET).to_json(orient="split", index=False)
    (tmp_path / "request").mkdir()
    path = tmp_path / "request" / "serving_input_example.json"
    path.write_text(f'{{"dataframe_split": {request}}}')
    (export,) = re.findall(r"^    (export MLFLOW_TRACKING_URI=.*)$", process.stdout, re.M)
    (predict,) = re.findall(r"^    (mlflow models predict .*)$", process.stdout, re.M)
    batch = shell(f"{export}\n{predict}", tmp_path)
    assert batch.returncode == 0, batch.stderr
    answers = pd.read_json(tmp_path / "predictions.json", dtype=False)["predictions"].astype(str)
    assert (answers.to_numpy() == raw[TARGET].to_numpy()).mean() >= 0.9
    # A gap in a request, None, is the same to it as one in a table, nan.
    store(folder)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    rows, words = raw.drop(columns=TARGET), ("farbe", "since", "seldom", "kunde")
    rows = rows.assign(**{n: rows[n].astype("float64") for n in rows if n not in words})
    gap = [
        rows.assign(farbe=pd.Series([value] * 20, rows.index, dtype=object))
        for value in (None, np.nan)
    ]
    assert list(model.predict(gap[0])) == list(model.predict(gap[1]))


def test_printed_commands_work_in_a_folder_with_a_space_and_a_letter(own):
    """Next, Undo, and the resuming of a search that was cut short."""
    folder, _, process = own
    name = NAME
    client = store(folder)
    deploy = re.findall(r"^Next: +(.*)$", process.stderr, re.M)[-1]  # `follow` shows it there
    again = shell(deploy, folder)
    assert_success(again)
    assert str(client.get_model_version_by_alias(name, "production").version) == "2"
    (undo,) = re.findall(r"^Undo: +(.*)$", again.stdout, re.M)
    assert_success(shell(undo, folder))
    assert str(client.get_model_version_by_alias(name, "production").version) == "1"

    (search,) = parents("hyperparameter-tuning")
    trials = children(search)
    client.update_run(search.info.run_id, status="KILLED")
    client.delete_run(trials["trial-0003"].info.run_id)
    options = ("--csv", "Kunden 2026.csv", "--target", TARGET, "--metric", "f1")
    resume = ("--resume", search.info.run_id)
    resumed = run(folder / SCRIPTS[0], *options, *resume, cwd=folder, **ONE_CORE)
    assert_success(resumed)
    assert "\n1 trials of 5 folds" in resumed.stdout
    (search,) = parents("hyperparameter-tuning")
    assert search.info.status == "FINISHED" and set(children(search)) == set(trials)
    assert os.listdir(folder.parent) == [folder.name]


def test_a_terminal_that_lacks_the_letters_gets_substitutes(tmp_path):
    """cp1252 is that of Western Windows: what it cannot show is printed as "?"."""
    table = pd.DataFrame({"температура": range(60), "ответ": ["нет"] * 30 + ["да"] * 30})
    table.to_csv(tmp_path / "таблица.csv", index=False)
    western = {"cwd": tmp_path, "PYTHONIOENCODING": "cp1252"}
    process = run(SCRIPTS[2], "--csv", "таблица.csv", "--target", "ответ", **western)
    assert_success(process)
    assert "table: 60 of 60 rows have a '?????'" in process.stdout
    version = store(tmp_path).get_model_version_by_alias("table-table-classifier", "production")
    assert str(version.version) == "1"
    for script in SCRIPTS[:2]:
        process = run(script, "--csv", "таблица.csv", "--target", "ключ", **western)
        assert_one_line(process, "table needs a column '????' (--target)", "'???????????', '?????'")


ROWS = {"x": range(60), "y": ["a", "b"] * 30}
UNUSABLE = {
    "missing": (None, "y", "No such file"),
    "empty": ("", "y", "No columns"),
    "not a table": ("y\n1\n1,2\n", "y", "Expected 1 fields in line 3"),
    "not text": (b"\x89PNG", "y", "can't decode"),
    "unknown target": (ROWS, "z", "a column 'z' (--target) and others beside it, but has 'x', 'y'"),
    "no features": (
        {"y": ["a", "b"] * 30},
        "y",
        "a column 'y' (--target) and others beside it, but has 'y'",
    ),
    "infinite": (ROWS | {"z": [-np.inf, *range(59)]}, "y", "column 'z' has infinite numbers"),
    "one class": (ROWS | {"y": "a"}, "y", "'y' needs 2 or more classes"),
    "a rare class": (ROWS | {"y": ["a"] * 54 + ["b"] * 6}, "y", "7 or more rows"),
    "a continuous target": (ROWS, "x", "'x' needs 2 or more classes"),
}


def write_table(path, content):
    """Write a table, text or bytes to a file; None makes none."""
    if isinstance(content, dict):
        content = pd.DataFrame(content).to_csv(index=False)
    if isinstance(content, str):
        content = content.encode()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_file_that_cannot_be_used_is_named_and_leaves_nothing(case, tmp_path, monkeypatch):
    content, target, words = UNUSABLE[case]
    write_table(tmp_path / "table.csv", content)
    monkeypatch.chdir(tmp_path)
    for script in MODULES:
        with pytest.raises(script.UserError, match=re.escape(words)):
            script.main(["--csv", "table.csv", "--target", target])
    assert set(os.listdir(tmp_path)) <= {"table.csv"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_that_cannot_be_used_ends_in_one_line(script, tmp_path):
    content, target, words = list(UNUSABLE.values())[SCRIPTS.index(script)]
    write_table(tmp_path / "table.csv", content)
    args = ("--csv", "table.csv", "--target", target)
    assert_one_line(run(script, *args, cwd=tmp_path, timeout=SOON), words)
    assert set(os.listdir(tmp_path)) <= {"table.csv"}


def test_the_smallest_table_and_columns_of_dates_are_taken(tmp_path, capsys):
    """Seven rows of a class are enough. Up to 20 different texts are never pointed out."""
    days = pd.date_range("2026-01-01", periods=14).strftime("%Y-%m-%d %H:%M")
    write_table(tmp_path / "few.csv", {"day": days, "y": ["a", "b"] * 7, "z": 1})
    train, test = model_comparison.load_data(tmp_path / "few.csv", "y")
    assert "Note" not in capsys.readouterr().out
    assert (len(train.X), len(test.X)) == (11, 3) and list(train.X) == ["day", "z"]
    assert min(train.y.value_counts()) == 5
    many = {"day": [f"day {number}" for number in range(60)], **ROWS}
    many["mostly"] = [f"text {min(number, 53)}" for number in range(60)]
    # "x" numbers the rows. These do not: numbers with a fraction, and those with a repetition.
    many["fraction"] = [number + 0.5 for number in range(60)]
    many["repeated"] = [max(number, 1) for number in range(60)]
    write_table(tmp_path / "many.csv", many)
    model_comparison.load_data(tmp_path / "many.csv", "y")
    notes = re.findall("^Note: '(.*)' differs in nearly every", capsys.readouterr().out, re.M)
    assert notes == ["day", "x"]


def test_words_that_count_as_a_missing_class_are_named(tmp_path, capsys):
    """pandas reads "None" and "NA" as missing: who means a class by them has to know."""
    table = {"x": 0.5, "y": ["a"] * 20 + ["b"] * 20 + ["None"] * 10 + ["NA"] * 5 + [""] * 5}
    write_table(tmp_path / "words.csv", table)
    for script in MODULES:
        train, test = script.load_data(tmp_path / "words.csv", "y")
        assert set(train.y) | set(test.y) == {"a", "b"} and len(train.y) + len(test.y) == 40
        assert re.findall("^Note: .*$", capsys.readouterr().out, re.M) == [
            f"Note: '{word}' counts as a missing 'y'; if it is a class, rename it"
            for word in ("NA", "None")
        ]
    # Rows with a field more than the header: pandas takes their first one for an index.
    rows = "".join(f"{i},0.5,{word}\n" for i, word in enumerate(table["y"]))
    write_table(tmp_path / "index.csv", f"x,y\n{rows}")
    model_comparison.load_data(tmp_path / "index.csv", "y")
    assert "Note: 'None' counts" in capsys.readouterr().out
    write_table(tmp_path / "empty.csv", table | {"y": ["a"] * 28 + [""] * 4 + ["b"] * 28})
    model_comparison.load_data(tmp_path / "empty.csv", "y")
    assert "Note" not in capsys.readouterr().out


def test_the_digest_covers_every_cell_and_name():
    """MLflow's own one stops after 10,000 rows, and leaves out text with gaps."""
    X = pd.DataFrame({"number": np.arange(10_100.0), "text": ["a", "b", None, "c"] * 2525})
    y = pd.Series(["no", "yes"] * 5050, name="y")

    def digest(X, y):
        return model_comparison.make_rows(X, y, "any").dataset.digest

    first = digest(X, y)
    assert first == digest(X.copy(), y.copy()) and re.fullmatch("[0-9a-f]{8}", first)
    late, word, label = X.copy(), X.copy(), y.copy()
    late.loc[10_099, "number"] = -1
    word.loc[0, "text"] = "z"
    label[10_099] = "no"
    changed = {digest(late, y), digest(word, y), digest(X, label), digest(X[::-1], y[::-1])}
    changed.add(digest(X.rename(columns={"text": "words"}), y))
    assert len(changed) == 5 and first not in changed


def test_each_table_and_class_column_has_a_registered_model_of_its_own():
    """A model for another column must not take the place of this one in production."""
    name = production_deployment.registered_name
    assert name(None, "diagnosis") == "breast-cancer-classifier"
    assert name("data/Customers 2.csv", "churned") == "customers-2-churned-classifier"
    assert name("data/Customers 2.csv", "Plan B") == "customers-2-plan-b-classifier"


def test_what_is_no_search_of_these_rows_is_not_compared(main_job, tmp_path):
    """Another search, a comparison and a run that does not exist; nothing is logged of it."""
    store(main_job[0])
    (search, *_), (comparison, *_) = map(parents, ("hyperparameter-tuning", "model-comparison"))
    before = len(parents("model-comparison"))
    write_table(tmp_path / "table.csv", ROWS)
    own = ("--csv", str(tmp_path / "table.csv"), "--target", "y")
    for args in ((search.info.run_id, *own), (comparison.info.run_id,)):
        with pytest.raises(model_comparison.UserError, match=f"{args[0]} is not a finished search"):
            model_comparison.main(["--tuned", *args])
    assert_one_line(run(SCRIPTS[1], "--tuned", "0" * 32, cwd=main_job[0]), "0" * 32)
    assert len(parents("model-comparison")) == before


def test_the_support_vector_machine_scales_to_many_rows(capsys):
    """Above 10,000 rows an approximation takes the place of the SVC, said in one line."""
    assert isinstance(model_comparison.make_candidates(10_000, 0)["svm"], SVC)
    assert capsys.readouterr().out == ""
    svm = model_comparison.make_candidates(10_001, 0)["svm"]
    assert isinstance(svm, Pipeline) and "linearsvc__C" in svm.get_params()
    assert "svm: LinearSVC on a Nystroem approximation" in capsys.readouterr().out
    X = pd.DataFrame(np.random.default_rng(0).normal(size=(10_001, 3)), columns=list("abc"))
    y = (X["a"] * X["b"] > 0).astype(str).rename("y")
    rows = model_comparison.make_rows(X, y, "many")
    folds = model_comparison.make_folds(rows, 5, 30, 0)
    assert len(folds) == 2 * 5
    model = model_comparison.add_preprocessing(svm, X)
    scores = model_comparison.score_folds(model, X, y, folds[:2], model_comparison.METRICS)
    assert scores["accuracy"].mean() > 0.95


def test_the_ci_recipe_goes_by_exit_codes(tmp_path):
    (recipe,) = re.findall(r"^set -euo pipefail.*?^exit \$status$", README, re.M | re.S)
    edited(tmp_path, SCRIPTS[1], REPEATS=2, make_candidates=FEW)

    def job():
        return shell(recipe, tmp_path)

    shutil.copy(ROOT / SCRIPTS[2], tmp_path)
    process = job()
    assert_success(process)
    assert "is in production." in process.stdout
    floor = "MetricThreshold(threshold=0.999, greater_is_better=True)"
    edited(tmp_path, SCRIPTS[2], GATE=Code(f'{{"score": {floor}}}'))
    process = job()
    assert_one_line(process, "version 2 misses a limit", code=1)
    assert "Refused, or an unexpected error" in process.stdout
    client = store(tmp_path)
    production = client.get_model_version_by_alias("breast-cancer-classifier", "production")
    assert str(production.version) == "1"
    (tmp_path / SCRIPTS[1]).write_text("raise SystemExit(2)")
    assert job().returncode == 2
    assert len(parents("production-deployment")) == 2
