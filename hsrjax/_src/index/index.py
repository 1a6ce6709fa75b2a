"""The index: keys in slots, a sketch of every block, and which slots are in use.

Keys live in slots; 32 slots are a block. A block knows its 8-bit sketch. For head sizes
up to 8 keys that are near each other may be put into the same cell, 128 slots with
balls around them, because there balls rule out whole cells. Above that no geometric
bound does, at any cell size, unless the keys lie in few dimensions.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp

from hsrjax._src.core import bitset, windows
from hsrjax._src.core.arrays import positions, shape_text
from hsrjax._src.core.bitset import WORD, blocks_touched
from hsrjax._src.index.balls import Balls
from hsrjax._src.index.bound import Bound
from hsrjax._src.index.sketch import Sketch
from hsrjax._src.index.spatial import sample_median, spatial_order

_CELL = 4
"""Blocks of a cell, where there are at least `_MANY_BLOCKS`; else one."""
_MANY_BLOCKS = 32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "sketch", "cells", "alive", "ids", "size", "dropped"],
    meta_fields=["max_keys"],
)
@dataclasses.dataclass(frozen=True)
class Index:
    """Keys ready for half-space reporting; a pytree with leading batch axes *B.

    P below is `max_keys` rounded up to a multiple of 32.

    Attributes:
      keys: f[*B, P, H], by slot, in the dtype given.
      sketch: the certified 8-bit sketch of the keys.
      cells: bound on each cell's keys, or None where keys are not in spatial order.
      alive: u32[*B, P/32], a bit for each slot in use and not deleted.
      ids: i32[*B, P], the id of each slot, or None where slot and id are the same.
      size: i32[*B], ids given out so far (deleted keys included).
      dropped: i32[*B], keys that found no room. Not zero means: keys are missing.
      max_keys: room, static.
    """

    keys: jax.Array
    sketch: Sketch
    cells: Bound | None
    alive: jax.Array
    ids: jax.Array | None
    size: jax.Array
    dropped: jax.Array
    max_keys: int

    @classmethod
    def of(cls, keys: jax.Array, *, max_keys: int, whole_cells: bool) -> Self:
        """Of keys f[*B, S, H] in the order given, with room for max_keys.

        Args:
          keys: f[*B, S, H].
          max_keys: at least S.
          whole_cells: whether `group_keys` will follow, which needs them; without
            them P stays as small as it can be.
        """
        lead, count = keys.shape[:-2], keys.shape[-2]
        padded = _padded(max_keys) if whole_cells else -(-max_keys // WORD) * WORD
        stored = jnp.pad(keys, [(0, 0)] * len(lead) + [(0, padded - count), (0, 0)])
        used = jnp.broadcast_to(jnp.arange(padded) < count, stored.shape[:-1])
        size = jnp.full(lead, count, jnp.int32)
        centre = sample_median(jax.lax.stop_gradient(keys), size)
        return cls(
            keys=stored,
            sketch=Sketch.build(jax.lax.stop_gradient(stored), used, centre),
            cells=None,
            alive=bitset.pack(used),
            ids=None,
            size=size,
            dropped=jnp.zeros(lead, jnp.int32),
            max_keys=max_keys,
        )

    @classmethod
    def empty(
        cls, lead: tuple[int, ...], head_dim: int, *, max_keys: int, dtype=jnp.float32
    ) -> Self:
        """Without keys, with room for `max_keys` in each of the `lead` rows."""
        slots = _padded(max_keys)
        return cls(
            keys=jnp.zeros((*lead, slots, head_dim), dtype),
            sketch=Sketch.empty(lead, head_dim, slots),
            cells=None,
            alive=jnp.zeros((*lead, slots // WORD), jnp.uint32),
            ids=None,
            size=jnp.zeros(lead, jnp.int32),
            dropped=jnp.zeros(lead, jnp.int32),
            max_keys=max_keys,
        )

    def __repr__(self) -> str:
        """One line of shapes: the arrays would fill screens."""
        cells = None if self.cells is None else type(self.cells).__name__
        return (
            f"Index(keys={shape_text(self.keys)}, sketch={type(self.sketch).__name__}, "
            f"cells={cells}, size={shape_text(self.size)}, max_keys={self.max_keys})"
        )

    @property
    def every_id(self) -> jax.Array:
        """The id of each slot, i32[*B, P], or [1, ..., 1, P] where it is the slot."""
        if self.ids is None:
            return positions(self.keys.shape[-2], self.keys.ndim - 1)
        return self.ids


def append(index: Index, keys: jax.Array, lengths: jax.Array) -> Index:
    """Adds keys f[*B, U, H], of which only the first lengths are real.

    Only the blocks that they fall into are sketched again. Keys beyond the room are
    counted in `dropped`. Cost O((U + 64) H).

    Args:
      index: batch axes *B.
      keys: f[*B, U, H].
      lengths: i32 that broadcasts against *B. Along its axes of size 1 rows hold
        equally many keys, as the heads of a cache do, and are written together.
    """
    held = index.size[tuple(map(slice, lengths.shape))]
    fits = jnp.minimum(lengths, index.max_keys - held)
    new, blocks = keys.shape[-2], index.alive.shape[-1]
    stored = windows.append(index.keys, held, keys, fits)
    centre = _first_centre(index, jax.lax.stop_gradient(keys), lengths)
    sketch = dataclasses.replace(index.sketch, centre=centre)

    touched = blocks_touched(new, blocks * WORD)
    first = jnp.minimum(held // WORD, blocks - touched)
    slot = first[..., None] * WORD + positions(touched * WORD, held.ndim + 1)
    fresh = (slot >= held[..., None]) & (slot < (held + fits)[..., None])
    words = windows.read(index.alive, first, touched, axis=-1) | bitset.pack(fresh)
    # What is written is read again, not kept: no copy of what it replaces.
    alive = windows.write(index.alive, first, words, axis=-1)
    words = windows.read(alive, first, touched, axis=-1)
    changed = windows.read(jax.lax.stop_gradient(stored), first * WORD, touched * WORD)
    valid = bitset.unpack(words)
    return dataclasses.replace(
        index,
        keys=stored,
        sketch=sketch.append(changed, valid, first),
        cells=index.cells
        and index.cells.append(
            changed, valid, jnp.broadcast_to(first, index.size.shape)
        ),
        alive=alive,
        size=index.size + fits,
        dropped=index.dropped + (lengths - fits),
    )


def group_keys(index: Index, *, bound: type[Bound] = Balls) -> tuple[Index, jax.Array]:
    """The same keys with the same ids, near ones in the same cell.

    Args:
      index: batch axes *B.
      bound: on the keys of each cell.

    Returns:
      Index, and the slot i32[*B, P] that each slot's key had before.
    """
    frozen = jax.lax.stop_gradient(index.keys)
    order = spatial_order(frozen, index.size)
    keys = jnp.take_along_axis(index.keys, order[..., None], axis=-2)
    valid = jnp.take_along_axis(bitset.unpack(index.alive), order, axis=-1)
    centre = sample_median(frozen, index.size)
    blocks = keys.shape[-2] // WORD
    whole = blocks >= _MANY_BLOCKS and blocks % _CELL == 0
    size = WORD * (_CELL if whole else 1)
    frozen = jax.lax.stop_gradient(keys)
    grouped = dataclasses.replace(
        index,
        keys=keys,
        sketch=Sketch.build(frozen, valid, centre),
        cells=bound.build(frozen, valid, centre, size=size),
        alive=bitset.pack(valid),
        ids=ids_of(index.ids, order),
    )
    return grouped, order


def ids_of(ids: jax.Array | None, slots: jax.Array) -> jax.Array:
    """Ids of slots i32[*B, ..., C]; the slot past the end stays past the end."""
    if ids is None:
        return slots
    past = ids.shape[-1]
    flat = jnp.minimum(slots, past - 1).reshape(*ids.shape[:-1], -1)
    found = jnp.take_along_axis(ids, flat, axis=-1, mode="promise_in_bounds")
    return jnp.where(slots < past, found.reshape(slots.shape), past)


def _first_centre(index: Index, keys: jax.Array, lengths: jax.Array) -> jax.Array:
    """The centre is chosen once, from a first batch large enough to be typical."""
    if keys.shape[-2] < WORD:
        return index.sketch.centre
    first = (index.size == 0) & (lengths >= keys.shape[-2] // 2)
    every = jnp.full_like(index.size, keys.shape[-2])
    return jnp.where(first[..., None], sample_median(keys, every), index.sketch.centre)


def _padded(max_keys: int) -> int:
    blocks = -(-max_keys // WORD)
    if blocks >= _MANY_BLOCKS:
        blocks = -(-blocks // _CELL) * _CELL
    return blocks * WORD
