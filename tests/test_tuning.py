"""Hyperparameter tuning: cost, refinement, failures, interruptions, resuming, a Dask cluster."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import mlflow
import pytest
from conftest import (
    ROOT,
    SOON,
    assert_one_line,
    assert_success,
    children,
    edited,
    parents,
    run,
    store,
    user_env,
)

SCRIPT = "hyperparameter_tuning.py"
SMALL_GRID = {"max_depth": [2, 8], "n_estimators": [5, 20, 80]}
SLOW_GRID = {"max_depth": [2, 8], "n_estimators": [100, 150, 200, 250]}  # enough to interrupt


def start(*command, cwd, **options):
    """Start a command in the background, what it prints going to files; the caller ends it."""
    with open(cwd / "stdout.txt", "w") as stdout, open(cwd / "stderr.txt", "w") as stderr:
        return subprocess.Popen(
            command, cwd=cwd, env=user_env(), stdout=stdout, stderr=stderr, **options
        )


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def finished(folder):
    """Return the finished trials of the only session in the folder, by name."""
    if "/8 " not in (folder / "stdout.txt").read_text():
        return {}  # nobody may open a new store while its tables are being made
    store(folder)
    trials = children(parents("hyperparameter-tuning")[0])
    return {name: trial for name, trial in trials.items() if trial.info.status == "FINISHED"}


def scores(search):
    """Return the parameters and the scores of each trial: what must not depend on the way."""
    return {
        name: (trial.info.status, trial.data.params, trial.data.metrics.get("cv_accuracy"))
        for name, trial in children(search).items()
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The search that the interrupted ones must equal."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert_success(run(edited(folder, SCRIPT, PARAM_GRID=SLOW_GRID), cwd=folder))
    store(folder)
    (search,) = parents("hyperparameter-tuning")
    return search.data, scores(search)


@pytest.fixture
def assert_same_result(uninterrupted):

    def check(folder):
        """The only session in the folder ended as an uninterrupted one."""
        expected, expected_scores = uninterrupted
        store(folder)
        (search,) = parents("hyperparameter-tuning")
        assert search.info.status == "FINISHED"
        assert scores(search) == expected_scores
        assert search.data.params == expected.params
        for metric in ("best_cv_accuracy", "test_accuracy"):
            assert search.data.metrics[metric] == expected.metrics[metric]

    return check


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    script = edited(folder, SCRIPT, PARAM_GRID=SMALL_GRID)
    process = run(script, cwd=folder)
    assert_success(process)
    return folder, script, process


def test_the_readme_refines_around_the_best(searched, tmp_path):
    folder, script, _ = searched
    for path in (script, folder / "mlflow.db"):
        shutil.copy(path, tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    (recipe,) = (block for block in blocks if "near = " in block)
    (tmp_path / "refine.py").write_text(recipe)
    client = store(tmp_path)
    (coarse,) = parents("hyperparameter-tuning")
    other = client.create_run(coarse.info.experiment_id).info.run_id  # newer, of other rows
    for key, value in {**coarse.data.params, "rows": "other", "best_max_depth": "999"}.items():
        client.log_param(other, key, value)
    client.set_terminated(other)
    assert_success(run(tmp_path / "refine.py", cwd=tmp_path))
    coarse, _, fine = parents("hyperparameter-tuning")
    best = {name: int(coarse.data.params[f"best_{name}"]) for name in SMALL_GRID}
    tried = [{k: int(v) for k, v in t.data.params.items()} for t in children(fine).values()]
    assert best in tried and len(tried) > 1
    for name, values in SMALL_GRID.items():
        i = values.index(best[name])
        near = values[max(i - 1, 0) : i + 2]
        allowed = {best[name]} | {(value + best[name]) // 2 for value in near}
        assert {trial[name] for trial in tried} == allowed
    assert fine.data.metrics["best_cv_accuracy"] >= coarse.data.metrics["best_cv_accuracy"]


def test_the_cheapest_within_one_standard_error_is_named(searched):
    folder, _, process = searched
    store(folder)
    (search,) = parents("hyperparameter-tuning")
    metrics = {name: trial.data.metrics for name, trial in children(search).items()}
    best = max(metrics.values(), key=lambda m: m["cv_accuracy"])
    best = metrics[min(n for n, m in metrics.items() if m["cv_accuracy"] == best["cv_accuracy"])]
    # The standard error of a mean of 5 is s / √5, where s has 4 degrees of freedom.
    floor = best["cv_accuracy"] - best["cv_accuracy_std"] * (5 / 4) ** 0.5 / 5**0.5
    close = {name: m for name, m in metrics.items() if m["cv_accuracy"] >= floor}
    cheapest = min(close, key=lambda name: close[name]["fit_seconds"])
    share = metrics[cheapest]["fit_seconds"] / best["fit_seconds"]
    assert f"standard error: {cheapest}, {share:.0%} of the time" in process.stdout
    compute = 5 * sum(m["fit_seconds"] for m in metrics.values())  # five folds a trial
    wall = search.data.metrics["search_seconds"]
    assert f"Cost: {compute:.0f} s of fitting in {wall:.0f} s\n" in process.stdout
    assert 0 < (search.info.end_time - search.info.start_time) / 1000 < wall + 3


def test_the_heat_map_shows_every_combination_of_the_grid(searched):
    folder, _, _ = searched
    store(folder)
    (search,) = parents("hyperparameter-tuning")
    page = mlflow.artifacts.load_text(f"{search.info.artifact_uri}/grid.html")
    trials = sorted(children(search).items())
    expected = [f"{trial.data.metrics['cv_accuracy']:.6f}" for _, trial in trials]
    assert "background-color" in page
    assert re.findall(r"<td[^>]*>([\d.]+)</td>", page) == expected


def test_a_trial_that_raises_is_a_failed_child_and_the_search_goes_on(tmp_path):
    script = edited(tmp_path, SCRIPT, PARAM_GRID={"max_depth": [-1, 3], "n_estimators": [5]})
    assert_success(run(script, cwd=tmp_path))
    store(tmp_path)
    (search,) = parents("hyperparameter-tuning")
    trials = children(search)
    assert trials["trial-0001"].info.status == "FAILED"
    assert "max_depth" in trials["trial-0001"].data.tags["error"]
    assert trials["trial-0002"].info.status == "FINISHED"
    assert search.data.params["best_max_depth"] == "3"


def test_all_trials_raise(tmp_path):
    script = edited(tmp_path, SCRIPT, PARAM_GRID={"max_depth": [-1, -2], "n_estimators": [5]})
    assert_one_line(run(script, cwd=tmp_path), "All 2 trials failed", code=1)
    store(tmp_path)
    (search,) = parents("hyperparameter-tuning")
    assert search.info.status == "FAILED"
    assert {trial.info.status for trial in children(search).values()} == {"FAILED"}


def test_ctrl_c_keeps_what_has_finished_and_prints_how_to_go_on(tmp_path, assert_same_result):
    script = edited(tmp_path, SCRIPT, PARAM_GRID=SLOW_GRID)
    process = start(sys.executable, script, cwd=tmp_path, start_new_session=True)
    wait_until(lambda: len(finished(tmp_path)) >= 2)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers as well
    assert process.wait(timeout=SOON) == 130
    kept = finished(tmp_path)
    (search,) = parents("hyperparameter-tuning")
    assert search.info.status == "KILLED"
    assert not [t for t in children(search).values() if t.info.status == "RUNNING"]
    said = (tmp_path / "stderr.txt").read_text()
    command = re.fullmatch(r"\nStopped\. The .*; to go on: (python .*)\n", said).group(1)
    resumed = subprocess.run(
        shlex.split(command), cwd=tmp_path, env=user_env(), capture_output=True, text=True
    )
    assert_success(resumed)
    assert f"/{8 - len(kept)} " in resumed.stdout, "only what is missing is run"
    assert_same_result(tmp_path)
    again = finished(tmp_path)
    assert {t.info.run_id for t in kept.values()} <= {t.info.run_id for t in again.values()}


# Ctrl-C in the middle of a write of MLflow's: as a rule it leaves a run RUNNING or SQLite locked.
INTERRUPT = """
import os
import signal
import sys
sys.path.insert(0, {root!r})
import hyperparameter_tuning as script
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
write, left = SqlAlchemyStore.log_batch, 5
def interrupted(*args, **kwargs):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGINT)
    return write(*args, **kwargs)
SqlAlchemyStore.log_batch = interrupted
script.PARAM_GRID = {grid!r}
if __name__ == "__main__":
    script.main()
"""


def test_ctrl_c_during_a_write_leaves_none_running(tmp_path):
    grid = {"n_estimators": [5, 6, 7, 8, 9, 10]}
    (tmp_path / "driver.py").write_text(INTERRUPT.format(root=str(ROOT), grid=grid))
    process = run(tmp_path / "driver.py", cwd=tmp_path)
    assert process.returncode == 130 and "to go on:" in process.stderr
    store(tmp_path)
    (search,) = parents("hyperparameter-tuning")
    assert search.info.status == "KILLED"
    states = {trial.info.status for trial in children(search).values()}
    assert states == {"FINISHED"}, "what was being logged is logged whole"


def test_resume_after_a_kill(tmp_path, assert_same_result):
    script = edited(tmp_path, SCRIPT, PARAM_GRID=SLOW_GRID)
    process = start(sys.executable, script, cwd=tmp_path, start_new_session=True)
    wait_until(lambda: len(finished(tmp_path)) >= 3)
    process.kill()
    process.wait()
    os.killpg(process.pid, signal.SIGKILL)  # its workers, which nobody is left to end
    (search,) = parents("hyperparameter-tuning")
    with mlflow.start_run(
        experiment_id=search.info.experiment_id,
        run_name="trial-0001",  # as if the kill had come while this trial was being logged
        tags={"mlflow.parentRunId": search.info.run_id},
    ) as half_logged:
        pass
    mlflow.MlflowClient().update_run(half_logged.info.run_id, status="RUNNING")
    assert_success(run(script, "--resume", search.info.run_id, cwd=tmp_path))
    assert_same_result(tmp_path)


def test_what_cannot_be_resumed_ends_in_one_line(searched):
    folder, script, _ = searched
    assert_one_line(run(script, "--resume", "0" * 32, cwd=folder), "0" * 32)
    store(folder)
    (search,) = parents("hyperparameter-tuning")
    run_id = search.info.run_id
    before = search.data.to_dictionary()
    assert_one_line(run(SCRIPT, "--resume", run_id, cwd=folder), run_id, "grid")
    assert_one_line(run(script, "--resume", run_id, cwd=folder), run_id, "not an unfinished search")
    trial = next(iter(children(search).values())).info.run_id
    assert_one_line(run(script, "--resume", trial, cwd=folder), trial, "not an unfinished")
    (search,) = parents("hyperparameter-tuning")
    assert search.info.status == "FINISHED" and search.data.to_dictionary() == before


def test_a_comparison_cannot_be_resumed_as_a_search(main_job):
    store(main_job[0])
    other = parents("model-comparison")[0].info.run_id
    assert_one_line(run(SCRIPT, "--resume", other, cwd=main_job[0]), other, "not an unfinished")


def test_an_unknown_parameter_in_the_grid_ends_in_one_line(tmp_path):
    script = edited(tmp_path, SCRIPT, PARAM_GRID={"max_dept": [1, 2]})
    assert_one_line(run(script, cwd=tmp_path), "max_dept", "Valid parameters")
    assert not (tmp_path / "mlflow.db").exists()


def test_the_best_is_found_among_more_trials_than_a_page_holds(tmp_path):
    """MLflow answers 1,000 runs at the most at a time; the best of these is the oldest."""
    sys.path.insert(0, str(ROOT))
    try:
        from hyperparameter_tuning import find_trials
    finally:
        sys.path.remove(str(ROOT))
    client = store(tmp_path)
    experiment = client.create_experiment("many")
    parent = client.create_run(experiment)
    for number in range(1005):
        tags = {"mlflow.parentRunId": parent.info.run_id}
        trial = client.create_run(experiment, tags=tags, run_name=f"trial-{number:04}")
        if number % 100 == 0:
            client.log_metric(trial.info.run_id, "cv_accuracy", 0.5 + (number == 0) / 4)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("UPDATE runs SET status = 'FINISHED'")  # one by one it takes seconds
    trials = find_trials(parent)
    assert len(trials) == 1005 and trials["runName"].iloc[0] == "trial-0000"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_dask_cluster_does_the_same_search_and_may_lose_a_worker(tmp_path, assert_same_result):
    edited(tmp_path, SCRIPT, PARAM_GRID=SLOW_GRID)
    readme = (ROOT / "README.md").read_text().replace("8786", str(free_port()))
    scheduler, worker = re.findall(r"^(dask .*)$", readme, re.M)
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
    (recipe,) = (block for block in blocks if "parallel_config" in block)
    (tmp_path / "on_dask.py").write_text(recipe)
    folders = [tmp_path / name for name in ("scheduler", "worker-1", "worker-2")]
    for folder in folders:
        folder.mkdir()
    processes = [start(*scheduler.split(), cwd=folders[0])]
    try:
        processes += [start(*worker.split(), cwd=folder) for folder in folders[1:]]
        search = start(sys.executable, "on_dask.py", cwd=tmp_path)
        processes.append(search)
        wait_until(lambda: len(finished(tmp_path)) >= 3 or search.poll())
        processes[1].kill()
        assert search.wait(timeout=120) == 0
        assert (tmp_path / "stderr.txt").read_text() == ""
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert_same_result(tmp_path)
