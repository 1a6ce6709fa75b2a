"""Where the keys that matter begin, guessed from one key in so many: two small kernels.

The first bounds the sample by its codes, the second has all of it for one row.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hsrjax._src.kernels.triton import sketched
from hsrjax._src.kernels.triton.attend import Operands
from hsrjax._src.kernels.triton.loads import shaped
from hsrjax._src.kernels.triton.place import Place, Sizes
from hsrjax._src.kernels.triton.rules import Rule

_AT_ONCE = 256
"""Keys of a program."""
_SHARE = 8
"""A sample is one key in this many, where that is not too many for a kernel."""
_MOST = 16384
_WARPS = 8


class _Sample(NamedTuple):
    """A sample of the keys that any query sees.

    Attributes:
      scores: f32[M, X, Q, C], bounds or estimates, -inf where there is none.
      step: i32[M, X, J]: one key in so many is in it.
    """

    scores: Any
    step: Any


def sample_size(slots: int) -> int:
    """C, for so many slots."""
    size = pl.next_power_of_2(max(1, slots // _SHARE))
    return min(max(size, _AT_ONCE), _MOST)


def guessed(x: Operands, sizes: Sizes, rule: Rule) -> jax.Array:
    """Offsets f32[M, X, Q] below which there is hardly any key that takes part."""
    tiles, sets, queries, _ = x.queries.shape
    size = sample_size(sizes.slots)
    out = _Sample(
        shaped((tiles, sets, queries, size), jnp.float32, x.queries),
        shaped((tiles, sets, sizes.parts), jnp.int32, x.queries),
    )
    options = {
        "interpret": sizes.interpret,
        "compiler_params": triton.CompilerParams(num_warps=_WARPS, num_stages=1),
    }
    (sample,) = pl.pallas_call(
        functools.partial(_look, sizes=sizes, cautious=rule.cautious),
        grid=(sets, tiles * sizes.parts, size // _AT_ONCE),
        out_shape=[out],
        name="hsrjax_sample",
        **options,
    )(x._replace(law=None, keys=None, values=None, ids=None))
    return pl.pallas_call(
        functools.partial(_offset, sizes=sizes, rule=rule),
        grid=(sets, tiles * queries),
        out_shape=shaped((tiles, sets, queries), jnp.float32, x.queries),
        name="hsrjax_offset",
        **options,
    )(sample)


def _look(x: Operands, out: _Sample, *, sizes: Sizes, cautious: bool):
    here = Place.of_program(sizes)
    visible = jax.tree.map(
        lambda ref: jnp.where(here.live, here.row(ref), 0), x.visible
    )
    low, high = visible.spans()[-1]
    size = out.scores.shape[-1]
    # Odd: keys that repeat are in the sample as often as others.
    step = jnp.maximum((high - low + (size - 1)) // size, 1) | 1
    number = here.lead[2] * _AT_ONCE + jnp.arange(_AT_ONCE, dtype=jnp.int32)
    at = low + step // 2 + number * step
    slot = jnp.clip(at, 0, sizes.slots - 1)
    coded = sketched.code_rows(here, x)
    found = sketched.bounds_at(here, x.sketch, coded, slot)
    scores = found.middle - found.slack if cautious else found.middle
    seen = visible.mask(at[None, :])
    known = (at < high) & (found.sound > 0)
    scores = jnp.where(seen & known[None, :], scores.T, -jnp.inf)
    where = (*here.lead[:2], here.out[:, None], number[None, :])
    mask = jnp.broadcast_to(here.live[:, None], scores.shape)
    triton.store(out.scores.at[where], scores, mask=mask)
    triton.store(out.step.at[(*here.lead[:2], here.part)], step)


def _offset(x: _Sample, out: Any, *, sizes: Sizes, rule: Rule):
    keys, number = pl.program_id(0), pl.program_id(1)
    tile, row = number // sizes.queries, number % sizes.queries
    step = triton.load(x.step.at[tile, keys, row // sizes.rows])
    at = jnp.arange(x.scores.shape[-1], dtype=jnp.int32)
    offset = rule.guess(triton.load(x.scores.at[tile, keys, row, at]), step)
    offset = jnp.where(jnp.isfinite(offset), offset, -jnp.inf)
    triton.store(out.at[tile, keys, row], offset)
