"""What the sketch knows of a tile's scores, for activations that need whole rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hsrjax._src.activations import certificates, search
from hsrjax._src.core import bitset, meshes
from hsrjax._src.core.arrays import (
    add_rows,
    dot,
    gather_rows,
    order_rounding,
    positions,
    score_rounding,
)
from hsrjax._src.core.bitset import WORD
from hsrjax._src.core.tiles import Tiles, cut_parts, join_parts
from hsrjax._src.index.index import Index, ids_of
from hsrjax._src.kernels.xla.scan import MANY_QUERIES, scan

_KEPT = 512
"""Scores of each set that are kept from one fold to the next."""


class SketchSight:
    """`Sight` of a tile against an index; exact scores only of the sets looked at.

    Shapes: index with batch axes *B, tile of Q queries in J parts of R.

    Args:
      index: whose sketch bounds the scores.
      values: `ValueSketch` for a tail, or None.
      tile: one tile, without the axis M.
      capacity: slots of a pass.
      parts: J.
    """

    scores = None

    def __init__(
        self, index: Index, values: Any, tile: Tiles, *, capacity: int, parts: int
    ):
        self.index, self.values, self.tile = index, values, tile
        self.capacity, self.parts = capacity, parts
        self.batch = tile.queries.ndim - 2
        slot = index.every_id[..., None, :]
        alive = bitset.unpack(index.alive)[..., None, :]
        self.visible = tile.visible.mask(slot) & alive
        self.sinks = tile.visible.sinks(slot)

    @property
    def lower(self) -> jax.Array:
        return self._bounds()[0]

    @property
    def upper(self) -> jax.Array:
        return self._bounds()[1]

    def _bounds(self) -> list[jax.Array]:
        """Made where they are asked for, once in a program: not all ways need them."""
        bounds = self.index.sketch.intervals(self.tile.queries)
        return [jnp.where(self.visible, x, -jnp.inf) for x in bounds]

    def look_at(self, kept: jax.Array) -> jax.Array:
        return bitset.pack_unions(self.visible & kept, self.parts)

    def sample(self, stride: int) -> jax.Array:
        slots = self.index.keys.shape[-2]
        at = jnp.arange(stride // 2, slots, stride, dtype=jnp.int32)
        at = jnp.broadcast_to(at, (*self.index.size.shape, *at.shape))
        queries = self.tile.queries
        apart = queries.shape[-2] >= MANY_QUERIES
        scores = self.index.sketch.sample(queries, stride, apart=apart)
        slot = ids_of(self.index.ids, at)[..., None, :]
        seen = self.tile.visible.mask(slot)
        sinks = self.tile.visible.sinks(slot)
        if sinks is not None:
            seen &= ~sinks
        return jnp.where(seen, scores, -jnp.inf)

    def reached(self, offset: jax.Array) -> jax.Array:
        visible = self.tile.visible
        offset = jnp.where(visible.count() > 0, offset, jnp.inf)
        words = scan(
            self.index, self.tile.queries, offset, visible=visible, parts=self.parts
        )
        return words if self.sinks is None else words | self.look_at(self.sinks)

    def number(self, words: jax.Array) -> jax.Array:
        looked_at = self._cut(self.visible) & bitset.unpack(words)[..., None, :]
        return join_parts(jnp.sum(looked_at, axis=-1, dtype=jnp.int32), self.batch)

    def left_out(self, words: jax.Array) -> jax.Array:
        looked_at = bitset.unpack(words)[..., None, :]
        return join_parts(self._cut(self.visible) & ~looked_at, self.batch)

    def rounding(self) -> jax.Array:
        return score_rounding(self.tile.queries, self.index.sketch.key_norm())

    def remade(self) -> jax.Array:
        return order_rounding(self.tile.queries, self.index.sketch.key_norm())

    def best(self, words: jax.Array, rank: int, most: Any = None):
        if most is not None:
            return self._best_of_few(words, rank, most)
        picked = 0 < 2 * rank < self.capacity
        scored = self._passes(words)

        def one_pass(i, best):
            peak, row = best
            scores, sinks = scored(i * self.capacity, self.capacity)
            peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
            others = scores if sinks is None else jnp.where(sinks, -jnp.inf, scores)
            if picked:
                row = jnp.concatenate([row, others], axis=-1)
                row = jax.lax.top_k(row, rank + 1)[0]
            elif rank:
                start = i * self.capacity
                row = jax.lax.dynamic_update_slice_in_dim(row, others, start, -1)
            return peak, row

        slots = -(-self.index.keys.shape[-2] // self.capacity) * self.capacity
        size = rank + 1 if picked else slots if rank else 0
        lead = self._cut(self.tile.queries).shape[:-1]
        lowest = jnp.full(lead, -jnp.inf, jnp.float32)
        row = jnp.full((*lead, size), -jnp.inf, jnp.float32)
        number = bitset.passes(words, self.capacity)
        start = meshes.varying((lowest, row), self.tile, words, self.index.keys)
        peak, row = jax.lax.fori_loop(0, number, one_pass, start)
        best = None
        if picked:
            best = row[..., -2], row[..., -1]
        elif rank:
            best = search.at_ranks(row, rank)
        return *join_parts((peak, best), self.batch), words

    def _best_of_few(self, words: jax.Array, rank: int, most: Any):
        """The same with all scores of a set in memory, and the sets of the best.

        `most(R)` keys have room; what a part reports beyond makes its rows NaN.
        """
        rows = self.tile.queries.shape[-2] // self.parts
        room = _round_up(min(most(rows), self.index.keys.shape[-2]))
        scores, sinks = self._passes(words)(0, room)
        peak = jnp.max(scores, axis=-1)
        others = scores if sinks is None else jnp.where(sinks, -jnp.inf, scores)
        fits = bitset.size(words)[..., None] <= room
        last, after = (
            jnp.where(fits, x, jnp.nan) for x in search.at_ranks(others, rank)
        )
        apart = certificates.as_good_as_equal(self._cut(self.remade()), peak, last)
        kept = jnp.any(~(scores < (last - apart)[..., None]), axis=-2)
        slots = bitset.select(bitset.rank(words), positions(room, 1))
        bits = kept.astype(jnp.uint32) << (slots % WORD).astype(jnp.uint32)
        nothing = jnp.zeros((*words.shape, 1), jnp.uint32)
        words = add_rows(nothing, slots // WORD, bits[..., None])[..., 0]
        if self.sinks is not None:
            words |= self.look_at(self.sinks)
        return *join_parts((peak, (last, after)), self.batch), words

    def fold(self, words: jax.Array):
        """As `Sight.fold`; the first scores are kept from one call to the next."""
        scored = self._passes(words)
        first = max(1, min(_KEPT, self.index.keys.shape[-2]) // self.capacity)
        kept, _ = scored(0, first * self.capacity)
        number = bitset.passes(words, self.capacity)

        def over(step, row):
            row = self._cut(row)

            def one_pass(i, sums):
                peak, *totals = step(row, scored(i * self.capacity, self.capacity)[0])
                totals = (a + b for a, b in zip(sums[1:], totals, strict=True))
                return (jnp.maximum(sums[0], peak), *totals)

            sums = tuple(step(row, kept))
            sums = jax.lax.fori_loop(first, number, one_pass, sums)
            return join_parts(sums, self.batch)

        return over

    def _cut(self, x: Any) -> Any:
        return cut_parts(x, self.parts, self.batch)

    def _passes(self, words: jax.Array):
        """scored(first, count): exact scores f32[*B, J, R, count], and their sinks."""
        ranked = bitset.rank(words)
        queries, seen = self._cut((self.tile.queries, self.tile.visible))

        def scored(first, count):
            slots = bitset.select(ranked, first + positions(count, 1))
            at = ids_of(self.index.ids, slots)[..., None, :]
            scores = dot(queries, gather_rows(self.index.keys, slots))
            return jnp.where(seen.mask(at), scores, -jnp.inf), seen.sinks(at)

        return scored


def _round_up(keys: int) -> int:
    return -(-keys // WORD) * WORD
