"""`python -m benchmarks decode`: one step over a long KV cache.

Appending the token to cache and index is inside the timer, for everyone. Thresholds are
part of the input: min(1 % of S, 256) keys fire in each row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.contestants import dense, growing, peers
from benchmarks.harness import devices, inputs, internals, oracle, pictures, tables
from benchmarks.harness.inputs import Inputs, Shape
from benchmarks.harness.timing import Contestant, race
from benchmarks.header import Attending, Results
from models.command import did_you_mean

ARRIVED = "hsr (arrival order)"
LEAST_FIRING = 5
"""So that a row is not a quotient of two weights next to zero, inexact in float32."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Caches of several lengths and one shape.

    Attributes:
      about: in words.
      shape: heads and sizes; its keys are replaced by `keys`.
      keys: lengths S.
      fires: keys that fire in each row, at most 1 % of S; None is at most 256.
      reindexed: "hsr" has a cache in spatial order, made outside the timer, as a
        prompt's is; a cache in order of arrival takes part beside it.
    """

    about: str
    shape: Shape
    keys: tuple[int, ...]
    fires: int | None = None
    reindexed: bool = False

    def firing(self, keys: int) -> int:
        """Keys that fire among S."""
        return self.fires or max(LEAST_FIRING, min(256, round(keys / 100)))


CASES = {
    "gqa": Case(
        "8 query / 4 key heads of 64",
        Shape(keys=0),
        (512, 1024, 2048, 4096, 8192, 16384, 32768, 131072, 524288),
    ),
    "heads-16": Case(
        "8 query / 4 key heads of 16, values of 64",
        Shape(keys=0, head_dim=16),
        (131072,),
    ),
    "heads-128": Case(
        "24 query / 8 key heads of 128",
        Shape(keys=0, heads=24, kv_heads=8, head_dim=128, value_dim=128),
        (40960,),
    ),
    "heads-8": Case(
        "8 query / 4 key heads of 8, 64 keys fire",
        Shape(keys=0, head_dim=8, value_dim=8),
        (16384, 65536, 262144, 1048576),
        fires=64,
        reindexed=True,
    ),
}
QUICK_KEYS = (512, 1024)


@dataclasses.dataclass(frozen=True)
class Command(Attending):
    """Times one decode step of thresholded ReLU^2 attention over growing caches.

    For example:

        python -m benchmarks decode --cases gqa --keys 8192 --peers none
    """

    cases: tuple[str, ...] = ()
    """Some of gqa, heads-16, heads-128, heads-8: else all, with --quick gqa alone."""
    keys: tuple[int, ...] = ()
    """Lengths of the cache, instead of each case's own."""
    dtype: inputs.DType = "float32"
    """Of queries, keys and values: bfloat16 for random inputs alone."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        super().__post_init__()
        unknown = [name for name in self.cases if name not in CASES]
        if unknown:
            meant = did_you_mean(unknown[0], CASES)
            raise ValueError(
                f"unknown cases {unknown}: {meant}choose from {list(CASES)}"
            )


def run(command: Command) -> Results:
    """Measures every case."""
    source = dataclasses.replace(command.source, dtype=command.dtype)
    names = command.chosen_peers(peers.names("decode"))
    plan = [
        (name, keys) for name, case in _cases(command).items() for keys in case.keys
    ]
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(plan) * command.rounds, unit="round") as bar:
        for name, keys in plan:
            case = _cases(command)[name]
            found = _measure(case, source, keys, names, command.rounds, bar)
            rows += [{"case": name, **row} for row in found]
            tqdm.write(f"{name}, {keys:,} keys: {tables.sentence(found)}")
    figures = draw(rows, command.inputs)
    return Results(rows, summarize(rows), figures, tables.wrong(rows))


def _cases(command: Command) -> dict[str, Case]:
    """The cases asked for, with the lengths asked for."""
    if command.captured is not None:
        tokens = inputs.captured_tokens(command.captured)
        powers = [2**i for i in range(8, 24) if 2**i <= tokens]
        keys = command.keys or tuple(powers)
        return {"captured": Case("captured heads", Shape(keys=0), keys)}
    names = command.cases or (("gqa",) if command.quick else tuple(CASES))
    cases = {}
    for name in names:
        keys = QUICK_KEYS if command.quick else CASES[name].keys
        cases[name] = dataclasses.replace(CASES[name], keys=command.keys or keys)
    return cases


def _measure(case, source, keys, names, rounds, bar) -> list[dict[str, Any]]:
    shape = dataclasses.replace(case.shape, keys=keys)
    given = inputs.decode(source, shape, case.firing(keys))
    given = dataclasses.replace(given, loop=devices.decode_loop(given.key.size))
    hsrjaxs, reindex_ms = _ours(given, case)
    contestants = [
        *hsrjaxs,
        *dense.decode_contestants(given),
        *peers.contestants(names, "decode", given),
    ]
    against, expected = oracle.scoring(given)
    looked_at = {}

    def score(contestant, arrays):
        if contestant.name == "hsr":
            looked_at["hsr"] = float(np.mean(arrays[-1]))
        return against(contestant, arrays)

    timings = race(contestants, rounds=rounds, score=score, tick=tables.ticker(bar))
    shared = tables.describe(given) | {"firing_keys": expected("relu").firing}
    rows = tables.rows(timings, shared)
    append = timings["append alone"].ms
    for row in rows:
        if row["name"] == "hsr" and append is not None:
            row["append_ms"] = append
            row["append_share"] = append / row["ms"]
            row["keys_looked_at"] = looked_at["hsr"]
        row["reindex_ms"] = reindex_ms() if row["name"] == "hsr" else None
    return rows


def _ours(given: Inputs, case: Case) -> tuple[list[Contestant], Any]:
    """hsrjax's methods, and what tells how long putting the cache in order took."""
    if given.loop is not None:
        return _ours_looped(given, case), lambda: None
    cache = growing.Growing(given, reindexed=case.reindexed)
    arrived = growing.Growing(given) if case.reindexed else None
    contestants = [
        growing.contestant(cache, "hsr", "hsr"),
        *([growing.contestant(arrived, ARRIVED, "hsr")] if arrived else []),
        growing.contestant(cache, "auto", "auto"),
        growing.append_contestant(cache),
        growing.contestant(cache, "hsrjax dense", "dense"),
    ]
    return contestants, lambda: cache.reindex_ms


def _ours_looped(given: Inputs, case: Case) -> list[Contestant]:
    """The same with many steps in a program, and kernels beside what is preferred."""
    caches = growing.Looped(given, reindexed=case.reindexed)
    plan = [("hsr", "hsr", None), ("auto", "auto", None)]
    plan.append(("hsrjax dense", "dense", None))
    if not internals.kernels_missing():
        plan += [("hsr (triton)", "hsr", "triton")]
        plan += [("hsrjax dense (triton)", "dense", "triton")]
    found = [
        growing.looped_contestant(caches, *one, informed=one[0] == "hsr")
        for one in plan
    ]
    if case.reindexed:
        arrived = growing.Looped(given)
        found.append(growing.looped_contestant(arrived, ARRIVED, "hsr"))
    append = Contestant("append alone", "part", caches.appending, lambda _: ())
    return [*found, append]


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios, break-even and slopes by case."""
    summary: dict[str, Any] = {"not_measured": tables.not_measured(rows)}
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = tables.where(rows, case=case)
        ratios = tables.dense_over_hsr(mine)
        summary[case] = {
            "dense_over_hsr": ratios,
            "break_even_keys": tables.crossing(list(ratios), list(ratios.values())),
            "log_log_slope": {
                name: tables.slope(*tables.series(mine, name))
                for name in ("hsr", "dense", ARRIVED)
                if any(row["name"] == name for row in mine)
            },
        }
    return summary


def draw(rows: list[tables.Row], kind: str = "gaussian") -> dict[str, Figure]:
    """Times by length, and beside them those over hsr's, by case."""
    figures = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = tables.where(rows, case=case)
        if len({row["keys"] for row in mine}) < 2:
            continue
        figure = pictures.figure(width=11)
        times, ratios = figure.subplots(1, 2)
        mine = [row for row in mine if tables.drawn(row)]
        pictures.plot_lines(times, mine, x="keys", y="ms")
        times.set(xlabel="keys in the cache", ylabel="milliseconds per step")
        pictures.plot_lines(ratios, mine, x="keys", y="this_over_hsr")
        ratios.set(xlabel="keys in the cache", ylabel="time / time of hsr")
        ratios.axhline(1.0, color="tab:red", linewidth=1)
        figure.legend(*times.get_legend_handles_labels(), loc="outside right upper")
        about = CASES[case].about if case in CASES else "captured heads"
        figure.suptitle(f"One decode step, {about}, {kind} keys")
        figures["times.png" if case in ("gqa", "captured") else f"{case}.png"] = figure
    return figures
