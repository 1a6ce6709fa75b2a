"""What turns scores into attention weights.

ReLU^p and the three kinds of softmax, and beyond the paper's theorems what its section
8 asks for (PReLU, CELU, SELU) and entmax. All are pytrees: `bias`, `slope` and
`epsilon` may be traced, the first two differentiated; all else is static.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from hsrjax.weights import Law, Saturating

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


Divisor = Literal["length", "none"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["slope", "bias"],
    meta_fields=["normalize"],
)
@dataclasses.dataclass(frozen=True)
class PReLU:
    """PReLU attention weights: `max(x, 0) + slope min(x, 0)`, x = scale <q, k> - bias.

    `slope x + (1 - slope) relu(x)`: the line is linear attention, summed over all
    visible keys in closed form, and only the keys above the bias are looked at.
    `Info.count` counts those.

    Args:
      slope: float, or an array that broadcasts to [B, T, N], such as one per head. May
        be traced and differentiated.
      bias: as in `hsrjax.ReLU`.
      normalize: "length" divides by the number of visible keys, "none" leaves the sum
        as it is. Weights may be negative, so there is no division by their sum.

    Raises:
      ValueError: normalize is "row_sum" or unknown.

    Example:
      >>> import hsrjax
      >>> hsrjax.PReLU(slope=0.1)
      PReLU(slope=0.1, bias=0.0, normalize='length')

    Source: Chen et al. 2024, section 8, names it as future work; He et al. 2015.
    """

    slope: jax.typing.ArrayLike = 0.25
    bias: jax.typing.ArrayLike = 0.0
    normalize: Divisor = "length"

    def __post_init__(self):
        _check_divisor(self)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bias"],
    meta_fields=["alpha", "normalize"],
)
@dataclasses.dataclass(frozen=True)
class CELU:
    """CELU attention weights: x or `alpha (exp(x / alpha) - 1)`, whichever is the less.

    With x = scale <q, k> - bias. Below x = -17.4 alpha the weight is -alpha in float32:
    the sum of -alpha over all visible keys is a closed form, and only the keys above
    are looked at and add what they weigh more. The exact weights of the others are
    larger than -alpha by at most `2**-25 alpha` each. `Info.count` counts the keys
    above.

    Args:
      alpha: > 0, static.
      bias: as in `hsrjax.ReLU`.
      normalize: "length" or "none", as in `hsrjax.PReLU`.

    Raises:
      ValueError: alpha is no number > 0, normalize is "row_sum" or unknown.

    Example:
      >>> import hsrjax
      >>> hsrjax.CELU(alpha=0.1)
      CELU(alpha=0.1, bias=0.0, normalize='length')

    Source: Chen et al. 2024, section 8, names it as future work; Barron 2017.
    """

    alpha: float = 1.0
    bias: jax.typing.ArrayLike = 0.0
    normalize: Divisor = "length"
    gain: ClassVar[float] = 1.0

    def __post_init__(self):
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < jnp.inf:
            raise ValueError(
                f"CELU: alpha must be a Python number > 0, got {self.alpha!r}."
            )
        _check_divisor(self)

    @property
    def law(self) -> Saturating:
        """What a key weighs more than where CELU saturates."""
        return Saturating(float(self.alpha), float(self.alpha))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["bias"], meta_fields=["normalize"]
)
@dataclasses.dataclass(frozen=True)
class SELU:
    """SELU attention weights: `1.0507 x` above 0, else `1.7581 (exp(x) - 1)`.

    With x = scale <q, k> - bias. As in `hsrjax.CELU`, only keys with x > -17.4 are
    looked at, and the exact weights of the others exceed theirs by at most
    `2**-25 * 1.7581`.

    Args:
      bias: as in `hsrjax.ReLU`.
      normalize: "length" or "none", as in `hsrjax.PReLU`.

    Raises:
      ValueError: normalize is "row_sum" or unknown.

    Example:
      >>> import hsrjax
      >>> hsrjax.SELU(bias=1.0)
      SELU(bias=1.0, normalize='length')

    Source: Chen et al. 2024, section 8, names it as future work; Klambauer et al. 2017.
    """

    bias: jax.typing.ArrayLike = 0.0
    normalize: Divisor = "length"
    gain: ClassVar[float] = 1.0507009873554805

    def __post_init__(self):
        _check_divisor(self)

    @property
    def law(self) -> Saturating:
        """What a key weighs more than where SELU saturates, without the gain."""
        return Saturating(height=1.6732632423543772, width=1.0)


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


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[], meta_fields=["alpha"]
)
@dataclasses.dataclass(frozen=True)
class Entmax:
    """Entmax attention weights: `relu((alpha - 1) s - tau)^(1 / (alpha - 1))`.

    With s = scale <q, k> and, in every row, the tau for which they sum to one: softmax
    with exact zeros. Bounds on the scores bound tau, so that half-space reporting finds
    the keys which may weigh anything; their scores make tau exact, and gradients
    include its own.

    Args:
      alpha: 1.5, or 2.0 which is sparsemax; static.

    Raises:
      ValueError: another alpha.

    Example:
      >>> import hsrjax
      >>> hsrjax.Entmax(alpha=2.0)
      Entmax(alpha=2.0)

    Source: Peters, Niculae, Martins 2019; Martins, Astudillo 2016. Not in the paper.
    """

    alpha: float = 1.5

    def __post_init__(self):
        if self.alpha not in (1.5, 2.0):
            raise ValueError(
                f"Entmax: alpha must be 1.5 or 2.0, got {self.alpha!r}; softmax, which "
                "is alpha = 1, is hsrjax.Softmax()."
            )

    @property
    def power(self) -> int:
        """1 / (alpha - 1): with tau for a bias this is ReLU^p attention."""
        return 2 if self.alpha == 1.5 else 1


Activation = ReLU | Softmax | PReLU | CELU | SELU | Entmax


def selects(activation: Activation) -> bool:
    """Whether all scores of a row are needed to say which keys take part."""
    if isinstance(activation, Softmax):
        return not activation.is_full
    return isinstance(activation, Entmax)


def core_of(activation: Activation) -> Activation:
    """What is left to sum over keys when closed forms (`hsrjax.closed`) are taken out.

    `activation` itself where there are none.
    """
    if isinstance(activation, PReLU):
        return ReLU(1, activation.bias, "none")
    if isinstance(activation, (CELU, SELU)):
        return dataclasses.replace(activation, normalize="none")
    return activation


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


def _check_divisor(activation) -> None:
    if activation.normalize not in ("length", "none"):
        raise ValueError(
            f"{type(activation).__name__}: normalize must be 'length' or 'none', got "
            f"{activation.normalize!r}: weights may be negative, and their sum zero."
        )


def law_of(activation: Activation) -> Law:
    """How the keys weigh that are summed one by one, of what `core_of` leaves."""
    if isinstance(activation, (ReLU, Entmax)):
        return activation.power
    return activation.law if isinstance(activation, (CELU, SELU)) else None


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
    normalize = getattr(activation, "normalize", "row_sum")
    if normalize == "none":
        return weighted
    if normalize == "length":
        total = length.astype(weighted.dtype)
    empty = total == 0
    divisor = jnp.where(empty, jnp.ones_like(total), total)
    return jnp.where(empty[..., None], 0.0, weighted / divisor[..., None])
