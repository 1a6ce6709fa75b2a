"""From [B, T, N, ...] attention arrays to tiles [M, B, K, Q, ...] and back.

A tile is a run of query positions together with the G = N / K query heads that share a
key head: Q = positions x G rows that are all scored against the same gathered keys.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from hsrjax.activations import Activation, Entmax
from hsrjax.reported import Tiles
from hsrjax.visible import Visible


def heads_first(x: jax.Array) -> jax.Array:
    """[B, S, K, D] to [B, K, S, D]."""
    return jnp.moveaxis(x, 2, 1)


def to_tiles(
    x: jax.Array, *, kv_heads: int, tile: int, padding: float = 0
) -> jax.Array:
    """[B, T, N, ...] to [M, B, K, tile * G, ...], padded at the end."""
    b, t, n, *rest = x.shape
    m = -(-t // tile)
    ends = [(0, 0), (0, m * tile - t)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, ends, constant_values=padding)
    x = x.reshape(b, m, tile, kv_heads, n // kv_heads, *rest)
    x = jnp.moveaxis(x, (1, 3), (0, 2))  # [M, B, K, tile, G, ...]
    return x.reshape(m, b, kv_heads, tile * (n // kv_heads), *rest)


def from_tiles(x: jax.Array, *, length: int, heads: int) -> jax.Array:
    """[M, B, K, tile * G, ...] to [B, T, N, ...]."""
    m, b, kv_heads, rows, *rest = x.shape
    group = heads // kv_heads
    x = x.reshape(m, b, kv_heads, rows // group, group, *rest)
    x = jnp.moveaxis(x, (0, 2), (1, 3))  # [B, M, tile, K, G, ...]
    return x.reshape(b, m * (rows // group), heads, *rest)[:, :length]


def query_tiles(
    activation: Activation,
    query: jax.Array,
    visible: Visible,
    *,
    scale: jax.typing.ArrayLike | None,
    kv_heads: int,
    tile: int,
) -> Tiles:
    """Scales queries f[B, T, N, H] and cuts them, their biases and ranges i32[B, T].

    The scale is multiplied into the query, so the half-space of ReLU attention is
    <scale q, k> >= bias: the paper's Algorithms 1 and 2 ask for <q, k> >= b while
    applying ReLU to <q, k> / sqrt(d) - b, which reports far too much.
    """
    scaled = scale_query(query, scale)
    if isinstance(activation, Entmax):
        scaled = scaled * (activation.alpha - 1.0)
    b, t, n, _ = query.shape
    bias = per_row("bias", getattr(activation, "bias", 0.0), (b, t, n))
    cut = functools.partial(to_tiles, kv_heads=kv_heads, tile=tile)
    return Tiles(
        cut(scaled),
        cut(bias, padding=jnp.inf),  # padding reports nothing
        jax.tree.map(lambda x: cut(jnp.broadcast_to(x[..., None], (b, t, n))), visible),
    )


def scale_query(query: jax.Array, scale: jax.typing.ArrayLike | None) -> jax.Array:
    """Queries f32[..., H] times the scale, None is 1/sqrt(H)."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return query.astype(jnp.float32) * jnp.asarray(factor, jnp.float32)


def per_row(
    name: str, x: jax.typing.ArrayLike, rows: tuple[int, int, int]
) -> jax.Array:
    """A field of an activation as f32[B, T, N]."""
    x = jnp.asarray(x).astype(jnp.float32)
    try:
        return jnp.broadcast_to(x, rows)
    except ValueError:
        raise ValueError(
            f"activation.{name} must broadcast to [B, T, N] = {rows}, got shape "
            f"{x.shape}; one per head is [N], one per row [T, 1]."
        ) from None
