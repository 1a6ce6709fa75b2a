"""`python -m benchmarks paper-table1`: Table 1, counted instead of worked out.

Keys with <q, k> / sqrt(d) >= b under the paper's own Gaussian model, for every n of the
table: with b as printed and with b repaired (`rules`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from matplotlib.figure import Figure
from tqdm import tqdm

import hsrjax
from benchmarks.harness import pictures, tables
from benchmarks.header import Basics, Results
from benchmarks.paper import printed, rules
from benchmarks.paper.rules import Rule

COUNTED: tuple[Rule, ...] = ("printed", "repaired")


@dataclasses.dataclass(frozen=True)
class Command(Basics):
    """Counts the keys that fire at each n of the paper's Table 1."""

    keys: tuple[int, ...] = ()
    """Numbers of keys: those of the table; with --quick, the first two."""
    rows: int | None = None
    """Queries for each: 256; with --quick, 16."""
    head_dim: int = 64
    """d of queries and keys."""

    def __post_init__(self) -> None:
        """Refuses what cannot be counted."""
        super().__post_init__()
        if min((*self.keys, 2)) < 2 or (self.rows or 1) < 1 or self.head_dim < 1:
            raise ValueError("keys must be 2 or more, rows and head-dim 1 or more")


def run(command: Command) -> Results:
    """Counts by both rules."""
    sizes = command.keys or tuple(printed.TABLE1)[: 2 if command.quick else None]
    rows = command.rows or (16 if command.quick else 256)
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    for keys in tqdm(sizes, unit="n"):
        seed = (command.seed, keys, command.head_dim)
        stored, queries = rules.draw(
            seed, keys=keys, rows=rows, head_dim=command.head_dim
        )
        index = hsrjax.build(jnp.asarray(stored))
        for rule in COUNTED:
            offset = rules.offsets(rule, queries, keys)
            counts, fault = rules.count(index, queries, offset)
            if fault:
                wrong.append(f"{rule}, {keys:,} keys: {fault}")
            found.append(
                {
                    "keys": keys,
                    "head_dim": command.head_dim,
                    "rows": rows,
                    "rule": rule,
                    **rules.describe(counts, keys),
                    "expected": rules.expected(queries, offset, keys),
                    "n_to_4_5": keys**0.8,
                    "papers_activated_entries": printed.TABLE1.get(keys),
                }
            )
    return Results(found, _summary(found), {"table1.png": _draw(found)}, wrong)


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_rule = {rule: [row for row in rows if row["rule"] == rule] for rule in COUNTED}
    last = by_rule["repaired"][-1]
    return {
        "printed_most_in_any_row": max(row["most"] for row in by_rule["printed"]),
        "repaired_mean": {row["keys"]: row["mean"] for row in by_rule["repaired"]},
        "repaired_share_percent": {
            row["keys"]: row["share_percent"] for row in by_rule["repaired"]
        },
        "repaired_mean_over_expected": [
            row["mean"] / row["expected"] for row in by_rule["repaired"]
        ],
        "n_to_4_5_over_repaired_mean": [
            row["n_to_4_5"] / row["mean"] for row in by_rule["repaired"]
        ],
        "exponent_of_repaired_mean": tables.slope(
            *zip(*((r["keys"], r["mean"]) for r in by_rule["repaired"]), strict=True)
        ),
        "largest_n": last["keys"],
        "table_over_n_to_4_5_off_by_percent": 100
        * max(
            abs(row["papers_activated_entries"] / row["n_to_4_5"] - 1)
            for row in rows
            if row["papers_activated_entries"]
        )
        if any(row["papers_activated_entries"] for row in rows)
        else None,
    }


def _draw(rows: list[dict[str, Any]]) -> Figure:
    figure = pictures.figure(width=7.5, height=5)
    axes = figure.subplots()
    mine = [row for row in rows if row["rule"] == "repaired"]
    keys = [row["keys"] for row in mine]

    def column(name: str) -> list[Any]:
        return [row[name] for row in mine]

    axes.plot(keys, column("n_to_4_5"), color="tab:gray", label="$n^{4/5}$")
    table = [(n, x) for n, x in printed.TABLE1.items() if n in keys]
    if table:
        axes.plot(
            *zip(*table, strict=True), "kx", label='the paper\'s "activated entries"'
        )
    axes.plot(
        keys, column("expected"), "--", color="tab:blue", label="expected, repaired b"
    )
    axes.plot(keys, column("mean"), "o", color="tab:red", label="counted, repaired b")
    axes.fill_between(
        keys,
        column("least"),
        column("most"),
        color="tab:red",
        alpha=0.2,
        label="least and most of any row",
    )
    most = max(row["most"] for row in rows if row["rule"] == "printed")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="n, number of keys",
        ylabel="keys that fire for a query",
        title=f"d = {rows[0]['head_dim']}; with b as printed {most or 'no'} keys fire",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure
