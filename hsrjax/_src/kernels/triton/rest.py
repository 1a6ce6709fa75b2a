"""Rows that could not be chosen from lists, over all of their keys: one kernel.

Whatever the keys are, it is right: a program has a row and goes over its keys a few
times. A launch that finds every row done takes as long as a launch.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hsrjax._src.kernels.triton.attend import Operands
from hsrjax._src.kernels.triton.choose import Chosen
from hsrjax._src.kernels.triton.loads import padded, rows_of
from hsrjax._src.kernels.triton.place import Sizes
from hsrjax._src.kernels.triton.rules import Rule

_NUMBERS = 4096
"""Of keys, that are read at once."""
_WARPS = 8


def finish(x: Operands, chosen: Chosen, sizes: Sizes, rule: Rule) -> Chosen:
    """What `choose` found, with every row sound; writes over it."""
    tiles, sets, queries, _ = x.queries.shape
    x = x._replace(law=None, sketch=None)
    reads, arrays = len(jax.tree.leaves(x)), len(jax.tree.leaves(chosen))
    like = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype), chosen)
    if hasattr(jax.typeof(x.queries), "mat"):
        like = jax.tree.map(jax.typeof, chosen)
    (result,) = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, rule=rule),
        grid=(sets, tiles * queries),
        out_shape=[like],
        input_output_aliases={reads + i: i for i in range(arrays)},
        interpret=sizes.interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=2),
        name="hsrjax_rest",
    )(x, chosen)
    return result


def _kernel(x: Operands, before: Chosen, out: Any, *, sizes: Sizes, rule: Rule):
    keys, number = pl.program_id(0), pl.program_id(1)
    mine = number // sizes.queries, keys, number % sizes.queries
    pending = triton.load(before.sound.at[mine]) == 0
    width = padded(max(sizes.head_dim, sizes.value_dim))
    at_once = max(16, _NUMBERS // width)
    visible = jax.tree.map(lambda ref: triton.load(ref.at[mine]), x.visible)
    low = jnp.int32(0) if visible.low is None else visible.low
    count = jnp.where(pending, jnp.maximum(visible.high - low, 0), 0)
    rounds = (count + (at_once - 1)) // at_once
    query = rows_of(x.queries, mine, sizes.head_dim).astype(jnp.float32)
    if x.factor is not None:
        query *= triton.load(x.factor.at[mine[0]])

    def scored(i):
        """Slots i32[C], which are seen, and their scores f32[C]."""
        at = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
        there = at < count
        slot = jnp.minimum(low + at, sizes.slots - 1)
        rows = rows_of(x.keys, (keys, slot[:, None]), sizes.head_dim, there)
        scores = jnp.sum(query[None, :] * rows.astype(jnp.float32), axis=1)
        return slot, there, jnp.where(there, scores, -jnp.inf)

    def fold(measure, start):
        more = lambda i, sums: sums + measure(scored(i)[2])
        return jax.lax.fori_loop(0, rounds, more, start)

    def best(i, found):
        scores = scored(i)[2]
        broken = jnp.max(jnp.isnan(scores).astype(jnp.int32))
        return jnp.maximum(found[0], jnp.max(scores)), jnp.maximum(found[1], broken)

    start = jnp.float32(-jnp.inf), jnp.int32(0)
    peak, broken = jax.lax.fori_loop(0, rounds, best, start)
    by = rule.settle_all(fold, peak)
    by = by._replace(peak=jnp.where(broken > 0, jnp.nan, by.peak))

    def add(i, sums):
        weighted, total, count, left = sums
        slot, there, scores = scored(i)
        fires = rule.fires(scores, by)
        weights = jnp.where(broken > 0, jnp.nan, rule.weigh(scores, by))
        weights = jnp.where(there, weights, 0.0)
        takes = there & ~(weights == 0.0)
        rows = rows_of(x.values, (keys, slot[:, None]), sizes.value_dim, takes)
        weighted += jnp.sum(weights[:, None] * rows.astype(jnp.float32), axis=0)
        others = jnp.where(there & ~fires, jnp.exp(scores - by.peak), 0.0)
        count += jnp.sum(fires.astype(jnp.int32))
        return weighted, total + jnp.sum(weights), count, left + jnp.sum(others)

    columns = padded(sizes.value_dim)
    nothing = jnp.float32(0.0)
    start = jnp.zeros((columns,), jnp.float32), nothing, jnp.int32(0), nothing
    weighted, total, fired, left = jax.lax.fori_loop(0, rounds, add, start)

    def store(ref: Any, x: Any):
        triton.store(ref.at[mine], jnp.where(pending, x, triton.load(ref.at[mine])))

    store(out.sums.total, total)
    store(out.sums.count, fired)
    store(out.sums.candidates, count)
    store(out.size, count)
    if out.left is not None:
        store(out.left, left)
    # Past the end, not clamped: JAX plays a masked store as one of all lanes.
    column = jnp.arange(columns, dtype=jnp.int32)
    inside = pending & (column < sizes.value_dim)
    column = jnp.where(inside, column, sizes.value_dim)
    triton.store(out.sums.weighted.at[(*mine, column)], weighted, mask=inside)
