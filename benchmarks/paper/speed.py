"""`python -m benchmarks paper-speed`: what softmax with a guarantee takes.

One layer of a model, its own queries, keys and values: a causal prefill of all of them,
and the newest query alone over a growing cache (appending is not in it). Everything is
timed as a ratio to plain softmax, and every output that is timed is held against
float64 and its certificate.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import hsrjax
from benchmarks.contestants.peers_jax import jitted
from benchmarks.harness import pictures
from benchmarks.harness.tables import column, where
from benchmarks.harness.timing import Contestant, Open, race
from benchmarks.header import Results
from benchmarks.paper.heads import exact
from benchmarks.paper.limits import TOLERANCE, Limits, columns, in_words
from benchmarks.paper.reading import Layer, cache_of, heads_of, operands, pieces, read

CHECKED = 32
"""Rows of a prefill, the newest, that are held against float64."""
PLAIN, FUSED = "plain softmax", "jax.nn.dot_product_attention"
TASKS = ("prefill", "decode")
WAYS = ("hsr", "dense")

Way = Literal["hsr", "dense"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Limits):
    """Times Softmax(top_r) and Softmax(epsilon) on a layer of a model.

    For example:

        python -m benchmarks paper-speed --model SmolLM2.gguf
    """

    layer: int | None = None
    """Layer, from 0; the middle one unless given."""
    repeats: int | None = None
    """Rounds in which everything takes a turn; medians count. 5; with --quick, 1."""

    @property
    def rounds(self) -> int:
        """Rounds, with the default resolved."""
        return self.repeats or (1 if self.quick else 5)


def run(command: Command) -> Results:
    """Times prefill and decode."""
    opened, text, about = read(command)
    part = pieces(text, length=command.length, number=1, seed=command.seed)[0]
    layers = operands(opened.model, part, command.length)
    number = len(layers) // 2 if command.layer is None else command.layer
    if not 0 <= number < len(layers):
        raise ValueError(f"layer must be 0 to {len(layers) - 1}, got {number}")
    layer = layers[number]
    lines = [line for task in TASKS for line in _timed(task, layer, command)]
    wrong = [
        f"{line['task']}, {line['setting']}, {line['implementation']}: error "
        f"{line['error_over_allowed']:.2g} times what its certificate allows"
        for line in lines
        if not line["error_over_allowed"] <= 1
    ]
    summary = {"read": about, "tokens": command.length, "layer": number}
    return Results(lines, summary, draw(lines), wrong)


def _timed(task: str, layer: Layer, command: Command) -> list[dict[str, Any]]:
    """Lines of one task."""
    rows = 1 if task == "decode" else min(CHECKED, command.length)
    expected, largest = _expected(layer, rows)
    off = functools.partial(_off, expected=expected, largest=largest)
    entries = _entries(task, layer, command.activations)
    with tqdm(total=command.rounds * len(entries), unit="turn", desc=task) as bar:

        def tick(name: str) -> None:
            bar.update(bool(name))

        timings = race(
            [Contestant(name, "part", one, off) for name, one in entries.items()],
            rounds=command.rounds,
            score=lambda _, found: float(found[0]),
            tick=tick,
        )
    times = {name: timing.ms or math.nan for name, timing in timings.items()}
    plain = min(times[name] for name in (PLAIN, FUSED) if name in times)
    lines = []
    for name, timing in timings.items():
        setting, _, way = name.partition(", ")
        lines.append(
            {
                "task": task,
                "setting": setting,
                "implementation": way or "dense",
                "ms": times[name],
                "times_plain": times[name] / plain,
                "error_over_allowed": timing.error,
            }
        )
    return lines


def _entries(task: str, layer: Layer, activations: list[hsrjax.Softmax]):
    """What makes each contestant ready, by its name."""
    call = functools.partial(_prefill if task == "prefill" else _decode, layer)
    found = {PLAIN: functools.partial(call, hsrjax.Softmax(), "dense")}
    if task == "prefill":
        found[FUSED] = functools.partial(_fused, layer)
    for activation in activations:
        name = in_words(**columns(activation))
        for way in WAYS:
            found[f"{name}, {way}"] = functools.partial(call, activation, way)
    return found


def _fused(layer: Layer) -> Open:
    """JAX's own attention, which has no certificate to return."""
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, scale=1.0)
    return jitted(attend, *layer)


def _prefill(layer: Layer, activation: hsrjax.Softmax, way: Way) -> Open:
    options = {"method": way, "is_causal": True, "scale": 1.0, "return_info": True}
    attend = functools.partial(hsrjax.attention, activation=activation, **options)
    return jitted(attend, *layer)


def _decode(layer: Layer, activation: hsrjax.Softmax, way: Way) -> Open:
    decode = functools.partial(
        hsrjax.decode_attention, activation=activation, method=way, scale=1.0
    )
    cache = cache_of(layer.key, layer.value, tail=activation.tail)
    return jitted(decode, layer.query[:, -1:], cache)


def _expected(layer: Layer, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Full softmax of the newest rows: f64[rows, N, D], and max|V| f64[rows, N]."""
    newest = layer._replace(query=layer.query[:, -rows:])
    truths = [exact(head) for head in heads_of(newest)]
    outputs = np.stack([truth.output for truth in truths], axis=1)
    return outputs, np.stack([truth.extreme for truth in truths], axis=1)


def _off(result: Any, *, expected: np.ndarray, largest: np.ndarray) -> tuple[Any]:
    """Largest error of a row in parts of what its certificate and float32 allow."""
    out, info = result if isinstance(result, tuple) else (result, None)
    rows = len(expected)
    error = np.abs(np.asarray(out, np.float64)[0, -rows:] - expected).max(-1)
    allowed = TOLERANCE * largest
    if info is not None:
        allowed = allowed + np.asarray(info.error_bound, np.float64)[0, -rows:]
    return (np.max(error / allowed),)


def draw(lines: list[dict[str, Any]]) -> dict[str, Figure]:
    """Time by setting, a panel for each task."""
    figure = pictures.figure(width=12, height=6)
    for axes, task in zip(figure.subplots(1, 2, sharey=True), TASKS, strict=True):
        mine = where(lines, task=task)
        settings = list(dict.fromkeys(column(mine, "setting")))
        settings = [name for name in settings if name not in (PLAIN, FUSED)][::-1]
        for way, shift in zip(WAYS, (0.2, -0.2), strict=True):
            times = {
                line["setting"]: line["times_plain"]
                for line in where(mine, implementation=way)
            }
            axes.barh(
                [i + shift for i in range(len(settings))],
                [times[name] for name in settings],
                height=0.38,
                color=pictures.OURS[way],
                label=way,
            )
        axes.axvline(1, color="tab:gray", linestyle="--", label="plain softmax")
        axes.set_yticks(range(len(settings)), settings)
        axes.set(xlabel="time / plain softmax", title=task)
    axes.legend(loc="upper right")
    return {"speed.png": figure}
