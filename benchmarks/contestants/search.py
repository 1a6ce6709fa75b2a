"""Range search by inner product: hsrjax and what other libraries offer for it.

Each builds once over keys f32[S, H], then answers batches of queries: all keys with
<normal, key> >= offset. Turning a library's answer into one array of ids per query is
not timed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hsrjax
from benchmarks.contestants.peers import load
from benchmarks.harness.timing import Unavailable

Search = Callable[[np.ndarray, np.ndarray], Any]
"""Answers (normals f32[T, H], offsets f32[T])."""
Ids = list[np.ndarray]

CAPACITY = 256
_NEIGHBOURS = 32
_EFFORT = 256
_LISTS_TRIED = 32
_CELLS = 1 << 22
"""Scores that brute force holds at a time: 16 MB."""


@dataclasses.dataclass(frozen=True)
class RangePeer:
    """One way to report.

    Attributes:
      package: distribution whose version is reported.
      build: makes a `Search` over keys; timed.
      ids: turns an answer into ids per query; None where it only counts.
      exact: must find every member and nothing else.
      ours: a failure is an error.
      detail: how it is configured.
    """

    package: str
    build: Callable[[np.ndarray], Search]
    ids: Callable[[Any], Ids] | None
    exact: bool
    ours: bool = False
    detail: str = ""


# --- hsrjax ---------------------------------------------------------------------------


def _hsr(ask: Callable[..., Any], keys: np.ndarray) -> Search:
    index = jax.block_until_ready(hsrjax.build(jnp.asarray(keys)))
    return lambda normals, offsets: jax.block_until_ready(ask(index, normals, offsets))


def _hsr_ids(report: Any) -> Ids:
    if bool(report.overflow.any()):
        raise ValueError(f"more than {CAPACITY} members: raise the capacity")
    counts = np.asarray(report.count)
    rows = np.asarray(report.indices)
    return [row[:n] for row, n in zip(rows, counts, strict=True)]


# --- brute force ----------------------------------------------------------------------


def _numpy(keys: np.ndarray) -> Search:
    def search(normals, offsets):
        step = max(1, _CELLS // len(normals))
        found = []
        for first in range(0, len(keys), step):
            hits = normals @ keys[first : first + step].T >= offsets[:, None]
            row, column = np.nonzero(hits)
            found.append((row, column + first))
        row, column = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(row, kind="stable")
        return np.split(column[order], np.searchsorted(row[order], _after(normals)))

    return search


def _after(normals: np.ndarray) -> np.ndarray:
    return np.arange(1, len(normals))


def _jax(keys: np.ndarray) -> Search:
    """Scores of all keys, the first members by `nonzero`, a query at a time."""
    stored = jnp.asarray(np.ascontiguousarray(keys.T))

    @jax.jit
    def search(normals, offsets):
        def one(operands):
            normal, offset = operands
            hits = normal @ stored >= offset
            ids = jnp.nonzero(hits, size=CAPACITY, fill_value=hits.size)[0]
            return ids, jnp.sum(hits, dtype=jnp.int32)

        return jax.lax.map(one, (normals, offsets))

    return lambda normals, offsets: jax.block_until_ready(search(normals, offsets))


def _jax_ids(answer: Any) -> Ids:
    ids, counts = map(np.asarray, answer)
    if counts.max() > CAPACITY:
        raise ValueError(f"more than {CAPACITY} members: raise the capacity")
    return [row[:n] for row, n in zip(ids, counts, strict=True)]


# --- faiss ----------------------------------------------------------------------------


def _faiss(make: Callable[[Any, int, int], Any], keys: np.ndarray) -> Search:
    faiss = load("faiss")
    index = make(faiss, *keys.shape)
    if not index.is_trained:
        index.train(keys[:: max(1, len(keys) // 200_000)])
    index.add(keys)

    def search(normals, offsets):
        # One radius for all queries of a call: dividing by positive offsets makes it
        # 1. faiss reports scores above the radius, not at it.
        if not (offsets > 0).all():
            raise Unavailable("one radius for all queries needs positive offsets")
        radius = float(np.nextafter(np.float32(1), np.float32(0)))
        limits, _, ids = index.range_search(normals / offsets[:, None], radius)
        return limits, ids

    return search


def _faiss_ids(answer: Any) -> Ids:
    limits, ids = answer
    return np.split(ids, limits[1:-1].astype(np.int64))


def _flat(faiss: Any, keys: int, head_dim: int) -> Any:
    return faiss.IndexFlatIP(head_dim)


def _ivf(faiss: Any, keys: int, head_dim: int) -> Any:
    lists = max(1, round(keys**0.5))
    kind = f"IVF{lists},Flat"
    index = faiss.index_factory(head_dim, kind, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = min(lists, _LISTS_TRIED)
    return index


def _hnsw(faiss: Any, keys: int, head_dim: int) -> Any:
    metric = faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexHNSWFlat(head_dim, _NEIGHBOURS, metric)
    index.hnsw.efSearch = _EFFORT
    return index


# --- others ---------------------------------------------------------------------------


def _hnswlib(keys: np.ndarray) -> Search:
    """Knows no radius: the nearest, of which those above the offset are kept."""
    index = load("hnswlib").Index("ip", keys.shape[1])
    index.init_index(len(keys), M=_NEIGHBOURS, ef_construction=100, random_seed=0)
    index.add_items(keys)
    nearest = min(CAPACITY, len(keys))
    index.set_ef(max(_EFFORT, nearest))

    def search(normals, offsets):
        ids, distances = index.knn_query(normals, k=nearest)
        return ids, 1 - distances >= offsets[:, None]

    return search


def _hnswlib_ids(answer: Any) -> Ids:
    return [row[keep] for row, keep in zip(*answer, strict=True)]


def _ball_tree(keys: np.ndarray) -> Search:
    """Exact through the lift k' = [k, sqrt(M^2 - |k|^2)], a' = [a, 0].

    All k' have norm M, so <a, k> >= b just when |a' - k'|^2 <= |a|^2 + M^2 - 2 b.
    """
    keys = keys.astype(np.float64)
    squares = (keys**2).sum(-1)
    largest = squares.max()
    lifted = np.concatenate([keys, np.sqrt(largest - squares)[:, None]], axis=1)
    tree = load("sklearn.neighbors").BallTree(lifted)

    def search(normals, offsets):
        normals = np.pad(normals.astype(np.float64), [(0, 0), (0, 1)])
        square = (normals**2).sum(-1) + largest - 2 * offsets.astype(np.float64)
        return tree.query_radius(normals, np.sqrt(np.maximum(square, 0.0)))

    return search


def _keops(keys: np.ndarray) -> Search:
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")
    lazy = load("pykeops.numpy").LazyTensor
    stored = lazy(np.ascontiguousarray(keys)[None, :, :])

    def search(normals, offsets):
        above = (lazy(normals[:, None, :]) * stored).sum(-1)
        return (above - lazy(offsets[:, None, None])).step().sum(axis=1, backend="CPU")

    return search


def answers(peer: RangePeer, answer: Any) -> Ids | np.ndarray:
    """Ids per query, or counts i64[T] of what only counts."""
    if peer.ids is None:
        return np.asarray(answer).reshape(-1).astype(np.int64)
    return peer.ids(answer)


OURS = {
    "hsrjax.query": RangePeer(
        "hsrjax",
        functools.partial(_hsr, functools.partial(hsrjax.query, capacity=CAPACITY)),
        _hsr_ids,
        exact=True,
        ours=True,
        detail=f"capacity {CAPACITY}",
    ),
    "hsrjax.count": RangePeer(
        "hsrjax", functools.partial(_hsr, hsrjax.count), None, exact=True, ours=True
    ),
    "numpy": RangePeer(
        "numpy", _numpy, list, exact=True, ours=True, detail="matmul in chunks"
    ),
    "jax": RangePeer(
        "jax", _jax, _jax_ids, exact=True, ours=True, detail="matmul and nonzero"
    ),
}
PEERS = {
    "faiss-flat": RangePeer(
        "faiss-cpu",
        functools.partial(_faiss, _flat),
        _faiss_ids,
        exact=True,
        detail="IndexFlatIP.range_search",
    ),
    "faiss-ivf": RangePeer(
        "faiss-cpu",
        functools.partial(_faiss, _ivf),
        _faiss_ids,
        exact=False,
        detail=f"IndexIVFFlat.range_search, sqrt(S) lists, {_LISTS_TRIED} tried",
    ),
    "faiss-hnsw": RangePeer(
        "faiss-cpu",
        functools.partial(_faiss, _hnsw),
        _faiss_ids,
        exact=False,
        detail=f"IndexHNSWFlat.range_search, M {_NEIGHBOURS}, efSearch {_EFFORT}",
    ),
    "hnswlib": RangePeer(
        "hnswlib",
        _hnswlib,
        _hnswlib_ids,
        exact=False,
        detail=f"the {CAPACITY} nearest, ef {_EFFORT}",
    ),
    "sklearn-balltree": RangePeer(
        "scikit-learn",
        _ball_tree,
        list,
        exact=True,
        detail="query_radius after the exact lift",
    ),
    "keops": RangePeer(
        "pykeops", _keops, None, exact=True, detail="LazyTensor, counts only"
    ),
}
