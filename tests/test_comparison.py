"""model_comparison.py: same folds for all, true probabilities, a recommendation that follows."""

import io
import re
import shutil
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from baycomp import two_on_single
from conftest import (
    SCRIPTS,
    assert_success,
    children,
    edited,
    parents,
    run,
    store,
)
from sklearn.base import clone
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.svm import SVC

import model_comparison as script

SCRIPT = SCRIPTS[1]
OWN = ("--csv", "table.csv", "--target", "kind")
ONE_CORE = {"LOKY_MAX_CPU_COUNT": "1"}  # for so few folds, starting other processes costs more
CHANCES = ["p_worse", "p_equivalent", "p_better"]
FEW = {
    "baseline": DummyClassifier(),
    "z_plain": LogisticRegression(),
    "a_plain": LogisticRegression(),
    "weighted": LogisticRegression(class_weight={"rare": 2.5, "common": 1}),
}


def make_table(path, n_rows):
    """Write a table whose rare class overlaps with the other.

    The number of its training rows is a multiple of five, so that all folds are equally large.
    """
    rng = np.random.default_rng(0)
    is_rare = rng.random(n_rows) < 0.15
    features = rng.normal(size=(n_rows, 3)) + 1.4 * is_rare[:, None] * [1, 1, 0]
    table = pd.DataFrame(features, columns=["a", "b", "c"])
    table["kind"] = np.where(is_rare, "rare", "common")
    table.to_csv(path, index=False)
    train, _ = script.load_data(path, "kind", None, script.TEST_SIZE)
    table.drop(train.X.index[: len(train.X) % 5]).to_csv(path, index=False)


@pytest.fixture
def compare(folder, monkeypatch):
    """A function that runs main() in this process, with few candidates, and returns its run."""
    store(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    monkeypatch.setattr(script, "REPEATS", 2)

    def call(*options, names=tuple(FEW)):
        candidates = {name: script.add_preprocessing(FEW[name]) for name in names}
        monkeypatch.setattr(script, "make_candidates", lambda n_rows, seed: dict(candidates))
        script.main([*OWN, *options])
        return parents("model-comparison")[-1]

    return call


@pytest.fixture(scope="module")
def compared(tmp_path_factory, new_store):
    """All candidates on two repeats, by F1: the finished process, its run, and the rows."""
    folder = tmp_path_factory.mktemp("compared")
    shutil.copy(new_store, folder)
    make_table(folder / "table.csv", 300)
    process = run(edited(folder, SCRIPT, REPEATS=2), *OWN, "--metric", "f1", cwd=folder, **ONE_CORE)
    store(folder)
    (comparison,) = parents("model-comparison")
    return process, comparison, *script.load_data(folder / "table.csv", "kind", None, 0.2)


def fold_scores(comparison):
    text = mlflow.artifacts.load_text(f"{comparison.info.artifact_uri}/folds.csv")
    return pd.read_csv(io.StringIO(text), index_col="fold")


# ---- The statistics


@pytest.mark.parametrize("n_folds", [5, 10])
@pytest.mark.parametrize("rope", [0.01, 0.002])
def test_probabilities_are_those_of_the_package_by_the_authors_of_the_test(n_folds, rope):
    """baycomp takes it that all folds are equally large, as these are."""
    size = 100 // n_folds
    folds = [(range(100 - size), range(n, n + size)) for n in range(30)]
    rng = np.random.default_rng(1)
    for shift in (-0.02, 0, 0.015):
        scores, others = rng.normal(0.9, 0.02, (2, 30))
        mine = script.correlated_t_test(pd.Series(scores + shift - others), rope, folds)
        theirs = two_on_single(others, scores + shift, rope, runs=30 // n_folds)
        assert [mine[chance] for chance in CHANCES] == pytest.approx(theirs, abs=1e-9)


def test_differences_that_are_constant_leave_no_doubt():
    folds = [(range(80), range(n, n + 20)) for n in range(10)]
    for difference, expected in [(0, [0, 1, 0]), (-0.02, [1, 0, 0]), (0.02, [0, 0, 1])]:
        chances = script.correlated_t_test(np.full(10, difference), 0.01, folds)
        assert [chances[chance] for chance in CHANCES] == pytest.approx(expected, abs=1e-12)


def test_what_cannot_be_right_is_refused():
    folds = [(range(80), range(n, n + 20)) for n in range(10)]
    differences = np.random.default_rng(0).normal(0, 46, 10)
    script.correlated_t_test(differences, 0, folds)  # no rope at all is a choice
    for rope, scores in ((0.01, differences), (-50, differences), (50, [*differences[1:], np.nan])):
        with pytest.raises(ValueError, match="rope"):
            script.correlated_t_test(pd.Series(scores), rope, folds)
    with pytest.raises(ValueError, match="10 differences, but 9 folds"):
        script.correlated_t_test(differences, 10, folds[1:])


def test_the_margin_is_that_of_95_percent():
    folds = [(range(80), range(n, n + 20)) for n in range(10)]
    differences = np.random.default_rng(0).normal(0.01, 0.02, 10)
    result = script.correlated_t_test(differences, 0.01, folds)
    spread = (differences.var(ddof=1) * (1 / 10 + 20 / 80)) ** 0.5
    assert result["difference"] == pytest.approx(differences.mean())
    assert result["difference_margin"] == pytest.approx(2.262157 * spread, rel=1e-6)  # t, 9 degrees


def ranked_runs(p_worse, latency_ms, baseline=1.0):
    """Return models a, b, … as `find_best_models` does, the best first, and the baseline last."""
    names = [*"abcdefghij"[: len(p_worse)], "baseline"]
    columns = {"p_worse": [*p_worse, baseline], "latency_ms": [*latency_ms, 0.1]}
    scores = ["cv_accuracy", "test_accuracy", "fit_seconds"]
    return pd.DataFrame(columns | dict.fromkeys(scores, 0.9), index=names)


@pytest.mark.parametrize(
    ("p_worse", "latency_ms", "baseline", "recommended"),
    [
        # Latencies of up to 1.2 times the lowest count as equal: of these, the best score wins.
        ([0, 0, 0], [1.2, 1.0, 1.1], 1, "a"),
        ([0, 0, 0], [1.21, 1.2, 1.0], 1, "b"),
        ([0, 0, 0], [9.0, 1.21, 1.0], 1, "c"),
        # A model that is worse with more than 20 % is no choice, and no measure of speed.
        ([0, 0.2], [2, 1], 1, "b"),
        ([0, 0.21], [2, 1], 1, "a"),
        ([0, 0.2, 0.21], [2.4, 2.0, 1.0], 1, "a"),
        ([0.5, 0.9], [2, 1], 1, "a"),  # without a rope, the best is "worse" than itself with 50 %
        # The best must be shown to beat the baseline.
        ([0, 0], [1, 2], 0.8, "a"),
        ([0, 0], [1, 2], 0.79, None),
        ([0.9, 0.9], [1, 2], 0, None),
    ],
)
def test_a_fast_one_of_the_good_ones_is_recommended(p_worse, latency_ms, baseline, recommended):
    runs = ranked_runs(p_worse, latency_ms, baseline)
    assert script.recommend(runs, risk=0.2, noise=1.2) == recommended


VERDICTS = [
    (0.96, "worse"),
    (0.94, "probably worse"),
    (0.81, "probably worse"),
    (0.79, "undecided"),
    (0.21, "undecided"),
    (0.20, "probably as good"),
    (0.06, "probably as good"),
    (0.05, "as good"),
    (0.0, "as good"),
]


def test_a_verdict_is_as_firm_as_the_probability():
    p_worse = [0.0, *(p for p, _ in VERDICTS)]
    report = script.describe_comparison(ranked_runs(p_worse, [1] * len(p_worse)), "a", "accuracy")
    lines = report.split("\n\n")[1].splitlines()[1:]
    said = [re.split(" {2,}", line.strip())[3] for line in lines]
    assert said == ["the best", *(words for _, words in VERDICTS), "worse"]


@pytest.mark.parametrize(("recommended", "why"), [("a", "best"), ("b", "faster"), (None, "base")])
def test_the_report_begins_with_the_recommendation_and_why(recommended, why):
    runs = ranked_runs([0, 0.1], [2, 1])
    report = script.describe_comparison(runs, recommended, "accuracy")
    first = report.splitlines()[0]
    assert first.startswith(f"Recommended: {recommended} (") and why in first


# ---- A comparison


def test_all_candidates_are_scored_on_the_same_folds(compared):
    _, comparison, train, _ = compared
    folds, runs = fold_scores(comparison), children(comparison)
    assert list(folds) == list(script.make_candidates(len(train.X), 0)) and set(folds) == set(runs)
    splits = []
    for seed in (42, 43):
        shuffled = StratifiedKFold(5, shuffle=True, random_state=seed)
        splits += shuffled.split(train.X, train.y)
    scoring = {"f1": "f1_macro", "recall": "recall_macro", "accuracy": "accuracy"}
    for name in ("baseline", "logistic_regression", "svm"):
        model = clone(mlflow.sklearn.load_model(f"runs:/{runs[name].info.run_id}/model"))
        scores = cross_validate(model, train.X, train.y, cv=splits, scoring=scoring)
        assert folds[name].to_numpy() == pytest.approx(scores["test_f1"], abs=1e-9)
        for metric in scoring:
            mean = runs[name].data.metrics[f"cv_{metric}"]
            assert mean == pytest.approx(scores[f"test_{metric}"].mean(), abs=1e-9)


def test_what_is_logged_is_true(compared):
    """Probabilities by baycomp from folds.csv, and hold-out scores of the models in the store."""
    _, comparison, _, test = compared
    folds, best = fold_scores(comparison), comparison.data.tags["best_model"]
    runs = children(comparison)
    scores = {name: run.data.metrics["cv_f1"] for name, run in runs.items()}
    assert scores[best] == max(scores.values())
    for name, candidate in runs.items():
        metrics = candidate.data.metrics
        expected = two_on_single(folds[best].to_numpy(), folds[name].to_numpy(), 0.01, runs=2)
        assert [metrics[chance] for chance in CHANCES] == pytest.approx(expected, abs=1e-9)
        model = mlflow.pyfunc.load_model(f"runs:/{candidate.info.run_id}/model")
        f1 = f1_score(test.y, model.predict(test.X), average="macro")
        assert metrics["test_f1"] == pytest.approx(f1, abs=1e-9)
        assert metrics["model_size_bytes"] == model.metadata.model_size_bytes > 1000
        assert metrics["latency_ms"] > 0 and metrics["fit_seconds"] > 0
    assert runs["random_forest"].data.params["n_estimators"] == "100"
    assert comparison.data.params == {"metric": "f1", "folds": "10", "rope": "0.01"}


def test_what_is_printed_is_what_is_logged(compared):
    process, comparison, *_ = compared
    assert_success(process)
    report, runs = comparison.data.tags["mlflow.note.content"], children(comparison)
    recommended = comparison.data.tags["recommended_model"]
    assert report.startswith(f"Recommended: {recommended} (") and report in process.stdout
    _, choice, _, _, others = report.split("\n\n")
    choice, others = choice.splitlines()[1:], others.splitlines()[1:]
    rows = {a.split()[0]: a + b for a, b in zip(choice, others, strict=True)}
    ranked = sorted(runs, key=lambda name: -runs[name].data.metrics["cv_f1"])
    assert list(rows) == ranked == [line.split()[0] for line in others]
    for name in ranked:
        metrics = runs[name].data.metrics
        for value in (metrics[key] for key in ("cv_f1", "p_worse", "cv_recall", "test_f1")):
            assert f"{value:.4f}" in re.findall(r"[\d.]+", rows[name])
    (uri,) = re.findall(r'load_model\("(.*)"\)', process.stdout)
    assert mlflow.get_logged_model(uri.removeprefix("models:/")).tags["candidate"] == ranked[0]
    (uri,) = re.findall(r"--model-uri=models:/(\S+)", process.stdout)
    assert mlflow.get_logged_model(uri).source_run_id == runs[recommended].info.run_id
    path = mlflow.artifacts.download_artifacts(f"{comparison.info.artifact_uri}/comparison.png")
    assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_the_metric_decides_and_a_tie_goes_to_the_first_candidate(compare, folder):
    """Two comparisons in one store: each ranks its own models only."""
    make_table(folder / "table.csv", 400)
    found = {metric: compare("--metric", metric) for metric in ("accuracy", "f1")}
    ranked = {}
    for metric, comparison in found.items():
        models = script.find_best_models(comparison.info.run_id, metric)
        ranked[metric] = list(models.index)
        for name, run_ in children(comparison).items():
            assert models.loc[name, "run_id"] == run_.info.run_id
            assert run_.outputs.model_outputs[0].model_id == models.loc[name, "model_id"]
        assert comparison.data.tags["best_model"] == ranked[metric][0]
    assert ranked["accuracy"] == ["z_plain", "a_plain", "weighted", "baseline"]
    assert ranked["f1"] == ["weighted", "z_plain", "a_plain", "baseline"]


def test_a_rope_wider_than_the_lead_over_the_baseline_recommends_nothing(
    compare, folder, monkeypatch, capsys
):
    make_table(folder / "table.csv", 200)
    monkeypatch.setattr(script, "ROPE", 0.5)
    with pytest.raises(script.UserError, match="baseline by more than 0.5"):
        compare(names=("baseline", "z_plain"))
    assert "Next" not in capsys.readouterr().out
    (comparison,) = parents("model-comparison")
    assert comparison.info.status == "FINISHED"
    assert comparison.data.tags["recommended_model"] == "None"


def test_a_candidate_that_fails_keeps_its_own_error_and_leaves_no_run_open(
    compare, folder, monkeypatch
):
    make_table(folder / "table.csv", 200)
    monkeypatch.setitem(FEW, "broken", LogisticRegression(C=-1))
    with pytest.raises(ValueError, match="'C' parameter"):
        compare(names=("baseline", "broken"))
    (comparison,) = parents("model-comparison")
    assert comparison.info.status == "FAILED"
    assert {n: r.info.status for n, r in children(comparison).items()} == {"baseline": "FINISHED"}


def test_one_fold_that_fails_is_an_error_and_no_gap_in_the_scores(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    X, y = pd.DataFrame({"a": np.arange(6.0)}), pd.Series(["no", "yes"] * 3)
    folds = [([0, 1, 2, 3], [4, 5]), ([0, 2, 4], [1, 3])]  # the second trains on one class only
    model = script.add_preprocessing(LogisticRegression())
    assert script.score_folds(model, X, y, script.SCORERS, folds[:1]).notna().all(axis=None)
    with pytest.raises(ValueError, match="one class"):
        script.score_folds(model, X, y, script.SCORERS, folds)


class Recorder(mlflow.pyfunc.PythonModel):
    """A model that writes its name to a file when it predicts. Model a is slow at first only."""

    def __init__(self, name, path):
        self.name, self.path = name, path

    def predict(self, context, model_input: list[str]):
        time.sleep(0.02 if self.name == "b" else 0.0 if self.path.exists() else 0.5)
        with self.path.open("a") as file:
            file.write(self.name)
        return model_input


def test_latencies_are_medians_of_models_that_take_turns(folder):
    store(folder)
    uris = []
    mlflow.set_experiment("latencies")
    with mlflow.start_run():
        for name in "ab":
            info = mlflow.pyfunc.log_model(
                name=name, python_model=Recorder(name, folder / "order"), pip_requirements=[]
            )
            uris.append(info.model_uri)
    fast, slow = script.measure_latencies(uris, ["row"], rounds=5)
    assert (folder / "order").read_text() == "ab" * 5
    assert slow >= 20 > fast > 0


# ---- The candidates


def test_a_large_table_gets_fewer_repeats(compare, folder, monkeypatch):
    monkeypatch.setattr(script, "REPEATS", 30)
    for n_rows, folds in [(4_500, "20"), (20_000, "10")]:
        make_table(folder / "table.csv", n_rows)
        assert compare(names=("baseline", "z_plain")).data.params["folds"] == folds


def test_the_svm_is_approximated_above_10000_rows(folder):
    """The approximation still bends, and what is stored loads again."""
    assert isinstance(script.make_candidates(10_000, 0)["svm"][-1], SVC)
    svm = script.make_candidates(10_001, 0)["svm"]
    assert "linearsvc" in svm[-1].named_steps
    X = pd.DataFrame(np.random.default_rng(0).normal(size=(1000, 2)), columns=["a", "b"])
    y = (X["a"] * X["b"] > 0).map({True: "same sign", False: "not"})
    store(folder)
    mlflow.set_experiment("svm")
    with mlflow.start_run():
        svm.fit(X, y)
        logged = script.log_model(svm, X, "any")
    assert (mlflow.pyfunc.load_model(logged.model_uri).predict(X) == y).mean() > 0.95


def test_the_best_of_a_search_is_one_more_candidate(compare, folder):
    make_table(folder / "table.csv", 200)
    train, _ = script.load_data("table.csv", "kind", None, 0.2)
    params = {"n_estimators": 7, "max_depth": 2}

    def search(rows, status="FINISHED"):
        mlflow.set_experiment("hyperparameter-tuning")
        with mlflow.start_run() as run:
            mlflow.log_param("rows", rows)
            mlflow.log_dict(params, "best_params.json")
            mlflow.end_run(status)
        return run.info.run_id

    comparison = compare(
        "--tuned", search(train.dataset.digest), "--metric", "f1", names=("baseline",)
    )
    tuned = children(comparison)["tuned_forest"]
    model = mlflow.sklearn.load_model(f"runs:/{tuned.info.run_id}/model")
    for found in (tuned.data.params, model[-1].get_params()):
        assert {name: int(found[name]) for name in params} == params

    others = [search("others"), search(train.dataset.digest, "FAILED")]
    for search_id in (*others, comparison.info.run_id):
        with pytest.raises(script.UserError, match=f"{search_id} is not a finished search"):
            compare("--tuned", search_id)
    with pytest.raises(mlflow.MlflowException, match="0" * 32):
        compare("--tuned", "0" * 32)
    assert len(parents("model-comparison")) == 1
