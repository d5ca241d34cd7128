"""Print how often the gate refuses, and what a split by hash does to a table that grows.

    python tests/benchmark_gate.py

The first table: how often a version is refused by the limit on `p_worse_than_production` if it is
as good as production, or worse by some points. Both are right on about 95 % of the rows, and
disagree on some. It also shows the loss that the script says is found 8 times of 10.

The second table: a model is trained on 70 % of a table, and another one on all of it, a month
later. How many rows of this month's hold-out has last month's model been trained on, and how often
is the new one refused? By the scripts' split, and by a random one.
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.datasets import load_breast_cancer, load_digits, make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from production_deployment import GATE, SEED, gate_metrics, is_held_out

LIMIT = GATE["p_worse_than_production"].threshold
LOSSES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1)


@cache
def gate(only_production, only_candidate, rows):
    """Return `p_worse_than_production` and the standard error of the loss.

    So many rows are right in only one of the two. It is the bootstrap of the script without the
    calls of scikit-learn: for accuracy, nothing but these two numbers matters.
    """
    rest = rows - only_production - only_candidate
    shares = np.array([only_production, only_candidate, rest]) / rows
    drawn = np.random.default_rng(SEED).multinomial(rows, shares, size=1000)
    losses = (drawn[:, 0] - drawn[:, 1]) / rows
    return (losses > 0).mean(), losses.std()


def check_against_the_script(rows=105, only_production=6, only_candidate=2):
    rest = rows - only_production - only_candidate
    judged = pd.DataFrame(
        {
            "actual": ["y"] * rows,
            "baseline": ["n"] * rows,
            "production": ["y"] * (only_production + rest) + ["n"] * only_candidate,
            "candidate": ["n"] * only_production + ["y"] * (rest + only_candidate),
        }
    )
    metrics = gate_metrics(judged, range(rows), accuracy_score, SEED)
    p, error = gate(only_production, only_candidate, rows)
    assert abs(p - metrics["p_worse_than_production"]) < 0.03
    assert abs(error / (metrics["findable_loss"] / 2.6) - 1) < 0.1


def share_refused(rows, disagreement, loss, simulations, rng):
    """Return how often a candidate that loses so much is refused."""
    disagreement = max(disagreement, loss)
    worse, better = (disagreement + loss) / 2, (disagreement - loss) / 2
    draws = rng.multinomial(rows, [worse, better, 1 - worse - better], size=simulations)
    results = np.array([gate(int(a), int(b), rows) for a, b, _ in draws])
    found = np.maximum(2.6 * results[:, 1], 5 / rows)
    return (results[:, 0] > LIMIT).mean(), found.mean()


def print_gate(simulations):
    rng = np.random.default_rng(0)
    print(f"Refused, of {simulations} versions a cell, at a limit of {LIMIT}\n")
    print(
        "| rows held out | disagree on |",
        " | ".join(f"{100 * loss:g} points worse" for loss in LOSSES),
        "| said to be found |",
    )
    print("|---|---|" + "---|" * (len(LOSSES) + 1))
    for rows in (105, 500, 2000):
        for disagreement in (0.02, 0.04, 0.1):
            cells = [share_refused(rows, disagreement, loss, simulations, rng) for loss in LOSSES]
            shares = " | ".join(f"{refused:.0%}" for refused, _ in cells)
            print(f"| {rows:,} | {disagreement:.0%} | {shares} | {cells[0][1]:.3f} |", flush=True)


def by_hash(X, salt):
    """Return the scripts' split; another one for each salt."""
    return is_held_out(pd.util.hash_pandas_object(X.assign(salt=salt), index=False), 0.2).to_numpy()


def at_random(X, y, seed):
    _, test = train_test_split(np.arange(len(X)), test_size=0.2, stratify=y, random_state=seed)
    return np.isin(np.arange(len(X)), test)


def print_growth(repeats):
    made = make_classification(1500, n_informative=5, flip_y=0.1, random_state=0)
    tables = {
        "breast cancer": load_breast_cancer(return_X_y=True),
        "digits": load_digits(return_X_y=True),
        "made, 10 % noise": made,
    }
    models = {
        "forest": lambda seed: RandomForestClassifier(50, random_state=seed),
        "logistic regression": lambda seed: make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=2000)
        ),
    }
    print(
        f"\n{repeats} months each: share of the hold-out that production was trained on; refused\n"
    )
    print("| table | model | random split | by hash |\n|---|---|---|---|")
    for title, (X, y) in tables.items():
        X, y = pd.DataFrame(X).add_prefix("x"), pd.Series(y).astype(str)
        for name, make in models.items():
            seen, refused = {"random": [], "hash": []}, {"random": 0, "hash": 0}
            for repeat in range(repeats):
                came_first = np.random.default_rng(repeat).random(len(X)) < 0.7
                salted = by_hash(X, repeat)
                before = np.zeros(len(X), bool)
                before[came_first] = at_random(X[came_first], y[came_first], repeat)
                for split, old, new in (
                    ("random", before, at_random(X, y, repeat + 1000)),
                    ("hash", salted, salted),
                ):
                    last, this = came_first & ~old, ~new
                    production = make(repeat).fit(X[last], y[last])
                    candidate = make(repeat + 1).fit(X[this], y[this])
                    right = [model.predict(X[new]) == y[new] for model in (production, candidate)]
                    only = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
                    refused[split] += gate(*map(int, only), int(new.sum()))[0] > LIMIT
                    seen[split].append((last & new).sum() / new.sum())
            cells = [f"{np.mean(seen[s]):.0%}; {refused[s]}" for s in ("random", "hash")]
            print(f"| {title} | {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=2000, help="versions for each cell")
    parser.add_argument("--repeats", type=int, default=60, help="months for each line")
    args = parser.parse_args()
    check_against_the_script()
    print_gate(args.simulations)
    print_growth(args.repeats)
