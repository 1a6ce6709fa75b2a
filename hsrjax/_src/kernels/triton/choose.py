"""Which of the scored keys of a row take part, and the sums over them: one kernel."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hsrjax._src.core.tiles import Partial
from hsrjax._src.kernels.triton.loads import padded, rows_of, shaped
from hsrjax._src.kernels.triton.place import Sizes
from hsrjax._src.kernels.triton.rules import Rule
from hsrjax._src.kernels.triton.scores import ROOM, Scored

MOST = 4096
"""Keys of a row that are chosen from."""
_COPIED = 4096
"""Keys of all lists of a row that are copied at once."""
_AT_ONCE = 64
"""Values that are summed at once."""
_WARPS = 8


class Chosen(NamedTuple):
    """What is known of a row in the end, [M, X, Q].

    Attributes:
      sums: Partial, relative to the best score where exponentials are summed.
      left: f32, at least what the keys left out weigh likewise, or None.
      size: i32, keys that its part lists.
      sound: i32, 0 where all this is of no use.
      scores: f32[M, X, Q, MOST], of the keys to choose from.
      slots: i32[M, X, Q, MOST], which they are.
    """

    sums: Partial
    left: Any
    size: Any
    sound: Any
    scores: Any
    slots: Any


def choose(
    found: Scored, values: jax.Array, guess: jax.Array, sizes: Sizes, rule: Rule
) -> Chosen:
    """Launches a program for each row.

    Args:
      found: by the programs of `score`.
      values: f[X, P, D].
      guess: f32[M, X, Q], the offset of `score`.
      sizes: of its launch.
      rule: says which keys take part.
    """
    tiles, sets, _, queries = found.number.shape
    out = lambda *shape, dtype=jnp.float32: shaped(
        (tiles, sets, queries, *shape), dtype, guess
    )
    chosen = Chosen(
        sums=Partial(
            weighted=out(sizes.value_dim),
            total=out(),
            peak=None,
            count=out(dtype=jnp.int32),
            candidates=out(dtype=jnp.int32),
        ),
        left=None if found.left is None else out(),
        size=out(dtype=jnp.int32),
        sound=out(dtype=jnp.int32),
        scores=out(MOST),
        slots=out(MOST, dtype=jnp.int32),
    )
    (result,) = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, rule=rule),
        grid=(sets, tiles * queries),
        out_shape=[chosen],
        interpret=sizes.interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="hsrjax_choose",
    )(found._replace(listed=None), values, guess)
    return result._replace(scores=None, slots=None)


def _kernel(found: Scored, values, guess, out: Any, *, sizes: Sizes, rule: Rule):
    keys, number = pl.program_id(0), pl.program_id(1)
    tile, row = number // sizes.queries, number % sizes.queries
    mine = tile, keys, row
    program = jnp.arange(padded(sizes.programs, 1), dtype=jnp.int32)
    there = program < sizes.programs
    program = jnp.minimum(program, sizes.programs - 1)
    of_programs = lambda ref, at: triton.load(
        ref.at[tile, keys, program, at], mask=there, other=0
    )
    store = lambda ref, x: triton.store(ref.at[mine], x)

    held = of_programs(found.number, row)
    number = jnp.sum(held)
    fits = (number <= MOST) & (jnp.max(held) <= ROOM)
    held = jnp.where(fits, held, 0)
    number = jnp.where(fits, number, 0)
    _copy(found, out, (tile, keys, row), program, held)
    if not sizes.interpret:
        triton.debug_barrier()

    def scored(at):
        where = (*mine, jnp.minimum(at, MOST - 1))
        return triton.load(out.scores.at[where], mask=at < number, other=-jnp.inf)

    scores = scored(jnp.arange(MOST, dtype=jnp.int32))
    guess = triton.load(guess.at[mine])
    by = rule.settle(scores)
    finite = jnp.max(jnp.isnan(scores).astype(jnp.int32)) == 0
    finite &= by.peak < jnp.inf
    store(out.sound, (fits & finite & rule.holds(by, guess)).astype(jnp.int32))
    fires = rule.fires(scores, by)
    store(out.sums.count, jnp.sum(fires.astype(jnp.int32)))
    store(out.sums.candidates, jnp.sum(of_programs(found.looked, row)))
    store(out.sums.total, jnp.sum(rule.weigh(scores, by)))
    store(out.size, jnp.sum(of_programs(found.size, row // sizes.rows)))
    if found.left is not None:
        others = ~fires & (scores > -jnp.inf)
        known = jnp.sum(jnp.where(others, jnp.exp(scores - by.peak), 0.0))
        left = jnp.sum(of_programs(found.left, row)) * jnp.exp(guess - by.peak)
        store(out.left, known + jnp.where(guess > -jnp.inf, left, 0.0))

    width = padded(sizes.value_dim)

    def add(i, weighted):
        at = i * _AT_ONCE + jnp.arange(_AT_ONCE, dtype=jnp.int32)
        weights = rule.weigh(scored(at), by)
        takes = weights > 0.0
        where = (*mine, jnp.minimum(at, MOST - 1))
        slot = triton.load(out.slots.at[where], mask=takes, other=0)
        slot = jnp.clip(slot, 0, sizes.slots - 1)
        rows = rows_of(values, (keys, slot[:, None]), sizes.value_dim, takes)
        return weighted + jnp.sum(weights[:, None] * rows.astype(jnp.float32), axis=0)

    rounds = (number + (_AT_ONCE - 1)) // _AT_ONCE
    start = jnp.zeros((width,), jnp.float32)
    weighted = jax.lax.fori_loop(0, rounds, add, start)
    # Past the end, not clamped: JAX plays a masked store as one of all lanes.
    column = jnp.arange(width, dtype=jnp.int32)
    inside = column < sizes.value_dim
    column = jnp.where(inside, column, sizes.value_dim)
    triton.store(out.sums.weighted.at[(*mine, column)], weighted, mask=inside)


def _copy(found: Scored, out: Chosen, mine, program, held):
    """Writes the lists of all programs behind one another."""
    tile, keys, row = mine
    start = jnp.cumsum(held) - held
    columns = max(1, _COPIED // program.shape[0])

    def copy(i, done):
        at = i * columns + jnp.arange(columns, dtype=jnp.int32)
        there = at[None, :] < held[:, None]
        where = tile, keys, program[:, None], row, jnp.minimum(at, ROOM - 1)[None, :]
        # Past the end, not clamped: JAX plays a masked store as one of all lanes.
        to = (*mine, jnp.where(there, start[:, None] + at[None, :], MOST))
        both: Any = (found.scores, out.scores), (found.slots, out.slots)
        for source, target in both:
            rows = triton.load(source.at[where], mask=there, other=0)
            triton.store(target.at[to], rows, mask=there)
        return done + 1

    rounds = (jnp.max(held) + (columns - 1)) // columns
    jax.lax.fori_loop(0, rounds, copy, jnp.int32(0))
