"""What the sketch knows of a tile's scores, for activations that need whole rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hsrjax._src.activations import search
from hsrjax._src.core import bitset, meshes
from hsrjax._src.core.arrays import (
    dot,
    gather_rows,
    positions,
    score_rounding,
)
from hsrjax._src.core.tiles import Tiles, cut_parts, join_parts
from hsrjax._src.index.index import Index, ids_of

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
        self.lower, self.upper = (
            jnp.where(self.visible, x, -jnp.inf)
            for x in index.sketch.intervals(tile.queries)
        )

    def look_at(self, kept: jax.Array) -> jax.Array:
        return bitset.pack_unions(self.visible & kept, self.parts)

    def left_out(self, words: jax.Array) -> jax.Array:
        looked_at = bitset.unpack(words)[..., None, :]
        return join_parts(self._cut(self.visible) & ~looked_at, self.batch)

    def rounding(self) -> jax.Array:
        return score_rounding(self.tile.queries, self.index.sketch.key_norm())

    def best(self, words: jax.Array, rank: int):
        """As `Sight.best`.

        A small r is picked out of each pass; for a large one all scores are kept, as
        counting them afterwards is cheaper than to sort in every pass.
        """
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
        return join_parts((peak, best), self.batch)

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
