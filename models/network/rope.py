"""Rotary positions and the published ways of stretching them to longer rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

RopeKind = Literal["linear", "llama3", "longrope", "yarn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How a model's rotary wavelengths differ from `theta^(2j/H)`.

    Attributes:
      kind: "linear" divides every frequency by `factor`; "llama3" only those whose
        wavelength is long beside `original_length`, "yarn" likewise with a ramp over
        dimensions; "longrope" divides each frequency by a number of its own.
      factor: how many times longer the rows are meant to be than in training.
      original_length: positions of the original training.
      low_freq_factor: llama3: wavelengths above original_length / this are divided.
      high_freq_factor: llama3: wavelengths below original_length / this stay.
      beta_fast: yarn: dimensions with more turns within original_length stay.
      beta_slow: yarn: those with fewer are divided.
      truncate: yarn: whether the ramp begins and ends at whole dimensions.
      divisors: longrope: one number per pair of dimensions.
      long_divisors: longrope: those for rows longer than original_length.
      is_long: longrope: whether these are meant.
      attention_factor: what queries and keys are multiplied by; None is the kind's own
        (1, and for yarn and longrope a number that grows with log(factor)).

    Raises:
      ValueError: a field has the wrong type or an impossible value.
    """

    kind: RopeKind
    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()
    is_long: bool = False
    attention_factor: float | None = None

    def __post_init__(self):
        if self.kind not in get_args(RopeKind):
            raise ValueError(
                f"RopeScaling: kind must be one of {', '.join(get_args(RopeKind))}, "
                f"got {self.kind!r}."
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast"):
            _check_positive(name, getattr(self, name))
        _check_positive("beta_slow", self.beta_slow)
        if self.attention_factor is not None:
            _check_positive("attention_factor", self.attention_factor)
        if type(self.original_length) is not int or self.original_length < 1:
            raise ValueError(
                "RopeScaling: original_length must be a positive integer, got "
                f"{self.original_length!r}."
            )
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "RopeScaling: low_freq_factor must be below high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )
        for name in ("divisors", "long_divisors"):
            for number in getattr(self, name):
                _check_positive(name, number)
        for name in ("is_long", "truncate"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"RopeScaling: {name} must be a bool, got {getattr(self, name)!r}."
                )

    @classmethod
    def from_dict(cls, fields: Any) -> RopeScaling:
        """Inverse of `dataclasses.asdict`, trusting nothing.

        Raises:
          ValueError: not a dictionary of these fields.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not set(fields) <= known:
            raise ValueError(f"RopeScaling: expected fields of {sorted(known)}.")
        missing = {"kind", "factor", "original_length"} - set(fields)
        if missing:
            raise ValueError(f"RopeScaling: missing fields {sorted(missing)}.")
        tables = {}
        for name in ("divisors", "long_divisors"):
            tables[name] = fields.get(name, ())
            if not isinstance(tables[name], (list, tuple)) or len(tables[name]) > 2**12:
                raise ValueError(f"RopeScaling: {name} must be a list of numbers.")
        return cls(**{**fields, **{name: tuple(x) for name, x in tables.items()}})

    def for_length(self, tokens: int) -> RopeScaling:
        """The scaling of rows of so many tokens: all but longrope's are for any."""
        is_long = self.kind == "longrope" and tokens > self.original_length
        return dataclasses.replace(self, is_long=is_long)


def frequencies(
    rotary_dim: int, *, theta: float, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, float]:
    """What a position is multiplied by, pair by pair, and what a head is.

    f_j = theta^(-2j/R), then as `scaling` says.

    Args:
      rotary_dim: R, dimensions that turn; even.
      theta: base of the wavelengths.
      scaling: None leaves them as they are.

    Returns:
      f32[R/2], radians per position, and the factor of queries and keys.

    Raises:
      ValueError: longrope with another number of divisors than R/2.
    """
    base = np.float64(theta) ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
    if scaling is None:
        return base.astype(np.float32), 1.0
    if scaling.kind == "linear":
        found, gain = base / scaling.factor, 1.0
    elif scaling.kind == "llama3":
        found, gain = _llama3(base, scaling), 1.0
    elif scaling.kind == "yarn":
        found, gain = _yarn(base, theta, scaling), yarn_gain(scaling.factor)
    else:
        for divisors in (scaling.divisors, scaling.long_divisors):
            if len(divisors) != rotary_dim // 2:
                raise ValueError(
                    f"RopeScaling: longrope needs {rotary_dim // 2} divisors, one for "
                    f"each pair of dimensions, got {len(divisors)}."
                )
        divisors = scaling.long_divisors if scaling.is_long else scaling.divisors
        found = base / np.asarray(divisors, np.float64)
        gain = math.sqrt(
            1.0 + math.log(max(scaling.factor, 1.0)) / math.log(scaling.original_length)
        )
    if scaling.attention_factor is not None:
        gain = scaling.attention_factor
    return found.astype(np.float32), gain


def yarn_gain(factor: float, share: float = 1.0) -> float:
    """What yarn multiplies queries and keys by: 1 where rows are no longer."""
    return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths divided, short ones kept, a ramp between (Llama 3.1)."""
    turns = scaling.original_length * base / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return base * (kept + (1.0 - kept) / scaling.factor)


def _yarn(base: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Few turns divided, many kept, a ramp over dimensions (Peng et al., 2023)."""
    size = 2 * len(base)

    def dimension(turns: float) -> float:
        length = scaling.original_length / (turns * 2 * math.pi)
        return size * math.log(length) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (np.arange(len(base)) - low) / (high - low or 1e-3)
    kept = 1.0 - np.clip(ramp, 0.0, 1.0)
    return base * (kept + (1.0 - kept) / scaling.factor)


def rotate(
    heads: jax.Array,
    positions: jax.Array,
    *,
    theta: float,
    rotary_dim: int | None = None,
    scaling: RopeScaling | None = None,
) -> jax.Array:
    """Rotary position embedding: turns (x_j, x_{j + R/2}) by position * f_j.

    Args:
      heads: f[B, T, N, H].
      positions: i32[B, T]; B may be 1.
      theta: base of the wavelengths.
      rotary_dim: R, the first dimensions of a head that turn; even. None is H.
      scaling: see `frequencies`.

    Returns:
      f[B, T, N, H] of the same dtype; angles are computed in float32.
    """
    size = heads.shape[-1] if rotary_dim is None else rotary_dim
    frequency, gain = frequencies(size, theta=theta, scaling=scaling)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency[None, None, None]
    cos, sin = gain * jnp.cos(angle), gain * jnp.sin(angle)  # [B, T, 1, R/2]
    wide = heads.astype(jnp.float32)
    first, second = wide[..., : size // 2], wide[..., size // 2 : size]
    turned = [first * cos - second * sin, second * cos + first * sin, wide[..., size:]]
    return jnp.concatenate(turned, axis=-1).astype(heads.dtype)


def _check_positive(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(
            f"RopeScaling: {name} must be a positive number, got {value!r}."
        )
