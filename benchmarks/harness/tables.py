"""From timings to rows of results.csv, and to the sentences that are printed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.harness.inputs import Inputs
from benchmarks.harness.oracle import DEFINITIONS
from benchmarks.harness.timing import Timing

TOLERANCE = 1e-5
"""Largest relative error of hsrjax and of the dense baselines, in float32."""
PEER_TOLERANCE = 1e-4
"""Of peers, whose algorithms sum in another order (running maxima and the like)."""
TOLERANCE_BFLOAT16 = 2**-7
"""Of all, in bfloat16: half an ulp from the weights and half from the output."""
DENSE = "dense"
"""Row that repeats the fastest of the dense baselines."""
DIFFERS = "differs from float64"
"""Status of a row whose result is wrong."""
Row = dict[str, Any]


def where(rows: list[Row], **columns: Any) -> list[Row]:
    """The rows in which columns have these values."""
    return [row for row in rows if all(row[k] == v for k, v in columns.items())]


def column(rows: list[Row], name: str) -> list[Any]:
    """One column of all rows."""
    return [row[name] for row in rows]


def ticker(bar: tqdm) -> Callable[[str], None]:
    """For `race`: shows whose turn it is, and advances after each round."""

    def tick(name: str) -> None:
        if name:
            bar.set_postfix_str(name)
        else:
            bar.update()

    return tick


def describe(inputs: Inputs) -> Row:
    """The columns that say what was attended to."""
    b, t, n, h = inputs.query.shape
    return {
        "batch": b,
        "queries": t,
        "keys": inputs.key.shape[1],
        "heads": n,
        "kv_heads": inputs.key.shape[2],
        "head_dim": h,
        "value_dim": inputs.value.shape[-1],
        "dtype": inputs.dtype,
    }


def rows(timings: dict[str, Timing], shared: Row) -> list[Row]:
    """A row for each contestant, and one for the fastest of the dense baselines.

    Args:
      timings: of `race`.
      shared: columns that all rows have.
    """
    found = [_row(timing, shared) for timing in timings.values()]
    measured = [r for r in found if r["ms"] is not None and is_dense(r["name"])]
    if measured:
        best = min(measured, key=lambda row: row["ms"])
        found.insert(0, best | {"name": DENSE, "detail": best["name"]})
        for row in found:
            if row["ms"] is not None:
                row["dense_over_this"] = best["ms"] / row["ms"]
    hsr = next((r["ms"] for r in found if r["name"] == "hsr"), None)
    for row in found:
        row["this_over_hsr"] = row["ms"] / hsr if hsr and row["ms"] else None
    return found


def is_dense(name: str) -> bool:
    """Whether a name is that of a dense ReLU baseline."""
    return name.startswith(("dense ", "hsrjax dense"))


def drawn(row: Row) -> bool:
    """Whether a row belongs into pictures: of the dense baselines the fastest alone."""
    return not is_dense(row["name"]) and row["name"] != "append alone"


def _row(timing: Timing, shared: Row) -> Row:
    one = timing.contestant
    scored = one.definition in DEFINITIONS
    error = timing.error if scored else None
    row = shared | {
        "name": one.name,
        "definition": one.definition,
        "ms": timing.ms,
        "fastest_round_ms": 1e3 * min(timing.rounds) if timing.rounds else None,
        "slowest_round_ms": 1e3 * max(timing.rounds) if timing.rounds else None,
        "timed_calls": timing.calls,
        "dense_over_this": None,
        "this_over_hsr": None,
        "max_relative_error": error if scored else "n/a, other definition",
        "status": _status(timing, shared.get("dtype")),
        "detail": one.detail,
    }
    if one.definition == "part":
        row["max_relative_error"] = "n/a, part of a step"
    return row


def _status(timing: Timing, dtype: str | None) -> str:
    if timing.failure:
        return timing.failure
    if timing.error is None:
        return "measured"
    return verdict(timing.error, ours=timing.contestant.ours, dtype=dtype)


def verdict(error: float, *, ours: bool = True, dtype: str | None = "float32") -> str:
    """What the status column says of a relative error."""
    allowed = TOLERANCE if ours else PEER_TOLERANCE
    if dtype == "bfloat16":
        allowed = TOLERANCE_BFLOAT16
    return "measured" if error <= allowed else DIFFERS


def wrong(rows: list[Row]) -> list[str]:
    """The rows whose results differ from the definition, in words."""
    return [
        f"{row['name']} at {row['keys']:,} keys (relative error "
        f"{row['max_relative_error']:.1e})"
        for row in rows
        if row["status"] == DIFFERS and row["name"] != DENSE
    ]


def series(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """Keys and milliseconds of one name."""
    mine = [row for row in where(rows, name=name) if row["ms"] is not None]
    return column(mine, "keys"), column(mine, "ms")


def dense_over_hsr(rows: list[Row]) -> dict[int, float]:
    """Time of the fastest dense over that of hsr, by keys, where both were measured."""
    dense, hsr = (
        dict(zip(*series(rows, name), strict=True)) for name in (DENSE, "hsr")
    )
    return {keys: dense[keys] / hsr[keys] for keys in hsr if keys in dense}


def not_measured(rows: list[Row]) -> dict[str, str]:
    """Names that have no number anywhere, and why."""
    measured = {row["name"] for row in rows if row["ms"] is not None}
    return {r["name"]: r["status"] for r in rows if r["name"] not in measured}


def sentence(rows: list[Row]) -> str:
    """The ratios of one size in one line."""
    by_name = {row["name"]: row for row in rows}
    parts = []
    if DENSE in by_name and by_name["hsr"]["ms"] is not None:
        row = by_name["hsr"]
        parts.append(f"dense/hsr {row['dense_over_this']:.2f}")
        if "append_share" in row:
            parts.append(f"append {100 * row['append_share']:.0f} % of the step")
    for row in rows:
        if row["name"] in ("hsr", DENSE, "append alone") or is_dense(row["name"]):
            continue
        ratio = row["this_over_hsr"]
        words = row["status"] if ratio is None else f"{ratio:.2f}x hsr"
        parts.append(f"{row['name']} {words}")
    return "; ".join(parts)


def slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Of log y over log x by least squares; None below two points."""
    if len(x) < 2:
        return None
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def crossing(x: Sequence[float], ratio: Sequence[float]) -> float | None:
    """Where a ratio over ascending x rises above 1 for good, log-log interpolated.

    None where it never does; the first x where it always is above.
    """
    above = [r >= 1 for r in ratio]
    if not above or not above[-1]:
        return None
    last_below = max((i for i, yes in enumerate(above) if not yes), default=None)
    if last_below is None:
        return float(x[0])
    (x0, x1), (r0, r1) = (v[last_below : last_below + 2] for v in (x, ratio))
    share = math.log(1 / r0) / math.log(r1 / r0)
    return float(x0 * (x1 / x0) ** share)
