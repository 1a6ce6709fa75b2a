"""The row of gradients: whole sequences that the released model's layers get."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import capture
from benchmarks.accelerator.findings import (
    OURS,
    TOLERANCE_GRADIENTS,
    Finding,
    compare,
    lines,
)
from benchmarks.accelerator.setting import Setting
from benchmarks.contestants import causal, peers, peers_jax
from benchmarks.files.captured import Captured
from benchmarks.harness import plain, tables
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.loops import Loop
from benchmarks.harness.timing import Contestant, Unavailable, relative_error
from models.opening import Opened, open_model
from train.data import load_corpus

RELEASED = Path("models/released/python-2.8m")
TOKENS = 1 << 14
MOST_UNION = 0.05
_TEXT_BYTES = 1 << 20
_TILE = 64


@functools.cache
def released() -> Opened:
    """The model that comes with the repository."""
    return open_model(RELEASED)


def text(tokens: int) -> np.ndarray:
    """The end of Python's standard library, as the model reads it."""
    corpus = load_corpus()
    found = released().tokenizer.encode(bytes(corpus.data[-_TEXT_BYTES:]))[:tokens]
    if found.size < tokens:
        raise Unavailable(f"the text has {found.size} tokens, fewer than {tokens}")
    return found


def gradients(setting: Setting) -> list[Finding]:
    """Forward and backward over the layers that profit, side by side as a batch."""
    tokens = setting.size(TOKENS, 128)
    model = released().model
    which = range(model.config.num_layers)
    found = capture.layers(model, text(tokens), which)
    shares = [_union(one) for one in found]
    chosen = [n for n, share in enumerate(shares) if share < MOST_UNION]
    if setting.quick:
        chosen = [1]
    if not chosen:
        words = ", ".join(f"{100 * share:.1f} %" for share in shares)
        raise Unavailable(f"no layer's unions are below 5 %: {words}")
    given = _batch([found[n] for n in chosen], Loop(setting.size(4, 1)))
    upstream = np.asarray(given.on_device(peers_jax.cotangent(given)), np.float32)
    contestants = [
        causal.contestant(f"{prefix} ({name})", method, implementation, "train", given)
        for prefix, method in (("hsr", "hsr"), ("hsrjax dense", "dense"))
        for name, implementation in setting.implementations.items()
    ]
    contestants += peers.contestants(list(setting.peers), "train", given)
    expected = functools.cache(lambda name: plain.gradients(given, name, upstream))

    def score(contestant: Contestant, arrays: Any) -> float:
        pairs = zip(arrays, expected(contestant.definition), strict=True)
        return max(relative_error(one, other) for one, other in pairs)

    timings = setting.race(contestants, score)
    shared = tables.describe(given) | {
        "layers": " ".join(map(str, chosen)),
        "unions_percent": " ".join(f"{100 * share:.1f}" for share in shares),
    }
    table = lines(9, timings, shared, allowed=TOLERANCE_GRADIENTS)
    return [compare(9, table, ours=lambda name: name.startswith(OURS))]


def _batch(layers: list[Captured], loop: Loop) -> Inputs:
    """Layers as rows of a batch, in bfloat16 on the device."""
    stack = lambda name: jnp.concatenate([getattr(x, name) for x in layers])
    query, key, value = (
        stack(name).astype(jnp.bfloat16) for name in ("query", "key", "value")
    )
    return Inputs(
        query=query,
        key=key,
        value=value,
        bias=stack("bias"),
        power=layers[0].about["power"],
        normalize=layers[0].about["normalize"],
        causal=True,
        dtype="bfloat16",
        loop=loop,
    )


def _union(layer: Captured) -> float:
    """Share of the visible keys that fire for any query of a tile and key head."""
    return float(_union_share(layer.query, layer.key, layer.bias))


@jax.jit
def _union_share(query, key, bias):
    (_, t, n, _), k = query.shape, key.shape[2]
    tiles = t // _TILE
    cut = lambda x: x[0, : tiles * _TILE].reshape(tiles, _TILE, k, n // k, *x.shape[3:])

    def one(operands):
        number, query, bias = operands
        at = number * _TILE + jnp.arange(_TILE)
        scores = jnp.einsum("tkgh,skh->tkgs", query, key[0])
        fires = (scores > bias[..., None]) & (jnp.arange(t) <= at[:, None])[
            :, None, None
        ]
        return jnp.any(fires, axis=(0, 2)).sum(), k * (at[-1] + 1)

    fired, seen = jax.lax.map(one, (jnp.arange(tiles), cut(query), cut(bias)))
    return fired.sum() / seen.sum()
