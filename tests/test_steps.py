"""The shape of the scripts, and their steps one by one: each can be pasted into a notebook."""

import ast
import re
import sys
import tomllib
from functools import partial
from importlib.metadata import packages_distributions, requires
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SCRIPTS, children, store
from matplotlib.figure import Figure
from mlflow.models import MetricThreshold
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import make_classification, make_regression
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, mean_absolute_error
from sklearn.model_selection import (
    KFold,
    RepeatedKFold,
    RepeatedStratifiedKFold,
    StratifiedKFold,
    cross_val_score,
    train_test_split,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

TUNING, COMPARISON, DEPLOYMENT = SCRIPTS
SHARED = "# The rest is the same in all three scripts"
TEXTS = {script: (ROOT / script).read_text() for script in SCRIPTS}
TREES = {script: ast.parse(text) for script, text in TEXTS.items()}
Definition = ast.FunctionDef | ast.ClassDef
# What the check of a model needs beside functions: the lists of what it lets through.
CHECK = ("MODEL_FILES", "FLAVORS", "FREE_SETTINGS", "PACKAGES", "ENVIRONMENT_LINE")


def definitions(script):
    """Return the functions and classes at the top level of a script, by name, in their order."""
    return {node.name: node for node in TREES[script].body if isinstance(node, Definition)}


def constants(script):
    """Return the settings and other constants at the top level of a script, by name."""
    assigned = (node for node in TREES[script].body if isinstance(node, ast.Assign))
    return {node.targets[0].id: node for node in assigned}


def names_in(node):
    """Return the names that a piece of code mentions, in their order."""
    found = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    found.sort(key=lambda name: (name.lineno, name.col_offset))
    return list(dict.fromkeys(name.id for name in found))


def in_the_shared_part(script, node):
    return node.lineno > TEXTS[script].split(SHARED)[0].count("\n")


# ---- Shape


def test_the_last_part_of_the_three_scripts_is_identical():
    (shared,) = {text[text.index(SHARED) :] for text in TEXTS.values()}
    for name in ("Rows", "load_data", "add_preprocessing", "log_model", "open_store"):
        assert re.search(rf"^(def|class) {name}\(", shared, re.M)


def test_what_has_one_name_in_two_scripts_is_one_thing():
    """A setting, a metric or a function can be copied from either. What is told differs."""
    own = {"EXPERIMENT", "main", "parse_args", "show_progress", "print_report"}
    seen = {}
    for script in SCRIPTS:
        for name, node in (definitions(script) | constants(script)).items():
            seen.setdefault(name, set()).add(ast.unparse(node))
    assert {name for name, versions in seen.items() if len(versions) > 1} == own
    for name in ("SEED", "TEST_SIZE", "METRICS", "TRUSTED", "UserError", "Refused"):
        assert all(name in definitions(script) | constants(script) for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_function_is_longer_than_40_lines(script):
    lines = TEXTS[script].split("\n")
    for name, node in definitions(script).items():
        length = sum(1 for line in lines[node.lineno - 1 : node.end_lineno] if line.strip())
        assert length <= 40, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_comes_first_and_its_steps_in_the_order_of_the_story(script):
    """Settings and exceptions, then `main`, then what it calls, then what is the same in all."""
    functions = {
        name: node
        for name, node in definitions(script).items()
        if isinstance(node, ast.FunctionDef)
    }
    assert next(iter(functions)) == "main"
    before = [
        name for name, node in definitions(script).items() if node.lineno < functions["main"].lineno
    ]
    assert before == ["UserError", "Refused"]
    # Aside stand two other commands, and the checks of a model: one may skip them at first.
    checks = {"load_checked", "check_skops", "check_logged_model"}
    aside = {"deploy", "roll_back", "print_history", *checks}
    story = [functions[name] for name in ("main", "deploy") if name in functions]
    steps = [
        functions[name].lineno
        for teller in story
        for name in names_in(teller)
        if name in functions and name not in aside
        if not in_the_shared_part(script, functions[name])
    ]
    assert len(steps) > 8 and steps == sorted(steps)


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_stands_in_a_script_that_it_does_not_use(script):
    """No function, class, setting or import: a reader would look for where it matters."""
    mentioned = {node.id for node in ast.walk(TREES[script]) if isinstance(node, ast.Name)}
    called = {
        node.id
        for node in ast.walk(TREES[script])
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in TREES[script].body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported - mentioned == set()
    assert set(definitions(script)) - called == set()
    assert set(constants(script)) - called == set()


def test_only_main_reads_settings_so_that_every_other_function_can_be_pasted():
    """The story hands them on. Two functions need what stands right above them copied along."""
    reads = {}
    for script in SCRIPTS:
        for name, node in definitions(script).items():
            if found := set(names_in(node)) & set(constants(script)):
                reads.setdefault(name, set()).update(found)
    assert reads.pop("parse_args") == {"METRICS"}
    assert reads.pop("main") >= {"EXPERIMENT"} and reads.pop("deploy") >= {"METRICS"}
    assert reads == {
        "why_unsafe": set(CHECK) - {"PACKAGES"},
        "deployment_guide": {"GUIDE"},
    }


@pytest.fixture(scope="module")
def installed():
    """The packages that each module which can be imported comes from."""
    return packages_distributions()


def normal(package):
    return re.sub("[-_.]+", "-", package).lower()


@pytest.mark.parametrize("script", SCRIPTS)
def test_four_packages_are_enough(script, installed):
    """The header for `uv run` names those of requirements.txt; they bring what is imported."""
    wanted = (ROOT / "requirements.txt").read_text().split()
    (header,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", TEXTS[script], re.M)
    header = tomllib.loads(re.sub("^# ?", "", header, flags=re.M))
    assert header == {"requires-python": ">=3.11", "dependencies": wanted}

    four = {re.match(r"[\w-]+", line)[0] for line in wanted}
    assert four == {"mlflow", "scikit-learn", "pandas", "numpy"}
    declared = {
        normal(re.match(r"[\w.-]+", requirement)[0])
        for package in four
        for requirement in requires(package) or []
        if "extra ==" not in requirement
    }
    modules = {
        name.split(".")[0]
        for node in ast.walk(TREES[script])
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not modules & {name.removesuffix(".py") for name in SCRIPTS}, "each stands alone"
    third_party = modules - sys.stdlib_module_names
    assert {"mlflow", "numpy", "pandas", "sklearn"} <= third_party
    packages = {normal(installed[module][0]) for module in third_party}
    # A model's requirements are looked up too, so they must be installed.
    (pinned,) = re.findall(r"packages = (\[.*\])", TEXTS[script])
    assert packages | set(ast.literal_eval(pinned)) <= four | declared


# ---- Pasted into an empty notebook


def paste(script, *names, along=(), instead=()):
    """Run the source of some functions, alone, as in an empty notebook; return what is then there.

    With them come the imports of the script, and the functions and classes that they name: but no
    setting, unless it is to come `along`. Some names may stand for another thing `instead`.
    """
    known = definitions(script)
    needed, todo = set(), list(names)
    while todo:
        name = todo.pop()
        needed.add(name)
        todo += [other for other in names_in(known[name]) if other in known.keys() - needed]
    cell = [
        node
        for node in TREES[script].body
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, Definition) and node.name in needed)
        or (isinstance(node, ast.Assign) and node.targets[0].id in along)
    ]
    notebook = {"__name__": "notebook"}
    exec(compile(ast.Module(cell, type_ignores=[]), script, "exec"), notebook)
    notebook.update(instead)
    return SimpleNamespace(**notebook)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The ID of an experiment in an empty store."""
    store(tmp_path_factory.mktemp("steps"))
    return mlflow.set_experiment("steps").experiment_id


def table_of(X, y, name="rows"):
    """Return rows as a step takes them: X, y and their MLflow data set."""
    table = pd.concat([X, y], axis="columns")
    return SimpleNamespace(
        X=X, y=y, dataset=mlflow.data.from_pandas(table, targets=y.name, name=name)
    )


@pytest.fixture(scope="module")
def parts():
    """Training rows and hold-out rows of two classes that are hard to tell apart."""
    X, y = make_classification(300, 4, weights=[0.7], class_sep=0.7, flip_y=0.1, random_state=0)
    X = pd.DataFrame(X, columns=list("abcd"))
    y = pd.Series(np.where(y, "yes", "no"), name="answer")
    return table_of(X[:200], y[:200], "train"), table_of(X[200:], y[200:], "test")


macro_f1 = partial(f1_score, average="macro", zero_division=0)


def close(value):
    return pytest.approx(value, abs=1e-9)


def scaled(model):
    """What add_preprocessing comes to for a table of numbers without gaps."""
    return make_pipeline(StandardScaler(), model)


def ranked_table(cv_f1, **columns):
    """Return a table such as mlflow.search_runs gives; each row has a name of its own."""
    table = pd.DataFrame({"metrics.cv_f1": cv_f1} | columns)
    table["tags.mlflow.runName"] = [f"trial-{number:04}" for number in range(1, len(table) + 1)]
    return table


# Tuning


def test_make_trials_names_each_combination_and_takes_numpys_numbers():
    tuning = paste(TUNING, "make_trials")
    grid = {"max_depth": np.arange(2, 4), "max_features": ["sqrt", 0.5], "criterion": ("gini",)}
    trials = tuning.make_trials(grid)
    assert list(trials) == ["trial-0001", "trial-0002", "trial-0003", "trial-0004"]
    assert list(trials.values()) == [
        {"criterion": "gini", "max_depth": depth, "max_features": share}
        for depth in (2, 3)
        for share in ("sqrt", 0.5)
    ]
    assert {type(params["max_depth"]) for params in trials.values()} == {int}
    with pytest.raises(tuning.UserError, match="max_dept"):
        tuning.make_trials({"max_dept": [1]})


def test_run_trial_gives_scikit_learns_scores(parts):
    train, _ = parts
    run_trial = paste(TUNING, "run_trial").run_trial
    params = {"max_depth": 3, "n_estimators": 7}
    metrics = run_trial(params, train.X, train.y, "f1", macro_f1, n_folds=3, seed=1)
    model = scaled(RandomForestClassifier(**params, random_state=1))
    folds = StratifiedKFold(3, shuffle=True, random_state=1)
    scores = cross_val_score(model, train.X, train.y, cv=folds, scoring="f1_macro")
    assert metrics["cv_f1"] == close(scores.mean()) and metrics["cv_f1_std"] == close(scores.std())
    assert set(metrics) == {"cv_f1", "cv_f1_std", "fit_seconds"} and metrics["fit_seconds"] > 0


def test_start_trials_yields_each_trial_and_the_error_of_one_that_fails(parts, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    train, _ = parts
    start_trials = paste(TUNING, "start_trials").start_trials
    trials = {"bad": {"max_depth": -1}, "good": {"n_estimators": 3}}
    with start_trials(trials, train, "f1", macro_f1, n_folds=2, seed=0) as results:
        ended = {trial.name: trial for trial in results}
    assert ended["bad"].metrics == {} and "max_depth" in ended["bad"].error
    assert ended["good"].metrics["cv_f1"] > 0 and ended["good"].error == ""
    assert {name: trial.params for name, trial in ended.items()} == trials


def test_trials_are_logged_ranked_and_found_unfinished(experiment, parts):
    """log_trial, find_best_trials and unfinished_trials work on the same runs of MLflow."""
    tuning = paste(TUNING, "TrialResult", "log_trial", "find_best_trials", "unfinished_trials")
    settings = {"grid": "{'a': [1, 2]}"}
    trials = {f"trial-{number:04}": {"a": number} for number in range(1, 7)}
    scores = {"trial-0003": 0.7, "trial-0001": 0.8, "trial-0002": 0.8, "trial-0004": 0.75}
    with mlflow.start_run() as search:
        mlflow.log_params(settings)
        for name, score in scores.items():
            tuning.log_trial(
                tuning.TrialResult(name, trials[name], {"cv_f1": score}, ""), parts[0].dataset
            )
        failed = tuning.TrialResult("trial-0005", trials["trial-0005"], {}, "ValueError: no")
        tuning.log_trial(failed, parts[0].dataset)
        assert mlflow.active_run().info.run_id == search.info.run_id
    logged = children(search)
    assert logged["trial-0001"].data.params == {"a": "1"}
    assert logged["trial-0001"].data.metrics == {"cv_f1": 0.8}
    assert logged["trial-0005"].info.status == "FAILED"
    assert logged["trial-0005"].data.tags["error"] == "ValueError: no"

    search_id = search.info.run_id
    ranked = tuning.find_best_trials(search_id, "f1")
    best_first = ["trial-0001", "trial-0002", "trial-0004", "trial-0003"]
    assert list(ranked["tags.mlflow.runName"]) == best_first

    with pytest.raises(tuning.UserError, match=search_id):
        tuning.unfinished_trials(search_id, trials, settings)
    client = mlflow.MlflowClient()
    client.update_run(search_id, status="KILLED")
    client.update_run(logged["trial-0004"].info.run_id, status="RUNNING")
    with pytest.raises(tuning.UserError, match=search_id):
        tuning.unfinished_trials(search_id, trials, {"grid": "another"})
    todo = tuning.unfinished_trials(search_id, trials, settings)
    assert todo == {name: trials[name] for name in ("trial-0004", "trial-0005", "trial-0006")}
    assert "trial-0004" not in children(search), "half logged: it is run again"


def test_the_cheapest_is_sought_within_one_standard_error_of_the_best():
    """Of a mean over five folds: their standard deviation over √4, as NumPy's divides by n."""
    cheapest = paste(
        TUNING, "cheapest_within_one_standard_error"
    ).cheapest_within_one_standard_error
    ranked = ranked_table(
        [0.90, 0.89, 0.881, 0.879],
        **{"metrics.cv_f1_std": [0.04, 0.9, 0.9, 0.9], "metrics.fit_seconds": [9.0, 5.0, 3.0, 1.0]},
    )
    assert cheapest(ranked, "f1", n_folds=5)["tags.mlflow.runName"] == "trial-0003"
    assert cheapest(ranked, "f1", n_folds=10)["tags.mlflow.runName"] == "trial-0002"


def test_values_at_the_edge_say_which_way_to_widen_the_grid():
    """For numbers of which several were tried: true and false have no beyond."""
    values_at_the_edge = paste(TUNING, "values_at_the_edge").values_at_the_edge
    grid = {
        "low": [1, 2, 3],
        "high": np.arange(3),
        "inside": [0.1, 0.2, 0.3],
        "only": [7],
        "text": ["gini", "entropy"],
        "none": [3, None],
        "switch": [True, False],
    }
    params = {"low": 1, "high": 2, "inside": 0.2, "only": 7, "text": "gini", "none": 3}
    edges = values_at_the_edge(params | {"switch": True}, grid)
    assert set(edges) == {"low", "high"}
    assert "smaller" in edges["low"] and "larger" in edges["high"]


def test_scores_are_laid_out_over_the_grid_and_averaged_by_value():
    """Worked out by hand for a search of six, ranked; parameters are text in MLflow."""
    tuning = paste(TUNING, "scores_over_grid", "mean_scores", "draw_search")
    grid = {"depth": [1, 10], "trees": [5, 20, 100]}
    names = [("10", "5"), ("1", "20"), ("10", "100"), ("1", "5"), ("10", "20"), ("1", "100")]
    numbers = [4, 2, 6, 1, 5, 3]
    ranked = pd.DataFrame(
        {
            "tags.mlflow.runName": [f"trial-{number:04}" for number in numbers],
            "params.depth": [depth for depth, _ in names],
            "params.trees": [trees for _, trees in names],
            "metrics.cv_f1": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
        }
    )
    table = tuning.scores_over_grid(ranked, grid, "f1")
    assert [*map(str, table.columns)] == ["5", "20", "100"] and [*map(str, table.index)] == [
        "1",
        "10",
    ]
    assert table.to_numpy() == close(np.array([[0.6, 0.8, 0.4], [0.9, 0.5, 0.7]]))
    means = tuning.mean_scores(ranked, grid, "f1")
    assert list(means["depth"].index) == ["1", "10"] and list(means["trees"].index) == [
        "5",
        "20",
        "100",
    ]
    assert list(means["depth"]) == close([0.6, 0.7])
    assert list(means["trees"]) == close([0.75, 0.65, 0.55])

    figure = tuning.draw_search(table, means, "f1")
    grid_axes, means_axes = figure.axes[:2]
    assert np.asarray(grid_axes.images[0].get_array()) == close(table.to_numpy())
    assert [text.get_text() for text in grid_axes.get_xticklabels()] == ["5", "20", "100"]
    assert (grid_axes.get_xlabel(), grid_axes.get_ylabel()) == ("trees", "depth")
    assert [len(line.get_xdata()) for line in means_axes.lines] == [2, 3]
    # A grid of one parameter, and of one value.
    alone = ranked.iloc[[0, 2, 4]]
    for one in ({"trees": [5, 20, 100]}, {"depth": [10]}):
        row = tuning.scores_over_grid(alone, one, "f1")
        assert row.shape == (1, len(next(iter(one.values()))))
        assert len(tuning.draw_search(row, tuning.mean_scores(alone, one, "f1"), "f1").axes) == 3


def test_refit_best_logs_the_model_and_its_score_on_the_hold_out(experiment, parts):
    train, test = parts
    params = {"n_estimators": 5, "max_depth": 3}
    tuning = paste(TUNING, "refit_best", along=["TRUSTED"])
    with mlflow.start_run() as active:
        tuning.refit_best(params, train, test, "f1", macro_f1, 0, tuning.TRUSTED)
    run = mlflow.get_run(active.info.run_id)
    model = scaled(RandomForestClassifier(**params, random_state=0)).fit(train.X, train.y)
    assert run.data.metrics["test_f1"] == close(macro_f1(test.y, model.predict(test.X)))
    assert run.data.metrics["baseline_test_f1"] == close(macro_f1(test.y, ["no"] * len(test.y)))
    (output,) = run.outputs.model_outputs
    logged = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    assert list(logged.predict(test.X)) == list(model.predict(test.X))


# Comparison


def test_candidates_and_their_folds(parts, capsys):
    train, _ = parts
    comparison = paste(COMPARISON, "make_candidates", "make_folds")
    names = ["logistic_regression", "svm", "gradient_boosting", "random_forest"]
    for n_rows, said in ((10_000, ""), (10_001, "Nystroem")):
        candidates = comparison.make_candidates(n_rows, seed=3)
        printed = capsys.readouterr().out
        assert list(candidates) == names and said in printed and bool(said) == bool(printed)
        assert candidates["random_forest"].random_state == 3
    for n_folds, most, repeats in ((5, 3, 3), (4, 80, 75)):
        folds = comparison.make_folds(train, n_folds, most, seed=1)
        splitter = RepeatedStratifiedKFold(n_splits=n_folds, n_repeats=repeats, random_state=1)
        expected = list(splitter.split(train.X, train.y))
        assert len(folds) == n_folds * repeats
        for fold, one in zip(folds, expected, strict=True):
            assert all(np.array_equal(rows, others) for rows, others in zip(fold, one, strict=True))


def test_folds_are_scored_like_scikit_learn_does(parts):
    train, _ = parts
    comparison = paste(COMPARISON, "score_fold", "score_folds", "summarize_folds")
    folds = list(StratifiedKFold(4).split(train.X, train.y))
    metrics = {"accuracy": accuracy_score, "f1": macro_f1}
    model = LogisticRegression()
    scores = comparison.score_folds(model, train.X, train.y, folds, metrics)
    for name, scoring in (("accuracy", "accuracy"), ("f1", "f1_macro")):
        expected = cross_val_score(model, train.X, train.y, cv=folds, scoring=scoring)
        assert list(scores[name]) == close(list(expected))
        summary = comparison.summarize_folds(scores)
        assert summary[f"cv_{name}"] == close(expected.mean())
        assert summary[f"cv_{name}_std"] == close(expected.std())
    assert set(scores) == {"accuracy", "f1", "fit_seconds"}
    one = comparison.score_fold(model, train.X, train.y, folds[2], metrics)
    assert one["f1"] == close(scores["f1"][2]) and one["fit_seconds"] > 0
    assert not hasattr(model, "coef_"), "the caller's model stays unfitted"


@pytest.mark.parametrize("n_folds", [5, 10])
def test_probabilities_are_those_of_the_correlated_t_test(n_folds):
    """Written out: a Student distribution with the variance of Nadeau and Bengio."""
    comparison = paste(COMPARISON, "probabilities", "posterior_of_mean")
    differences = pd.Series(np.random.default_rng(0).normal(-0.01, 0.02, 3 * n_folds))
    n, mean = len(differences), differences.mean()
    test_share = 1 / n_folds
    variance = sum((differences - mean) ** 2) / (n - 1)
    scale = (variance * (1 / n + test_share / (1 - test_share))) ** 0.5
    worse = stats.t.cdf((-0.01 - mean) / scale, n - 1)
    better = 1 - stats.t.cdf((0.01 - mean) / scale, n - 1)
    p = comparison.probabilities(differences, 0.01, n_folds)
    assert (p["p_worse"], p["p_better"]) == (close(worse), close(better))
    assert p["p_equivalent"] == close(1 - worse - better) and 0 < better < worse < 1
    posterior = comparison.posterior_of_mean(differences, n_folds)
    assert (posterior.mean(), posterior.args, posterior.kwds["df"]) == (close(mean), (), n - 1)
    same = comparison.probabilities(pd.Series([0.0] * n), 0.01, n_folds)
    assert same == close({"p_worse": 0, "p_equivalent": 1, "p_better": 0})


@pytest.fixture(scope="module")
def logged(experiment, parts):
    """The IDs of three models of the training rows, each logged in a run of its own."""
    train, _ = parts
    names = ("log_model", "log_rows", "add_preprocessing")
    step = paste(COMPARISON, *names, along=["TRUSTED"])
    models, ids = [LogisticRegression(C=C) for C in (1, 1e-9, 2)], []
    for model in models:
        with mlflow.start_run():
            step.log_rows(training=train)
            fitted = step.add_preprocessing(model, train.X).fit(train.X, train.y)
            ids.append(step.log_model(fitted, train.X, step.TRUSTED))
    return ids


def test_models_are_ranked_by_mlflow_and_cost_what_is_measured(experiment, parts, logged):
    """Of equal scores the one that was logged first comes first."""
    train, _ = parts
    comparison = paste(COMPARISON, "find_best_models", "measure_serving_cost")
    for model_id, score in zip(logged, (0.8, 0.9, 0.8), strict=True):
        source = mlflow.get_logged_model(model_id).source_run_id
        mlflow.MlflowClient().log_metric(
            source,
            "cv_f1",
            score,
            model_id=model_id,
            dataset_name=train.dataset.name,
            dataset_digest=train.dataset.digest,
        )
        mlflow.set_logged_model_tags(model_id, {"comparison": "this"})
    models = comparison.find_best_models(experiment, "this", "f1", train)
    assert [model.model_id for model in models] == [logged[1], logged[0], logged[2]]
    assert comparison.find_best_models(experiment, "another", "f1", train) == []

    served = mlflow.pyfunc.load_model(models[0].model_uri)
    costs = comparison.measure_serving_cost(served, train.X, seed=0)
    assert 0 < costs["latency_ms_p50"] <= costs["latency_ms_p95"] < 1000
    assert costs["rows_per_second"] > 1000 / costs["latency_ms_p50"]
    assert costs["model_size_bytes"] == served.metadata.model_size_bytes > 1000


def test_recommended_is_the_fastest_that_is_hardly_worse():
    """Best first in the table; latencies within the noise count as equal."""
    recommend = paste(COMPARISON, "recommend").recommend

    def name_of(p_worse, p_above, latency, risk=0.2, noise=1.1):
        columns = {
            "metrics.p_worse": p_worse,
            "metrics.p_above_baseline": p_above,
            "metrics.latency_ms_p50": latency,
        }
        row = recommend(ranked_table([0.9, 0.8, 0.7], **columns), risk, noise)
        return None if row is None else row["tags.mlflow.runName"][-1]

    assert name_of([0, 0.1, 0.1], [1, 1, 1], [9, 5, 3]) == "3"
    assert name_of([0, 0.1, 0.1], [1, 1, 1], [9, 3.2, 3]) == "2", "equally fast: the better one"
    assert name_of([0, 0.1, 0.3], [1, 1, 1], [9, 5, 3]) == "2", "the fastest is likely worse"
    assert name_of([0, 0.2, 0.2], [1, 1, 0.8], [9, 5, 3]) == "3", "as much risk as is allowed"
    assert name_of([0, 0.1, 0.1], [1, 1, 0.7], [9, 5, 3]) == "2", "it may be a baseline"
    assert name_of([0, 0.1, 0.1], [0.7, 0.7, 0.7], [9, 5, 3]) is None
    assert name_of([0, 0.1, np.nan], [1, 1, np.nan], [9, 5, np.nan]) == "2", "one has failed"
    assert name_of([0, 0.1, 0.1], [1, 1, 1], [9, 5, 3], risk=0.05) == "1"
    assert name_of([0, 0.1, 0.1], [1, 1, 1], [9, 5, 3], noise=2) == "2"


def test_the_pictures_of_a_comparison_show_its_numbers(parts):
    comparison = paste(COMPARISON, "draw_differences", "draw_costs", "draw_confusion")
    left, middle, right = Figure().subplots(1, 3)
    rng = np.random.default_rng(0)
    scores = pd.DataFrame({"good": rng.normal(0.9, 0.02, 20), "bad": rng.normal(0.8, 0.02, 20)})
    comparison.draw_differences(left, scores, ["good", "bad", "failed"], "f1", 0.03, 10)
    interval, point = left.lines[2], left.lines[3]
    differences = scores["bad"] - scores["good"]
    scale = (differences.var() * (1 / 20 + 1 / 9)) ** 0.5
    assert list(interval.get_xdata()) == close(
        stats.t.interval(0.95, 19, differences.mean(), scale)
    )
    assert list(point.get_xdata()) == close([differences.mean()])
    band = left.patches[0].get_extents().transformed(left.transData.inverted())
    assert (band.x0, band.x1) == (close(-0.03), close(0.03))
    assert "f1" in left.get_xlabel()

    ranked = ranked_table([0.9, 0.8, 0.7, np.nan], **{"metrics.latency_ms_p50": [5, 2, 3, np.nan]})
    comparison.draw_costs(middle, ranked, "f1")
    every, front = middle.lines
    assert sorted(zip(*every.get_data(), strict=True)) == [(2, 0.8), (3, 0.7), (5, 0.9)]
    assert list(zip(*front.get_data(), strict=True)) == [(2, 0.8), (5, 0.9)], "beaten by no other"
    assert {text.get_text() for text in middle.texts} == {"trial-0001", "trial-0002", "trial-0003"}

    y = pd.Series(["a"] * 4 + ["b"] * 2)
    comparison.draw_confusion(right, y, ["a", "a", "a", "b", "a", "b"], "Title")
    cells = [text.get_text() for text in right.texts]
    assert cells == ["3\n75%", "1\n25%", "1\n50%", "1\n50%"]
    assert [text.get_text() for text in right.get_yticklabels()] == ["a", "b"]


# Deployment


def test_a_model_is_registered_and_loaded_after_a_check(parts, logged):
    train, test = parts
    deployment = paste(DEPLOYMENT, "register", "load_checked", along=(*CHECK, "TRUSTED"))
    assert deployment.register("registered", logged[0], train) == "1"
    assert deployment.register("registered", logged[1], train) == "2"
    client = mlflow.MlflowClient()
    assert str(client.get_model_version_by_alias("registered", "staging").version) == "2"
    assert client.get_model_version("registered", "2").source == f"models:/{logged[1]}"
    description = client.get_registered_model("registered").description
    assert all(words in description for words in ("`answer`: no, yes", "a, b, c, d", "@production"))

    model = deployment.load_checked("models:/registered/1", train.X.columns, deployment.TRUSTED)
    expected = mlflow.pyfunc.load_model(f"models:/{logged[0]}").predict(test.X)
    assert list(model.predict(test.X)) == list(expected)
    with pytest.raises(deployment.UserError, match="columns"):
        deployment.load_checked("models:/registered/1", ["a", "b"], deployment.TRUSTED)
    with mlflow.start_run():
        info = mlflow.sklearn.log_model(
            LogisticRegression().fit(train.X, train.y), serialization_format="cloudpickle"
        )
    with pytest.raises(deployment.UnusableModel, match="could run code"):
        deployment.load_checked(info.model_uri, train.X.columns, deployment.TRUSTED)
    with pytest.raises(deployment.UnusableModel, match="numpy.dtype"):
        deployment.load_checked("models:/registered/1", train.X.columns, [])


class Always(ClassifierMixin, BaseEstimator):
    """A model as MLflow loads one, as far as a step uses it: it gives the same answers always."""

    input_example = None

    def __init__(self, answers):
        self.answers = answers

    def predict(self, X):
        return np.asarray(self.answers)[: len(X)]


def test_a_candidate_is_evaluated_alone_and_beside_the_champion(parts, logged):
    train, test = parts
    deployment = paste(DEPLOYMENT, "evaluate", "compare", "missed_limits")
    model = mlflow.pyfunc.load_model(f"models:/{logged[0]}")
    figures = deployment.evaluate(model, train, test, macro_f1)
    score = macro_f1(test.y, model.predict(test.X))
    baseline = macro_f1(test.y, ["no"] * len(test.y))
    assert figures["score"] == close(score) and figures["above_baseline"] == close(score - baseline)
    assert 0 < figures["latency_ms"] < 1000
    assert figures["answers_its_example"] == figures["refuses_a_missing_column"] == 1
    careless = deployment.evaluate(Always(test.y), train, test, macro_f1)
    assert careless["answers_its_example"] == careless["refuses_a_missing_column"] == 0

    champion = Always(test.y)
    beside = deployment.compare(model, champion, test, macro_f1, 0.5, 0)
    assert beside["below_production"] == close(1 - score) and beside["p_below_production"] == 0
    assert deployment.compare(model, None, test, macro_f1, 0.5, 0) == {}

    gate = {
        "score": MetricThreshold(threshold=1.0, greater_is_better=True),
        "below_production": MetricThreshold(threshold=1 - score, greater_is_better=False),
    }
    (missed,) = deployment.missed_limits(figures | beside, gate)
    assert "score" in missed and "below_production" not in missed
    assert deployment.missed_limits({"score": 1.0, "below_production": 0.0}, gate) == []


def test_the_probability_of_a_loss_is_that_of_a_paired_bootstrap():
    """Of accuracies, exact: how many rows are lost follows a binomial distribution."""
    probability_of_loss = paste(DEPLOYMENT, "probability_of_loss").probability_of_loss
    y = pd.Series(["a", "b"] * 50)
    wrong = y.where(np.arange(100) >= 5, "c")  # five of a hundred rows
    for tolerance, most in ((0.02, 2), (0.04, 4), (0.07, 7)):
        p = probability_of_loss(y, wrong, y, accuracy_score, tolerance, seed=0, draws=600)
        assert p == pytest.approx(stats.binom.sf(most, 100, 0.05), abs=0.06)
    again = probability_of_loss(y, wrong, y, accuracy_score, tolerance, seed=0, draws=600)
    other = probability_of_loss(y, wrong, y, accuracy_score, tolerance, seed=1, draws=600)
    assert again == p != other
    assert probability_of_loss(y, y, wrong, accuracy_score, 0.0, seed=0, draws=50) == 0
    # Both are wrong on the same rows: nothing is lost, whichever rows are drawn.
    assert probability_of_loss(y, wrong, wrong, accuracy_score, 0.0, seed=0, draws=50) == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_promotion_moves_both_aliases_and_one_at_a_time(experiment, parts, logged):
    deployment = paste(
        DEPLOYMENT, "register", "promote", "previous_version", "one_promotion_at_a_time"
    )
    client, name = mlflow.MlflowClient(), "promoted"

    def aliases():
        found = client.get_registered_model(name).aliases
        return {alias: str(number) for alias, number in found.items() if alias != "staging"}

    for model_id in logged:
        deployment.register(name, model_id, parts[0])
    with mlflow.start_run(), deployment.one_promotion_at_a_time(experiment, name):
        deployment.promote(name, "1", replaces=None)
    assert aliases() == {"production": "1"} and deployment.previous_version(name, aliases()) is None
    with mlflow.start_run() as active:
        deployment.promote(name, "2", replaces="1")
    assert aliases() == {"production": "2", "previous": "1"}
    assert deployment.previous_version(name, aliases()) == "1"
    assert mlflow.get_run(active.info.run_id).data.tags["outcome"] == "promoted"
    assert client.get_model_version(name, "2").current_stage == "Production"
    with pytest.raises(deployment.Refused, match="version 2"), mlflow.start_run() as active:
        deployment.promote(name, "3", replaces="1")
    assert mlflow.get_run(active.info.run_id).data.tags["outcome"] == "refused"
    assert aliases() == {"production": "2", "previous": "1"}
    # Killed between the two moves: both aliases point at what was to be replaced.
    client.set_registered_model_alias(name, "previous", "2")
    assert deployment.previous_version(name, aliases()) == "1"

    other = client.create_run(experiment, tags={"promoting": name, "promoting_since": "9e9"})
    with (
        mlflow.start_run() as active,
        pytest.raises(deployment.UserError, match=other.info.run_id),
        deployment.one_promotion_at_a_time(experiment, name, patience=0.1),
    ):
        raise AssertionError("the other one is promoting")
    assert "promoting" not in mlflow.get_run(active.info.run_id).data.tags
    client.set_terminated(other.info.run_id)
    with mlflow.start_run(), deployment.one_promotion_at_a_time(experiment, name, patience=0.1):
        claims = mlflow.search_runs([experiment], f"tags.promoting = '{name}'")
    assert len(claims) == 2, "its own, and that of a run which has ended"


def test_the_guide_names_the_version_and_the_store(experiment):
    guide = paste(DEPLOYMENT, "deployment_guide", along=["GUIDE"]).deployment_guide("mine", "12")
    assert f"export MLFLOW_TRACKING_URI={mlflow.get_tracking_uri()}\n" in guide
    assert "models:/mine@production" in guide and "models:/mine/12" in guide
    assert not re.search(r"\{(name|number|store)\}", guide)


# The part that is the same in all three


def test_load_data_splits_a_table_into_rows_with_their_data_sets(tmp_path, capsys):
    step = paste(TUNING, "load_data")
    table = pd.DataFrame({"n": [1, 2, None, 4] * 10, "t": list("uvwx") * 10, "y": [1, 2] * 20})
    table.loc[0, "y"] = None
    table.to_csv(tmp_path / "My table.csv", index=False)
    train, test = step.load_data(tmp_path / "My table.csv", "y", test_size=0.25, seed=3)
    assert "my-table: 39 of 40 rows have a 'y'" in capsys.readouterr().out
    assert (len(train.X), len(test.X)) == (29, 10) and list(train.X) == ["n", "t"]
    assert set(train.y) == {"1", "2"}, "classes are text"
    assert not set(train.X.index) & set(test.X.index) and 0 not in {*train.X.index, *test.X.index}
    assert train.X["n"].dtype == "float64"
    assert (train.dataset.name, test.dataset.name) == ("my-table-train", "my-table-test")
    assert train.dataset.digest != test.dataset.digest and train.dataset.targets == "y"
    labels = table["y"].dropna()
    rows, _ = train_test_split(labels.index, test_size=0.25, stratify=labels, random_state=3)
    assert list(train.X.index) == list(train.y.index) == list(rows), "stratified, by this seed"
    with pytest.raises(step.UserError, match="nothing"):
        step.load_data(tmp_path / "My table.csv", "nothing")


def test_preprocessing_fills_scales_and_encodes():
    """By hand: a gap is the mean, a gap in text a value of its own, an unknown text nothing."""
    add_preprocessing = paste(COMPARISON, "add_preprocessing").add_preprocessing
    X = pd.DataFrame({"n": [1.0, 3.0, None, 2.0], "t": ["u", "v", None, "u"], "e": [np.nan] * 4})
    pipeline = add_preprocessing(LogisticRegression(), X)
    assert isinstance(pipeline[-1], LogisticRegression)
    out = pipeline[:-1].fit_transform(X)
    # The numbers first: n, scaled by the mean 2 and the deviation √½; the empty column is zero.
    expected = np.array([[-1, 0], [1, 0], [0, 0], [0, 0]]) / 0.5**0.5
    assert out[:, :2] == close(expected)
    assert {tuple(row) for row in out[:, 2:]} == {(0, 1, 0), (0, 0, 1), (1, 0, 0)}
    # In a table a gap in text is nan, in a request as JSON it is None.
    texts = pd.Series(["never seen", None, np.nan], dtype=object)
    new = pd.DataFrame({"n": 2.0, "t": texts, "e": [1.0, np.nan, np.nan]})
    unknown, *gaps = pipeline[:-1].transform(new)[:, 2:].tolist()
    assert unknown == [0, 0, 0] and gaps == [out[2, 2:].tolist()] * 2
    many = pd.DataFrame({"t": [f"v{number % 30}" for number in range(90)]})
    assert add_preprocessing(LogisticRegression(), many)[:-1].fit_transform(many).shape == (90, 20)


def test_rows_and_model_are_logged_ready_to_be_served(parts, logged):
    """The inputs of the run; signature, example and pinned requirements of the model."""
    model = mlflow.get_logged_model(logged[0])
    run = mlflow.get_run(model.source_run_id)
    (rows,) = run.inputs.dataset_inputs
    assert (rows.dataset.name, rows.tags[0].value) == ("train", "training")
    info = mlflow.models.get_model_info(model.model_uri)
    assert info.signature.inputs.input_names() == list("abcd") and info.signature.outputs
    assert info.flavors["sklearn"]["serialization_format"] == "skops"
    assert len(mlflow.pyfunc.load_model(model.model_uri).input_example) == 5


def test_open_store_selects_an_experiment_or_says_what_to_mend(experiment, tmp_path, monkeypatch):
    step = paste(DEPLOYMENT, "open_store", "hide_secrets")
    before = mlflow.get_tracking_uri()
    try:
        assert step.open_store("steps") == experiment
        for name in ("MLFLOW_RUN_ID", "MLFLOW_REGISTRY_URI"):
            with monkeypatch.context() as patch:
                patch.setenv(name, "x")
                with pytest.raises(step.UserError, match=f"unset {name}"):
                    step.open_store("steps")
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/absent/mlflow.db")
        with pytest.raises(step.UserError, match="absent"):
            step.open_store("steps")
        assert list(tmp_path.iterdir()) == []
    finally:
        mlflow.set_tracking_uri(before)
        mlflow.set_experiment("steps")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:pa%2Fss@host:1/db?password=x", "postgresql://USER:PASSWORD@host:1/db"),
        ("https://TOKEN@host/path", "https://USER:PASSWORD@host/path"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////a b/é.db", "sqlite:////a b/é.db"),
        ("databricks", "databricks"),
    ],
)
def test_secrets_in_an_address_are_hidden(uri, shown):
    assert paste(TUNING, "hide_secrets").hide_secrets(uri) == shown


# ---- Copied into a project with another metric, of which less is better


def negative_mae(y, predicted):
    return -mean_absolute_error(y, predicted)


REGRESSION = {
    "RandomForestClassifier": partial(RandomForestRegressor, n_estimators=5),
    "DummyClassifier": DummyRegressor,
    "StratifiedKFold": KFold,
    "RepeatedStratifiedKFold": RepeatedKFold,
}


@pytest.fixture(scope="module")
def numbers():
    """Training rows and hold-out rows of a problem of regression."""
    X, y = make_regression(200, 3, noise=20, random_state=0)
    X, y = pd.DataFrame(X, columns=list("abc")), pd.Series(y, name="price")
    return table_of(X[:150], y[:150], "train"), table_of(X[150:], y[150:], "test")


def test_a_search_by_mean_absolute_error_finds_the_smallest(experiment, numbers):
    """The error enters as its negative; winner, cheapest, spread and hold-out follow from it."""
    train, test = numbers
    tuning = paste(
        TUNING,
        *("run_trial", "TrialResult", "log_trial", "find_best_trials", "mean_scores", "refit_best"),
        "cheapest_within_one_standard_error",
        along=["TRUSTED"],
        instead=REGRESSION,
    )
    grid = {"max_depth": [1, 2, 6], "min_samples_leaf": [1, 40]}
    trials = paste(TUNING, "make_trials").make_trials(grid)
    errors = {}
    with mlflow.start_run() as search:
        for name, params in trials.items():
            args = (params, train.X, train.y, "neg_mae", negative_mae)
            metrics = tuning.run_trial(*args, n_folds=4, seed=0)
            model = scaled(RandomForestRegressor(n_estimators=5, **params, random_state=0))
            folds = KFold(4, shuffle=True, random_state=0)
            scoring = "neg_mean_absolute_error"
            errors[name] = -cross_val_score(model, train.X, train.y, cv=folds, scoring=scoring)
            assert metrics["cv_neg_mae"] == close(-errors[name].mean())
            tuning.log_trial(tuning.TrialResult(name, params, metrics, ""), train.dataset)
        ranked = tuning.find_best_trials(search.info.run_id, "neg_mae")
        best = min(errors, key=lambda name: errors[name].mean())
        assert ranked["tags.mlflow.runName"].iloc[0] == best
        tuning.refit_best(trials[best], train, test, "neg_mae", negative_mae, 0, tuning.TRUSTED)
    most = errors[best].mean() + errors[best].std(ddof=1) / 4**0.5
    seconds = ranked.set_index("tags.mlflow.runName")["metrics.fit_seconds"]
    close_ones = [name for name in errors if errors[name].mean() <= most]
    cheapest = tuning.cheapest_within_one_standard_error(ranked, "neg_mae", n_folds=4)
    assert cheapest["tags.mlflow.runName"] == min(close_ones, key=seconds.get)
    assert 1 <= len(close_ones) < len(trials)
    means = tuning.mean_scores(ranked, grid, "neg_mae")["min_samples_leaf"]
    assert means["1"] > means["40"], "more of it is better"
    metrics = mlflow.get_run(search.info.run_id).data.metrics
    model = scaled(RandomForestRegressor(n_estimators=5, **trials[best], random_state=0))
    error = mean_absolute_error(test.y, model.fit(train.X, train.y).predict(test.X))
    assert metrics["test_neg_mae"] == close(-error)
    mean = [train.y.mean()] * len(test.y)
    assert metrics["baseline_test_neg_mae"] == close(-mean_absolute_error(test.y, mean))


def test_a_comparison_by_mean_absolute_error_finds_the_smallest(numbers):
    """Which model is worse and by how much, and which is no better than the baseline."""
    train, _ = numbers
    comparison = paste(
        COMPARISON, "make_folds", "score_folds", "probabilities", "say_verdict", instead=REGRESSION
    )
    folds = comparison.make_folds(train, 5, 4, seed=0)
    models = {"good": Ridge(), "worse": Ridge(alpha=150), "baseline": DummyRegressor()}
    scores = pd.DataFrame(
        {
            name: comparison.score_folds(model, train.X, train.y, folds, {"neg_mae": negative_mae})[
                "neg_mae"
            ]
            for name, model in models.items()
        }
    )
    assert scores.mean().idxmax() == "good" and (scores < 0).all(axis=None)
    p = comparison.probabilities(scores["worse"] - scores["good"], rope=1.0, n_folds=5)
    assert p["p_worse"] > 0.95
    for name, floor in (("worse", 0.95), ("baseline", 0)):
        above = comparison.probabilities(scores[name] - scores["baseline"], 0, 5)
        assert above["p_better"] >= floor
    p["p_above_baseline"] = 1.0
    assert comparison.say_verdict(p, is_best=False, risk=0.2).startswith("worse")
    p["p_above_baseline"] = 0.0
    for is_best in (False, True):
        verdict = comparison.say_verdict(p, is_best, risk=0.2)
        assert verdict == "not shown to beat the baseline"


def test_a_gate_on_mean_absolute_error_refuses_the_larger(numbers):
    train, test = numbers
    deployment = paste(
        DEPLOYMENT,
        *("evaluate", "compare", "probability_of_loss", "missed_limits"),
        instead=REGRESSION,
    )
    rng = np.random.default_rng(0)
    near = Always(test.y + rng.normal(0, 5, len(test.y)))
    far = Always(test.y + rng.normal(0, 50, len(test.y)))
    figures = deployment.evaluate(near, train, test, negative_mae)
    error = mean_absolute_error(test.y, near.answers)
    baseline = mean_absolute_error(test.y, [train.y.mean()] * len(test.y))
    assert figures["score"] == close(-error) and figures["above_baseline"] == close(
        baseline - error
    )
    lost = mean_absolute_error(test.y, far.answers) - error
    worse = deployment.compare(far, near, test, negative_mae, 10, 0)
    better = deployment.compare(near, far, test, negative_mae, 10, 0)
    assert (worse["below_production"], better["below_production"]) == (
        close(lost),
        close(-lost),
    ) and lost > 20
    assert (worse["p_below_production"], better["p_below_production"]) == (1, 0)
    gate = {
        "score": MetricThreshold(threshold=-10, greater_is_better=True),
        "p_below_production": MetricThreshold(threshold=0.2, greater_is_better=False),
    }
    assert deployment.missed_limits(figures | better, gate) == []
    assert len(deployment.missed_limits(figures | worse, gate)) == 1


def test_a_metric_may_count_how_far_off_an_answer_is():
    """As of marks: the bootstrap must not change the order of the classes."""
    probability_of_loss = paste(DEPLOYMENT, "probability_of_loss").probability_of_loss
    kappa = partial(cohen_kappa_score, weights="quadratic")
    y = pd.Series(["3", "1", "2"] * 40)
    far = y.replace("3", "1")  # two marks off
    near = y.replace("3", "2")  # one mark off
    assert kappa(y, near) - kappa(y, far) > 0.5
    assert probability_of_loss(y, far, near, kappa, 0.1, seed=0, draws=50) == 1
    assert probability_of_loss(y, near, far, kappa, 0.0, seed=0, draws=50) == 0
