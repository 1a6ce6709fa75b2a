"""Half-spaces of the paper's Gaussian model, counted by the engine.

Queries and keys are standard normal, scores <q, k> / sqrt(d). Four rules give each
query a half-space <q, k> >= offset:

    printed        sqrt(d) b, b = sigma_a sqrt(0.4 log n), sigma_a as in Lemma 6.1
    printed-query  b itself, as Algorithms 1 and 2 call HSR: the sqrt(d) is missing
    global         sqrt(d) sqrt(0.4 log n): the true sigma of a score, one for all rows
    repaired       |q| sqrt(0.4 log n): each row's own sigma
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

import hsrjax
from benchmarks.harness.members import judge, truth
from benchmarks.paper import printed

Rule = Literal["printed", "printed-query", "global", "repaired"]
RULES: tuple[Rule, ...] = get_args(Rule)
DELTA = 0.1
"""Probability with which Lemma 6.1 may fail."""
_AT_ONCE = 16
_CHECKED = 2


def draw(
    seed: Sequence[int], *, keys: int, rows: int, head_dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys f32[n, d] and queries f32[m, d]."""
    rng = np.random.default_rng(list(seed))
    size = (keys, head_dim)
    return (
        rng.standard_normal(size, dtype=np.float32),
        rng.standard_normal((rows, head_dim), dtype=np.float32),
    )


def sigmas(rule: Rule, queries: np.ndarray) -> np.ndarray:
    """The sigma f64[m] that a rule takes for that of a row's scores."""
    rows, d = queries.shape
    if rule == "repaired":
        norms = np.linalg.norm(queries, axis=-1)
        return np.asarray(hsrjax.theory.score_sigma(norms, d), np.float64)
    one = 1.0 if rule == "global" else printed.sigma(d, rows, DELTA)
    return np.full(rows, one)


def offsets(rule: Rule, queries: np.ndarray, keys: int) -> np.ndarray:
    """Offsets f32[m] of the half-spaces."""
    sigma = sigmas(rule, queries)
    bias = np.asarray(hsrjax.theory.threshold(keys, sigma=sigma), np.float64)
    root = 1.0 if rule == "printed-query" else math.sqrt(queries.shape[1])
    return (root * bias).astype(np.float32)


def expected(queries: np.ndarray, offset: np.ndarray, keys: int) -> float:
    """Mean over the rows of the number of keys that are expected in a half-space."""
    norms = np.linalg.norm(queries, axis=-1)
    counts = hsrjax.theory.expected_count(keys, offset, sigma=norms)
    return float(np.mean(np.asarray(counts, np.float64)))


def count(
    index: hsrjax.Index, queries: np.ndarray, offset: np.ndarray
) -> tuple[np.ndarray, str]:
    """Keys in each half-space, i64[m], and in words what is wrong with the first.

    Args:
      index: over the keys.
      queries: f32[m, d].
      offset: f32[m].
    """
    parts = []
    for first in range(0, len(queries), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        found = hsrjax.count(
            index, jnp.asarray(queries[part]), jnp.asarray(offset[part])
        )
        parts.append(np.asarray(found, np.int64))
    counts = np.concatenate(parts)
    keys = np.asarray(index.keys[: int(index.size)])
    pairs = zip(queries[:_CHECKED], offset[:_CHECKED], strict=True)
    truths = [truth(keys, *pair) for pair in pairs]
    return counts, judge(counts[:_CHECKED], truths)[1]


def counted(
    chosen: Sequence[Rule], stored: np.ndarray, queries: np.ndarray
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each rule on keys f32[n, d] and queries f32[m, d], and the faults."""
    (keys, dim), rows = stored.shape, len(queries)
    index = hsrjax.build(jnp.asarray(stored))
    found, wrong = [], []
    for rule in chosen:
        offset = offsets(rule, queries, keys)
        counts, fault = count(index, queries, offset)
        if fault:
            wrong.append(f"{rule}, {keys:,} keys of {dim}: {fault}")
        row = {"keys": keys, "head_dim": dim, "rows": rows, "rule": rule}
        row |= describe(counts, keys)
        found.append(row | {"expected": expected(queries, offset, keys)})
    return found, wrong


def describe(counts: np.ndarray, keys: int) -> dict[str, float | int]:
    """Columns that say how many of n keys were counted in m rows."""
    return {
        "mean": float(counts.mean()),
        "least": int(counts.min()),
        "most": int(counts.max()),
        "share_percent": 100 * float(counts.mean()) / keys,
        "empty_rows_percent": 100 * float(np.mean(counts == 0)),
        "rows_within_bound_percent": 100
        * float(np.mean(counts <= printed.count_bound(keys))),
    }
