r"""What keys that softmax leaves out still contribute, from their sketches alone.

Every score has been bounded already, lower <= s <= upper, so a key that is not looked
at need not be dropped: it acts with the weight w' = exp(m - shift) of the middle m of
its bounds, and with v' = c q, the 8-bit mean value of the G consecutive keys it is one
of. A group takes part where all of its keys are visible to the query; others are looked
at, so that no key the query must not see has any part in v'.

**The certificate.** Let A and Z be the exact sums of w v and w over the keys looked at,
and D' = Z + sum w' the divisor used. With O the output of full softmax,

    O' - O  =  ( sum w' (v' - v)  +  sum (w' - w) (v - O) ) / D',

sums over the keys left out. With r >= |v' - v| in every coordinate of a group's values,
V >= |v| and h = (upper - lower) / 2, |w' - w| <= w' (e^h - 1) and therefore

    |O' - O|  <=  sum w' (r + 2 V (e^h - 1)) / D'.

**Rounding (u = 2^-24, float32).** m is off the true middle by less than u (|lower| +
|upper|), which `_halves` adds four times over to h. A weight has a relative error of at
most 96 u, sums of P terms add P u; `error_bound` multiplies by `guard` and
adds as much of V.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hsrjax._src.activations import search
from hsrjax._src.activations.certificates import weight_error
from hsrjax._src.core import windows
from hsrjax._src.core.arrays import UNIT, guard, product
from hsrjax._src.core.bitset import WORD, blocks_touched

TAILS = (1, 2, 4, 8, 16, 32)
_LEVELS = 127
_SMALLEST_RANGE = 1e-35


class ValueSketch(NamedTuple):
    """The 8-bit mean value of every group of G consecutive slots.

    Attributes:
      codes: i8[*B, P/G, D].
      scale: f32[*B, P/G], of a unit of the codes.
      radius: f32[*B, P/G], at least the distance, in any coordinate, of the values of
        the group from scale * codes.
    """

    codes: jax.Array
    scale: jax.Array
    radius: jax.Array


class Tail(NamedTuple):
    """Sums over the keys left out by each query.

    Attributes:
      weighted: f32[..., D], of weight times value, both from sketches.
      total: f32[...], of the weights.
      most: f32[...], of the largest weights the keys may have.
      error: f32[..., 2], of weight times radius, and of what weights may be off by.
      rounding: f32[...], bound on the rounding error of a score.
    """

    weighted: jax.Array
    total: jax.Array
    most: jax.Array
    error: jax.Array
    rounding: jax.Array


def check_tail(tail: Any) -> None:
    """Raises ValueError unless so many consecutive keys may share a mean value."""
    if type(tail) is not int or tail not in TAILS:
        raise ValueError(f"tail must be None or one of {TAILS}, got {tail!r}.")


def sketch_values(rows: jax.Array, group: int) -> ValueSketch:
    """Sketches values f[*B, P, D] in groups of G, P a multiple of it. Cost O(P D).

    What is not finite counts as zero: it makes the output NaN by another way.
    """
    *lead, size, width = rows.shape
    finite = jnp.where(jnp.isfinite(rows), rows, 0).astype(jnp.float32)
    grouped = finite.reshape(*lead, size // group, group, width)
    mean = jnp.mean(grouped, axis=-2)
    reach = jnp.max(jnp.abs(mean), axis=-1)
    scale = jnp.where(reach > _SMALLEST_RANGE, reach / _LEVELS, 1.0)
    levels = jnp.round(mean / scale[..., None])
    # Worked out once: the radius has to be that of the very numbers that are stored.
    coded, scale = jax.lax.optimization_barrier((levels * scale[..., None], scale))
    distance = jnp.max(jnp.abs(grouped - coded[..., None, :]), axis=(-2, -1))
    largest = jnp.max(jnp.abs(grouped), axis=(-2, -1)) + reach
    radius = (1 + 8 * UNIT) * distance + 8 * UNIT * largest
    return ValueSketch(levels.astype(jnp.int8), scale, radius)


def sketch_again(
    sketch: ValueSketch, rows: jax.Array, held: jax.Array, new: int
) -> ValueSketch:
    """The sketch of values f[*B, P, D] of which `new` behind the `held` ones changed.

    Args:
      sketch: of the values before.
      rows: f[*B, P, D], the values now.
      held: i32 that broadcasts against *B, as in `windows.read`.
      new: at least so many changed.
    """
    group, slots = group_of(sketch, rows), rows.shape[-2]
    touched = blocks_touched(new, slots)
    first = jnp.minimum(held // WORD, slots // WORD - touched) * WORD
    fresh = sketch_values(windows.read(rows, first, touched * WORD), group)
    put = functools.partial(windows.write, start=first // group)
    return ValueSketch(
        codes=put(sketch.codes, rows=fresh.codes),
        scale=put(sketch.scale, rows=fresh.scale, axis=-1),
        radius=put(sketch.radius, rows=fresh.radius, axis=-1),
    )


def group_of(sketch: ValueSketch, rows: jax.Array) -> int:
    """G of the sketch of values f[*B, P, D]."""
    return rows.shape[-2] // sketch.scale.shape[-1]


def whole(visible: jax.Array, group: int) -> jax.Array:
    """Which of bool[..., P] are in a group of which all are."""
    groups = visible.reshape(*visible.shape[:-1], -1, group)
    return jnp.broadcast_to(
        jnp.all(groups, axis=-1, keepdims=True), groups.shape
    ).reshape(visible.shape)


def sum_left_out(
    sketch: ValueSketch,
    lower: jax.Array,
    upper: jax.Array,
    left_out: jax.Array,
    shift: jax.Array,
    rounding: jax.Array,
) -> Tail:
    """What the keys left out contribute.

    Args:
      sketch: of the values, batch axes *B.
      lower: f32[*B, Q, P], bounds of the scores.
      upper: f32[*B, Q, P].
      left_out: bool[*B, Q, P], in whole groups but for keys looked at.
      shift: f32[*B, Q], subtracted from scores.
      rounding: f32[*B, Q], bound on the rounding error of a score.

    Returns:
      Tail, [*B, Q]. Cost O(P) and P D / G multiplications per query.
    """
    shift = shift[..., None]
    lower, upper = (jnp.where(left_out, x, shift) for x in (lower, upper))
    middle, half = _halves(lower, upper)
    weights = jnp.where(left_out, jnp.exp(middle - shift), 0.0)
    by_group = weights.reshape(*weights.shape[:-1], sketch.scale.shape[-1], -1)
    by_group = jnp.sum(by_group, axis=-1)
    # What every group is summed with: values, radius and one.
    ones = jnp.ones_like(sketch.scale)
    coded = sketch.codes.astype(jnp.float32) * sketch.scale[..., None]
    columns = jnp.concatenate(
        [coded, jnp.stack([sketch.radius, ones], axis=-1)], axis=-1
    )
    summed = product("...qg,...gd->...qd", by_group, columns)
    total, off = summed[..., -1], summed[..., -2]
    # No weight times exp(half): where bounds are wide that is zero times infinity.
    heavy = jnp.exp(middle + half - shift)
    wrong = search.masked_sum(left_out, heavy - weights)
    return Tail(
        weighted=summed[..., :-2],
        total=total,
        most=total + wrong,
        error=jnp.stack([off, wrong], axis=-1),
        rounding=rounding,
    )


def error_bound(
    tail: Tail, total: jax.Array, value_bound: jax.Array, *, slots: int
) -> tuple[jax.Array, jax.Array]:
    """Share of the mass that acts through sketches, and bound on the output's error.

    Args:
      tail: of each row.
      total: f32[...], sum of the weights of the keys looked at.
      value_bound: f32[...], at least every |value coordinate|.
      slots: P.

    Returns:
      (share, bound) f32[...]: an upper bound on the fraction of the row's softmax mass
      in keys not looked at, and on the maximum-norm distance to full softmax.
    """
    factor = guard(slots)
    divisor = total + tail.total
    divisor = jnp.where(divisor > 0, divisor, 1.0)
    share = jnp.minimum(factor * tail.most / (total + tail.most), 1.0)
    share = jnp.where(tail.most > 0, share, 0.0)
    off, wrong = tail.error[..., 0], tail.error[..., 1]
    bound = factor * (off + 2.0 * value_bound * wrong) / divisor
    rounded = 2.0 * weight_error(tail.rounding) + 2.0 * (factor - 1.0)
    return share, bound + jnp.minimum(rounded, 2.0) * value_bound


def _halves(lower: jax.Array, upper: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Middle of bounds, and at least the distance from it to either."""
    middle = 0.5 * lower + 0.5 * upper
    rounding = 4 * UNIT * (jnp.abs(lower) + jnp.abs(upper))
    return middle, jnp.maximum(upper - middle, middle - lower) + rounding
