"""What an attention call works on: queries in tiles, values, partial results.

A tile is a run of query positions together with the G = N / K query heads that share a
key head: Q = positions x G rows that are all bounded against the same keys. Arrays of
the public functions, [B, T, N, ...], are cut into [M, B, K, Q, ...] once, and joined
once at the end.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hsrjax._src.core import meshes
from hsrjax._src.core.arrays import finite_or_zero
from hsrjax._src.core.visible import Visible


class Info(NamedTuple):
    """What is known about every row of an attention call, each [B, T, N].

    Attributes:
      count: i32, keys with a weight other than zero.
      candidates: i32, visible keys whose exact score was computed for the row: those
        that its whole tile of queries reports.
      overflow: bool, the row's part of a tile reports more keys than capacity: they
        took further runs, exact as well.
      missed_mass: f32, bound on the fraction of softmax mass left out, or left to the
        tail; 0 but for softmax.
      error_bound: f32, bound on the maximum-norm distance to full softmax in exact
        arithmetic, before rounding to the output's dtype; 0 where nothing is left out
        by definition (all but softmax, full softmax).
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    candidates: jax.Array
    overflow: jax.Array
    missed_mass: jax.Array
    error_bound: jax.Array


class Values(NamedTuple):
    """Values with what must be known of those that are not looked at.

    Attributes:
      rows: f[*B, P, D].
      bound: f32[*B], at least every |coordinate|.
      poison: f32[*B, D], 0 where all are finite, else NaN: in a dense product a
        non-finite value spoils its coordinate for every query, since 0 * inf is NaN,
        and the reported product must agree.
      sketch: `ValueSketch` of the values, or None where no tail is asked for.
    """

    rows: jax.Array
    bound: jax.Array
    poison: jax.Array
    sketch: Any = None


class Short(NamedTuple):
    """Queries of 16 bits, which matrix units multiply as they are.

    Attributes:
      queries: f16[M, *B, Q, H], as they came.
      factor: f32[M], one number for all, by which their scores are multiplied.
    """

    queries: jax.Array
    factor: jax.Array


class Tiles(NamedTuple):
    """Queries cut into tiles.

    Attributes:
      queries: f32[M, *B, Q, H], already scaled.
      activation: with every field f32[M, *B, Q].
      visible: i32[M, *B, Q], the keys that each query may see.
      short: the same queries, for whom it is cheaper to scale scores; None where they
        came with more bits. Without gradients, which are those of `queries`.
    """

    queries: jax.Array
    activation: Any
    visible: Visible
    short: Short | None = None

    def edges(self) -> jax.Array:
        """Offsets f32[..., Q] of the half-spaces; +inf for queries that see nothing."""
        edge = jnp.asarray(self.activation.edge(), jnp.float32)
        sees = self.visible.count() > 0
        return jnp.where(sees, jnp.broadcast_to(edge, sees.shape), jnp.inf)


class Partial(NamedTuple):
    """Sums over some of the keys that a row attends to; more keys merge in any order.

    Chunks of a scan, passes over reported keys, a cache and fresh keys, shards of a
    mesh: what each found is a Partial, and `merge` makes one of two.

    Attributes:
      weighted: f32[..., D], sum of weight times value.
      total: f32[...], sum of the weights.
      peak: f32[...], the score that the weights exp(score - peak) are relative to, -inf
        where no key was seen; None where weights are not relative to one.
      count: i32[...], keys with a weight other than zero (0 if not counted).
      candidates: i32[...], keys scored exactly (0 if not counted).
    """

    weighted: jax.Array
    total: jax.Array
    peak: jax.Array | None
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    candidates: jax.Array

    @classmethod
    def zeros(cls, rows: tuple[int, ...], width: int, *, relative: bool) -> Partial:
        """Of no keys."""
        return cls(
            weighted=jnp.zeros((*rows, width), jnp.float32),
            total=jnp.zeros(rows, jnp.float32),
            peak=jnp.full(rows, -jnp.inf, jnp.float32) if relative else None,
            count=jnp.zeros(rows, jnp.int32),
            candidates=jnp.zeros(rows, jnp.int32),
        )

    def merge(self, other: Partial) -> Partial:
        """Of the keys of both; associative, up to rounding."""
        if self.peak is None or other.peak is None:
            return jax.tree.map(jnp.add, self, other)
        peak = jnp.maximum(self.peak, other.peak)
        one, two = self.relative_to(peak), other.relative_to(peak)
        return jax.tree.map(jnp.add, one, two)._replace(peak=peak)

    def merge_axis(self, axis: int) -> Partial:
        """Of the keys of all along an axis of the rows."""
        if self.peak is None:
            return jax.tree.map(lambda x: jnp.sum(x, axis=axis), self)
        peak = jnp.max(self.peak, axis=axis, keepdims=True)
        parts = self.relative_to(jnp.broadcast_to(peak, self.peak.shape))
        merged = jax.tree.map(lambda x: jnp.sum(x, axis=axis), parts)
        return merged._replace(peak=jnp.squeeze(peak, axis))

    def relative_to(self, peak: jax.Array) -> Partial:
        """The same sums of weights relative to a peak f32[...] that is no lower."""
        if self.peak is None:
            return self
        kept = jnp.exp(self.peak - finite_or_zero(peak))
        weighted, total = self.weighted * kept[..., None], self.total * kept
        return self._replace(weighted=weighted, total=total, peak=peak)


def summarize_values(rows: jax.Array, sketch: Any = None) -> Values:
    """Values f[*B, P, D] with their bound and poison. Cost O(P D)."""
    stopped = jax.lax.stop_gradient(rows).astype(jnp.float32)
    return Values(
        rows=rows,
        bound=jnp.max(jnp.abs(stopped), axis=(-2, -1)),
        poison=jnp.where(jnp.all(jnp.isfinite(stopped), axis=-2), 0.0, jnp.nan),
        sketch=sketch,
    )


def heads_first(x: jax.Array) -> jax.Array:
    """[B, S, K, D] to [B, K, S, D]."""
    return jnp.moveaxis(x, 2, 1)


def cut_queries(
    query: jax.Array,
    activation: Any,
    visible: Visible,
    *,
    scale: jax.typing.ArrayLike | None,
    kv_heads: int,
    tile: int,
) -> Tiles:
    """Scales queries f[B, T, N, H] and cuts them into tiles of so many positions.

    The scale is multiplied into the query, so the half-space of ReLU attention is
    <scale q, k> >= bias: the paper's Algorithms 1 and 2 ask for <q, k> >= b while
    applying ReLU to <q, k> / sqrt(d) - b, which reports far too much.

    Args:
      query: f[B, T, N, H].
      activation: prepared, its fields f32[B, T, N].
      visible: i32[B, T] or i32[1, T].
      scale: None is 1/sqrt(H).
      kv_heads: K.
      tile: positions.
    """
    every_head = lambda x: jnp.broadcast_to(x[..., None], query.shape[:3])
    cut = functools.partial(to_tiles, kv_heads=kv_heads, tile=tile)
    short, factor = None, factor_of(query, scale) * activation.score_factor
    if query.dtype.itemsize == 2 and factor.ndim == 0:
        rows, factor = jax.lax.stop_gradient((cut(query), factor))
        factor = meshes.varying(factor, rows)
        short = Short(rows, jnp.broadcast_to(factor, rows.shape[:1]))
    return Tiles(
        cut(scale_query(query, scale) * activation.score_factor),
        jax.tree.map(functools.partial(cut, repeat_last=True), activation),
        jax.tree.map(lambda x: cut(every_head(x)), visible),
        short,
    )


def scale_query(query: jax.Array, scale: jax.typing.ArrayLike | None) -> jax.Array:
    """Queries f32[..., H] times the scale, None is 1/sqrt(H)."""
    return query.astype(jnp.float32) * factor_of(query, scale)


def factor_of(query: jax.Array, scale: jax.typing.ArrayLike | None) -> jax.Array:
    """The scale, f32."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return jnp.asarray(factor, jnp.float32)


def to_tiles(
    x: jax.Array, *, kv_heads: int, tile: int, repeat_last: bool = False
) -> jax.Array:
    """[B, T, N, ...] to [M, B, K, tile * G, ...].

    The last tile is filled up with zeros, so that its queries see nothing, or with what
    the last query has: a field of an activation may not be allowed to be zero.
    """
    b, t, n, *rest = x.shape
    m = -(-t // tile)
    ends = [(0, 0), (0, m * tile - t)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, ends, mode="edge" if repeat_last else "constant")
    x = x.reshape(b, m, tile, kv_heads, n // kv_heads, *rest)
    x = jnp.moveaxis(x, (1, 3), (0, 2))  # [M, B, K, tile, G, ...]
    return x.reshape(m, b, kv_heads, tile * (n // kv_heads), *rest)


def from_tiles(x: jax.Array, *, length: int, heads: int) -> jax.Array:
    """[M, B, K, tile * G, ...] to [B, T, N, ...]."""
    m, b, kv_heads, rows, *rest = x.shape
    group = heads // kv_heads
    x = x.reshape(m, b, kv_heads, rows // group, group, *rest)
    x = jnp.moveaxis(x, (0, 2), (1, 3))  # [B, M, tile, K, G, ...]
    return x.reshape(b, m * (rows // group), heads, *rest)[:, :length]


def cut_parts(x: Any, parts: int, axis: int) -> Any:
    """[..., Q, ...] to [..., J, R, ...] at an axis, of every array of a tree."""
    cut = lambda x: x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
    return jax.tree.map(cut, x)


def join_parts(x: Any, axis: int) -> Any:
    """Undoes `cut_parts`."""
    join = lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.tree.map(join, x)
