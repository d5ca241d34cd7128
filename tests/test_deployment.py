"""Production deployment: the gate, promotion, rollback, kills at every step, the guide, a load."""

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import mlflow
import pandas as pd
import pytest
from conftest import (
    ROOT,
    Code,
    assert_one_line,
    assert_success,
    edited,
    parents,
    run,
    store,
    user_env,
)
from mlflow.cli import cli
from sklearn.datasets import load_breast_cancer
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

SCRIPT = "production_deployment.py"
NAME = "breast-cancer-classifier"


def hold_out():
    data = load_breast_cancer(as_frame=True)
    labels = data.target.map({0: "malignant", 1: "benign"})
    parts = train_test_split(data.data, labels, test_size=0.2, stratify=labels, random_state=42)
    return parts[1], parts[3]


def aliases(client):
    return {key: str(value) for key, value in client.get_registered_model(NAME).aliases.items()}


def stages(client):
    versions = client.search_model_versions(f"name = '{NAME}'")
    return {str(version.version): version.current_stage for version in versions}


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """A deployed version 1: its folder and its guide, from the run's artifact."""
    folder = tmp_path_factory.mktemp("guide")
    process = run(SCRIPT, cwd=folder)
    assert_success(process)
    assert "Undo:" not in process.stdout  # there is nothing to go back to
    store(folder)
    (run_,) = parents("production-deployment")
    text = mlflow.artifacts.load_text(f"{run_.info.artifact_uri}/deployment_guide.md")
    assert text in process.stdout
    return folder, text


@pytest.fixture
def deployed(guide, tmp_path):
    """A folder whose store is a copy of that one."""
    shutil.copy(guide[0] / "mlflow.db", tmp_path)
    return tmp_path, store(tmp_path)


def test_a_refused_model_changes_nothing_in_production(deployed):
    folder, client = deployed
    limits = {"accuracy": 0.999, "accuracy_lost": -0.5, "latency_ms": 0.0}
    least = "MetricThreshold(threshold={}, greater_is_better={})".format
    gate = [f'"{key}": {least(limit, key == "accuracy")}' for key, limit in limits.items()]
    gate = Code(f"GATE | {{{', '.join(gate)}}}")
    process = run(edited(folder, SCRIPT, GATE=gate), cwd=folder)
    assert_one_line(process, "Version 2 is refused", code=1)
    (run_,) = parents("production-deployment")[1:]
    assert run_.info.status == "FAILED"
    assert aliases(client) == {"production": "1", "staging": "2"}
    assert stages(client) == {"1": "Production", "2": "None"}
    tags = client.get_model_version(NAME, "2").tags
    assert tags["validation_status"].startswith("failed: ")
    for check, limit in limits.items():
        figure = run_.data.metrics[check]
        for text in (process.stderr, tags["validation_status"]):
            assert f"candidate model {check} = {figure}, {check} threshold = {limit}." in text
        side = "at least" if check == "accuracy" else "at most"
        assert f"   {check} {figure:.4f}, {side} {limit}\n" in process.stdout
    assert "refuses_a_missing_column" not in process.stderr + tags["validation_status"]


def test_the_gate_figures_and_tags_are_true(deployed):
    folder, client = deployed
    X, y = hold_out()
    accuracy = (mlflow.pyfunc.load_model(f"models:/{NAME}@production").predict(X) == y).mean()
    (run_,) = parents("production-deployment")
    assert run_.data.metrics["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    version = client.get_model_version(NAME, "1")
    assert float(version.tags["accuracy"]) == pytest.approx(accuracy, abs=1e-9)
    assert version.tags["source_run"] == run_.info.run_id == version.run_id
    assert version.tags["validation_status"] == "passed"
    digests = {d.dataset.name: d.dataset.digest for d in run_.inputs.dataset_inputs}
    assert version.tags["judged_on"].endswith(digests["breast-cancer-test"])
    model = mlflow.get_logged_model(run_.outputs.model_outputs[0].model_id)
    linked = {metric.key: metric.dataset_name for metric in model.metrics}
    assert linked["accuracy"] == linked["latency_ms"] == "breast-cancer-test"


def test_the_accuracy_lost_is_against_the_model_in_production(deployed, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from production_deployment import judge

    X, y = hold_out()
    candidate = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    current = DummyClassifier().fit(X, y)
    lost = (current.predict(X) == y).mean() - (candidate.predict(X) == y).mean()
    figures = judge(candidate, current, X, y)
    assert lost < -0.1 and figures["accuracy_lost"] == pytest.approx(lost, abs=1e-9)
    gained = (candidate.predict(X) == y).mean() - (y == "benign").mean()
    assert figures["accuracy_gained"] == pytest.approx(gained, abs=1e-9)
    # One row of 50 lost is the tolerance of 0.02, not a rounding error more.
    rows, answers = X.head(50), candidate.predict(X.head(50))
    flipped = [{"benign": "malignant", "malignant": "benign"}[answer] for answer in answers]
    truth = [*flipped[:2], *answers[2:]]
    current = DecisionTreeClassifier().fit(rows, [answers[0], *truth[1:]])
    assert judge(candidate, current, rows, pd.Series(truth, rows.index))["accuracy_lost"] == 0.02


def test_roll_back_and_back_again(deployed):
    folder, client = deployed
    assert_one_line(run(SCRIPT, "--rollback", cwd=folder), NAME, "no previous version")
    process = run(SCRIPT, cwd=folder)
    assert_success(process)
    assert "Undo:  python " in process.stdout
    assert aliases(client) == {"production": "2", "previous": "1", "staging": "2"}
    for old, new in (("2", "1"), ("1", "2")):
        process = run(SCRIPT, "--rollback", cwd=folder)
        assert_success(process)
        assert f"from version {old} to version {new}" in process.stdout
        assert aliases(client) == {"production": new, "previous": old, "staging": "2"}
        assert stages(client) == {new: "Production", old: "Archived"}
    client.delete_registered_model_alias(NAME, "production")
    before = aliases(client)
    assert_one_line(run(SCRIPT, "--rollback", cwd=folder), NAME, "no previous version")
    assert aliases(client) == before


def test_roll_back_of_nothing_ends_in_one_line(tmp_path):
    assert_one_line(run(SCRIPT, "--rollback", cwd=tmp_path), NAME, "no previous version")


class Trap:
    """Loads as a pickle that leaves a file: what a model from elsewhere must not be able to do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_model_that_could_run_code_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the store remembers where it was made
    store(tmp_path)
    X, y = hold_out()
    model = DummyClassifier().fit(X, y)
    signature = mlflow.models.infer_signature(X, y.to_numpy())
    options = {"signature": signature, "pip_requirements": ["mlflow"]}
    pickled = mlflow.sklearn.log_model(
        model, name="model", serialization_format="cloudpickle", **options
    )
    trusting = mlflow.sklearn.log_model(
        model,
        name="model",
        serialization_format="skops",
        skops_trusted_types=["builtins.open"],
        **options,
    )
    fine = mlflow.sklearn.log_model(model, name="model", serialization_format="skops", **options)
    loader = Path(mlflow.artifacts.download_artifacts(fine.model_uri)) / "MLmodel"
    loader.write_text(loader.read_text().replace("mlflow.sklearn\n", "this\n", 1))
    elsewhere = mlflow.sklearn.log_model(
        model, name="model", serialization_format="skops", **options
    )
    loader = Path(mlflow.artifacts.download_artifacts(elsewhere.model_uri)) / "MLmodel"
    loader.write_text(
        loader.read_text().replace("model_path: ", "data: sub/x.pkl\n    model_path: ")
    )
    mlflow.end_run()
    for info in (pickled, trusting, fine, elsewhere):
        process = run(SCRIPT, "--model-uri", info.model_uri, cwd=tmp_path)
        assert_one_line(process, info.model_uri, "could run code")
        assert "1." not in process.stdout
    assert mlflow.MlflowClient().search_registered_models() == []


def test_what_is_checked_is_what_is_loaded(deployed, monkeypatch):
    """The version in production is a trap whose file names another model, which is fine."""
    folder, client = deployed
    monkeypatch.chdir(folder)
    X, y = hold_out()
    model = DummyClassifier().fit(X, y)
    model.trap = Trap(str(folder / "trapped"))
    trapped = mlflow.sklearn.log_model(
        model,
        name="model",
        serialization_format="cloudpickle",
        signature=mlflow.models.infer_signature(X, y.to_numpy()),
        pip_requirements=["mlflow"],
    )
    mlflow.end_run()
    (run_,) = parents("production-deployment")
    fine = run_.outputs.model_outputs[0].model_id
    named = Path(mlflow.artifacts.download_artifacts(trapped.model_uri)) / "MLmodel"
    named.write_text(named.read_text().replace(trapped.model_id, fine))
    client.create_model_version(NAME, trapped.model_uri)
    client.set_registered_model_alias(NAME, "production", "2")
    assert_success(run(SCRIPT, cwd=folder))
    assert aliases(client)["production"] == "3" and not (folder / "trapped").exists()


def test_a_model_that_is_in_no_store_is_not_deployed(tmp_path):
    """It has no id; nothing else may be deployed in its place."""
    X, y = hold_out()
    mlflow.sklearn.save_model(
        DummyClassifier().fit(X, y),
        tmp_path / "saved",
        serialization_format="skops",
        input_example=X.head(),
        pip_requirements=["mlflow"],
    )
    assert_one_line(run(SCRIPT, "--model-uri", "saved", cwd=tmp_path))
    assert store(tmp_path).search_registered_models() == []


@pytest.mark.parametrize("uri", ["models:/m-0", "runs:/0/model", "models:/nothing@here", ""])
def test_an_unknown_model_ends_in_one_line(uri, tmp_path):
    assert_one_line(run(SCRIPT, "--model-uri", uri, cwd=tmp_path))
    client = store(tmp_path)
    assert client.search_registered_models() == [] and parents("production-deployment") == []


def test_a_model_for_other_columns_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the store remembers where it was made
    store(tmp_path)
    X, y = hold_out()
    for rows, answer in ((X.iloc[:, :5], "predict"), (X, "predict_proba")):
        info = mlflow.sklearn.log_model(
            DummyClassifier().fit(rows, y),
            name="model",
            serialization_format="skops",
            input_example=rows.head(),
            pip_requirements=["mlflow"],
            pyfunc_predict_fn=answer,
        )
        mlflow.end_run()
        process = run(SCRIPT, "--model-uri", info.model_uri, cwd=tmp_path)
        assert_one_line(process, info.model_uri, "does not predict classes from the columns")
    assert mlflow.MlflowClient().search_registered_models() == []


def test_a_table_with_other_columns_leaves_production_and_registry_alone(tmp_path):
    table = pd.DataFrame({"a": range(60), "b": range(60), "y": ["no"] * 30 + ["yes"] * 30})
    own = ("--csv", "table.csv", "--target", "y")
    table.to_csv(tmp_path / "table.csv", index=False)
    assert_success(run(SCRIPT, *own, cwd=tmp_path))
    table.drop(columns="b").to_csv(tmp_path / "table.csv", index=False)
    process = run(SCRIPT, *own, cwd=tmp_path)
    assert_one_line(process, "models:/table-classifier/1", "the columns of the data")
    client = store(tmp_path)
    assert len(client.search_model_versions("name = 'table-classifier'")) == 1
    assert len(parents("production-deployment")) == 1


def test_a_bad_example_and_a_constant_answer_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the store remembers where it was made
    store(tmp_path)
    X, y = hold_out()
    info = mlflow.sklearn.log_model(
        DummyClassifier().fit(X, y),
        name="model",
        serialization_format="skops",
        signature=mlflow.models.infer_signature(X, y.to_numpy()),
        pip_requirements=["mlflow"],
    )
    mlflow.end_run()
    options = ("--model-uri", info.model_uri, "--min-accuracy", "0.5")
    process = run(SCRIPT, *options, cwd=tmp_path)
    assert_one_line(process, "answers_its_example = 0.0", "accuracy_gained = 0.0", code=1)
    assert "production" not in aliases(mlflow.MlflowClient())


KILL = """
import os, sys
sys.path.insert(0, {root!r})
import mlflow
import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store
import production_deployment as script
from sklearn.dummy import DummyClassifier

# What is imported or looked up once is so for all the processes below: it halves their time.
options = {{"serialization_format": "skops", "pip_requirements": ["mlflow"]}}
mlflow.sklearn.save_model(DummyClassifier().fit([[0]], [0]), "any", **options)

def dying(method):
    def call(*args, **kwargs):
        global left
        result = method(*args, **kwargs)
        left -= 1
        if left == 0:
            os._exit(9)  # as with kill -9: nothing is tidied up
        return result
    return call

for name in ("create_registered_model", "_create_model_version", "set_registered_model_alias",
             "set_model_version_tag", "transition_model_version_stage"):
    setattr(mlflow.MlflowClient, name, dying(getattr(mlflow.MlflowClient, name)))
for line in sys.stdin:  # the step to die after; a process for each, which need not import anew
    left = int(line)
    if os.fork() == 0:
        with open(os.devnull, "w") as sys.stdout:
            script.main()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_killed_between_any_two_steps_production_stays_whole(tmp_path):
    """The next run works, and production is a version that has passed the gate."""
    client, step, code, outcomes = store(tmp_path), 0, None, []
    with subprocess.Popen(
        [sys.executable, "-c", KILL.format(root=str(ROOT))],
        cwd=tmp_path,
        env=user_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        while code != 0:
            step += 1
            print(step, file=process.stdin, flush=True)
            code = int(process.stdout.readline())
            assert code in (0, 9)
            production = aliases(client).get("production")
            outcomes.append(production)
            if production and production not in outcomes[:-1]:  # it has moved
                version = client.get_model_version(NAME, production)
                assert version.status == "READY"
                assert version.tags["validation_status"] == "passed"
                model = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
                model.predict(hold_out()[0])
    # Registered, version, staging, eleven tags, previous once there is one, production, stage.
    assert 15 <= step <= 19 and outcomes[0] is None
    newest = max(int(number) for number in stages(client))
    assert aliases(client)["production"] == str(newest)
    assert stages(client)[str(newest)] == "Production"
    assert sorted(stages(client).values()).count("Production") == 1


# The guide: its commands are run as they are printed.


def section(guide, title):
    """Return the commands of a section of the guide: its indented lines."""
    text = guide.split(f"\n## {title}")[1].split("\n## ")[0]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def shell(folder, *commands, timeout=120):
    return subprocess.run(
        ["bash", "-ec", "\n".join(commands)],
        cwd=folder,
        env=user_env(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def served(guide):
    """The REST commands of the guide, run as printed: (port, the answer to the curl command)."""
    folder, text = guide
    export = re.search(r"^    (export .*)$", text, re.M).group(1)
    serve, download, curl = section(text, "REST API")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve, curl = serve.replace("5001", str(port)), curl.replace("5001", str(port))
    server = subprocess.Popen(
        ["bash", "-ec", f"{export}\nexec {serve}"],
        cwd=folder,
        env=user_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while shell(folder, f"curl --fail http://127.0.0.1:{port}/ping").returncode:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        answer = shell(folder, export, download, curl)
        yield port, answer
    finally:
        os.killpg(server.pid, signal.SIGINT)  # the guide's Ctrl-C
        server.wait(timeout=20)


def expected_answers(folder):
    store(folder)
    body = json.loads((folder / "request" / "serving_input_example.json").read_text())
    rows = pd.DataFrame(**body["dataframe_split"])
    return list(mlflow.pyfunc.load_model(f"models:/{NAME}@production").predict(rows))


def test_rest_answers_like_the_model(guide, served):
    _, answer = served
    assert answer.returncode == 0, answer.stderr
    line = answer.stdout.strip().splitlines()[-1]
    assert json.loads(line[line.index("{") :])["predictions"] == expected_answers(guide[0])


def test_batch_answers_like_the_model(guide, served):
    folder, text = guide
    export = re.search(r"^    (export .*)$", text, re.M).group(1)
    batch = shell(folder, export, *section(text, "Batch"))
    assert batch.returncode == 0, batch.stderr
    predictions = json.loads((folder / "predictions.json").read_text())["predictions"]
    assert predictions == expected_answers(folder)


def test_the_server_listens_on_loopback_only(served):
    port, _ = served
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port)}
    for address in addresses - {"127.0.0.1", "127.0.1.1", "::1"}:
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2).close()


def test_bad_requests_are_refused_and_the_server_goes_on(guide, served):
    port, _ = served
    good = json.loads((guide[0] / "request" / "serving_input_example.json").read_text())
    split = good["dataframe_split"]
    missing = {"columns": split["columns"][1:], "data": [row[1:] for row in split["data"]]}
    wrong = {"columns": split["columns"], "data": [["x", *row[1:]] for row in split["data"]]}
    bodies = {
        "malformed": '{"dataframe_split": ',
        "missing": json.dumps({"dataframe_split": missing}),
        "wrong type": json.dumps({"dataframe_split": wrong}),
        "empty": "",
    }

    def status(body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            data=body.encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            return urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code

    for name, body in bodies.items():
        assert 400 <= status(body) < 500, name
        assert status(json.dumps(good)) == 200


def test_eight_clients_lose_nothing(served):
    """8 × 500 requests of one row each, every answer compared; bounded in number and in time."""
    port, _ = served
    X, _ = hold_out()
    expected = mlflow.pyfunc.load_model(f"models:/{NAME}@production").predict(X)
    bodies = [
        json.dumps({"dataframe_split": X.iloc[[i]].to_dict(orient="split", index=False)})
        for i in range(len(X))
    ]
    deadline = time.monotonic() + 180

    def client(number):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        right = 0
        for request in range(500):
            assert time.monotonic() < deadline
            i = (number * 500 + request) % len(X)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/invocations", bodies[i], headers)
            answer = json.loads(connection.getresponse().read())
            right += answer == {"predictions": [expected[i]]}
        connection.close()
        return right

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(client, range(8))) == [500] * 8


def test_the_docker_context_serves_this_model(guide):
    folder, text = guide
    export = re.search(r"^    (export .*)$", text, re.M).group(1)
    generate, build, run_ = section(text, "Docker")
    process = shell(folder, export, generate)
    assert process.returncode == 0, process.stderr
    dockerfile = (folder / "image" / "Dockerfile").read_text()
    models = list((folder / "image").rglob("MLmodel"))
    assert len(models) == 1 and models[0].parent.name in dockerfile
    X, _ = hold_out()
    store(folder)
    production = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    packed = mlflow.pyfunc.load_model(str(models[0].parent))
    assert packed.metadata.model_id == production.metadata.model_id
    assert list(packed.predict(X)) == list(production.predict(X))
    requirements = (models[0].parent / "requirements.txt").read_text().split()
    assert all("==" in line for line in requirements)
    assert build.startswith(f"docker build --tag {NAME}:1 ") and f"{NAME}:1" in run_
    assert "--publish 127.0.0.1:" in run_


def test_every_mlflow_command_of_the_guide_exists(guide):
    _, text = guide
    commands = {line.strip() for line in re.findall(r"^    (mlflow .*)$", text, re.M)}
    assert len(commands) >= 7
    for command in commands:
        _, *words = shlex.split(command)
        known = cli
        while isinstance(known, click.Group):
            known = known.commands[words.pop(0)]
        options = {name for option in known.params for name in option.opts}
        assert {word for word in words if word.startswith("--")} <= options, command


def test_the_guide_names_this_version_and_every_platform(guide):
    _, text = guide
    assert text.startswith(f"# Deploy {NAME} version 1 from this store\n")
    for platform in ("SageMaker", "Azure ML", "Vertex AI", "Databricks", "KServe"):
        title = next(line for line in text.splitlines() if platform in line)
        assert title.startswith("## ") and "needs" in title and section(text, title[3:])
    (manifest,) = re.findall(r"echo '(.*)' \| kubectl", text)
    assert json.loads(manifest)["kind"] == "InferenceService"
    (served,) = re.findall(r"--json '(.*)'", text)
    entity = json.loads(served)["config"]["served_entities"][0]
    assert entity["entity_version"] == "1"
    assert not re.search(r"0\.0\.0\.0|--no-conda|enable-mlserver", text)


# The swap without downtime, as the README shows it.


def test_the_readme_snippet_swaps_without_a_failed_or_mixed_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the store remembers where it was made
    store(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    (snippet,) = (block for block in blocks if "class LiveModel" in block)
    names = {}
    exec(snippet.split("\n\nmodel = ")[0], names)
    X, y = hold_out()
    client = mlflow.MlflowClient()
    client.create_registered_model(NAME)
    for number in ("1", "2"):  # each version says in every answer which one it is
        model = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, number + "-" + y)
        logged = mlflow.sklearn.log_model(
            model,
            name="model",
            serialization_format="skops",
            signature=mlflow.models.infer_signature(X, model.predict(X)),
            pip_requirements=["mlflow"],
        )
        client.create_model_version(NAME, logged.model_uri)
    mlflow.end_run()
    client.set_registered_model_alias(NAME, "production", "1")
    model = names["LiveModel"](NAME, interval=0.2)
    answers, failed, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            start = time.monotonic()
            try:
                answers.append((start, {answer[0] for answer in model.predict(X)}))
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for swap in range(10):
            version = ("2", "1")[swap % 2]
            client.set_registered_model_alias(NAME, "production", version)
            moved = time.monotonic()
            while not (answers and answers[-1][0] > moved and answers[-1][1] == {version}):
                assert time.monotonic() < moved + 0.2 + 5, "the new version does not answer"
                time.sleep(0.01)
    finally:
        stop.set()
        model.interval = 1e6  # its own thread sleeps while the other tests run
        for thread in threads:
            thread.join()
    assert all(len(versions) == 1 for _, versions in answers)  # none is mixed
    assert not failed and len(answers) > 100
