"""More than one machine: a tracking server on PostgreSQL, eight scripts at once, and failures."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

import mlflow
import pytest
from conftest import ROOT, SCRIPTS, Code, children, edited, parents, store, user_env
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

INITDB = shutil.which("initdb") or max(
    Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None
)
COMMAND = re.search(r"^mlflow server .*$", (ROOT / "README.md").read_text(), re.M).group()
CANDIDATES = {"logistic_regression": LogisticRegression(max_iter=1000), "svm": LinearSVC()}
SMALL_GRID = {"max_depth": [1, 3], "n_estimators": [5, 10]}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def ended_afterwards(process):
    """Yield the process, the leader of its own group; end the group at the end."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=30)


def tracking_server(folder, database, port):
    """Start the server with the README's command; wait until it answers."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {COMMAND.replace('5000', str(port))}"],
        cwd=folder,
        env=user_env(
            DATABASE=database,
            ARTIFACTS=str(folder / "artifacts"),
            MLFLOW_WORKERS="2",  # as many as cores
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # eight processes for what is not used here
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return process
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)


@pytest.fixture(scope="module")
def postgresql():
    """A database server of its own, on loopback: its address."""
    if INITDB is None:
        pytest.skip("PostgreSQL is not installed")
    # It refuses to run as root, and cannot look into the folders of pytest.
    options = {"user": "postgres"} if os.geteuid() == 0 else {}
    folder, port = Path(tempfile.mkdtemp()), free_port()
    if options:
        shutil.chown(folder, "postgres")
    try:
        initdb = [INITDB, "-D", folder / "data", "--auth", "trust", "--username", "mlflow"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd=folder, **options)
        process = subprocess.Popen(
            [Path(INITDB).with_name("postgres"), "-D", folder / "data", "-h", "127.0.0.1"]
            + ["-p", str(port), "-k", folder],
            cwd=folder,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )
        with ended_afterwards(process):
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder)


def test_eight_scripts_at_once_on_a_server_lose_nothing(postgresql, tmp_path, monkeypatch):
    port = free_port()
    scripts = [
        edited(tmp_path, SCRIPTS[0], PARAM_GRID=SMALL_GRID),
        edited(tmp_path, SCRIPTS[1], REPEATS=2, CANDIDATES=CANDIDATES),
        edited(tmp_path, SCRIPTS[2], GATE=Code("{'accuracy': GATE['accuracy']}")),  # not the speed
    ]
    uri = f"http://127.0.0.1:{port}"
    with ended_afterwards(tracking_server(tmp_path, postgresql, port)):
        empty = tmp_path / "empty"
        empty.mkdir()
        started = [
            subprocess.Popen(
                [sys.executable, scripts[number % 3]],
                cwd=empty,
                env=user_env(MLFLOW_TRACKING_URI=uri, LOKY_MAX_CPU_COUNT="1"),  # one core each
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(8)
        ]
        ended = [(*process.communicate(timeout=240), process.returncode) for process in started]
        for _, err, code in ended:
            assert (code, err) == (0, ""), err
        assert list(empty.iterdir()) == []  # all is on the server

        monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        mlflow.set_tracking_uri(uri)
        for experiment, sessions, count in (
            ("hyperparameter-tuning", 3, 4),
            ("model-comparison", 3, 2),
            ("production-deployment", 2, 0),
        ):
            found = parents(experiment)
            assert len(found) == sessions
            for parent in found:
                runs = [parent, *children(parent).values()]
                assert len(runs) == 1 + count
                assert {one.info.status for one in runs} == {"FINISHED"}
                for output in parent.outputs.model_outputs:
                    mlflow.pyfunc.load_model(f"models:/{output.model_id}")
        client = mlflow.MlflowClient()
        versions = client.search_model_versions("name = 'breast-cancer-classifier'")
        assert {str(version.version) for version in versions} == {"1", "2"}
        assert {version.tags["validation_status"] for version in versions} == {"passed"}
        production = client.get_model_version_by_alias("breast-cancer-classifier", "production")
        assert mlflow.pyfunc.load_model("models:/breast-cancer-classifier@production")
        assert production.status == "READY"


TOGETHER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mlflow
import hyperparameter_tuning as script
log_inputs = mlflow.log_inputs
def at_the_same_time(*args):
    mine = Path(f"round-{number}-{os.getpid()}")
    if not mine.exists():  # the first call of this round: wait for the other three
        mine.touch()
        while len(list(Path().glob(f"round-{number}-*"))) < 4:
            time.sleep(0.01)
        time.sleep(0.5 - time.time() % 0.5)
    log_inputs(*args)
mlflow.log_inputs = at_the_same_time
script.PARAM_GRID = {"n_estimators": [1]}
script.EXPERIMENT = "new-rows"  # artifacts of the others are on the server of another test
for number in range(3):
    sys.argv = ["script", "--csv", f"new-{number}.csv", "--target", "y"]
    script.main()
"""


def test_new_rows_logged_by_several_at_the_same_time_are_not_refused(postgresql, tmp_path):
    """Without the second call of log_inputs most of these are: duplicate key … dataset_pk."""
    mlflow.set_tracking_uri(postgresql)
    mlflow.search_experiments()  # makes the tables, as a server does when it starts
    for number in range(3):
        lines = "".join(f"{row + number / 10},{'ab'[row % 2]}\n" for row in range(20))
        (tmp_path / f"new-{number}.csv").write_text(f"x,y\n{lines}")
    env = user_env(MLFLOW_TRACKING_URI=postgresql, LOKY_MAX_CPU_COUNT="1")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(ROOT)],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in started]
    assert ended == [("", 0)] * 4, "\n".join(err for err, _ in ended)
    names = {f"new-{number}-{kind}" for number in range(3) for kind in ("train", "test")}
    inputs = [one.dataset.name for run in parents("new-rows") for one in run.inputs.dataset_inputs]
    assert {name: inputs.count(name) for name in names} == dict.fromkeys(names, 4)


def test_a_server_that_goes_away_ends_in_one_line_and_keeps_what_was_logged(tmp_path):
    script = edited(
        tmp_path, SCRIPTS[0], PARAM_GRID={"max_depth": [2, 8], "n_estimators": [50] * 6}
    )
    port = free_port()
    database = f"sqlite:///{tmp_path}/server.db"
    server = tracking_server(tmp_path, database, port)
    with ended_afterwards(server):
        search = subprocess.Popen(
            [sys.executable, script],
            cwd=tmp_path,
            env=user_env(
                MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}", MLFLOW_HTTP_REQUEST_MAX_RETRIES="1"
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(5):  # two lines for the start, then one for each trial
            search.stdout.readline()
        os.killpg(server.pid, signal.SIGKILL)
        out, err = search.communicate(timeout=60)
    assert search.returncode == 2 and err.count("\n") == 1, err
    assert err.startswith("Stopped: ") and str(port) in err
    mlflow.set_tracking_uri(database)
    (parent,) = parents("hyperparameter-tuning")
    finished = [t for t in children(parent).values() if t.info.status == "FINISHED"]
    assert len(finished) >= 3


@pytest.mark.parametrize(("kib", "words"), [(2000, "File too large"), (960, "")])
def test_a_full_disk_ends_in_one_line_and_keeps_what_was_logged(kib, words, tmp_path):
    """A limit on the size of files stands for it: the model does not fit, or the database."""
    script = edited(tmp_path, SCRIPTS[0], PARAM_GRID={"max_depth": [9], "n_estimators": [5, 600]})
    process = subprocess.run(
        ["bash", "-c", f"ulimit -f {kib}; exec {shlex.join([sys.executable, str(script)])}"],
        cwd=tmp_path,
        env=user_env(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("Stopped: ") and words in process.stderr
    store(tmp_path)
    (parent,) = parents("hyperparameter-tuning")
    assert kib < 2000 or len(children(parent)) == 2
