"""The guide's commands meet their tools: the real ones, or what their makers publish of them.

Nothing leaves this machine but the packages that the Docker context installs. Not to be had here,
and so not tried: a Docker engine, a Kubernetes cluster, a cloud account, Databricks' program
(its rules are cited), and Azure's extension `ml` (its published options are below).
"""

import contextlib
import importlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import mlflow
import pytest
import yaml
from conftest import ROOT, run, store, user_env
from databricks.sdk import WorkspaceClient
from databricks.sdk.service.serving import EndpointCoreConfigInput
from mlflow.models.container import DEFAULT_NGINX_SERVER_PORT

NAME = "breast-cancer-classifier"


def guide_text():
    """Return the guide to version 1, as the script makes it."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    script = importlib.import_module("production_deployment")
    if hasattr(script, "deployment_guide"):
        return script.deployment_guide(NAME, "1")
    return script.GUIDE.format(name=NAME, number="1", store="STORE")


def commands(title, start=""):
    """Return the commands in the section with this title that start with these words."""
    section = guide_text().split(f"\n## {title}")[1].split("\n## ")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ")]
    found = [line for line in lines if line.startswith(start)]
    assert found, f"the guide has no command {start!r} under {title!r}"
    return found


def options(command):
    """Return the options of a command that take a value: {"--option": "value"}."""
    words = shlex.split(command)
    pairs = zip(words, words[1:], strict=False)
    return {word: value for word, value in pairs if word.startswith("--")}


def need(tool):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed: its commands are not checked")


def shell(command, folder, timeout=120, **env):
    """Run a command in the folder as a user whose tools are not configured but by env."""
    tools = ("AWS_", "CLOUDSDK_", "DOCKER_", "KUBECONFIG")
    clean = {key: value for key, value in user_env().items() if not key.startswith(tools)}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=clean | {key: str(value) for key, value in env.items()},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def loopback(answers):
    """Serve the answers, {path: object}, on loopback; yield the address and all that was asked.

    At any other path is nothing; what is posted there comes back.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
            asked.append((self.command, self.path, body))
            nothing = {"kind": "Status", "status": "Failure", "code": 404, "reason": "NotFound"}
            try:
                status, answer = 200, answers[urlsplit(self.path).path]
            except KeyError:
                status, answer = (201, body) if body else (404, nothing)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_POST = answer

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """A folder with a store in which version 1 is deployed."""
    folder = tmp_path_factory.mktemp("guide-tools")
    process = run("production_deployment.py", cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder


# Docker


def test_every_platform_uses_the_port_of_the_image():
    port = str(DEFAULT_NGINX_SERVER_PORT)
    (docker,) = commands("Docker", "docker run")
    upload, *_ = commands("Google Vertex AI", "gcloud ai models upload")
    (kubectl,) = commands("Kubernetes", "echo")
    assert options(docker)["--publish"].split(":")[-1] == port
    assert options(upload)["--container-ports"] == port
    assert re.search(r'"containerPort": (\d+)', kubectl)[1] == port


def test_docker_takes_every_option(tmp_path):
    """Docker parses the command and then misses its engine; a wrong option it names before."""
    need("docker")
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "Dockerfile").write_text("FROM scratch\n")
    no_engine = f"unix://{tmp_path}/none"
    for command in commands("Docker", "docker"):
        process = shell(command, tmp_path, DOCKER_HOST=no_engine)
        assert re.search("connect to the docker", process.stderr, re.I), process.stderr
        wrong = shell(command.replace(" --", " --wrong-", 1), tmp_path, DOCKER_HOST=no_engine)
        assert "unknown flag: --wrong-" in wrong.stderr


# A copy-on-write layer over this machine, with processes of its own that end with it.
LAYER = """
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
cd root
mount --rbind /dev dev
mount -t proc proc proc
printf '#!/bin/sh\\nexit 101\\n' > usr/sbin/policy-rc.d  # as in any image: apt starts no service
chmod +x usr/sbin/policy-rc.d
chroot . bash -e {script}
"""
# While the image serves, the layer has a network of its own too: ports are free, nobody listens.
SERVE = """
ip link set lo up
{entrypoint} >&2 &
for _ in $(seq 100); do curl --silent --fail 127.0.0.1:{port}/ping && break; sleep 0.3; done
curl --fail 127.0.0.1:{port}/invocations --header 'Content-Type: application/json' --data @{request}
"""


def steps_of(dockerfile, context):
    """Return the steps of a Dockerfile as lines for bash; the entry point is the last."""
    steps, entrypoint = [], None
    for line in dockerfile.replace("\\\n", "").splitlines():
        word, _, rest = line.partition(" ")
        if word == "RUN":
            steps.append(f"( {rest} )")
        elif word == "ENV":
            steps.append(f"export {rest}")
        elif word == "WORKDIR":
            steps.append(f"mkdir -p {rest}; cd {rest}")
        elif word == "COPY":
            source, target = rest.split()
            steps.append(f"mkdir -p $(dirname {target}); cp -r {context}/{source} {target}")
        elif word == "ENTRYPOINT":
            entrypoint = shlex.join(json.loads(rest))
        else:
            assert word in ("FROM", "#", ""), line
    return [*steps, entrypoint]


def test_the_docker_context_is_built_step_by_step_and_serves(deployed):
    """The steps run as they stand, as root of a layer; a virtual environment is Python's image.

    pip finds this environment's packages already there. With GUIDE_DOCKER=1 it finds none, as in
    Docker, and installs all: a minute or two.
    """
    if os.geteuid() or not all(map(shutil.which, ("apt-get", "curl", "ip", "unshare"))):
        pytest.skip("not root of a Debian with curl and iproute2: the Docker context is not built")
    (generate,) = commands("Docker", "mlflow")
    process = shell(generate, deployed, MLFLOW_TRACKING_URI=f"sqlite:///{deployed}/mlflow.db")
    assert process.returncode == 0, process.stderr
    context = deployed / options(generate)["--output-directory"]
    dockerfile = (context / "Dockerfile").read_text()
    assert f"\nFROM python:{platform.python_version()}-slim\n" in dockerfile
    *steps, entrypoint = steps_of(dockerfile, context)

    make_image = f"{shlex.quote(sys.executable)} -m venv /image"
    python = [make_image, "PATH=/image/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    if os.environ.get("GUIDE_DOCKER") != "1":
        here = shlex.quote(str(Path(mlflow.__file__).parent.parent))
        there = f"/image/lib/python3.{sys.version_info.minor}/site-packages/here.pth"
        commands_here = shlex.quote(str(Path(sys.executable).parent))
        python.append(f"echo {here} > {there}; PATH=$PATH:{commands_here}")
    (request,) = context.rglob("serving_input_example.json")
    port = DEFAULT_NGINX_SERVER_PORT
    serve = SERVE.format(entrypoint=entrypoint, port=port, request=request)
    serve = f"unshare --net bash -ec {shlex.quote(serve)}"
    (deployed / "script").write_text("\n".join([*python, *steps, serve]))

    layer = deployed / "layer"
    for name in ("upper", "work", "root"):
        (layer / name).mkdir(parents=True)
    try:
        mount = LAYER.format(script=deployed / "script")
        if shell(f"unshare --mount bash -ec '{mount.splitlines()[1]}'", layer).returncode:
            pytest.skip("this machine mounts no overlay: the Docker context is not built")
        command = f"unshare --mount --pid --fork --kill-child bash -ec {shlex.quote(mount)}"
        process = shell(command, layer, timeout=600)
    finally:
        shutil.rmtree(layer)  # up to a gigabyte, of which pytest would keep three
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    store(deployed)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}/1")
    answer = json.loads(process.stdout.splitlines()[-1])
    assert answer["predictions"] == list(model.predict(model.input_example))


# Amazon SageMaker


def test_sagemaker_has_the_endpoint_with_this_model_and_image(deployed):
    """The command runs to its end, against the AWS of moto on loopback."""
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed: SageMaker is not checked")
    moto = pytest.importorskip(
        "moto.server", reason="moto is not installed: SageMaker is not checked"
    )
    places = {
        "REGION": "eu-west-1",
        "ROLE": "arn:aws:iam::123456789012:role/sagemaker",
        "BUCKET": "models",
        "REGISTRY": "123456789012.dkr.ecr.eu-west-1.amazonaws.com",
    }
    (command,) = commands("Amazon SageMaker", "mlflow deployments create")
    for placeholder, value in places.items():
        assert re.search(rf"\b{placeholder}\b", command), placeholder
        command = re.sub(rf"\b{placeholder}\b", value, command)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        login = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
        where = {"region_name": places["REGION"], "endpoint_url": url}
        s3, sagemaker = (boto3.client(name, **login, **where) for name in ("s3", "sagemaker"))
        here = {"LocationConstraint": places["REGION"]}
        s3.create_bucket(Bucket=places["BUCKET"], CreateBucketConfiguration=here)
        process = shell(
            command,
            deployed,
            AWS_ENDPOINT_URL=url,
            AWS_CONFIG_FILE=os.devnull,
            AWS_SHARED_CREDENTIALS_FILE=os.devnull,
            MLFLOW_TRACKING_URI=f"sqlite:///{deployed}/mlflow.db",
            **{key.upper(): value for key, value in login.items()},
        )
        assert process.returncode == 0, process.stderr
        endpoint = sagemaker.describe_endpoint(EndpointName=NAME)
        assert endpoint["EndpointStatus"] == "InService"
        name = endpoint["EndpointConfigName"]
        config = sagemaker.describe_endpoint_config(EndpointConfigName=name)
        (variant,) = config["ProductionVariants"]
        model = sagemaker.describe_model(ModelName=variant["ModelName"])
        assert model["ExecutionRoleArn"] == places["ROLE"]
        container = model["PrimaryContainer"]
        assert container["Image"] == f"{places['REGISTRY']}/{NAME}:1"
        path = urlsplit(container["ModelDataUrl"])
        archive = s3.get_object(Bucket=path.netloc, Key=path.path[1:])["Body"].read()
    finally:
        server.stop()
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        about = yaml.safe_load(files.extractfile("MLmodel"))
    store(deployed)
    assert about["model_id"] == mlflow.models.get_model_info(f"models:/{NAME}/1").model_id


# Azure ML

# https://learn.microsoft.com/cli/azure/ml: the options that a command must have, and may have
AZ_ML = {
    "model create": ({"--name", "--path"}, {"--type", "--version", "--description", "--tags"}),
    "online-endpoint create": ({"--name"}, {"--auth-mode", "--file", "--tags"}),
    "online-deployment create": ({"--file"}, {"--all-traffic", "--endpoint-name", "--name"}),
}


def azure_deployment(folder):
    """Write the deployment's file as the guide does; return its path."""
    for command in commands("Azure ML", "echo"):
        assert shell(command, folder).returncode == 0
    (deploy,) = commands("Azure ML", "az ml online-deployment create")
    return folder / options(deploy)["--file"]


def test_az_has_every_option_and_the_deployment_its_model_and_endpoint(deployed, tmp_path):
    configure, *others = commands("Azure ML", "az ")
    assert re.fullmatch(r"az configure --defaults group=\w+ workspace=\w+", configure)
    given = {}
    for command in others:
        _, _, *words = shlex.split(command)
        must, may = AZ_ML[" ".join(words[:2])]
        used = {word for word in words if word.startswith("--")}
        assert must <= used <= must | may, command
        given[words[0]] = options(command)
    (download,) = commands("Azure ML", "mlflow artifacts download")
    process = shell(download, tmp_path, MLFLOW_TRACKING_URI=f"sqlite:///{deployed}/mlflow.db")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / given["model"]["--path"] / "MLmodel").exists()
    assert json.loads(azure_deployment(tmp_path).read_text()) == {
        "name": "v1",
        "endpoint_name": given["online-endpoint"]["--name"],
        "model": "azureml:{--name}:{--version}".format(**given["model"]),
        "instance_type": "Standard_DS3_v2",
        "instance_count": 1,
    }


def test_azure_ml_takes_model_endpoint_and_deployment(tmp_path):
    """By the schemas that the extension `ml` itself uses."""
    azure = pytest.importorskip(
        "azure.ai.ml", reason="azure-ai-ml is not installed: its schemas are not checked"
    )
    deployment = azure.load_online_deployment(azure_deployment(tmp_path))
    assert (deployment.name, deployment.instance_count) == ("v1", 1)
    loaders = {"model": azure.load_model, "online-endpoint": azure.load_online_endpoint}
    for kind, load in loaders.items():
        (command,) = commands("Azure ML", f"az ml {kind} create")
        fields = {key.strip("-"): value for key, value in options(command).items()}
        assert load(None, params_override=[fields]).name.lower() == fields["name"].lower()


# Google Vertex AI


@pytest.fixture
def gcloud(tmp_path):
    """Run a command of gcloud against a Vertex AI that agrees to all; what was asked is in it."""
    need("gcloud")
    (tmp_path / "token").write_text("none")
    done = {
        "name": "projects/1/locations/us-central1/operations/1",
        "done": True,
        "response": {},
        "supportedDeploymentResourcesTypes": ["DEDICATED_RESOURCES"],
    }
    with loopback(defaultdict(lambda: done)) as (url, asked):

        def call(command):
            return shell(
                command.replace("--region REGION", "--region us-central1"),
                tmp_path,
                CLOUDSDK_CONFIG=tmp_path,
                CLOUDSDK_CORE_PROJECT="our-project",
                CLOUDSDK_CORE_DISABLE_PROMPTS="1",
                CLOUDSDK_AUTH_ACCESS_TOKEN_FILE=tmp_path / "token",
                CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM=f"{url}/",
            )

        yield call, asked


def test_gcloud_deploys_the_image_to_the_endpoint_with_all_traffic(gcloud):
    call, asked = gcloud
    for command in commands("Google Vertex AI", "gcloud"):
        process = call(command)
        assert process.returncode == 0, process.stderr
    place = "/v1/projects/our-project/locations/us-central1"
    posted = [(urlsplit(path), body) for method, path, body in asked if method == "POST"]
    upload, create, deploy = posted
    assert upload[0].path == f"{place}/models:upload"
    assert upload[1]["model"]["containerSpec"] == {
        "imageUri": f"REGISTRY/{NAME}:1",
        "ports": [{"containerPort": DEFAULT_NGINX_SERVER_PORT}],
        "predictRoute": "/invocations",
        "healthRoute": "/ping",
    }
    (endpoint,) = parse_qs(create[0].query)["endpointId"]
    assert (create[0].path, endpoint) == (f"{place}/endpoints", NAME)
    assert deploy[0].path == f"{place}/endpoints/{endpoint}:deployModel"
    model = deploy[1]["deployedModel"]["model"]
    assert model == f"{place.removeprefix('/v1/')}/models/{upload[1]['modelId']}"
    # Without a split the new model gets no traffic: "0" is the one that is being deployed.
    assert deploy[1]["trafficSplit"] == {"0": 100}


def test_gcloud_refuses_a_wrong_option(gcloud):
    """So the test above would see one."""
    call, asked = gcloud
    for command in commands("Google Vertex AI", "gcloud"):
        process = call(command.replace(" --", " --wrong-", 1))
        assert process.returncode == 2
        assert "unrecognized arguments" in process.stderr and not asked


# Databricks


def test_databricks_is_sent_every_field():
    """By Databricks' own client: what it does not know it would leave out, or refuse."""
    (command,) = commands("Databricks", "databricks")
    *words, body = shlex.split(command)
    # https://github.com/databricks/cli, v1.13.0, cmd/workspace/serving-endpoints: "when --json flag
    # is specified, no positional arguments are allowed. Provide 'name' in your JSON input".
    assert words == ["databricks", "serving-endpoints", "create", "--json"]
    body = json.loads(body)
    config = EndpointCoreConfigInput.from_dict(body["config"])
    with loopback(defaultdict(lambda: {"name": NAME})) as (url, asked):
        client = WorkspaceClient(host=url, token="none", auth_type="pat", config_file=os.devnull)
        client.serving_endpoints.create(**body | {"config": config})
    assert asked[-1] == ("POST", "/api/2.0/serving-endpoints", body)
    assert body["name"] == NAME
    assert body["config"]["served_entities"][0]["entity_version"] == "VERSION"


# Kubernetes with KServe

GROUP = "serving.kserve.io"
VERSION = {"version": "v1beta1", "groupVersion": f"{GROUP}/v1beta1"}
KIND = {"name": "inferenceservices", "kind": "InferenceService", "namespaced": True}
STRICT = {  # says that the server checks the fields
    "x-kubernetes-group-version-kind": {"group": "", "version": "v1", "kind": "Namespace"},
    "parameters": [{"name": "fieldValidation", "in": "query"}],
}
CLUSTER = {  # what kubectl asks of one before it sends anything
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
    "/apis": {
        "kind": "APIGroupList",
        "groups": [{"name": GROUP, "versions": [VERSION], "preferredVersion": VERSION}],
    },
    f"/apis/{GROUP}/v1beta1": {
        "kind": "APIResourceList",
        "groupVersion": f"{GROUP}/v1beta1",
        "resources": [KIND | {"verbs": ["get", "create", "patch"]}],
    },
    "/apis/apiextensions.k8s.io/v1/customresourcedefinitions": {
        "kind": "CustomResourceDefinitionList",
        "apiVersion": "apiextensions.k8s.io/v1",
        "items": [{"spec": {"group": GROUP, "names": {"kind": "InferenceService"}}}],
    },
    "/openapi/v3": {"paths": {"api/v1": {"serverRelativeURL": "/openapi/v3/api/v1"}}},
    "/openapi/v3/api/v1": {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "1"},
        "paths": {"/api/v1/namespaces/{name}": {"patch": STRICT}},
    },
}


def test_kubectl_sends_the_inference_service(tmp_path):
    need("kubectl")
    (command,) = commands("Kubernetes", "echo")
    with loopback(CLUSTER) as (url, asked):
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": url}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": ""}}],
            "current-context": "here",
        }
        (tmp_path / "config").write_text(json.dumps(config))
        process = shell(command, tmp_path, KUBECONFIG=tmp_path / "config", HOME=tmp_path)
    assert process.stdout == f"inferenceservice.{GROUP}/{NAME} created\n", process.stderr
    _, path, body = asked[-1]
    assert path.startswith(f"/apis/{GROUP}/v1beta1/namespaces/default/inferenceservices?")
    (container,) = body["spec"]["predictor"]["containers"]
    assert container["image"] == f"REGISTRY/{NAME}:1"


def check_fields(value, kind, packages):
    """Follow a value and its published type down: every field must be known, and of its type."""
    if kind.lower().startswith("list["):
        assert isinstance(value, list)
        for item in value:
            check_fields(item, kind[5:-1], packages)
        return
    found = [getattr(package, kind) for package in packages if hasattr(package, kind)]
    if not found:
        assert type(value).__name__ == kind, (value, kind)
        return
    types, names = found[0].openapi_types, found[0].attribute_map
    fields = {name: types[attribute] for attribute, name in names.items()}
    assert value.keys() <= fields.keys(), value.keys() - fields.keys()
    for name, inner in value.items():
        check_fields(inner, fields[name], packages)


def test_kserve_knows_every_field():
    """By KServe's and Kubernetes' own models of their resources."""
    kserve = pytest.importorskip(
        "kserve.models", reason="kserve is not installed: its models are not checked"
    )
    kubernetes = pytest.importorskip("kubernetes.client")
    (command,) = commands("Kubernetes", "echo")
    manifest = json.loads(shlex.split(command)[1])
    assert manifest["apiVersion"] == f"{GROUP}/v1beta1"
    check_fields(manifest, "V1beta1InferenceService", (kserve, kubernetes))
