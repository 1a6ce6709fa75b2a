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

_GROUP = 64


def positions(count: int, ndim: int) -> jax.Array:
    """0, 1, ..., count - 1 as i32[1, ..., 1, count] with ndim axes."""
    return jnp.arange(count, dtype=jnp.int32).reshape((1,) * (ndim - 1) + (count,))


def pack(mask: jax.Array) -> jax.Array:
    """Packs bool[..., S] (S a multiple of 32) into words u32[..., S/32]."""
    bits = mask.reshape(*mask.shape[:-1], -1, WORD)
    lanes = jnp.uint32(1) << positions(WORD, bits.ndim).astype(jnp.uint32)
    return jnp.sum(jnp.where(bits, lanes, jnp.uint32(0)), axis=-1, dtype=jnp.uint32)


def unpack(words: jax.Array) -> jax.Array:
    """Unpacks words u32[..., W] into bool[..., 32 W]."""
    lanes = positions(WORD, words.ndim + 1).astype(jnp.uint32)
    bits = (words[..., None] >> lanes) & jnp.uint32(1)
    return (bits != 0).reshape(*words.shape[:-1], -1)


def interval(low: jax.Array, high: jax.Array, width: int) -> jax.Array:
    """Sets u32[..., W] of the slots low <= j < high, for i32[...] of W words."""

    def below(end):
        first = WORD * positions(width, end.ndim + 1)
        bits = jnp.clip(end[..., None] - first, 0, WORD).astype(jnp.uint32)
        part = (jnp.uint32(1) << jnp.minimum(bits, WORD - 1)) - jnp.uint32(1)
        return jnp.where(bits == WORD, ~jnp.uint32(0), part)

    return below(high) & ~below(low)


def size(words: jax.Array) -> jax.Array:
    """Number of members, i32[...], of the sets u32[..., W]."""
    counts = jax.lax.population_count(words).astype(jnp.int32)
    return jnp.sum(counts, axis=-1, dtype=jnp.int32)


class Ranked(NamedTuple):
    """Sets ready for `select`: their words, and the members before each word's end.

    Attributes:
      words: u32[..., W].
      below: i32[..., W] or a few more, members in this word and all before it.
    """

    words: jax.Array
    below: jax.Array


def rank(words: jax.Array) -> Ranked:
    """Counts members once, for any number of `select`s from u32[..., W]."""
    counts = jax.lax.population_count(words).astype(jnp.int32)
    return Ranked(words, _running_sum(counts))


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

    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), ranked)
    return jax.vmap(one)(*flat).reshape(*lead, capacity)


def _running_sum(counts: jax.Array) -> jax.Array:
    """Inclusive running sum of i32[..., W] of at most 32 each, W rounded up to 64 more.

    In groups of 64 as a product with a triangle of ones, exact in float32: a quarter of
    the time of `jnp.cumsum` on CPU.
    """
    width = counts.shape[-1]
    lead = counts.shape[:-1]
    padding = [(0, 0)] * len(lead) + [(0, -width % _GROUP)]
    groups = jnp.pad(counts, padding).reshape(*lead, -1, _GROUP)
    ones = jnp.triu(jnp.ones((_GROUP, _GROUP), jnp.float32))
    inside = jnp.dot(groups.astype(jnp.float32), ones).astype(jnp.int32)
    totals = jnp.cumsum(inside[..., -1], axis=-1, dtype=jnp.int32)
    sums = inside + (totals - inside[..., -1])[..., None]
    return sums.reshape(*lead, -1)


def _nth_bit(word: jax.Array, n: jax.Array) -> jax.Array:
    """Position of the n-th (0-based) set bit of each word: as many prefixes hold less.

    A sum, which XLA does not work out again for every number that is gathered at this
    position, as it would do with a chain of cheap operations.
    """
    lanes = positions(WORD, word.ndim + 1).astype(jnp.uint32)
    prefix = word[..., None] << (jnp.uint32(WORD - 1) - lanes)
    held = jax.lax.population_count(prefix).astype(jnp.int32)
    return jnp.sum(held <= n[..., None], axis=-1, dtype=jnp.int32)
