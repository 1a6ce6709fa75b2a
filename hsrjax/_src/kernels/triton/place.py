"""Which queries and keys a program has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hsrjax._src.core.visible import Visible
from hsrjax._src.kernels.triton.loads import LEAST, padded, rows_of
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
      kept: whether the sets of keys are wanted, for gradients.
      weighed: whether the mass of the keys that are not listed is wanted.
      group: values that share a mean for those keys; 0 is no tail.
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
    kept: bool = False
    weighed: bool = False
    group: int = 0

    @property
    def parts(self) -> int:
        """Of a tile, J."""
        return -(-self.queries // self.rows)


class Taken(NamedTuple):
    """Keys that are gathered at once.

    Attributes:
      at: i32[C], their numbers among those that are gone over.
      keys: f[C, H'].
      values: f[C, D'].
      position: i32[C].
      there: bool[C], False past the last; zeros there.
    """

    at: Any
    keys: Any
    values: Any
    position: Any
    there: Any


class Place:
    """Whose rows a program has: it reads the rows of its tile, and writes its own.

    Attributes:
      lead: tile, set and number of the program among those of the tile.
      part: of the tile.
      live: bool[Q'], rows that are queries; Q' is a power of two.
      at: i32[Q'], which query each row is.
      query: where a row of its numbers begins.
    """

    def __init__(self, sizes: Sizes, keys: Any, number: Any, program: Any = 0):
        """Of a set of keys, of the parts of all tiles, and among those of the part."""
        self.sizes, self.set = sizes, keys
        tile, self.part = number // sizes.parts, number % sizes.parts
        self.lead = tile, self.set, program
        rows = padded(sizes.rows)
        first = self.part * sizes.rows
        row = jnp.arange(rows, dtype=jnp.int32)
        self.live = row < jnp.minimum(sizes.rows, sizes.queries - first)
        # Past the end, not clamped: JAX plays a masked store as one of all lanes.
        self.out = jnp.where(self.live, first + row, sizes.queries)
        self.at = jnp.minimum(self.out, sizes.queries - 1)
        self.query = tile, self.set, self.at[:, None]

    @classmethod
    def of_program(cls, sizes: Sizes) -> Place:
        """This program's, of a grid of sets of keys, parts and programs."""
        return cls(sizes, *map(pl.program_id, range(3)))

    def row(self, ref):
        """A number for each query."""
        return triton.load(ref.at[self.lead[0], self.set, self.at])

    def factor(self, x: Any) -> Any:
        """By which the scores of the queries are multiplied, or None."""
        if x.factor is None:
            return None
        return triton.load(x.factor.at[self.lead[0]])

    def scoring(self, x: Any) -> Callable[[Any], Any]:
        """A function from keys f[C, H'] to their scores f32[Q', C]."""
        queries = rows_of(x.queries, self.query, self.sizes.head_dim)
        factor = self.factor(x)
        if factor is None:
            return lambda keys: wide(queries, keys.T)
        return lambda keys: wide(queries, keys.T) * factor

    def gather(self, ref, slots, width, there=None, *, least: int = LEAST):
        """Rows [C, D'] at slots i32[C]; zeros where there is none."""
        where = self.set, slots[:, None]
        return rows_of(ref, where, width, there, least=least)

    def take(self, x: Any, i: Any, number: Any, slots: Callable[[Any], Any]) -> Taken:
        """Gather number i of `number` keys, whose slots `slots(at)` says."""
        sizes = self.sizes
        at = i * sizes.gathered + jnp.arange(sizes.gathered, dtype=jnp.int32)
        slot = slots(at)
        there = (at < number) & (slot < sizes.slots)
        slot = jnp.minimum(slot, sizes.slots - 1)
        return Taken(
            at=at,
            keys=self.gather(x.keys, slot, sizes.head_dim, there),
            values=self.gather(x.values, slot, sizes.value_dim, there),
            position=slot if x.ids is None else triton.load(x.ids.at[self.set, slot]),
            there=there,
        )

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


class Pieces(NamedTuple):
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
    def of(cls, here: Place, visible: Visible, ids: Any) -> Pieces:
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
