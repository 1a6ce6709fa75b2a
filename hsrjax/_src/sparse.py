"""Attention to reported keys: which they are, and what comes of them.

Queries are bounded by tiles, in large int8 products, and gather by the parts of a tile,
whose sets are smaller: the set of a part is the union of what its queries report, a bit
set over key slots. Its members are then scored exactly, in runs of at most `capacity`:
a larger set takes more runs, and no key is ever dropped.

Shapes here: M tiles of Q queries (positions and the heads that share a key head), with
batch axes *B (batch, key heads), in J parts.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hsrjax._src.core import bitset
from hsrjax._src.core.arrays import sum_pair
from hsrjax._src.core.bitset import WORD
from hsrjax._src.core.tiles import Partial, Tiles, Values
from hsrjax._src.index.index import Index
from hsrjax._src.kernels.base import InTurn, Selected
from hsrjax._src.planning.plan import Plan

_SLICES = 4
"""Runs of keys in a sample."""
_SHARE = 64
"""A sample is one key in this many."""
_MOST_WORDS = 8
_TILES = 8
"""Tiles of queries that are looked at."""


def report(
    kernels: InTurn, index: Index, values: Values, tiles: Tiles, *, plan: Plan
) -> Selected:
    """Which keys the parts of every tile look at, by tile: the first half."""
    index, tiles = jax.lax.stop_gradient((index, tiles))

    def choose(_, tile):
        if tile.activation.whole_rows:
            return None, kernels.select(
                index, values.sketch, tile, capacity=plan.capacity, parts=plan.parts
            )
        words = kernels.scan(
            index, tile.queries, tile.edges(), visible=tile.visible, parts=plan.parts
        )
        return None, Selected(words, None, None)

    return jax.lax.scan(choose, None, tiles)[1]


def sum_sets(
    kernels: InTurn,
    index: Index,
    values: Values,
    tiles: Tiles,
    sets: Selected | None,
    *,
    plan: Plan,
    counted: bool,
) -> tuple[Partial, Any, jax.Array]:
    """Exact work over the keys of the sets: the second half.

    Args:
      kernels: the operations.
      index: batch axes *B. Differentiable in `index.keys`.
      values: differentiable in `values.rows`.
      tiles: of `plan.tile` positions; differentiable in queries and activation.
      sets: from `report`; None does both halves, in one where a kernel can.
      plan: capacity and parts.
      counted: False may leave the numbers of keys zero, which saves time.

    Returns:
      Partial [M, *B, Q], certificates of the keys left out, and sizes of the sets
      i32[M, *B, J].
    """
    if sets is None:
        found = fused(kernels, index, values, tiles, plan=plan, counted=counted)
        if found is not None:
            return found
        sets = report(kernels, index, values, tiles, plan=plan)
    words, law, certificate, candidates = sets
    sum_keys = functools.partial(
        kernels.sum_sets, capacity=plan.capacity, counted=counted
    )
    weighed = tiles if law is None else tiles._replace(activation=law)
    arrays = weighed, index.keys, values.rows, index.ids, words
    sums = tiles.activation.settle(sum_keys(*arrays), sum_keys, arrays)
    if candidates is not None:
        sums = sums._replace(candidates=candidates)
    return sums, certificate, bitset.size(words)


def fused(
    kernels: InTurn,
    index: Index,
    values: Values,
    tiles: Tiles,
    *,
    plan: Plan,
    counted: bool,
    or_all: bool = False,
) -> tuple[Partial, Any, jax.Array] | None:
    """Both halves in one, where a kernel can; `or_all` as in `scan_and_sum`."""
    options = {
        "capacity": plan.capacity,
        "parts": plan.parts,
        "counted": counted,
        "or_all": or_all,
    }
    try:
        if tiles.activation.whole_rows:
            sizes, sums, certificate = kernels.select_and_sum(
                index, values, tiles, **options
            )
            return sums, certificate, sizes
        sizes, sums = kernels.scan_and_sum(index, tiles, values.rows, **options)
    except NotImplementedError:
        return None
    return sums, None, sizes


def runs(words: jax.Array, capacity: int) -> jax.Array:
    """How many runs all sets u32[..., P/32] take, f32."""
    number = (bitset.size(words) + (capacity - 1)) // capacity
    return jnp.sum(number).astype(jnp.float32)


def expected_runs(index: Index, tiles: Tiles, plan: Plan) -> jax.Array:
    """Runs, f32, that all tiles are expected to need, from a sample of them."""
    index, tiles = jax.lax.stop_gradient((index, tiles))
    count = tiles.queries.shape[0]
    sampled = min(count, _TILES)
    step = count / sampled
    at = jnp.array([int((i + 0.5) * step) for i in range(sampled)], jnp.int32)
    some = jax.tree.map(lambda x: x[at], tiles) if sampled < count else tiles
    look = functools.partial(_expected_sizes, index, parts=plan.parts)
    if sampled == 1:
        sizes = look(jax.tree.map(lambda x: x[0], some))
    else:
        sizes = jax.lax.map(look, some)
    return step * jnp.sum(jnp.ceil(sizes / plan.capacity))


def _expected_sizes(index: Index, tile: Tiles, *, parts: int) -> jax.Array:
    """Sizes f32[*B, J] of the sets that a tile is expected to report.

    Bounds some keys in runs spread over those that the tile sees. A low estimate: where
    it is too low, one scan is lost.
    """
    blocks = index.alive.shape[-1]
    words = min(max(1, blocks // (_SHARE * _SLICES)), _MOST_WORDS)
    slices = min(_SLICES, blocks // words)
    low, high = tile.visible.spans()[-1]
    step = (high - low) / slices
    middles = [low + ((i + 0.5) * step).astype(jnp.int32) for i in range(slices)]
    firsts = [jnp.clip(x // WORD - words // 2, 0, blocks - words) for x in middles]
    passing = index.sketch.runs(firsts, words).passing(tile.queries, tile.edges())
    block = jnp.concatenate([x + jnp.arange(words, dtype=jnp.int32) for x in firsts])
    slots = block[:, None] * WORD + jnp.arange(WORD, dtype=jnp.int32)[None, :]
    slots = slots.reshape((1,) * (passing.ndim - 1) + (-1,))
    alive = bitset.unpack(index.alive[..., block])[..., None, :]
    seen = tile.visible.mask(slots) & alive
    hits, used = sum_pair(_unions(passing & seen, parts), _unions(seen, parts))
    there = tile.visible.count()
    there = jnp.max(there.reshape(*there.shape[:-1], parts, -1), axis=-1)
    there = jnp.broadcast_to(there, hits.shape)
    hits, used, there = (x.astype(jnp.float32) for x in (hits, used, there))
    return (hits - jnp.sqrt(hits)) * there / jnp.maximum(used, 1.0)


def _unions(members: jax.Array, parts: int) -> jax.Array:
    """Unions over the parts of bool[*B, Q, S] as i32[*B, J, S], 0 and 1."""
    *lead, _, size = members.shape
    unions = jnp.any(members.reshape(*lead, parts, -1, size), axis=-2)
    return unions.astype(jnp.int32)
