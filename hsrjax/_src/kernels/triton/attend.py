"""Attention of a tile of queries to its share of the keys, in one kernel.

A program has the queries of a tile that share a key head and some of the pieces of the
keys that they see. It goes over the sketch of these without a branch and writes the
slots that may weigh something to a list of its own, in order; then over the list,
gathers keys and values, and sums. The work after the scan is in proportion to the list,
nothing is done twice, and every sum has one order.

A list has room for some of the program's keys. Where it is not enough, or the first
piece shows that it will not be, the program goes over all of its keys: dense attention,
in the same kernel. No key is ever dropped.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hsrjax._src.core import meshes
from hsrjax._src.core.arrays import finite_or_zero
from hsrjax._src.core.bitset import WORD
from hsrjax._src.core.tiles import Partial
from hsrjax._src.core.visible import Visible
from hsrjax._src.kernels.triton import left as lefts
from hsrjax._src.kernels.triton import sketched
from hsrjax._src.kernels.triton.loads import padded, shaped
from hsrjax._src.kernels.triton.place import Pieces, Place, Sizes
from hsrjax._src.kernels.triton.products import wide


class Operands(NamedTuple):
    """What a kernel reads.

    Attributes:
      queries: f[M, X, Q, H], X sets of keys: f32 and scaled, or of the dtype of keys.
      law: whose fields are f32[M, X, Q].
      visible: i32[M, X, Q].
      keys: f[X, P, H].
      values: f[X, P, D].
      ids: i32[X, P] or None.
      sketch: of the keys, or None.
      means: of groups of values, for a tail; or None.
      factor: f32[M], of the scores of queries that are not scaled; or None.
    """

    queries: Any
    law: Any
    visible: Visible
    keys: Any
    values: Any
    ids: Any
    sketch: Any
    means: Any = None
    factor: Any = None

    @property
    def short(self) -> bool:
        """Whether queries have 16 bits, and what comes of them soon has."""
        return self.factor is not None


class Found(NamedTuple):
    """What a kernel writes, by program.

    Attributes:
      sums: Partial of [M, X, W, Q].
      size: i32[M, X, W, J], keys that a part lists.
      slots: i32[M, X, W, J, room], which they are.
      words: i32[M, X, J, P/32], the same as bit sets, or None. All of its keys where a
        program gave up listing them.
      left: of the keys not listed, [M, X, W, Q], or None.
    """

    sums: Partial
    size: Any
    slots: Any
    words: Any
    left: Any


def attend(x: Operands, sizes: Sizes) -> Found:
    """Launches a program for each set of keys, part of a tile and share of the keys."""
    tiles, sets, queries, _ = x.queries.shape
    parts = sizes.parts
    lead = tiles, sets, sizes.programs
    words = None
    if sizes.kept:
        # What no program looks at stays zero.
        words = jnp.zeros((tiles, sets, parts, sizes.slots // WORD), jnp.int32)
        words = meshes.varying(words, x.queries)
    out = lambda *shape, dtype=jnp.float32: shaped((*lead, *shape), dtype, x.queries)
    found = Found(
        sums=Partial(
            weighted=out(queries, sizes.value_dim),
            total=out(queries),
            peak=out(queries) if x.law.relative else None,
            count=out(queries, dtype=jnp.int32),
            candidates=out(queries, dtype=jnp.int32),
        ),
        size=out(parts, dtype=jnp.int32),
        slots=out(parts, sizes.room if sizes.listed else 1, dtype=jnp.int32),
        words=None if words is None else shaped(words.shape, words.dtype, words),
        left=left_of(sizes, out) if sizes.weighed else None,
    )
    reads, at = len(jax.tree.leaves(x)), len(jax.tree.leaves(found[:3]))
    (result,) = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid=(sets, tiles * parts, sizes.programs),
        out_shape=[found],
        input_output_aliases={reads: at} if sizes.kept else {},
        interpret=sizes.interpret,
        compiler_params=triton.CompilerParams(num_warps=sizes.warps, num_stages=3),
        name="hsrjax_attend",
    )(x, words)
    return result


def left_of(sizes: Sizes, out: Any) -> lefts.Left:
    """What is written of the keys not listed; `out(*shape)` shapes an array of rows."""
    row = out(sizes.queries)
    if not sizes.group:
        return lefts.Left(row)
    return lefts.Left(row, row, row, row, out(sizes.queries, sizes.value_dim))


def _kernel(x: Operands, words: Any, out: Found, *, sizes: Sizes):
    del words
    here = Place.of_program(sizes)
    law = jax.tree.map(here.row, x.law)
    visible = jax.tree.map(
        lambda ref: jnp.where(here.live, here.row(ref), 0), x.visible
    )
    pieces = Pieces.of(here, visible, x.ids)
    every = pieces.count * sizes.piece
    if sizes.listed:
        size, dense, left = list_keys(here, x, out, law, visible, pieces)
        number = jnp.where(dense, every, size)
        if sizes.weighed:
            lefts.keep(
                here, out.left, jax.tree.map(lambda x: jnp.where(dense, 0.0, x), left)
            )
    else:
        size, dense, number = jnp.int32(0), jnp.bool_(True), every
    triton.store(out.size.at[(*here.lead, here.part)], size)

    def slots(at):
        """Slots of the keys number i32[C] to sum over."""
        listed = 0
        if sizes.listed:
            where = (*here.lead, here.part, jnp.minimum(at, sizes.room - 1))
            listed = triton.load(
                out.slots.at[where], mask=(at < number) & ~dense, other=0
            )
        return jnp.where(dense, pieces.slots(at), listed)

    sums = _sum(here, x, law, visible, slots, number)
    here.store(out.sums, sums)


def list_keys(here, x, out, law, visible, pieces):
    """Writes the slots that may weigh something.

    Returns how many they are, whether all keys must do instead, and the mass of the
    others f32[Q] relative to the edge.
    """
    sizes = here.sizes
    coded = sketched.code_rows(here, x)
    sees = visible.count() > 0
    offsets = jnp.where(sees, law.edge(), jnp.inf)

    def look(i, found):
        number, left = found
        at = pieces.start(i) + jnp.arange(sizes.piece, dtype=jnp.int32)
        seen = pieces.within(at).astype(jnp.int32)
        if sizes.slots % sizes.piece:
            at = jnp.minimum(at, sizes.slots - 1)
        bounds = sketched.bounds_at(here, x.sketch, coded, at)
        passes = sketched.passing(bounds, offsets) * seen
        if sizes.group:
            split = lefts.in_part(visible, at, sizes.group)
            passes = jnp.maximum(passes, jnp.max(split.astype(jnp.int32), axis=1))
        if sizes.weighed:
            others = (seen > passes)[:, None] & sees[None, :]
            if sizes.group:
                others &= visible.mask(at[None, :]).T
            left = lefts.more(here, x, left, bounds, others, offsets, at)
        place = number + jnp.cumsum(passes) - passes
        place = jnp.where(passes > 0, place, sizes.room)
        where = (*here.lead, here.part, place)
        triton.store(out.slots.at[where], at, mask=place < sizes.room)
        if sizes.kept:
            lane = jnp.arange(WORD, dtype=jnp.int32)[None, :]
            keep(i, jnp.sum(passes.reshape(-1, WORD) << lane, axis=1))
        return number + jnp.sum(passes), left

    def keep(i, words):
        """Writes the words i32[piece / 32] of piece i."""
        word = jnp.arange(sizes.piece // WORD, dtype=jnp.int32)
        word = pieces.start(i) // WORD + word
        past = sizes.slots // WORD
        where = (here.lead[0], here.set, here.part, jnp.minimum(word, past))
        triton.store(out.words.at[where], words, mask=word < past)

    nothing, hopeless = jnp.int32(0), jnp.bool_(False)
    found = (
        nothing,
        lefts.Left.zeros(sizes, offsets.shape[0]) if sizes.weighed else None,
    )
    if sizes.most < 1:
        first = jnp.minimum(pieces.count, 1)
        found = jax.lax.fori_loop(nothing, first, look, found)
        hopeless = found[0] > int(sizes.most * sizes.piece)
        rest = jnp.where(hopeless, first, pieces.count)
        found = jax.lax.fori_loop(first, rest, look, found)
        if sizes.kept:
            every = jnp.full((sizes.piece // WORD,), -1, jnp.int32)
            fill = lambda i, found: (keep(i, every), found)[1]
            found = jax.lax.fori_loop(rest, pieces.count, fill, found)
    else:
        found = jax.lax.fori_loop(nothing, pieces.count, look, found)
    if not sizes.interpret:
        triton.debug_barrier()
    number, left = found
    return number, hopeless | (number > sizes.room), left


def _sum(here, x, law, visible, slots, number) -> Partial:
    """Exact sums over `number` keys."""
    sizes = here.sizes
    score = here.scoring(x)
    law = jax.tree.map(lambda field: field[:, None], law)
    edge = jnp.float32(0.0) if law.keeps_all else jnp.asarray(law.edge())
    start = Partial.zeros(
        here.live.shape, padded(sizes.value_dim), relative=law.relative
    )

    def step(i, sums):
        _, keys, values, position, there = here.take(x, i, number, slots)
        seen = visible.mask(position[None, :]) & there[None, :]
        sinks = visible.sinks(position[None, :])
        scores = score(keys)
        peak = None
        if law.relative:
            scores = jnp.where(seen, scores, -jnp.inf)
            peak = jnp.maximum(sums.peak, jnp.max(scores, axis=1))
            sums = sums.relative_to(peak)
        shift = None if peak is None else finite_or_zero(peak)[:, None]
        weights = law.weigh_row(scores, sinks=sinks, peak=shift)
        # On a GPU the larger of a number and NaN is the number.
        unknown = jnp.isnan(scores) | jnp.isnan(edge)
        weights = jnp.where(unknown, jnp.nan, weights)
        weights = jnp.where(seen, weights, 0.0)
        found = Partial(
            weighted=wide(weights, values, pieces=2 if x.short else 3),
            total=jnp.sum(weights, axis=1),
            peak=None,
            count=sums.count,
            candidates=sums.candidates,
        )
        if sizes.counted:
            firing = law.fires(scores, sinks=sinks) & seen
            found = found._replace(
                count=sums.count + jnp.sum(firing.astype(jnp.int32), axis=1),
                candidates=sums.candidates + jnp.sum(seen.astype(jnp.int32), axis=1),
            )
        return found._replace(
            weighted=sums.weighted + found.weighted,
            total=sums.total + found.total,
            peak=peak,
        )

    rounds = (number + (sizes.gathered - 1)) // sizes.gathered
    return jax.lax.fori_loop(0, rounds, step, start)
