"""Bit sets over key slots: 32 slots a word, so that a set of S keys takes S/8 bytes.

The reported set of a query is passed around in this form because it is small enough
to keep for the backward pass and because the c-th member is found by counting bits
(`select`) instead of sorting or scanning the keys again.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hsrjax._src.core.arrays import positions

WORD = 32
"""Slots in a word; also the number of keys that share one block of the sketch."""

_GROUP = 64
_FEW_GROUPS = 64
_NIBBLE = 1 << 24 | 1 << 17 | 1 << 10 | 1 << 3
_MANY_QUERIES = 16
"""From so many on XLA's CPU backend does better with the union apart."""


def pack(mask: jax.Array) -> jax.Array:
    """Packs bool[..., S] (S a multiple of 32) into words u32[..., S/32]."""
    bits = mask.reshape(*mask.shape[:-1], -1, WORD)
    lanes = jnp.uint32(1) << positions(WORD, bits.ndim).astype(jnp.uint32)
    return jnp.sum(jnp.where(bits, lanes, jnp.uint32(0)), axis=-1, dtype=jnp.uint32)


def pack_bytes(mask: jax.Array) -> jax.Array:
    """`pack` for u8[..., S] of 0 and 1: a third of the time, on CPU, from memory.

    Read as one number, four such bytes times `_NIBBLE` hold their bits side by side
    from bit 24 on, and nothing carries into them from below.
    """
    quads = mask.reshape(*mask.shape[:-1], -1, 4)
    quads = jax.lax.bitcast_convert_type(quads, jnp.uint32)
    nibbles = ((quads * jnp.uint32(_NIBBLE)) >> 24) & jnp.uint32(15)
    nibbles = nibbles.reshape(*mask.shape[:-1], -1, WORD // 4)
    shifts = 4 * positions(WORD // 4, nibbles.ndim).astype(jnp.uint32)
    return jnp.sum(nibbles << shifts, axis=-1, dtype=jnp.uint32)


def pack_unions(members: jax.Array, parts: int) -> jax.Array:
    """Unions over J = parts runs of the queries of bool[*B, Q, P], u32[*B, J, P/32]."""
    *lead, rows, size = members.shape
    part = rows // parts

    def union(members):
        return pack(jnp.any(members.reshape(*lead, parts, part, size), axis=-2))

    def apart(members):
        # Kept apart from the packing: fused, XLA's CPU backend does both bit by bit.
        window = (*[1] * len(lead), part, 1)
        either = jax.lax.bitwise_or
        bits, zero = members.astype(jnp.uint8), np.uint8(0)
        bits = jax.lax.reduce_window(bits, zero, either, window, window, "VALID")
        return pack_bytes(bits)

    if part < _MANY_QUERIES:
        return union(members)
    return jax.lax.platform_dependent(members, cpu=apart, default=union)


def unpack(words: jax.Array) -> jax.Array:
    """Unpacks words u32[..., W] into bool[..., 32 W]."""
    lanes = positions(WORD, words.ndim + 1).astype(jnp.uint32)
    bits = (words[..., None] >> lanes) & jnp.uint32(1)
    return (bits != 0).reshape(*words.shape[:-1], -1)


def blocks_touched(new: int, slots: int) -> int:
    """Blocks of 32 that so many consecutive slots may fall into."""
    return min((new + WORD - 2) // WORD + 1, slots // WORD)


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


def passes(words: jax.Array, capacity: int) -> jax.Array:
    """Passes of `capacity` members that the fullest of the sets needs."""
    fullest = jnp.max(size(words))
    return (fullest + (capacity - 1)) // capacity


class Ranked(NamedTuple):
    """Sets ready for `select`: their words, and the members before each word's end.

    Attributes:
      words: u32[..., G, W].
      below: i32[..., G, W rounded up to 64], members in this word and all before it.
    """

    words: jax.Array
    below: jax.Array


def rank(words: jax.Array) -> Ranked:
    """Counts members once, for any number of `select`s from u32[..., G, W]."""
    counts = jax.lax.population_count(words).astype(jnp.int32)
    return Ranked(words, _running_sum(counts))


def select(
    ranked: Ranked, ranks: jax.Array, sets: jax.Array | None = None
) -> jax.Array:
    """The members that have so many others before them.

    Args:
      ranked: from `rank`, G sets of W words.
      ranks: i32[..., X, C], 0-based, or what broadcasts to it.
      sets: i32[..., X], which of the G sets is asked for each X; None is each in turn.

    Returns:
      Slots i32[..., X, C], 32 W (one past the end) for ranks beyond the last member.
      Cost O(C log W) per X.
    """
    lead = ranked.words.shape[:-2]
    asked = ranked.words.shape[:-1] if sets is None else sets.shape
    ranks = jnp.broadcast_to(ranks, (*asked, ranks.shape[-1]))
    one = _select
    for _ in lead:
        one = jax.vmap(one, (0, 0, 0, None if sets is None else 0))
    return one(*ranked, ranks, sets)


def _select(words, below, ranks, sets):
    """`select` from sets [G, W], without batch axes."""
    width, padded = words.shape[-1], below.shape[-1]
    ends = below[:, _GROUP - 1 :: _GROUP]
    if sets is None:
        sets = jnp.arange(words.shape[0], dtype=jnp.int32)
    else:
        ends = ends[sets]
    if ends.shape[-1] <= _FEW_GROUPS:
        group = jnp.sum(ends[:, None] <= ranks[..., None], axis=-1, dtype=jnp.int32)
    else:
        search = functools.partial(jnp.searchsorted, side="right")
        group = jax.vmap(search)(ends, ranks).astype(jnp.int32)
    found = group < ends.shape[-1]
    group = jnp.minimum(group, ends.shape[-1] - 1)
    take = lambda x, at: x.reshape(-1).at[at].get(mode="promise_in_bounds")
    at, step = sets[:, None] * padded + group * _GROUP, _GROUP // 2
    while step:
        at = jnp.where(take(below, at + (step - 1)) <= ranks, at + step, at)
        step //= 2
    at = jnp.minimum(at - sets[:, None] * padded, width - 1)
    word = take(words, sets[:, None] * width + at)
    before = take(below, sets[:, None] * padded + at)
    before -= jax.lax.population_count(word).astype(jnp.int32)
    first = jnp.where(found, at, width) * WORD
    return _nth_bit(word, jnp.where(found, ranks - before, -1), first)


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


def _nth_bit(word: jax.Array, n: jax.Array, first: jax.Array) -> jax.Array:
    """first + position of the n-th (0-based) set bit: as many prefixes hold less.

    A sum, which XLA does not work out again for every number that is gathered at this
    position, as it would do with a chain of cheap operations.
    """
    lanes = positions(WORD, word.ndim + 1)
    prefix = word[..., None] << (WORD - 1 - lanes).astype(jnp.uint32)
    held = jax.lax.population_count(prefix).astype(jnp.int32)
    less = (held <= n[..., None]).astype(jnp.int32)
    return jnp.sum(
        less + jnp.where(lanes == 0, first[..., None], 0), axis=-1, dtype=jnp.int32
    )
