"""A cache grows by a few tokens, in one kernel and in place.

A program has a row of keys. It writes the new keys and values behind those that it
holds, and makes the sketch of the one or two blocks which they fall into again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hsrjax._src.core.bitset import WORD
from hsrjax._src.core.tiles import Values
from hsrjax._src.index.index import Index
from hsrjax._src.kernels.triton import sketched
from hsrjax._src.kernels.triton.loads import padded, rows_of, shaped


class Grown(NamedTuple):
    """What grows, [X] rows of keys; all of it is changed in place.

    Attributes:
      keys: f[X, P, H].
      values: f[X, P, D].
      codes: i8[X, P, H].
      facts: scale, spread and radius, f32[X, P/32] each.
      alive: u32[X, P/32].
      size: i32[X].
      dropped: i32[X].
      bound: f32[X], of the values.
      poison: f32[X, D].
    """

    keys: Any
    values: Any
    codes: Any
    facts: tuple[Any, Any, Any]
    alive: Any
    size: Any
    dropped: Any
    bound: Any
    poison: Any


def append(
    index: Index,
    values: Values,
    keys: jax.Array,
    rows: jax.Array,
    lengths: jax.Array,
    *,
    interpret: bool,
) -> tuple[Index, Values]:
    """As `Implementation.grow`, of fewer than 32 tokens and without cells or tail."""
    lead = index.size.shape
    flat = lambda x: x.reshape(-1, *x.shape[len(lead) :])
    sketch = index.sketch
    grown = Grown(
        keys=index.keys,
        values=values.rows,
        codes=sketch.codes,
        facts=(sketch.scale, sketch.spread, sketch.radius),
        alive=index.alive,
        size=index.size,
        dropped=index.dropped,
        bound=values.bound,
        poison=values.poison,
    )
    grown = jax.tree.map(flat, grown)
    lengths = jnp.broadcast_to(lengths, lead)
    new = jax.tree.map(flat, (keys, rows, lengths, sketch.centre))
    leaves = len(jax.tree.leaves(grown))
    warps = 4 if max(keys.shape[-1], rows.shape[-1]) <= 128 else 8
    (grown,) = pl.pallas_call(
        functools.partial(_kernel, max_keys=index.max_keys),
        grid=(grown.size.shape[0],),
        out_shape=[jax.tree.map(lambda x: shaped(x.shape, x.dtype, x), grown)],
        input_output_aliases={i: i for i in range(leaves)},
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        name="hsrjax_append",
    )(grown, *new)
    grown = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), grown)
    scale, spread, radius = grown.facts
    sketch = dataclasses.replace(
        sketch, codes=grown.codes, scale=scale, spread=spread, radius=radius
    )
    index = dataclasses.replace(
        index,
        keys=grown.keys,
        sketch=sketch,
        alive=grown.alive,
        size=grown.size,
        dropped=grown.dropped,
    )
    values = values._replace(rows=grown.values, bound=grown.bound, poison=grown.poison)
    return index, values


def _kernel(old, new_keys, new_values, lengths, centre, out, *, max_keys):
    row = pl.program_id(0)
    count, h = new_keys.shape[1:]
    width = new_values.shape[-1]
    held = triton.load(old.size.at[row])
    asked = triton.load(lengths.at[row])
    fits = jnp.minimum(asked, max_keys - held)
    centre = rows_of(centre, (row,), h)
    lane = jnp.arange(WORD, dtype=jnp.int32)
    bound = triton.load(old.bound.at[row])
    poison = rows_of(old.poison, (row,), width)
    blocks = old.alive.shape[-1]
    # A token more than fit into one block may begin in its last slot.
    touched = min(1 if count == 1 else 2, blocks)
    first = jnp.minimum(held // WORD, blocks - touched)
    for block in [first + i for i in range(touched)]:
        slot = block * WORD + lane
        fresh = (slot >= held) & (slot < held + fits)
        at = jnp.where(fresh, slot - held, 0)[:, None]
        keys = rows_of(old.keys, (row, slot[:, None]), h, slot < held)
        keys = jnp.where(fresh[:, None], rows_of(new_keys, (row, at), h, fresh), keys)
        values = rows_of(new_values, (row, at), width, fresh)
        _store(out.keys, row, slot, keys, fresh, h)
        _store(out.values, row, slot, values, fresh, width)
        values = values.astype(jnp.float32)
        bound = sketched.largest(bound, _most(sketched.reach(values)))
        bad = jnp.max((~jnp.isfinite(values)).astype(jnp.int32), axis=0)
        poison = jnp.where(bad > 0, jnp.nan, poison)
        bits = jnp.sum(jnp.where(fresh, jnp.int32(1) << lane, 0))
        bits = triton.load(old.alive.at[row, block]) | _unsigned(bits)
        triton.store(out.alive.at[row, block], bits)
        valid = (_signed(bits) >> lane) & 1 > 0
        codes, *facts = sketched.sketch(keys, valid, centre, h)
        _store(out.codes, row, slot, codes, slot >= 0, h)
        for ref, fact in zip(out.facts, facts, strict=True):
            triton.store(ref.at[row, block], fact)
    triton.store(out.bound.at[row], bound)
    number = jnp.arange(padded(width), dtype=jnp.int32)
    triton.store(out.poison.at[row, number], poison, mask=number < width)
    triton.store(out.size.at[row], held + fits)
    dropped = triton.load(old.dropped.at[row])
    triton.store(out.dropped.at[row], dropped + (asked - fits))


def _store(ref, row, slots, x, there, width):
    """Writes rows [C, D'] of `width` numbers to slots i32[C] that are there."""
    number = jnp.arange(x.shape[-1], dtype=jnp.int32)[None, :]
    mask = there[:, None] & (number < width)
    triton.store(ref.at[row, slots[:, None], number], x, mask=mask)


def _unsigned(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.uint32)


def _signed(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.int32)


def _most(x):
    """The largest of f32[C], or NaN."""
    broken = jnp.max(jnp.isnan(x).astype(jnp.int32)) > 0
    return jnp.where(broken, jnp.nan, jnp.max(x))
