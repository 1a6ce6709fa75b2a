"""Activations that do not vanish below their bias: PReLU, CELU and SELU.

Below its bias such a weight is a line or a constant. What that adds up to over all
visible keys needs no scores: differences of running sums over the keys, in O(S + T) for
any causality, window, sinks and segments. Only the keys above are looked at, and add
what they weigh more. Running sums are taken about the mean, which keeps them, and the
rounding of their differences, small.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from hsrjax._src.activations.base import (
    Activation,
    check_normalize,
    per_row,
)
from hsrjax._src.activations.relu import ReLU
from hsrjax._src.core import meshes
from hsrjax._src.core.arrays import take_rows
from hsrjax._src.core.tiles import heads_first, scale_query
from hsrjax._src.core.visible import Visible

Divisor = Literal["length", "none"]
_BLOCK = 64
_static = {"static": True}


class _Closed(Activation):
    """What the three share: no division by the sum of weights, which may be zero."""

    closed_form = True

    def __post_init__(self):
        why = ": weights may be negative, and their sum zero"
        check_normalize(self, ("length", "none"), why)

    def complete(self, out, query, key, value, seen, *, scale):
        """Adds the closed form, and divides.

        Args:
          out: f32[B, T, N, D], what was summed key by key.
          query: f[B, T, N, H].
          key: f[B, S, K, H].
          value: f[B, S, K, D].
          seen: i32[B, T] or i32[1, T].
          scale: of the scores.

        Returns:
          f32[B, T, N, D]. Cost O((S + T) D) a key head, and H times that for PReLU;
          memory O((S + T) D).
        """
        b, t, n, _ = out.shape
        seen = jax.tree.map(lambda x: jnp.broadcast_to(x, (b, t)), seen)
        value = heads_first(value).astype(jnp.float32)
        value = jnp.where(jnp.isfinite(value), value, 0.0)  # poison is in `out`
        out = self._add(out, query, heads_first(key), value, seen, scale)
        length = seen.count()[..., None]
        return self.divide(out, length, jnp.broadcast_to(length, (b, t, n)))

    def _add(self, out, query, key, value, seen, scale):
        """The sum over all keys, of keys f[B, K, S, H] and values f32[B, K, S, D]."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PReLU(_Closed):
    """PReLU attention weights: `max(x, 0) + slope min(x, 0)`.

    With `x = scale <q, k> - bias`. It is `slope x + (1 - slope) relu(x)`: the line is
    linear attention, summed over all visible keys in closed form, and only the keys
    above the bias are looked at. `Info.count` counts those.

    Args:
      slope: float, or an array that broadcasts to [B, T, N], such as one per head. May
        be traced and differentiated.
      bias: as in `hsrjax.ReLU`.
      normalize: "length" divides by the number of visible keys, "none" leaves the sum
        as it is. Weights may be negative, so there is no division by their sum.

    Raises:
      ValueError: normalize is "row_sum" or unknown.

    Cost: the line is O((S + T) H D) time and O((S + T) D) memory a key head; "hsr"
    scores the keys above the bias beside it.

    Example:
      >>> import hsrjax
      >>> hsrjax.PReLU(slope=0.1)
      PReLU(slope=0.1, bias=0.0, normalize='length')

    Source: Chen et al. 2024, section 8, names it as future work; He et al. 2015.
    """

    slope: jax.typing.ArrayLike = 0.25
    bias: jax.typing.ArrayLike = 0.0
    normalize: Divisor = dataclasses.field(default="length", metadata=_static)

    def prepare(self, rows: tuple[int, ...]) -> Activation:
        """The part that is summed key by key."""
        return ReLU(1, self.bias, "none").prepare(rows)

    def _add(self, out, query, key, value, seen, scale):
        b, t, n, _ = out.shape
        grouped = (b, t, value.shape[1], -1)
        a = scale_query(query, scale).reshape(*grouped, query.shape[-1])
        bias = per_row("bias", self.bias, (b, t, n)).reshape(grouped)
        line = _lines(jnp.moveaxis(a, 1, 2), key, value, seen)
        one_per_key_head = sum_ranges(value, seen)[:, :, :, None]
        line = line - jnp.moveaxis(bias, 1, 2)[..., None] * one_per_key_head
        slope = per_row("slope", self.slope, (b, t, n))[..., None]
        return (1.0 - slope) * out + slope * _by_query(line, out.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Saturating(Activation):
    """The weight `x + height` above 0, else `height exp(x / width)`; x = score - bias.

    Zero where it is less than half a unit in the last place of `height`.
    """

    height: float = dataclasses.field(metadata=_static)
    width: float = dataclasses.field(metadata=_static)
    bias: jax.typing.ArrayLike
    normalize: ClassVar[Literal["none"]] = "none"

    def edge(self) -> jax.typing.ArrayLike:
        """How far below the bias the weight is zero: exp(-17.4) < 2**-25."""
        return self.bias - 17.4 * self.width

    def weigh(self, scores: jax.Array) -> jax.Array:
        """More than what the weight is where it saturates."""
        x = scores - self.bias
        below = self.height * jnp.exp(jnp.where(x > 0, 0.0, x) / self.width)
        return jnp.where(
            self.fires(scores), jnp.where(x > 0, x + self.height, below), 0.0
        )


class _Saturates(_Closed):
    """Weights that are `-gain height` far below the bias."""

    bias: jax.typing.ArrayLike
    gain: ClassVar[float] = 1.0

    def law(self) -> Saturating:
        """What a key weighs more than where the weight saturates, without the gain."""
        raise NotImplementedError

    def prepare(self, rows: tuple[int, ...]) -> Activation:
        """The part that is summed key by key."""
        return self.law().prepare(rows)

    def _add(self, out, query, key, value, seen, scale):
        del key, scale
        constant = sum_ranges(value, seen)[:, :, :, None]
        group = query.shape[2] // value.shape[1]
        constant = jnp.broadcast_to(
            constant, (*constant.shape[:3], group, constant.shape[-1])
        )
        return self.gain * (out - self.law().height * _by_query(constant, out.shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CELU(_Saturates):
    """CELU attention weights: `max(x, 0) + min(0, alpha (exp(x / alpha) - 1))`.

    With `x = scale <q, k> - bias`. Below `x = -17.4 alpha` the weight is -alpha in
    float32: the sum of -alpha over all visible keys is a closed form, and only the keys
    above are looked at and add what they weigh more. The exact weights of the others
    are larger than -alpha by at most `2**-25 alpha` each. `Info.count` counts the keys
    above.

    Args:
      alpha: > 0, static.
      bias: as in `hsrjax.ReLU`.
      normalize: "length" or "none", as in `hsrjax.PReLU`.

    Raises:
      ValueError: alpha is no number > 0, normalize is "row_sum" or unknown.

    Cost: the constant is O((S + T) D) a key head; "hsr" scores the keys above
    `x = -17.4 alpha` beside it.

    Example:
      >>> import hsrjax
      >>> hsrjax.CELU(alpha=0.1)
      CELU(alpha=0.1, bias=0.0, normalize='length')

    Source: Chen et al. 2024, section 8, names it as future work; Barron 2017.
    """

    alpha: float = dataclasses.field(default=1.0, metadata=_static)
    bias: jax.typing.ArrayLike = 0.0
    normalize: Divisor = dataclasses.field(default="length", metadata=_static)

    def __post_init__(self):
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < jnp.inf:
            raise ValueError(
                f"CELU: alpha must be a Python number > 0, got {self.alpha!r}."
            )
        super().__post_init__()

    def law(self) -> Saturating:
        """As `_Saturates.law`."""
        return Saturating(float(self.alpha), float(self.alpha), self.bias)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SELU(_Saturates):
    """SELU attention weights: `1.0507 x` above 0, else `1.7581 (exp(x) - 1)`.

    With `x = scale <q, k> - bias`. As in `hsrjax.CELU`, only keys with x > -17.4 are
    looked at, and the exact weights of the others exceed theirs by at most
    `2**-25 * 1.7581`.

    Args:
      bias: as in `hsrjax.ReLU`.
      normalize: "length" or "none", as in `hsrjax.PReLU`.

    Raises:
      ValueError: normalize is "row_sum" or unknown.

    Cost: as `CELU` with alpha 1.

    Example:
      >>> import hsrjax
      >>> hsrjax.SELU(bias=1.0)
      SELU(bias=1.0, normalize='length')

    Source: Chen et al. 2024, section 8, names it as future work; Klambauer et al. 2017.
    """

    bias: jax.typing.ArrayLike = 0.0
    normalize: Divisor = dataclasses.field(default="length", metadata=_static)
    gain: ClassVar[float] = 1.0507009873554805

    def law(self) -> Saturating:
        """As `_Saturates.law`."""
        return Saturating(1.6732632423543772, 1.0, self.bias)


def sum_ranges(x: jax.Array, seen: Visible) -> jax.Array:
    """Sums f32[B, K, T, F] of x f32[B, K, S, F] over the keys that each query sees."""
    mean = jnp.mean(x, axis=-2, keepdims=True)
    running = _running_sum(x - mean)

    def before(i: jax.Array) -> jax.Array:
        rows = jnp.broadcast_to(i[:, None], (*x.shape[:2], i.shape[-1]))
        return take_rows(running, rows)

    total = before(seen.high)
    if seen.low is not None:
        total -= before(seen.low)
    if seen.sink_high is not None:
        total += before(seen.sink_high)
    if seen.sink_low is not None:
        total -= before(seen.sink_low)
    return total + seen.count().astype(jnp.float32)[:, None, :, None] * mean


def _lines(a, key, value, seen):
    """`sum_s <a, k_s> v_s` f32[B, K, T, G, D] over the keys s that each query sees.

    A coordinate of queries f32[B, K, T, G, H] and keys f[B, K, S, H] at a time.
    """
    key = key.astype(jnp.float32)
    wrong = jnp.any(~jnp.isfinite(key), axis=-1, keepdims=True)
    key = jnp.where(wrong, 0.0, key)

    @jax.checkpoint
    def coordinate(total, pair):
        of_queries, of_keys = pair
        found = sum_ranges(of_keys[..., None] * value, seen)
        return total + of_queries[..., None] * found[:, :, :, None], None

    pairs = jnp.moveaxis(a, -1, 0), jnp.moveaxis(key, -1, 0)
    start = jnp.zeros((*a.shape[:-1], value.shape[-1]), jnp.float32)
    total, _ = jax.lax.scan(
        coordinate, meshes.varying(start, pairs, value, seen), pairs
    )
    spoiled = sum_ranges(wrong.astype(jnp.float32), seen)[:, :, :, None] > 0.5
    return jnp.where(spoiled, jnp.nan, total)


def _running_sum(x: jax.Array) -> jax.Array:
    """Sums f32[..., S' + 1, F] of the first 0, 1, ... rows of f32[..., S, F].

    In blocks, as products with a triangle of ones; S' is S rounded up to whole blocks.
    """
    *lead, size, width = x.shape
    padding = [(0, 0)] * len(lead) + [(0, -size % _BLOCK), (0, 0)]
    blocks = jnp.pad(x, padding).reshape(*lead, -1, _BLOCK, width)
    ones = jnp.tril(jnp.ones((_BLOCK, _BLOCK), jnp.float32))
    inside = jnp.einsum("st,...tf->...sf", ones, blocks, precision="highest")
    ends = jnp.cumsum(inside[..., -1, :], axis=-2)
    first = jnp.zeros((*lead, 1, width), jnp.float32)
    starts = jnp.concatenate([first, ends[..., :-1, :]], axis=-2)
    found = (inside + starts[..., None, :]).reshape(*lead, -1, width)
    return jnp.concatenate([first, found], axis=-2)


def _by_query(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, K, T, G, D] as [B, T, N, D]."""
    return jnp.moveaxis(x, 2, 1).reshape(shape)
