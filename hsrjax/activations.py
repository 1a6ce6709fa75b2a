"""What turns scores into attention weights: ReLU^p and the three kinds of softmax.

Both are pytrees: `bias` and `epsilon` may be traced and `bias` differentiated; powers
and ranks are static.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

Normalize = Literal["row_sum", "length", "none"]
_NORMALIZE = ("row_sum", "length", "none")
_TAILS = (1, 2, 4, 8, 16, 32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bias"],
    meta_fields=["power", "normalize"],
)
@dataclasses.dataclass(frozen=True)
class ReLU:
    """ReLU^p attention weights: `relu(scale <q, k> - bias) ** power`.

    A key whose scaled score is at or below `bias` has weight exactly zero, so the keys
    that matter are a half-space and half-space reporting finds all of them.

    Args:
      power: p >= 1, the paper's alpha.
      bias: float, or an array that broadcasts to [B, T, N]: one per head is f[N], one
        per row is f[T, 1]. May be traced and differentiated.
      normalize: "row_sum" divides by the sum of the row's weights (the paper's D^-1;
        a row in which nothing fires is zero), "length" by the number of visible keys,
        "none" leaves the sum as it is (for models that normalise the output).

    Raises:
      ValueError: power is not an integer >= 1, or normalize is unknown.

    Example:
      >>> import hsrjax
      >>> hsrjax.ReLU(power=2, bias=0.5).power
      2

    Source: Chen et al. 2024, Definition 1.2.
    """

    power: int = 1
    bias: jax.typing.ArrayLike = 0.0
    normalize: Normalize = "row_sum"

    def __post_init__(self):
        if not _is_integer(self.power) or self.power < 1:
            raise ValueError(
                f"ReLU: power must be an integer >= 1, got {self.power!r}; "
                "use power=1 or 2."
            )
        if self.normalize not in _NORMALIZE:
            raise ValueError(
                f"ReLU: normalize must be one of {_NORMALIZE}, got {self.normalize!r}."
            )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["epsilon"],
    meta_fields=["top_r", "tail"],
)
@dataclasses.dataclass(frozen=True)
class Softmax:
    """Softmax attention weights: over all keys, the top r, or all but a mass epsilon.

    Args:
      top_r: keep the keys whose score is at least the r-th largest of the row; keys
        tied with the r-th are all kept. None keeps every key.
      epsilon: leave out keys that together hold at most this fraction of the row's
        softmax mass, 0 < epsilon < 1. May be traced.
      tail: what is left out acts all the same, through sketches: each key by its
        bounded score and by the 8-bit mean value of so many consecutive keys, 1, 2, 4,
        8, 16 or 32. An approximation of *full* softmax, with a bound in `Info`, that
        looks at no more keys: dense attention, which has all scores, is full softmax.
        Gradients take the tail for constant. None drops what is left out.

    Raises:
      ValueError: top_r < 1, epsilon outside (0, 1), or both given; tail is no such
        number, or nothing is left out.

    Example:
      >>> import hsrjax
      >>> hsrjax.Softmax(top_r=64)
      Softmax(top_r=64, epsilon=None, tail=None)

    Source: Chen et al. 2024, Definitions 1.1, B.1 and B.2; the epsilon rule is
    Theorem 4.3 with a measured certificate in place of its assumption. The tail is
    not in the paper: see `hsrjax.tail`.
    """

    top_r: int | None = None
    epsilon: jax.typing.ArrayLike | None = None
    tail: int | None = None

    def __post_init__(self):
        if self.top_r is not None and (not _is_integer(self.top_r) or self.top_r < 1):
            raise ValueError(
                f"Softmax: top_r must be an integer >= 1 or None, got {self.top_r!r}."
            )
        if isinstance(self.epsilon, (int, float)) and not 0.0 < self.epsilon < 1.0:
            raise ValueError(
                f"Softmax: epsilon must lie strictly between 0 and 1, got "
                f"{self.epsilon!r}; use Softmax() to keep every key."
            )
        if self.top_r is not None and self.epsilon is not None:
            raise ValueError(
                "Softmax: top_r and epsilon exclude each other, got "
                f"top_r={self.top_r!r} and epsilon={self.epsilon!r}; give one of them."
            )
        if self.tail is not None:
            check_tail(self.tail)
            if self.is_full:
                raise ValueError(
                    f"Softmax: tail={self.tail} is what keys left out contribute, got "
                    "neither top_r nor epsilon; give one of them."
                )

    @property
    def is_full(self) -> bool:
        """Whether every visible key keeps its weight."""
        return self.top_r is None and self.epsilon is None


Activation = ReLU | Softmax


def tail_of(activation: Activation) -> int | None:
    """Keys that share a mean value where what is left out acts too, else None."""
    return activation.tail if isinstance(activation, Softmax) else None


def dense_twin(activation: Activation) -> Activation:
    """What dense attention computes: full softmax where what is left out acts too."""
    return activation if tail_of(activation) is None else Softmax()


def check_tail(tail) -> None:
    """Raises ValueError unless so many consecutive keys may share a mean value."""
    if not _is_integer(tail) or tail not in _TAILS:
        raise ValueError(f"tail must be None or one of {_TAILS}, got {tail!r}.")


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def power_of(activation: Activation) -> int | None:
    """The static part of the weight function: p for ReLU^p, None for softmax."""
    return activation.power if isinstance(activation, ReLU) else None


def weigh(
    scores: jax.Array,
    offset: jax.Array,
    shift: jax.Array,
    *,
    power: int | None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Weights f32 of scores f32, one formula for dense and reported keys.

    ReLU^p: `relu(scores - offset) ** p`. Softmax: `exp(scores - shift)` where the
    score is at least `offset` or the key is a sink, else 0. NaN scores and offsets give
    NaN weights.
    """
    if power is not None:
        return jax.nn.relu(scores - offset) ** power
    kept = fires(scores, offset, power=power, sinks=sinks)
    return jnp.where(kept, jnp.exp(scores - shift), 0.0)


def fires(
    scores: jax.Array,
    offset: jax.Array,
    *,
    power: int | None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Whether a key takes part: its weight is not exactly zero by definition."""
    if power is not None:
        return ~(scores <= offset)
    reaches = ~(scores < offset)
    return reaches if sinks is None else reaches | sinks


def normalize_rows(
    activation: Activation, weighted: jax.Array, total: jax.Array, length: jax.Array
) -> jax.Array:
    """Divides sums of weighted values f32[..., D] as the activation asks.

    Args:
      activation: decides the divisor.
      weighted: f32[..., D], sum of weight times value over the row.
      total: f32[...], sum of the row's weights.
      length: i32[...], number of visible keys.
    """
    normalize = activation.normalize if isinstance(activation, ReLU) else "row_sum"
    if normalize == "none":
        return weighted
    if normalize == "length":
        total = length.astype(weighted.dtype)
    empty = total == 0
    divisor = jnp.where(empty, jnp.ones_like(total), total)
    return jnp.where(empty[..., None], 0.0, weighted / divisor[..., None])
