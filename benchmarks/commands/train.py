"""`python -m benchmarks train`: causal attention with its gradients.

The output and the gradients by query, key and value are computed inside the timer, the
index is built inside it, and all four are compared with float64.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.contestants import causal, peers, peers_jax
from benchmarks.harness import devices, oracle, pictures, tables
from benchmarks.harness.timing import race, relative_error
from benchmarks.header import Attending, Results

KEYS = (8192,)
QUICK_KEYS = (256,)


@dataclasses.dataclass(frozen=True)
class Command(Attending):
    """Times forward and backward over sequences in which 1 % of the keys fire.

    For example:

        python -m benchmarks train --keys 4096 --peers jax-softmax
    """

    keys: tuple[int, ...] = ()
    """Lengths: 8192; with --quick, 256."""


def run(command: Command) -> Results:
    """Measures every length."""
    names = command.chosen_peers(peers.names("train"))
    lengths = command.keys or (QUICK_KEYS if command.quick else KEYS)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(lengths) * command.rounds, unit="round") as bar:
        for keys in lengths:
            found = _measure(command, keys, names, bar)
            rows += found
            tqdm.write(f"{keys:,} keys: {tables.sentence(found)}")
    figures = draw(rows, command.inputs)
    return Results(rows, summarize(rows), figures, tables.wrong(rows))


def summarize(rows: list[tables.Row]) -> dict[str, Any]:
    """What was not measured, and ratios."""
    return {
        "not_measured": tables.not_measured(rows),
        "dense_over_hsr": tables.dense_over_hsr(rows),
    }


def _measure(command: Command, keys: int, names: list[str], bar) -> list[tables.Row]:
    """Rows of one length."""
    given = causal.make_inputs(command.source, keys)
    given = dataclasses.replace(given, loop=devices.sequence_loop())
    upstream = peers_jax.cotangent(given)
    expected = functools.cache(lambda x: oracle.gradients(given, x, upstream))

    def score(contestant, arrays):
        if contestant.definition not in oracle.DEFINITIONS:
            return None
        pairs = zip(arrays, expected(contestant.definition), strict=True)
        return max(relative_error(got, want) for got, want in pairs)

    timings = race(
        causal.contestants(names, "train", given, quick=command.quick),
        rounds=command.rounds,
        score=score,
        tick=tables.ticker(bar),
    )
    return tables.rows(timings, tables.describe(given))


def draw(rows: list[tables.Row], kind: str = "gaussian") -> dict[str, Figure]:
    """Bars of the longest sequence, the fastest on top."""
    longest = max(row["keys"] for row in rows)
    shown = [r for r in rows if r["keys"] == longest and r["ms"] and tables.drawn(r)]
    shown.sort(key=lambda row: -row["ms"])
    palette = pictures.colours(row["name"] for row in shown)
    figure = pictures.figure(width=8, height=1.5 + 0.35 * len(shown))
    axes = figure.subplots()
    names = [row["name"] for row in shown]
    bars = axes.barh(
        names, [r["ms"] for r in shown], color=[palette[name] for name in names]
    )
    axes.bar_label(bars, [f"{row['ms']:.0f}" for row in shown], padding=3)
    axes.set(
        xlabel="milliseconds",
        title=f"Forward and backward, {longest:,} {kind} keys",
    )
    axes.margins(x=0.1)
    return {"times.png": figure}
