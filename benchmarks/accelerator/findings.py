"""What rows ask for, and what was found: from timings to one line of the table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks.harness import tables
from benchmarks.harness.timing import Timing

OURS = "hsr ("
"""What names of hsrjax's own implementations of reporting begin with."""
TOLERANCE_GRADIENTS = 2**-5
"""Of results that went through several products in bfloat16."""


class Asked(NamedTuple):
    """A row of the table.

    Attributes:
      what: in words.
      asked: the least.
      aim: what it is hoped to be.
      unit: "x" times as fast as the fastest dense, or "%".
    """

    what: str
    asked: float | None
    aim: float | None
    unit: str = "x"


ROWS: dict[int, Asked] = {
    0: Asked("contract suite, tests passed", 100, 100, "%"),
    1: Asked("ReLU^2 decode, 1M keys, 32/8 heads of 128, 256 fire", 3.3, 5),
    2: Asked("ReLU^2 decode, 128k keys, 8/4 heads of 64, 256 fire", 2.3, 3),
    3: Asked("ReLU^2 decode, batch 32, 8k keys, 32/8 heads of 128, 64 fire", 2.7, 3.3),
    4: Asked("ReLU^2 decode, 32k keys, 8/4 heads of 64, 256 fire", 1.1, 1.5),
    5: Asked("scan's bandwidth at 1M keys, of a copy's", 90, None, "%"),
    6: Asked("Softmax(epsilon=0.1) decode, 128k keys, trained-like", 1.8, 3),
    7: Asked("Softmax(top_r=64) decode, 128k keys, trained-like", 2.2, 3),
    8: Asked("append, share of a step at 128k keys", 10, 3, "% at most"),
    9: Asked("forward and backward, 16k causal, captured layers", 2, 3),
    10: Asked("training step of a ReLU LM, rows of 16k", 1.2, 2),
    11: Asked("released model's tokens, 64k prompt", 1.5, 3),
    12: Asked(
        "auto over the better of dense and hsr, worst cell", 1.1, None, "at most"
    ),
}


@dataclasses.dataclass
class Finding:
    """What came of a row.

    Attributes:
      number: of the row.
      measured: in the unit of the row; None where there is no number.
      ours_us: of a step by the fastest of ours.
      dense_us: of a step by the fastest dense.
      ours: its name.
      dense: its name.
      error: the largest of ours, relative.
      status: "measured", or why not.
      rows: lines of results.csv.
    """

    number: int
    measured: float | None = None
    ours_us: float | None = None
    dense_us: float | None = None
    ours: str = ""
    dense: str = ""
    error: float | None = None
    status: str = "measured"
    rows: list[tables.Row] = dataclasses.field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        asked = ROWS[self.number]
        fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        del fields["rows"], fields["number"]
        return asked._asdict() | fields


def lines(
    number: int,
    timings: dict[str, Timing],
    shared: tables.Row,
    *,
    allowed: float | None = None,
) -> list[tables.Row]:
    """Rows of results.csv, in microseconds.

    Args:
      number: of the row.
      timings: of a race.
      shared: columns of all.
      allowed: relative error, where it is not the dtype's.
    """
    found = []
    for row in tables.rows(timings, shared):
        if row["name"] == tables.DENSE:
            continue
        error = row["max_relative_error"]
        if allowed is not None and isinstance(error, float):
            row["status"] = "measured" if error <= allowed else tables.DIFFERS
        ms = row.pop("ms")
        row["us"] = None if ms is None else 1e3 * ms
        for name in ("dense_over_this", "this_over_hsr"):
            del row[name]
        found.append({"row": number, **row})
    return found


def compare(
    number: int,
    found: list[tables.Row],
    *,
    ours: Callable[[str], bool] = lambda name: name.startswith(OURS),
) -> Finding:
    """The fastest dense over the fastest of ours; what is wrong does not count.

    Args:
      number: of the row.
      found: of `lines`.
      ours: tells by a name whether it is one of those that are compared with dense.
    """
    others = [r for r in found if r["definition"] != "part" and not ours(r["name"])]
    best = fastest(r for r in found if ours(r["name"]))
    dense = fastest(r for r in others if r["name"] != "auto")
    finding = Finding(number, rows=found, status=_status(found, ours))
    if dense is not None:
        finding.dense, finding.dense_us = dense["name"], dense["us"]
    if best is not None:
        finding.ours, finding.ours_us = best["name"], best["us"]
        finding.error = best["max_relative_error"]
    if best is not None and dense is not None:
        finding.measured = dense["us"] / best["us"]
        for row in found:
            row["dense_over_this"] = dense["us"] / row["us"] if row["us"] else None
    return finding


def fastest(rows: Iterable[tables.Row]) -> tables.Row | None:
    """Of those that have a number and are not wrong."""
    good = [row for row in rows if row["us"] and row["status"] == "measured"]
    return min(good, key=lambda row: row["us"]) if good else None


def _status(found: list[tables.Row], ours: Callable[[str], bool]) -> str:
    """What is wrong with any of ours; else why none has a number."""
    mine = [row for row in found if ours(row["name"])]
    wrong = [row["name"] for row in mine if row["status"] == tables.DIFFERS]
    if wrong:
        return f"{', '.join(wrong)}: {tables.DIFFERS}"
    if not any(row["us"] for row in mine):
        return "; ".join(f"{r['name']}: {r['status']}" for r in mine) or "not run"
    return "measured"


def table(findings: dict[int, Finding], device: str) -> str:
    """All rows as text; those without a number say why below it."""
    head = ("row", "what", "asked", "aim", "measured", "us", "dense us", "error")
    cells: list[tuple[str, ...]] = [(*head, "fastest dense")]
    for number, one in sorted(findings.items()):
        asked = ROWS[number]
        numbers = (asked.asked, asked.aim, one.measured)
        cells.append(
            (
                str(number),
                asked.what,
                *(
                    f"{_short(x)} {asked.unit}" if x is not None else ""
                    for x in numbers
                ),
                _short(one.ours_us),
                _short(one.dense_us),
                "" if one.error is None else f"{one.error:.1e}",
                one.dense,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = [
        "  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    text += [
        f"row {number}: {one.status}"
        for number, one in sorted(findings.items())
        if one.status != "measured"
    ]
    return "\n".join([f"device: {device}", *text])


def _short(x: float | None) -> str:
    if x is None or not math.isfinite(x):
        return ""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"
