r"""Certified bounds on inner products: the int8 sketch of the keys, and balls.

**The sketch.** Keys are cut into blocks of 32. With a common centre c, a block's scale
s and int8 codes k8, every key is k = c + s k8 + e; a query is a = t a8 + f. Then

    <a, k> = <a, c> + s t <a8, k8> + s <f, k8> + <a, e>,

so with `spread` >= |s k8| and `radius` >= |e| over the block, Cauchy-Schwarz gives

    | <a, k> - <a, c> - s t <a8, k8> |  <=  |f| spread + |a| radius.

**Rounding (u = 2^-24, float32, any summation order, subnormals may be flushed).**
Membership is about the *float32* score S, so the bound must also hold for S and for
the float32 evaluation of itself. Write K = |c| + spread + radius >= |k|.

1.  |S - <a, k>| <= g |a| K and the computed centre score C has
    |C - <a, c>| <= g |a| |c|, for g = H u / (1 - H u), each plus at most H 2^-126 from
    flushed products (Higham 2002, section 3.1).
2.  The stored radius is a float32 norm of e' = fl(fl(k - c) - fl(s k8)). Coordinatewise
    |e - e'| <= 2u (|fl(k - c)| + |s k8|) + u |e'| to first order, which `_error_norm`
    adds, as it adds 2^-122 for flushed coordinates. The query's |f| likewise.
3.  A float32 norm, computed after scaling by a power of two (so that neither overflow
    nor underflow of squares matters), has relative error <= (H + 4) u;
    products and sums of the handful of terms below add less than 24 u.
    `_inflate` multiplies by 1 + (2H + 64) u and so covers both.
4.  The product <a8, k8> is an integer of at most 127^2 H < 2^14 H: exact in int32, and
    in float32 for H <= 1024, also from codes in bfloat16, which holds them all.

Hence for every key of the block

    | S - C - s t <a8, k8> | <= slack,
    slack = inflate(|f| spread + |a| radius + (2H + 32) u |a| (2 K + |c|)) + 2^-110.

**Thresholds.** If S >= b then s t <a8, k8> >= b - C - slack, that is
<a8, k8> >= z = (b - C - slack) / (s t). The float32 value of b - C - slack is off by at
most 2u (|b - C| + slack). If |b - C| <= 4 |a| K this is covered by the 32 u |a| (2 K)
in the slack. Otherwise, b - C > 0 means that no key of the block can reach b and
b - C < 0 that all do, and a relative error of 2u changes neither. The quotient has
relative error 4u, an absolute error below 1 + H/256 where |z| <= 2^14 H, so testing
<a8, k8> >= ceil(z) - 1 - floor(H/256) never drops a key. Wherever something is not
finite, or s t is not a normal number, the threshold is the smallest integer: the block
passes whole. NaN never fails the test.

The same slack bounds S from both sides (`intervals`), which is what the softmax
certificates are computed from.

**Balls.** The keys of a cell lie in a ball around the cell's middle m and in one around
a point c common to all cells, so that <a, k> <= <a, m> + |a| d for the largest distance
d = |k - m|, and likewise for c. Let A be the computed norm of a, inflated as above and
at least 2^-90, so that A >= |a|. The ball around m has the stored radius

    r = inflate(d' + (4H + 64) u (|m| + d')) + 2^-118

with d' the computed distance. The computed bound is fl(fl(<a, m>) + A r) + 2^-110.

1.  d <= (1 + (H + 5) u) d' + 2^-121 by point 3 and the rounding of k - m, whose flushed
    coordinates add at most sqrt(H) 2^-126. The inflation and 2^-118 cover both.
2.  The score S exceeds <a, k> by at most g |a| (|m| + d), and the bound falls short of
    its exact value by at most g |a| |m| + 4u (|a| |m| + A r): together less than
    (4H + 64) u A (|m| + d') and the inflation of r, which are in A r. So is the error
    of coordinates of a that are flushed, at most 2^-121 (|m| + d): A >= 2^-90.
3.  Products flushed add at most (2H + 1) 2^-126 < 2^-114. Where A >= 16, what is left
    of 2^-118 in A r is more. Elsewhere either A (|m| + d') < 2^-95, and then the bound
    is small enough to feel 2^-110 added, or u A (|m| + d') is larger.
4.  Where A or |m| + d' is 2^60 or more, or not a number, A r is +inf or NaN, and so is
    the bound: it rules out nothing, as NaN never does. Elsewhere nothing overflows.

The ball around c is the same with c for m.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsrjax.bitset import WORD
from hsrjax.rows import max_rows, take_windows

_UNIT = 2.0**-24
_TINY = 2.0**-110
_FLUSHED = 2.0**-122
_SHORTEST = 2.0**-90
_LEAST_RADIUS = 2.0**-118
_FARTHEST = 2.0**60
_SMALLEST_RANGE = 1e-35
_SMALLEST_PRODUCT = 2.0**-125
_LARGEST = 2.0**126
_LEVELS = 127
_PASS = -(2**30)
_STOP = 2**30
MAX_HEAD_DIM = 1024
_MIN_ROWS = 2
"""int8 products with fewer rows fall off XLA's fast path on CPU."""
_GPU_DEPTH = 32
"""int8 numbers a GPU's matrix instruction takes; untuned, XLA is wrong for fewer."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "spread", "radius", "centre"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Sketch:
    """The 8-bit picture of the keys; S is a multiple of 32.

    Attributes:
      codes: i8[*B, H, S], key coordinates in units of the block's scale.
      scale: f32[*B, S/32].
      spread: f32[*B, S/32], at least the norm of scale * codes of each key.
      radius: f32[*B, S/32], at least the norm of what the codes leave out.
      centre: f32[*B, H], subtracted before coding; any value is sound.
    """

    codes: jax.Array
    scale: jax.Array
    spread: jax.Array
    radius: jax.Array
    centre: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["middles", "radius", "reach", "centre"],
    meta_fields=["size"],
)
@dataclasses.dataclass(frozen=True)
class Balls:
    """Where the keys of each cell are; W is the number of cells rounded up to 32 more.

    Attributes:
      middles: f32[*B, H, W].
      radius: f32[*B, W], of the ball around the cell's own middle.
      reach: f32[*B, W], of the ball around the common centre.
      centre: f32[*B, H].
      size: slots of a cell, static.
    """

    middles: jax.Array
    radius: jax.Array
    reach: jax.Array
    centre: jax.Array
    size: int


class QuerySketch(NamedTuple):
    """A query tile as the sketch sees it, [*B, Q] queries against S/32 blocks.

    Attributes:
      codes: i8[*B, Q, H].
      centre_score: f32[*B, Q, 1].
      step: f32[*B, Q, S/32], score per unit of the int8 product.
      slack: f32[*B, Q, S/32], how far the float32 score may be from its estimate.
      sound: bool[*B, Q, S/32], whether the two numbers above may be relied on.
    """

    codes: jax.Array
    centre_score: jax.Array
    step: jax.Array
    slack: jax.Array
    sound: jax.Array


def dot(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Exact-stage scores f32[*B, Q, S] of f[*B, Q, H] and f[*B, S, H].

    This one product, float32 at highest precision, defines membership everywhere.
    """
    return product(
        "...qh,...sh->...qs", queries.astype(jnp.float32), keys.astype(jnp.float32)
    )


def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` of float32 arrays at highest precision."""
    return jnp.einsum(
        spec,
        x,
        y,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def norm(x: jax.Array) -> jax.Array:
    """Euclidean norm over the last axis whose squares neither overflow nor underflow.

    Scaled by powers of two, behind a barrier: XLA is free to turn sum (c x)^2 into
    c^2 sum x^2, and does so, which is what must not happen here.
    """
    largest = jnp.max(jnp.abs(x), axis=-1)
    large, small = largest > 2.0**40, largest < 2.0**-40
    down = jnp.where(large, 2.0**-80, jnp.where(small, 2.0**80, 1.0))
    up = jnp.where(large, 2.0**80, jnp.where(small, 2.0**-80, 1.0))
    scaled = jax.lax.optimization_barrier(x * down[..., None])
    return up * jnp.sqrt(jnp.sum(scaled * scaled, axis=-1))


def sketch_blocks(
    blocks: jax.Array, valid: jax.Array, centre: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Codes, scale, spread and radius of blocks of 32 keys.

    Args:
      blocks: f[*B, W, 32, H], keys; may hold NaN and infinities.
      valid: bool[*B, W, 32]; other slots are ignored.
      centre: f32[*B, H].

    Returns:
      codes i8[*B, W, 32, H] and scale, spread, radius f32[*B, W]. Cost O(W 32 H).
    """
    rest = blocks.astype(jnp.float32) - centre[..., None, None, :]
    rest = jnp.where(valid[..., None], rest, 0.0)
    reach = jnp.max(jnp.abs(rest), axis=(-2, -1))
    scale = jnp.where(reach > _SMALLEST_RANGE, reach / _LEVELS, 1.0)
    scale = jnp.where(jnp.isnan(reach), reach, scale)
    codes, coded, error = _round_to_codes(rest, scale[..., None, None])
    factor = _inflation(rest.shape[-1])
    spread = factor * jnp.max(norm(coded), axis=-1)
    radius = factor * jnp.max(_error_norm(rest, coded, error), axis=-1)
    return codes, scale, spread, radius


def sketch_query(sketch: Sketch, queries: jax.Array) -> QuerySketch:
    """Codes a tile of queries f[*B, Q, H] and bounds the error against every block."""
    a = queries.astype(jnp.float32)
    h = a.shape[-1]
    reach = jnp.max(jnp.abs(a), axis=-1)
    scale = jnp.where(reach > _SMALLEST_RANGE, reach / _LEVELS, 1.0)
    codes, coded, error = _round_to_codes(a, scale[..., None])
    centre = sketch.centre[..., None, :]
    lengths = norm(jnp.concatenate([a, coded, error, centre], axis=-2))[..., None]
    length, coded_norm, lost = jnp.split(lengths[..., :-1, :], 3, axis=-2)
    lost = _widen_error(lost, length, coded_norm)
    centre_norm = lengths[..., -1:, :]
    spread, radius = sketch.spread[..., None, :], sketch.radius[..., None, :]
    key_norm = centre_norm + spread + radius
    rounding = (2 * h + 32) * _UNIT * length * (2 * key_norm + centre_norm)
    slack = lost * spread + length * radius + rounding
    slack = _inflation(h) * slack + _TINY
    step = scale[..., None] * sketch.scale[..., None, :]
    sound = (step > _SMALLEST_PRODUCT) & (length * key_norm + slack < _LARGEST)
    centre_score = dot(a, centre)
    return QuerySketch(codes, centre_score, step, slack, sound)


def code_products(sketch: Sketch, query: QuerySketch) -> jax.Array:
    """The product of the codes, i32[*B, Q, S]: one byte read per key coordinate.

    Off the CPU small heads go by bfloat16: the integers are the same.
    """
    rows = query.codes.shape[-2]
    codes = query.codes
    if rows < _MIN_ROWS:
        padding = [(0, 0)] * (codes.ndim - 2) + [(0, _MIN_ROWS - rows), (0, 0)]
        codes = jnp.pad(codes, padding)
    if codes.shape[-1] < _GPU_DEPTH:
        products = jax.lax.platform_dependent(
            codes, sketch.codes, cpu=_whole_products, default=_floating_products
        )
    else:
        products = _whole_products(codes, sketch.codes)
    return products[..., :rows, :]


def _whole_products(queries: jax.Array, keys: jax.Array) -> jax.Array:
    return jnp.einsum(
        "...qh,...hs->...qs", queries, keys, preferred_element_type=jnp.int32
    )


def _floating_products(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """The same integers from codes in bfloat16, added up in float32."""
    products = jnp.einsum(
        "...qh,...hs->...qs",
        queries.astype(jnp.bfloat16),
        keys.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    return products.astype(jnp.int32)


def thresholds(query: QuerySketch, offsets: jax.Array) -> jax.Array:
    """Integers i32[*B, Q, S/32]: a key below its block's integer is not a member.

    Args:
      query: from `sketch_query`.
      offsets: f32[*B, Q].
    """
    lowest = offsets[..., None] - query.centre_score - query.slack
    margin = 1.0 + query.codes.shape[-1] // 256
    level = jnp.ceil(jnp.clip(lowest / query.step, _PASS, _STOP)) - margin
    usable = query.sound & ~jnp.isnan(level)
    return jnp.where(usable, level, float(_PASS)).astype(jnp.int32)


def intervals(query: QuerySketch, products: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lower and upper bounds f32[*B, Q, S] of every float32 score."""
    step, slack = _per_key(query.step), _per_key(query.slack)
    middle = query.centre_score + step * products.astype(jnp.float32)
    sound = _per_key(query.sound)
    lower = jnp.where(sound, middle - slack, -jnp.inf)
    upper = jnp.where(sound, middle + slack, jnp.inf)
    return lower, upper


def score_rounding(sketch: Sketch, queries: jax.Array) -> jax.Array:
    """Bound f32[*B, Q] on the rounding error of any float32 score of a query."""
    key_norm = norm(sketch.centre) + jnp.max(sketch.spread + sketch.radius, axis=-1)
    h = queries.shape[-1]
    length = norm(queries.astype(jnp.float32))
    return (2 * h + 32) * _UNIT * length * key_norm[..., None] + _TINY


def bound_cells(
    keys: jax.Array, valid: jax.Array, centre: jax.Array, *, size: int
) -> Balls:
    """Balls around runs of keys.

    Args:
      keys: f[*B, P, H]; may hold NaN and infinities.
      valid: bool[*B, P]; other slots are ignored.
      centre: f32[*B, H], of the second ball; also where a cell has no middle.
      size: slots of a cell, a divisor of P; static.
    """
    *lead, slots, h = keys.shape
    padding = [(0, 0)] * len(lead) + [(0, -slots % (size * WORD))]
    valid = jnp.pad(valid, padding).reshape(*lead, -1, size)
    cells = jnp.pad(keys, [*padding, (0, 0)]).reshape(*valid.shape, h)
    cells = jnp.where(valid[..., None], cells.astype(jnp.float32), 0.0)
    number = jnp.maximum(jnp.sum(valid, axis=-1, dtype=jnp.int32), 1)
    middle = jnp.sum(cells, axis=-2) / number[..., None].astype(jnp.float32)
    common = jnp.broadcast_to(centre[..., None, :], middle.shape)
    usable = jnp.all(jnp.isfinite(middle), axis=-1) & jnp.any(valid, axis=-1)
    # Worked out once: the radius has to be that of the very middle that is stored.
    middle = jax.lax.optimization_barrier(jnp.where(usable[..., None], middle, common))
    return Balls(
        middles=jnp.moveaxis(middle, -1, -2),
        radius=_radius(cells, valid, middle),
        reach=_radius(cells, valid, common),
        centre=centre,
        size=size,
    )


def widen_cells(
    balls: Balls, blocks: jax.Array, valid: jax.Array, cell: jax.Array
) -> Balls:
    """The balls with blocks of keys f[*B, U, 32, H] in their cells i32[*B, U] too."""
    middle = take_windows(balls.middles, cell, 1)[..., 0]
    common = jnp.broadcast_to(balls.centre[..., None, :], middle.shape)
    return dataclasses.replace(
        balls,
        radius=max_rows(balls.radius, cell, _radius(blocks, valid, middle)),
        reach=max_rows(balls.reach, cell, _radius(blocks, valid, common)),
    )


def ball_upper(balls: Balls, queries: jax.Array) -> jax.Array:
    """Upper bound f32[*B, Q, W] of the float32 scores of the keys in each cell."""
    a = queries.astype(jnp.float32)
    length = jnp.maximum(_inflation(a.shape[-1]) * norm(a), _SHORTEST)[..., None]
    length = jnp.where(length < _FARTHEST, length, jnp.inf)
    own = jnp.einsum(
        "...qh,...hw->...qw",
        a,
        balls.middles,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    own = own + length * balls.radius[..., None, :]
    common = dot(a, balls.centre[..., None, :]) + length * balls.reach[..., None, :]
    return jnp.minimum(own, common) + _TINY


def _radius(keys: jax.Array, valid: jax.Array, middle: jax.Array) -> jax.Array:
    """r f32[*B, W] of the keys f[*B, W, C, H] around middles f32[*B, W, H]."""
    rest = keys.astype(jnp.float32) - middle[..., None, :]
    distance = norm(jnp.where(valid[..., None], rest, 0.0))
    far = norm(middle) + jnp.max(distance, axis=-1)
    h = keys.shape[-1]
    radius = jnp.max(distance, axis=-1) + (4 * h + 64) * _UNIT * far
    radius = _inflation(h) * radius + _LEAST_RADIUS
    return jnp.where(far < _FARTHEST, radius, jnp.inf)


def _round_to_codes(x, scale):
    """Codes i8, their value scale * codes, and the float32 remainder."""
    ratio = jnp.round(x / scale)
    ratio = jnp.where(jnp.isfinite(ratio), jnp.clip(ratio, -_LEVELS, _LEVELS), 0.0)
    coded = scale * ratio
    return ratio.astype(jnp.int8), coded, x - coded


def _error_norm(x, coded, error):
    return _widen_error(norm(error), norm(x), norm(coded))


def _widen_error(error_norm, x_norm, coded_norm):
    rounding = 4 * _UNIT * (x_norm + coded_norm + error_norm)
    return error_norm + rounding + _FLUSHED


def _inflation(h: int) -> float:
    return 1.0 + (2 * h + 64) * _UNIT


def _per_key(block_values: jax.Array) -> jax.Array:
    return jnp.repeat(block_values, WORD, axis=-1)
