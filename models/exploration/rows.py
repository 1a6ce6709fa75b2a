"""What the heads of a layer do at every query of a text: counts, bounds, best keys."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hsrjax
from models.network.attention import Rule
from models.network.config import Method
from models.network.operands import Operands

CELLS = 32
"""Cells of a side of the small picture of a head."""
MOST_KEYS = 64
"""Keys that are listed for a query, at most."""
LEAST_KEYS = 4
"""Keys that are listed where fewer fire: what came nearest."""
_QUERIES = 256
"""Queries whose scores exist at the same time."""
_MASS = 0.9
"""Share of a softmax row for which keys are counted."""


class Head(NamedTuple):
    """What one head did; T queries, C = MOST_KEYS keys of each, the best score first.

    Attributes:
      count: i32[T], keys that fire.
      possible: i32[T], visible keys whose bound reaches the threshold.
      looked: i32[T], keys whose exact score a decoding step computes.
      soft: i32[T], keys that hold 90 % of the mass under full softmax of these scores.
      threshold: f32[T], the score that a key needs to fire.
      slack: f32[T], no score is further from the middle of its bounds.
      mass: f32[T], log of the sum of exp(score): full softmax's normaliser.
      missed: f32[T], bound on the share of softmax mass left out.
      error: f32[T], bound on the error of the output.
      kept: i32[T], keys that are listed.
      keys: i32[T, C], which they are; anything from `kept` on.
      scores: f32[T, C], their scores.
      shares: f32[T, C], their shares of the weights of the row; 0 if they do not fire.
    """

    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]
    possible: np.ndarray
    looked: np.ndarray
    soft: np.ndarray
    threshold: np.ndarray
    slack: np.ndarray
    mass: np.ndarray
    missed: np.ndarray
    error: np.ndarray
    kept: np.ndarray
    keys: np.ndarray
    scores: np.ndarray
    shares: np.ndarray


class Scores(NamedTuple):
    """All scores of some queries, -inf where a key is not visible.

    Attributes:
      exact: f32[N, Q, S].
      upper: f32[N, Q, S], bounds by the sketch.
      slack: f32[N, Q].
    """

    exact: np.ndarray
    upper: np.ndarray
    slack: np.ndarray


def power_of(rule: Rule) -> int | None:
    """The power p of weights (score - threshold)^p; None where they are exp(score)."""
    if isinstance(rule, hsrjax.Entmax):
        return 2
    return rule.power if isinstance(rule, hsrjax.ReLU) else None


def heads_of(
    operands: Operands,
    *,
    window: int | None,
    method: Method,
) -> list[Head]:
    """Every head of a layer, at every query.

    Args:
      operands: of the layer, of one row of T tokens.
      window: keys a query sees, itself included; None is all.
      method: "hsr" counts what is looked at through the index, "dense" everything.

    Returns:
      N heads. Queries are asked one by one, as in decoding, of an index over the whole
      text, of which they see the part up to themselves.
    """
    info = map(np.asarray, _decoded(operands, window=window, method=method))
    info = dict(zip(hsrjax.Info._fields, info, strict=True))
    parts = []
    for at, scores in _scores(operands, window=window):
        edges = _edges(operands, at)
        parts.append(
            [
                _head(
                    operands.activation,
                    Scores(*(x[head] for x in scores)),
                    edges[head],
                    {name: field[at, head] for name, field in info.items()},
                )
                for head in range(operands.query.shape[2])
            ]
        )
    by_head = zip(*parts, strict=True)
    return [Head(*map(np.concatenate, zip(*x, strict=True))) for x in by_head]


def pictures(
    operands: Operands, counts: np.ndarray, *, window: int | None, stride: int
) -> np.ndarray:
    """Where the weights of every head lie: mean share of a cell, f32[N, M, M].

    Args:
      operands: of the layer, of one row of T tokens.
      counts: i32[T, N], keys that fire.
      window: keys a query sees.
      stride: of every so many queries one is drawn.

    Returns:
      For each cell what part of the weights of its queries falls on its keys; M is
      CELLS, or T where that is less.
    """
    length, heads = counts.shape
    side = min(CELLS, length)
    columns = np.arange(side) * length // side  # about the first key of each cell
    sums = np.zeros((heads, side, side), np.float32)
    drawn = np.zeros(side, np.float32)
    for at, scores in _scores(operands, window=window, stride=stride):
        rows = at * side // length
        np.add.at(drawn, rows, 1)
        edges = _edges(operands, at)
        for head in range(heads):
            exact, number = scores.exact[head], counts[at, head]
            ranked = np.sort(exact, axis=-1)[:, ::-1]
            edge = _threshold(operands.activation, edges[head], ranked, number)
            share = _normal(_weights(operands.activation, exact, edge, ranked[:, :1]))
            by_cell = np.add.reduceat(share, columns, axis=-1)
            np.add.at(sums[head], rows, by_cell)
    return sums / np.maximum(drawn, 1)[:, None]


@functools.partial(jax.jit, static_argnames=("window", "method"))
def _decoded(operands: Operands, *, window: int | None, method: Method) -> hsrjax.Info:
    """What hsrjax says of every query asked alone, fields [T, N]."""
    query, activation = operands.query, operands.activation
    cache = _cache(operands)

    def step(at: jax.Array) -> hsrjax.Info:
        _, info = hsrjax.decode_attention(
            jax.lax.dynamic_slice_in_dim(query, at, 1, axis=1),
            cache,
            activation=_at(activation, at),
            method=method,
            window=window,
            scale=1.0,
            positions=at[None, None],
        )
        return jax.tree.map(lambda x: x[0, 0], info)

    return jax.lax.map(step, jnp.arange(query.shape[1], dtype=jnp.int32))


def _cache(operands: Operands) -> hsrjax.KVCache:
    """What decoding has read when it is at the end of the text."""
    _, length, kv_heads, size = operands.key.shape
    width = operands.value.shape[-1]
    cache = hsrjax.init_cache(1, length, kv_heads, size, value_dim=width)
    return hsrjax.extend(cache, operands.key, operands.value)


def _at(activation: Rule, at: jax.Array) -> Rule:
    """The rule of one query."""
    if not isinstance(activation, hsrjax.ReLU):
        return activation
    bias = jax.lax.dynamic_slice_in_dim(jnp.asarray(activation.bias), at, 1, axis=1)
    return hsrjax.ReLU(activation.power, bias, activation.normalize)


def _scores(
    operands: Operands, *, window: int | None, stride: int = 1
) -> Iterator[tuple[np.ndarray, Scores]]:
    """Numbers of queries i[Q] and their scores, some at a time."""
    index = _cache(operands).index
    length = operands.query.shape[1]
    chosen = np.arange(0, length, stride, dtype=np.int32)
    for first in range(0, len(chosen), _QUERIES):
        at = chosen[first : first + _QUERIES]
        found = _score(index, operands.query[0, at], at, length=length, window=window)
        yield at, Scores(*map(np.asarray, found))


@functools.partial(jax.jit, static_argnames=("length", "window"))
def _score(
    index: hsrjax.Index,
    query: jax.Array,
    at: jax.Array,
    *,
    length: int,
    window: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Scores` of queries f32[Q, N, H] that stand at i[Q], by all T keys."""
    number, heads, size = query.shape
    kv_heads = index.keys.shape[1]
    group = heads // kv_heads
    rows = jnp.moveaxis(query.reshape(number, kv_heads, group, size), 0, 2)
    rows = rows.reshape(1, kv_heads, group * number, size)
    exact = jnp.einsum("bkqh,bksh->bkqs", rows, index.keys, precision="highest")
    lower, upper = index.sketch.intervals(rows)
    slot, last = jnp.arange(length)[None, None], at[None, :, None]
    seen = slot <= last
    if window is not None:
        seen &= slot > last - window

    def by_head(x: jax.Array) -> jax.Array:
        return x[..., :length].reshape(heads, number, length)

    exact, lower, upper = map(by_head, (exact, lower, upper))
    slack = jnp.max(jnp.where(seen, (upper - lower) / 2, 0.0), axis=-1)
    return jnp.where(seen, exact, -jnp.inf), jnp.where(seen, upper, -jnp.inf), slack


def _edges(operands: Operands, at: np.ndarray) -> np.ndarray:
    """Thresholds f32[N, Q] that are known before any score; -inf where none is."""
    rule, heads = operands.activation, operands.query.shape[2]
    if not isinstance(rule, hsrjax.ReLU):
        return np.full((heads, len(at)), -np.inf, np.float32)
    return np.asarray(rule.bias)[0, at].T


def _head(rule: Rule, scores: Scores, edge: np.ndarray, info: dict) -> Head:
    """Of some queries; `info` holds the fields [Q] of `hsrjax.Info`."""
    exact, upper, slack = scores
    count = info["count"]
    visible = np.sum(exact > -np.inf, axis=-1)
    ranked = np.sort(exact, axis=-1)[:, ::-1]
    threshold = _threshold(rule, edge, ranked, count)
    peak = ranked[:, :1]
    mass = np.exp(ranked - peak)
    reached = np.cumsum(mass, axis=-1)
    soft = 1 + np.sum(reached < _MASS * reached[:, -1:], axis=-1)
    weights = _weights(rule, ranked, threshold, peak)
    weights[np.arange(ranked.shape[-1]) >= count[:, None]] = 0  # up to rounding
    most = min(MOST_KEYS, ranked.shape[-1])
    return Head(
        count=count,
        possible=np.sum(upper >= threshold[:, None], axis=-1),
        looked=info["candidates"],
        soft=soft,
        threshold=threshold,
        slack=slack,
        mass=peak[:, 0] + np.log(reached[:, -1]),
        missed=info["missed_mass"],
        error=info["error_bound"],
        kept=np.minimum(np.maximum(count, LEAST_KEYS), np.minimum(visible, most)),
        keys=_best(exact, most),
        scores=ranked[:, :most],
        shares=_normal(weights)[:, :most],
    )


def _best(scores: np.ndarray, most: int) -> np.ndarray:
    """Numbers i[Q, C] of the best keys, the best first."""
    some = np.argpartition(-scores, most - 1, axis=-1)[:, :most]
    order = np.argsort(-np.take_along_axis(scores, some, -1), axis=-1, kind="stable")
    return np.take_along_axis(some, order, -1)


def _threshold(
    rule: Rule, edge: np.ndarray, ranked: np.ndarray, count: np.ndarray
) -> np.ndarray:
    """The score f32[Q] that a key needs to fire, from scores in falling order."""
    if isinstance(rule, hsrjax.ReLU):
        return edge
    at = np.maximum(count - 1, 0)[:, None]
    if not isinstance(rule, hsrjax.Entmax):
        return np.take_along_axis(ranked, at, -1)[:, 0]
    # Of the k keys that fire, the sum of (s / 2 - tau)^2 is 1.
    fires = np.arange(ranked.shape[-1]) < count[:, None]
    halves, number = np.where(fires, ranked / 2, 0), np.maximum(count, 1)
    mean = halves.sum(-1) / number
    spread = np.where(fires, (halves - mean[:, None]) ** 2, 0).sum(-1)
    return 2 * (mean - np.sqrt(np.maximum(1 - spread, 0) / number))


def _weights(
    rule: Rule, scores: np.ndarray, threshold: np.ndarray, peak: np.ndarray
) -> np.ndarray:
    """Weights f32[Q, S] up to a factor of the row."""
    power, above = power_of(rule), scores - threshold[:, None]
    if power is None:
        return np.where(above >= 0, np.exp(scores - peak), 0)
    return np.maximum(above, 0) ** power


def _normal(weights: np.ndarray) -> np.ndarray:
    """Divided by the sum of the row, where there is one."""
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)
