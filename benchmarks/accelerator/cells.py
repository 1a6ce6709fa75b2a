"""The row of auto: never much slower than the better of dense and hsr, over a grid."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import hsrjax
from benchmarks.accelerator.findings import OURS, Finding, lines
from benchmarks.accelerator.setting import Setting
from benchmarks.contestants.growing import Looped, looped_contestant
from benchmarks.harness import drawn, loops, plain, tables
from benchmarks.harness.inputs import Shape
from benchmarks.harness.loops import Loop
from benchmarks.harness.timing import NO_TIME, Contestant, relative_error

SHAPES = tuple(
    Shape(keys=keys, batch=batch)
    for keys, batch in (
        (1 << 17, 1),
        (1 << 11, 1),
        (1 << 14, 8),
        (1 << 17, 8),
        (1 << 14, 1),
    )
)
PERCENTS = (0.01, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0)
METHODS = {
    "auto": "auto",
    "hsrjax dense (kernels)": "dense",
    f"{OURS}kernels)": "hsr",
}
STEPS = 40


def auto(setting: Setting) -> list[Finding]:
    """Every cell; a program for each method and shape, whatever the share of keys."""
    shapes, percents = SHAPES, PERCENTS
    if setting.quick:
        small = Shape(keys=128, heads=4, kv_heads=2, head_dim=16, value_dim=16)
        shapes, percents = (small,), (1.0, 100.0)
    setting = dataclasses.replace(setting, rounds=min(2, setting.rounds))
    cells = [_cells(shape, percents, setting) for shape in shapes]
    return [_worst(list(itertools.chain(*cells)), len(shapes) * len(percents))]


def _worst(cells: Iterable[list[tables.Row]], number: int) -> Finding:
    """The cell in which auto loses most.

    Args:
      cells: rows of each cell, which get its ratio.
      number: of cells that there are to be.
    """
    finding, ratios, faults = Finding(12), [], []
    for found in cells:
        finding.rows += found
        faults += [f"{r['name']}: {r['status']}" for r in found if not _good(r)]
        us = {row["name"]: row["us"] for row in found if _good(row)}
        if us.keys() != METHODS.keys():
            continue
        best = min((name for name in us if name != "auto"), key=lambda name: us[name])
        ratios.append(us["auto"] / us[best])
        for row in found:
            row["auto_over_best"] = ratios[-1]
        if ratios[-1] == max(ratios):
            where = "batch {batch}, {keys:,} keys, {percent:g} %".format(**found[0])
            finding.ours, finding.dense = f"auto at {where}", best
            finding.ours_us, finding.dense_us = us["auto"], us[best]
    finding.measured = max(ratios, default=None)
    errors = [row["max_relative_error"] for row in finding.rows if _good(row)]
    finding.error = max(errors, default=None)
    if faults:
        finding.status = "; ".join(dict.fromkeys(faults))
    elif len(ratios) < number:
        finding.status = f"{len(ratios)} cells of {number}: {NO_TIME}"
    return finding


def _good(row: tables.Row) -> bool:
    return row["us"] is not None and row["status"] == "measured"


def _cells(
    shape: Shape, percents: Sequence[float], setting: Setting
) -> Iterator[list[tables.Row]]:
    """Rows of each cell of a shape, as long as there is time."""
    if setting.left < 0:
        return
    scanned = shape.batch * shape.kv_heads * shape.keys * shape.head_dim
    loop = loops.of_step(scanned, steps=STEPS)
    if setting.quick:
        loop = Loop(2)
    made = drawn.decode(
        "gaussian", shape, seed=setting.seed, dtype="bfloat16", loop=loop
    )
    # Sums as they are: a quotient of two sums next to zero is inexact.
    inputs = dataclasses.replace(made.inputs, normalize="none")
    looped = Looped(inputs)
    fires = [max(1, round(shape.keys * percent / 100)) for percent in percents]
    cells = zip(percents, made.inputs_at(fires), strict=True)
    for percent, given in cells:
        if setting.left < 0:
            return
        law = hsrjax.ReLU(power=given.power, bias=given.bias, normalize="none")
        contestants = [
            looped_contestant(looped, name, method, setting.kernels, activation=law)
            for name, method in METHODS.items()
        ]
        asked = dataclasses.replace(given, normalize="none")
        expected = plain.step(asked, "relu")[0]

        def score(contestant: Contestant, arrays: Any, expected=expected) -> float:
            del contestant
            return relative_error(arrays[0], expected)

        timings = setting.race(contestants, score)
        shared = tables.describe(given) | {
            "percent": percent,
            "caches": loop.caches,
            "heads_are": "gaussian",
        }
        yield lines(12, timings, shared)
