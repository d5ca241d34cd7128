"""The README: its commands, its code blocks as they stand, the output that it shows, its keys."""

import json
import os
import re
import shutil
import subprocess
import sys

import mlflow
import pytest
from conftest import (
    ROOT,
    SCRIPTS,
    assert_success,
    children,
    edited,
    parents,
    run,
    store,
    user_env,
)

TEXT = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))


def blocks(language, text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


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
    """Return the lines with their numbers, ids and paths masked: what must not have changed."""
    text = re.sub(r"sqlite:///\S+", "STORE", text)
    text = re.sub(r"trial-\d+|\b[0-9a-f]{32}\b|\d+(\.\d+)?", "0", text)
    return {re.sub(r"\W*\s+\W*", " ", line.strip()) for line in text.splitlines()}


def test_the_output_shown_is_what_the_scripts_print(main_job):
    printed = set().union(*(shapes(p.stdout) for processes in main_job[1] for p in processes))
    shown = blocks("text")
    assert len(shown) == 3
    for block in shown:
        assert shapes(block) - {"", "…"} <= printed


# But for those that test_tuning.py runs: with a Dask cluster, and after a search; and the one that
# builds an environment, which takes minutes.
ELSEWHERE = r'parallel_config|near = |env_manager="uv"'
ALONE = [n for n, block in enumerate(blocks("python")) if not re.search(ELSEWHERE, block)]


@pytest.mark.parametrize("number", ALONE)
def test_the_python_blocks_run_as_they_stand(number, main_job, tmp_path):
    block = blocks("python")[number]
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    if "LiveModel" in block:
        shutil.copy(main_job[0] / "mlflow.db", tmp_path)  # with a version in production
    if "set_terminated" in block:
        client = store(tmp_path)
        dead = client.create_run("0", start_time=1).info.run_id
        alive = client.create_run("0").info.run_id
    (tmp_path / "block.py").write_text(block)
    process = subprocess.run(
        [sys.executable, "block.py"], cwd=tmp_path, env=user_env(), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    last = process.stdout.split("\n")[-2]
    store(tmp_path)
    if "optuna" in block:
        (search,) = parents("hyperparameter-tuning")
        scores = [t.data.metrics["cv_accuracy"] for t in children(search).values()]
        assert len(scores) == 20 and last.split()[-1] == str(max(scores))
        assert search.info.status == "FINISHED"
    if 'run_name="search"' in block:
        (search,) = parents("nutshell")
        trials = children(search).values()
        best = max(trials, key=lambda trial: trial.data.metrics["cv_accuracy"]).data
        assert len(trials) == 6
        assert last.split()[:2] == [best.params["max_depth"], best.params["max_features"]]
    if 'run_name="deployment"' in block:
        aliases = mlflow.MlflowClient().get_registered_model("nutshell").aliases
        assert {alias: str(number) for alias, number in aliases.items()} == {
            "staging": "1",
            "production": "1",
        }
    if "set_terminated" in block:
        states = [client.get_run(run_id).info.status for run_id in (dead, alive)]
        assert (last, states) == ("1", ["KILLED", "RUNNING"])
    if "set_terminated" in block:
        states = [client.get_run(run_id).info.status for run_id in (dead, alive)]
        assert (last, states) == ("1", ["KILLED", "RUNNING"])
    if 'run_name="' in block:
        assert process.stderr.count("Traceback") == 0


def index_for_uv():
    """Return the settings of uv that name the index which pip has, or None if there is no index."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    index = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    settings = {"UV_DEFAULT_INDEX": index} if index else {}
    settings["SSL_CERT_FILE"] = os.environ.get("PIP_CERT", "")
    command = ["uv", "pip", "compile", "-", "--quiet"]
    env = user_env(**{name: value for name, value in settings.items() if value})
    if shutil.which("uv", path=env["PATH"]) is None:
        return None
    tried = subprocess.run(command, env=env, input="skops", text=True, capture_output=True)
    return env if tried.returncode == 0 else None


def test_the_model_answers_in_the_environment_that_a_server_builds(main_job, tmp_path):
    """It installs the model's requirements, which takes a minute."""
    env = index_for_uv()
    if env is None:
        pytest.skip("no uv here, or no index for it")
    if " " in sys.prefix:
        pytest.skip("MLflow cannot do that in an environment whose path has a space")
    (block,) = [block for block in blocks("python") if 'env_manager="uv"' in block]
    shutil.copy(main_job[0] / "mlflow.db", tmp_path)
    (tmp_path / "block.py").write_text(block)
    process = subprocess.run(
        [sys.executable, "block.py"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())["predictions"]
    store(tmp_path)
    model = mlflow.pyfunc.load_model("models:/breast-cancer-classifier@production")
    assert answers == list(model.predict(model.input_example))


def test_memory_and_cpu_are_logged_to_the_search(tmp_path):
    """The setting of the README, and another one that asks every second."""
    (block,) = [block for block in blocks("bash") if "SYSTEM_METRICS" in block]
    setting, *command = block.splitlines()[1].split()
    assert command == ["python", SCRIPTS[0]]
    script = edited(tmp_path, SCRIPTS[0], PARAM_GRID={"n_estimators": [50, 100, 150]})
    env = dict([setting.split("=")], MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL="1")
    process = run(script, cwd=tmp_path, **env)
    assert_success(process)
    store(tmp_path)
    (search,) = parents("hyperparameter-tuning")
    assert 0 < search.data.metrics["system/system_memory_usage_percentage"] < 100
    assert "system/cpu_utilization_percentage" in search.data.metrics


def documented(section):
    """Return the keys that a section lists: what stands in backticks in the first column."""
    rows = re.findall(r"^\| (`.*?) \|", SECTIONS[section], re.M)
    return {key for row in rows for key in re.findall(r"`([\w.]+)`", row)}


def logged(runs):
    """Return the keys of all that the runs hold, MLflow's own tags and the models aside."""
    keys = set()
    for one in runs:
        keys |= one.data.params.keys() | one.data.metrics.keys()
        keys |= {key for key in one.data.tags if not key.startswith("mlflow.")}
        files = mlflow.artifacts.list_artifacts(run_id=one.info.run_id)
        keys |= {file.path for file in files if file.path != "model"}
    return keys


# Not in every session: of failures, edges, and of the moment in which aliases move.
SOMETIMES = {"error", "resumed_at", "promoting"}
SOMETIMES |= {"edge_max_depth", "edge_max_features", "edge_n_estimators"}


def test_every_logged_key_is_listed_and_nothing_else(main_job):
    client = store(main_job[0])
    (search, *_), (comparison, *_) = map(parents, ("hyperparameter-tuning", "model-comparison"))
    keys = logged([search, *children(search).values()])
    assert documented("Hyperparameter tuning") - SOMETIMES == keys - SOMETIMES

    candidates = children(comparison).values()
    params = set().union(*(candidate.data.params for candidate in candidates))
    model = mlflow.get_logged_model(next(iter(candidates)).outputs.model_outputs[0].model_id)
    keys = logged([comparison]) | (logged(candidates) - params) | {"candidate", "comparison"}
    assert documented("Model comparison") - SOMETIMES == keys
    assert {"candidate", "comparison"} <= model.tags.keys()

    keys = logged(parents("production-deployment"))
    for version in client.search_model_versions("name = 'breast-cancer-classifier'"):
        keys |= version.tags.keys()
    options = {"URI", "FLOAT", "VERSION"}
    assert documented("Production deployment") - SOMETIMES - options == keys - SOMETIMES


def test_the_links_to_files_lead_somewhere():
    anchors = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", TEXT, re.M)}
    for path in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert path.removeprefix("#") in anchors if path[0] == "#" else (ROOT / path).exists(), path


def test_every_function_to_copy_is_in_the_script_that_is_named():
    script = dict(zip(("tuning", "comparison", "deployment"), SCRIPTS, strict=True))
    table = re.findall(r"^\| .*? \| (`.*?`.*?) \| (\w+) \|$", SECTIONS["Functions to copy"], re.M)
    assert len(table) >= 15
    for names, where in table:
        texts = [(ROOT / script[where]).read_text()] if where != "each" else []
        texts = texts or [(ROOT / name).read_text() for name in SCRIPTS]
        for name in re.findall(r"`(\w+)`", names):
            for text in texts:
                assert re.search(rf"^(def {name}\(|{name} = )", text, re.M), name
