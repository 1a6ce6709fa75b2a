"""`python -m benchmarks grid`: is auto never much slower than the better choice?

Decode steps of hsrjax's own three methods, over lengths, batches and shares of
keys that fire. auto is measured like the others, so its ratio holds noise as well.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.contestants import growing
from benchmarks.harness import inputs, oracle, pictures, tables
from benchmarks.harness.inputs import Shape, Source
from benchmarks.harness.timing import race
from benchmarks.header import Results, Settings

KEYS = (512, 2048, 8192, 32768, 131072, 524288)
BATCHES = (1, 4)
PERCENTS = (0.01, 0.1, 1.0, 10.0, 50.0, 100.0)
METHODS = ("auto", "dense", "hsr")


@dataclasses.dataclass(frozen=True)
class Command(Settings):
    """Times decode steps of auto, dense and hsr over a grid; peers play no part.

    For example:

        python -m benchmarks grid --keys 4096 32768
    """

    keys: tuple[int, ...] = ()
    """Lengths of the cache: 512 to 524288; with --quick, 512."""
    batches: tuple[int, ...] = ()
    """Rows of the batch: 1 and 4; with --quick, 1."""
    percents: tuple[float, ...] = ()
    """Keys that fire, in percent: 0.01 to 100; with --quick, 1 and 100."""
    inputs: inputs.Kind = "gaussian"
    """gaussian or clustered."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        super().__post_init__()
        if any(not 0 < percent <= 100 for percent in self.percents):
            raise ValueError("percents must lie above 0 and at most at 100")
        if self.inputs == "captured":
            raise ValueError("captured thresholds fix how many keys fire: no grid")


def run(command: Command) -> Results:
    """Measures every cell."""
    source = Source(command.inputs, None, command.seed)
    quick = command.quick
    keys = command.keys or ((512,) if quick else KEYS)
    batches = command.batches or ((1,) if quick else BATCHES)
    percents = command.percents or ((1.0, 100.0) if quick else PERCENTS)
    cells = [(b, s) for b in batches for s in keys]
    rows: list[dict[str, Any]] = []
    steps = len(cells) * len(percents) * command.rounds
    with tqdm(total=steps, unit="round") as bar:
        for batch, length in cells:
            shape = Shape(keys=length, batch=batch)
            for row in _measure(source, shape, percents, command.rounds, bar):
                rows.append(row)
                tqdm.write(
                    f"batch {batch}, {length:,} keys, {row['percent']:g} % fire: "
                    f"auto/best {row['auto_over_best']:.2f}, "
                    f"dense/hsr {row['dense_over_hsr']:.2f}"
                )
    summary = summarize(rows)
    worst = summary["worst"]
    tqdm.write(
        f"worst cell: batch {worst['batch']}, {worst['keys']:,} keys, "
        f"{worst['percent']:g} %: auto takes {worst['auto_over_best']:.2f} times the "
        "better of dense and hsr"
    )
    wrong = [
        f"batch {row['batch']}, {row['keys']:,} keys, {row['percent']:g} %: relative "
        f"error {row['max_relative_error']:.1e}"
        for row in rows
        if row["status"] != "measured"
    ]
    return Results(rows, summary, draw(rows), wrong)


def _measure(source: Source, shape: Shape, percents, rounds: int, bar):
    """Rows of one length and batch; only the thresholds differ between them."""
    given = inputs.decode(source, shape, 1)
    # Sums as they are: a quotient of two sums next to zero is inexact in float32.
    given = dataclasses.replace(given, normalize="none")
    cache = growing.Growing(given)
    for percent in percents:
        fires = max(1, round(shape.keys * percent / 100))
        bias = inputs.thresholds(
            given.query, given.key, lambda _, n=fires: n, causal=False
        )
        asked = dataclasses.replace(given, bias=bias)
        score, expected = oracle.scoring(asked)
        cache.set_bias(bias)
        timings = race(
            [growing.contestant(cache, name, name) for name in METHODS],
            rounds=rounds,
            score=score,
            tick=tables.ticker(bar),
        )
        found = {name: timing.ms or math.nan for name, timing in timings.items()}
        error = max(timing.error or 0.0 for timing in timings.values())
        yield {
            "batch": shape.batch,
            "keys": shape.keys,
            "percent": percent,
            "firing_keys": expected("relu").firing,
            "auto_ms": found["auto"],
            "dense_ms": found["dense"],
            "hsr_ms": found["hsr"],
            "auto_over_best": found["auto"] / min(found["dense"], found["hsr"]),
            "dense_over_hsr": found["dense"] / found["hsr"],
            "max_relative_error": error,
            "status": tables.verdict(error),
        }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The cell in which auto loses most."""
    return {"worst": max(rows, key=lambda row: row["auto_over_best"])}


def draw(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """auto beside the better of both, and dense beside hsr."""
    return {
        "auto.png": _heat_map(rows, "auto_over_best", "auto / min(dense, hsr)"),
        "dense_over_hsr.png": _heat_map(
            rows, "dense_over_hsr", "dense / hsr", colours="RdYlGn", powers=3
        ),
    }


def _heat_map(
    rows: list[dict[str, Any]],
    column: str,
    title: str,
    *,
    colours: str = "RdYlGn_r",
    powers: int = 1,
) -> Figure:
    """A picture per batch: lengths against shares, a ratio in each cell.

    Its colours, of which red is bad, span so many powers of 2 up and down.
    """
    batches = sorted({row["batch"] for row in rows})
    keys = sorted({row["keys"] for row in rows})
    percents = sorted({row["percent"] for row in rows})
    width = 2 + len(batches) * (1.5 + 0.75 * len(percents))
    figure = pictures.figure(width=width, height=1.8 + 0.5 * len(keys))
    grid = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(grid, batches, strict=True):
        cells = np.full((len(keys), len(percents)), np.nan)
        for row in tables.where(rows, batch=batch):
            place = keys.index(row["keys"]), percents.index(row["percent"])
            cells[place] = row[column]
        image = axes.imshow(
            np.log2(cells), cmap=colours, vmin=-powers, vmax=powers, aspect="auto"
        )
        for (i, j), value in np.ndenumerate(cells):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(percents)), [f"{p:g}" for p in percents])
        axes.set_yticks(range(len(keys)), [f"{n:,}" for n in keys])
        axes.set(xlabel="keys that fire, %", ylabel="keys", title=f"batch {batch}")
    figure.colorbar(image, ax=grid, label="log2")
    figure.suptitle(title)
    return figure
