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

from hsrjax._src.core.arrays import finite_or_zero
from hsrjax._src.core.bitset import WORD
from hsrjax._src.core.tiles import Partial
from hsrjax._src.core.visible import Visible
from hsrjax._src.kernels.triton import sketched
from hsrjax._src.kernels.triton.loads import (
    INT8_DEPTH,
    LEAST,
    padded,
    rows_of,
    shaped,
)
from hsrjax._src.kernels.triton.products import wide


class Sizes(NamedTuple):
    """Static sizes of a launch.

    Attributes:
      rows: queries of a part of a tile, R.
      queries: of a tile, Q.
      head_dim: H.
      value_dim: D.
      slots: P.
      piece: keys that are looked at at once.
      gathered: keys that are gathered at once.
      room: of a list, keys.
      programs: that share the keys of a tile.
      listed: False goes over all keys, with no sketch.
      most: share of its first piece from which on a program goes over all keys.
      counted: whether the numbers of keys are wanted.
      interpret: whether JAX plays the kernel on a CPU.
      warps: of a program.
    """

    rows: int
    queries: int
    head_dim: int
    value_dim: int
    slots: int
    piece: int
    gathered: int
    room: int
    programs: int
    listed: bool
    most: float
    counted: bool
    interpret: bool
    warps: int


class Operands(NamedTuple):
    """What a kernel reads.

    Attributes:
      queries: f[M, X, Q, H], X sets of keys.
      law: whose fields are f32[M, X, Q].
      visible: i32[M, X, Q].
      keys: f[X, P, H].
      values: f[X, P, D].
      ids: i32[X, P] or None.
      sketch: of the keys, or None.
    """

    queries: Any
    law: Any
    visible: Visible
    keys: Any
    values: Any
    ids: Any
    sketch: Any


class Found(NamedTuple):
    """What a kernel writes, by program.

    Attributes:
      sums: Partial of [M, X, W, Q].
      size: i32[M, X, W, J], keys that a part lists.
      slots: i32[M, X, W, J, room], which they are.
    """

    sums: Partial
    size: Any
    slots: Any


def attend(x: Operands, sizes: Sizes) -> Found:
    """Launches a program for each set of keys, part of a tile and share of the keys."""
    tiles, sets, queries, _ = x.queries.shape
    parts = -(-queries // sizes.rows)
    lead = tiles, sets, sizes.programs
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
    )
    (result,) = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid=(sets, tiles * parts, sizes.programs),
        out_shape=[found],
        interpret=sizes.interpret,
        compiler_params=triton.CompilerParams(num_warps=sizes.warps, num_stages=3),
        name="hsrjax_attend",
    )(x)
    return result


def _kernel(x: Operands, out: Found, *, sizes: Sizes):
    here = _Place(sizes)
    law = jax.tree.map(here.row, x.law)
    visible = jax.tree.map(
        lambda ref: jnp.where(here.live, here.row(ref), 0), x.visible
    )
    pieces = _Pieces.of(here, visible, x.ids)
    every = pieces.count * sizes.piece
    if sizes.listed:
        size, dense = _list_keys(here, x, out.slots, law, visible, pieces)
        number = jnp.where(dense, every, size)
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


def _list_keys(here, x, out, law, visible, pieces):
    """Writes the slots that may weigh something; how many, and whether all must do."""
    sizes = here.sizes
    deep = functools.partial(rows_of, width=sizes.head_dim, least=INT8_DEPTH)
    queries = deep(x.queries, here.query).astype(jnp.float32)
    centre = deep(x.sketch.centre, (here.set,))
    coded = sketched.code(queries, centre, sizes.head_dim)
    sees = visible.count() > 0
    offsets = jnp.where(sees, law.edge(), jnp.inf)

    def look(i, number):
        at = pieces.start(i) + jnp.arange(sizes.piece, dtype=jnp.int32)
        seen = pieces.within(at).astype(jnp.int32)
        if sizes.slots % sizes.piece:
            at = jnp.minimum(at, sizes.slots - 1)
        codes = here.gather(x.sketch.codes, at, sizes.head_dim, least=INT8_DEPTH)
        facts = (x.sketch.scale, x.sketch.spread, x.sketch.radius)
        block = sketched.Block(
            *(triton.load(f.at[here.set, at // WORD]) for f in facts)
        )
        passes = sketched.passing(coded, codes, block, offsets)
        passes = passes * seen
        place = number + jnp.cumsum(passes) - passes
        place = jnp.where(passes > 0, place, sizes.room)
        where = (*here.lead, here.part, place)
        triton.store(out.at[where], at, mask=place < sizes.room)
        return number + jnp.sum(passes)

    none, hopeless = jnp.int32(0), jnp.bool_(False)
    if sizes.most < 1:
        first = jnp.minimum(pieces.count, 1)
        number = jax.lax.fori_loop(none, first, look, none)
        hopeless = number > int(sizes.most * sizes.piece)
        rest = jnp.where(hopeless, first, pieces.count)
        number = jax.lax.fori_loop(first, rest, look, number)
    else:
        number = jax.lax.fori_loop(none, pieces.count, look, none)
    if not sizes.interpret:
        triton.debug_barrier()
    return number, hopeless | (number > sizes.room)


def _sum(here, x, law, visible, slots, number) -> Partial:
    """Exact sums over `number` keys."""
    sizes = here.sizes
    queries = rows_of(x.queries, here.query, sizes.head_dim)
    law = jax.tree.map(lambda field: field[:, None], law)
    edge = jnp.float32(0.0) if law.keeps_all else jnp.asarray(law.edge())
    start = Partial.zeros(
        queries.shape[:1], padded(sizes.value_dim), relative=law.relative
    )

    def step(i, sums):
        at = i * sizes.gathered + jnp.arange(sizes.gathered, dtype=jnp.int32)
        slot = slots(at)
        there = (at < number) & (slot < sizes.slots)
        slot = jnp.minimum(slot, sizes.slots - 1)
        keys = here.gather(x.keys, slot, sizes.head_dim, there)
        values = here.gather(x.values, slot, sizes.value_dim, there)
        position = slot if x.ids is None else triton.load(x.ids.at[here.set, slot])
        seen = visible.mask(position[None, :]) & there[None, :]
        sinks = visible.sinks(position[None, :])
        scores = wide(queries, keys.T)
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
            weighted=wide(weights, values),
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


class _Place:
    """Which program this is: it reads the rows of its tile, and writes its own.

    Attributes:
      lead: tile, set and number of the program among those of the tile.
      part: of the tile.
      live: bool[Q'], rows that are queries; Q' is a power of two.
      at: i32[Q'], which query each row is.
      query: where a row of its numbers begins.
    """

    def __init__(self, sizes: Sizes):
        parts = -(-sizes.queries // sizes.rows)
        self.sizes, self.set = sizes, pl.program_id(0)
        tile, self.part = pl.program_id(1) // parts, pl.program_id(1) % parts
        self.lead = tile, self.set, pl.program_id(2)
        rows = padded(sizes.rows)
        first = self.part * sizes.rows
        row = jnp.arange(rows, dtype=jnp.int32)
        self.live = row < jnp.minimum(sizes.rows, sizes.queries - first)
        # Past the end, not clamped: JAX plays a masked store as one of all lanes.
        self.out = jnp.where(self.live, first + row, sizes.queries)
        self.at = jnp.minimum(self.out, sizes.queries - 1)
        self.query = tile, self.set, self.at[:, None]

    def row(self, ref):
        """A number for each query."""
        return triton.load(ref.at[self.lead[0], self.set, self.at])

    def gather(self, ref, slots, width, there=None, *, least: int = LEAST):
        """Rows [C, D'] at slots i32[C]; zeros where there is none."""
        where = self.set, slots[:, None]
        return rows_of(ref, where, width, there, least=least)

    def store(self, refs: Any, sums: Any) -> None:
        """Writes the Partial of the queries."""
        width = self.sizes.value_dim
        number = jnp.arange(padded(width), dtype=jnp.int32)[None, :]
        mask = self.live[:, None] & (number < width)
        where = (*self.lead, self.out[:, None], number)
        triton.store(refs.weighted.at[where], sums.weighted, mask=mask)
        for ref, x in zip(refs[1:], sums[1:], strict=True):
            if ref is not None:
                triton.store(ref.at[(*self.lead, self.out)], x, mask=self.live)


class _Pieces(NamedTuple):
    """The share of the keys that a program looks at, piece by piece.

    All pieces that any query of the tile sees are numbered, those of the sinks first;
    a program has a run of them.

    Attributes:
      size: keys of a piece, static.
      first: i32, number of the program's first piece.
      count: i32, of its pieces.
      sinks: i32, how many pieces hold the sinks, or None.
      spans: the ranges of slots that are seen.
    """

    size: int
    first: jax.Array
    count: jax.Array
    sinks: Any
    spans: list[tuple[jax.Array, jax.Array]]

    @classmethod
    def of(cls, here: _Place, visible: Visible, ids: Any) -> _Pieces:
        sizes = here.sizes
        spans = [(jnp.int32(0), jnp.int32(sizes.slots))]
        if ids is None:
            spans = visible.spans()
        size = sizes.piece
        low, high = spans[-1]
        number, sinks = _pieces(low, high, size), None
        if len(spans) == 2:
            end = jnp.minimum((spans[0][1] + (size - 1)) // size, low // size)
            sinks = jnp.maximum(end - spans[0][0] // size, 0)
            number = number + sinks
        share = (number + (sizes.programs - 1)) // sizes.programs
        first = jnp.minimum(here.lead[2] * share, number)
        return cls(size, first, jnp.minimum(share, number - first), sinks, spans)

    def start(self, number):
        """First slots of the program's pieces i32[...]."""
        piece = self.first + number
        start = self.spans[-1][0] // self.size + piece
        if self.sinks is not None:
            at_sinks = self.spans[0][0] // self.size + piece
            start = jnp.where(piece < self.sinks, at_sinks, start - self.sinks)
        return start * self.size

    def slots(self, at):
        """Slots of the keys number i32[C] of the program."""
        return self.start(at // self.size) + at % self.size

    def within(self, slots):
        """Whether any query may see the slots."""
        inside = [(slots >= low) & (slots < high) for low, high in self.spans]
        return functools.reduce(jnp.logical_or, inside)


def _pieces(low, high, size):
    return jnp.maximum((high + (size - 1)) // size - low // size, 0)
