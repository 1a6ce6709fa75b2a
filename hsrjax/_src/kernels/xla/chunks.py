"""The walk over all keys, in chunks: dense attention in linear memory.

Chunks that no query of a tile sees are skipped.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hsrjax._src.core.arrays import positions
from hsrjax._src.core.tiles import Partial
from hsrjax._src.core.visible import Visible


class Chunks(NamedTuple):
    """Chunks of so many keys, at most S; static.

    Cost O(S (H + D)) a query, memory O((M Q + S) (H + D)), and O(Q C) for scores.
    """

    size: int

    def walk(self, keys, values, ids, words):
        """Over keys f[*B, S, H], values f[*B, S, D] at positions ids i32[*B, S]."""
        del words
        return _Walk(self.size, keys, values, ids)


class _Walk:
    def __init__(self, chunk: int, keys: jax.Array, values: jax.Array, ids):
        self.chunk, self.keys, self.values, self.ids = chunk, keys, values, ids
        self.size = keys.shape[-2]

    def by_set(self, rows: Any) -> Any:
        return rows

    by_row = by_set

    def over(self, visible: Visible, words: None, one_piece, carry):
        """Carries one_piece(piece, carry) over the chunks that are seen, each once."""
        del words
        step = lambda i, carry: one_piece(_Piece(self, i), carry)
        spans = [(jnp.zeros((), jnp.int32), jnp.asarray(self.size, jnp.int32))]
        if self.ids is None:
            spans = visible.spans()
        done = jnp.zeros((), jnp.int32)
        for low, high in spans:
            first = jnp.maximum(low // self.chunk, done)
            done = (high + (self.chunk - 1)) // self.chunk
            carry = jax.lax.fori_loop(first, done, step, carry)
        return carry

    def no_key_grads(self) -> tuple[jax.Array, jax.Array]:
        """f32[*B, H, S] and f32[*B, D, S]."""
        keys, values = (
            jnp.zeros_like(jnp.swapaxes(x, -1, -2), jnp.float32)
            for x in (self.keys, self.values)
        )
        return keys, values

    def key_grads(self, bar: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.swapaxes(bar, -1, -2).astype(like.dtype)


class _Piece:
    """Chunk number i.

    Attributes:
      at: i32[..., 1, C], the position of each key.
    """

    def __init__(self, walk: _Walk, i: jax.Array):
        self.walk, self.i = walk, i
        # The last chunk is moved back to end with the keys.
        self.start = jnp.minimum(i * walk.chunk, walk.size - walk.chunk)
        self.cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=self.start, slice_size=walk.chunk
        )
        self.slots = self.start + positions(walk.chunk, walk.keys.ndim)
        self.at = self.slots
        if walk.ids is not None:
            self.at = self.cut(walk.ids, axis=-1)[..., None, :]

    def of(self, rows: Any) -> Any:
        return rows

    def gather(self) -> tuple[jax.Array, jax.Array]:
        """Keys f32[*B, C, H] and values f32[*B, C, D]."""
        keys, values = (
            self.cut(x, axis=-2).astype(jnp.float32)
            for x in (self.walk.keys, self.walk.values)
        )
        return keys, values

    def mask(self, seen: Visible) -> jax.Array:
        visible = seen.mask(self.at)
        if self.walk.size % self.walk.chunk:  # some were in the chunk before
            visible &= self.slots >= self.i * self.walk.chunk
        return visible

    def count(self, visible: jax.Array) -> jax.Array:
        """All that is visible is looked at: known without counting."""
        return jnp.zeros(visible.shape[:-1], jnp.int32)

    def add(self, total: Any, new: Any) -> Any:
        if not isinstance(total, Partial):
            return jax.tree.map(jnp.add, total, new)
        return total.merge(new)

    def add_to_keys(self, total: jax.Array, new: jax.Array) -> jax.Array:
        """Adds f32[*B, :, C] to f32[*B, :, S]."""
        new = self.cut(total, axis=-1) + new
        return jax.lax.dynamic_update_slice_in_dim(total, new, self.start, axis=-1)
