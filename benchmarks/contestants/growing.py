"""Decode steps of hsrjax: append a token to cache and index, attend."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hsrjax
from benchmarks.harness import loops
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

    def set_bias(self, bias: Any) -> None:
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
        cache = filled(self.inputs, self.keys - 1, room=self.keys + ROOM)
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


def filled(inputs: Inputs, tokens: int, *, room: int) -> hsrjax.KVCache:
    """A cache of the first so many tokens, appended a good part at a time."""
    (batch, _, kv_heads, head_dim), value = inputs.key.shape, inputs.value
    cache = hsrjax.init_cache(
        batch,
        room,
        kv_heads,
        head_dim,
        value_dim=value.shape[-1],
        dtype=inputs.dtype,
    )
    step = max(1, _AT_ONCE // (batch * kv_heads * head_dim))
    for first in range(0, tokens, step):
        part = slice(first, min(first + step, tokens))
        new = (inputs.key[:, part], value[:, part])
        cache = _append(cache, *map(inputs.on_device, new))
    return cache


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


class Looped:
    """Caches whose steps are repeated in one program; all methods share them.

    Every call first forgets what the one before has appended, so that caches keep their
    size. Queries stand at position S - 1, and all steps have the same result.

    Args:
      inputs: the newest query, all keys and values, and the loop.
      activation: None is that of the inputs.
      reindexed: put the S - 1 tokens into spatial order before the first step.
    """

    def __init__(self, inputs: Inputs, activation: Any = None, reindexed: bool = False):
        assert inputs.loop is not None
        self.inputs, self.loop, self.reindexed = inputs, inputs.loop, reindexed
        self.activation = activation or hsrjax.ReLU(
            power=inputs.power,
            bias=jnp.asarray(inputs.bias),
            normalize=inputs.normalize,
        )
        arrays = (inputs.query, inputs.key[:, -1:], inputs.value[:, -1:])
        self.moved = tuple(map(inputs.on_device, arrays))
        self.positions = jnp.full(
            (inputs.query.shape[0], 1), inputs.key.shape[1] - 1, jnp.int32
        )
        self._held = loops.Held(())
        self._programs: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def hold(self) -> loops.Held:
        """The caches, made anew where a call that failed has taken them away."""
        with self._lock:
            leaves = jax.tree.leaves(self._held.caches)
            if not leaves or any(leaf.is_deleted() for leaf in leaves):
                self._held.caches = ()  # before the next ones take memory
                self._held.caches = jax.block_until_ready(self._made())
        return self._held

    def _made(self) -> tuple[hsrjax.KVCache, ...]:
        keys = self.inputs.key.shape[1]
        cache = filled(self.inputs, keys, room=keys + self.loop.steps + ROOM)
        if self.reindexed:
            cache = _reindex(rewound(cache, keys - 1))
        copies = [jax.tree.map(jnp.copy, cache) for _ in range(self.loop.caches - 1)]
        return (cache, *copies)

    def open(self, name: Any, step: Callable[..., Any], *fixed: Any) -> Open:
        """Of a step (cache, (query, key, value), fixed) -> (result, cache).

        Steps of one name are one program, whatever the numbers in `fixed`.
        """
        if name not in self._programs:
            keys = self.inputs.key.shape[1]
            self._programs[name] = loops.compiled(
                step,
                self.loop,
                self.hold().caches,
                self.moved,
                fixed,
                begin=lambda cache: rewound(cache, keys - 1),
            )
        program = self._programs[name]
        return lambda: loops.opened(program, self.loop, self.hold(), self.moved, fixed)

    def attending(
        self,
        method: str,
        implementation: str | None = None,
        *,
        activation: Any = None,
        informed: bool = False,
    ) -> Open:
        """Steps that append and attend.

        Args:
          method: of hsrjax.
          implementation: of hsrjax.
          activation: None is that of the caches.
          informed: return how many keys were kept, the certified error and how many
            keys were looked at as well.
        """

        def step(cache, moved, fixed):
            query, key, value = moved
            cache = hsrjax.extend(cache, key, value, implementation=implementation)
            out, info = hsrjax.decode_attention(
                query,
                cache,
                activation=fixed[0],
                method=method,  # pyright: ignore[reportArgumentType]
                implementation=implementation,
                scale=1.0,
                positions=fixed[1],
            )
            known = info.count, info.error_bound, info.candidates
            return (out, *known) if informed else (out,), cache

        law = activation or self.activation
        name = method, implementation, informed, jax.tree.structure(law)
        return self.open(name, step, law, self.positions)

    def appending(self, implementation: str | None = None) -> Open:
        """Steps that append alone; the result is a number of what they wrote."""

        def step(cache, moved, fixed):
            del fixed
            _, key, value = moved
            cache = hsrjax.extend(cache, key, value, implementation=implementation)
            return cache.values.rows[:1, :1, -1, :1], cache

        return self.open(("append", implementation), step)


def looped_contestant(
    looped: Looped,
    name: str,
    method: str,
    implementation: str | None = None,
    *,
    definition: str = "relu",
    **options: Any,
) -> Contestant:
    """A method of hsrjax by an implementation, repeated in one program."""
    return Contestant(
        name=name,
        definition=definition,
        prepare=lambda: looped.attending(method, implementation, **options),
        finish=lambda result: tuple(np.asarray(x, np.float32) for x in result),
        detail=f"implementation {implementation}",
    )


def rewound(cache: hsrjax.KVCache, tokens: Any) -> hsrjax.KVCache:
    """The cache when it held so many tokens; what was behind them is overwritten."""
    size = jnp.full_like(cache.index.size, tokens)
    index = dataclasses.replace(cache.index, size=size)
    return dataclasses.replace(cache, index=index)


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
