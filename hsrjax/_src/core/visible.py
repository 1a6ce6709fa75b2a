"""Which keys each query may see: causality, windows, sinks, segments of packed rows.

Under all of these a query sees one run of keys and, with sinks, a second run before it.
So four integers a query say everything, and one comparison each makes the mask. What no
option asks for is None, and costs nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hsrjax._src.core import bitset, checks

_FAR = 2**31 - 1
"""Farther apart than any two keys: a larger window or more sinks see no more."""


class Visible(NamedTuple):
    """Query q sees key slot j where low <= j < high or sink_low <= j < sink_high.

    0 <= sink_low <= sink_high <= low <= high, so no key is counted twice.

    Attributes:
      high: i32[...].
      low: i32[...], or None for 0.
      sink_high: i32[...], or None where no sinks are asked for.
      sink_low: i32[...], or None for 0.
    """

    high: jax.Array
    low: jax.Array | None = None
    sink_high: jax.Array | None = None
    sink_low: jax.Array | None = None

    def mask(self, slots: jax.Array) -> jax.Array:
        """Which of the slots i32[..., 1, C] each query sees, bool[..., Q, C]."""
        inside = slots < self.high[..., None]
        if self.low is not None:
            inside &= slots >= self.low[..., None]
        sinks = self.sinks(slots)
        return inside if sinks is None else inside | sinks

    def sinks(self, slots: jax.Array) -> jax.Array | None:
        """Which of the slots i32[..., 1, C] are the query's sinks, bool[..., Q, C]."""
        if self.sink_high is None:
            return None
        inside = slots < self.sink_high[..., None]
        if self.sink_low is not None:
            inside &= slots >= self.sink_low[..., None]
        return inside

    def count(self) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Number of keys each query sees, i32[...]."""
        seen = self.high if self.low is None else self.high - self.low
        if self.sink_high is not None:
            seen = seen + self.sink_high
        return seen if self.sink_low is None else seen - self.sink_low

    def hull(self, parts: int) -> Visible:
        """Ranges that hold all that the queries of each part see, i32[..., J].

        Args:
          parts: J, the Q queries are cut into so many runs of equal length.
        """

        def over(x, reduce):
            if x is None:
                return None
            return reduce(x.reshape(*x.shape[:-1], parts, -1), axis=-1)

        return Visible(
            high=jnp.max(self.high.reshape(*self.high.shape[:-1], parts, -1), axis=-1),
            low=over(self.low, jnp.min),
            sink_high=over(self.sink_high, jnp.max),
            sink_low=over(self.sink_low, jnp.min),
        )

    def cover(self, parts: int, width: int) -> jax.Array:
        """Sets of the slots in `hull(parts)`, u32[..., J, W] of W words."""
        high, low, sink_high, sink_low = self.hull(parts)
        zero = jnp.zeros_like(high)
        seen = bitset.interval(zero if low is None else low, high, width)
        if sink_high is None:
            return seen
        low = zero if sink_low is None else sink_low
        return seen | bitset.interval(low, sink_high, width)

    def spans(self) -> list[tuple[jax.Array, jax.Array]]:
        """Ranges (low, high), i32 scalars, that hold all that any of the queries sees.

        The range of the sinks comes first, where there are any, and begins first.
        Ranges may overlap. Queries that see nothing, such as those that fill up the
        last tile, do not widen them.
        """
        spans = [(self.low, self.high)]
        if self.sink_high is not None:
            spans.insert(0, (self.sink_low, self.sink_high))
        return [_hull(low, high) for low, high in spans]


def of_prefill(
    queries: int,
    keys: int,
    *,
    is_causal: bool,
    window: int | None = None,
    sinks: int = 0,
    segment_ids: jax.Array | None = None,
) -> Visible:
    """What T queries see of S keys that stand at positions 0, 1, ... like them.

    Args:
      queries: T.
      keys: S; T with segment ids.
      is_causal: query i sees no key after i.
      window: query i sees no key before i - window + 1, but sinks.
      sinks: how many leading keys of its segment a query sees whatever the window.
      segment_ids: i32[B, S], each run of equal ids sees itself alone.

    Returns:
      Visible, i32[B, T] with segment ids and i32[1, T] without.
    """
    position = jnp.arange(queries, dtype=jnp.int32)[None, :]
    start, end = None, jnp.full_like(position, keys)
    if segment_ids is not None:
        start, end = _runs(segment_ids)
    high = jnp.minimum(position + 1, end) if is_causal else end
    return _ranges(start, high, position, window=window, sinks=sinks)


def of_decode(
    positions: jax.Array,
    length: jax.Array,
    *,
    window: int | None = None,
    sinks: int = 0,
) -> Visible:
    """What queries at positions i32[B, T] see of rows that hold length i32[B, 1] keys.

    Args:
      positions: each query sees the keys up to and including its position.
      length: keys stored.
      window: as in `of_prefill`.
      sinks: as in `of_prefill`.

    Returns:
      Visible, i32[B, T].
    """
    positions = positions.astype(jnp.int32)
    high = jnp.clip(positions + 1, 0, length)
    return _ranges(None, high, positions, window=window, sinks=sinks)


def check_options(
    activation: Any, *, is_causal: bool, window: int | None, sinks: int
) -> None:
    """Static checks of window and sinks."""
    if window is not None:
        checks.check_positive("window", window)
        if not is_causal:
            raise ValueError(
                f"window={window} needs is_causal=True, got is_causal={is_causal}: "
                "query i sees keys i - window + 1 to i; pass is_causal=True or "
                "window=None."
            )
    checks.check_natural("sinks", sinks)
    if sinks and window is None and not activation.spares_sinks:
        raise ValueError(
            "sinks must be 0 where nothing leaves out keys, got "
            f"sinks={sinks}, window=None and {activation!r}; give a window, or "
            "Softmax(top_r=...) or Softmax(epsilon=...)."
        )


def check_segment_ids(
    segment_ids: jax.Array, batch: int, queries: int, keys: int
) -> None:
    """Static checks of segment ids."""
    checks.check_integer("segment_ids", segment_ids)
    shape = segment_ids.shape
    checks.check_equal("segment_ids.shape", shape, (batch, keys), "[B, S]")
    if queries != keys:
        raise ValueError(
            "segment_ids need as many queries as keys, which share the ids, got "
            f"T = {queries} and S = {keys}; use segment_ids=None."
        )


def _hull(low: jax.Array | None, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The range that holds all ranges low <= j < high but empty ones."""
    last = jnp.max(high)
    if low is None:
        return jnp.zeros_like(last), last
    return jnp.min(jnp.where(low < high, low, last)), last


def _runs(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the run of equal ids i32[B, S] that each is in starts and ends (+ 1)."""
    count = ids.shape[1]
    position = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None, :], ids.shape)
    differs = ids[:, 1:] != ids[:, :-1]
    edge = jnp.ones_like(ids[:, :1], jnp.bool_)
    first = jnp.concatenate([edge, differs], axis=1)
    last = jnp.concatenate([differs, edge], axis=1)
    start = jax.lax.cummax(jnp.where(first, position, 0), axis=1)
    end = jnp.where(last, position + 1, count)
    return start, jax.lax.cummin(end, axis=1, reverse=True)


def _ranges(start, high, position, *, window, sinks) -> Visible:
    """Ranges of queries that see start <= j < high but for window and sinks."""
    low = start
    if window is not None:
        oldest = jnp.maximum(position, -1) - (min(window, _FAR) - 1)
        low = jnp.clip(oldest, 0 if start is None else start, high)
    if not sinks:
        return Visible(high, low)
    sinks = min(sinks, _FAR)
    if start is None:
        sink_high = jnp.minimum(sinks, high)
    else:
        sink_high = start + jnp.minimum(sinks, high - start)
    low = sink_high if low is None else jnp.maximum(low, sink_high)
    return Visible(high, low, sink_high, start)
