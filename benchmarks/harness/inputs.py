"""What is attended to: Gaussian, clustered or captured, with a threshold per row.

Thresholds lie between the scores of the last key that is to fire and the next one, so
the number of firing keys is exact. They are part of the input and outside any timer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from benchmarks.files import captured
from benchmarks.harness.loops import Loop

Kind = Literal["gaussian", "clustered", "captured"]
DType = Literal["float32", "bfloat16"]

LEAST_FIRING = 16
"""Keys that fire in a causal row at least (or all, if fewer are visible): a sum of very
few weights near zero is as inexact in float32 as its smallest terms."""

_CLUSTERS, _RUN, _SPREAD = 64, 32, 0.45


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Attention inputs, in float32 arrays of numpy, or on the device in the dtype.

    Attributes:
      query: [B, T, N, H], scaled already: the score is the plain inner product.
      key: [B, S, K, H].
      value: [B, S, K, D].
      bias: [B, T, N], the threshold of each row.
      power: of the ReLU.
      normalize: as in `hsrjax.ReLU`.
      causal: query i sees keys 0..i (then T = S); else all.
      dtype: in which query, key and value are handed over; they are exact in it.
      loop: how contestants repeat their steps in one program; None is a step a call.
    """

    query: Any
    key: Any
    value: Any
    bias: Any
    power: int = 2
    normalize: Any = "row_sum"
    causal: bool = False
    dtype: DType = "float32"
    loop: Loop | None = None

    def on_device(self, x: Any) -> jax.Array:
        """A part of query, key or value, in the dtype."""
        return jnp.asarray(x, self.dtype)

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query.shape[2] // self.key.shape[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """How large inputs are to be."""

    keys: int
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    batch: int = 1
    value_dim: int = 64


@dataclasses.dataclass(frozen=True)
class Source:
    """Where inputs come from."""

    kind: Kind = "gaussian"
    captured: Path | None = None
    seed: int = 0
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        """Refuses a kind without its file and a file without its kind."""
        if (self.kind == "captured") != (self.captured is not None):
            raise ValueError(
                "--inputs captured and --captured FILE belong together: make the file "
                "with python -m benchmarks.capture"
            )
        if self.dtype != "float32" and self.kind == "captured":
            raise ValueError("--dtype bfloat16 does not go with captured inputs")

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """The nearest numbers of the dtype, as float32."""
        return x.astype(jnp.dtype(self.dtype)).astype(np.float32)


def decode(source: Source, shape: Shape, fires: int) -> Inputs:
    """The newest query against all keys.

    Args:
      source: kind and seed; a captured file brings its own heads and thresholds.
      shape: S keys and so on; of a captured file only `keys` counts.
      fires: keys that fire in each row, where the file has no thresholds.
    """
    if source.captured is not None:
        return _captured(source.captured, shape.keys, lambda visible: fires, last=True)
    rng = np.random.default_rng([source.seed, *dataclasses.astuple(shape)])
    drawn = (*_draw(rng, source.kind, shape, queries=1), _draw_values(rng, shape))
    query, key, value = map(source.rounded, drawn)
    bias = thresholds(query, key, lambda visible: fires, causal=False)
    return Inputs(query=query, key=key, value=value, bias=bias, dtype=source.dtype)


def causal(source: Source, shape: Shape, share: float, *, exact: bool = True) -> Inputs:
    """A whole sequence attending to itself.

    Args:
      source: as in `decode`.
      shape: S keys and as many queries.
      share: of the visible keys that fire in each row, at least 16 keys.
      exact: whether exactly so many fire, or (Gaussian only, and much faster) on
        average.
    """

    def fires(visible: int) -> int:
        return max(LEAST_FIRING, round(share * visible))

    if source.captured is not None:
        return _captured(source.captured, shape.keys, fires, last=False)
    rng = np.random.default_rng([source.seed, *dataclasses.astuple(shape)])
    query, key = _draw(rng, source.kind, shape, queries=shape.keys)
    value = _draw_values(rng, shape)
    if exact or source.kind != "gaussian":
        bias = thresholds(query, key, fires, causal=True)
    else:
        bias = np.linalg.norm(query, axis=-1) * np.float32(stats.norm.isf(share))
    return Inputs(query=query, key=key, value=value, bias=bias, causal=True)


def range_keys(source: Source, *, keys: int, head_dim: int, queries: int):
    """Stored keys f32[S, H] and normals f32[T, H] for range search."""
    if source.captured is not None:
        loaded = captured.load(source.captured)
        key, query = loaded.key[0, :, 0], loaded.query[0, :, 0]
        rows = np.linspace(0, len(query) - 1, queries).astype(int)
        return key[:keys], query[rows]
    rng = np.random.default_rng([source.seed, keys, head_dim])
    shape = Shape(keys=keys, heads=1, kv_heads=1, head_dim=head_dim)
    query, key = _draw(rng, source.kind, shape, queries=queries)
    return key[0, :, 0], query[0, :, 0]


def thresholds(
    query: np.ndarray, key: np.ndarray, fires: Callable[[int], int], *, causal: bool
) -> np.ndarray:
    """Thresholds above which exactly so many keys score in each row.

    Args:
      query: f32[B, T, N, H].
      key: f32[B, S, K, H].
      fires: number of firing keys, of the number of visible keys.
      causal: query i sees keys 0..i; else all.

    Returns:
      f32[B, T, N].
    """
    (b, t, n, _), (s, kv_heads) = query.shape, key.shape[1:3]
    bias = np.empty((b, t, n), np.float32)
    rows = max(1, (1 << 23) // s)
    for i, head in np.ndindex(b, n):
        keys = np.ascontiguousarray(key[i, :, head * kv_heads // n])
        for first in range(0, t, rows):
            scores = query[i, first : first + rows, head] @ keys.T
            for row, line in enumerate(scores, start=first):
                visible = line[: row + 1] if causal else line
                bias[i, row, head] = _between(visible, fires(visible.size))
    return bias


def _between(scores: np.ndarray, fires: int) -> float:
    """A number that exactly `fires` of the scores exceed."""
    if fires >= scores.size:
        return float(scores.min()) - 1.0
    place = scores.size - fires
    ordered = np.partition(scores, (place - 1, place))
    return (float(ordered[place - 1]) + float(ordered[place])) / 2


def _draw(rng, kind: Kind, shape: Shape, *, queries: int):
    """Queries, scaled, and keys."""
    b, n, k, h = shape.batch, shape.heads, shape.kv_heads, shape.head_dim
    query = _vectors(rng, kind, (b, queries, n, h)) / np.float32(math.sqrt(h))
    return query, _vectors(rng, kind, (b, shape.keys, k, h))


def _draw_values(rng, shape: Shape) -> np.ndarray:
    size = (shape.batch, shape.keys, shape.kv_heads, shape.value_dim)
    return rng.standard_normal(size, dtype=np.float32)


def _vectors(rng, kind: Kind, shape: tuple[int, ...]) -> np.ndarray:
    """Standard Gaussian, or runs of vectors around shared centres of the same norm."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if kind == "gaussian":
        return noise
    centres = np.random.default_rng(0).standard_normal((_CLUSTERS, shape[-1]))
    runs = rng.integers(_CLUSTERS, size=(-(-shape[1] // _RUN), *shape[2:-1]))
    which = np.repeat(runs, _RUN, axis=0)[: shape[1]]
    near = np.float32(math.sqrt(1 - _SPREAD**2))
    return near * centres.astype(np.float32)[which][None] + _SPREAD * noise


def _captured(path: Path, keys: int, fires, *, last: bool) -> Inputs:
    """The first `keys` tokens of a captured file."""
    loaded = captured.load(path)
    tokens = loaded.key.shape[1]
    if tokens < keys:
        raise ValueError(
            f"{path.name} holds {tokens} tokens, fewer than the {keys} asked for: "
            "capture more or give smaller --keys"
        )
    rows = slice(keys - 1, keys) if last else slice(0, keys)
    query, key = loaded.query[:, rows], loaded.key[:, :keys]
    if loaded.bias is None:
        bias = thresholds(query, key, fires, causal=not last)
    else:
        bias = loaded.bias[:, rows]
    return Inputs(
        query=query,
        key=key,
        value=loaded.value[:, :keys],
        bias=bias,
        power=loaded.about["power"],
        normalize=loaded.about["normalize"],
        causal=not last,
    )


def captured_tokens(path: Path) -> int:
    """Tokens that a captured file holds."""
    return captured.load(path).key.shape[1]
