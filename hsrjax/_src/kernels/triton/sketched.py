r"""The sketch inside a kernel: bounds of `index/sketch.py`, and what is rounded here.

The codes, scale and errors of a query, and the slack of a block, are those of the proof
there. A kernel differs in these points, u = 2^-24:

1.  A sum or product may be fused with the next, or flushed: both are within what the
    proof allows. A quotient of float32 is off by at most 4u of itself (`div.full`), a
    root by at most 2u (`sqrt.approx`): less than the 8u that point 2 allows for units
    and the inflation for norms.
2.  Codes are floor(y + 1/2), whole numbers near y, and y - k8 is exact as before.
3.  A key passes if not C + s t <a8, k8> + slack < b, in float32, with no division.
    <a8, k8> is exact. With x = s t <a8, k8>, |x| <= 2 |a| K, the left side is off by
    at most 3u |x| + 3u (|C| + slack) <= u |a| (6K + 3 |c|) (1 + 2^-20) + 3u slack. The
    first is in the 32u |a| (2K + |c|) of the slack that `radius` holds beyond what
    scores need, 3u slack in its inflation.
4.  The inflation is multiplied into the query's part of the slack beforehand: one more
    relative error of u, and one of it remains.
5.  The score S of a kernel is a sum of products of matrix units, which may cut off
    where float32 rounds: off by at most 2u instead of u for each sum, and by 2u for the
    scale, which is multiplied into the query that is coded and into the score
    afterwards. That is (2H + 4) u |a| K, of the (2H + 32) u 2 |a| K in the slack.
6.  The norm of the centre is divided by its largest number, so that no square leaves
    the range of float32: two more relative errors of 4u, in the inflation.
7.  Point 3 holds for every b: the computed middle + slack is at least S.
8.  Where s t is not a normal number or slack not below 2^108 the key passes. That is
    asked of the smallest t and the largest errors of all queries of the tile: a little
    more passes. NaN in any of it passes too.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

from hsrjax._src.core.arrays import TINY, UNIT, inflation
from hsrjax._src.core.bitset import WORD
from hsrjax._src.index.sketch import (
    INEXACT,
    LARGEST,
    LEVELS,
    SMALLEST_PRODUCT,
    SMALLEST_RANGE,
    UNCODED,
)
from hsrjax._src.kernels.triton.loads import INT8_DEPTH, rows_of
from hsrjax._src.kernels.triton.place import Place


class Coded(NamedTuple):
    """Queries of a tile as the sketch sees them, f32[Q] but for the codes.

    Attributes:
      codes: i8[Q, H].
      scale: of the codes.
      lost: at least the norm of what the codes leave out, inflated.
      length: at least the norm of the query, inflated.
      centre_score: of the centre of the keys.
    """

    codes: jax.Array
    scale: jax.Array
    lost: jax.Array
    length: jax.Array
    centre_score: jax.Array


def code(a: jax.Array, centre: jax.Array, h: int) -> Coded:
    """Codes queries f32[Q, H'] of which the first h numbers are theirs, others zero."""
    largest = jnp.max(jnp.abs(a), axis=1)
    scale = jnp.where(largest <= SMALLEST_RANGE, 1.0, largest / LEVELS)
    units = a / scale[:, None]
    codes = jnp.floor(units + 0.5)
    codes = jnp.where(jnp.isnan(codes), 0.0, codes)
    codes = jnp.minimum(jnp.maximum(codes, -1.0 * LEVELS), 1.0 * LEVELS)
    rest = units - codes
    length = scale * jnp.sqrt(jnp.sum(units * units, axis=1))
    lost = scale * jnp.sqrt(jnp.sum(rest * rest, axis=1)) + INEXACT * length + UNCODED
    return Coded(
        codes=codes.astype(jnp.int8),
        scale=scale,
        lost=inflation(h) * lost,
        length=inflation(h) * (length + UNCODED),
        centre_score=jnp.sum(a * centre[None, :], axis=1),
    )


class Block(NamedTuple):
    """Facts of the block that each key is in, f32[S] each."""

    scale: jax.Array
    spread: jax.Array
    radius: jax.Array


def code_rows(here: Place, x: Any) -> Coded:
    """Codes the queries of a program, against its keys."""
    width, factor = here.sizes.head_dim, here.factor(x)
    deep = functools.partial(rows_of, width=width, least=INT8_DEPTH)
    rows = deep(x.queries, here.query).astype(jnp.float32)
    if factor is not None:
        rows *= factor
    return code(rows, deep(x.sketch.centre, (here.set,)), width)


class Bounds(NamedTuple):
    """What the codes say of scores: none is above middle + slack.

    Attributes:
      middle: f32[S, Q].
      slack: f32[S, Q].
      sound: i32[S], 0 where nothing is known of a key.
    """

    middle: jax.Array
    slack: jax.Array
    sound: jax.Array


def bounds(coded: Coded, codes: jax.Array, block: Block) -> Bounds:
    """Of the scores of queries at keys i8[S, H']."""
    products = triton.dot(codes, coded.codes.T).astype(jnp.float32)
    scale, spread, radius = (x[:, None] for x in block)
    slack = coded.lost[None, :] * spread + (coded.length[None, :] * radius + TINY)
    middle = coded.centre_score[None, :] + scale * coded.scale[None, :] * products
    return Bounds(middle, slack, _sound(coded, block))


def bounds_at(here: Place, sketch: Any, coded: Coded, at: jax.Array) -> Bounds:
    """The same of the keys at slots i32[S]."""
    codes = here.gather(sketch.codes, at, here.sizes.head_dim, least=INT8_DEPTH)
    facts = sketch.scale, sketch.spread, sketch.radius
    block = Block(*(triton.load(x.at[here.set, at // WORD]) for x in facts))
    return bounds(coded, codes, block)


def passing(found: Bounds, offsets: jax.Array) -> jax.Array:
    """Whether any query may reach its offset f32[Q] at keys, i32[S]."""
    passes = ~(found.middle + found.slack < offsets[None, :])
    return jnp.maximum(jnp.max(passes.astype(jnp.int32), axis=1), 1 - found.sound)


def _sound(coded: Coded, block: Block) -> jax.Array:
    """Whether the bound holds for every query, i32[S]."""
    steps = block.scale * jnp.min(coded.scale) > SMALLEST_PRODUCT
    slack = jnp.max(coded.lost) * block.spread + jnp.max(coded.length) * block.radius
    return (steps & (slack < LARGEST)).astype(jnp.int32)


def sketch(
    keys: jax.Array, valid: jax.Array, centre: jax.Array, h: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Codes i8[32, H'] of a block f[32, H'], and its scale, spread and radius f32[].

    Not a number where a valid key is not finite: then the block passes.
    """
    rest = jnp.where(valid[:, None], keys.astype(jnp.float32) - centre[None, :], 0.0)
    widest = jnp.max(reach(rest))
    scale = jnp.where(widest <= SMALLEST_RANGE, 1.0, widest / LEVELS)
    units = rest / scale
    codes = jnp.floor(units + 0.5)
    codes = jnp.where(jnp.isnan(codes), 0.0, codes)
    distance = units - codes
    coded = jnp.sqrt(jnp.max(jnp.sum(codes * codes, axis=1)))
    lost = jnp.sqrt(jnp.max(jnp.sum(distance * distance, axis=1)))
    lost = lost + INEXACT * (coded + lost)
    spread = inflation(h) * scale * coded
    radius = inflation(h) * scale * lost + UNCODED
    from_centre = jnp.max(jnp.abs(centre))
    unit = jnp.where(from_centre > 0, from_centre, 1.0)
    from_centre = unit * jnp.sqrt(jnp.sum((centre / unit) * (centre / unit)))
    rounding = (2 * h + 32) * UNIT * (3 * from_centre + 2 * (spread + radius))
    radius = inflation(h) * (radius + rounding)
    finite = jnp.min(jnp.isfinite(rest).astype(jnp.int32)) > 0
    scale, spread, radius = (
        jnp.where(finite, x, jnp.nan) for x in (scale, spread, radius)
    )
    return codes.astype(jnp.int8), scale, spread, radius


def reach(x: jax.Array) -> jax.Array:
    """The largest |number| of each row f32[C, D']; NaN where one is."""
    broken = jnp.max(jnp.isnan(x).astype(jnp.int32), axis=1) > 0
    return jnp.where(broken, jnp.nan, jnp.max(jnp.abs(x), axis=1))


def largest(x: jax.Array, y: jax.Array) -> jax.Array:
    """The larger, or NaN: on a GPU the larger of a number and NaN is the number."""
    return jnp.where(jnp.isnan(x + y), jnp.nan, jnp.maximum(x, y))
