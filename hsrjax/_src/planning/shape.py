"""The sizes of a call, by which it is planned."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Shape(NamedTuple):
    """Sizes of an attention call.

    Attributes:
      batch: B.
      queries: T.
      keys: S, or the room of the cache.
      heads: N.
      kv_heads: K.
      head_dim: H.
      value_dim: D.
      cached: whether there is an index over the keys already.
      seen: share of all pairs of a query and a key that may be visible.
      devices: that the arrays may be spread over.
      itemsize: bytes of a number in keys and values.
      cells: whether the keys are in spatial order, and looked at cell by cell.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    cached: bool = False
    seen: float = 1.0
    devices: int = 1
    itemsize: int = 4
    cells: bool = False

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def sets(self) -> int:
        """Rows of keys that are searched, B K."""
        return self.batch * self.kv_heads

    @property
    def rows(self) -> int:
        """Query rows of a key head, T G."""
        return self.queries * self.group


def of_prefill(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    is_causal: bool,
    window: int | None,
    devices: int,
) -> Shape:
    """Of `attention`: f[B, T, N, H], f[B, S, K, H], f[B, S, K, D]."""
    b, t, n, h = query.shape
    s, kv_heads = key.shape[1:3]
    seen = 1.0
    if is_causal:
        late = max(0, t - s)  # queries that see every key
        visible = (t - late) * (t - late + 1) / 2 + late * s
        seen = visible / (t * s)
    if window is not None:
        seen = min(seen, window / s)
    size = key.dtype.itemsize
    width = value.shape[-1]
    return Shape(b, t, s, n, kv_heads, h, width, False, seen, devices, size)


def of_decode(query: jax.Array, keys: jax.Array, values: jax.Array, *, devices: int):
    """Of `decode_attention`: f[B, T, N, H], f[B, K, P, H], f[B, K, P, D]."""
    b, t, n, h = query.shape
    kv_heads, room = keys.shape[1:3]
    size, width = keys.dtype.itemsize, values.shape[-1]
    return Shape(b, t, room, n, kv_heads, h, width, True, 1.0, devices, size)
