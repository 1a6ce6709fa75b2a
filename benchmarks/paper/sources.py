"""Random keys for which the paper says that massive activation holds (Remark B.4)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from benchmarks.paper.heads import Head

HEAD_DIM = 64
SPREAD = 0.45
"""Of a key around the centre of its cluster; key coordinates have variance 1."""

Draw = Callable[..., Head]


def gaussian(rng: np.random.Generator, *, keys: int, rows: int, kept: int) -> Head:
    """Standard normal queries, keys and values."""
    del kept
    return _head(rng, _normal(rng, rows), _normal(rng, keys))


def laplace(rng: np.random.Generator, *, keys: int, rows: int, kept: int) -> Head:
    """Keys of the symmetric multivariate Laplace law: sqrt(E) z, E exponential."""
    del kept
    mixed = np.sqrt(rng.exponential(size=(keys, 1)))
    return _head(rng, _normal(rng, rows), mixed * _normal(rng, keys))


def clusters(rng: np.random.Generator, *, keys: int, rows: int, kept: int) -> Head:
    """n^(1 - gamma) clusters of n^gamma keys; queries come from the same clusters."""
    whole = keys // kept
    near, centres = math.sqrt(1 - SPREAD**2), _normal(rng, whole + 1)
    which = np.arange(keys) // kept
    key = near * centres[which] + SPREAD * _normal(rng, keys)
    asked = near * centres[rng.integers(whole, size=rows)]
    return _head(rng, asked + SPREAD * _normal(rng, rows), key)


SOURCES: dict[str, Draw] = {
    "gaussian": gaussian,
    "laplace": laplace,
    "clusters": clusters,
}


def _normal(rng: np.random.Generator, number: int) -> np.ndarray:
    return rng.standard_normal((number, HEAD_DIM))


def _head(rng: np.random.Generator, query: np.ndarray, key: np.ndarray) -> Head:
    value = _normal(rng, len(key))
    return Head(query / math.sqrt(HEAD_DIM), key, value, causal=False)
