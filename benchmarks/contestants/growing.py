"""Decode steps of hsrjax: append a token to cache and index, attend."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hsrjax
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.timing import Arrays, Call, Contestant, Open

ROOM = 32
"""Tokens a cache may grow by beyond the S keys, before it is made anew."""
_AT_ONCE = 1 << 26
"""Numbers of the keys that go into a new cache in one call."""
_DRIFT = 0.01
"""Share of S that it may have grown by when a turn begins."""


class Growing:
    """One cache that all methods of hsrjax append to in turns.

    Each call appends the newest token once more. It is made anew before it has grown
    noticeably; queries stand at position S - 1 whatever is behind it, so that all calls
    have the same result.

    Args:
      inputs: the newest query, and all keys and values.
      reindexed: put the S - 1 tokens into spatial order before the first step.
    """

    def __init__(self, inputs: Inputs, *, reindexed: bool = False):
        self.inputs = inputs
        self.reindexed = reindexed
        self.reindex_ms: float | None = None
        self.keys = inputs.key.shape[1]
        self.cache: hsrjax.KVCache | None = None
        self.grown = 0
        arrays = (inputs.query, inputs.key[:, -1:], inputs.value[:, -1:])
        self.query, self.new_key, self.new_value = map(inputs.on_device, arrays)
        self.set_bias(inputs.bias)
        batch = inputs.query.shape[0]
        self.positions = jnp.full((batch, 1), self.keys - 1, jnp.int32)

    def set_bias(self, bias: np.ndarray) -> None:
        """Other thresholds f32[B, 1, N] for the same query, keys and values."""
        self.relu = hsrjax.ReLU(
            power=self.inputs.power,
            bias=jnp.asarray(bias),
            normalize=self.inputs.normalize,
        )

    def refresh(self) -> None:
        """Makes the cache anew if it has grown: S - 1 tokens, room for more."""
        if self.cache is not None and self.grown <= self.keys * _DRIFT:
            if self.grown <= ROOM // 2:
                return
        self.cache = None  # before the next one takes memory
        (batch, _, kv_heads, head_dim), value = self.inputs.key.shape, self.inputs.value
        cache = hsrjax.init_cache(
            batch,
            self.keys + ROOM,
            kv_heads,
            head_dim,
            value_dim=value.shape[-1],
            dtype=self.inputs.dtype,
        )
        step = max(1, _AT_ONCE // (batch * kv_heads * head_dim))
        for first in range(0, self.keys - 1, step):
            part = slice(first, min(first + step, self.keys - 1))
            tokens = (self.inputs.key[:, part], value[:, part])
            cache = _append(cache, *map(self.inputs.on_device, tokens))
        self.cache = jax.block_until_ready(cache)
        if self.reindexed:
            start = time.perf_counter()
            self.cache = jax.block_until_ready(_reindex(self.cache))
            # The first time it compiles as well; the fastest is the measure.
            seconds = time.perf_counter() - start
            self.reindex_ms = min(1e3 * seconds, self.reindex_ms or float("inf"))
        self.grown = 0

    def step(self, method: str) -> Any:
        """Appends and attends; returns (output, info)."""
        result, self.cache = _step(
            self.cache,
            self.query,
            self.new_key,
            self.new_value,
            self.relu,
            self.positions,
            method=method,
        )
        self.grown += 1
        return jax.block_until_ready(result)

    def append(self) -> Any:
        """Appends alone."""
        self.cache = _append(self.cache, self.new_key, self.new_value)
        self.grown += 1
        return jax.block_until_ready(self.cache)


def contestant(growing: Growing, name: str, method: str) -> Contestant:
    """One method of hsrjax on a cache that it may share with others."""

    def prepare() -> Open:
        def open_() -> Call:
            growing.refresh()
            return lambda: growing.step(method)

        return open_

    return Contestant(
        name=name, definition="relu", prepare=prepare, finish=output_and_counts
    )


def append_contestant(growing: Growing) -> Contestant:
    """Appending alone: what the index costs each step."""

    def prepare() -> Open:
        def open_() -> Call:
            growing.refresh()
            return growing.append

        return open_

    return Contestant(
        name="append alone", definition="part", prepare=prepare, finish=lambda _: ()
    )


def output_and_counts(result: Any) -> Arrays:
    """`finish`: the output, and how many keys were scored for each row."""
    out, info = result
    return np.asarray(out, np.float32), np.asarray(info.candidates)


@functools.partial(jax.jit, static_argnames="method", donate_argnames="cache")
def _step(cache, query, key, value, relu, positions, *, method):
    """As in generation: the cache is donated, so that it is extended in place."""
    cache = hsrjax.extend(cache, key, value)
    result = hsrjax.decode_attention(
        query,
        cache,
        activation=relu,
        method=method,
        scale=1.0,
        positions=positions,
    )
    return result, cache


@functools.partial(jax.jit, donate_argnames="cache")
def _reindex(cache):
    return hsrjax.reindex(cache)


@functools.partial(jax.jit, donate_argnames="cache")
def _append(cache, key, value):
    return hsrjax.extend(cache, key, value)
