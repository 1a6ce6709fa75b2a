"""`python -m benchmarks paper-table1`: Table 1, counted instead of worked out.

Keys with <q, k> / sqrt(d) >= b under the paper's own Gaussian model, for every n of the
table: with b as printed and with b repaired (`rules`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.harness import pictures
from benchmarks.harness.tables import column, slope, where
from benchmarks.header import Basics, Results
from benchmarks.paper import printed, rules
from benchmarks.paper.rules import Rule

COUNTED: tuple[Rule, ...] = ("printed", "repaired")


@dataclasses.dataclass(frozen=True)
class Command(Basics):
    """Counts the keys that fire at each n of the paper's Table 1.

    For example:

        python -m benchmarks paper-table1
    """

    keys: tuple[int, ...] = ()
    """Numbers of keys: those of the table; with --quick, the first two."""
    rows: int | None = None
    """Queries for each: 256; with --quick, 16."""
    head_dim: int = 64
    """d of queries and keys."""


def run(command: Command) -> Results:
    """Counts by both rules."""
    sizes = command.keys or tuple(printed.TABLE1)[: 2 if command.quick else None]
    rows = command.rows or (16 if command.quick else 256)
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    for keys in tqdm(sizes, unit="n"):
        seed, dim = (command.seed, keys, command.head_dim), command.head_dim
        drawn = rules.draw(seed, keys=keys, rows=rows, head_dim=dim)
        lines, faults = rules.counted(COUNTED, *drawn)
        more = {"n_to_4_5": keys**0.8}
        more |= {"papers_activated_entries": printed.TABLE1.get(keys)}
        found += [line | more for line in lines]
        wrong += faults
    return Results(found, summarize(found), draw(found), wrong)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    mine = where(rows, rule="repaired")
    keys, mean = column(mine, "keys"), column(mine, "mean")
    off = [
        100 * abs(row["papers_activated_entries"] / row["n_to_4_5"] - 1)
        for row in mine
        if row["papers_activated_entries"]
    ]
    return {
        "printed_most_in_any_row": max(column(where(rows, rule="printed"), "most")),
        "repaired_mean": dict(zip(keys, mean, strict=True)),
        "repaired_share_percent": {row["keys"]: row["share_percent"] for row in mine},
        "repaired_mean_over_expected": [row["mean"] / row["expected"] for row in mine],
        "n_to_4_5_over_repaired_mean": [row["n_to_4_5"] / row["mean"] for row in mine],
        "exponent_of_repaired_mean": slope(keys, mean),
        "largest_n": keys[-1],
        "table_over_n_to_4_5_off_by_percent": max(off, default=None),
    }


def draw(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    figure = pictures.figure(width=7.5, height=5)
    axes = figure.subplots()
    mine = where(rows, rule="repaired")
    keys, mean, expected, least, most, power = (
        column(mine, name)
        for name in ("keys", "mean", "expected", "least", "most", "n_to_4_5")
    )
    axes.plot(keys, power, color="tab:gray", label="$n^{4/5}$")
    table = [(n, x) for n, x in printed.TABLE1.items() if n in keys]
    if table:
        axes.plot(
            *zip(*table, strict=True), "kx", label='the paper\'s "activated entries"'
        )
    axes.plot(keys, expected, "--", color="tab:blue", label="expected, repaired b")
    axes.plot(keys, mean, "o", color="tab:red", label="counted, repaired b")
    about = "least and most of any row"
    axes.fill_between(keys, least, most, color="tab:red", alpha=0.2, label=about)
    fired = max(column(where(rows, rule="printed"), "most"))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="n, number of keys",
        ylabel="keys that fire for a query",
        title=f"d = {rows[0]['head_dim']}; with b as printed {fired or 'no'} keys fire",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return {"table1.png": figure}
