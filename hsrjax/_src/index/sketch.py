r"""The 8-bit sketch of the keys: certified bounds on every inner product.

Keys are cut into blocks of 32. With a common centre c, a block's scale
s and int8 codes k8, every key is k = c + s k8 + e; a query is a = t a8 + f. Then

    <a, k> = <a, c> + s t <a8, k8> + s <f, k8> + <a, e>,

so with `spread` >= |s k8| and E >= |e| over the block, Cauchy-Schwarz gives

    | <a, k> - <a, c> - s t <a8, k8> |  <=  |f| spread + |a| E.

**Rounding (u = 2^-24, float32, any summation order, subnormals may be flushed).**
Membership is about the *float32* score S, so the bound must also hold for S and for
the float32 evaluation of itself. Write K = |c| + spread + E >= |k|.

1.  |S - <a, k>| <= g |a| K and the computed centre score C has
    |C - <a, c>| <= g |a| |c|, for g = H u / (1 - H u), each plus at most H 2^-126 from
    flushed products (Higham 2002, section 3.1). The stored `radius` is therefore
    E + (2H + 32) u (2 K + |c|), to be multiplied by |a| once.
2.  Codes are whole numbers near y = fl(x / s) for x = fl(k - c): y - k8 is exact, and y
    is x / s up to 8u on every platform. So, coordinate by coordinate,
    |e| <= s (|y - k8| + 16u |y|); likewise f, with x = a. A coordinate of the largest
    key of a block, or of the query, has |y| = 127, and there the 16u |y| are more than
    all that is flushed. Where nothing is larger than 1e-35 all codes are zero and
    the norm of x is below 2^-108, which is added to E, |f| and |a|.
3.  The squares of k8 sum up exactly for H <= 1024, those of y and of y - k8 with a
    relative error of (H + 4) u; products and sums of the handful of terms below add
    less than 24 u. `inflation` is 1 + (2H + 64) u and so covers both.
4.  The product <a8, k8> is an integer of at most 127^2 H < 2^14 H: exact in int32, and
    in float32 for H <= 1024, also from codes in bfloat16, which holds them all.

Hence for every key of the block

    | S - C - s t <a8, k8> | <= slack,
    slack = inflation (|f| spread + |a| radius) + 2^-110.

**Thresholds.** If S >= b then s t <a8, k8> >= b - C - slack, that is
<a8, k8> >= z = (b - C - slack) / (s t). The float32 value of b - C - slack is off by at
most 2u (|b - C| + slack). If |b - C| <= 4 |a| K this is covered by the 32 u |a| (2 K)
in the slack. Otherwise, b - C > 0 means that no key of the block can reach b and
b - C < 0 that all do, and a relative error of 2u changes neither. The quotient has
relative error 4u, an absolute error below 1 + H/256 where |z| <= 2^14 H, so testing
<a8, k8> >= ceil(z) - 1 - floor(H/256) never drops a key. Where s t is not a normal
number, or slack is not below 2^108 (it is, unless |a| K is below 2^126 and nothing
overflows), slack is set to infinity and the threshold is the smallest integer: the
block passes whole. NaN never fails the test.

The same slack bounds S from both sides (`intervals`), which is what the softmax
certificates are computed from.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from hsrjax._src.core import windows
from hsrjax._src.core.arrays import (
    TINY,
    UNIT,
    dot,
    inflation,
    integer_product,
    norm,
    reach,
    sum_pair,
    take_windows,
)
from hsrjax._src.core.bitset import WORD
from hsrjax._src.index.bound import Bound

UNCODED = 2.0**-108
SMALLEST_RANGE = 1e-35
SMALLEST_PRODUCT = 2.0**-125
LARGEST = 2.0**108
LEVELS = 127
INEXACT = 16 * UNIT
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
      codes: i8[*B, S, H], key coordinates in units of the block's scale.
      scale: f32[*B, S/32].
      spread: f32[*B, S/32], at least the norm of scale * codes of each key.
      radius: f32[*B, S/32], at least the norm of what the codes leave out, and what
        a score may be off by rounding, per unit of the query's norm.
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
        codes, *facts = _sketch(keys, valid, centre)
        return cls(codes, *facts, centre=centre)

    @classmethod
    def empty(cls, lead: tuple[int, ...], head_dim: int, slots: int) -> Self:
        """Of no keys; fresh arrays each: a cache is donated whole, no buffer twice."""
        zeros = functools.partial(jnp.zeros, (*lead, slots // WORD), jnp.float32)
        return cls(
            codes=jnp.zeros((*lead, slots, head_dim), jnp.int8),
            scale=jnp.ones((*lead, slots // WORD), jnp.float32),
            spread=zeros(),
            radius=zeros(),
            centre=jnp.zeros((*lead, head_dim), jnp.float32),
        )

    def append(self, keys: jax.Array, valid: jax.Array, first: jax.Array) -> Self:
        """As `Bound.append`; batch axes of size 1 of `first` share it."""
        codes, *facts = _sketch(keys, valid, self.centre)
        old = self.scale, self.spread, self.radius
        scale, spread, radius = (
            windows.write(x, first, new, axis=-1)
            for x, new in zip(old, facts, strict=True)
        )
        codes = windows.write(self.codes, first * WORD, codes)
        return dataclasses.replace(
            self, codes=codes, scale=scale, spread=spread, radius=radius
        )

    def upper(self, queries: jax.Array) -> jax.Array:
        """As `Bound.upper`, f32[*B, Q, S]."""
        return self.intervals(queries)[1]

    def intervals(self, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Lower and upper bounds f32[*B, Q, S] of every float32 score."""
        coded = self.code(queries)
        products = integer_product(coded.codes, self.codes)
        step, slack = _per_key(coded.step), _per_key(coded.slack)
        middle = coded.centre_score + step * products.astype(jnp.float32)
        bounded = slack < jnp.inf
        lower = jnp.where(bounded, middle - slack, -jnp.inf)
        upper = jnp.where(bounded, middle + slack, jnp.inf)
        return lower, upper

    def sample(self, queries: jax.Array, stride: int, *, apart: bool) -> jax.Array:
        """Scores f32[*B, Q, C], as the codes say, of every `stride`-th key.

        Args:
          queries: f[*B, Q, H].
          stride: keys for each of the sample.
          apart: reads these keys alone; else all products are made, which costs nothing
            where `passing` makes the same.
        """
        sampled = lambda x: x[..., stride // 2 :: stride]
        coded = self.code(queries)
        if apart:
            codes = self.codes[..., stride // 2 :: stride, :]
            products = integer_product(coded.codes, codes)
        else:
            products = sampled(integer_product(coded.codes, self.codes))
        steps = sampled(_per_key(coded.step))
        return coded.centre_score + steps * products.astype(jnp.float32)

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
        scale = _scale(reach(a))[..., None]
        units = a / scale
        codes = _whole(units)
        length, lost = (
            scale * jnp.sqrt(x)[..., None] for x in _square_sums(units, units - codes)
        )
        lost = lost + INEXACT * length + UNCODED
        slack = lost * self.spread[..., None, :]
        slack += (length + UNCODED) * self.radius[..., None, :]
        slack = inflation(a.shape[-1]) * slack + TINY
        step = scale * self.scale[..., None, :]
        sound = (step > SMALLEST_PRODUCT) & (slack < LARGEST)
        return CodedQueries(
            codes=codes.astype(jnp.int8),
            centre_score=dot(a, self.centre[..., None, :]),
            step=step,
            slack=jnp.where(sound, slack, jnp.inf),
        )

    def key_norm(self) -> jax.Array:
        """At least the norm of every key, f32[*B]."""
        reach = self.spread + self.radius
        reach = jnp.where(jnp.isnan(reach), jnp.inf, reach)  # of overflowed blocks
        return norm(self.centre) + jnp.max(reach, axis=-1)

    def runs(self, firsts: list[jax.Array], count: int) -> Self:
        """Runs of `count` blocks side by side, which begin with blocks i32 scalars."""

        def cut(x, unit=1, axis=-1):
            size = count * unit
            take = functools.partial(jax.lax.dynamic_slice_in_dim, axis=axis)
            return jnp.concatenate([take(x, i * unit, size) for i in firsts], axis)

        return self._of(cut, codes=cut(self.codes, WORD, -2))

    def chunk(self, start: jax.Array, size: int) -> Self:
        """The codes of `size` slots; of their blocks as they were: use `reach`."""
        codes = jax.lax.dynamic_slice_in_dim(self.codes, start, size, axis=-2)
        return dataclasses.replace(self, codes=codes)

    def cells(self, chosen: jax.Array, number: int) -> Self:
        """Of each chosen cell i32[*B, J, C] of `number`, batch axes [*B, J, C]."""
        slots = self.codes.shape[-2] // number
        codes = take_windows(self.codes, chosen, slots, axis=-2)

        def take(x):
            return take_windows(x[..., None, :], chosen, slots // WORD)[..., 0, :]

        taken = self._of(take, codes=codes)
        centre = self.centre[..., None, None, :]
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
      slack: f32[*B, Q, S/32], how far the float32 score may be from its estimate;
        infinite where nothing is known of it.
    """

    codes: jax.Array
    centre_score: jax.Array
    step: jax.Array
    slack: jax.Array

    def thresholds(self, offsets: jax.Array) -> jax.Array:
        """Integers i32[*B, Q, S/32]: a key below its block's integer is not a member.

        Args:
          offsets: f32[*B, Q].
        """
        lowest = (offsets[..., None] - self.centre_score) - self.slack
        level = jnp.minimum(lowest / self.step, _STOP)
        margin = 1.0 + self.codes.shape[-1] // 256
        level = jnp.where(level > _PASS, jnp.ceil(level) - margin, _PASS)  # NaN is not
        return level.astype(jnp.int32)


def _sketch(
    keys: jax.Array, valid: jax.Array, centre: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Codes, scale, spread and radius of blocks of 32 keys.

    Args:
      keys: f[*B, S, H]; may hold NaN and infinities.
      valid: bool[*B, S]; other slots are ignored.
      centre: f32[*B, H].

    Returns:
      codes i8[*B, S, H] and scale, spread, radius f32[*B, S/32]. Cost O(S H).
    """
    h = keys.shape[-1]
    rest = keys.astype(jnp.float32) - centre[..., None, :]
    rest = jnp.where(valid[..., None], rest, 0.0)
    by_block = lambda x: jnp.max(x.reshape(*x.shape[:-1], -1, WORD), axis=-1)
    scale = _scale(by_block(reach(rest)))
    units = rest / _per_key(scale)[..., None]
    codes = _whole(units)
    coded, lost = (jnp.sqrt(by_block(x)) for x in _square_sums(codes, units - codes))
    lost = lost + INEXACT * (coded + lost)
    spread = inflation(h) * scale * coded
    radius = inflation(h) * scale * lost + UNCODED
    from_centre = norm(centre)[..., None]
    rounding = (2 * h + 32) * UNIT * (3 * from_centre + 2 * (spread + radius))
    return codes.astype(jnp.int8), scale, spread, inflation(h) * (radius + rounding)


def _scale(reach: jax.Array) -> jax.Array:
    """The unit of codes of numbers up to `reach`; NaN of what is not finite."""
    return jnp.where(reach <= SMALLEST_RANGE, 1.0, reach / LEVELS)


def _whole(units: jax.Array) -> jax.Array:
    """Codes as float32: the nearest whole numbers, of NaN zero."""
    return jnp.where(jnp.isnan(units), 0.0, jnp.round(units))


def _square_sums(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of the squares of f32[..., H] each."""
    return sum_pair(x * x, y * y)


def _per_key(block_values: jax.Array) -> jax.Array:
    return jnp.repeat(block_values, WORD, axis=-1)
