"""From a notebook: main([...]) of each script, twice in one process, in a real Jupyter kernel."""

import re
import shlex

import nbformat
import pytest
from conftest import ROOT, children, parents, store, user_env
from nbclient import NotebookClient

SETUP = f"""
import logging, os, signal, sys, warnings
sys.path.insert(0, {str(ROOT)!r})
import hyperparameter_tuning as tuning
import mlflow
import model_comparison as comparison
import pandas as pd
import production_deployment as deployment

# The project that the notebook belongs to: its log, and what it does on Ctrl-C.
heard = []
class Listener(logging.Handler):
    def emit(self, record):
        heard.append(record.getMessage())
project = logging.getLogger("project")
project.setLevel(logging.INFO)
project.addHandler(Listener())
signals = [signal.SIGINT, signal.SIGTERM]

def state():
    return {{
        "handlers": [signal.getsignal(number) for number in signals],
        "levels": [logging.getLogger(name).level for name in ("", "project", "sklearn", "py4j")],
        "muted": (logging.root.manager.disable, project.disabled),
        "root": list(logging.root.handlers),
        # MLflow 3.11 brings an OpenTelemetry that adds a filter of its own.
        "warnings": [one for one in warnings.filters if "opentelemetry" not in str(one)],
        "folder": os.getcwd(),
        "streams": (sys.stdout, sys.stdout.errors, sys.stderr, sys.stderr.errors),
    }}

def check():
    assert mlflow.active_run() is None
    changed = {{key for key, value in state().items() if value != before[key]}}
    assert not changed, (changed, [f for f in warnings.filters if f not in before["warnings"]])
    heard.clear()
    project.info("heard")
    assert heard == ["heard"]

pd.DataFrame({{"x": range(60), "y": ["a", "b"] * 30}}).to_csv("own.csv", index=False)
before = state()
"""

TUNING = """
tuning.PARAM_GRID = {"n_estimators": [3, 6], "max_depth": [1, 3]}
tuning.main([])
check()
tuning.PARAM_GRID = {"max_depth": [2]}
tuning.FOLDS = 3
tuning.main(["--csv", "own.csv", "--target", "y", "--metric", "balanced_accuracy"])
check()
try:
    tuning.main(["--resume", "0" * 32])
except mlflow.MlflowException:
    check()
tuning.PARAM_GRID = {"max_depth": [-1]}
try:
    tuning.main([])
except tuning.Refused as refused:
    print("Refused:", refused)
check()
"""

COMPARISON = """
few = lambda n_rows, seed: {"tree": comparison.RandomForestClassifier(3, random_state=seed),
                            "line": comparison.LogisticRegression(max_iter=1000)}
comparison.make_candidates, comparison.REPEATS = few, 2
(search,) = mlflow.search_runs(experiment_names=[tuning.EXPERIMENT], output_format="list",
    filter_string="attributes.run_name = 'grid-search' AND params.metric = 'accuracy'"
    " AND attributes.status = 'FINISHED'")
comparison.main(["--tuned", search.info.run_id])
check()
try:
    comparison.main(["--csv", "own.csv", "--target", "y", "--metric", "recall"])
except comparison.Refused as refused:
    print("Refused:", refused)
check()
"""

DEPLOYMENT = """
deployment.main([])
check()
deployment.main([])
check()
try:
    deployment.main(["--min-score", "1"])
except deployment.Refused as refused:
    print("Refused:", refused)
check()
deployment.main(["--rollback"])
check()
try:
    deployment.main(["--model-uri", "models:/m-0"])
except deployment.UserError:
    check()
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """The folder of a notebook that has been run, and what each of its cells has printed."""
    folder = tmp_path_factory.mktemp("notebook")
    cells = [nbformat.v4.new_code_cell(code) for code in (SETUP, TUNING, COMPARISON, DEPLOYMENT)]
    client = NotebookClient(
        nbformat.v4.new_notebook(cells=cells),
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=user_env())  # a cell that raises, as by a failed check, raises here
    return folder, [
        {
            stream: "".join(out.text for out in cell.outputs if out.get("name") == stream)
            for stream in ("stdout", "stderr")
        }
        for cell in cells
    ]


def test_the_notebook_runs_and_its_process_stays_as_it_was(notebook):
    """No run is active, no log muted, no signal handler changed: `check` looks after each call."""
    _, (_, *printed) = notebook  # the first cell imports; tqdm says there what Jupyter lacks
    assert [cell["stderr"] for cell in printed] == [""] * 3


def test_two_searches_in_one_process_are_as_two_programs(notebook):
    folder, (_, printed, _, _) = notebook
    store(folder)
    first, second, refused = parents("hyperparameter-tuning")
    assert len(children(first)) == 4 and first.data.params["metric"] == "accuracy"
    assert len(children(second)) == 1 and second.data.params["metric"] == "balanced_accuracy"
    assert second.data.params["folds"].startswith("3,")
    assert "cv_balanced_accuracy" in children(second)["trial-0001"].data.metrics
    states = [run.info.status for run in (first, second, refused)]
    assert states == ["FINISHED", "FINISHED", "FAILED"]
    assert "Refused: all 1 trials failed" in printed["stdout"]
    assert printed["stdout"].count("Best parameters") == 2
    # What started this process is a file of Jupyter's, with no script beside it.
    commands = re.findall("^Next: +(.*)$", printed["stdout"], re.M)
    assert {shlex.split(command)[1] for command in commands} == {"model_comparison.py"}


def test_two_comparisons_in_one_process_are_as_two_programs(notebook):
    """The second is of rows that nobody can tell apart: no candidate is recommended."""
    folder, (_, _, printed, _) = notebook
    store(folder)
    first, second = parents("model-comparison")
    assert set(children(first)) == {"tree", "line", "tuned_forest"}
    assert set(children(second)) == {"tree", "line"}
    assert second.data.params["recommended_model"] == "none"
    assert "Refused: the best is not shown" in printed["stdout"]
    assert [run.info.status for run in (first, second)] == ["FINISHED"] * 2
    assert "best_cv_accuracy" in first.data.metrics and "best_cv_recall" in second.data.metrics


def test_two_deployments_a_refusal_and_a_rollback_in_one_process(notebook):
    folder, (_, _, _, printed) = notebook
    client = store(folder)
    aliases = client.get_registered_model("breast-cancer-classifier").aliases
    numbers = {alias: str(number) for alias, number in aliases.items()}
    assert numbers == {"staging": "3", "production": "1", "previous": "2"}
    outcomes = [run.data.tags["outcome"] for run in parents("production-deployment")]
    assert outcomes == ["promoted", "promoted", "refused", "rolled back"]
    assert "Refused: version 3 misses a limit" in printed["stdout"]
