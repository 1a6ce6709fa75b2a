"""Dense or reported, decided inside the call by how many keys are reported.

A look at a sample of the sketch comes first. Where so many keys survive that gathering
them would cost more than scoring all, dense attention runs at once. After the scan of
the whole sketch the survivors are counted, and the same choice is made again, so that a
sample which promised too little costs one scan and no more. Exact either way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hsrjax import bitset, bounds, dense, gathered, reported
from hsrjax.activations import Activation, law_of
from hsrjax.bitset import WORD
from hsrjax.index import Index
from hsrjax.layout import from_tiles
from hsrjax.planner import Plan
from hsrjax.reported import Info, Tiles, Values
from hsrjax.weights import edge

_SLICES = 4
"""Runs of keys in a sample."""
_SHARE = 64
"""A sample is one key in this many."""
_MOST_WORDS = 8
_TILES = 8
"""Tiles of queries that are looked at."""


def attend(
    activation: Activation,
    index: Index,
    values: Values,
    cut: Callable[[int], Tiles],
    *,
    length: int,
    heads: int,
    plan: Plan,
    counted: bool = True,
) -> tuple[jax.Array, Info]:
    """Carries out a plan on an index.

    Args:
      activation: any that the plan was made for.
      index: batch axes *B = [B, K].
      values: rows f[B, K, P, D].
      cut: makes tiles of so many query positions.
      length: T query positions.
      heads: N query heads.
      plan: "dense", "hsr" or, to choose here, "auto" with what is expected.
      counted: False may leave Info's numbers of keys zero, which saves time.

    Returns:
      f32[B, T, N, D] and Info, each [B, T, N]. Under vmap one choice is made for all
      that is mapped over.
    """

    def scored() -> tuple[jax.Array, Info]:
        tiles = cut(plan.dense_tile)
        found = dense.attend(
            activation,
            index.keys,
            values,
            tiles,
            chunk=plan.chunk,
            counted=counted,
            ids=index.ids,
        )
        return uncut(found)

    def uncut(result):
        return jax.tree.map(lambda x: from_tiles(x, length=length, heads=heads), result)

    if plan.method == "dense":
        return scored()
    tiles = cut(plan.tile)
    choose = lambda: reported.report(
        activation,
        index,
        values.sketch,
        tiles,
        capacity=plan.capacity,
        parts=plan.parts,
    )
    gather = lambda sets: uncut(
        reported.attend_sets(
            activation,
            index,
            values,
            tiles,
            sets,
            capacity=plan.capacity,
            counted=counted,
        )
    )
    expected = plan.expected
    if expected is None:
        return gather(choose())
    if index.ids is None:
        reached = tiles._replace(offsets=edge(law_of(activation), tiles.offsets))
        runs = expected_runs(index, reached, plan)
        excess = expected.hsr + expected.one_run * runs - expected.dense
        dense_wins = _together(excess) > 0
        shapes = jax.eval_shape(choose)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        sets = jax.lax.cond(dense_wins, lambda: nothing, choose)
    else:
        # Runs of keys in spatial order are no sample, and balls look sooner.
        dense_wins, sets = jnp.zeros((), jnp.bool_), choose()
    runs = jnp.sum(gathered.runs(sets.words, plan.capacity))
    excess = expected.one_run * runs.astype(jnp.float32) - expected.dense
    dense_wins |= _together(excess) > 0
    if plan.chunk is None:
        # Under grad a cond keeps what either side needs: now not all scores.
        scored = jax.checkpoint(scored)
    return jax.lax.cond(dense_wins, scored, lambda: gather(sets))


@jax.custom_batching.custom_vmap
def _together(excess: jax.Array) -> jax.Array:
    """Under vmap the sum over what is mapped over: one choice, so a cond stays one."""
    return excess


@_together.def_vmap
def _together_batched(axis_size, in_batched, excess):
    del axis_size
    (batched,) = in_batched
    return _together(jnp.sum(excess, axis=0) if batched else excess), False


def expected_runs(index: Index, tiles: Tiles, plan: Plan) -> jax.Array:
    """Runs, f32, that all tiles are expected to need, from a sample of them."""
    index, tiles = jax.lax.stop_gradient((index, tiles))
    count = tiles.offsets.shape[0]
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
    runs = min(_SLICES, blocks // words)
    low, high = tile.visible.spans()[-1]
    step = (high - low) / runs
    middles = [low + ((i + 0.5) * step).astype(jnp.int32) for i in range(runs)]
    firsts = [jnp.clip(x // WORD - words // 2, 0, blocks - words) for x in middles]
    passing, seen = _look(index, tile, firsts, words)
    hits, used = _sizes(passing & seen, parts), _sizes(seen, parts)
    there = tile.visible.count()
    there = jnp.max(there.reshape(*there.shape[:-1], parts, -1), axis=-1)
    there = jnp.broadcast_to(there, hits.shape)
    hits, used, there = (x.astype(jnp.float32) for x in (hits, used, there))
    return (hits - jnp.sqrt(hits)) * there / jnp.maximum(used, 1.0)


def _look(index: Index, tile: Tiles, firsts: list[jax.Array], words: int):
    """Which keys of some runs may be members, and which are seen.

    Args:
      index: batch axes *B.
      tile: Q queries.
      firsts: i32 scalars, the blocks that the runs begin with.
      words: blocks of a run, static.

    Returns:
      bool[*B, Q, C] twice, for the C keys of all runs.
    """

    def cut(x, unit=1):
        size = words * unit
        parts = [
            jax.lax.dynamic_slice_in_dim(x, first * unit, size, axis=-1)
            for first in firsts
        ]
        return jnp.concatenate(parts, axis=-1)

    sketch = index.sketch
    runs = dataclasses.replace(
        sketch,
        codes=cut(sketch.codes, WORD),
        scale=cut(sketch.scale),
        spread=cut(sketch.spread),
        radius=cut(sketch.radius),
    )
    query_sketch = bounds.sketch_query(runs, tile.queries)
    lowest = bounds.thresholds(query_sketch, tile.offsets)
    products = bounds.code_products(runs, query_sketch)
    passing = products.reshape(*lowest.shape, WORD) >= lowest[..., None]
    slots = cut(bitset.positions(index.keys.shape[-2], products.ndim), WORD)
    alive = bitset.unpack(cut(index.alive))[..., None, :]
    return passing.reshape(products.shape), tile.visible.mask(slots) & alive


def _sizes(members: jax.Array, parts: int) -> jax.Array:
    """Sizes i32[*B, J] of the unions over the parts of bool[*B, Q, S]."""
    *lead, _, size = members.shape
    unions = jnp.any(members.reshape(*lead, parts, -1, size), axis=-2)
    return jnp.sum(unions, axis=-1, dtype=jnp.int32)
