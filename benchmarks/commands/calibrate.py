"""`python -m benchmarks calibrate`: what work costs here, for method="auto".

Times decode steps and one prefill of hsrjax itself, with inputs that isolate one cost
each (no key fires, all fire, other head sizes), and solves for the numbers of
`hsrjax._src.planning.costs.Costs`. Where kernels run that have costs of their own,
these are measured too, with bfloat16 keys and values.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import hsrjax
from benchmarks.contestants import growing
from benchmarks.files.results import as_json, clean, staged
from benchmarks.harness import inputs, internals, tables
from benchmarks.harness.inputs import DType, Shape, Source
from benchmarks.harness.internals import Work, costs
from benchmarks.harness.timing import Contestant, race
from benchmarks.header import Results, Settings

OUT = Path("runs/costs.json")
KEYS = (512, 2048, 8192, 32768, 131072, 524288)
NONE, ALL = np.inf, -np.inf
"""Thresholds over which no key fires, and all do."""
SHARE = 0.1
"""Of the keys, for each row, where gathering is timed: about where dense takes over."""
DECODE_ROWS = 2
"""Query rows of a key head in a decode step here."""
SELECT = ("top_r_dense", "top_r_hsr", "epsilon_dense", "epsilon_hsr")
FEW = 64
"""Keys that softmax keeps where its choosing is timed."""
_SHARP = 8.0
"""Scale by which as few of the keys here hold 9/10 of a softmax row."""


@dataclasses.dataclass(frozen=True)
class Command(Settings):
    """Measures the table by which method="auto" chooses, and writes it.

    For example:

        python -m benchmarks calibrate --out runs/costs.json
    """

    out: Path | None = None
    """File of the table: runs/costs.json. HSRJAX_COSTS=FILE makes hsrjax use it."""

    @property
    def file(self) -> Path:
        """Where the table goes, with the default resolved."""
        return self.out or OUT


def run(command: Command) -> Results:
    """Measures everything, for every implementation that has costs of its own."""
    names = internals.implementations()
    keys = (512,) if command.quick else KEYS
    steps = sum(len(keys) + (5 if name == "xla" else 4) for name in names)
    tables: list[costs.Costs] = []
    with tqdm(total=steps * command.rounds, unit="round") as bar:
        timed = functools.partial(_timed, rounds=command.rounds, bar=bar)
        for name in names:
            tables.append(_measure(name, timed, keys, command, tables))
    found = Results([], {"table": {}})
    for table in tables:
        found.summary["table"] |= costs.to_json(table)
        found.rows.extend(_rows(table))
    found.summary["machine"] = tables[0].machine._asdict()
    found.summary |= summarize(tables[0])
    found.summary["others"] = {x.implementation: summarize(x) for x in tables[1:]}
    return found


def _measure(name: str, timed, keys, command: Command, before) -> costs.Costs:
    """The costs of one implementation; XLA chooses softmax's keys for all of them."""
    near, middle, far = (512,) * 3 if command.quick else (8192, 16384, 131072)
    sequence = 256 if command.quick else 2048
    cached = functools.partial(_Cache, seed=command.seed, implementation=name)
    dense, scan = _curves(timed, keys, cached)
    wide, narrow = (_slot(timed, far, h, cached) for h in (64, 16))
    probe = _probe(timed, near, cached)
    if before:
        select = {x: getattr(before[0], x) for x in SELECT}
    else:
        select = _select(timed, middle, cached)
    solved = solve(
        dense,
        scan,
        wide=wide,
        narrow=narrow,
        probe=probe,
        select=select,
        prefill=_prefill(timed, sequence, command.seed, name),
        work=internals.work(keys=sequence, heads=8, kv_heads=4, head_dim=64),
        size=_size(name),
    )
    return costs.Costs(
        machine=costs.this_machine(),
        origin="measured",
        implementation=name,
        dense=dense,
        scan=scan,
        **solved,
    )


def _dtype(implementation: str) -> DType:
    """Of keys and values: what kernels are used for."""
    return "float32" if implementation == "xla" else "bfloat16"


def _size(implementation: str) -> int:
    """By how much the numbers of keys and values count: kernels cost by their bytes."""
    return 1 if implementation == "xla" else 2


def _rows(table: costs.Costs) -> list[dict[str, Any]]:
    """A line for every number of a table."""
    which = {"implementation": table.implementation}
    solved = [x.name for x in dataclasses.fields(table) if x.type == "float"]
    rows = [{**which, "cost": name, "ns": getattr(table, name)} for name in solved]
    for name in ("dense", "scan"):
        curve = getattr(table, name)
        rows += [{**which, "cost": name, "amount": x, "ns": ns} for x, ns in curve]
    return rows


def finish(words: list[str], command: Command, found: Results) -> int:
    """Prints, and writes the table whole or not at all."""
    del words
    summary, file = dict(found.summary), command.file
    table = summary.pop("table")
    for row in found.rows:
        amount = f" {row['amount']:>12,.0f}" if "amount" in row else " " * 13
        cost = f"{row['implementation']:<8}{row['cost']:<15}{amount}"
        print(f"{cost} {row['ns']:>14,.4g} ns")
    print(in_words(summary))
    for name, other in summary["others"].items():
        print(f"{name}, bfloat16: {in_words(other)}")
    with staged(file.parent) as stage:
        (stage / file.name).write_text(as_json(table))
    print(f"written: {file}. To use it: export {costs.VARIABLE}={file}")
    if command.json:
        rows = {"rows": found.rows, "summary": summary, "wrong": found.wrong}
        print(json.dumps(clean(rows | {"file": str(file)})))
    return 0


def summarize(table: costs.Costs) -> dict[str, Any]:
    """From how many keys on reporting may pay, and which share of them is too many."""
    shares = {2**i: internals.break_even(2**i, table) for i in range(8, 21)}
    shares = {keys: share for keys, share in shares.items() if share is not None}
    least = min(shares, default=None)
    return {"break_even_keys": least, "break_even_share": shares}


def in_words(summary: dict[str, Any]) -> str:
    """The break-even for people."""
    least = summary["break_even_keys"]
    if least is None:
        return "one decode step: dense is expected to be faster up to 1,048,576 keys"
    shares = summary["break_even_share"]
    some = ", ".join(
        f"{100 * share:.2g} % at {keys:,}" for keys, share in list(shares.items())[::2]
    )
    return (
        f"one decode step, 8 query / 4 key heads of 64: dense below {least:,} keys; "
        f"from there on dense where more than so many keys are reported: {some}"
    )


def _timed(
    calls: dict[str, Callable[[], Any]], *, rounds: int, bar: tqdm, steps: int = 1
) -> dict[str, float]:
    """Nanoseconds of each step, in turns; the best round, as noise only adds."""
    contestants = [
        Contestant(name, "part", lambda call=call: lambda: call, lambda _: ())
        for name, call in calls.items()
    ]
    timings = race(
        contestants, rounds=rounds, score=lambda *_: None, tick=tables.ticker(bar)
    )
    return {name: 1e9 * min(timing.rounds) / steps for name, timing in timings.items()}


def _curves(timed, lengths: tuple[int, ...], cached):
    """Dense steps and steps in which no key survives, over lengths."""
    dense, scan = [], []
    for keys in lengths:
        cache = cached(Shape(keys=keys))
        ways = {way: cache.call(way, NONE) for way in ("dense", "hsr")}
        ns = timed(ways, steps=internals.steps_of_a_call())
        numbers = 4 * cache.step.room * 64
        dense.append((2 * numbers * cache.size, ns["dense"]))
        scan.append((numbers, ns["hsr"]))
    return tuple(dense), tuple(scan)


def _slot(timed, keys: int, head_dim: int, cached) -> float:
    """Nanoseconds for one key and value of this head size, among many more."""
    cache = cached(Shape(keys=keys, head_dim=head_dim, value_dim=head_dim))
    some = cache.threshold(SHARE)
    ways = {"none": cache.call("hsr", NONE), "some": cache.call("hsr", some)}
    ns = timed(ways, steps=internals.steps_of_a_call())
    _, info = cache.call("hsr", some)()
    reported = np.asarray(info.candidates)[0, 0, ::DECODE_ROWS]
    capacity = cache.step.plan(hsrjax.ReLU()).capacity if cache.size == 1 else 1
    slots = capacity * int(np.sum(-(-reported // capacity)))
    return max(0.0, ns["some"] - ns["none"]) / slots


def _probe(timed, keys: int, cached) -> float:
    """Nanoseconds for a look at a sample, over few keys: it is the same over many."""
    cache = cached(Shape(keys=keys))
    ways = {way: cache.call(way, NONE) for way in ("hsr", "auto")}
    ns = timed(ways, steps=internals.steps_of_a_call())
    return max(0.0, ns["auto"] - ns["hsr"])


def _select(timed, keys: int, cached) -> dict[str, float]:
    """Nanoseconds per score for softmax to choose its keys."""
    cache = cached(Shape(keys=keys))
    softmax = {
        "top_r": hsrjax.Softmax(top_r=FEW),
        "epsilon": hsrjax.Softmax(epsilon=0.1),
    }
    ways = ("dense", "hsr")
    ns = timed(
        {
            f"{kind}_{way}": cache.call(way, NONE, softmax=one, scale=_SHARP)
            for kind, one in {**softmax, "relu": None}.items()
            for way in ways
        },
        steps=internals.steps_of_a_call(),
    )
    scores = 8 * cache.step.room
    return {
        f"{kind}_{way}": max(0.0, ns[f"{kind}_{way}"] - ns[f"relu_{way}"]) / scores
        for kind in softmax
        for way in ways
    }


def _prefill(timed, sequence: int, seed: int, name: str) -> dict[str, float]:
    """A prefill in which no key fires, or all do, dense and reported."""
    source = Source(seed=seed, dtype=_dtype(name))
    given = inputs.causal(source, Shape(keys=sequence), 0.01, exact=False)
    arrays = tuple(map(given.on_device, (given.query, given.key, given.value)))

    @functools.partial(jax.jit, static_argnames="method")
    def attend(relu, *, method):
        return hsrjax.attention(
            *arrays, activation=relu, method=method, implementation=name
        )

    def call(way, bias):
        relu = hsrjax.ReLU(power=2, bias=jnp.float32(bias), normalize="none")
        return lambda: jax.block_until_ready(attend(relu, method=way))

    build = jax.jit(functools.partial(hsrjax.build, reorder=False))
    keys = jnp.moveaxis(arrays[1], 2, 1)
    return timed(
        {
            "dense": call("dense", NONE),
            "none": call("hsr", NONE),
            "all": call("hsr", ALL),
            "build": lambda: jax.block_until_ready(build(keys)),
        }
    )


def solve(
    dense_curve: costs.Curve,
    scan_curve: costs.Curve,
    *,
    wide: float,
    narrow: float,
    probe: float,
    select: dict[str, float],
    prefill: dict[str, float],
    work: Work,
    size: int = 1,
) -> dict[str, float]:
    """The numbers of `Costs` from what was timed; noise makes none of them negative.

    Args:
      dense_curve: of `Costs`.
      scan_curve: of `Costs`.
      wide: of `_slot`, heads of 64.
      narrow: of `_slot`, heads of 16.
      probe: of `Costs`.
      select: costs for softmax to choose.
      prefill: nanoseconds of `_prefill`.
      work: that it did.
      size: by how much numbers of keys and values count; more than 1 of kernels, which
        take no slot after the other.
    """
    codes, further = work.codes, work.rows - DECODE_ROWS
    dense = prefill["dense"] - costs.interpolate(dense_curve, 2 * codes * size)
    scan = prefill["none"] - prefill["build"]
    scan -= costs.interpolate(scan_curve, codes)
    # A slot costs row + 2 H (number + rows product).
    number = max(0.0, wide - narrow) / (2 * (64 - 16))
    row = max(0.0, narrow - 2 * 16 * number)
    slot = (prefill["all"] - prefill["none"]) / work.slots
    product = (slot - row) / (2 * work.head_dim) - number
    product = max(0.0, product) / (work.part_rows - DECODE_ROWS) if size == 1 else 0.0
    number = max(0.0, number - DECODE_ROWS * product)
    return {
        "dense_product": max(0.0, dense) / (2 * codes * further),
        "scan_product": max(0.0, scan) / (codes * further),
        "build": prefill["build"] / codes,
        "probe": probe,
        "gather_row": row,
        "gather_number": number / size,
        "gather_product": product,
        **select,
    }


class _Cache:
    """Calls on one cache."""

    def __init__(self, shape: Shape, *, seed: int, implementation: str):
        source = Source(seed=seed, dtype=_dtype(implementation))
        self.inputs = inputs.decode(source, shape, 1)
        self.size = _size(implementation)
        inner = growing.Growing(self.inputs)
        inner.refresh()
        assert inner.cache is not None
        self.step = internals.Step(inner.query, inner.cache, implementation)

    def threshold(self, share: float) -> np.ndarray:
        """Biases over which such a share of the keys fires."""
        query, key = self.inputs.query, self.inputs.key
        fires = max(1, round(share * key.shape[1]))
        return inputs.thresholds(query, key, lambda _: fires, causal=False)

    def call(self, way: str, bias: Any, *, softmax: Any = None, scale: float = 1.0):
        """A step in which the keys above the bias fire."""
        bias = jnp.broadcast_to(jnp.float32(bias), self.inputs.bias.shape)
        relu = hsrjax.ReLU(power=2, bias=bias, normalize="none")
        return self.step.call(softmax or relu, way, scale=scale)
