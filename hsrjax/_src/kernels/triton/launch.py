"""How kernels are launched: sizes, sums over programs, gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hsrjax._src.core.tiles import Partial, Tiles
from hsrjax._src.index.index import Index
from hsrjax._src.kernels.triton.attend import Found, Operands, attend
from hsrjax._src.kernels.triton.backward import gradients, most_rows_of
from hsrjax._src.kernels.triton.combine import combine
from hsrjax._src.kernels.triton.left import Left
from hsrjax._src.kernels.triton.loads import padded
from hsrjax._src.kernels.triton.place import Sizes
from hsrjax._src.kernels.triton.rows import Bars

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
DENSE_SHARE = 0.4
"""Of keys that are reported, from which on dense costs less: an estimate."""
_LIST_BYTES = 2**28
_OFFSETS = 2**31
"""Numbers of an array of bytes that Triton counts in int32."""


class Options(NamedTuple):
    """Static; as in `Sizes`."""

    counted: bool
    interpret: bool
    most: float = 1.0
    weighed: bool = False
    kept: bool = False
    group: int = 0


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
    options = Options(counted, interpret, DENSE_SHARE if or_all else 1.0)
    return reported(options, tiles, index, values)[:2]


def reported(
    options: Options, tiles: Tiles, index: Index, values: jax.Array, means: Any = None
) -> tuple[jax.Array, Partial, Left | None]:
    """The same, and what the keys left out weigh where options ask for it.

    That is [M, *B, Q]; means are a `ValueSketch` where it is asked for a tail.
    """
    rest = jax.lax.stop_gradient((index, means))
    return _reported(options, tiles, index.keys, values, rest)


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
    return _all(Options(counted, interpret), tiles, keys, values, ids)


def flat(tiles, keys, values, ids, sketch, means=None) -> Operands:
    """With one axis X instead of the batch axes."""
    lead, factor = keys.shape[:-2], None
    queries, law, visible, short = tiles
    if short is not None and short.queries.dtype == keys.dtype:
        queries, factor = short
    by_set = lambda x: x.reshape(-1, *x.shape[len(lead) :])
    rows = jax.tree.map(
        functools.partial(flat_rows, lead=lead), (queries, law, visible)
    )
    by_key = jax.tree.map(by_set, (keys, values, ids, sketch, means))
    return Operands(*rows, *by_key, factor=factor)


def flat_rows(x, lead):
    return x.reshape(x.shape[0], -1, *x.shape[len(lead) + 1 :])


def _run(options, tiles, keys, values, ids, sketch, means=None) -> Found:
    _check_offsets(sketch)
    operands = flat(tiles, keys, values, ids, sketch, means)
    sizes = sizes_of(operands, options)
    groups = _groups(operands, sizes)
    names = "queries", "law", "visible", "factor"
    rows = {name: getattr(operands, name) for name in names}

    def one_group(rows):
        return combine(attend(operands._replace(**rows), sizes), sizes)

    if groups == 1:
        found = one_group(rows)
    else:
        by_group = lambda x: x.reshape(groups, -1, *x.shape[1:])
        found = jax.lax.map(one_group, jax.tree.map(by_group, rows))
        found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    lead = keys.shape[:-2]
    unflat = lambda x: x.reshape(x.shape[0], *lead, *x.shape[2:])
    return jax.tree.map(unflat, found)


def sizes_of(x: Operands, options: Options) -> Sizes:
    """Of a launch: enough programs for any card, and no more."""
    tiles, sets, queries, head_dim = x.queries.shape
    slots, value_dim = x.values.shape[1:]
    width = padded(max(head_dim, value_dim))
    # A float16 number is multiplied as a float32 one, see `products`.
    row = width * (2 if x.keys.dtype == jnp.bfloat16 else 4)
    most_rows = _MOST_ROWS if row <= _NARROW else _FEW_ROWS
    if options.kept:  # The backward pass holds more of a row, and has the same parts.
        most_rows = min(most_rows, most_rows_of(x))
    parts = -(-queries // most_rows)
    rows = -(-queries // parts)
    piece = _PIECE if not options.group else _PIECE // 2  # means of values, too
    pieces = -(-slots // piece)
    programs = max(1, min(_PROGRAMS // (tiles * sets * parts), -(-pieces // 2)))
    share = -(-pieces // programs) * piece
    wide = width > 128 or rows > 32 or rows * width >= 4096
    return Sizes(
        rows=rows,
        queries=queries,
        head_dim=head_dim,
        value_dim=value_dim,
        slots=slots,
        piece=piece,
        gathered=_GATHERED if row <= 2 * _NARROW else _FEW_ROWS,
        room=max(piece, share // _ROOM_SHARE),
        programs=programs,
        listed=x.sketch is not None,
        warps=8 if wide else 4,
        **options._asdict(),
    )


def _check_offsets(sketch):
    """Triton counts the numbers of arrays below 2^32 bytes in int32."""
    if sketch is not None and _OFFSETS < sketch.codes.size <= 2 * _OFFSETS:
        raise NotImplementedError(
            f"a sketch of {sketch.codes.size} bytes is between 2^31 and 2^32, where "
            "Triton's offsets overflow"
        )


def _groups(x: Operands, sizes: Sizes) -> int:
    """In how many groups of tiles the lists of all programs are made.

    They take memory, of which the planner knows nothing.
    """
    tiles, sets, *_ = x.queries.shape
    of_a_tile = 4 * sets * sizes.parts * sizes.programs * sizes.room
    if not sizes.listed or tiles * of_a_tile <= _LIST_BYTES:
        return 1
    if of_a_tile > _LIST_BYTES:
        raise NotImplementedError(f"the lists would take over {_LIST_BYTES} bytes")
    return next(
        groups
        for groups in range(2, tiles + 1)
        if tiles % groups == 0 and tiles * of_a_tile <= groups * _LIST_BYTES
    )


def _of_all(found: Found) -> tuple[jax.Array, Partial, Left | None]:
    return found.size, found.sums, found.left


# Gradients, over the sets that the forward pass leaves.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reported(options, tiles, keys, values, rest):
    index, means = rest
    return _of_all(_run(options, tiles, keys, values, index.ids, index.sketch, means))


def _reported_forward(options, tiles, keys, values, rest):
    options, (index, means) = options._replace(kept=True), rest
    found = _run(options, tiles, keys, values, index.ids, index.sketch, means)
    result = _of_all(found)
    arrays = tiles, keys, values, index.ids
    return result, (arrays, found.words, result[1].peak)


def _reported_backward(options, residuals, cotangents):
    return _gradients(options, residuals, cotangents[1])


_reported.defvjp(_reported_forward, _reported_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all(options, tiles, keys, values, ids):
    return _of_all(_run(options, tiles, keys, values, ids, None))[1]


def _all_forward(options, *arrays):
    sums: Any = _all(options, *arrays)
    return sums, (arrays, None, sums.peak)


def _all_backward(options, residuals, cotangents):
    return _gradients(options, residuals, cotangents)


_all.defvjp(_all_forward, _all_backward)


def _gradients(options, residuals, cotangents):
    (tiles, keys, values, ids), words, peak = residuals
    operands = flat(tiles, keys, values, ids, None)
    sizes = sizes_of(operands, options._replace(kept=True))
    bars = Bars(cotangents.weighted, cotangents.total, peak)
    by_set = functools.partial(flat_rows, lead=keys.shape[:-2])
    bars, words = jax.tree.map(by_set, (bars, words))
    queries, law, by_key = gradients(operands, bars, words, sizes)
    like = lambda x, shaped_as: x.reshape(shaped_as.shape).astype(shaped_as.dtype)
    tiles_bar: Any = like(queries, tiles.queries), None, None
    law_bar = jax.tree.map(like, law, tiles.activation)
    return (
        Tiles(*tiles_bar)._replace(activation=law_bar),
        like(by_key.keys, keys),
        like(by_key.values, values),
        None,
    )
