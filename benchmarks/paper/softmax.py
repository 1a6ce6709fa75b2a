"""`python -m benchmarks paper-softmax`: softmax with a guarantee, head by head.

Top r and epsilon, with and without the tail, on a model's own queries and keys: keys
whose score is computed for a query of its own, mass left out, error, and how far the
certificates are above them. Every query is asked alone and every head has its own keys,
so that no set is a union over several.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import hsrjax
from benchmarks.harness import pictures
from benchmarks.harness.tables import column
from benchmarks.header import Results
from benchmarks.paper.heads import Truth, exact
from benchmarks.paper.limits import TOLERANCE, Limits, columns, in_words
from benchmarks.paper.reading import Layer, cache_of, heads_of, operands, pieces, read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Limits):
    """Measures Softmax(top_r) and Softmax(epsilon) on every head of a model.

    For example:

        python -m benchmarks paper-softmax --model SmolLM2.gguf
    """

    rows: int | None = None
    """Queries of every head, the newest: 32; with --quick, 4."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        super().__post_init__()
        if self.newest > self.length // 2:
            raise ValueError("tokens must be twice as many as rows, or more")

    @property
    def newest(self) -> int:
        """Rows, with the default resolved."""
        return self.rows or (4 if self.quick else 32)


def run(command: Command) -> Results:
    """Measures every layer."""
    opened, text, about = read(command)
    tokens = command.length
    part = pieces(text, length=tokens, number=1, seed=command.seed)[0]
    layers = operands(opened.model, part, command.newest)
    lines: list[dict[str, Any]] = []
    wrong: list[str] = []
    for number, layer in enumerate(tqdm(layers, unit="layer")):
        truths = [exact(head) for head in heads_of(layer)]
        for activation in command.activations:
            found = jax.device_get(attend(layer, activation))
            for head, truth in enumerate(truths):
                line = {"layer": number, "head": head, **columns(activation)}
                lines.append(line | _describe(found, head, truth))
                if lines[-1]["exceeded_rows"]:
                    wrong.append(f"{line}: error above the certificate")
    summary = {"read": about, "tokens": tokens} | summarize(lines)
    return Results(lines, summary, draw(lines), wrong)


def attend(layer: Layer, activation: hsrjax.Softmax) -> tuple[jax.Array, hsrjax.Info]:
    """Outputs f32[T, N, D] and Info [T, N] of each query alone, each with its keys."""
    (_, rows, heads, _), (_, keys, kv_heads, _) = layer.query.shape, layer.key.shape
    own = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (layer.key, layer.value))
    cache = cache_of(*own, tail=activation.tail)
    positions = keys - rows + jnp.arange(rows, dtype=jnp.int32)
    return _one_by_one(layer.query[0], positions, cache, activation)


@jax.jit
def _one_by_one(queries, positions, cache, activation):
    decode = functools.partial(
        hsrjax.decode_attention, activation=activation, method="hsr", scale=1.0
    )

    def one(pair):
        query, position = pair
        found = decode(query[None, None], cache, positions=position[None, None])
        return jax.tree.map(lambda x: x[0, 0], found)

    return jax.lax.map(one, (queries, positions))


def _describe(found, head: int, truth: Truth) -> dict[str, Any]:
    """Columns on one head; what is left out is all but the best keys that fired."""
    out, info = found
    rows = len(truth.output)
    error = np.abs(np.asarray(out[:, head], np.float64) - truth.output).max(-1)
    count = np.asarray(info.count)[:, head]
    missed = 1.0 - truth.held[np.arange(rows), np.maximum(count, 1) - 1]
    bound = np.asarray(info.error_bound, np.float64)[:, head]
    exceeded = error > bound + TOLERANCE * truth.extreme
    share = lambda x: 100 * float(np.mean(np.asarray(x)[:, head] / truth.visible))
    return {
        "rows": rows,
        "keys_looked_at_percent": share(info.candidates),
        "keys_fired_percent": share(info.count),
        "missed_mean": float(missed.mean()),
        "missed_bound_mean": float(np.asarray(info.missed_mass)[:, head].mean()),
        "error_over_v_median": float(np.median(error / truth.extreme)),
        "bound_over_v_median": float(np.median(bound / truth.extreme)),
        "exceeded_rows": int(exceeded.sum()),
    }


def _settings(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Lines by what was asked for, in words."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        name = in_words(line["r"], line["epsilon"], line["tail"])
        found.setdefault(name, []).append(line)
    return found


def summarize(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over all heads, and the largest share of keys outside layer 0."""
    averaged = ("keys_looked_at_percent", "keys_fired_percent", "missed_mean")
    averaged += ("missed_bound_mean", "error_over_v_median", "bound_over_v_median")
    found = {}
    for name, mine in _settings(lines).items():
        later = [line["keys_looked_at_percent"] for line in mine if line["layer"]]
        found[name] = {
            name: float(np.mean(column(mine, name))) for name in averaged
        } | {
            "exceeded_rows": sum(column(mine, "exceeded_rows")),
            "keys_looked_at_percent_outside_layer_0": sum(later) / max(1, len(later)),
            "most_keys_looked_at_percent_outside_layer_0": max(later, default=0.0),
            "most_keys_looked_at_percent": max(column(mine, averaged[0])),
        }
    return {"settings": found}


def draw(lines: list[dict[str, Any]]) -> dict[str, Figure]:
    """Error by keys looked at, and keys looked at by layer."""
    figure = pictures.figure(width=12, height=4.5)
    left, right = figure.subplots(1, 2)
    means = summarize(lines)["settings"]
    for kind, marker in (("r", "o"), ("epsilon", "s")):
        for tail in (False, True):
            mine = [
                line
                for name, line in means.items()
                if name.startswith(kind) and ("tail" in name) == tail
            ]
            x = [line["keys_looked_at_percent"] for line in mine]
            style = {"linestyle": "-" if tail else "--", "marker": marker}
            label = f"{kind}{', with the tail' if tail else ''}"
            (drawn,) = left.plot(
                x, [line["error_over_v_median"] for line in mine], label=label, **style
            )
            bounds = [line["bound_over_v_median"] for line in mine]
            left.plot(x, bounds, color=drawn.get_color(), alpha=0.3, **style)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="keys whose score is computed, %",
        ylabel="error of the output / max|V|",
        title="Error (pale: its certificate), medians",
    )
    left.legend()
    for name, mine in _settings(lines).items():
        if "tail" in name:
            continue
        layers = sorted({line["layer"] for line in mine})
        by_layer = [
            np.mean([x["keys_looked_at_percent"] for x in mine if x["layer"] == layer])
            for layer in layers
        ]
        right.plot(layers, by_layer, label=name)
    right.set(
        yscale="log",
        xlabel="layer",
        ylabel="keys whose score is computed, %",
        title="By layer, mean over heads",
    )
    right.legend(fontsize="small", bbox_to_anchor=(1.01, 1.0), loc="upper left")
    return {"softmax.png": figure}
