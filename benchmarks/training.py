"""`python -m benchmarks train`: causal attention with its gradients.

The output and the gradients by query, key and value are computed inside the timer, the
index is built inside it, and all four are compared with float64.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import causal, inputs, oracle, peers, peers_jax, report, tables
from benchmarks.common import Results, Settings, chosen_peers
from benchmarks.inputs import Source
from benchmarks.timing import race, relative_error

KEYS = (8192,)
QUICK_KEYS = (256,)


@dataclasses.dataclass(frozen=True)
class Command(Settings):
    """Times forward and backward over sequences in which 1 % of the keys fire."""

    keys: tuple[int, ...] = ()
    """Lengths: 8192; with --quick, 256."""
    inputs: inputs.Kind = "gaussian"
    """What keys and queries are."""
    captured: inputs.Captured = None
    """File of python -m benchmarks.capture, for --inputs captured."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        super().__post_init__()
        if self.keys and min(self.keys) < 2:
            raise ValueError("keys must be 2 or more")


def run(command: Command) -> Results:
    """Measures every length."""
    source = Source(command.inputs, command.captured, command.seed)
    names = chosen_peers(command, peers.names("train"))
    lengths = command.keys or (QUICK_KEYS if command.quick else KEYS)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(lengths) * command.rounds, unit="round") as bar:
        for keys in lengths:
            found = measure(command, source, keys, names, bar)
            rows += found
            tqdm.write(f"{keys:,} keys: {tables.sentence(found)}")
    summary = {
        "not_measured": tables.not_measured(rows),
        "dense_over_hsr": tables.dense_over_hsr(rows),
    }
    figures = {"times.png": _figure(rows, command)}
    return Results(rows, summary, figures, tables.wrong(rows))


def measure(command, source, keys: int, names: list[str], bar) -> list[dict[str, Any]]:
    """Rows of one length."""
    given = causal.make_inputs(source, keys)
    upstream = peers_jax.cotangent(given)
    expected: dict[str, Any] = {}

    def score(contestant, arrays):
        definition = contestant.definition
        if definition not in ("relu", "softmax"):
            return None
        if definition not in expected:
            expected[definition] = oracle.gradients(given, definition, upstream)
        pairs = zip(arrays, expected[definition], strict=True)
        return max(relative_error(got, want) for got, want in pairs)

    timings = race(
        causal.contestants(names, "train", given, quick=command.quick),
        rounds=command.rounds,
        score=score,
        tick=tables.ticker(bar),
    )
    return tables.rows(timings, tables.describe(given), dense=tables.DENSE)


def _figure(rows: list[dict[str, Any]], command: Command) -> Figure:
    """Bars of the longest sequence, the fastest on top."""
    longest = max(row["keys"] for row in rows)
    shown = [r for r in rows if r["keys"] == longest and r["ms"] and tables.drawn(r)]
    shown.sort(key=lambda row: -row["ms"])
    palette = report.colours(row["name"] for row in shown)
    figure = report.figure(width=8, height=1.5 + 0.35 * len(shown))
    axes = figure.subplots()
    names = [row["name"] for row in shown]
    bars = axes.barh(
        names, [r["ms"] for r in shown], color=[palette[name] for name in names]
    )
    axes.bar_label(bars, [f"{row['ms']:.0f}" for row in shown], padding=3)
    axes.set(
        xlabel="milliseconds",
        title=f"Forward and backward, {longest:,} {command.inputs} keys",
    )
    axes.margins(x=0.1)
    return figure
