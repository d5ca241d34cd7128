"""One's own table: who is held out, what may stand in it, and what is refused in one line."""

import json
import os
import re
import shlex
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
    TWO_CANDIDATES,
    assert_one_line,
    assert_success,
    children,
    edited,
    parents,
    run,
    store,
    user_env,
)
from mlflow.pyfunc import scoring_server
from sklearn.linear_model import LogisticRegression

import hyperparameter_tuning
import model_comparison
import production_deployment

MODULES = [hyperparameter_tuning, model_comparison, production_deployment]
TARGET = "verlässt uns"


def mixed_table(n_rows=300):
    """Return rows of what tables hold: numbers and text with gaps, dates, yes and no, odd names.

    Text that is missing says the most about the class.
    """
    rng = np.random.default_rng(0)
    leaves = rng.random(n_rows) < 0.4
    color = np.array(["rot", "grün"], dtype=object)[rng.integers(0, 2, n_rows)]
    table = pd.DataFrame(
        {
            "größe in cm": leaves + rng.normal(0, 2, n_rows),
            "count": rng.integers(0, 1000, n_rows),
            "color": np.where(leaves & (rng.random(n_rows) < 0.9), None, color),
            "since": pd.date_range("2026-01-01", periods=n_rows).strftime("%Y-%m-%d"),
            "active": np.array([True, False, None], dtype=object)[rng.integers(0, 3, n_rows)],
            "empty": np.nan,
            TARGET: np.where(leaves, "ja, bald", "nein"),
        }
    )
    table.loc[::9, "größe in cm"] = np.nan
    table.loc[::50, TARGET] = np.nan
    return table


def load(table, path, target=TARGET, id_column=None, module=model_comparison):
    """Write a table to a file, and load it as a script does: training rows and hold-out rows."""
    table.to_csv(path, index=False)
    return module.load_data(path, target, id_column, 0.2)


# ---- Who is held out


def test_a_growing_table_moves_no_row_between_training_and_hold_out(tmp_path):
    """More rows, another order, corrected classes, and whole numbers that become fractions."""
    table = mixed_table(600)
    grown = table.assign(count=table["count"].astype(float))
    grown.loc[300:, "count"] += 0.5
    grown.loc[400:410, "count"] = np.nan
    grown[TARGET] = np.roll(table[TARGET].fillna("nein"), 1)
    for module in MODULES:
        before = load(table[:300], tmp_path / "june.csv", module=module)
        after = load(grown.iloc[::-1], tmp_path / "july.csv", module=module)
        for old, new in zip(before, after, strict=True):
            assert len(old.X) > 40 and set(old.X["since"]) <= set(new.X["since"])
        assert 0.15 < len(after[1].X) / 600 < 0.25


def test_the_share_is_that_of_the_argument():
    groups = pd.util.hash_pandas_object(pd.Series(np.arange(20_000.0)), index=False)
    for share in (0.1, 0.2, 0.5):
        assert model_comparison.is_held_out(groups, share).mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("id_column", [None, "count"])
def test_all_three_scripts_hold_out_the_same_rows(tmp_path, id_column):
    loaded = [load(mixed_table(), tmp_path / "t.csv", TARGET, id_column, m) for m in MODULES]
    for part in zip(*loaded, strict=True):
        assert len({rows.dataset.digest for rows in part}) == 1
        assert len({rows.rule for rows in part}) == 1


@pytest.mark.parametrize("module", MODULES[:2])
@pytest.mark.parametrize("as_text", [False, True])
def test_rows_of_one_customer_stay_together(tmp_path, module, as_text):
    """In the split and in the folds; the ID is no feature, and the other columns do not matter."""
    rng = np.random.default_rng(0)
    number = rng.integers(0, 150, 600)
    who = [f"K-{n}" for n in number] if as_text else number
    table = pd.DataFrame({"who": who, "x": rng.normal(size=600), "y": number % 3 == 0})
    train, test = load(table, tmp_path / "t.csv", "y", "who", module)
    assert list(train.X) == ["x"] and "who" in train.rule
    trained = {who[row] for row in train.X.index}
    assert trained.isdisjoint(who[row] for row in test.X.index)
    folds = module.make_folds(train.y, train.groups, 5, 42)
    assert len(folds) == 5
    for fitted, scored in folds:
        rows = [{who[row] for row in train.X.index[part]} for part in (fitted, scored)]
        assert rows[0].isdisjoint(rows[1]) and rows[0] | rows[1] == trained
        assert set(train.y.iloc[scored]) == {"True", "False"}
    # Another month: other features, and a row without an ID, which makes fractions of numbers.
    table.loc[0, "who"] = None
    later, _ = load(table.assign(x=1), tmp_path / "t.csv", "y", "who", module)
    assert {who[row] for row in later.X.index} == {who[row] for row in train.X.index if row != 0}


def test_equal_rows_stay_together_and_folds_keep_the_shares_of_the_classes(tmp_path):
    table = mixed_table().dropna(subset=[TARGET])
    twice, test = load(pd.concat([table, table[:100]]), tmp_path / "t.csv")
    assert set(twice.X["since"]).isdisjoint(test.X["since"])
    once, _ = load(table, tmp_path / "t.csv")
    share = (once.y == "nein").mean()
    for train in (once, twice):
        for fitted, scored in model_comparison.make_folds(train.y, train.groups, 5, 42):
            dates = train.X["since"].to_numpy()
            assert set(dates[fitted]).isdisjoint(dates[scored])
            off = (train.y.iloc[scored] == "nein").sum() - share * len(scored)
            assert abs(off) < (1 if train is once else 15)  # rows; groups are harder to deal out


# ---- What may stand in it


@pytest.mark.parametrize(
    ("column", "classes"),
    [
        ([1, 0], {"1", "0"}),
        ([1, None, 0], {"1", "0"}),
        ([1.0, 0.0], {"1", "0"}),
        ([0.5, 1.5, None], {"0.5", "1.5"}),
        ([True, False], {"True", "False"}),
        ([True, None, False], {"True", "False"}),
        (["so so", "ü, no"], {"so so", "ü, no"}),
        (["2", "x", None], {"2", "x"}),
    ],
)
def test_classes_are_named_as_in_the_file(tmp_path, capsys, column, classes):
    """And rows without a class are counted, and left out."""
    table = pd.DataFrame({"x": np.arange(120.0), "y": pd.Series(column * 60)[:120]})
    train, test = load(table, tmp_path / "Some Table.csv", "y")
    assert set(train.y) == set(test.y) == classes
    known = table["y"].notna().sum()
    assert len(train.y) + len(test.y) == known
    assert f"{known} of 120 rows" in capsys.readouterr().out


def test_a_gap_in_a_request_is_the_gap_of_a_table(folder):
    """The model that is served takes raw rows: null, NaN, and text that it has never seen."""
    store(folder)
    mlflow.set_experiment("requests")
    train, test = load(mixed_table(), folder / "t.csv")
    model = model_comparison.add_preprocessing(LogisticRegression()).fit(train.X, train.y)
    with mlflow.start_run():
        logged = model_comparison.log_model(model, train.X, train.rule)
    served = mlflow.pyfunc.load_model(logged.model_uri)
    rows = test.X.assign(since="tomorrow")
    expected = list(model.predict(rows))
    assert rows["color"].isna().any() and list(served.predict(rows)) == expected
    missing = rows["color"].isna() & (rows["größe in cm"].abs() < 2)
    assert set(model.predict(rows[missing])) == {"ja, bald"}

    def ask(rows):
        body = f'{{"dataframe_split": {rows.to_json(orient="split", index=False)}}}'
        schema = served.metadata.get_input_schema()
        answer = scoring_server.invocations(body, "application/json", served, schema)
        return json.loads(answer.response)["predictions"]

    assert "null" in rows.to_json() and ask(rows) == expected
    alone = rows[missing].head(1)  # a request of one row, which has no text in this column
    assert ask(alone) == ["ja, bald"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory, new_store):
    """The search, and what it and the comparison print as the next command, run by a shell."""
    folder = tmp_path_factory.mktemp("own") / "a b é"
    folder.mkdir()
    shutil.copy(new_store, folder)
    table = mixed_table().assign(**{"Kunde Nr": np.arange(300) // 2})
    table.to_csv(folder / "Kunden 2026.csv", index=False)
    grid = {"max_depth": [2, 3], "n_estimators": [5]}
    edited(folder, SCRIPTS[0], PARAM_GRID=grid)
    edited(folder, SCRIPTS[1], **TWO_CANDIDATES)
    shutil.copy(ROOT / SCRIPTS[2], folder)
    options = ["--csv", "Kunden 2026.csv", "--target", TARGET, "--id", "Kunde Nr", "--metric", "f1"]
    command, processes = shlex.join(["python", str(folder / SCRIPTS[0]), *options]), []
    while command:
        how = {"cwd": folder, "env": user_env(LOKY_MAX_CPU_COUNT="1"), "timeout": 120}
        process = subprocess.run(
            ["bash", "-c", command], capture_output=True, encoding="utf-8", **how
        )
        processes.append((command, process))
        (command,) = re.findall("^Next: +(.*)$", process.stdout, re.M) or [None]
    return folder, processes


def test_the_printed_commands_lead_from_a_table_to_production(chain):
    """On the same rows, by the same metric; file, folder and column have spaces and letters."""
    folder, processes = chain
    assert len(processes) == 3
    for command, process in processes:
        assert_success(process)
        passed = ["--csv=Kunden 2026.csv", f"--target={TARGET}", "--id=Kunde Nr", "--metric=f1"]
        assert command == processes[0][0] or shlex.split(command)[-4:] == passed
    assert "Kunden 2026: 294 of 300 rows can be used" in processes[0][1].stdout
    client = store(folder)
    experiments = ("hyperparameter-tuning", "model-comparison", "production-deployment")
    (search,), (comparison,), (deployment,) = map(parents, experiments)
    data = [
        {d.dataset.name: d.dataset.digest for d in run.inputs.dataset_inputs}
        for run in (search, comparison, deployment)
    ]
    assert data[0] == data[1] == data[2] and len(data[0]) == 2
    candidates = children(comparison)
    assert set(candidates) == {"baseline", "logistic_regression", "tuned_forest"}
    best = children(search)[search.data.tags["best_trial"]].data.params
    assert best.items() <= candidates["tuned_forest"].data.params.items()
    recommended = candidates[comparison.data.tags["recommended_model"]]
    name = "kunden-2026-verl-sst-uns-classifier"
    version = client.get_model_version_by_alias(name, "production")
    assert version.run_id == recommended.info.run_id
    columns = mlflow.models.get_model_info(f"models:/{name}@production").signature.inputs
    assert columns.input_names() == list(mixed_table().drop(columns=TARGET))
    made = {"mlflow.db", "mlflow.db.lock", "mlruns", "Kunden 2026.csv", *SCRIPTS}
    assert set(os.listdir(folder)) == made and os.listdir(folder.parent) == [folder.name]


# ---- What is refused

ROWS = {"x": range(60), "y": ["a", "b"] * 30}
HASHES = pd.util.hash_pandas_object(pd.DataFrame({"x": np.arange(60.0)}), index=False)
UNUSABLE = {
    "missing file": (None, [], "No such file"),
    "empty file": ("", [], "No columns"),
    "no table": ("x,y\n1,a\n1,2,3,4\n", [], "Expected 2 fields in line 3"),
    "wrong encoding": ("x,y\nä,a\n".encode("latin-1"), [], "can't decode"),
    "unknown target": (ROWS, ["--target", "z"], "needs columns ['z'] and others"),
    "unknown ID": (ROWS, ["--id", "z"], "needs columns ['y', 'z'] and others"),
    "only a target": ({"y": ["a", "b"] * 30}, [], "needs columns ['y'] and others"),
    "only target and ID": (ROWS, ["--id", "x"], "needs columns ['y', 'x'] and others"),
    "infinite": (ROWS | {"z": [-np.inf, *range(59)]}, [], "infinite numbers"),
    "one class": (ROWS | {"y": "a"}, [], "2 or more classes"),
    "no class": (ROWS | {"y": [None] * 60}, [], "2 or more classes"),
    "target as ID": (ROWS, ["--id", "y"], "needs columns"),
    "rare class": (ROWS | {"y": ["a"] * 57 + ["b"] * 3}, [], "5 or more training rows"),
    "held-out class": (ROWS | {"y": np.where(HASHES % 1000 < 200, "a", "b")}, [], "{'a': 0, "),
    "a quantity": (ROWS | {"y": np.arange(60) % 40 / 4}, [], "40 numbers: too many for classes"),
    "tiny table": ({"x": [1, 2, 3], "y": ["a", "b", "a"]}, [], "--id"),
    "few distinct rows": (ROWS | {"x": 1}, [], "--id"),
}


def write(path, content):
    if isinstance(content, dict):
        pd.DataFrame(content).to_csv(path, index=False)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_table_that_cannot_be_used_is_refused_before_anything_is_stored(
    case, tmp_path, monkeypatch
):
    content, options, words = UNUSABLE[case]
    write(tmp_path / "t.csv", content)
    monkeypatch.chdir(tmp_path)
    for module in MODULES:
        with pytest.raises(module.UserError, match=re.escape(words)):
            module.main(["--csv", "t.csv", "--target", "y", *options])
    assert set(os.listdir(tmp_path)) <= {"t.csv"}


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    content, _, words = UNUSABLE["a quantity"]
    write(tmp_path / "t.csv", content)
    args = ("--csv", "t.csv", "--target", "y")
    assert_one_line(run(SCRIPTS[1], *args, cwd=tmp_path, timeout=SOON), words)
    assert os.listdir(tmp_path) == ["t.csv"]


def test_the_rows_of_an_id_stay_held_out_however_the_column_is_written(tmp_path):
    """Numbers in June; in July one of them is text, or missing, which makes fractions of all."""
    june = pd.DataFrame({"id": range(600), "x": range(600), "y": ["a", "b"] * 300})
    july = pd.concat([june.astype({"id": object}), june.tail(1).assign(id="K-1")])
    august = june.assign(id=june["id"].where(june["id"] != 599))
    september = pd.concat([august.astype({"id": object}), july.tail(1)])
    held_out = []
    for table in (june, july, august, september):
        _, test = load(table, tmp_path / "t.csv", "y", "id")
        held_out.append(set(test.X["x"]) - {599})
    assert held_out[1:] == held_out[:1] * 3
    padded = june.assign(id=june["id"].map("{:04}".format))
    later = pd.concat([padded, july.tail(1)])
    before, after = (load(table, tmp_path / "t.csv", "y", "id")[1] for table in (padded, later))
    assert set(before.X["x"]) - {599} == set(after.X["x"]) - {599}


def test_the_digest_of_the_rows_depends_on_values_classes_order_and_split(tmp_path):
    table = mixed_table().assign(who=np.arange(300) // 2)
    changed = [table, table.iloc[::-1], table.assign(count=table["count"] + 1)]
    changed += [
        table.assign(**{TARGET: np.roll(table[TARGET], 1)}),
        table.assign(who=table["count"]),
    ]
    digests = [load(t, tmp_path / "t.csv", TARGET, "who")[0].dataset.digest for t in changed]
    assert len(set(digests)) == len(changed)
    train, _ = load(table, tmp_path / "t.csv", TARGET, "who")
    assert train.dataset.digest == digests[0]
