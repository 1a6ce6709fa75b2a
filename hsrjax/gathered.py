"""Exact sums over reported keys, as a list of work: forward and backward.

The set of a part of a tile is cut into runs of at most C members. Pass number i takes
the runs i W ... (i+1) W - 1 of a tile, whichever sets they belong to, gathers their
keys and values into slots, scores them against the whole part as matrix products and
adds what they contribute. The number of passes is computed, not fixed: sets of any size
cost what they hold, rounded up to C, and no key is ever dropped.

A key outside the half-space has weight zero and gradient zero, so the backward pass
walks over the same runs.

Shapes here: M tiles with batch axes *A and K key heads, in J parts of R queries each:
queries f[M, *A, K, J, R, H]. The G = K J sets of a row of the batch share one list.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsrjax import bitset, bounds
from hsrjax.index import ids_of
from hsrjax.rows import add_rows, gather_rows, take_rows
from hsrjax.weights import fires, weigh

_SLOTS_AT_ONCE = 2**12
"""Of all runs of a pass."""


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


class Runs(NamedTuple):
    """What one pass works on.

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


def passes(work: Work, count: int | None) -> jax.Array:
    """Passes of W = count runs, or of a run of each set, that the fullest row needs."""
    if count is None:
        return jnp.max(work.runs)
    return (jnp.max(work.end[..., -1]) + (count - 1)) // count


def take(
    work: Work, i: jax.Array, *, count: int | None, capacity: int, parts: int
) -> Runs:
    """Runs of pass i; those past the last run hold nothing."""
    a_run = bitset.positions(capacity, work.end.ndim + 1)
    if count is None:
        slots = bitset.select(work.ranked, i * capacity + a_run)
        return Runs(None, slots, slots)
    number = i * count + bitset.positions(count, work.end.ndim)
    before = work.end[..., None, :] <= number[..., None]
    last = work.end.shape[-1] - 1
    sets = jnp.minimum(jnp.sum(before, axis=-1, dtype=jnp.int32), last)
    first = work.end - work.runs
    first = jnp.take_along_axis(first, sets, axis=-1, mode="promise_in_bounds")
    ranks = (number - first)[..., None] * capacity + a_run
    slots = bitset.select(work.ranked, ranks, sets)
    past = bitset.WORD * work.ranked.words.shape[-1]
    rows = (sets // parts)[..., None] * past + slots
    return Runs(sets, slots, jnp.where(slots < past, rows, (last + 1) // parts * past))


def _sum_tiles(
    law, capacity, counted, queries, keys, values, ids, offsets, shifts, seen, words
):
    """Sums over the reported keys of each part of each tile, differentiable once.

    Args:
      law: of the weights (`hsrjax.weights`); static.
      capacity: C, slots of a run; static.
      counted: whether the numbers of keys are wanted; static.
      queries: f32[M, *A, K, J, R, H].
      keys: f[*A, K, P, H].
      values: f[*A, K, P, D].
      ids: i32[*A, K, P], the position of each slot's key, or None where it is the slot.
      offsets: f32[M, *A, K, J, R].
      shifts: f32[M, *A, K, J, R], no gradient.
      seen: Visible, i32[M, *A, K, J, R].
      words: u32[M, *A, K, J, P/32].

    Returns:
      Weighted values f32[M, *A, K, J, R, D], weights f32[M, *A, K, J, R], and how many
      keys fired and how many were looked at, i32[M, *A, K, J, R] each (0 if not
      counted).
    """
    walk = _Walk(capacity, keys, values, ids, words)

    def one_tile(tile):
        rows, tile_words = tile
        rows = walk.by_set(rows)

        def one_pass(run, sums):
            a, offset, shift, tile_seen = run.of(rows)
            k, v = run.gather()
            visible, sinks = tile_seen.mask(run.at), tile_seen.sinks(run.at)
            scores = bounds.dot(a, k)
            masked = jnp.where(visible, scores, -jnp.inf)
            weights = _weigh(law, masked, offset, shift, sinks)
            weighted = bounds.product("...qc,...cd->...qd", weights, v)
            total = jnp.sum(weights, axis=-1)
            if not counted:
                return *run.add(sums[:2], (weighted, total)), *sums[2:]
            firing = fires(scores, offset[..., None], law=law, sinks=sinks)
            count = lambda x: jnp.sum(x, axis=-1, dtype=jnp.int32)
            new = weighted, total, count(firing & visible), count(visible)
            return run.add(sums, new)

        lead = rows[1].shape
        start = (
            jnp.zeros((*lead, values.shape[-1]), jnp.float32),
            jnp.zeros(lead, jnp.float32),
            jnp.zeros(lead, jnp.int32),
            jnp.zeros(lead, jnp.int32),
        )
        return walk.by_part(walk.over(tile_words, one_pass, start))

    return jax.lax.map(one_tile, ((queries, offsets, shifts, seen), words))


def _sums_forward(law, capacity, counted, *arrays):
    return _sum_tiles(law, capacity, counted, *arrays), arrays


def _sums_backward(law, capacity, _, arrays, cotangents):
    """Gradients over the forward pass's sets; keys outside them have none."""
    queries, keys, values, ids, offsets, shifts, seen, words = arrays
    walk = _Walk(capacity, keys, values, ids, words)

    def one_tile(key_grads, tile):
        rows, tile_words = tile
        rows = walk.by_set(rows)

        def one_pass(run, grads):
            *row_grads, keys_bar, values_bar = grads
            a, offset, shift, tile_seen, weighted_bar, total_bar = run.of(rows)
            k, v = run.gather()
            visible, sinks = tile_seen.mask(run.at), tile_seen.sinks(run.at)

            def weights_of(scores, offset):
                scores = jnp.where(visible, scores, -jnp.inf)
                return _weigh(law, scores, offset, shift, sinks)

            weights, pull = jax.vjp(weights_of, bounds.dot(a, k), offset)
            weights_bar = bounds.dot(weighted_bar, v) + total_bar[..., None]
            scores_bar, offset_new = pull(weights_bar)
            # As [H, C] first: several times faster on CPU than straight to [C, H].
            a_turned, bar_turned = (jnp.swapaxes(x, -1, -2) for x in (a, weighted_bar))
            keys_new = bounds.product("...hq,...qc->...hc", a_turned, scores_bar)
            values_new = bounds.product("...dq,...qc->...dc", bar_turned, weights)
            a_new = bounds.product("...qc,...ch->...qh", scores_bar, k)
            return (
                *run.add(tuple(row_grads), (a_new, offset_new)),
                run.add_to_keys(keys_bar, jnp.swapaxes(keys_new, -1, -2)),
                run.add_to_keys(values_bar, jnp.swapaxes(values_new, -1, -2)),
            )

        start = (jnp.zeros_like(rows[0]), jnp.zeros_like(rows[1]), *key_grads)
        *row_grads, keys_bar, values_bar = walk.over(tile_words, one_pass, start)
        return (keys_bar, values_bar), walk.by_part(tuple(row_grads))

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (walk.keys, walk.values))
    rows = queries, offsets, shifts, seen, *cotangents[:2]
    key_grads, row_grads = jax.lax.scan(one_tile, start, (rows, words))
    keys_bar, values_bar = (
        bar.reshape(x.shape).astype(x.dtype)
        for bar, x in zip(key_grads, (keys, values), strict=True)
    )
    queries_bar, offsets_bar = row_grads
    return queries_bar, keys_bar, values_bar, None, offsets_bar, None, None, None


sums = jax.custom_vjp(_sum_tiles, nondiff_argnums=(0, 1, 2))
sums.defvjp(_sums_forward, _sums_backward)


class _Walk:
    """The way over the runs of a tile: what all its passes share.

    Args:
      capacity: C.
      keys: f[*A, K, P, H].
      values: f[*A, K, P, D].
      ids: i32[*A, K, P] or None.
      words: u32[M, *A, K, J, P/32], of all tiles; only the shape counts.
    """

    def __init__(self, capacity, keys, values, ids, words):
        *lead, self.heads, self.parts, _ = words.shape[1:]
        self.capacity, self.batch = capacity, len(lead)
        self.past = keys.shape[-2]
        # The few sets of a tile in one part are as large as each other: no list. Nor is
        # there one where rows of all heads could not be counted in int32.
        self.count = None
        if self.parts > 1 and self.heads * self.past < 2**31:
            most = _SLOTS_AT_ONCE // (capacity * math.prod(lead))
            self.count = min(max(1, most), self.heads * self.parts)
        self.keys, self.values, self.ids = keys, values, ids
        if self.count is not None:
            merge = functools.partial(_merge, axis=self.batch)
            self.keys, self.values = merge(keys), merge(values)
            self.ids = None if ids is None else merge(ids)

    def by_set(self, rows):
        """[*A, K, J, R, ...] to [*A, G, R, ...]."""
        return jax.tree.map(lambda x: _merge(x, axis=self.batch), rows)

    def by_part(self, rows):
        """Undoes `by_set`."""
        axis, sets = self.batch, (self.heads, self.parts)
        return jax.tree.map(
            lambda x: x.reshape(*x.shape[:axis], *sets, *x.shape[axis + 1 :]), rows
        )

    def over(self, words, one_pass, start):
        """Carries one_pass(_Pass, carry) over all runs of the sets of a tile."""
        todo = work(words, self.capacity)

        def step(i, carry):
            runs = take(
                todo, i, count=self.count, capacity=self.capacity, parts=self.parts
            )
            return one_pass(_Pass(self, runs), carry)

        return jax.lax.fori_loop(0, passes(todo, self.count), step, start)


class _Pass:
    """The runs of one pass: W of the list, or W = G, one of each set.

    Attributes:
      at: i32[*A, W, 1, C], the position of each run's keys, P and above for none.
    """

    def __init__(self, walk: _Walk, runs: Runs):
        self.walk, self.runs = walk, runs
        at = runs.slots if walk.ids is None else ids_of(walk.ids, runs.rows)
        self.at = at[..., None, :]

    def of(self, rows):
        """Rows [*A, G, R, ...] of each run's set, [*A, W, R, ...]."""
        sets = self.runs.sets
        return rows if sets is None else jax.tree.map(lambda x: _take(x, sets), rows)

    def gather(self) -> tuple[jax.Array, jax.Array]:
        """Keys f32[*A, W, C, H] and values f32[*A, W, C, D]; zeros for none."""
        walk, rows = self.walk, self.runs.rows
        return gather_rows(walk.keys, rows), gather_rows(walk.values, rows)

    def add(self, totals: tuple, new: tuple) -> tuple:
        """Adds rows [*A, W, R, ...] of the runs to those of their sets."""
        sets = self.runs.sets
        if sets is None:
            return jax.tree.map(jnp.add, totals, new)
        return jax.tree.map(lambda total, x: _add(total, sets, x), totals, new)

    def add_to_keys(self, total: jax.Array, new: jax.Array) -> jax.Array:
        """Adds rows f32[*A, W, C, D] to those of the slots that they are of."""
        lead = total.shape[:-2]
        rows = self.runs.rows.reshape(*lead, -1)
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


def _weigh(law, scores, offset, shift, sinks):
    return weigh(scores, offset[..., None], shift[..., None], law=law, sinks=sinks)
