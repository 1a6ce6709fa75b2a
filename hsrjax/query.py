"""Half-space reporting: which stored keys k have <a, k> >= b (the paper's Query).

The certified cascade: balls around cells (where keys are in spatial order and that
prunes) -> int8 sketch with integer thresholds -> the survivors, compacted into a fixed
number of slots -> their exact float32 scores -> members. Every stage only ever
over-reports, so none is missed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hsrjax import bitset, bounds, checks
from hsrjax.bitset import WORD
from hsrjax.index import Index, ids_of
from hsrjax.rows import put_rows, take_rows, take_windows
from hsrjax.visible import Visible

_CELL_SHARE = 4
"""Cells are read apart when at most one in this many is left; else all, in one go."""

_PASS_BYTES = 2**19
"""Of the sketch, read from cells in one pass: stays in cache."""

_MANY_QUERIES = 16
"""Tiles of at least as many queries go over the sketch in chunks that stay in cache.

Fewer make fewer products than there are codes, which would be copied chunk by chunk.
"""

_CHUNK_PRODUCTS = 2**20
_LEAST_CHUNK = 256


class Report(NamedTuple):
    """What `query` returns.

    Attributes:
      indices: i32[*B, T, C], ids of the members, ascending, padded with max_keys (one
        past the end: gather with mode="fill").
      scores: f32[*B, T, C], <normal, key>, padded with -inf. Differentiable in the
        normals and the keys.
      count: i32[*B, T], true number of members, also above C.
      overflow: bool[*B, T], count > C: indices hold the first C members.
    """

    indices: jax.Array
    scores: jax.Array
    count: jax.Array
    overflow: jax.Array


def query(
    index: Index, normals: jax.Array, offsets: jax.Array, *, capacity: int
) -> Report:
    """Reports every key in the half-spaces {k : <normal, k> >= offset}.

    Membership is the float32 inner product at highest precision, ties included.

    Args:
      index: from `build`, `insert`, `delete`; batch axes *B.
      normals: f[*B, T, H].
      offsets: f32[*B, T] or anything that broadcasts to it. +inf reports nothing,
        -inf every key whose score is not NaN.
      capacity: C >= 1, slots for members of each query; static.

    Returns:
      Report. Cost: S H bytes read for the sketch, then O(C' H) for the C' survivors,
      a little more than the members; more survivors than slots cost further passes.

    Raises:
      ValueError: shapes do not fit, capacity < 1.
      TypeError: unsupported dtype.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> index = hsrjax.build(jnp.eye(4))
      >>> report = hsrjax.query(index, jnp.ones((1, 4)), 1.0, capacity=3)
      >>> report.indices, int(report.count[0]), bool(report.overflow[0])
      (Array([[0, 1, 2]], dtype=int32), 4, True)

    Source: Chen et al. 2024, Algorithm 3 (Query) and Corollary 3.1.
    """
    checks.check_positive("capacity", capacity)
    normals, offsets = _check(index, normals, offsets)
    return _report(index, normals, offsets, capacity=capacity)


def count(index: Index, normals: jax.Array, offsets: jax.Array) -> jax.Array:
    """Number of keys in each half-space {k : <normal, k> >= offset}.

    Args:
      index: from `build`, `insert`, `delete`; batch axes *B.
      normals: f[*B, T, H].
      offsets: f32[*B, T] or anything that broadcasts to it.

    Returns:
      i32[*B, T], exact. Cost as `query`; only survivors are scored in float32.

    Raises:
      ValueError, TypeError: as `query`.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> hsrjax.count(hsrjax.build(jnp.eye(4)), jnp.ones((1, 4)), 1.0)
      Array([4], dtype=int32)

    Source: Chen et al. 2024, Algorithm 3 (Query).
    """
    normals, offsets = _check(index, normals, offsets)
    return _count(*jax.lax.stop_gradient((index, normals, offsets)))


# Jitted, as is every entry to this package that runs more than a few operations: called
# outside jit they would otherwise be compiled operation by operation, for seconds.
@functools.partial(jax.jit, static_argnames="capacity")
def _report(index, normals, offsets, *, capacity):
    frozen, a, b = jax.lax.stop_gradient((index, normals, offsets))
    words = survivors(frozen, a, b)
    slots, count = _members(frozen, a, b, words, capacity=capacity)
    ids = ids_of(index.ids, slots)
    found = ids < index.keys.shape[-2]
    ids = jnp.where(found, ids, index.max_keys)
    scores = jnp.where(found, _score_slots(index, normals, slots), -jnp.inf)
    return Report(ids, scores, count, count > capacity)


@jax.jit
def _count(index, normals, offsets):
    words = survivors(index, normals, offsets)
    return _members(index, normals, offsets, words, capacity=1)[1]


def survivors(
    index: Index,
    normals: jax.Array,
    offsets: jax.Array,
    *,
    visible: Visible | None = None,
    parts: int | None = None,
) -> jax.Array:
    """The certified superset of the members, before any exact score.

    Args:
      index: batch axes *B.
      normals: f[*B, Q, H].
      offsets: f32[*B, Q].
      visible: i32[*B, Q]: sets end where no query of theirs sees anything; within, the
        exact stage has to look. None admits every slot in use.
      parts: J, static: cut the Q queries into so many runs of equal length and give
        one set for each, the union of its queries; None is one set for each query.

    Returns:
      Bit sets u32[*B, J, P/32], J = Q without parts.
    """
    parts = normals.shape[-2] if parts is None else parts
    alive = index.alive[..., None, :]
    if index.balls is None:
        if visible is not None:
            alive = alive & visible.cover(parts, alive.shape[-1])
        return _sketch_survivors(index, normals, offsets, visible, parts) & alive
    ranges = None
    if visible is not None:
        offsets = jnp.where(visible.count() > 0, offsets, jnp.inf)
        # Without a window all but a few of the keys are seen: the exact stage can tell.
        ranges = visible.hull(parts) if visible.low is not None else None
    cells = _reached_cells(index, normals, offsets, parts)

    def everywhere():
        words = _sketch_survivors(index, normals, offsets, None, parts)
        if ranges is None:
            return words
        return words & bitset.pack(ranges.mask(index.every_id[..., None, :]))

    # One predicate for the whole batch: under vmap both sides would run for each row.
    number = index.keys.shape[-2] // index.balls.size
    words = jax.lax.cond(
        jnp.max(bitset.size(cells)) * _CELL_SHARE <= number,
        lambda: _cell_survivors(index, normals, offsets, ranges, cells),
        everywhere,
    )
    return words & alive


def _reached_cells(index, normals, offsets, parts):
    """Sets of the cells that the half-spaces of each part reach, u32[*B, J, .]."""
    reached = ~(bounds.ball_upper(index.balls, normals) < offsets[..., None])
    blocks = index.balls.size // WORD
    used = jnp.any(index.alive.reshape(*index.size.shape, -1, blocks) != 0, axis=-1)
    padding = [(0, 0)] * (used.ndim - 1) + [(0, reached.shape[-1] - used.shape[-1])]
    used = bitset.pack(jnp.pad(used, padding))
    return pack_parts(reached, parts) & used[..., None, :]


def _cell_survivors(index, normals, offsets, ranges, cells):
    """What the sketch cannot rule out in the cells u32[*B, J, .], read cell by cell.

    Each cell of a pass is a batch axis, C, of its own: what was next to each other in
    the sketch stays so, and is copied and multiplied as it is.
    """
    sketch, (*lead, parts, _) = index.sketch, cells.shape
    rows, h = normals.shape[-2] // parts, normals.shape[-1]
    size = index.balls.size
    number = index.keys.shape[-2] // size
    a_pass = _PASS_BYTES // (math.prod(lead) * parts * size * h)
    a_pass = min(max(a_pass, 1), number)
    normals = normals.reshape(*lead, parts, 1, rows, h)
    offsets = offsets.reshape(*lead, parts, 1, rows)
    centre = jnp.broadcast_to(sketch.centre[..., None, None, :], (*lead, parts, 1, h))
    ranked = bitset.rank(cells)

    def one_pass(i, words):
        chosen = bitset.select(ranked, i * a_pass + bitset.positions(a_pass, 1))

        def take(x):
            flat = x.reshape(*lead, -1, x.shape[-1])
            return take_windows(flat, chosen, x.shape[-1] // number)

        part = bounds.Sketch(
            codes=take(sketch.codes),
            scale=take(sketch.scale)[..., 0, :],
            spread=take(sketch.spread)[..., 0, :],
            radius=take(sketch.radius)[..., 0, :],
            centre=centre,
        )
        tile = bounds.sketch_query(part, normals)
        codes = jnp.broadcast_to(tile.codes, (*chosen.shape, rows, h))
        products = bounds.code_products(part, tile._replace(codes=codes))
        # Not to be worked out again for each key of a block.
        lowest = jax.lax.optimization_barrier(bounds.thresholds(tile, offsets))
        passing = jnp.any(_passing(products, lowest), axis=-2)
        if ranges is not None:
            at = take(index.every_id).reshape(*lead, parts, -1)
            passing &= ranges.mask(at).reshape(passing.shape)
        return put_rows(words, chosen, bitset.pack(passing))

    words = jnp.zeros((*lead, parts, number, size // WORD), jnp.uint32)
    words = jax.lax.fori_loop(0, trips(cells, a_pass), one_pass, words)
    return words.reshape(*lead, parts, -1)


def _sketch_survivors(index, normals, offsets, visible, parts):
    many = normals.shape[-2] >= _MANY_QUERIES
    if many and index.keys.shape[-2] * offsets.size > _CHUNK_PRODUCTS:
        return _tile_survivors(index.sketch, normals, offsets, visible, parts)
    query_sketch = bounds.sketch_query(index.sketch, normals)
    products = bounds.code_products(index.sketch, query_sketch)
    passing = _passing(products, bounds.thresholds(query_sketch, offsets))
    return pack_parts(passing, parts)


def _tile_survivors(sketch, normals, offsets, visible, parts):
    """Sets of many queries, over chunks of keys whose products stay in cache.

    Chunks that no query of the tile sees are not looked at, and no products of size
    Q S are ever in memory. The thresholds are made before the loop: inside it XLA would
    work out a block's threshold again for each of its keys.
    """
    lead, rows, size = normals.shape[:-2], normals.shape[-2], sketch.codes.shape[-1]
    chunk = _CHUNK_PRODUCTS // (math.prod(lead) * rows) // WORD * WORD
    chunk = min(max(chunk, _LEAST_CHUNK), size)
    query_sketch = bounds.sketch_query(sketch, normals)
    lowest = bounds.thresholds(query_sketch, offsets)
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=-1)

    def one_chunk(i, words):
        # The last chunk is moved back to end with the keys: some are looked at twice.
        start = jnp.minimum(i * chunk, size - chunk)
        block = start // WORD
        part = dataclasses.replace(sketch, codes=cut(sketch.codes, start, chunk))
        products = bounds.code_products(part, query_sketch)
        passing = _passing(products, cut(lowest, block, chunk // WORD))
        packed = pack_parts(passing, parts)
        return jax.lax.dynamic_update_slice_in_dim(words, packed, block, axis=-1)

    words = jnp.zeros((*lead, parts, size // WORD), jnp.uint32)
    every = (jnp.zeros((), jnp.int32), jnp.asarray(size, jnp.int32))
    for low, high in [every] if visible is None else visible.spans():
        last = (high + (chunk - 1)) // chunk
        words = jax.lax.fori_loop(low // chunk, last, one_chunk, words)
    return words


def _passing(products: jax.Array, lowest: jax.Array) -> jax.Array:
    """Keys that the sketch cannot rule out, bool[*B, Q, S]."""
    blocks = products.reshape(*lowest.shape, WORD)
    return (blocks >= lowest[..., None]).reshape(products.shape)


def pack_parts(passing: jax.Array, parts: int) -> jax.Array:
    """Unions over `parts` runs of the queries of bool[*B, Q, P], as words."""
    *lead, rows, size = passing.shape
    part = rows // parts

    def union(passing):
        return bitset.pack(jnp.any(passing.reshape(*lead, parts, part, size), axis=-2))

    def apart(passing):
        # Kept apart from the packing: fused, XLA's CPU backend does both bit by bit.
        window = (*[1] * len(lead), part, 1)
        either = jax.lax.bitwise_or
        bits, zero = passing.astype(jnp.uint8), np.uint8(0)
        bits = jax.lax.reduce_window(bits, zero, either, window, window, "VALID")
        return bitset.pack_bytes(bits)

    if part < _MANY_QUERIES:
        return union(passing)
    return jax.lax.platform_dependent(passing, cpu=apart, default=union)


def trips(words: jax.Array, capacity: int) -> jax.Array:
    """Passes of `capacity` slots that the fullest set of the batch needs."""
    fullest = jnp.max(bitset.size(words))
    return (fullest + (capacity - 1)) // capacity


def _members(index, normals, offsets, words, *, capacity):
    """First `capacity` members (slots ordered by id) and the true count.

    Survivors are scored in as many passes of fixed size as there are survivors, so
    the count is exact and no member is lost however many survive.
    """
    slots_a_pass = max(WORD, -(-5 * capacity // 4))
    past = index.keys.shape[-2]
    lead = words.shape[:-1]
    ranked = bitset.rank(words)

    def one_pass(i, carry):
        ids, slots, total = carry
        ranks = i * slots_a_pass + bitset.positions(slots_a_pass, 1)
        chunk = bitset.select(ranked, ranks)
        scores = _score_slots(index, normals, chunk)
        member = (chunk < past) & (scores >= offsets[..., None])
        chunk_ids = ids_of(index.ids, chunk)
        ids = jnp.concatenate([ids, jnp.where(member, chunk_ids, past)], axis=-1)
        slots = jnp.concatenate([slots, jnp.where(member, chunk, past)], axis=-1)
        ids, slots = jax.lax.sort((ids, slots), num_keys=1)
        total = total + jnp.sum(member, axis=-1, dtype=jnp.int32)
        return ids[..., :capacity], slots[..., :capacity], total

    nothing = jnp.full((*lead, capacity), past, jnp.int32)
    start = (nothing, nothing, jnp.zeros(lead, jnp.int32))
    _, slots, total = jax.lax.fori_loop(0, trips(words, slots_a_pass), one_pass, start)
    return slots, total


def _score_slots(index: Index, normals: jax.Array, slots: jax.Array) -> jax.Array:
    """Exact scores f32[*B, T, C] of each query's own slots i32[*B, T, C]."""
    flat = slots.reshape(*slots.shape[:-2], -1)
    keys = take_rows(index.keys, flat).reshape(*slots.shape, -1)
    return bounds.dot(normals[..., None, :], keys)[..., 0, :]


def _check(index, normals, offsets) -> tuple[jax.Array, jax.Array]:
    """Static checks; the arrays, offsets broadcast to one per query."""
    if not isinstance(index, Index):
        raise TypeError(
            f"index must come from hsrjax.build, got {type(index).__name__}."
        )
    normals = jnp.asarray(normals)
    checks.check_float("normals", normals)
    checks.check_rank("normals", normals, "[*B, T, H]")
    checks.check_nonempty("normals", normals)
    lead = index.size.shape
    checks.check_equal(
        "normals.shape[:-2]", normals.shape[:-2], lead, "the index's batch axes"
    )
    checks.check_equal(
        "normals.shape[-1]", normals.shape[-1], index.keys.shape[-1], "the keys' size"
    )
    offsets = jnp.asarray(offsets, jnp.float32)
    try:
        return normals, jnp.broadcast_to(offsets, normals.shape[:-1])
    except ValueError:
        raise ValueError(
            f"offsets must broadcast to {normals.shape[:-1]} (one per query), got "
            f"shape {offsets.shape}."
        ) from None
