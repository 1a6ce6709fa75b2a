"""The scan: which keys the bounds cannot rule out of a half-space.

Balls around cells first, where keys are in spatial order and that prunes, then the int8
sketch with integer thresholds, of all keys or of the cells that are left.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from hsrjax._src.core import bitset, meshes
from hsrjax._src.core.arrays import positions, put_rows, take_windows
from hsrjax._src.core.batching import together
from hsrjax._src.core.bitset import WORD
from hsrjax._src.core.visible import Visible
from hsrjax._src.index.index import Index

_CELL_SHARE = 4
"""Cells are read apart when at most one in this many is left; else all, in one go."""

_PASS_BYTES = 2**19
"""Of the sketch, read from cells in one pass: stays in cache."""

MANY_QUERIES = 16
"""Tiles of at least as many queries go over the sketch in chunks that stay in cache.

Fewer make fewer products than there are codes, which would be copied chunk by chunk.
"""

_CHUNK_PRODUCTS = 2**20
_LEAST_CHUNK = 256


def scan(
    index: Index,
    queries: jax.Array,
    offsets: jax.Array,
    *,
    visible: Visible | None = None,
    parts: int | None = None,
) -> jax.Array:
    """As `Implementation.scan`."""
    parts = queries.shape[-2] if parts is None else parts
    alive = index.alive[..., None, :]
    if index.cells is None:
        if visible is not None:
            alive = alive & visible.cover(parts, alive.shape[-1])
        return _scan_sketch(index, queries, offsets, visible, parts) & alive
    ranges = None
    # Without a window all but a few of the keys are seen: the exact stage can tell.
    if visible is not None and visible.low is not None:
        ranges = visible.hull(parts)
    cells = _reached_cells(index, queries, offsets, parts)

    def everywhere():
        words = _scan_sketch(index, queries, offsets, None, parts)
        if ranges is None:
            return words
        return words & bitset.pack(ranges.mask(index.every_id[..., None, :]))

    number = index.keys.shape[-2] // index.cells.size
    many = jnp.max(bitset.size(cells)) * _CELL_SHARE - number
    words = jax.lax.cond(
        together(many.astype(jnp.float32)) <= 0,
        lambda: _scan_cells(index, queries, offsets, ranges, cells),
        everywhere,
    )
    return words & alive


def _reached_cells(index, queries, offsets, parts):
    """Sets of the cells that the half-spaces of each part reach, u32[*B, J, .]."""
    reached = ~(index.cells.upper(queries) < offsets[..., None])
    blocks = index.cells.size // WORD
    used = jnp.any(index.alive.reshape(*index.size.shape, -1, blocks) != 0, axis=-1)
    padding = [(0, 0)] * (used.ndim - 1) + [(0, reached.shape[-1] - used.shape[-1])]
    used = bitset.pack(jnp.pad(used, padding))
    return bitset.pack_unions(reached, parts) & used[..., None, :]


def _scan_cells(index, queries, offsets, ranges, cells):
    """What the sketch cannot rule out in the cells u32[*B, J, .], read cell by cell.

    Each cell of a pass is a batch axis, C, of its own: what was next to each other in
    the sketch stays so, and is copied and multiplied as it is.
    """
    *lead, parts, _ = cells.shape
    rows, h = queries.shape[-2] // parts, queries.shape[-1]
    size = index.cells.size
    number = index.keys.shape[-2] // size
    a_pass = _PASS_BYTES // (math.prod(lead) * parts * size * h)
    a_pass = min(max(a_pass, 1), number)
    queries = queries.reshape(*lead, parts, 1, rows, h)
    offsets = offsets.reshape(*lead, parts, 1, rows)
    ranked = bitset.rank(cells)

    def one_pass(i, words):
        chosen = bitset.select(ranked, i * a_pass + positions(a_pass, 1))
        sketch = index.sketch.cells(chosen, number)
        coded = sketch.code(queries)
        codes = jnp.broadcast_to(coded.codes, (*chosen.shape, rows, h))
        # Not to be worked out again for each key of a block.
        lowest = jax.lax.optimization_barrier(coded.thresholds(offsets))
        passing = jnp.any(sketch.reach(codes, lowest), axis=-2)
        if ranges is not None:
            every = index.every_id[..., None, :]
            at = take_windows(every, chosen, size).reshape(*lead, parts, -1)
            passing &= ranges.mask(at).reshape(passing.shape)
        return put_rows(words, chosen, bitset.pack(passing))

    words = jnp.zeros((*lead, parts, number, size // WORD), jnp.uint32)
    words = meshes.varying(words, cells, queries, offsets, index.sketch)
    words = jax.lax.fori_loop(0, bitset.passes(cells, a_pass), one_pass, words)
    return words.reshape(*lead, parts, -1)


def _scan_sketch(index, queries, offsets, visible, parts):
    many = queries.shape[-2] >= MANY_QUERIES
    if many and index.keys.shape[-2] * offsets.size > _CHUNK_PRODUCTS:
        return _scan_in_chunks(index.sketch, queries, offsets, visible, parts)
    return bitset.pack_unions(index.sketch.passing(queries, offsets), parts)


def _scan_in_chunks(sketch, queries, offsets, visible, parts):
    """Sets of many queries, over chunks of keys whose products stay in cache.

    Chunks that no query of the tile sees are not looked at, and no products of size
    Q S are ever in memory. The thresholds are made before the loop: inside it XLA would
    work out a block's threshold again for each of its keys.
    """
    lead, rows, size = queries.shape[:-2], queries.shape[-2], sketch.codes.shape[-2]
    chunk = _CHUNK_PRODUCTS // (math.prod(lead) * rows) // WORD * WORD
    chunk = min(max(chunk, _LEAST_CHUNK), size)
    coded = sketch.code(queries)
    lowest = coded.thresholds(offsets)

    def one_chunk(i, words):
        # The last chunk is moved back to end with the keys: some are looked at twice.
        start = jnp.minimum(i * chunk, size - chunk)
        block = start // WORD
        here = jax.lax.dynamic_slice_in_dim(lowest, block, chunk // WORD, axis=-1)
        passing = sketch.chunk(start, chunk).reach(coded.codes, here)
        packed = bitset.pack_unions(passing, parts)
        return jax.lax.dynamic_update_slice_in_dim(words, packed, block, axis=-1)

    words = jnp.zeros((*lead, parts, size // WORD), jnp.uint32)
    words = meshes.varying(words, queries, offsets, sketch)
    every = (jnp.zeros((), jnp.int32), jnp.asarray(size, jnp.int32))
    for low, high in [every] if visible is None else visible.spans():
        last = (high + (chunk - 1)) // chunk
        words = jax.lax.fori_loop(low // chunk, last, one_chunk, words)
    return words
