"""`python -m benchmarks paper-time`: running time by n and d, and fitted exponents.

Gaussian keys and queries, thresholds as repaired (`rules`), one head. Four things:

    query    one half-space over n keys: by balls around cells in spatial order, by the
             sketch alone, and a scan that scores all keys
    work     keys that the balls leave to be looked at: no timer, no noise
    decode   one step of ReLU attention over a cache of n (Algorithm 1)
    prefill  n queries over n keys, the index built inside (Algorithm 2)

The theorems promise n to the max(1 - 1 / floor(d / 2), 4 / 5) for a query and 1 more
for prefill; decode is promised n^(4/5), after preprocessing of n^floor(d / 2).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.files.results import as_csv
from benchmarks.harness import pictures, tables
from benchmarks.harness.tables import column, where
from benchmarks.harness.timing import Timing, race
from benchmarks.header import Results, Settings
from benchmarks.paper import contests, printed
from benchmarks.paper.contests import Cell

TASKS = ("query", "work", "decode", "prefill")
NAMES = {"query": ("balls", "sketch", "scan"), "work": ("balls",)}
NAMES |= {"decode": ("hsr", "dense"), "prefill": ("hsr", "dense")}
FITTED = 3
"""The largest n, so many, that exponents are fitted over."""


@dataclasses.dataclass(frozen=True)
class Command(Settings):
    """Times a query, a decode step and prefill by n and d.

    For example:

        python -m benchmarks paper-time --head-dims 4 64
    """

    head_dims: tuple[int, ...] = ()
    """Head sizes: 4, 8, 16, 32, 64 and 128; with --quick, 4 and 64."""
    keys: tuple[int, ...] = ()
    """n of query and decode: 16,384 to 1,048,576; with --quick, 2,048 and 4,096."""
    prefill_keys: tuple[int, ...] = ()
    """n of prefill: 2,048 to 16,384; with --quick, 256 and 512."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        super().__post_init__()
        if min((*self.head_dims, 2)) < 2:
            raise ValueError("head-dims must be 2 or more")

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Head sizes, n, and n of prefill, with the defaults resolved."""
        quick = self.quick
        return (
            self.head_dims or ((4, 64) if quick else (4, 8, 16, 32, 64, 128)),
            self.keys or ((2048, 4096) if quick else tuple(4**i for i in range(7, 11))),
            self.prefill_keys
            or ((256, 512) if quick else tuple(2**i for i in range(11, 15))),
        )


def run(command: Command) -> Results:
    """Times all sizes; each size's contestants take turns."""
    dims, sizes, prefill_sizes = command.sizes
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    steps = len(dims) * (2 * len(sizes) + len(prefill_sizes))
    with tqdm(total=steps * command.rounds, unit="round") as bar:
        for dim in dims:
            for task in ("query", "decode", "prefill"):
                for keys in prefill_sizes if task == "prefill" else sizes:
                    cell = Cell(task, keys, dim, command.seed)
                    bar.set_description(f"{task}, d {dim}, n {keys:,}")
                    found, faults = _measure(cell, command, bar)
                    rows += found
                    wrong += faults
    found = summarize(rows)
    texts = {"exponents.csv": as_csv(found["exponents"])}
    summary = found | {"repeats": command.rounds}
    return Results(rows, summary, draw(rows), wrong, texts)


def _measure(
    cell: Cell, command: Command, bar: tqdm
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of one size, and what is wrong."""
    contestants, members, reach = contests.contestants(cell)
    timings = race(
        contestants,
        rounds=command.rounds,
        score=lambda one, result: float(result[0]),
        tick=tables.ticker(bar),
    )
    first = {"head_dim": cell.head_dim, "keys": cell.keys, "members": members}
    rows = [_row(first | {"task": cell.task}, one) for one in timings.values()]
    if reach is not None:
        work = {"task": "work", "name": "balls", "keys_in_reach": reach}
        rows.append(first | work | {"share_in_reach_percent": 100 * reach / cell.keys})
    wrong = [
        f"{cell.task}, d {cell.head_dim}, {cell.keys:,} keys, {name}: off by "
        f"{one.error:.1e}"
        for name, one in timings.items()
        if one.error is None or not one.error <= tables.TOLERANCE
    ]
    return rows, wrong


def _row(first: dict[str, Any], timing: Timing) -> dict[str, Any]:
    return first | {
        "name": timing.contestant.name,
        "ms": timing.ms,
        "fastest_round_ms": 1e3 * min(timing.rounds),
        "slowest_round_ms": 1e3 * max(timing.rounds),
        "timed_calls": timing.calls,
        "off_by": timing.error,
    }


def summarize(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Exponents of n by least squares over log-log, for each task, name and d.

    Over the largest n, where calling takes little of the time. `exponent` is that of
    the fastest round, which noise of the machine changes least; `begins_at` is the n
    from which on the exponent between neighbouring n is at most the theorem's, None
    where it never is.
    """
    found = []
    for task in TASKS:
        for name in NAMES[task]:
            for dim in sorted({row["head_dim"] for row in rows}):
                if mine := where(rows, task=task, name=name, head_dim=dim):
                    found.append(_fit(task, name, dim, mine))
    return {"exponents": found}


def _fit(task: str, name: str, dim: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    measure = "keys_in_reach" if task == "work" else "fastest_round_ms"
    keys, amount = column(rows, "keys"), column(rows, measure)
    promised = 0.8 if task == "decode" else printed.exponent(dim)
    promised += task == "prefill"
    points = list(zip(keys, amount, strict=True))
    steps = [
        math.log(b / a) / math.log(m / n) if a and b else math.nan
        for (n, a), (m, b) in itertools.pairwise(points)
    ]
    above = [i for i, step in enumerate(steps) if not step <= promised]
    first = above[-1] + 1 if above else 0
    fitted = keys[-FITTED:]
    return {
        "task": task,
        "name": name,
        "head_dim": dim,
        "fitted_from": fitted[0],
        "fitted_to": fitted[-1],
        "exponent": tables.slope(fitted, amount[-FITTED:]) if all(amount) else None,
        "exponent_of_medians": None
        if task == "work"
        else tables.slope(fitted, column(rows[-FITTED:], "ms")),
        "last_step": steps[-1] if steps else None,
        "theorem": promised,
        "begins_at": keys[first] if first < len(steps) else None,
        "share_in_reach_percent": rows[-1].get("share_in_reach_percent"),
    }


def draw(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Times by n of query, decode and prefill, and the exponents by d."""
    fits = summarize(rows)["exponents"]
    figure = pictures.figure(width=13, height=8)
    grid = figure.subplots(2, 3)
    panels = [("query", "balls"), ("query", "sketch"), ("decode", "hsr")]
    panels += [("prefill", "hsr")]
    dims = sorted({row["head_dim"] for row in rows})
    for axes, (task, name) in zip(grid.flat, panels, strict=False):
        for place, dim in enumerate(dims):
            mine = where(rows, task=task, name=name, head_dim=dim)
            axes.plot(
                column(mine, "keys"),
                column(mine, "fastest_round_ms"),
                "o-",
                label=f"d = {dim}",
                color=f"C{place}",
                markersize=4,
            )
        axes.set(
            xscale="log", yscale="log", xlabel="n", ylabel="ms", title=f"{task}: {name}"
        )
        axes.grid(alpha=0.3, which="both")
    grid[0, 0].legend(fontsize=8)
    _exponents(grid[1, 1], fits, ("query", "work"))
    _exponents(grid[1, 2], fits, ("decode", "prefill"))
    return {"time.png": figure}


def _exponents(axes: Any, fits: list[dict[str, Any]], tasks: tuple[str, ...]) -> None:
    """Fitted exponents by d, and the theorem's."""
    for task in tasks:
        for name in NAMES[task]:
            mine = where(fits, task=task, name=name)
            style = "s:" if task == "work" else "o-"
            dims = column(mine, "head_dim")
            label = "keys in reach of balls" if task == "work" else f"{task}: {name}"
            axes.plot(dims, column(mine, "exponent"), style, label=label)
        if task != "work":
            style = "k--" if task != "prefill" else "k:"
            axes.plot(dims, column(mine, "theorem"), style, label=f"theorem, {task}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="d", ylabel="exponent of n", title=" and ".join(tasks))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
