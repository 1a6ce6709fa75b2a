"""The float64 result of every definition, in plain numpy: no code of hsrjax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks.harness.inputs import Inputs
from benchmarks.harness.timing import Score, relative_error

_CELLS = 1 << 22
"""Scores held at a time: 32 MB in float64."""
_ALL_ROWS = 1 << 31
"""Scores up to which every row is computed; beyond, rows spread over the sequence."""
_SOME_ROWS = 256


DEFINITIONS = ("relu", "softmax")
"""What can be scored."""


class Expected(NamedTuple):
    """What attention should be.

    Attributes:
      rows: i64[R], the query positions it was computed for.
      out: f64[B, R, N, D].
      firing: mean number of keys with a weight other than zero.
    """

    rows: np.ndarray
    out: np.ndarray
    firing: float


def scoring(inputs: Inputs) -> tuple[Score, Callable[[str], Expected]]:
    """What scores the outputs of a race, each by its own definition, worked out once.

    Returns:
      `score` of `race`, and what is expected by a definition.
    """
    expected = functools.cache(functools.partial(attend, inputs))

    def score(contestant, arrays):
        if contestant.definition not in DEFINITIONS:
            return None
        rows, out, _ = expected(contestant.definition)
        return relative_error(arrays[0][:, rows], out)

    return score, expected


def attend(inputs: Inputs, definition: str) -> Expected:
    """Attention in float64.

    Args:
      inputs: float32; they are taken as exact.
      definition: "relu" or "softmax".
    """
    b, t, n, _ = inputs.query.shape
    rows = np.arange(t)
    if b * n * t * inputs.key.shape[1] > _ALL_ROWS:
        rows = np.unique(np.linspace(0, t - 1, min(t, _SOME_ROWS)).astype(int))
    out = np.empty((b, rows.size, n, inputs.value.shape[-1]))
    firing = 0
    for i, head, part, tile in _tiles(inputs, definition, rows):
        firing += np.count_nonzero(tile.weights)
        out[i, part, head] = tile.weights @ tile.values / tile.total
    return Expected(rows, out, firing / (b * rows.size * n))


def gradients(
    inputs: Inputs, definition: str, cotangent: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Attention and the gradients of sum(out * cotangent), in float64.

    Args:
      inputs: float32.
      definition: "relu" or "softmax".
      cotangent: f32[B, T, N, D].

    Returns:
      out, dquery, dkey, dvalue.
    """
    out = np.zeros(cotangent.shape)
    dq, dk, dv = (np.zeros(x.shape) for x in (inputs.query, inputs.key, inputs.value))
    rows = np.arange(inputs.query.shape[1])
    for i, head, part, (keys, values, weights, slope, total) in _tiles(
        inputs, definition, rows
    ):
        shared, top = head // inputs.group, len(keys)
        upstream = cotangent[i, part, head].astype(np.float64)
        result = weights @ values / total
        dweights = upstream @ values.T
        if inputs.normalize == "row_sum" or definition == "softmax":
            dweights -= (upstream * result).sum(-1, keepdims=True)
        dscores = dweights * slope / total
        out[i, part, head] = result
        dq[i, part, head] = dscores @ keys
        dk[i, :top, shared] += dscores.T @ inputs.query[i, part, head]
        dv[i, :top, shared] += (weights / total).T @ upstream
    return out, dq, dk, dv


class _Tile(NamedTuple):
    """Some queries of a head against the keys that any of them sees.

    Attributes:
      keys: f64[S', H].
      values: f64[S', D].
      weights: f64[R, S'], before they are divided.
      slope: f64[R, S'], their derivatives by the score.
      total: f64[R, 1], what they are divided by; 1 for empty rows, which stay zero.
    """

    keys: np.ndarray
    values: np.ndarray
    weights: np.ndarray
    slope: np.ndarray
    total: np.ndarray


def _tiles(inputs: Inputs, definition: str, rows: np.ndarray):
    """Batch row, query head, slice of `rows` and `_Tile`, over all there are."""
    step = max(1, _CELLS // inputs.key.shape[1])
    for i, head in np.ndindex(inputs.query.shape[0], inputs.query.shape[2]):
        shared = head // inputs.group
        keys, values = (
            x[i, :, shared].astype(np.float64) for x in (inputs.key, inputs.value)
        )
        for first in range(0, rows.size, step):
            part = slice(first, min(first + step, rows.size))
            yield (
                i,
                head,
                part,
                _tile(inputs, definition, i, head, rows[part], keys, values),
            )


def _tile(inputs: Inputs, definition: str, i, head, at, keys, values) -> _Tile:
    visible = at + 1 if inputs.causal else np.full(at.size, len(keys))
    keys, values = keys[: visible.max()], values[: visible.max()]
    scores = inputs.query[i, at, head].astype(np.float64) @ keys.T
    hidden = np.arange(len(keys)) >= visible[:, None]
    if definition == "softmax":
        scores[hidden] = -np.inf
        weights = slope = np.exp(scores - scores.max(-1, keepdims=True))
    else:
        scores -= inputs.bias[i, at, head, None].astype(np.float64)
        scores[hidden] = 0.0
        np.maximum(scores, 0.0, out=scores)
        slope = inputs.power * scores ** (inputs.power - 1) * (scores > 0)
        weights = scores**inputs.power
    total = np.ones(at.size)
    if definition == "softmax" or inputs.normalize == "row_sum":
        total = weights.sum(-1)
        total[total == 0] = 1.0
    elif inputs.normalize == "length":
        total = visible.astype(np.float64)
    return _Tile(keys, values, weights, slope, total[:, None])
