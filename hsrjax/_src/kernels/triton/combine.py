"""What the programs of a launch found, made one: a kernel, not many small ones."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hsrjax._src.core.arrays import finite_or_zero
from hsrjax._src.kernels.triton.attend import Found
from hsrjax._src.kernels.triton.loads import padded, shaped
from hsrjax._src.kernels.triton.place import Sizes

_AT_ONCE = 32
"""Programs whose sums of values are read at once."""


def combine(found: Found, sizes: Sizes) -> Found:
    """Sums over the programs, which are added in their order.

    Returns:
      `found` without the axis W. The size of a part is that of each of its queries:
      parts may be smaller where gradients are asked for, and shapes may not depend on
      it.
    """
    tiles, sets, _, queries = found.sums.total.shape
    like = found.sums.total
    of_row = lambda x: shaped((tiles, sets, queries, *x.shape[4:]), x.dtype, like)
    summed = Found(
        sums=jax.tree.map(of_row, found.sums),
        size=shaped((tiles, sets, queries), jnp.int32, like),
        slots=None,
        words=None,
        left=jax.tree.map(of_row, found.left),
    )
    (result,) = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid=(sets, tiles * queries),
        out_shape=[summed],
        interpret=sizes.interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        name="hsrjax_combine",
    )(found._replace(slots=None, words=None))
    return result._replace(words=found.words)


def _kernel(x: Any, out: Any, *, sizes: Sizes):
    keys, number = pl.program_id(0), pl.program_id(1)
    tile, row = number // sizes.queries, number % sizes.queries
    program = jnp.arange(padded(sizes.programs, 1), dtype=jnp.int32)
    here = program < sizes.programs
    program = jnp.minimum(program, sizes.programs - 1)
    sums, total = x.sums, out.sums

    def load(ref, at=row, other: float = 0):
        return triton.load(ref.at[(tile, keys, program, at)], mask=here, other=other)

    def store(ref, value):
        triton.store(ref.at[(tile, keys, row)], value)

    factor, peak = None, None
    if sums.peak is not None:
        peaks = load(sums.peak, other=-jnp.inf)
        peak = jnp.max(peaks)
        factor = jnp.exp(peaks - finite_or_zero(peak))
        store(total.peak, peak)
    weighed = load(sums.total)
    store(total.total, jnp.sum(weighed if factor is None else weighed * factor))
    store(total.count, jnp.sum(load(sums.count)))
    store(total.candidates, jnp.sum(load(sums.candidates)))
    store(out.size, jnp.sum(load(x.size, row // sizes.rows)))
    if x.left is not None:
        for ref, of_programs in zip(out.left[:4], x.left[:4], strict=True):
            if ref is not None:
                store(ref, jnp.sum(load(of_programs)))

    width = padded(sizes.value_dim)
    column = jnp.arange(width, dtype=jnp.int32)
    inside = column < sizes.value_dim
    within = jnp.minimum(column, sizes.value_dim - 1)
    # Past the end, not clamped: JAX plays a masked store as one of all lanes.
    column = jnp.where(inside, column, sizes.value_dim)

    def add_up(source, target, peaks):
        """Rows of all programs, relative to their peaks or not."""

        def add(i, weighted):
            at = i * _AT_ONCE + jnp.arange(_AT_ONCE, dtype=jnp.int32)
            there = at < sizes.programs
            at = jnp.minimum(at, sizes.programs - 1)
            where = tile, keys, at[:, None], row, within[None, :]
            mask = there[:, None] & inside[None, :]
            more = triton.load(source.at[where], mask=mask, other=0)
            if peaks is not None and peak is not None:
                below = triton.load(peaks.at[(tile, keys, at, row)])
                more *= jnp.exp(below - finite_or_zero(peak))[:, None]
            return weighted + jnp.sum(more, axis=0)

        rounds = -(-sizes.programs // _AT_ONCE)
        start = jnp.zeros((width,), jnp.float32)
        weighted = jax.lax.fori_loop(0, rounds, add, start)
        triton.store(target.at[(tile, keys, row, column)], weighted, mask=inside)

    add_up(sums.weighted, total.weighted, sums.peak)
    if x.left is not None and x.left.weighted is not None:
        add_up(x.left.weighted, out.left.weighted, None)
