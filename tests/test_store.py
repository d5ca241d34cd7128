"""Stores: several scripts at once, a server, PostgreSQL's address, and what goes wrong."""

import contextlib
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import tomllib

import mlflow
import pytest
import requests
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

EXPERIMENTS = ("hyperparameter-tuning", "model-comparison", "production-deployment")


def make_quick(folder):
    """Put copies of the scripts that have little to do into a folder."""
    edited(folder, SCRIPTS[0], PARAM_GRID={"max_depth": [1, 3], "n_estimators": [5]})
    edited(folder, SCRIPTS[1], REPEATS=2, RandomForestClassifier=Code("ExtraQuick"))
    text = (folder / SCRIPTS[1]).read_text()
    quick = "from functools import partial\nExtraQuick = partial(RandomForestClassifier, 5)\n"
    (folder / SCRIPTS[1]).write_text(
        text.replace("\nRandomForestClassifier =", f"\n{quick}\nRandomForestClassifier =")
    )
    edited(folder, SCRIPTS[2])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_scripts_started_together_in_an_empty_folder_all_succeed(tmp_path):
    """On a bare machine, too: without git. Each has its experiment, and all runs are finished."""
    make_quick(tmp_path)
    empty = tmp_path / "an empty folder"
    empty.mkdir()
    started = [
        subprocess.Popen(
            [sys.executable, tmp_path / script],
            cwd=empty,
            env=user_env(GIT_PYTHON_GIT_EXECUTABLE="no-git-here"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script in SCRIPTS
    ]
    ended = [(*process.communicate(timeout=200), process.returncode) for process in started]
    assert [(code, errors) for _, errors, code in ended] == [(0, "")] * 3
    store(empty)
    for experiment, count in zip(EXPERIMENTS, (2, 5, 0), strict=True):
        (parent,) = parents(experiment)
        runs = [parent, *children(parent).values()]
        assert len(runs) == 1 + count
        assert {one.info.status for one in runs} == {"FINISHED"}


def test_a_tracking_server_takes_the_place_of_the_file(tmp_path):
    """The scripts run unchanged, print its address, and leave nothing in their folder."""
    (tmp_path / "server").mkdir()
    (tmp_path / "user").mkdir()
    make_quick(tmp_path)
    uri = f"http://127.0.0.1:{free_port()}"
    options = "--backend-store-uri sqlite:///server.db --artifacts-destination ./artifacts"
    command = f"mlflow server {options} --workers 1 --port {uri.rpartition(':')[2]}"
    server = subprocess.Popen(
        [sys.executable, "-m", *command.split()],
        cwd=tmp_path / "server",
        env=user_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{uri}/health", timeout=5).ok:
                    break
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        for script in (SCRIPTS[0], SCRIPTS[2]):
            process = run(
                tmp_path / script,
                cwd=tmp_path / "user",
                MLFLOW_TRACKING_URI=uri.replace("//", "//user:secret@"),
            )
            assert_success(process)
            address = uri.replace("//", "//USER:PASSWORD@")
            assert f"Look:  {address}/#/experiments/" in process.stdout
            assert "secret" not in process.stdout
        assert list((tmp_path / "user").iterdir()) == []
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_a_dead_server_ends_in_one_line_without_its_login(tmp_path):
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    process = run(SCRIPTS[0], cwd=tmp_path, timeout=SOON, MLFLOW_TRACKING_URI=uri)
    assert_one_line(process, "127.0.0.1")
    assert "secret" not in process.stderr + process.stdout
    assert list(tmp_path.iterdir()) == []


def test_logins_are_hidden_wherever_an_address_has_one():
    import production_deployment as script

    for uri, hidden in {
        "http://me:p@ss@host:5000/x": "http://USER:PASSWORD@host:5000/x",
        "postgresql+psycopg2://me:p%40ss@/db?host=/run": "postgresql+psycopg2://USER:PASSWORD@/db?host=/run",
        "sqlite:////home/me/a b/mlflow.db": "sqlite:////home/me/a b/mlflow.db",
        "models:/churn@production": "models:/churn@production",
    }.items():
        assert script.hide_login(f"cannot reach {uri} now") == f"cannot reach {hidden} now"


def test_a_store_that_is_no_database_ends_in_one_line(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database")
    assert_one_line(run(SCRIPTS[2], cwd=tmp_path, timeout=SOON * 5), "not a database")


def test_a_locked_store_ends_in_one_line(folder):
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        process = run(SCRIPTS[1], cwd=folder, timeout=SOON * 5)
    assert_one_line(process, "locked")


@pytest.mark.parametrize(
    ("script", "words"), [(SCRIPTS[1], "baseline  "), (SCRIPTS[2], "Registering")]
)
def test_ctrl_c_ends_every_run(script, words, folder):
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, ROOT / script],
            cwd=folder,
            env=user_env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while words not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SOON)
        if process.returncode != 0:
            break  # Python loses one that arrives in a finalizer, which is rare; then once more
    assert process.returncode == 130 and "Traceback" not in errors
    store(folder)
    *_, parent = parents(EXPERIMENTS[SCRIPTS.index(script)])
    assert parent.info.status == "FAILED"
    assert "RUNNING" not in {child.info.status for child in children(parent).values()}


def test_the_command_to_look_at_a_store_elsewhere(new_store, tmp_path):
    """With a space in its path."""
    elsewhere = tmp_path / "another folder"
    elsewhere.mkdir()
    shutil.copy(new_store, elsewhere)
    store(elsewhere)
    with mlflow.start_run(experiment_id=mlflow.create_experiment("e")) as one:
        pass
    import production_deployment as script

    uri = f"sqlite:///{elsewhere}/mlflow.db"
    assert f'mlflow ui --backend-store-uri "{uri}"\n' in script.where_to_look(one)


def test_the_last_part_is_the_same_in_all_three():
    texts = [(ROOT / script).read_text() for script in SCRIPTS]
    assert len({text.partition("\n# The rest is the same in all three")[2] for text in texts}) == 1
    for name in ("make_folds", "next_command"):
        bodies = {
            re.search(rf"^def {name}\(.*?(?=^\S)", text, re.M | re.S)[0] for text in texts[:2]
        }
        assert len(bodies) == 1


def test_the_scripts_stand_alone_and_run_on_every_system():
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.M))
        assert not imported & {name.removesuffix(".py") for name in SCRIPTS}
        assert not imported & {"signal", "fcntl", "pwd", "resource"}


def test_each_script_names_the_versions_of_the_requirements():
    requirements = (ROOT / "requirements.txt").read_text().split()
    for script in SCRIPTS:
        header = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / script).read_text(), re.M | re.S)
        parsed = tomllib.loads(re.sub("^# ?", "", header[1], flags=re.M))
        assert parsed["dependencies"] == requirements
        assert parsed["requires-python"] == ">=3.11"
    lowest = (ROOT / ".github" / "lowest.txt").read_text()
    for line in requirements:
        name, version = re.match(r"([a-z-]+)>=([\d.]+)", line).groups()
        assert re.search(rf"^{name}=={re.escape(version)}(\.0)*$", lowest, re.M), line


def test_mlflow_is_the_version_that_the_page_names():
    """Or the lowest: a new one is tried before its number goes on the page."""
    assert f"mlflow {mlflow.__version__}" in (ROOT / "README.md").read_text()
