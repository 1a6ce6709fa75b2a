"""Causal dense ReLU attention by tiles, forward and backward: the strongest baseline.

Scores of a tile of queries against a chunk of keys are made, weighed, multiplied with
the values and forgotten; chunks in the causal future are never made. Tiles are kept
small on purpose: on CPU a temporary above 32 MB is mapped anew by the allocator at
every call and costs its page faults.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.harness.inputs import Inputs


class Tiling(NamedTuple):
    """How the score matrix is cut.

    Attributes:
      tile: query positions.
      chunk: keys.
      by_head: one key head after the other instead of all at once.
    """

    tile: int
    chunk: int
    by_head: bool

    def __str__(self) -> str:
        """As in the tables."""
        heads = "head by head" if self.by_head else "all heads"
        return f"{self.tile} x {self.chunk}, {heads}"


TILINGS = [
    Tiling(tile, chunk, by_head)
    for tile in (128, 256)
    for chunk in (512, 1024, 2048)
    for by_head in (False, True)
    if (tile, chunk) != (128, 2048)
]
LARGE = Tiling(256, 2048, by_head=False)
"""The one that accelerators get."""


class _Rows(NamedTuple):
    """Operands by key head, M = B K of them.

    Attributes:
      query: f[M, I, R, H], I tiles of R = G tile rows.
      key: f[M, S', H], padded to whole chunks.
      value: f[M, S', D].
      bias: f[M, I, R].
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array


def attention(inputs: Inputs, tiling: Tiling) -> Callable[..., jax.Array]:
    """A function (query, key, value, bias) -> [B, T, N, D]."""

    def run(query, key, value, bias):
        rows = _split(query, key, value, bias, tiling)
        out = _over_heads(tiling, lambda x: _forward(x, inputs, tiling)[0], rows)
        return _join(out, query, tiling)

    return run


def attention_and_gradients(inputs: Inputs, tiling: Tiling) -> Callable[..., Any]:
    """A function (query, key, value, bias, cotangent) -> out, dq, dk, dv."""

    def run(query, key, value, bias, cotangent):
        rows = _split(query, key, value, bias, tiling)
        upstream = _tiles(cotangent, key.shape[2], tiling)

        def one(operands):
            rows, upstream = operands
            out, total = _forward(rows, inputs, tiling)
            return out, *_backward(rows, upstream, out, total, inputs, tiling)

        out, dq, dk, dv = _over_heads(tiling, one, (rows, upstream))
        dk, dv = (_unpad(x, like) for x, like in ((dk, key), (dv, value)))
        return _join(out, query, tiling), _join(dq, query, tiling), dk, dv

    return run


def best_tiling(
    make: Callable[[Tiling], Callable[[], Any]], tilings: list[Tiling]
) -> Tiling:
    """The tiling whose second call is the fastest."""
    seconds = {}
    for tiling in tilings:
        call = make(tiling)
        call()
        start = time.perf_counter()
        call()
        seconds[tiling] = time.perf_counter() - start
    return min(seconds, key=lambda tiling: seconds[tiling])


def _forward(rows: _Rows, inputs: Inputs, tiling: Tiling):
    """Normalised output f[M, I, R, D] and what it was divided by, f[M, I, R, 1]."""

    def tile(_, operands):
        i, query, bias = operands
        lead = query.shape[:2]
        sums = (jnp.zeros((*lead, rows.value.shape[-1])), jnp.zeros((*lead, 1)))

        def chunk(j, sums):
            out, total = sums
            keys, values = _chunk(rows, j, tiling)
            weights = _scores(query, bias, keys, i, j, tiling)
            weights = weights**inputs.power
            out += jnp.einsum("mrs,msd->mrd", weights, values)
            return out, total + jnp.sum(weights, axis=-1, keepdims=True)

        out, total = jax.lax.fori_loop(0, _chunks(i, tiling), chunk, sums)
        total = _divisor(total, _positions(i, query, tiling), inputs)
        return None, (out / total, total)

    count = rows.query.shape[1]
    operands = (jnp.arange(count), *(_first(x) for x in (rows.query, rows.bias)))
    _, (out, total) = jax.lax.scan(tile, None, operands)
    return _first(out), _first(total)


def _backward(rows: _Rows, upstream, out, total, inputs: Inputs, tiling: Tiling):
    """Gradients by query f[M, I, R, H], key and value f[M, S', ...]."""

    def tile(grads, operands):
        i, query, bias, upstream, out, total = operands
        upstream = upstream / total
        inner = jnp.sum(upstream * out, axis=-1, keepdims=True)
        if inputs.normalize != "row_sum":
            inner = jnp.zeros_like(inner)

        def chunk(j, carry):
            dquery, dkeys, dvalues = carry
            keys, values = _chunk(rows, j, tiling)
            above = _scores(query, bias, keys, i, j, tiling)
            dweights = jnp.einsum("mrd,msd->mrs", upstream, values) - inner
            dscores = inputs.power * above ** (inputs.power - 1) * dweights
            dscores = jnp.where(above > 0, dscores, 0.0)
            dquery += jnp.einsum("mrs,msh->mrh", dscores, keys)
            dkeys = _add(dkeys, j, jnp.einsum("mrs,mrh->msh", dscores, query), tiling)
            dvalue = jnp.einsum("mrs,mrd->msd", above**inputs.power, upstream)
            return dquery, dkeys, _add(dvalues, j, dvalue, tiling)

        start = (jnp.zeros_like(query), *grads)
        dquery, *grads = jax.lax.fori_loop(0, _chunks(i, tiling), chunk, start)
        return tuple(grads), dquery

    count = rows.query.shape[1]
    tiled = (rows.query, rows.bias, upstream, out, total)
    operands = (jnp.arange(count), *(_first(x) for x in tiled))
    start = (jnp.zeros_like(rows.key), jnp.zeros_like(rows.value))
    (dkey, dvalue), dquery = jax.lax.scan(tile, start, operands)
    return _first(dquery), dkey, dvalue


def _scores(query, bias, keys, i, j, tiling: Tiling):
    """max(score - bias, 0) of tile i and chunk j, 0 in the future: f[M, R, chunk]."""
    above = jnp.einsum("mrh,msh->mrs", query, keys) - bias[..., None]
    at = _positions(i, query, tiling)
    seen = j * tiling.chunk + jnp.arange(tiling.chunk)
    visible = seen[None, None, :] <= at[None, :, None]
    return jnp.where(visible, jnp.maximum(above, 0.0), 0.0)


def _positions(i, query, tiling: Tiling):
    """i32[R], where the rows of tile i stand."""
    return i * tiling.tile + jnp.arange(query.shape[1]) % tiling.tile


def _chunks(i, tiling: Tiling):
    """Chunks that tile i sees any key of."""
    return ((i + 1) * tiling.tile + tiling.chunk - 1) // tiling.chunk


def _chunk(rows: _Rows, j, tiling: Tiling):
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=tiling.chunk)
    return tuple(cut(x, j * tiling.chunk, axis=1) for x in (rows.key, rows.value))


def _add(total, j, part, tiling: Tiling):
    first = j * tiling.chunk
    old = jax.lax.dynamic_slice_in_dim(total, first, tiling.chunk, 1)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, first, 1)


def _divisor(total, position, inputs: Inputs):
    if inputs.normalize == "none":
        return jnp.ones_like(total)
    if inputs.normalize == "length":
        seen = (position + 1).astype(total.dtype)[None, :, None]
        return jnp.broadcast_to(seen, total.shape)
    return jnp.where(total == 0, 1.0, total)


def _over_heads(tiling: Tiling, function, operands):
    """Applies a function to all key heads, or to one after the other."""
    if not tiling.by_head:
        return function(operands)

    def one(head):
        result = function(jax.tree.map(lambda x: x[None], head))
        return jax.tree.map(lambda x: x[0], result)

    return jax.lax.map(one, operands)


def _split(query, key, value, bias, tiling: Tiling) -> _Rows:
    """Cuts queries in tiles and pads keys: what is padded lies in the future."""
    kv_heads = key.shape[2]
    room = -query.shape[1] % max(tiling.tile, tiling.chunk)
    key, value = (
        jnp.pad(x, [(0, 0), (0, room), (0, 0), (0, 0)])
        .swapaxes(1, 2)
        .reshape(-1, x.shape[1] + room, x.shape[3])
        for x in (key, value)
    )
    return _Rows(
        _tiles(query, kv_heads, tiling),
        key,
        value,
        _tiles(bias[..., None], kv_heads, tiling)[..., 0],
    )


def _tiles(x, kv_heads: int, tiling: Tiling):
    """[B, T, N, X] -> [M, I, R, X]; row r of a tile is position r modulo the tile."""
    b, t, n, last = x.shape
    x = jnp.pad(x, [(0, 0), (0, -t % tiling.tile), (0, 0), (0, 0)])
    x = x.reshape(b, -1, tiling.tile, kv_heads, n // kv_heads, last)
    x = x.transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(b * kv_heads, x.shape[2], -1, last)


def _join(x, like, tiling: Tiling):
    """Undoes `_tiles`."""
    b, t, n, _ = like.shape
    m, count, rows, last = x.shape
    group = rows // tiling.tile
    x = x.reshape(b, m // b, count, group, tiling.tile, last).transpose(
        0, 2, 4, 1, 3, 5
    )
    return x.reshape(b, count * tiling.tile, n, last)[:, :t]


def _unpad(x, like):
    """Undoes the padding of keys: [M, S', X] -> [B, S, K, X]."""
    b, s, kv_heads, last = like.shape
    return x.reshape(b, kv_heads, -1, last).swapaxes(1, 2)[:, :s]


def _first(x):
    """Swaps the axes of heads and tiles: scans go over tiles."""
    return jnp.swapaxes(x, 0, 1)
