"""A server for a team, as the README sets it up: TLS, logins, a name, and a bucket for the files.

The README's commands are run as they stand there, with the words in capitals filled in. The bucket
is moto's: a real S3 API, on this machine. The server for a team has the address 127.0.0.2, which
MLflow does not know, as it knows no name but localhost.
"""

import contextlib
import datetime
import inspect
import ipaddress
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import mlflow
import pytest
import requests
from conftest import ROOT, SCRIPTS, assert_one_line, assert_success, user_env
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from mlflow import environment_variables

import production_deployment

HOST = "127.0.0.2"
NAME = "breast-cancer-classifier"
PASSWORDS = {user: f"password-of-{user}" for user in ("admin", "deployer", "logger", "reader")}

DEPLOY = "python production_deployment.py"  # as in the third block
SECTION = (ROOT / "README.md").read_text().partition("**A tracking server**")[2]
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", SECTION.partition("**Dask")[0], re.M | re.S)


def filled_in(commands, port, **words):
    """Return commands of the README with these words and this port, for this machine only."""
    for word, text in words.items():
        assert re.search(rf"\b{word}\b", commands), f"{word} is not in {commands}"
        commands = re.sub(rf"\b{word}\b", text, commands)
    return commands.replace("5000", str(port)).replace("0.0.0.0", HOST)


def aws_free_env(**extra):
    """Return the environment of a user who has no keys of a bucket."""
    env = {key: value for key, value in user_env().items() if not key.startswith("AWS_")}
    return env | extra


def free_port(host):
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no address {host}; on Linux each machine has")
        return probe.getsockname()[1]


def write_certificates(folder):
    """Write a certificate for HOST, its key, and the certificate of the authority that signs it."""
    ca, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    uses = dict.fromkeys(inspect.signature(x509.KeyUsage).parameters, False)
    signing = x509.KeyUsage(**uses | {"key_cert_sign": True, "digital_signature": True})
    authority = [x509.BasicConstraints(ca=True, path_length=None), signing]
    address = [x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))])]
    now = datetime.datetime.now(datetime.UTC)
    for name, owner, extensions in (("ca", ca, authority), ("cert", key, address)):
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ca")]))
            .public_key(owner.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=name == "ca")
        # Python asks for these two from 3.13 on.
        subject = x509.SubjectKeyIdentifier.from_public_key(owner.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key())
        builder = builder.add_extension(subject, critical=False)
        certificate = builder.add_extension(issuer, critical=False).sign(ca, hashes.SHA256())
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(private)


@contextlib.contextmanager
def running(commands, folder, env):
    """Run commands in a shell of their own until the block ends; what they print is in `log`."""
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            ["bash", "-ec", commands],
            cwd=folder,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            # A gentler signal makes the server wait half a minute for those who are connected.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def wait_for(uri, process, folder):
    """Wait until a server answers. Its /health is open to all, whatever their host and login."""
    deadline = time.monotonic() + 90
    while True:
        try:
            return requests.get(f"{uri}/health", verify=f"{folder}/ca.pem", timeout=5)
        except requests.RequestException:
            log = (folder / "log").read_text()
            assert process.poll() is None and time.monotonic() < deadline, log
            time.sleep(0.2)


@pytest.fixture(scope="module")
def bucket():
    """Yield a client of an S3 API that has a bucket, and the settings for those who may use it."""
    for module, package in (("boto3", "boto3"), ("moto.server", "moto[server]")):
        pytest.importorskip(module, reason=f"{package} is not installed")
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    api = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    api.start()
    endpoint = "http://{}:{}".format(*api.get_host_and_port())
    keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
    s3 = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
    s3.create_bucket(Bucket="bucket")
    settings = {key.upper(): value for key, value in keys.items()}
    yield s3, settings | {"MLFLOW_S3_ENDPOINT_URL": endpoint}
    api.stop()


@pytest.fixture(scope="module")
def servers(bucket, tmp_path_factory):
    """The README's two servers: the plain one, and the one for a team."""
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    if not hasattr(environment_variables, "MLFLOW_AUTH_ADMIN_PASSWORD"):
        pytest.skip("the README's server for a team needs mlflow 3.17")
    plain, team = (tmp_path_factory.mktemp(name) for name in ("plain", "team"))
    write_certificates(team)
    shutil.copy(team / "ca.pem", plain)
    ports = {"plain": free_port("127.0.0.1"), "team": free_port(HOST)}

    # Only the database is another one. Its address holds a percent sign, as a password may: the
    # file that configures the logins has a meaning of its own for it.
    start = re.sub(r"DATABASE=\S+", "DATABASE=sqlite:///100%.db", BLOCKS[0])
    start = filled_in(start, ports["plain"], BUCKET="bucket")
    variables = start.splitlines()[0]
    start_for_team = filled_in(BLOCKS[1], ports["team"], HOST=HOST, PASSWORD=PASSWORDS["admin"])
    env = aws_free_env(
        **bucket[1],
        MLFLOW_WORKERS="1",
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # eight processes for what is not used here
    )
    with (
        running(start, plain, env) as plain_process,
        running(f"{variables}\n{start_for_team}", team, env) as team_process,
    ):
        plain_uri = f"http://127.0.0.1:{ports['plain']}"
        team_uri = f"https://{HOST}:{ports['team']}"
        wait_for(plain_uri, plain_process, plain)
        wait_for(team_uri, team_process, team)
        yield SimpleNamespace(plain=plain_uri, team=team_uri, port=ports["team"], folder=team)


@pytest.fixture(scope="module")
def user_folder(servers, tmp_path_factory):
    """The folder of a user: the script, and the certificate of the authority."""
    folder = tmp_path_factory.mktemp("user")
    for file in (ROOT / SCRIPTS[2], servers.folder / "ca.pem"):
        shutil.copy(file, folder)
    return folder


def started(servers, folder, user, command=DEPLOY):
    """Start a command in a shell of this user, who has made the README's settings."""
    words = {"HOST": HOST, "USER": user, "PASSWORD": PASSWORDS[user]}
    *exports, _ = filled_in(BLOCKS[2], servers.port, **words).splitlines()
    return subprocess.Popen(
        ["bash", "-ec", "\n".join([*exports, command])],
        cwd=folder,
        # This user reaches the server and nothing else: a proxy that is not there stands between.
        env=aws_free_env(http_proxy="http://127.0.0.1:9", no_proxy=HOST),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process):
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def deployed(servers, user_folder):
    """What was printed: the administrator deploys; an added user deploys again and rolls back.

    That user is added by the README's block as it stands. The logger lacks the last grant, and the
    reader has none.
    """
    assert BLOCKS[2].splitlines()[-1] == DEPLOY
    before = sorted(user_folder.iterdir())
    lines = [line for line in BLOCKS[3].splitlines() if line.startswith("client.")]
    commands = filled_in(BLOCKS[3], servers.port, USER="deployer", PASSWORD=PASSWORDS["deployer"])
    for user, count in (("logger", 2), ("reader", 1)):
        more = "\n".join(lines[:count]).replace("PASSWORD", PASSWORDS[user]).replace("USER", user)
        commands = commands.replace("\nEND\n", f"\n{more}\nEND\n")
    adding = started(servers, user_folder, "admin", commands)
    first = ended(started(servers, user_folder, "admin"))
    added = ended(adding)
    assert added.returncode == 0, added.stderr
    second = ended(started(servers, user_folder, "deployer"))
    back = ended(started(servers, user_folder, "deployer", f"{DEPLOY} --rollback"))
    assert sorted(user_folder.iterdir()) == before  # all is on the server
    return [first, second, back]


def ask(servers, user, verb, path, json=None, **options):
    """Send a request to the API of the server for a team, and return the answer."""
    return requests.request(
        verb,
        f"{servers.team}/api/2.0/{path}",
        json=json,
        auth=(user, PASSWORDS[user]),
        verify=f"{servers.folder}/ca.pem",
        timeout=30,
        **options,
    )


def aliases(servers):
    answer = ask(servers, "admin", "GET", f"mlflow/registered-models/get?name={NAME}")
    return {one["alias"]: one["version"] for one in answer.json()["registered_model"]["aliases"]}


def test_a_host_or_a_web_page_that_the_server_does_not_know_is_answered_with_403(servers):
    """The plain server knows localhost alone, the one for a team the name that it is given."""
    search = "mlflow/experiments/search"
    known, stranger = f"{HOST}:{servers.port}", "mlflow.example.com"
    for host, plain, team in ((known, 403, 200), (stranger, 403, 403), ("localhost", 200, 403)):
        headers = {"Host": host}
        uri = f"{servers.plain}/api/2.0/{search}?max_results=1"
        assert requests.get(uri, headers=headers, timeout=30).status_code == plain, host
        answer = ask(servers, "admin", "GET", f"{search}?max_results=1", headers=headers)
        assert answer.status_code == team, host
    # A browser names the page that asks, even where that page is the server's own.
    for page, code in ((servers.team, 200), (f"https://{stranger}", 403)):
        headers = {"Origin": page}
        answer = ask(servers, "admin", "POST", search, {"max_results": 1}, headers=headers)
        assert answer.status_code == code, page


def test_without_logins_whoever_reaches_the_server_can_move_production(servers):
    """The README's reason for the second server, which asks for a login."""
    steps = {
        "registered-models/create": {"name": "any"},
        "model-versions/create": {"name": "any", "source": "s3://bucket/any"},
        "registered-models/alias": {"name": "any", "alias": "production", "version": "1"},
    }
    for uri, code in ((servers.plain, 200), (servers.team, 401)):
        for path, json in steps.items():
            answer = requests.post(
                f"{uri}/api/2.0/mlflow/{path}",
                json=json,
                verify=f"{servers.folder}/ca.pem",
                timeout=30,
            )
            assert answer.status_code == code, (uri, path)


def test_a_wrong_login_or_certificate_ends_in_one_line(servers, user_folder):
    """No login, a wrong one in the address, and an authority that is not known."""
    no_login = "unset MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD"
    address = f"export MLFLOW_TRACKING_URI=https://admin:wrong-secret@{HOST}:{servers.port}"
    cases = {
        no_login: "401",
        f"{no_login}\n{address}": "401",
        "unset MLFLOW_TRACKING_SERVER_CERT_PATH": "certificate",
    }
    processes = [started(servers, user_folder, "admin", f"{case}\n{DEPLOY}") for case in cases]
    for word, process in zip(cases.values(), map(ended, processes), strict=True):
        assert_one_line(process, word)
        assert "wrong-secret" not in process.stdout + process.stderr


def test_the_script_deploys_and_rolls_back_on_the_server(servers, deployed, monkeypatch):
    for process in deployed:
        assert_success(process)
    assert aliases(servers) == {"staging": "2", "production": "1", "previous": "2"}

    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", f"{servers.folder}/ca.pem")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS["reader"])
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    mlflow.set_tracking_uri(servers.team)
    versions = mlflow.search_model_versions(filter_string=f"name = '{NAME}'")
    found = {str(one.version): one.tags["validation_status"] for one in versions}
    assert found == {"1": "passed", "2": "passed"}
    runs = mlflow.search_runs(
        experiment_names=["production-deployment"], order_by=["attributes.start_time ASC"]
    )
    assert list(runs["status"]) == ["FINISHED"] * 3
    assert list(runs["tags.outcome"]) == ["promoted", "promoted", "rolled back"]
    assert list(runs["tags.mlflow.user"]) == ["admin", "deployer", "deployer"]
    # A user who may only read can load what is in production, and it is what was judged.
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    _, test = production_deployment.load_data()
    assert (model.predict(test.X) == test.y).mean() == runs["metrics.score"][0]


def test_the_server_alone_reaches_the_bucket(servers, deployed, bucket):
    """A user gets the files from the server, and they are those in the bucket, below the prefix."""
    experiments = ask(servers, "reader", "GET", "mlflow/experiments/search?max_results=9").json()
    places = {one["artifact_location"] for one in experiments["experiments"]}
    assert all(place.startswith("mlflow-artifacts:/") for place in places)
    files = bucket[0].list_objects_v2(Bucket="bucket")["Contents"]
    paths = [file["Key"].removeprefix("mlflow/") for file in files]
    for name, count in (("MLmodel", 2), ("model.skops", 2), ("confusion.png", 2)):
        same = [path for path in paths if path.endswith(f"/{name}")]
        assert len(same) == count, paths
        body = bucket[0].get_object(Bucket="bucket", Key=f"mlflow/{same[0]}")["Body"].read()
        answer = ask(servers, "reader", "GET", f"mlflow-artifacts/artifacts/{same[0]}")
        assert answer.content == body and body
    assert not list(servers.folder.glob("**/MLmodel"))


def test_a_user_without_the_right_cannot_move_production(servers, deployed, user_folder):
    """Nor change its files, as one can who may edit the experiment: the README says so."""
    before = aliases(servers)
    process = ended(started(servers, user_folder, "reader", f"{DEPLOY} --rollback"))
    assert_one_line(process, "403", "Permission denied")

    alias = {"name": NAME, "alias": "production"}
    path = f"mlflow/registered-models/alias?name={NAME}&alias=production"
    source = ask(servers, "reader", "GET", path).json()["model_version"]["source"]
    path = f"mlflow/logged-models/{source.removeprefix('models:/')}"
    place = ask(servers, "reader", "GET", path).json()["model"]["info"]["artifact_uri"]
    file = f"mlflow-artifacts/artifacts/{place.removeprefix('mlflow-artifacts:/')}/MLmodel"
    content = ask(servers, "reader", "GET", file).content
    for user, may_write_files in (("reader", 403), ("logger", 200)):
        for verb, path, json in (
            ("POST", "registered-models/alias", {**alias, "version": "2"}),
            ("DELETE", "registered-models/alias", alias),
            ("POST", "model-versions/create", {"name": NAME, "source": source}),
            ("DELETE", "model-versions/delete", {"name": NAME, "version": "1"}),
        ):
            answer = ask(servers, user, verb, f"mlflow/{path}", json)
            assert answer.status_code == 403, (user, verb, path)
        answer = ask(servers, user, "PUT", file, data=content)
        assert answer.status_code == may_write_files, user
    assert aliases(servers) == before


def test_no_password_is_printed_or_stored(servers, deployed, bucket):
    for process in deployed:
        for password in PASSWORDS.values():
            assert password not in process.stdout + process.stderr
    s3 = bucket[0]
    kept = [
        s3.get_object(Bucket="bucket", Key=file["Key"])["Body"].read()
        for file in s3.list_objects_v2(Bucket="bucket")["Contents"]
    ]
    # The database, and what the server prints.
    kept += [file.read_bytes() for file in servers.folder.iterdir()]
    for password in PASSWORDS.values():
        assert not any(password.encode() in content for content in kept)
    assert (servers.folder / "basic_auth.ini").stat().st_mode & 0o077 == 0
