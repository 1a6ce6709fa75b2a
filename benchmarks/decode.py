"""One decode step over a long KV cache: half-space reporting against dense attention.

8 query heads share 4 key heads of size 64, batch 1, float32, Gaussian keys and queries.
The bias lets 1 %, at most 256 keys, of a typical row fire; appending the step's token
to the cache and its index is inside the timer. Every output is compared with dense.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import hsrjax

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
FIRING, LARGEST_SHARE = 256, 0.01


def measure(lengths: tuple[int, ...], *, repeats: int) -> Iterator[dict[str, Any]]:
    """Times every implementation at every length.

    Args:
      lengths: keys in the cache.
      repeats: timed calls, of which the median counts.

    Yields:
      One row of results per length, times in milliseconds.
    """
    for length in lengths:
        query, key, value, token = _inputs(length)
        share = min(LARGEST_SHARE, FIRING / length)
        bias = float(jax.scipy.stats.norm.isf(share))
        activation = hsrjax.ReLU(power=2, bias=bias)
        cache = hsrjax.init_cache(1, length + repeats + 2, KV_HEADS, HEAD_DIM)
        cache = jax.block_until_ready(hsrjax.extend(cache, key, value))
        step = functools.partial(_step, activation=activation)
        full_key, full_value = (
            jnp.concatenate([x, token], axis=1) for x in (key, value)
        )
        dense, expected = _time(
            jax.jit(functools.partial(_einsum, bias=bias)),
            query,
            jnp.moveaxis(full_key, 2, 1),
            jnp.moveaxis(full_value, 2, 1),
            repeats=repeats,
        )
        softmax, _ = _time(
            jax.jit(jax.nn.dot_product_attention),
            query,
            full_key,
            full_value,
            repeats=repeats,
        )
        del full_key, full_value
        hsr, (out, info) = _time_steps(step, query, cache, token, repeats=repeats)
        yield {
            "keys": length,
            "hsr_ms": hsr,
            "dense_ms": dense,
            "jax_nn_softmax_ms": softmax,
            "dense_over_hsr": dense / hsr,
            "firing_keys": float(info.count.mean()),
            "keys_looked_at": float(info.candidates.mean()),
            "max_relative_error": float(
                jnp.abs(out - expected).max() / jnp.abs(expected).max()
            ),
        }


def _inputs(length: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = (
        (1, 1, HEADS, HEAD_DIM),
        (1, length, KV_HEADS, HEAD_DIM),
        (1, length, KV_HEADS, HEAD_DIM),
        (1, 1, KV_HEADS, HEAD_DIM),
    )
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def _step(query, cache, token, *, activation):
    """What a decode step does: append the token, attend."""
    cache = hsrjax.extend(cache, token, token)
    result = hsrjax.decode_attention(
        query, cache, activation=activation, implementation="hsr"
    )
    return result, cache


def _einsum(query, key, value, *, bias):
    """The plainest dense ReLU^2 attention, keys f[B, K, S, H] as a cache holds them."""
    grouped = query.reshape(1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    scores = jnp.einsum("bkgh,bksh->bkgs", grouped, key) * HEAD_DIM**-0.5
    weights = jax.nn.relu(scores - bias) ** 2
    out = jnp.einsum("bkgs,bksd->bkgd", weights, value)
    out = out / jnp.sum(weights, axis=-1, keepdims=True)
    return out.reshape(query.shape)


def _time(
    function: Callable[..., Any], *arrays: Any, repeats: int
) -> tuple[float, Any]:
    """Median milliseconds of a call, after two that are not counted, and its result."""
    for _ in range(2):
        result = jax.block_until_ready(function(*arrays))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds), result


def _time_steps(step, query, cache, token, *, repeats):
    """As `_time`, for a step that appends to its cache.

    The cache is donated, as in generation; it has room for every call's token.
    """
    compiled = jax.jit(step, donate_argnames="cache")
    first, cache = jax.block_until_ready(compiled(query, cache, token))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        _, cache = jax.block_until_ready(compiled(query, cache, token))
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[1:]), first
