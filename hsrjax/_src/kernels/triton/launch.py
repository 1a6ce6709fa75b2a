"""How kernels are launched: sizes, sums over programs, gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from hsrjax._src.core.tiles import Partial, Tiles
from hsrjax._src.index.index import Index
from hsrjax._src.kernels.triton.append import append as append
from hsrjax._src.kernels.triton.attend import Found, Operands, Sizes, attend
from hsrjax._src.kernels.triton.loads import padded
from hsrjax._src.kernels.xla.chunks import Chunks
from hsrjax._src.kernels.xla.runs import Runs
from hsrjax._src.kernels.xla.scan import scan
from hsrjax._src.kernels.xla.sums import sum_tiles

_PROGRAMS = 1024
"""Of a launch, at least: several for each unit of the largest cards."""
_PIECE = 128
_GATHERED = 32
_MOST_ROWS = 64
_FEW_ROWS = 16
_NARROW = 256
"""Bytes of a row of keys from which on few rows and keys fit into registers and shared
memory, of the smaller cards too."""
_ROOM_SHARE = 2
"""A list has room for one key in this many."""
_DENSE_SHARE = 0.4
"""Of keys that are reported, from which on dense costs less: an estimate."""
_RUN = 64
_CHUNK = 1024
_LIST_BYTES = 2**30
_OFFSETS = 2**31
"""Numbers of an array of bytes that Triton counts in int32."""


def scan_and_sum(
    index: Index,
    tiles: Tiles,
    values: jax.Array,
    *,
    counted: bool,
    or_all: bool,
    interpret: bool,
) -> tuple[jax.Array, Partial]:
    """As `Implementation.scan_and_sum`."""
    options = counted, _DENSE_SHARE if or_all else 1.0, interpret
    return _reported(options, tiles, index.keys, values, jax.lax.stop_gradient(index))


def sum_all(
    tiles: Tiles,
    keys: jax.Array,
    values: jax.Array,
    ids: jax.Array | None,
    *,
    counted: bool,
    interpret: bool,
) -> Partial:
    """As `Implementation.sum_all`, without certificates."""
    return _all((counted, 1.0, interpret), tiles, keys, values, ids)


def _run(options, tiles, keys, values, ids, sketch) -> Found:
    counted, most, interpret = options
    _check_offsets(sketch)
    lead = keys.shape[:-2]
    flat = lambda x: x.reshape(-1, *x.shape[len(lead) :])
    by_tile = lambda x: x.reshape(x.shape[0], -1, *x.shape[len(lead) + 1 :])
    queries, law, visible = jax.tree.map(by_tile, tuple(tiles))
    operands = Operands(
        queries, law, visible, *jax.tree.map(flat, (keys, values, ids, sketch))
    )
    sizes = _sizes(operands, counted=counted, most=most, interpret=interpret)
    _check_lists(operands, sizes)
    found = attend(operands, sizes)
    unflat = lambda x: x.reshape(x.shape[0], *lead, *x.shape[2:])
    return jax.tree.map(unflat, found)


def _sizes(x: Operands, *, counted: bool, most: float, interpret: bool) -> Sizes:
    """Of a launch: enough programs for any card, and no more."""
    tiles, sets, queries, head_dim = x.queries.shape
    slots, value_dim = x.values.shape[1:]
    width = padded(max(head_dim, value_dim))
    # A float16 number is multiplied as a float32 one, see `products`.
    row = width * (2 if x.keys.dtype == jnp.bfloat16 else 4)
    parts = -(-queries // (_MOST_ROWS if row <= _NARROW else _FEW_ROWS))
    rows = -(-queries // parts)
    pieces = -(-slots // _PIECE)
    programs = max(1, min(_PROGRAMS // (tiles * sets * parts), -(-pieces // 2)))
    share = -(-pieces // programs) * _PIECE
    wide = width > 128 or rows > 32 or rows * width >= 4096
    return Sizes(
        rows=rows,
        queries=queries,
        head_dim=head_dim,
        value_dim=value_dim,
        slots=slots,
        piece=_PIECE,
        gathered=_GATHERED if row <= 2 * _NARROW else _FEW_ROWS,
        room=max(_PIECE, share // _ROOM_SHARE),
        programs=programs,
        listed=x.sketch is not None,
        most=most,
        counted=counted,
        interpret=interpret,
        warps=8 if wide else 4,
    )


def _check_offsets(sketch):
    """Triton counts the numbers of arrays below 2^32 bytes in int32."""
    if sketch is not None and _OFFSETS < sketch.codes.size <= 2 * _OFFSETS:
        raise NotImplementedError(
            f"a sketch of {sketch.codes.size} bytes is between 2^31 and 2^32, where "
            "Triton's offsets overflow"
        )


def _check_lists(x: Operands, sizes: Sizes) -> None:
    """The lists of all programs take memory, of which the planner knows nothing."""
    tiles, sets, queries, _ = x.queries.shape
    lists = tiles * sets * -(-queries // sizes.rows) * sizes.programs
    if sizes.listed and 4 * lists * sizes.room > _LIST_BYTES:
        raise NotImplementedError(f"the lists would take over {_LIST_BYTES} bytes")


def _of_all(found: Found) -> tuple[jax.Array, Partial]:
    """Sizes i32[M, *B, J] and Partial [M, *B, Q] of what the programs found."""
    axis = found.size.ndim - 2
    return jnp.sum(found.size, axis=axis), found.sums.merge_axis(axis)


# Gradients: what weighs something is looked for again, by XLA.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reported(options, tiles, keys, values, index):
    return _of_all(_run(options, tiles, keys, values, index.ids, index.sketch))


def _reported_forward(options, *arrays):
    return _reported(options, *arrays), arrays


def _reported_backward(options, arrays, cotangents):
    tiles, keys, values, index = arrays
    look = lambda tile: scan(
        index, tile.queries, tile.edges(), visible=tile.visible, parts=1
    )
    words = jax.lax.map(look, tiles)
    again = lambda *x: sum_tiles(Runs(_RUN), False, *x, index.ids, words)
    return *jax.vjp(again, tiles, keys, values)[1](cotangents[1]), None


_reported.defvjp(_reported_forward, _reported_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all(options, tiles, keys, values, ids):
    return _of_all(_run(options, tiles, keys, values, ids, None))[1]


def _all_forward(options, *arrays):
    return _all(options, *arrays), arrays


def _all_backward(options, arrays, cotangents):
    *arrays, ids = arrays
    chunk = Chunks(min(_CHUNK, arrays[1].shape[-2]))
    again = lambda *x: sum_tiles(chunk, False, *x, ids, None)
    return *jax.vjp(again, *arrays)[1](cotangents), None


_all.defvjp(_all_forward, _all_backward)
