"""The walk over reported keys, as a list of work.

The set of a part of a tile is cut into runs of at most C members. Piece number i takes
the runs i W ... (i+1) W - 1 of a tile, whichever sets they belong to, and gathers their
keys and values into slots, to be scored against the whole part as matrix products. The
number of pieces is computed, not fixed: sets of any size cost what they hold, rounded
up to C, and no key is ever dropped.

Shapes here: batch axes *A and K key heads, in J parts of R queries each. The G = K J
sets of a row of the batch share one list.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hsrjax._src.core import bitset
from hsrjax._src.core.arrays import add_rows, gather_rows, positions, take_rows
from hsrjax._src.core.visible import Visible
from hsrjax._src.index.index import ids_of

_SLOTS_AT_ONCE = 2**12
"""Of all runs of a piece."""


class Runs(NamedTuple):
    """Runs of so many slots; static."""

    capacity: int

    def walk(self, keys, values, ids, words):
        """Over the keys of sets u32[M, *A, K, J, P/32]; only their shape counts.

        Keys f[*A, K, P, H], values f[*A, K, P, D], positions ids i32[*A, K, P] or None.
        """
        return _Walk(self.capacity, keys, values, ids, words)


class Work(NamedTuple):
    """The runs of all sets of a tile, in order; G = K J sets a row of the batch.

    Attributes:
      ranked: the sets, u32[*A, G, P/32].
      runs: i32[*A, G], runs of each set.
      end: i32[*A, G], runs of this set and of those before it.
    """

    ranked: bitset.Ranked
    runs: jax.Array
    end: jax.Array


class Taken(NamedTuple):
    """The runs of one piece.

    Attributes:
      sets: i32[*A, W], the set of each run, or None for each set in turn, W = G.
      slots: i32[*A, W, C], key slots, P (one past the end) where the run is shorter.
      rows: i32[*A, W, C], where the keys are gathered from: the slots or, with a list
        of runs, the slots among those of all heads, K P past the end.
    """

    sets: jax.Array | None
    slots: jax.Array
    rows: jax.Array


def runs(words: jax.Array, capacity: int) -> jax.Array:
    """Into how many runs, i32[...], sets u32[..., W] are cut."""
    return (bitset.size(words) + (capacity - 1)) // capacity


def work(words: jax.Array, capacity: int) -> Work:
    """Cuts sets u32[*A, K, J, P/32] into runs of so many members."""
    words = words.reshape(*words.shape[:-3], -1, words.shape[-1])
    number = runs(words, capacity)
    end = jnp.cumsum(number, axis=-1, dtype=jnp.int32)
    return Work(bitset.rank(words), number, end)


def pieces(work: Work, count: int | None) -> jax.Array:
    """Pieces of W = count runs, or of a run of each set, that the fullest row needs."""
    if count is None:
        return jnp.max(work.runs)
    return (jnp.max(work.end[..., -1]) + (count - 1)) // count


def take(
    work: Work, i: jax.Array, *, count: int | None, capacity: int, parts: int
) -> Taken:
    """Runs of piece i; those past the last run hold nothing."""
    a_run = positions(capacity, work.end.ndim + 1)
    if count is None:
        slots = bitset.select(work.ranked, i * capacity + a_run)
        return Taken(None, slots, slots)
    number = i * count + positions(count, work.end.ndim)
    before = work.end[..., None, :] <= number[..., None]
    last = work.end.shape[-1] - 1
    sets = jnp.minimum(jnp.sum(before, axis=-1, dtype=jnp.int32), last)
    first = work.end - work.runs
    first = jnp.take_along_axis(first, sets, axis=-1, mode="promise_in_bounds")
    ranks = (number - first)[..., None] * capacity + a_run
    slots = bitset.select(work.ranked, ranks, sets)
    past = bitset.WORD * work.ranked.words.shape[-1]
    rows = (sets // parts)[..., None] * past + slots
    return Taken(sets, slots, jnp.where(slots < past, rows, (last + 1) // parts * past))


class _Walk:
    """The way over the runs of a tile: what all its pieces share."""

    def __init__(self, capacity, keys, values, ids, words):
        *lead, self.heads, self.parts, _ = words.shape[1:]
        self.capacity, self.batch = capacity, len(lead)
        past = keys.shape[-2]
        # Heads report sets of very different sizes. A lone set needs no list, and there
        # is none where rows of all heads could not be counted in int32.
        self.count = None
        if self.heads * self.parts > 1 and self.heads * past < 2**31:
            most = _SLOTS_AT_ONCE // (capacity * math.prod(lead))
            self.count = min(max(1, most), self.heads * self.parts)
        self.keys, self.values, self.ids = keys, values, ids
        if self.count is not None:
            merge = functools.partial(_merge, axis=self.batch)
            self.keys, self.values = merge(keys), merge(values)
            self.ids = None if ids is None else merge(ids)

    def by_set(self, rows: Any) -> Any:
        """[*A, K, Q, ...] to [*A, G, R, ...]."""
        axis, sets = self.batch, self.heads * self.parts
        cut = lambda x: x.reshape(*x.shape[:axis], sets, -1, *x.shape[axis + 2 :])
        return jax.tree.map(cut, rows)

    def by_row(self, rows: Any) -> Any:
        """Undoes `by_set`."""
        axis, heads = self.batch, self.heads
        join = lambda x: x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 2 :])
        return jax.tree.map(join, rows)

    def over(self, visible: Visible, words: jax.Array, one_piece, carry):
        """Carries one_piece(piece, carry) over all runs of the sets of a tile."""
        del visible
        todo = work(words, self.capacity)

        def step(i, carry):
            taken = take(
                todo, i, count=self.count, capacity=self.capacity, parts=self.parts
            )
            return one_piece(_Piece(self, taken), carry)

        return jax.lax.fori_loop(0, pieces(todo, self.count), step, carry)

    def no_key_grads(self) -> tuple[jax.Array, jax.Array]:
        """f32, of the keys and of the values."""
        shapes = self.keys.shape, self.values.shape
        keys, values = (jnp.zeros(x, jnp.float32) for x in shapes)
        return keys, values

    def key_grads(self, bar: jax.Array, like: jax.Array) -> jax.Array:
        return bar.reshape(like.shape).astype(like.dtype)


class _Piece:
    """W runs of the list, or W = G, one of each set.

    Attributes:
      at: i32[*A, W, 1, C], the position of each run's keys, P and above for none.
    """

    def __init__(self, walk: _Walk, taken: Taken):
        self.walk, self.taken = walk, taken
        at = taken.slots if walk.ids is None else ids_of(walk.ids, taken.rows)
        self.at = at[..., None, :]

    def of(self, rows: Any) -> Any:
        """Rows [*A, G, R, ...] of each run's set, [*A, W, R, ...]."""
        sets = self.taken.sets
        return rows if sets is None else jax.tree.map(lambda x: _take(x, sets), rows)

    def gather(self) -> tuple[jax.Array, jax.Array]:
        """Keys f32[*A, W, C, H] and values f32[*A, W, C, D]; zeros for none."""
        walk, rows = self.walk, self.taken.rows
        return gather_rows(walk.keys, rows), gather_rows(walk.values, rows)

    def mask(self, seen: Visible) -> jax.Array:
        return seen.mask(self.at)

    def count(self, visible: jax.Array) -> jax.Array:
        return jnp.sum(visible, axis=-1, dtype=jnp.int32)

    def add(self, total: Any, new: Any) -> Any:
        """Adds rows [*A, W, R, ...] of the runs to those of their sets."""
        sets = self.taken.sets
        if sets is None:
            return jax.tree.map(jnp.add, total, new)
        return jax.tree.map(lambda total, x: _add(total, sets, x), total, new)

    def add_to_keys(self, total: jax.Array, new: jax.Array) -> jax.Array:
        """Adds f32[*A, W, D, C] to the rows of the slots that they are of."""
        lead = total.shape[:-2]
        new = jnp.swapaxes(new, -1, -2)
        rows = self.taken.rows.reshape(*lead, -1)
        return add_rows(total, rows, new.reshape(*lead, -1, new.shape[-1]))


def _merge(x: jax.Array, *, axis: int) -> jax.Array:
    """Makes one of two axes."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _take(x: jax.Array, sets: jax.Array) -> jax.Array:
    """x[*A, G, ...] at sets i32[*A, W]: [*A, W, ...]."""
    lead = sets.shape[:-1]
    flat = x.reshape(*lead, x.shape[len(lead)], -1)
    take = gather_rows if x.dtype == jnp.float32 else take_rows
    return take(flat, sets).reshape(*sets.shape, *x.shape[len(lead) + 1 :])


def _add(total: jax.Array, sets: jax.Array, new: jax.Array) -> jax.Array:
    """Adds new[*A, W, ...] to total[*A, G, ...] at sets i32[*A, W]."""
    lead = sets.shape[:-1]
    flat = lambda x: x.reshape(*lead, x.shape[len(lead)], -1)
    return add_rows(flat(total), sets, flat(new)).reshape(total.shape)
