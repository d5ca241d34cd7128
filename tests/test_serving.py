"""The printed guide: its commands are run as they stand, or checked against the installed tools."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.request

import click
import mlflow
import pytest
import yaml
from conftest import store, user_env
from mlflow.cli import cli

NAME = "breast-cancer-classifier"


@pytest.fixture(scope="module")
def guide(main_job):
    """The guide that the second deployment printed, and the folder of its store."""
    folder, processes = main_job
    store(folder)
    text = processes[3].stdout
    return text[text.index("# Deploy ") : text.index("\nLook:")], folder


def commands(text, title):
    """Return the commands in a section of the guide: its indented lines."""
    section = text.split(f"\n## {title}")[1].split("\n## ")[0]
    return [line[4:] for line in section.splitlines() if line.startswith("    ")]


def shell(command, folder):
    """Run a command in the folder, in a shell with the setting that the guide begins with."""
    env = user_env(MLFLOW_TRACKING_URI=f"sqlite:///{store_of(folder)}")
    process = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def store_of(folder):
    return folder / "mlflow.db"


def test_the_guide_names_the_store_and_the_version(guide):
    text, _ = guide
    assert text.startswith(f"# Deploy {NAME} version 2 from this store\n")
    assert '    export MLFLOW_TRACKING_URI="sqlite:///mlflow.db"\n' in text


def test_the_server_answers_as_the_model_does(guide):
    """The commands are run as printed, on another port; the server listens on loopback only."""
    text, folder = guide
    serve, download, ask = commands(text, "REST API")
    assert "--host 127.0.0.1 " in serve
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    server = subprocess.Popen(
        shlex.split(serve.replace("5001", port)),
        cwd=folder,
        env=user_env(MLFLOW_TRACKING_URI=f"sqlite:///{store_of(folder)}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        with pytest.raises(OSError):  # it answers at no other address than the one it was given
            socket.create_connection(("127.0.0.2", int(port)), timeout=5)
        shell(download, folder)
        if shutil.which("curl") is None:
            pytest.skip("no curl here")
        answer = json.loads(shell(ask.replace("5001", port), folder))
        model = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
        assert answer["predictions"] == list(model.predict(model.input_example))
    finally:
        os.killpg(server.pid, signal.SIGINT)  # the guide's Ctrl-C
        server.wait(timeout=30)


def test_a_batch_is_predicted_as_the_model_does(guide):
    text, folder = guide
    (download,) = [line for line in commands(text, "REST API") if "download" in line]
    shell(download, folder)
    shell(*commands(text, "Batch"), folder)
    answers = json.loads((folder / "predictions.json").read_text())["predictions"]
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    assert answers == list(model.predict(model.input_example))


def test_the_image_is_described_without_an_engine(guide):
    text, folder = guide
    generate, build, start = commands(text, "Docker")
    shell(generate, folder)
    dockerfile = (folder / "image" / "Dockerfile").read_text()
    assert "COPY model_dir" in dockerfile and "_serve('local')" in dockerfile
    assert build.split()[-1] == "image"
    assert "127.0.0.1:5001:8080" in start


def test_the_legacy_stage_loads_the_same_version(guide):
    store(guide[1])
    model = mlflow.pyfunc.load_model(f"models:/{NAME}/Production")
    version = mlflow.MlflowClient().get_model_version_by_alias(NAME, "production")
    assert model.model_id in version.source


def options_of(command):
    """Return the options that MLflow's own command line takes after these words."""
    found = cli
    for word in command:
        if not isinstance(found, click.Group) or word not in found.commands:
            break
        found = found.commands[word]
    return {option for param in found.params for option in param.opts}


def test_every_mlflow_command_has_the_options_that_the_tool_takes(guide):
    text, _ = guide
    lines = [line[4:] for line in text.splitlines() if line.startswith("    mlflow ")]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line)
        known = options_of(words[1:])
        for word in words:
            assert not word.startswith("--") or word in known, (word, line)


def test_what_is_sent_to_the_clouds_is_well_formed_and_names_this_version(guide):
    text, _ = guide
    bodies = [json.loads(body) for body in re.findall(r"'(\{.*\})'", text)]
    azure, databricks, kserve = bodies
    assert azure["model"] == f"azureml:{NAME}:2"
    (entity,) = databricks["config"]["served_entities"]
    assert entity["entity_name"].endswith(NAME) and entity["entity_version"] == "VERSION"
    (container,) = kserve["spec"]["predictor"]["containers"]
    assert container["image"] == f"REGISTRY/{NAME}:2"
    assert container["ports"] == [{"containerPort": 8080}]
    assert yaml.safe_load(json.dumps(kserve))["kind"] == "InferenceService"
    vertex = " ".join(commands(text, "Google Vertex AI"))
    assert "--container-ports 8080 --container-predict-route /invocations" in vertex
    (sagemaker,) = commands(text, "Amazon SageMaker")
    assert f"--model-uri models:/{NAME}/2" in sagemaker
