"""The exact scores of the keys that may reach an offset, by row, in one kernel.

As in `attend`, but what it finds is written instead of summed: which keys weigh how
much is to be seen from all of them. A list of a row has room for few keys, and says
how many there were.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hsrjax._src.kernels.triton.attend import Operands, list_keys
from hsrjax._src.kernels.triton.loads import shaped
from hsrjax._src.kernels.triton.place import Pieces, Place, Sizes

ROOM = 512
"""Of the list of a row, keys."""


class Scored(NamedTuple):
    """What the programs write of a row, [M, X, W, Q].

    Attributes:
      number: i32, keys whose score reaches the offset; there may be no room for all.
      scores: f32[M, X, W, Q, ROOM], of these.
      slots: i32[M, X, W, Q, ROOM], which they are.
      looked: i32, visible keys that were scored.
      left: f32, at least sum exp(score - offset) over the keys below the offset, or
        None.
      size: i32[M, X, W, J], keys that a part lists.
      listed: i32[M, X, W, J, room], which they are.
    """

    number: Any
    scores: Any
    slots: Any
    looked: Any
    left: Any
    size: Any
    listed: Any


class _Lists(NamedTuple):
    """As `list_keys` writes them."""

    slots: Any
    words: Any = None


def score(x: Operands, sizes: Sizes) -> Scored:
    """Launches a program for each set of keys, part of a tile and share of the keys."""
    tiles, sets, queries, _ = x.queries.shape
    lead = tiles, sets, sizes.programs
    out = lambda *shape, dtype=jnp.int32: shaped((*lead, *shape), dtype, x.queries)
    found = Scored(
        number=out(queries),
        scores=out(queries, ROOM, dtype=jnp.float32),
        slots=out(queries, ROOM),
        looked=out(queries),
        left=out(queries, dtype=jnp.float32) if sizes.weighed else None,
        size=out(sizes.parts),
        listed=out(sizes.parts, sizes.room),
    )
    (result,) = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid=(sets, tiles * sizes.parts, sizes.programs),
        out_shape=[found],
        interpret=sizes.interpret,
        compiler_params=triton.CompilerParams(num_warps=sizes.warps, num_stages=3),
        name="hsrjax_scores",
    )(x)
    return result


def _kernel(x: Operands, out: Scored, *, sizes: Sizes):
    here = Place.of_program(sizes)
    law = jax.tree.map(here.row, x.law)
    visible = jax.tree.map(
        lambda ref: jnp.where(here.live, here.row(ref), 0), x.visible
    )
    pieces = Pieces.of(here, visible, x.ids)
    lists = _Lists(out.listed)
    size, over, left = list_keys(here, x, lists, law, visible, pieces)
    triton.store(out.size.at[(*here.lead, here.part)], size)
    score, offset = here.scoring(x), law.edge()

    def slots(at):
        where = (*here.lead, here.part, jnp.minimum(at, sizes.room - 1))
        return triton.load(out.listed.at[where], mask=at < listed, other=0)

    def step(i, found):
        number, looked, left = found
        _, keys, _, position, there = here.take(x, i, listed, slots)
        seen = visible.mask(position[None, :]) & there[None, :]
        scores = score(keys)
        # NaN is kept, for the row to be one.
        below = scores < offset[:, None]
        kept = (seen & ~below).astype(jnp.int32)
        place = number[:, None] + jnp.cumsum(kept, axis=1) - kept
        mask = here.live[:, None] & (kept > 0) & (place < ROOM)
        # Past the end, not clamped: JAX plays a masked store as one of all lanes.
        where = (*here.lead, here.out[:, None], jnp.where(mask, place, ROOM))
        triton.store(out.scores.at[where], scores, mask=mask)
        slot = jnp.broadcast_to(position[None, :], mask.shape)
        triton.store(out.slots.at[where], slot, mask=mask)
        if sizes.weighed:
            weights = jnp.exp(scores - offset[:, None])
            left += jnp.sum(jnp.where(seen & below, weights, 0.0), axis=1)
        number += jnp.sum(kept, axis=1)
        return number, looked + jnp.sum(seen.astype(jnp.int32), axis=1), left

    listed = jnp.where(over, 0, size)
    nothing = jnp.zeros(offset.shape, jnp.int32)
    rounds = (listed + (sizes.gathered - 1)) // sizes.gathered
    below = left.most if sizes.weighed else None
    found = jax.lax.fori_loop(0, rounds, step, (nothing, nothing, below))
    number, looked, left = found
    number = jnp.where(over, ROOM + 1, number)
    where = (*here.lead, here.out)
    triton.store(out.number.at[where], number, mask=here.live)
    triton.store(out.looked.at[where], looked, mask=here.live)
    if sizes.weighed:
        triton.store(out.left.at[where], left, mask=here.live)
