"""Gradients of attention in kernels, over the lists that the forward pass left.

A part of a tile whose list is short goes over it again: scores, weights and their
derivatives are made anew, the gradients of its queries add up, and what each listed key
gets is left as an entry, for the key to add up (`entries.py`). A part that was dense,
or lists much of what it sees, goes over all of its keys for the gradients of queries.
Each block of keys then goes over these parts in turn for its own: five products of
every pair become seven, and there are no entries.

Dense attention is all parts of the second kind. Every sum has one order.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hsrjax._src.core.visible import Visible
from hsrjax._src.kernels.triton import entries
from hsrjax._src.kernels.triton.attend import Operands
from hsrjax._src.kernels.triton.entries import ByKey, Lists, Room
from hsrjax._src.kernels.triton.loads import LEAST, padded, rows_of, shaped, store_rows
from hsrjax._src.kernels.triton.place import Pieces, Place, Sizes
from hsrjax._src.kernels.triton.products import split, times
from hsrjax._src.kernels.triton.rows import Bars, Rows

_FAR = 2**31 - 1
_LOOKED_UP = 128
"""Parts that a block of keys asks at once whether they see it."""
_NUMBERS = 256
"""Of a query and its cotangent that allow for the larger tiles: no register spills."""


class RowGrads(NamedTuple):
    """Of queries f32[M, X, W, Q, H] and fields of the law [M, X, W, Q], by program."""

    queries: Any
    law: Any


class Todo(NamedTuple):
    """Parts of tiles that go over all of their keys, [X, Y] each.

    Attributes:
      every: i32, which these are, 0 or 1, by number of the part.
      order: i32, their numbers, ascending.
      count: i32[X], how many there are.
      spans: ranges (low, high) of slots that each in this order sees, i32.
    """

    every: Any
    order: Any
    count: Any
    spans: list[tuple[Any, Any]]


def gradients(
    x: Operands, bars: Bars, words: jax.Array | None, sizes: Sizes
) -> tuple[jax.Array, Any, ByKey]:
    """Of queries f32[M, X, Q, H], fields of the law f32[M, X, Q], keys and values.

    Args:
      x: operands of the forward pass.
      bars: cotangents.
      words: i32[M, X, J, P/32], the sets of keys; None is all of them.
      sizes: static.
    """
    if x.keys.dtype == jnp.float16 and _numbers(x) > 2 * _NUMBERS:
        # Pieces of wide heads would take more shared memory than small cards have.
        names = "queries", "keys", "values"
        more = {name: getattr(x, name).astype(jnp.float32) for name in names}
        x = x._replace(**more)
    spans = _spans(x.visible, sizes, x.ids)
    lists = None
    every = spans[-1][1] > 0
    if words is not None:
        sets, width = words.shape[1], words.shape[-1]
        words = jnp.swapaxes(words, 0, 1).reshape(sets, -1, width)
        seen = functools.reduce(jnp.add, [high - low for low, high in spans])
        lists, every = entries.split(words, seen)
    todo = _todo(every, spans)
    sizes, sizes_by_key = _tuned(x, sizes)
    rows = _row_grads(x, bars, todo, sizes)
    by_key = _key_grads(x, bars, todo, sizes_by_key)
    if lists is not None:
        rows, by_key = _listed(x, bars, lists, rows, by_key, sizes)
    queries, law = jax.tree.map(lambda x: jnp.sum(x, axis=2), tuple(rows))
    return queries, law, by_key


def most_rows_of(x: Operands) -> int:
    """Queries of a part of a tile, at most, that fit into any card."""
    return 32 if _numbers(x) <= _NUMBERS else LEAST


def _tuned(x: Operands, sizes: Sizes) -> tuple[Sizes, Sizes]:
    """Of programs that have queries, and of those that have keys."""
    numbers = _numbers(x)
    few, many = numbers <= _NUMBERS // 2, numbers > _NUMBERS
    by_query = {"gathered": 16 if many else 32, "warps": 4 if few else 8}
    by_key = {"gathered": 32 if few else 16, "warps": 8 if many else 4}
    return sizes._replace(**by_query), sizes._replace(**by_key)


def _numbers(x: Operands) -> int:
    """What a program holds of a query, in pieces of the dtype of keys."""
    numbers = padded(x.keys.shape[-1]) + padded(x.values.shape[-1])
    return numbers * (1 if x.keys.dtype == jnp.bfloat16 else 2)


def _spans(visible: Visible, sizes: Sizes, ids: Any):
    """Ranges (low, high) of slots, i32[X, Y] each, that a part of a tile sees."""
    tiles, sets, queries = visible.high.shape
    rows = sizes.parts * sizes.rows
    fill = [(0, 0), (0, 0), (0, rows - queries)]

    def cut(x):
        x = jnp.pad(x, fill).reshape(tiles, sets, sizes.parts, sizes.rows)
        return jnp.swapaxes(x, 0, 1).reshape(sets, -1, sizes.rows)

    visible = jax.tree.map(cut, visible)
    spans = [(visible.low, visible.high)]
    if visible.sink_high is not None:
        spans.insert(0, (visible.sink_low, visible.sink_high))
    hulls = []
    for low, high in spans:
        low = jnp.zeros_like(high) if low is None else low
        low = jnp.min(jnp.where(low < high, low, _FAR), axis=-1)
        high = jnp.max(high, axis=-1)
        hulls.append((jnp.minimum(low, high), high))
    if ids is None:
        return hulls
    every = jnp.where(hulls[-1][1] > 0, sizes.slots, 0)  # of any order
    return [(jnp.zeros_like(every), every)]


def _todo(every: jax.Array, spans: list[tuple[jax.Array, jax.Array]]) -> Todo:
    parts = every.shape[1]
    number = jnp.broadcast_to(jnp.arange(parts, dtype=jnp.int32), every.shape)
    order = jnp.minimum(jnp.sort(jnp.where(every, number, parts), axis=1), parts - 1)
    ordered = lambda x: jnp.take_along_axis(x, order, axis=1, mode="promise_in_bounds")
    every = every.astype(jnp.int32)
    return Todo(every, order, jnp.sum(every, axis=1), jax.tree.map(ordered, spans))


def _row_grads(x: Operands, bars: Bars, todo: Todo, sizes: Sizes) -> RowGrads:
    """Of parts that go over all of their keys; zero for others."""
    tiles, sets, queries, _ = x.queries.shape
    lead = tiles, sets, sizes.programs, queries
    out = lambda *shape: shaped((*lead, *shape), jnp.float32, x.queries)
    (found,) = pl.pallas_call(
        functools.partial(_row_kernel, sizes=sizes),
        grid=(sets, tiles * sizes.parts, sizes.programs),
        out_shape=[RowGrads(out(sizes.head_dim), jax.tree.map(lambda _: out(), x.law))],
        interpret=sizes.interpret,
        compiler_params=triton.CompilerParams(num_warps=sizes.warps, num_stages=1),
        name="hsrjax_row_grads",
    )(x, bars, todo.every)
    return found


def _row_kernel(x: Operands, bars: Bars, every, out: RowGrads, *, sizes: Sizes):
    here = Place.of_program(sizes)
    rows = Rows.of(here, x, bars)
    pieces = Pieces.of(here, rows.visible, x.ids)
    is_todo = triton.load(every.at[here.set, pl.program_id(1)]) > 0
    number = jnp.where(is_todo, pieces.count * sizes.piece, 0)
    found = _over(here, x, rows, number, pieces.slots, None)
    _store_rows(here, out, found, here.live)


def _over(here: Place, x: Operands, rows: Rows, number, slots, leave) -> RowGrads:
    """Gradients of the rows from `number` keys, `slots(at)`.

    `leave(at, by_key)` is called with what the keys get.
    """
    sizes = here.sizes
    start = RowGrads(
        queries=jnp.zeros(rows.queries.pieces[0].shape, jnp.float32),
        law=jax.tree.map(lambda x: jnp.zeros_like(x[0]), rows.law),
    )

    def step(i, grads):
        at, keys, values, position, there = here.take(x, i, number, slots)
        weights, scores_bar, law_bar = rows.pull(keys, values, position, there)
        if leave is not None:
            leave(at, rows.by_key(weights, scores_bar))
        by_query = times(scores_bar.T, split(keys, keys, 1), order=2)
        new = RowGrads(by_query, law_bar)
        return jax.tree.map(jnp.add, grads, new)

    rounds = (number + (sizes.gathered - 1)) // sizes.gathered
    return jax.lax.fori_loop(0, rounds, step, start)


def _store_rows(here: Place, refs: RowGrads, grads: RowGrads, there) -> None:
    row = jnp.where(there, here.out, here.sizes.queries)
    store_rows(refs.queries, here.lead, row, grads.queries, there)
    for ref, x in zip(
        jax.tree.leaves(refs.law), jax.tree.leaves(grads.law), strict=True
    ):
        triton.store(ref.at[(*here.lead, row)], x, mask=there)


def _key_grads(x: Operands, bars: Bars, todo: Todo, sizes: Sizes) -> ByKey:
    """Of all keys, from the parts that go over all of theirs."""
    sets, slots, _ = x.keys.shape
    out = lambda like: shaped(like.shape, jnp.float32, like)
    (found,) = pl.pallas_call(
        functools.partial(_key_kernel, sizes=sizes),
        grid=(sets, -(-slots // sizes.gathered), 1),
        out_shape=[ByKey(out(x.keys), out(x.values))],
        interpret=sizes.interpret,
        compiler_params=triton.CompilerParams(num_warps=sizes.warps, num_stages=1),
        name="hsrjax_key_grads",
    )(x, bars, todo)
    return found


def _key_kernel(x: Operands, bars: Bars, todo: Todo, out: ByKey, *, sizes: Sizes):
    set_, first = pl.program_id(0), pl.program_id(1) * sizes.gathered
    slot = first + jnp.arange(sizes.gathered, dtype=jnp.int32)
    there = slot < sizes.slots
    at = jnp.minimum(slot, sizes.slots - 1)
    keys = rows_of(x.keys, (set_, at[:, None]), sizes.head_dim, there)
    values = rows_of(x.values, (set_, at[:, None]), sizes.value_dim, there)
    position = at if x.ids is None else triton.load(x.ids.at[set_, at])
    low, high = _seeing(todo, set_, first, sizes.gathered)

    def step(i, grads):
        here = Place(sizes, set_, triton.load(todo.order.at[set_, i]))
        rows = Rows.of(here, x, bars)
        weights, scores_bar, _ = rows.pull(keys, values, position, there)
        new = rows.by_key(weights, scores_bar)
        return jax.tree.map(jnp.add, grads, new)

    start = ByKey(*(jnp.zeros(x.shape, jnp.float32) for x in (keys, values)))
    found = jax.lax.fori_loop(low, high, step, start)
    for ref, grad in zip(out, found, strict=True):
        store_rows(ref, (set_,), slot, grad, there)


def _seeing(todo: Todo, set_, first, width):
    """The range of the parts of `todo` that hold all which see a block of keys."""
    parts = todo.order.shape[1]
    count = triton.load(todo.count.at[set_])

    def look(i, found):
        low, high = found
        part = i * _LOOKED_UP + jnp.arange(_LOOKED_UP, dtype=jnp.int32)
        at = jnp.minimum(part, parts - 1)
        sees = jnp.zeros(part.shape, jnp.int32)
        for begin, end in todo.spans:
            begin, end = (triton.load(ref.at[set_, at]) for ref in (begin, end))
            inside = jnp.maximum(begin, first) < jnp.minimum(end, first + width)
            sees = jnp.maximum(sees, inside.astype(jnp.int32))
        sees = (sees > 0) & (part < count)
        low = jnp.minimum(low, jnp.min(jnp.where(sees, part, _FAR)))
        return low, jnp.maximum(high, jnp.max(jnp.where(sees, part + 1, 0)))

    rounds = (count + (_LOOKED_UP - 1)) // _LOOKED_UP
    return jax.lax.fori_loop(0, rounds, look, (jnp.int32(_FAR), jnp.int32(0)))


def _listed(
    x: Operands,
    bars: Bars,
    lists: Lists,
    rows: RowGrads,
    by_key: ByKey,
    sizes: Sizes,
) -> tuple[RowGrads, ByKey]:
    """Adds the gradients of the parts that have lists, round by round."""
    room = entries.room_for(lists, 4 * (sizes.head_dim + sizes.value_dim))

    def one_round(i, grads):
        rows, by_key = grads
        first = (i * room.begin)[None]
        slots = entries.expand(lists, first, room, interpret=sizes.interpret)
        rows, found = _list_grads(x, bars, lists, first, slots, rows, room, sizes)
        return rows, entries.add_entries(
            lists, first, room, found, by_key, interpret=sizes.interpret
        )

    if lists.most * lists.begin.size <= room.begin:
        return one_round(jnp.int32(0), (rows, by_key))
    rounds = (lists.total + (room.begin - 1)) // room.begin
    return jax.lax.fori_loop(0, rounds, one_round, (rows, by_key))


def _list_grads(
    x: Operands,
    bars: Bars,
    lists: Lists,
    first: jax.Array,
    slots: jax.Array,
    rows: RowGrads,
    room: Room,
    sizes: Sizes,
) -> tuple[RowGrads, ByKey]:
    """Gradients of the rows whose lists a round has, in place, and its entries."""
    tiles, sets, *_ = x.queries.shape
    operands = x, bars, lists.begin, lists.size, first, slots
    reads, writes = (len(jax.tree.leaves(tree)) for tree in (operands, rows))
    out = lambda width: shaped((room.size, width), jnp.float32, x.keys)
    return tuple(
        pl.pallas_call(
            functools.partial(_list_kernel, sizes=sizes, room=room),
            grid=(sets, tiles * sizes.parts, sizes.programs),
            out_shape=[
                jax.tree.map(lambda x: shaped(x.shape, x.dtype, x), rows),
                ByKey(out(sizes.head_dim), out(sizes.value_dim)),
            ],
            input_output_aliases={reads + i: i for i in range(writes)},
            interpret=sizes.interpret,
            compiler_params=triton.CompilerParams(num_warps=sizes.warps, num_stages=1),
            name="hsrjax_list_grads",
        )(*operands, rows)
    )


def _list_kernel(
    x: Operands, bars: Bars, begin, size, first, slots, old, out, found, *, sizes, room
):
    del old
    here = Place.of_program(sizes)
    rows = Rows.of(here, x, bars)
    part = here.set, pl.program_id(1)
    first = triton.load(first.at[jnp.int32(0)])
    begin, size = triton.load(begin.at[part]), triton.load(size.at[part])
    mine = room.takes(begin, first) & (size > 0)
    runs = (size + (sizes.gathered - 1)) // sizes.gathered
    share = (runs + (sizes.programs - 1)) // sizes.programs * sizes.gathered
    start = jnp.minimum(here.lead[2] * share, size)
    number = jnp.where(mine, jnp.minimum(share, size - start), 0)
    start = start + begin - first

    def slots_of(at):
        return triton.load(
            slots.at[jnp.where(at < number, start + at, 0)], mask=at < number, other=0
        )

    def leave(at, by_key):
        there = at < number
        entry = jnp.where(there, start + at, room.size)
        for ref, grads in zip(found, by_key, strict=True):
            store_rows(ref, (), entry, grads, there)

    grads = _over(here, x, rows, number, slots_of, leave)
    _store_rows(here, out, grads, here.live & mine)
