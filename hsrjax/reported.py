"""Attention over reported keys: which they are, and what comes of them.

Queries are bounded by tiles, in large int8 products, and gather by the parts of a tile,
whose sets are smaller: the set of a part is the union of what its queries report, a bit
set over key slots. `hsrjax.gathered` then scores its members exactly, in runs of at
most `capacity`: a larger set takes more runs, and no key is ever dropped.

Shapes here: M tiles of Q queries (positions and the heads that share a key head), with
batch axes *B (batch, key heads): queries f[M, *B, Q, H]; in J parts of R queries:
queries f[M, *B, J, R, H].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsrjax import bitset, bounds, certificates, entmax, gathered, search
from hsrjax import tail as tail_module
from hsrjax.activations import (
    Activation,
    Entmax,
    Softmax,
    law_of,
    normalize_rows,
    selects,
)
from hsrjax.index import Index, ids_of
from hsrjax.query import pack_parts, survivors, trips
from hsrjax.rows import gather_rows
from hsrjax.visible import Visible
from hsrjax.weights import edge, fires


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

    count: jax.Array
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
      sketch: of the values, or None where no tail is asked for.
    """

    rows: jax.Array
    bound: jax.Array
    poison: jax.Array
    sketch: tail_module.ValueSketch | None = None


class Tiles(NamedTuple):
    """Queries cut into tiles.

    Attributes:
      queries: f32[M, *B, Q, H], already scaled.
      offsets: f32[M, *B, Q], ReLU biases; unused by softmax.
      visible: i32[M, *B, Q], the keys that each query may see.
    """

    queries: jax.Array
    offsets: jax.Array
    visible: Visible


class Sets(NamedTuple):
    """The keys that J parts of R queries look at, and what says which weigh anything.

    Attributes:
      words: u32[M, *B, J, P/32].
      selection: f32[M, *B, J, R] each; of entmax the offset alone, its threshold.
      rounding: f32[M, *B, J, R], bound on that of a score.
      tail: f32[M, *B, J, R, ...], what all other keys contribute, or None.
    """

    words: jax.Array
    selection: certificates.Selection
    rounding: jax.Array
    tail: tail_module.Tail | None = None


def summarize_values(rows: jax.Array, tail: int | None = None) -> Values:
    """Values with their bound, poison and, for a tail, sketch. Cost O(P D)."""
    stopped = jax.lax.stop_gradient(rows).astype(jnp.float32)
    return Values(
        rows=rows,
        bound=jnp.max(jnp.abs(stopped), axis=(-2, -1)),
        poison=jnp.where(jnp.all(jnp.isfinite(stopped), axis=-2), 0.0, jnp.nan),
        sketch=None if tail is None else tail_module.sketch_values(stopped, tail),
    )


def attend(
    activation: Activation,
    index: Index,
    values: Values,
    tiles: Tiles,
    *,
    capacity: int,
    parts: int = 1,
) -> tuple[jax.Array, Info]:
    """Attention of tiles of queries over an index, looking only at reported keys.

    Args:
      activation: what `core_of` leaves, but not full softmax.
      index: batch axes *B. Differentiable in `index.keys`.
      values: differentiable in `values.rows`.
      tiles: differentiable in queries and offsets.
      capacity: slots of a pass.
      parts: J, runs of queries of a tile that gather keys of their own; divides Q.

    Returns:
      Outputs f32[M, *B, Q, D] and Info, each [M, *B, Q].
    """
    sets = report(
        activation, index, values.sketch, tiles, capacity=capacity, parts=parts
    )
    return attend_sets(activation, index, values, tiles, sets, capacity=capacity)


def report(
    activation: Activation,
    index: Index,
    sketch: tail_module.ValueSketch | None,
    tiles: Tiles,
    *,
    capacity: int,
    parts: int,
) -> Sets:
    """The first half of `attend`: which keys the parts of every tile look at."""
    index, cut = jax.lax.stop_gradient((index, _in_parts(tiles, parts)))

    def choose(_, tile):
        return None, _choose(activation, index, sketch, tile, capacity=capacity)

    return jax.lax.scan(choose, None, cut)[1]


def attend_sets(
    activation: Activation,
    index: Index,
    values: Values,
    tiles: Tiles,
    sets: Sets,
    *,
    capacity: int,
    counted: bool = True,
) -> tuple[jax.Array, Info]:
    """The second half of `attend`: exact work over the keys of the sets."""
    words, selection, rounding, tail = sets
    batch = tiles.offsets.ndim - 1
    cut = _in_parts(tiles, words.shape[-2])
    arrays = (
        cut.queries,
        index.keys,
        values.rows,
        index.ids,
        selection.offset if selects(activation) else cut.offsets,
        selection.shift,
        cut.visible,
        words,
    )
    sums = gathered.sums(law_of(activation), capacity, counted, *arrays)
    if isinstance(activation, Entmax):
        sums = *entmax.settle(activation.power, capacity, sums[:2], arrays), *sums[2:]
    overflow = bitset.size(words) > capacity
    overflow = jnp.broadcast_to(overflow[..., None], sums[1].shape)
    sums, overflow, selection, rounding, tail = jax.tree.map(
        lambda x: _join(x, batch), (sums, overflow, selection, rounding, tail)
    )
    weighted, total, count, candidates = sums
    weighted = weighted + values.poison[..., None, :][None]
    mass = total
    if tail is not None:
        weighted, mass = weighted + tail.weighted, total + tail.total
    out = normalize_rows(activation, weighted, mass, tiles.visible.count())
    missed = bound = jnp.zeros_like(total)
    if tail is not None:
        missed, bound = tail_module.error_bound(
            tail,
            total,
            values.bound[..., None][None],
            rounding,
            keys=index.keys.shape[-2],
        )
    elif isinstance(activation, Softmax):
        missed, bound = certificates.error_bound(
            selection, total, count, values.bound[..., None][None], rounding
        )
    info = Info(count, candidates, overflow, missed, bound)
    return out, jax.lax.stop_gradient(info)


def _in_parts(tiles: Tiles, parts: int) -> Tiles:
    """Tiles [M, *B, Q, ...] as [M, *B, J, R, ...]."""
    return jax.tree.map(lambda x: _cut(x, tiles.offsets.ndim - 1, parts), tiles)


def _cut(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """[..., Q, ...] to [..., J, R, ...] at an axis."""
    return x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])


def _join(x: jax.Array, axis: int) -> jax.Array:
    """Undoes `_cut`."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _choose(
    activation: Activation,
    index: Index,
    sketch: tail_module.ValueSketch | None,
    cut: Tiles,
    *,
    capacity: int,
) -> Sets:
    """The reported sets of one tile in parts, and for softmax what `select` finds."""
    batch, parts = cut.offsets.ndim - 2, cut.offsets.shape[-2]
    a, offsets, seen = jax.tree.map(lambda x: _join(x, batch), cut)
    zeros = jnp.zeros_like(cut.offsets)
    if not isinstance(activation, (Softmax, Entmax)):
        offsets = edge(law_of(activation), offsets)
        words = survivors(index, a, offsets, visible=seen, parts=parts)
        return Sets(words, certificates.Selection(*[zeros] * 4), zeros)
    query_sketch = bounds.sketch_query(index.sketch, a)
    products = bounds.code_products(index.sketch, query_sketch)
    lower, upper = bounds.intervals(query_sketch, products)
    slot = index.every_id[..., None, :]
    visible = seen.mask(slot) & bitset.unpack(index.alive)[..., None, :]
    sinks = seen.sinks(slot)
    lower = jnp.where(visible, lower, -jnp.inf)
    upper = jnp.where(visible, upper, -jnp.inf)
    if isinstance(activation, Entmax):
        low = entmax.safe_threshold(lower, activation.power)
        words = pack_parts(visible & ~(upper <= low[..., None]), parts)
        tau = entmax.find(
            activation.power,
            index,
            cut.queries,
            cut.visible,
            words,
            _cut(low, batch, parts),
            capacity=capacity,
        )
        return Sets(words, certificates.Selection(tau, *[zeros] * 3), zeros)
    offset = certificates.safe_offset(activation, lower, upper, sinks)
    kept = fires(upper, offset[..., None], law=None, sinks=sinks)
    if activation.tail is not None:
        kept |= ~tail_module.whole(visible, activation.tail)
    words = pack_parts(visible & kept, parts)
    scores = _best_scores(
        activation, index, cut.queries, cut.visible, words, capacity=capacity
    )
    peak, best = jax.tree.map(lambda x: _join(x, batch), scores)
    if activation.tail is None or sketch is None:
        tail = None
        selection = certificates.select(
            activation, peak, best, offset, lower, upper, sinks
        )
    else:
        looked_at = bitset.unpack(words)[..., None, :]
        left_out = _join(_cut(visible, batch, parts) & ~looked_at, batch)
        selection = certificates.everything(peak)
        tail = tail_module.sums(sketch, lower, upper, left_out, selection.shift)
    rounding = bounds.score_rounding(index.sketch, a)
    chosen = jax.tree.map(lambda x: _cut(x, batch, parts), (selection, rounding, tail))
    return Sets(words, *chosen)


def _best_scores(activation, index, a, seen, words, *, capacity):
    """The exact scores that `certificates.select` asks for, of the reported keys.

    A small r is picked out of each pass; for a large one all scores are kept, as
    counting them afterwards is cheaper than to sort in every pass.
    """
    r = 0 if activation.tail else activation.top_r or 0
    picked = 0 < 2 * r < capacity
    ranked = bitset.rank(words)

    def one_pass(i, best):
        peak, row = best
        slots = bitset.select(ranked, i * capacity + bitset.positions(capacity, 1))
        at = ids_of(index.ids, slots)[..., None, :]
        scores = bounds.dot(a, gather_rows(index.keys, slots))
        scores = jnp.where(seen.mask(at), scores, -jnp.inf)
        peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
        sinks = seen.sinks(at)
        others = scores if sinks is None else jnp.where(sinks, -jnp.inf, scores)
        if picked:
            row = jnp.concatenate([row, others], axis=-1)
            row = jax.lax.top_k(row, r + 1)[0]
        elif r:
            row = jax.lax.dynamic_update_slice_in_dim(row, others, i * capacity, -1)
        return peak, row

    slots = -(-index.keys.shape[-2] // capacity) * capacity
    size = r + 1 if picked else slots if r else 0
    lowest = jnp.full(a.shape[:-1], -jnp.inf, jnp.float32)
    row = jnp.full((*lowest.shape, size), -jnp.inf, jnp.float32)
    peak, row = jax.lax.fori_loop(0, trips(words, capacity), one_pass, (lowest, row))
    if picked:
        return peak, (row[..., -2], row[..., -1])
    return peak, search.at_ranks(row, r) if r else None
