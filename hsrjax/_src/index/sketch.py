r"""The 8-bit sketch of the keys: certified bounds on every inner product.

Keys are cut into blocks of 32. With a common centre c, a block's scale
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
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from hsrjax._src.core.arrays import (
    TINY,
    UNIT,
    dot,
    inflation,
    integer_product,
    norm,
    put_rows,
    take_windows,
)
from hsrjax._src.core.bitset import WORD
from hsrjax._src.index.bound import Bound

_FLUSHED = 2.0**-122
_SMALLEST_RANGE = 1e-35
_SMALLEST_PRODUCT = 2.0**-125
_LARGEST = 2.0**126
_LEVELS = 127
_PASS = -(2**30)
_STOP = 2**30


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "spread", "radius", "centre"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Sketch(Bound):
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
    size = 1

    @classmethod
    def build(
        cls, keys: jax.Array, valid: jax.Array, centre: jax.Array, *, size: int = 1
    ) -> Self:
        """As `Bound.build`, of keys f[*B, S, H] in blocks of 32. Cost O(S H)."""
        *lead, _, h = keys.shape
        blocks = keys.reshape(*lead, -1, WORD, h)
        valid = valid.reshape(*lead, -1, WORD)
        codes, *facts = _sketch_blocks(blocks, valid, centre)
        return cls(
            jnp.moveaxis(codes.reshape(*lead, -1, h), -1, -2), *facts, centre=centre
        )

    @classmethod
    def empty(cls, lead: tuple[int, ...], head_dim: int, slots: int) -> Self:
        """Of no keys; fresh arrays each: a cache is donated whole, no buffer twice."""
        zeros = functools.partial(jnp.zeros, (*lead, slots // WORD), jnp.float32)
        return cls(
            codes=jnp.zeros((*lead, head_dim, slots), jnp.int8),
            scale=jnp.ones((*lead, slots // WORD), jnp.float32),
            spread=zeros(),
            radius=zeros(),
            centre=jnp.zeros((*lead, head_dim), jnp.float32),
        )

    def append(self, blocks: jax.Array, valid: jax.Array, block: jax.Array) -> Self:
        """As `Bound.append`."""
        *lead, h, slots = self.codes.shape
        codes, scale, spread, radius = _sketch_blocks(blocks, valid, self.centre)
        codes = jnp.moveaxis(codes, -1, -3)  # [*B, H, U, 32]
        column = jnp.broadcast_to(block[..., None, :], codes.shape[:-1])
        columns = self.codes.reshape(*lead, h, -1, WORD)
        put = lambda old, new: put_rows(old[..., None], block, new[..., None])[..., 0]
        return dataclasses.replace(
            self,
            codes=put_rows(columns, column, codes).reshape(*lead, h, slots),
            scale=put(self.scale, scale),
            spread=put(self.spread, spread),
            radius=put(self.radius, radius),
        )

    def upper(self, queries: jax.Array) -> jax.Array:
        """As `Bound.upper`, f32[*B, Q, S]."""
        return self.intervals(queries)[1]

    def intervals(self, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Lower and upper bounds f32[*B, Q, S] of every float32 score."""
        coded = self.code(queries)
        products = integer_product(coded.codes, self.codes)
        step, slack, sound = map(_per_key, (coded.step, coded.slack, coded.sound))
        middle = coded.centre_score + step * products.astype(jnp.float32)
        lower = jnp.where(sound, middle - slack, -jnp.inf)
        upper = jnp.where(sound, middle + slack, jnp.inf)
        return lower, upper

    def passing(self, queries: jax.Array, offsets: jax.Array) -> jax.Array:
        """Which keys the sketch cannot rule out of <a, k> >= offset, bool[*B, Q, S]."""
        coded = self.code(queries)
        return self.reach(coded.codes, coded.thresholds(offsets))

    def reach(self, codes: jax.Array, lowest: jax.Array) -> jax.Array:
        """The same from codes i8[*B, Q, H] and integers i32[*B, Q, S/32]."""
        products = integer_product(codes, self.codes)
        blocks = products.reshape(*lowest.shape, WORD)
        return (blocks >= lowest[..., None]).reshape(products.shape)

    def code(self, queries: jax.Array) -> CodedQueries:
        """Codes queries f[*B, Q, H] and bounds the error against every block."""
        a = queries.astype(jnp.float32)
        h = a.shape[-1]
        reach = jnp.max(jnp.abs(a), axis=-1)
        scale = jnp.where(reach > _SMALLEST_RANGE, reach / _LEVELS, 1.0)
        codes, coded, error = _round_to_codes(a, scale[..., None])
        centre = self.centre[..., None, :]
        lengths = norm(jnp.concatenate([a, coded, error, centre], axis=-2))[..., None]
        length, coded_norm, lost = jnp.split(lengths[..., :-1, :], 3, axis=-2)
        lost = _widen_error(lost, length, coded_norm)
        centre_norm = lengths[..., -1:, :]
        spread, radius = self.spread[..., None, :], self.radius[..., None, :]
        key_norm = centre_norm + spread + radius
        rounding = (2 * h + 32) * UNIT * length * (2 * key_norm + centre_norm)
        slack = lost * spread + length * radius + rounding
        slack = inflation(h) * slack + TINY
        step = scale[..., None] * self.scale[..., None, :]
        sound = (step > _SMALLEST_PRODUCT) & (length * key_norm + slack < _LARGEST)
        return CodedQueries(codes, dot(a, centre), step, slack, sound)

    def key_norm(self) -> jax.Array:
        """At least the norm of every key, f32[*B]."""
        reach = self.spread + self.radius
        reach = jnp.where(jnp.isnan(reach), jnp.inf, reach)  # of overflowed blocks
        return norm(self.centre) + jnp.max(reach, axis=-1)

    def runs(self, firsts: list[jax.Array], count: int) -> Self:
        """Runs of `count` blocks side by side, which begin with blocks i32 scalars."""

        def cut(x, unit=1):
            size = count * unit
            take = functools.partial(jax.lax.dynamic_slice_in_dim, axis=-1)
            return jnp.concatenate([take(x, i * unit, size) for i in firsts], axis=-1)

        return self._of(cut, codes=cut(self.codes, WORD))

    def chunk(self, start: jax.Array, size: int) -> Self:
        """The codes of `size` slots; of their blocks as they were: use `reach`."""
        codes = jax.lax.dynamic_slice_in_dim(self.codes, start, size, axis=-1)
        return dataclasses.replace(self, codes=codes)

    def cells(self, chosen: jax.Array, number: int) -> Self:
        """Of each chosen cell i32[*B, J, C] of `number`, batch axes [*B, J, C]."""
        lead = chosen.shape[:-2]

        def take(x):
            flat = x.reshape(*lead, -1, x.shape[-1])
            return take_windows(flat, chosen, x.shape[-1] // number)

        centre = self.centre[..., None, None, :]
        taken = self._of(lambda x: take(x)[..., 0, :], codes=take(self.codes))
        centre = jnp.broadcast_to(centre, (*chosen.shape[:-1], 1, centre.shape[-1]))
        return dataclasses.replace(taken, centre=centre)

    def _of(self, cut, *, codes: jax.Array) -> Self:
        """Other codes, with what `cut` takes of the facts of the blocks."""
        return dataclasses.replace(
            self,
            codes=codes,
            scale=cut(self.scale),
            spread=cut(self.spread),
            radius=cut(self.radius),
        )


class CodedQueries(NamedTuple):
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

    def thresholds(self, offsets: jax.Array) -> jax.Array:
        """Integers i32[*B, Q, S/32]: a key below its block's integer is not a member.

        Args:
          offsets: f32[*B, Q].
        """
        lowest = offsets[..., None] - self.centre_score - self.slack
        margin = 1.0 + self.codes.shape[-1] // 256
        level = jnp.ceil(jnp.clip(lowest / self.step, _PASS, _STOP)) - margin
        usable = self.sound & ~jnp.isnan(level)
        return jnp.where(usable, level, float(_PASS)).astype(jnp.int32)


def _sketch_blocks(
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
    factor = inflation(rest.shape[-1])
    spread = factor * jnp.max(norm(coded), axis=-1)
    radius = factor * jnp.max(_error_norm(rest, coded, error), axis=-1)
    return codes, scale, spread, radius


def _round_to_codes(x, scale):
    """Codes i8, their value scale * codes, and the float32 remainder."""
    ratio = jnp.round(x / scale)
    ratio = jnp.where(jnp.isfinite(ratio), jnp.clip(ratio, -_LEVELS, _LEVELS), 0.0)
    coded = scale * ratio
    return ratio.astype(jnp.int8), coded, x - coded


def _error_norm(x, coded, error):
    return _widen_error(norm(error), norm(x), norm(coded))


def _widen_error(error_norm, x_norm, coded_norm):
    rounding = 4 * UNIT * (x_norm + coded_norm + error_norm)
    return error_norm + rounding + _FLUSHED


def _per_key(block_values: jax.Array) -> jax.Array:
    return jnp.repeat(block_values, WORD, axis=-1)
