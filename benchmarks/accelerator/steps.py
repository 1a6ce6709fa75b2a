"""Rows of one decode step: ReLU^2 and softmax, the scan alone, the append alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import hsrjax
from benchmarks.accelerator.findings import OURS, Finding, compare, fastest, lines
from benchmarks.accelerator.setting import Setting
from benchmarks.contestants import dense, peers
from benchmarks.contestants.growing import Looped, looped_contestant
from benchmarks.harness import drawn, loops, plain, tables
from benchmarks.harness.inputs import Inputs, Shape
from benchmarks.harness.loops import Loop
from benchmarks.harness.timing import Contestant, Open, relative_error

APPEND, SCAN, COPY = "append alone", "scan alone (nothing fires)", "copy"
_COPIED = 1 << 30
EPSILON, TOP_R = 0.1, 64


@dataclasses.dataclass(frozen=True)
class Case:
    """A cache and what fires of it.

    Attributes:
      shape: sizes.
      fires: keys in each row.
      steps: of a call: enough that starting it does not count.
    """

    shape: Shape
    fires: int
    steps: int = 40


CASES = {
    1: Case(
        Shape(keys=1 << 20, heads=32, kv_heads=8, head_dim=128, value_dim=128), 256
    ),
    2: Case(Shape(keys=1 << 17), 256, steps=160),
    3: Case(
        Shape(
            keys=1 << 13, heads=32, kv_heads=8, head_dim=128, value_dim=128, batch=32
        ),
        64,
    ),
    4: Case(Shape(keys=1 << 15), 256, steps=320),
    6: Case(Shape(keys=1 << 17), 0, steps=80),
}
QUICK = Case(
    Shape(keys=256, heads=4, kv_heads=2, head_dim=16, value_dim=16), 9, steps=2
)


def relu(number: int, setting: Setting) -> list[Finding]:
    """A row of ReLU^2; beside the first the scan's bandwidth, the second's append."""
    made = _drawn("gaussian", number, setting)
    case = _case(number, setting)
    given = made.firing(case.fires)
    looped = Looped(given)
    contestants = [
        *_ours(looped, setting, definition="relu"),
        *_dense(looped, setting, given, definition="relu"),
    ]
    if number == 1:
        nothing = dataclasses.replace(looped.activation, bias=made.firing(0).bias)
        attend = functools.partial(
            looped.attending, "hsr", setting.kernels, activation=nothing
        )
        contestants += [_part(SCAN, attend), _part(COPY, _copying(setting))]
    if number == 2:
        for name, implementation in setting.implementations.items():
            append = functools.partial(looped.appending, implementation)
            contestants.append(_part(f"{APPEND} ({name})", append))
    expected = functools.cache(lambda name: plain.step(given, name))

    def score(contestant: Contestant, arrays: Any) -> float | None:
        if contestant.definition == "part":
            return None
        return relative_error(arrays[0], expected(contestant.definition)[0])

    timings = setting.race(contestants, score)
    shared = tables.describe(given) | {
        "caches": looped.loop.caches,
        "heads_are": "gaussian",
    }
    shared["firing_keys"] = float(np.mean(expected("relu")[1]))
    found = lines(number, timings, shared)
    findings = [compare(number, found)]
    if number == 1:
        findings.append(_bandwidth(found, given, _copied(setting)))
    if number == 2:
        findings.append(_append_share(found))
    return findings


def softmax(setting: Setting) -> list[Finding]:
    """Epsilon and top r against one set of dense baselines."""
    given = _drawn("trained", 6, setting).inputs
    epsilon, top_r = EPSILON, setting.size(TOP_R, 9)
    laws = {
        6: hsrjax.Softmax(epsilon=jnp.float32(epsilon)),
        7: hsrjax.Softmax(top_r=top_r),
    }
    looped = Looped(given, hsrjax.Softmax())
    rivals = _dense(looped, setting, given, definition="softmax")
    ours = {
        number: _ours(
            looped,
            setting,
            definition="softmax",
            activation=law,
            informed=True,
            suffix=f", row {number}",
        )
        for number, law in laws.items()
    }
    full = functools.cache(lambda: plain.step(given, "softmax")[0])

    def score(contestant: Contestant, arrays: Any) -> float | None:
        if len(arrays) == 1:
            return relative_error(arrays[0], full())
        out, counts, bound, candidates = arrays
        numbers = f"{counts.mean():.0f} keys kept, {candidates.mean():.0f} scored"
        contestant.detail = f"{contestant.detail.split(',')[0]}, {numbers}"
        if "row 7" in contestant.name:
            expected, _ = plain.step(given, plain.KEPT, counts)
            kept = (counts == top_r).all()
            return relative_error(out, expected) if kept else float("inf")
        # Which keys are kept is open; what leaving out the others may cost is not.
        most = 2.2 * epsilon * float(jnp.max(jnp.abs(given.value)))
        beyond = np.maximum(np.abs(out - full()) - bound[..., None], 0.0)
        promised = (bound <= most).all() and np.isfinite(out).all()
        return float(beyond.max() / np.abs(full()).max()) if promised else float("inf")

    timings = setting.race([*ours[6], *ours[7], *rivals], score)
    shared = tables.describe(given) | {
        "caches": looped.loop.caches,
        "heads_are": "trained",
    }
    findings = []
    for number in laws:
        mine = {x.name for x in (*ours[number], *rivals)}
        chosen = {name: x for name, x in timings.items() if name in mine}
        findings.append(compare(number, lines(number, chosen, shared)))
    return findings


def _case(number: int, setting: Setting) -> Case:
    return QUICK if setting.quick else CASES[number]


def _drawn(heads: drawn.Heads, number: int, setting: Setting) -> drawn.Drawn:
    case = _case(number, setting)
    shape = case.shape
    scanned = shape.batch * shape.kv_heads * shape.keys * shape.head_dim
    loop = loops.of_step(scanned, steps=case.steps)
    if setting.quick:
        loop = Loop(case.steps, 1)
    return drawn.decode(heads, shape, seed=setting.seed, dtype="bfloat16", loop=loop)


def _ours(
    looped: Looped,
    setting: Setting,
    *,
    definition: str,
    suffix: str = "",
    **options: Any,
) -> list[Contestant]:
    """Reporting by every implementation, and what is chosen where most may fire."""
    found = [
        looped_contestant(
            looped,
            f"{OURS}{name}{suffix})",
            "hsr",
            implementation,
            definition=definition,
            **options,
        )
        for name, implementation in setting.implementations.items()
    ]
    if not suffix:
        found.append(
            looped_contestant(
                looped,
                "auto",
                "auto",
                setting.kernels,
                definition=definition,
                **options,
            )
        )
    return found


def _dense(
    looped: Looped, setting: Setting, given: Inputs, *, definition: str
) -> list[Contestant]:
    """Everything that goes over all keys: ours, XLA's, and other people's."""
    found = [
        looped_contestant(
            looped,
            f"hsrjax dense ({name})",
            "dense",
            implementation,
            definition=definition,
        )
        for name, implementation in setting.implementations.items()
    ]
    names = list(setting.peers)
    if definition == "relu":
        found += dense.decode_contestants(given)
    else:
        names.append("jax-softmax")
    return found + peers.contestants(names, "decode", given)


def _part(name: str, prepare: Callable[[], Open]) -> Contestant:
    return Contestant(name, "part", prepare, lambda _: ())


def _copying(setting: Setting) -> Callable[[], Open]:
    """Reads and writes a gigabyte."""
    numbers = _copied(setting) // 4

    def step(cache, moved, fixed):
        del fixed
        return (cache[:1],), cache + moved[0]

    return lambda: loops.repeated(
        step,
        Loop(setting.size(20, 2)),
        lambda: loops.Held((jnp.zeros(numbers, jnp.float32),)),
        (jnp.float32(1.0),),
    )


def _copied(setting: Setting) -> int:
    return setting.size(_COPIED, 1 << 12)


def _bandwidth(found: list[tables.Row], given: Inputs, copied: int) -> Finding:
    """Bytes of the sketch in the time of a step in which nothing fires."""
    by_name = {row["name"]: row for row in found}
    finding = Finding(5, rows=[], ours=SCAN, dense=COPY)
    scan, copy = (fastest([by_name[x]] if x in by_name else []) for x in (SCAN, COPY))
    if scan is None or copy is None:
        missing = [r for r in (by_name.get(SCAN), by_name.get(COPY)) if r]
        finding.status = "; ".join(f"{r['name']}: {r['status']}" for r in missing)
        finding.status = finding.status or "not run"
        return finding
    finding.ours_us, finding.dense_us = scan["us"], copy["us"]
    for row, scanned in ((scan, given.key.size), (copy, 2 * copied)):
        row["bytes"], row["gb_per_s"] = scanned, 1e-3 * scanned / row["us"]
    finding.measured = 100 * scan["gb_per_s"] / copy["gb_per_s"]
    return finding


def _append_share(found: list[tables.Row]) -> Finding:
    """Of the fastest step of ours, the fastest append."""
    append = fastest(row for row in found if row["name"].startswith(APPEND))
    whole = fastest(row for row in found if row["name"].startswith(OURS))
    finding = Finding(8, rows=[])
    if append is None or whole is None:
        finding.status = "an append or a step has no number"
        return finding
    finding.ours, finding.ours_us = append["name"], append["us"]
    finding.dense, finding.dense_us = f"step: {whole['name']}", whole["us"]
    finding.measured = 100 * append["us"] / whole["us"]
    return finding
