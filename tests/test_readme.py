"""The README: its commands, its code blocks as they stand, and the output that it shows."""

import re
import shutil
import subprocess
import sys

import mlflow
import pytest
from conftest import ROOT, SCRIPTS, assert_success, children, parents, store, user_env

TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


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
    text = re.sub(r"\b[0-9a-f]{32}\b|\d+(\.\d+)?", "0", text)
    return {re.sub(r"\W*\s+\W*", " ", line.strip()) for line in text.splitlines()}


def test_the_output_shown_is_what_the_scripts_print(main_job):
    printed = set().union(*(shapes(p.stdout) for processes in main_job[1] for p in processes))
    shown = blocks("text")
    assert len(shown) >= 3
    for block in shown:
        assert shapes(block) - {"", "…"} <= printed


# But for those that test_tuning.py runs: with a Dask cluster, and after a search.
ALONE = [n for n, b in enumerate(blocks("python")) if not re.search("parallel_config|near = ", b)]


@pytest.mark.parametrize("number", ALONE)
def test_the_python_blocks_run_as_they_stand(number, main_job, tmp_path):
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    if "LiveModel" in blocks("python")[number]:
        shutil.copy(main_job[0] / "mlflow.db", tmp_path)  # with a version in production
    (tmp_path / "block.py").write_text(blocks("python")[number])
    process = subprocess.run(
        [sys.executable, "block.py"], cwd=tmp_path, env=user_env(), capture_output=True, text=True
    )
    assert_success(process)
    if "optuna" in blocks("python")[number]:
        store(tmp_path)
        (search,) = parents("hyperparameter-tuning")
        scores = [t.data.metrics["cv_accuracy"] for t in children(search).values()]
        assert len(scores) == 20 and process.stdout.split()[-1] == str(max(scores))
        assert mlflow.get_run(search.info.run_id).info.status == "FINISHED"


def test_the_links_to_files_lead_somewhere():
    anchors = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", TEXT, re.M)}
    for path in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert path.removeprefix("#") in anchors if path[0] == "#" else (ROOT / path).exists(), path
