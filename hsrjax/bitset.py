"""Bit sets over key slots: 32 slots a word, so that a set of S keys takes S/8 bytes.

The reported set of a query is passed around in this form because it is small enough
to keep for the backward pass and because the c-th member is found by counting bits
(`select`) instead of sorting or scanning the keys again.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

WORD = 32
"""Slots in a word; also the number of keys that share one block of the sketch."""


def positions(count: int, ndim: int) -> jax.Array:
    """0, 1, ..., count - 1 as i32[1, ..., 1, count] with ndim axes."""
    return jnp.arange(count, dtype=jnp.int32).reshape((1,) * (ndim - 1) + (count,))


def pack(mask: jax.Array) -> jax.Array:
    """Packs bool[..., S] (S a multiple of 32) into words u32[..., S/32]."""
    bits = mask.reshape(*mask.shape[:-1], -1, WORD).astype(jnp.uint32)
    lanes = positions(WORD, bits.ndim).astype(jnp.uint32)
    return jnp.sum(bits << lanes, axis=-1, dtype=jnp.uint32)


def unpack(words: jax.Array) -> jax.Array:
    """Unpacks words u32[..., W] into bool[..., 32 W]."""
    lanes = positions(WORD, words.ndim + 1).astype(jnp.uint32)
    bits = (words[..., None] >> lanes) & jnp.uint32(1)
    return (bits != 0).reshape(*words.shape[:-1], -1)


def size(words: jax.Array) -> jax.Array:
    """Number of members, i32[...], of the sets u32[..., W]."""
    counts = jax.lax.population_count(words).astype(jnp.int32)
    return jnp.sum(counts, axis=-1, dtype=jnp.int32)


class Ranked(NamedTuple):
    """Sets ready for `select`: their words, and the members before each word's end.

    Attributes:
      words: u32[..., W].
      below: i32[..., W], members in this word and all before it.
    """

    words: jax.Array
    below: jax.Array


def rank(words: jax.Array) -> Ranked:
    """Counts members once, for any number of `select`s from u32[..., W]."""
    counts = jax.lax.population_count(words).astype(jnp.int32)
    return Ranked(words, jnp.cumsum(counts, axis=-1, dtype=jnp.int32))


def select(ranked: Ranked, start: jax.Array, capacity: int) -> jax.Array:
    """Members number start, start + 1, ..., start + capacity - 1 in ascending order.

    Args:
      ranked: from `rank`, sets of W words.
      start: i32 scalar, rank of the first member wanted (0-based).
      capacity: how many members to return; static.

    Returns:
      Slots i32[..., capacity], ascending, padded with 32 W (one past the end).
      Cost O(capacity log W) per set.
    """
    lead, width = ranked.words.shape[:-1], ranked.words.shape[-1]
    rank = start + jnp.arange(capacity, dtype=jnp.int32)

    def one(words, below):
        at = jnp.searchsorted(below, rank, side="right").astype(jnp.int32)
        inside = jnp.minimum(at, width - 1)
        word = words[inside]
        before = below[inside] - jax.lax.population_count(word).astype(jnp.int32)
        slot = inside * WORD + _nth_bit(word, rank - before)
        return jnp.where(at < width, slot, WORD * width)

    flat = jax.tree.map(lambda x: x.reshape(-1, width), ranked)
    return jax.vmap(one)(*flat).reshape(*lead, capacity)


def _nth_bit(word: jax.Array, n: jax.Array) -> jax.Array:
    """Position of the n-th (0-based) set bit of each word, by halving the word."""
    position = jnp.zeros_like(n)
    for width in (16, 8, 4, 2, 1):
        low_mask = jnp.uint32((1 << width) - 1)
        low = jax.lax.population_count(word & low_mask).astype(jnp.int32)
        high = n >= low
        n = jnp.where(high, n - low, n)
        position = jnp.where(high, position + width, position)
        word = jnp.where(high, word >> jnp.uint32(width), word)
    return position
