"""What lists of keys leave for each key, and its sum: gradients without atomics.

The forward pass leaves the keys of every part of a tile as a bit set. Here the sets
become lists, one after the other in one array, and whoever goes over a list leaves a
row of numbers for each of its entries in arrays of the same order. Then each block of
32 keys looks up which entries are its own, the bits before an entry say where it is,
and adds them up in the order of the queries: the same bits every time.

The arrays have room for so many entries; as many rounds are made as are needed. A round
takes the lists that begin in its share of all entries.

Shapes: X sets of keys, Y = M J parts of tiles, V words of 32 keys.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hsrjax._src.core.bitset import WORD
from hsrjax._src.kernels.triton.loads import rows_of, shaped, store_rows

_SHARE = 4
"""A list of more than one visible key in so many costs more than all of them do."""
_ENTRIES = 2**30
_BYTES = 2**27
_WORDS = 32
"""Of a program that makes a list."""
_PARTS = 32
"""That a block of keys looks at at once."""


class Lists(NamedTuple):
    """Lists of keys, one after the other: those of a set of keys follow each other.

    Attributes:
      words: i32[X, Y, V], bit sets.
      base: i32[X, Y, V], entries of all lists before those of each word.
      begin: i32[X, Y], entries before each list, -1 where all keys are better.
      size: i32[X, Y], keys of a list, 0 where all are better.
      total: i32, entries.
      most: keys of a list, static.
    """

    words: jax.Array
    base: jax.Array
    begin: jax.Array
    size: jax.Array
    total: jax.Array
    most: int


class Room(NamedTuple):
    """For the entries of a round; static.

    Attributes:
      begin: a round has the lists that begin among so many entries.
      size: of the arrays: the last list may be longer.
    """

    begin: int
    size: int

    def takes(self, begin, first):
        """Whether the round from entry number `first` has the lists i32[...]."""
        return (begin >= first) & (begin < first + self.begin)


class ByKey(NamedTuple):
    """Numbers for each key, or for each entry of the lists.

    Attributes:
      keys: f32[X, P, H] or f32[E, H].
      values: f32[X, P, D] or f32[E, D].
    """

    keys: Any
    values: Any


def split(words: jax.Array, seen: jax.Array) -> tuple[Lists, jax.Array]:
    """Lists of the sets i32[X, Y, V], and which parts do better with all of their keys.

    Args:
      words: of each part.
      seen: i32[X, Y], keys that any query of the part may see.

    Returns:
      The lists, and bool[X, Y].
    """
    sets, parts, width = words.shape
    most = max(1, min(width * WORD // _SHARE, _ENTRIES // (sets * parts)))
    counts = jax.lax.population_count(words)
    size = jnp.sum(counts, axis=-1, dtype=jnp.int32)
    every = size > jnp.minimum(seen // _SHARE, most)
    size = jnp.where(every, 0, size)
    end = jnp.cumsum(size.reshape(-1), dtype=jnp.int32)
    begin = end.reshape(sets, parts) - size
    within = jnp.cumsum(counts, axis=-1, dtype=jnp.int32) - counts
    base = begin[..., None] + within
    return Lists(words, base, jnp.where(every, -1, begin), size, end[-1], most), every


def room_for(lists: Lists, row_bytes: int) -> Room:
    """As much as `_BYTES`, or all that lists can need."""
    sets, parts, _ = lists.words.shape
    begin = min(sets * parts * lists.most, max(1, _BYTES // row_bytes))
    return Room(begin, begin + lists.most)


def expand(lists: Lists, first: jax.Array, room: Room, *, interpret: bool) -> jax.Array:
    """The slots of keys i32[E] in the lists of the round from entry number i32[1]."""
    sets, parts, width = lists.words.shape
    return pl.pallas_call(
        functools.partial(_expand, room=room),
        grid=(sets, parts, -(-width // _WORDS)),
        out_shape=shaped((room.size,), jnp.int32, lists.words),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        name="hsrjax_expand",
    )(lists.words, lists.base, lists.begin, first)


def _expand(words, base, begin, first, out, *, room):
    here = pl.program_id(0), pl.program_id(1)
    first = triton.load(first.at[jnp.int32(0)])
    mine = room.takes(triton.load(begin.at[here]), first)
    word = pl.program_id(2) * _WORDS + jnp.arange(_WORDS, dtype=jnp.int32)
    inside = word < words.shape[-1]
    word = jnp.minimum(word, words.shape[-1] - 1)
    bits = jnp.where(inside & mine, triton.load(words.at[(*here, word)]), 0)
    place = triton.load(base.at[(*here, word)])[:, None] - first + _below(bits)
    lane = jnp.arange(WORD, dtype=jnp.int32)[None, :]
    there = _members(bits) > 0
    place = jnp.where(there, place, room.size)
    triton.store(out.at[place], word[:, None] * WORD + lane, mask=there)


def add_entries(
    lists: Lists,
    first: jax.Array,
    room: Room,
    entries: ByKey,
    sums: ByKey,
    *,
    interpret: bool,
) -> ByKey:
    """Adds what the lists of a round hold to the sums of the keys, in place."""
    sets, _, width = lists.words.shape
    takes = room.takes(lists.begin, first[0])[..., None]
    counts = jnp.where(takes, jax.lax.population_count(lists.words), 0)
    counts = jnp.sum(counts, axis=1, dtype=jnp.int32)
    end = jnp.cumsum(counts.reshape(-1), dtype=jnp.int32).reshape(sets, width)
    blocks = end - counts, counts
    operands = lists.words, lists.base, lists.begin, first, blocks, entries
    reads = len(jax.tree.leaves(operands))
    inverse = shaped((room.size,), jnp.int32, lists.words)
    wide = entries.keys.shape[-1] + entries.values.shape[-1] > 128
    _, sums = pl.pallas_call(
        functools.partial(_add_entries, room=room, barrier=not interpret),
        grid=(sets, width),
        out_shape=[inverse, jax.tree.map(lambda x: shaped(x.shape, x.dtype, x), sums)],
        input_output_aliases={reads: 1, reads + 1: 2},
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=8 if wide else 4, num_stages=1),
        name="hsrjax_add_entries",
    )(*operands, sums)
    return sums


def _add_entries(
    words, base, begin, first, blocks, entries, sums, inverse, out, *, room, barrier
):
    set_, word = pl.program_id(0), pl.program_id(1)
    parts, first = words.shape[1], triton.load(first.at[jnp.int32(0)])
    before, entries_here = (triton.load(ref.at[set_, word]) for ref in blocks)
    groups = (entries_here > 0).astype(jnp.int32) * -(-parts // _PARTS)

    def look(i):
        part = i * _PARTS + jnp.arange(_PARTS, dtype=jnp.int32)
        inside, part = part < parts, jnp.minimum(part, parts - 1)
        inside &= room.takes(triton.load(begin.at[set_, part]), first)
        bits = jnp.where(inside, triton.load(words.at[set_, part, word]), 0)
        return part, bits, _members(bits)

    def count(i, number):
        return number + jnp.sum(look(i)[2], axis=0)

    none = jnp.zeros((WORD,), jnp.int32)
    number = jax.lax.fori_loop(0, groups, count, none)
    start = before + jnp.cumsum(number) - number

    def place(i, done):
        part, bits, members = look(i)
        entry = triton.load(base.at[set_, part, word])[:, None] - first + _below(bits)
        rank = start[None, :] + done[None, :] + jnp.cumsum(members, axis=0) - members
        there = members > 0
        triton.store(inverse.at[jnp.where(there, rank, room.size)], entry, mask=there)
        return done + jnp.sum(members, axis=0)

    jax.lax.fori_loop(0, groups, place, none)
    if barrier:
        triton.debug_barrier()

    def add(i, sums):
        there = i < number
        at = triton.load(inverse.at[start + i], mask=there, other=0)
        new = jax.tree.map(
            lambda ref: rows_of(ref, (at[:, None],), ref.shape[-1], there), entries
        )
        return jax.tree.map(jnp.add, sums, new)

    slot = word * WORD + jnp.arange(WORD, dtype=jnp.int32)
    start_of = lambda ref: rows_of(ref, (set_, slot[:, None]), ref.shape[-1])
    found = jax.lax.fori_loop(0, jnp.max(number), add, jax.tree.map(start_of, sums))
    for ref, x in zip(out, found, strict=True):
        store_rows(ref, (set_,), slot, x, slot >= 0)


def _members(words):
    """Bits i32[..., 32] of words i32[...], 0 and 1."""
    lane = jnp.arange(WORD, dtype=jnp.int32)[None, :]
    return (words[:, None] >> lane) & 1


def _below(words):
    """Members of words i32[W] below each bit, i32[W, 32]."""
    lane = jnp.arange(WORD, dtype=jnp.int32)[None, :]
    return jax.lax.population_count(words[:, None] & ((jnp.int32(1) << lane) - 1))
