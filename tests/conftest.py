"""How the tests run the scripts: as a user does, in a process of their own and an empty folder."""

import fcntl
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a test may import a script, and call a step or its main
# A shell in the background has Ctrl-C ignored, by what it starts as well: not by these tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
SCRIPTS = ("hyperparameter_tuning.py", "model_comparison.py", "production_deployment.py")
SOON = 30  # seconds, for what takes 10 at the most: the machine may be slow, and another test runs


# Files that take longest start first, so that no core idles at the end.
LONG_FILES = ["main_job", "deployment", "store", "readme", "comparison", "tuning", "own_data"]


def pytest_collection_modifyitems(items):
    """Put the tests of the long files first; the order within a file stays."""
    order = {f"test_{name}.py": number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def user_env(**extra):
    """Return the environment of a user: this one without MLflow's settings, which tests may set."""
    own = ("MLFLOW", "GIT_PYTHON")  # a script that a test imports may have set some of these
    env = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    # The commands that the guide prints (mlflow …, python …) are those of this environment.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env | extra


def run(script, *args, cwd, timeout=120, **env):
    """Run a script of the collection in the folder `cwd` and return the finished process."""
    return subprocess.run(
        [sys.executable, ROOT / script, *args],
        cwd=cwd,
        env=user_env(**env),
        capture_output=True,
        text=True,
        encoding=env.get("PYTHONIOENCODING"),
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


class Code(str):
    """A setting for `edited` that stands in the script as it is."""

    __repr__ = str.__str__


def edited(folder, script, **settings):
    """Write a copy of a script into the folder, with other settings or functions at its end."""
    text = (ROOT / script).read_text()
    lines = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    assert (end := "\n\n# The rest is the same") in text
    (folder / script).write_text(text.replace(end, f"{lines}{end}", 1))
    return folder / script


# Settings of the comparison for a test that needs no more than two candidates.
TWO_CANDIDATES = {
    "REPEATS": 2,
    "make_candidates": Code(
        "lambda n, seed: {'baseline': add_preprocessing(DummyClassifier()),"
        " 'logistic_regression': add_preprocessing(LogisticRegression())}"
    ),
}


def assert_success(process):
    """A success says nothing on stderr: a reader must not learn to ignore what stands there."""
    assert (process.returncode, process.stderr) == (0, "")


def assert_one_line(process, *words, code=2):
    """Bad input ends in one line on stderr that has these words, and in this exit code."""
    assert process.returncode == code, process.stderr
    assert process.stderr.count("\n") == 1, process.stderr
    for word in words:
        assert word in process.stderr


def store(folder):
    """Point this process at the store in the folder; return a client of it."""
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    return mlflow.MlflowClient()


def children(parent):
    """Return the child runs of a run, by their name."""
    runs = mlflow.MlflowClient().search_runs(
        [parent.info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent.info.run_id}'",
        max_results=5000,
    )
    return {run.info.run_name: run for run in runs}


def parents(experiment):
    """Return the top-level runs of an experiment, oldest first."""
    runs = mlflow.search_runs(
        experiment_names=[experiment], order_by=["start_time ASC"], output_format="list"
    )
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


def made_once(tmp_path_factory, name, make):
    """Return a folder that one of pytest-xdist's processes fills, while the others wait."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, result = shared / name, shared / f"{name}.pickle"
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            folder.mkdir()
            result.write_bytes(pickle.dumps(make(folder)))
    return folder, pickle.loads(result.read_bytes())


@pytest.fixture(scope="session")
def main_job(tmp_path_factory):
    """The README's main job in an empty folder, and a second deployment.

    Returns the folder, and the four finished processes.
    """

    def make(folder):
        return [run(script, cwd=folder, timeout=600) for script in (*SCRIPTS, SCRIPTS[2])]

    return made_once(tmp_path_factory, "main-job", make)


@pytest.fixture(scope="session")
def new_store(tmp_path_factory):
    """A database with MLflow's tables and nothing in them, which take seconds to make."""

    def make(folder):
        store(folder)
        mlflow.search_experiments()

    return made_once(tmp_path_factory, "new-store", make)[0] / "mlflow.db"


@pytest.fixture
def folder(tmp_path, new_store):
    """A folder to run scripts in, with a store that is empty."""
    shutil.copy(new_store, tmp_path)
    return tmp_path
