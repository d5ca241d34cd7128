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
from types import SimpleNamespace
from urllib.request import urlopen

import mlflow
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
    store,
    user_env,
)
from joblib import parallel_config

import hyperparameter_tuning as tuning

INITDB = shutil.which("initdb") or max(
    Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None
)
COMMAND = re.search(r"^mlflow server (.*\\\n)*.*$", (ROOT / "README.md").read_text(), re.M).group()
SMALL_GRID = {"max_depth": [1, 3], "n_estimators": [5, 10]}
LONGER_GRID = {"max_depth": [2, 8], "n_estimators": [50] * 6}
TWO_CANDIDATES = """lambda n_rows, seed: {
    "logistic_regression": LogisticRegression(max_iter=1000),
    "svm": SVC(random_state=seed),
}"""
SECRET = "s3cret"  # a password or token


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def ended_afterwards(process, how=signal.SIGINT):
    """Yield the process, the leader of its own group; end the group at the end."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
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
    """Nor do they give away the password, in what they print or leave on the server.

    Of two deployments that were judged beside the same version, one is refused.
    """
    port = free_port()
    scripts = [
        edited(tmp_path, SCRIPTS[0], PARAM_GRID=SMALL_GRID),
        edited(tmp_path, SCRIPTS[1], REPEATS=2, make_candidates=Code(TWO_CANDIDATES)),
        edited(tmp_path, SCRIPTS[2], GATE=Code("{'score': GATE['score']}")),  # not the speed
    ]
    uri = f"http://me:{SECRET}@127.0.0.1:{port}"
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
        ended = [as_completed(process, timeout=240) for process in started]
        refused = [process for process in ended[2::3] if process.returncode == 1]
        assert len(refused) < 2
        for process in ended:
            assert SECRET not in process.stdout + process.stderr
            if process in refused:
                assert_one_line(process, "meantime", code=1)
            else:
                assert_success(process)
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
            failed = len(refused) if experiment == "production-deployment" else 0
            assert [one.info.status for one in found].count("FINISHED") == sessions - failed
            for parent in found:
                trials = children(parent).values()
                assert [one.info.status for one in trials] == ["FINISHED"] * count
                for output in parent.outputs.model_outputs:
                    mlflow.pyfunc.load_model(f"models:/{output.model_id}")
        client = mlflow.MlflowClient()
        versions = client.search_model_versions("name = 'breast-cancer-classifier'")
        assert {str(version.version) for version in versions} == {"1", "2"}
        assert {version.tags["validation_status"] for version in versions} == {"passed"}
        promoted = [one.version for one in versions if "was_in_production" in one.tags]
        assert len(promoted) == 2 - len(refused)
        production = client.get_model_version_by_alias("breast-cancer-classifier", "production")
        assert mlflow.pyfunc.load_model("models:/breast-cancer-classifier@production")
        assert production.status == "READY" and production.version in promoted
    assert not holding_the_secret(tmp_path / "artifacts")
    address = postgresql.replace("+psycopg2", "")
    dump = [Path(INITDB).resolve().with_name("pg_dump"), address]
    contents = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    assert "grid-search" in contents and SECRET not in contents


def as_completed(process, timeout):
    """Wait for a process that was started with pipes; return it as subprocess.run does."""
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def holding_the_secret(folder):
    """Return the files below the folder that hold the secret; there must be some files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if SECRET.encode() in path.read_bytes()]


TOGETHER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mlflow
import hyperparameter_tuning as script
log_inputs = mlflow.log_inputs
def at_the_same_time(**inputs):
    mine = Path(f"round-{number}-{os.getpid()}")
    if not mine.exists():  # the first call of this round: wait for the other three
        mine.touch()
        while len(list(Path().glob(f"round-{number}-*"))) < 4:
            time.sleep(0.01)
        time.sleep(0.5 - time.time() % 0.5)
    log_inputs(**inputs)
mlflow.log_inputs = at_the_same_time
script.PARAM_GRID = {"n_estimators": [1]}
script.EXPERIMENT = "new-rows"  # artifacts of the others are on the server of another test
for number in range(3):
    script.main(["--csv", f"new-{number}.csv", "--target", "y"])
"""


def test_new_rows_logged_by_several_at_the_same_time_are_not_refused(postgresql, tmp_path):
    """Without the second call of log_inputs most of these are: duplicate key … dataset_pk.

    The address of the database holds a password, which is not printed or logged.
    """
    mlflow.set_tracking_uri(postgresql)
    mlflow.search_experiments()  # makes the tables, as a server does when it starts
    for number in range(3):
        lines = "".join(f"{row + number / 10},{'ab'[row % 2]}\n" for row in range(20))
        (tmp_path / f"new-{number}.csv").write_text(f"x,y\n{lines}")
    env = user_env(MLFLOW_TRACKING_URI=f"{postgresql}?password={SECRET}", LOKY_MAX_CPU_COUNT="1")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(ROOT)],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in [as_completed(process, timeout=120) for process in started]:
        assert_success(process)
        assert "--backend-store-uri postgresql" in process.stdout
        assert SECRET not in process.stdout
    assert not holding_the_secret(tmp_path / "mlruns")
    names = {f"new-{number}-{kind}" for number in range(3) for kind in ("train", "test")}
    inputs = [one.dataset.name for run in parents("new-rows") for one in run.inputs.dataset_inputs]
    assert {name: inputs.count(name) for name in names} == dict.fromkeys(names, 4)


@pytest.mark.parametrize(
    "address",
    [
        "http://SECRET@127.0.0.1:PORT",
        "http://me:SECRET@127.0.0.1:PORT/",
        "postgresql+psycopg2://me@127.0.0.1:PORT/db?password=SECRET",
        "postgresql+psycopg2://me:pass/SECRET@127.0.0.1:PORT/db",
        "postgresql+psycopg2://me:SECRET@one:1,two:2/db",  # SQLAlchemy cannot read this one
    ],
)
def test_the_secret_in_an_address_is_not_printed_when_nothing_answers(
    address, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(address.replace("SECRET", SECRET).replace("PORT", str(free_port())))
    ctrl_c = signal.getsignal(signal.SIGINT)
    started = time.monotonic()
    try:
        with parallel_config("sequential"):
            code = tuning.run_as_program(lambda: tuning.main([]))
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
        store(tmp_path)
    out, err = capsys.readouterr()
    assert time.monotonic() - started < 10  # MLflow itself tries a database for 100 seconds
    assert SECRET not in out + err
    assert_one_line(SimpleNamespace(returncode=code, stderr=err), address.partition(":")[0])


def server_and_search(folder, port, **settings):
    """Start a server on SQLite and a search there, with these settings of its environment."""
    script = edited(folder, SCRIPTS[0], PARAM_GRID=LONGER_GRID)
    server = tracking_server(folder, f"sqlite:///{folder}/server.db", port)
    env = user_env(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}") | settings
    search = subprocess.Popen(
        [sys.executable, script],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return server, search


def kill_after_three_trials(server, search):
    for _ in range(5):  # two lines for the start, then one for each trial
        search.stdout.readline()
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def finished_trials(folder):
    """Return the names of the finished trials of the only search, from the server's database."""
    mlflow.set_tracking_uri(f"sqlite:///{folder}/server.db")
    (parent,) = parents("hyperparameter-tuning")
    trials = children(parent)
    return {name for name, trial in trials.items() if trial.info.status == "FINISHED"}


def test_a_server_that_restarts_during_a_search_is_waited_for(tmp_path):
    port = free_port()
    server, search = server_and_search(tmp_path, port)
    with ended_afterwards(server), ended_afterwards(search, signal.SIGKILL):
        kill_after_three_trials(server, search)
        time.sleep(15)
        with ended_afterwards(tracking_server(tmp_path, f"sqlite:///{tmp_path}/server.db", port)):
            assert_success(as_completed(search, timeout=120))
    assert finished_trials(tmp_path) == {f"trial-{number:04}" for number in range(1, 13)}
    (parent,) = parents("hyperparameter-tuning")
    assert parent.info.status == "FINISHED"


def test_a_server_that_goes_away_ends_in_one_line_and_keeps_what_was_logged(tmp_path):
    """On a machine without pgrep and psutil, too, by which joblib ends its workers."""
    port = free_port()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "psutil.py").write_text("raise ImportError('not on this machine')\n")
    server, search = server_and_search(
        tmp_path,
        port,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="1",
        PYTHONPATH=str(tmp_path / "bare"),
        PATH=str(tmp_path / "bare"),
    )
    with ended_afterwards(server), ended_afterwards(search, signal.SIGKILL):
        kill_after_three_trials(server, search)
        assert_one_line(as_completed(search, timeout=2 * SOON), "Stopped: ", str(port))
    assert len(finished_trials(tmp_path)) >= 3


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
    assert_one_line(process, "Stopped: ", words)
    store(tmp_path)
    (parent,) = parents("hyperparameter-tuning")
    assert kib < 2000 or len(children(parent)) == 2
