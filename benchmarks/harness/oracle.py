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
    s = inputs.key.shape[1]
    rows = np.arange(t)
    if b * n * t * s > _ALL_ROWS:
        rows = np.unique(np.linspace(0, t - 1, min(t, _SOME_ROWS)).astype(int))
    out = np.empty((b, rows.size, n, inputs.value.shape[-1]))
    firing = 0
    for i, head, keys, values in _heads(inputs):
        for part in _tiles(rows.size, s):
            at = rows[part]
            visible = _visible(inputs, at, s)
            weights, _ = _weights(inputs, definition, i, at, head, keys, visible)
            firing += np.count_nonzero(weights)
            top = weights.shape[1]
            total = _total(inputs, definition, weights, visible)
            out[i, part, head] = (weights @ values[:top]) / total[:, None]
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
    (b, t, n, _), s = inputs.query.shape, inputs.key.shape[1]
    out = np.zeros((b, t, n, inputs.value.shape[-1]))
    dq, dk, dv = (np.zeros(x.shape) for x in (inputs.query, inputs.key, inputs.value))
    for i, head, keys, values in _heads(inputs):
        shared = head // inputs.group
        for part in _tiles(t, s):
            at = np.arange(t)[part]
            visible = _visible(inputs, at, s)
            weights, slope = _weights(inputs, definition, i, at, head, keys, visible)
            top = weights.shape[1]
            total = _total(inputs, definition, weights, visible)[:, None]
            result = (weights @ values[:top]) / total
            upstream = cotangent[i, part, head].astype(np.float64)
            dweights = upstream @ values[:top].T
            if inputs.normalize == "row_sum" or definition == "softmax":
                dweights -= (upstream * result).sum(-1, keepdims=True)
            dscores = dweights * slope / total
            out[i, part, head] = result
            dq[i, part, head] = dscores @ keys[:top]
            dk[i, :top, shared] += dscores.T @ inputs.query[i, part, head]
            dv[i, :top, shared] += (weights / total).T @ upstream
    return out, dq, dk, dv


def _heads(inputs: Inputs):
    """Batch row, query head, and the keys and values of its key head in float64."""
    for i, shared in np.ndindex(inputs.key.shape[0], inputs.key.shape[2]):
        keys = inputs.key[i, :, shared].astype(np.float64)
        values = inputs.value[i, :, shared].astype(np.float64)
        for member in range(inputs.group):
            yield i, shared * inputs.group + member, keys, values


def _tiles(rows: int, keys: int):
    step = max(1, _CELLS // keys)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _visible(inputs: Inputs, at: np.ndarray, keys: int) -> np.ndarray:
    """Number of keys that the queries at these positions see."""
    return at + 1 if inputs.causal else np.full(at.size, keys)


def _weights(inputs, definition, i, at, head, keys, visible):
    """Weights before normalisation and their derivatives by the score.

    Keys that no query of the tile sees are left out.
    """
    keys = keys[: visible.max()]
    scores = inputs.query[i, at, head].astype(np.float64) @ keys.T
    hidden = np.arange(len(keys)) >= visible[:, None]
    if definition == "softmax":
        scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights, weights
    scores -= inputs.bias[i, at, head, None].astype(np.float64)
    scores[hidden] = 0.0
    np.maximum(scores, 0.0, out=scores)
    slope = inputs.power * scores ** (inputs.power - 1) * (scores > 0)
    return scores**inputs.power, slope


def _total(inputs, definition, weights, visible) -> np.ndarray:
    """What the weights are divided by; 1 for empty rows, which stay zero."""
    if definition == "softmax" or inputs.normalize == "row_sum":
        total = weights.sum(-1)
        return np.where(total == 0, 1.0, total)
    if inputs.normalize == "length":
        return visible.astype(np.float64)
    return np.ones(len(weights))
