"""`python -m benchmarks paper-lemma61`: keys that fire against Lemma 6.1's bound.

The lemma: with probability 1 - delta no row has more than 2 n^(4/5) scores above b.
Four rules for b (`rules`): as printed, as Algorithms 1 and 2 hand it to HSR, one b at
the true sigma, and each row's own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import hsrjax
from benchmarks.harness import pictures
from benchmarks.harness.tables import column, where
from benchmarks.header import Basics, Results
from benchmarks.paper import printed, rules

NORM_T = 1.0
"""t of Lemma E.2, which a query's norm may exceed with probability exp(-t)."""


@dataclasses.dataclass(frozen=True)
class Command(Basics):
    """Counts the keys that fire by n and d, with b as printed and repaired.

    For example:

        python -m benchmarks paper-lemma61
    """

    keys: tuple[int, ...] = ()
    """Numbers of keys: 1,024 to 262,144; with --quick, 512 and 1,024."""
    head_dims: tuple[int, ...] = ()
    """Head sizes: 8, 16, 32, 64 and 128; with --quick, 8 and 64."""
    rows: int | None = None
    """Queries for each: 512; with --quick, 32."""


def run(command: Command) -> Results:
    """Counts by all rules."""
    quick = command.quick
    sizes = command.keys or (
        (512, 1024) if quick else tuple(4**i for i in range(5, 10))
    )
    dims = command.head_dims or ((8, 64) if quick else (8, 16, 32, 64, 128))
    rows = command.rows or (32 if quick else 512)
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    cells = [(keys, dim) for dim in dims for keys in sizes]
    for keys, dim in tqdm(cells, unit="cell"):
        stored, queries = rules.draw(
            (command.seed, keys, dim), keys=keys, rows=rows, head_dim=dim
        )
        long = np.linalg.norm(queries, axis=-1) > printed.norm_bound(dim, NORM_T)
        lines, faults = rules.counted(rules.RULES, stored, queries)
        wrong += faults
        for line in lines:
            expected = {"expected": line.pop("expected")}
            found.append(
                line
                | {"bound": printed.count_bound(keys), **expected}
                | {
                    "failure_probability": rows * _failure(keys),
                    "longer_than_lemma_e2_percent": 100 * float(long.mean()),
                }
            )
    return Results(found, summarize(found), draw(found), wrong)


def _failure(keys: int) -> float:
    """With which a row may exceed the bound at the true sigma (Lemma E.1)."""
    bias = hsrjax.theory.threshold(keys)
    return float(hsrjax.theory.count_failure(keys, bias))


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of each rule over all n and d."""
    found = {}
    for rule in rules.RULES:
        mine = where(rows, rule=rule)
        shares = column(mine, "share_percent")
        empty = column(mine, "empty_rows_percent")
        within = "rows_within_bound_percent"
        longer = "longer_than_lemma_e2_percent"
        found[rule] = {
            "rows": sum(column(mine, "rows")),
            within: min(column(mine, within)),
            "most_over_bound": max(row["most"] / row["bound"] for row in mine),
            "share_percent": [min(shares), max(shares)],
            "empty_rows_percent": [min(empty), max(empty)],
            longer: max(column(mine, longer)),
            "most_over_least": max(
                row["most"] / row["least"] if row["least"] else math.inf for row in mine
            ),
        }
    return found


def draw(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """The mean count and its range over the bound, by n, a picture for each d."""
    dims = sorted({row["head_dim"] for row in rows})
    figure = pictures.figure(width=2.6 * len(dims) + 2, height=4)
    grid = figure.subplots(1, len(dims), sharey=True, squeeze=False)[0]
    colours = dict(
        zip(rules.RULES, ("k", "tab:orange", "tab:blue", "tab:red"), strict=True)
    )
    for axes, dim in zip(grid, dims, strict=True):
        for rule in rules.RULES:
            mine = where(rows, rule=rule, head_dim=dim)
            keys = column(mine, "keys")
            low, mid, high = (
                [row[name] / row["bound"] for row in mine]
                for name in ("least", "mean", "most")
            )
            axes.plot(
                keys,
                mid,
                "o-",
                color=colours[rule],
                label=rule,
                markersize=4,
                clip_on=False,
            )
            axes.fill_between(keys, low, high, color=colours[rule], alpha=0.15)
        axes.axhline(1, color="tab:gray", linestyle="--", label="the lemma's bound")
        axes.set(xscale="log", title=f"d = {dim}", xlabel="n")
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(0, 3)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("keys in the half-space / $2 n^{4/5}$")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right upper")
    return {"lemma61.png": figure}
