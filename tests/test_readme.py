"""The README: its commands, its code blocks as they stand, the output that it shows, its tables."""

import ast
import builtins
import dis
import re
import shutil
import socket
import subprocess
import time

import mlflow
import pytest
from conftest import (
    ROOT,
    SCRIPTS,
    TWO_CANDIDATES,
    children,
    edited,
    parents,
    run,
    store,
    user_env,
)

import production_deployment

TEXT = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))


def blocks(language, text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def block_with(words, language="python"):
    (block,) = [block for block in blocks(language) if words in block]
    return block


def run_block(block, folder, *args):
    """Run a block beside the scripts, as a file of its own, and return the finished process."""
    for script in SCRIPTS:
        if not (folder / script).exists():
            shutil.copy(ROOT / script, folder)
    (folder / "block.py").write_text(block)
    process = run(folder / "block.py", *args, cwd=folder)
    assert process.returncode == 0, process.stderr
    return process


def test_the_first_command_sets_up_and_runs_the_main_job():
    """The last three steps are what `main_job` runs; `.ci/run` takes the same first two."""
    set_up = ["python3 -m venv .venv", ".venv/bin/pip install -q -r requirements.txt"]
    steps = blocks("bash")[0].strip().split(" && ")
    assert steps == [*set_up, *(f".venv/bin/python {script}" for script in SCRIPTS)]


def test_the_second_command_is_the_one_that_ci_runs():
    command = blocks("bash")[1].strip()
    assert command.endswith("pytest tests")
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -m 1 '(.*)' README.md", script).group(1)
    assert next(line for line in TEXT.splitlines() if pattern in line) == command


def shapes(text):
    """Return the lines with their numbers and ids masked: what must not have changed."""
    text = re.sub(r"\b[0-9a-f]{32}\b|\d+(\.\d+)?(e-\d+)?", "0", text)
    return {re.sub(r"\s+", " ", line.strip()) for line in text.splitlines()}


def test_the_output_shown_is_what_the_scripts_print(main_job):
    printed = set().union(*(shapes(process.stdout) for process in main_job[1]))
    shown = [block for block in blocks("text") if "crontab" not in block and "* *" not in block]
    assert len(shown) == 3
    for block in shown:
        assert shapes(block) - {"", "…"} <= printed


def test_the_search_in_a_nutshell_prints_the_best_trial(tmp_path):
    last = run_block(block_with('run_name="search"'), tmp_path).stdout.split("\n")[-2]
    store(tmp_path)
    (search,) = parents("nutshell")
    trials = children(search).values()
    best = max(trials, key=lambda trial: trial.data.metrics["cv_accuracy"]).data
    assert len(trials) == 6
    assert last.split()[:2] == [best.params["max_depth"], best.params["max_features"]]


def test_the_comparison_in_a_nutshell_predicts_with_the_best_model(tmp_path):
    process = run_block(block_with('run_name="comparison"'), tmp_path)
    assert set(re.findall(r"\d", process.stdout)) <= {"0", "1"}


def test_the_deployment_in_a_nutshell_moves_both_aliases(tmp_path):
    run_block(block_with('run_name="deployment"'), tmp_path)
    store(tmp_path)
    aliases = mlflow.MlflowClient().get_registered_model("nutshell").aliases
    assert {alias: str(number) for alias, number in aliases.items()} == {
        "staging": "1",
        "production": "1",
    }


def test_the_bayesian_search_logs_its_trials(folder):
    block = block_with("optuna").replace("20, 300", "2, 20").replace("range(5)", "range(2)")
    last = run_block(block, folder).stdout.split("\n")[-2]
    store(folder)
    (search,) = parents("hyperparameter-tuning")
    scores = [trial.data.metrics["cv_accuracy"] for trial in children(search).values()]
    assert len(scores) == 8 and last.split()[-1] == str(max(scores))


def test_a_live_model_follows_its_alias(main_job, tmp_path):
    shutil.copy(main_job[0] / "mlflow.db", tmp_path)
    block = block_with("class LiveModel").replace("seconds=5.0", "seconds=0.1")
    block += """
client = mlflow.MlflowClient()
client.set_registered_model_alias(model.name, "production", 3 - int(model.version))
time.sleep(3)
print(model.version)
"""
    first, last = re.findall(r"^\d", run_block(block, tmp_path).stdout, re.M)
    assert (first, last) == ("2", "1")


def test_a_search_on_dask_workers(folder):
    """The commands of the README on a free port, with a smaller grid."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    edited(folder, SCRIPTS[0], PARAM_GRID={"max_depth": [1, 3], "n_estimators": [5]})
    (commands,) = [block for block in blocks("bash") if "dask scheduler" in block]
    started = [
        subprocess.Popen(
            command.replace("8786", port).split(),
            cwd=folder,
            env=user_env(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for command in commands.splitlines()
    ]
    try:
        time.sleep(5)
        block = (
            block_with("parallel_config").replace("8786", port).replace("timeout=5", "timeout=30")
        )
        run_block(block, folder)
    finally:
        for process in started:
            process.terminate()
            process.wait(timeout=30)
    store(folder)
    (search,) = parents("hyperparameter-tuning")
    assert {child.info.status for child in children(search).values()} == {"FINISHED"}


RECIPES = ("LGBMClassifier", "def mean_cost", "load_diabetes", "KNeighborsClassifier")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_at_most_25_lines(recipe):
    assert len([line for line in block_with(recipe).splitlines() if line]) <= 25


def test_another_model_is_compared_and_deployed(folder):
    try:
        import lightgbm  # noqa: F401
    except OSError as error:
        pytest.skip(f"LightGBM cannot be used here: {error}")
    edited(folder, SCRIPTS[1], **TWO_CANDIDATES)
    block = block_with("LGBMClassifier")
    compared = run_block(block, folder, "compare")
    assert re.search(r"^ +lightgbm ", compared.stdout, re.M)
    store(folder)
    (comparison,) = parents("model-comparison")
    run_id = children(comparison)["lightgbm"].info.run_id
    run_block(block, folder, "deploy", "--model-uri", f"runs:/{run_id}/model")
    version = mlflow.MlflowClient().get_model_version_by_alias(
        "breast-cancer-classifier", "production"
    )
    assert version.run_id == run_id
    with pytest.raises(production_deployment.UserError, match="could run code"):
        production_deployment.main(["--model-uri", f"runs:/{run_id}/model", "--name", "other"])


def test_another_metric_decides_in_all_three(folder):
    """A missed cancer costs ten times a false alarm; of costs, the scripts take the negative."""
    edited(folder, SCRIPTS[0], PARAM_GRID={"max_depth": [1, 9], "n_estimators": [5]})
    edited(folder, SCRIPTS[1], **TWO_CANDIDATES)
    *_, last = block_with("def mean_cost").splitlines()
    assert last == '    scripts[command].main(["--metric", "cost", *options])'
    commands = ("tune", "compare", "deploy")  # one after the other, to import everything once
    indented = f"    for sys.argv[1] in {commands}:\n        command = sys.argv[1]\n    {last}\n"
    run_block(block_with("def mean_cost").replace(last, indented), folder, "tune")
    store(folder)
    (search,) = parents("hyperparameter-tuning")
    costs = {name: trial.data.metrics["cv_cost"] for name, trial in children(search).items()}
    assert search.data.tags["best_trial"] == max(costs, key=costs.get)
    assert max(costs.values()) < 0
    (comparison,) = parents("model-comparison")
    candidates = children(comparison)
    costs = {name: candidate.data.metrics["cv_cost"] for name, candidate in candidates.items()}
    assert comparison.data.tags["best_model"] == max(costs, key=costs.get) != "baseline"
    (deployment,) = parents("production-deployment")
    hold_out = candidates["logistic_regression"].data.metrics["test_cost"]
    assert deployment.data.metrics["score"] == pytest.approx(hold_out)


def test_regression_in_units_of_the_target(folder):
    printed = run_block(block_with("load_diabetes"), folder).stdout
    store(folder)
    (one,) = parents("regression")
    metrics = one.data.metrics
    assert metrics["p_worse"] + metrics["p_equivalent"] + metrics["p_better"] == pytest.approx(1)
    # The mean error of the baseline is about 66; that of the forest about 48.
    assert -50 < metrics["score"] < -45 and 15 < metrics["above_baseline"] < 25
    assert (metrics["p_worse_than_production"] > 0.96) == ("p_worse_than_production v" in printed)


def test_groups_must_be_told_or_the_score_is_far_too_good(tmp_path):
    printed = run_block(block_with("KNeighborsClassifier"), tmp_path).stdout
    by_row, by_customer = [float(line.split()[-1]) for line in printed.splitlines()]
    assert by_row > 0.9 and by_customer < 0.65  # what a customer does is random


def documented(section):
    """Return the keys that a section lists: what stands in backticks in the first column."""
    rows = re.findall(r"^\| (`.*?) \|", SECTIONS[section], re.M)
    return {key for row in rows for key in re.findall(r"`([\w.…]+)`", row)}


def logged(runs):
    """Return the keys of all that the runs hold, MLflow's own tags and the models aside."""
    keys = set()
    for one in runs:
        keys |= one.data.params.keys() | one.data.metrics.keys()
        keys |= {key for key in one.data.tags if not key.startswith("mlflow.")}
        files = mlflow.artifacts.list_artifacts(run_id=one.info.run_id)
        keys |= {file.path for file in files if file.path != "model"}
    return keys


def test_every_logged_key_is_listed(main_job):
    client = store(main_job[0])
    (search,), (comparison,) = map(parents, ("hyperparameter-tuning", "model-comparison"))
    keys = logged([search, *children(search).values()])
    assert documented("Hyperparameter tuning") == keys | {"error"}

    candidates = children(comparison).values()
    params = set().union(*(candidate.data.params for candidate in candidates))
    keys = logged([comparison]) | (logged(candidates) - params) | {"candidate", "comparison"}
    keys = {re.sub("^(cv|test)_.*", r"\1_…", key) for key in keys}
    assert documented("Model comparison") == keys

    keys = logged(parents("production-deployment"))
    for version in client.search_model_versions("name = 'breast-cancer-classifier'"):
        keys |= version.tags.keys()
    for key in keys:
        assert f"`{key}`" in SECTIONS["Production deployment"], key


def test_every_option_is_listed():
    for script in SCRIPTS:
        for option in re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text()):
            assert re.search(rf"[` ]{option}\b", TEXT), (script, option)


def test_the_limits_of_the_gate_are_those_of_the_script():
    for name, limit in production_deployment.GATE.items():
        side = "least" if limit.greater_is_better else "most"
        assert f"| `{name}` | at {side} {limit.threshold:g} |" in TEXT


def test_the_links_to_files_lead_somewhere():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (ROOT / path).exists(), path


TABLE = re.findall(
    r"^\| .*? \| (`.*?`) \| ([a-z, ]+) \| (.*?) ?\|$", SECTIONS["Make it yours"], re.M
)
FILES = dict(zip(("tuning", "comparison", "deployment"), SCRIPTS, strict=True))


def definitions(script):
    """Return {name: source} of the definitions and settings at the top level of a script."""
    text = (ROOT / script).read_text()
    found = {}
    for node in ast.parse(text).body:
        name = getattr(node, "name", None)
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
        if name:
            found[name] = ast.get_source_segment(text, node)
    return found


def imports(script):
    """Return a namespace with what a script imports, and nothing else."""
    nodes = ast.parse((ROOT / script).read_text()).body
    lines = [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    namespace = {}
    exec("\n".join(lines), namespace)
    return namespace


def globals_of(code):
    """Return the global names that a code object and those inside it look up."""
    names = {
        i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    inner = [constant for constant in code.co_consts if hasattr(constant, "co_code")]
    return names.union(*map(globals_of, inner))


@pytest.mark.parametrize(("names", "where", "companions"), TABLE)
def test_a_function_to_copy_needs_only_what_the_table_says(names, where, companions):
    """Pasted with the script's imports and its companions, no name in it is missing."""
    wheres = FILES if where == "each" else where.split(", ")
    for script in [FILES[name] for name in wheres]:
        sources = definitions(script)
        pasted = re.findall(r"`(\w+)`", names + companions)
        namespace = imports(script)
        for name in pasted:
            exec(sources[name], namespace)
        for name in pasted:
            code = getattr(namespace[name], "__code__", None)
            missing = globals_of(code) - namespace.keys() - set(dir(builtins)) if code else set()
            assert not missing, (script, name, missing)
