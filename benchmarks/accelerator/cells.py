"""The row of auto: never much slower than the better of dense and hsr, over a grid."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import hsrjax
from benchmarks.accelerator.findings import Finding, lines
from benchmarks.accelerator.setting import Setting
from benchmarks.contestants.growing import Looped, looped_contestant
from benchmarks.harness import drawn, loops, plain, tables
from benchmarks.harness.inputs import Shape
from benchmarks.harness.loops import Loop
from benchmarks.harness.timing import Contestant, relative_error

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
METHODS = ("auto", "dense", "hsr")
STEPS = 40


def auto(setting: Setting) -> list[Finding]:
    """Every cell; a program for each method and shape, whatever the share of keys."""
    shapes, percents = SHAPES, PERCENTS
    if setting.quick:
        small = Shape(keys=128, heads=4, kv_heads=2, head_dim=16, value_dim=16)
        shapes, percents = (small,), (1.0, 100.0)
    setting = dataclasses.replace(setting, rounds=min(2, setting.rounds))
    finding, worst = Finding(12), 0.0
    ratios = []
    for shape in shapes:
        for percent, found in _cells(shape, percents, setting):
            finding.rows += found
            us = {row["name"]: row["us"] for row in found}
            wrong = [r["name"] for r in found if r["status"] != "measured"]
            if wrong:
                finding.status = (
                    f"{', '.join(wrong)} at {shape.keys:,} keys: "
                    + ", ".join(r["status"] for r in found if r["name"] in wrong)
                )
            if any(us.get(name) is None for name in METHODS):
                continue
            best = min(METHODS[1:], key=lambda name: us[name])
            ratio = us["auto"] / us[best]
            ratios.append(ratio)
            for row in found:
                row["auto_over_best"] = ratio
            if ratio > worst:
                worst = finding.measured = ratio
                where = f"batch {shape.batch}, {shape.keys:,} keys, {percent:g} % fire"
                finding.ours, finding.dense = f"auto: {where}", best
                finding.ours_us, finding.dense_us = us["auto"], us[best]
    if not ratios:
        finding.status = finding.status if finding.rows else "not run"
        return [finding]
    finding.error = max(row["max_relative_error"] or 0.0 for row in finding.rows)
    if finding.status == "measured" and len(ratios) < len(shapes) * len(percents):
        finding.status = f"{len(ratios)} cells of {len(shapes) * len(percents)}"
    finding.rows[0]["detail"] += (
        f", median of all cells {statistics.median(ratios):.3f}"
    )
    return [finding]


def _cells(shape: Shape, percents, setting: Setting):
    """Percent and rows of each cell of a shape."""
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
            looped_contestant(looped, name, name, setting.kernels, activation=law)
            for name in METHODS
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
        yield percent, lines(12, timings, shared)
