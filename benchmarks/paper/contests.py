"""The contestants of `paper-time` on one size, and the float64 results to score by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hsrjax
from benchmarks.harness import internals
from benchmarks.harness.members import Truth, judge, truth
from benchmarks.harness.timing import Contestant, relative_error
from benchmarks.paper import rules

_SPARE = 1.25
_CHECKED_ROWS = 64
_AT_ONCE = 2**18

Found = tuple[list[Contestant], int, int | None]
"""Contestants, keys in the first row's half-space, and keys in reach of the balls."""


class Cell(NamedTuple):
    """One size.

    Attributes:
      task: "query", "decode" or "prefill".
      keys: n.
      head_dim: d.
      seed: of the keys.
    """

    task: str
    keys: int
    head_dim: int
    seed: int


def contestants(cell: Cell) -> Found:
    """All implementations on one size; their results are how far they are off."""
    rows = cell.keys if cell.task == "prefill" else 1
    seed = cell.seed, cell.keys, cell.head_dim
    keys, queries = rules.draw(seed, keys=cell.keys, rows=rows, head_dim=cell.head_dim)
    offset = rules.offsets("repaired", queries, cell.keys)
    if cell.task == "query":
        return _query(keys, queries, offset)
    values = np.random.default_rng(seed).standard_normal(keys.shape, dtype=np.float32)
    # Scores are plain inner products below: the offsets are the biases.
    relu = hsrjax.ReLU(power=1, bias=jnp.asarray(offset)[None, :, None])
    checked = slice(0, _CHECKED_ROWS)
    weights = queries[checked].astype(np.float64) @ keys.T.astype(np.float64)
    weights = np.maximum(weights - offset[checked, None], 0.0)
    expected = weights @ values / weights.sum(-1, keepdims=True)
    members = int(np.sum(weights[0] > 0))
    make = _decode if cell.task == "decode" else _prefill
    score = functools.partial(_off, expected=expected)
    return make(keys, queries, values, relu, score), members, None


def _contestant(name: str, call: Callable[[], Any], finish: Any) -> Contestant:
    def run() -> Any:
        return jax.block_until_ready(call())

    return Contestant(name, "part", prepare=lambda: lambda: run, finish=finish)


def _query(keys: np.ndarray, queries: np.ndarray, offset: np.ndarray) -> Found:
    exact = truth(keys, queries[0], float(offset[0]))
    members = exact.members.size
    capacity = int(_SPARE * members) + 32
    normals, at = jnp.asarray(queries), jnp.asarray(offset)
    indexes = {
        name: jax.block_until_ready(
            hsrjax.build(jnp.asarray(keys), reorder=name == "balls")
        )
        for name in ("balls", "sketch")
    }
    found = [
        _contestant(
            name,
            functools.partial(hsrjax.query, index, normals, at, capacity=capacity),
            functools.partial(_missed, exact=exact),
        )
        for name, index in indexes.items()
    ]
    scan = functools.partial(
        _scan, jnp.asarray(keys), normals[0], at[0], capacity=capacity
    )
    found.append(_contestant("scan", scan, functools.partial(_missed, exact=exact)))
    reach = internals.keys_in_reach(indexes["balls"], queries[0], offset[0])
    return found, members, reach


@functools.partial(jax.jit, static_argnames="capacity")
def _scan(keys, normal, offset, *, capacity):
    """Scores every key and lists those in the half-space."""
    inside = keys @ normal >= offset
    (ids,) = jnp.nonzero(inside, size=capacity, fill_value=keys.shape[0])
    return ids[None], None, jnp.sum(inside, dtype=jnp.int32)[None], None


def _missed(result: Any, *, exact: Truth) -> tuple[float]:
    """0 if the report is right, else 1."""
    ids, _, count, _ = result
    reported = [np.asarray(ids)[0, : int(np.asarray(count)[0])]]
    return (float(judge(reported, [exact])[1] != ""),)


def _off(result: Any, *, expected: np.ndarray) -> tuple[float]:
    out = np.asarray(result[0], np.float64)[0, : len(expected), 0]
    return (float(relative_error(out, expected)),)


def _decode(keys, queries, values, relu, score) -> list[Contestant]:
    """One step over a full cache: appending is not part of it."""
    n, d = keys.shape
    cache = hsrjax.init_cache(1, n, 1, d)
    for first in range(0, n, _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        cache = _extend(cache, keys[None, part, None], values[None, part, None])
    if d <= 8:
        cache = hsrjax.reindex(cache)
    cache, query = jax.block_until_ready(cache), jnp.asarray(queries)[None, :, None]
    decode = functools.partial(hsrjax.decode_attention, query, cache)
    return _by_both(decode, score, activation=relu)


@functools.partial(jax.jit, donate_argnums=0)
def _extend(cache, keys, values):
    return hsrjax.extend(cache, keys, values)


def _prefill(keys, queries, values, relu, score) -> list[Contestant]:
    operands = [jnp.asarray(x)[None, :, None] for x in (queries, keys, values)]
    attend = functools.partial(hsrjax.attention, *operands, return_info=True)
    return _by_both(attend, score, activation=relu)


def _by_both(attend: Callable[..., Any], score: Any, **options: Any):
    """hsr and dense."""
    return [
        _contestant(
            name, functools.partial(attend, method=name, scale=1.0, **options), score
        )
        for name in ("hsr", "dense")
    ]
