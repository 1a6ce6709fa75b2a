"""What attention should be, by a plain float32 program on the device.

`oracle` says it in float64 on the host, which takes a lent device's minutes. Here every
score is made, in tiles, with products of the highest precision.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.inputs import Inputs

KEPT = "softmax of its best keys"
"""Definition whose number of keys the result brings along."""
_TILE = 128
_HIGHEST = jax.lax.Precision.HIGHEST


def step(
    inputs: Inputs, definition: str, counts: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of one position a row.

    Args:
      inputs: with one query position, not causal.
      definition: "relu", "softmax" or `KEPT`.
      counts: [B, 1, N], how many keys `KEPT` keeps.

    Returns:
      f32[B, 1, N, D], and how many keys of each row have a weight.
    """
    if counts is None:
        counts = np.zeros(inputs.query.shape[:3])
    out, firing = _step(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.bias,
        jnp.asarray(counts, jnp.int32),
        definition=definition,
        power=inputs.power,
        normalize=inputs.normalize,
    )
    return np.asarray(out), np.asarray(firing)


@functools.partial(jax.jit, static_argnames=("definition", "power", "normalize"))
def _step(query, key, value, bias, counts, *, definition, power, normalize):
    (b, _, n, _), k = query.shape, key.shape[2]
    rows = lambda x: x.reshape(b, k, n // k, *x.shape[3:])
    scores = _einsum("bkgh,bskh->bkgs", rows(query), key)
    if definition == "relu":
        weights = jax.nn.relu(scores - rows(bias)[..., None]) ** power
    else:
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        if definition == KEPT:
            last = scores.shape[-1] - jnp.clip(rows(counts), 1)
            ordered = jnp.sort(scores, axis=-1)
            least = jnp.take_along_axis(ordered, last[..., None], axis=-1)
            weights = jnp.where(scores >= least, weights, 0.0)
    total = weights.sum(-1, keepdims=True)
    out = _einsum("bkgs,bskd->bkgd", weights, value)
    if definition != "relu" or normalize == "row_sum":
        out = out / jnp.where(total == 0, 1.0, total)
    elif normalize == "length":
        out = out / scores.shape[-1]
    join = lambda x: x.reshape(b, 1, n, *x.shape[3:])
    return join(out), join((weights > 0).sum(-1))


def gradients(
    inputs: Inputs, definition: str, cotangent: Any
) -> tuple[np.ndarray, ...]:
    """Causal attention of a whole sequence and its gradients.

    Args:
      inputs: causal.
      definition: "relu" or "softmax".
      cotangent: f[B, T, N, D].

    Returns:
      out, dquery, dkey, dvalue, f32.
    """
    found = _gradients(
        *(
            jnp.asarray(x, jnp.float32)
            for x in (inputs.query, inputs.key, inputs.value)
        ),
        jnp.asarray(inputs.bias, jnp.float32),
        jnp.asarray(cotangent, jnp.float32),
        definition=definition,
        power=inputs.power,
        normalize=inputs.normalize,
    )
    return tuple(map(np.asarray, found))


@functools.partial(jax.jit, static_argnames=("definition", "power", "normalize"))
def _gradients(query, key, value, bias, cotangent, **law):
    out, pull = jax.vjp(
        lambda q, k, v: _causal(q, k, v, bias, **law), query, key, value
    )
    return out, *pull(cotangent)


def _causal(query, key, value, bias, *, definition, power, normalize):
    """In tiles of queries, whose scores are made again for the gradients."""
    (b, t, n, _), k = query.shape, key.shape[2]
    tile = min(_TILE, t)
    tiles = -(-t // tile)
    pad = lambda x: jnp.pad(
        x, [(0, 0), (0, tiles * tile - t)] + [(0, 0)] * (x.ndim - 2)
    )
    cut = lambda x: jnp.moveaxis(
        pad(x).reshape(b, tiles, tile, k, n // k, *x.shape[3:]), 1, 0
    )

    @jax.checkpoint
    def one(operands):
        number, query, bias = operands
        at = number * tile + jnp.arange(tile)
        scores = _einsum("btkgh,bskh->bkgts", query, key)
        seen = (jnp.arange(t) <= at[:, None])[None, None, None]
        if definition == "relu":
            over = scores - jnp.moveaxis(bias, 1, -1)[..., None]
            weights = jnp.where(seen, jax.nn.relu(over) ** power, 0.0)
        else:
            scores = jnp.where(seen, scores, -jnp.inf)
            best = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
            weights = jnp.exp(scores - best)
        if definition != "relu" or normalize == "row_sum":
            total = weights.sum(-1, keepdims=True)
            weights = weights / jnp.where(total == 0, 1.0, total)
        elif normalize == "length":
            weights = weights / (at + 1)[:, None].astype(jnp.float32)[None, None, None]
        return _einsum("bkgts,bskd->btkgd", weights, value)

    out = jax.lax.map(one, (jnp.arange(tiles), cut(query), cut(bias)))
    return jnp.moveaxis(out, 0, 1).reshape(b, tiles * tile, n, -1)[:, :t]


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    wide = [x.astype(jnp.float32) for x in operands]
    return jnp.einsum(subscripts, *wide, precision=_HIGHEST)
