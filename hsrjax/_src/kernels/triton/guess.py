"""Where softmax may leave off, guessed from a sample of the keys in one small kernel.

The sample is the first keys, the newest, and every so-many-th between them: models put
much of their mass on the first two, where one in many would not be enough. Nothing
depends on the guess but time: what it leaves out is bounded afterwards.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hsrjax._src.kernels.triton import sketched
from hsrjax._src.kernels.triton.attend import Operands
from hsrjax._src.kernels.triton.loads import shaped
from hsrjax._src.kernels.triton.place import Place, Sizes

_SAMPLE = 512
_EXACT = 64
"""First keys, and newest, that are all in the sample."""
_TRUSTED = 0.5
"""Share that is believed of the mass the others seem to have."""
_CAUTION = 0.7
_OF_ONE = 0.25
"""Shares of the mass allowed that the sample, or a key, may leave out."""
_HALVINGS = 14
_WARPS = 8


def guess(x: Operands, share: jax.Array, sizes: Sizes) -> jax.Array:
    """Offsets f32[M, X, Q] below which there is about a share f32[M, X, Q] of the mass.

    -inf where nothing is known of the keys.
    """
    tiles, sets, _, _ = x.queries.shape
    return pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid=(sets, tiles * sizes.parts),
        out_shape=shaped(share.shape, jnp.float32, x.queries),
        interpret=sizes.interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="hsrjax_guess",
    )(x._replace(law=None, keys=None, values=None, ids=None), share)


def _kernel(x: Operands, share: Any, out: Any, *, sizes: Sizes):
    here = Place(sizes, pl.program_id(0), pl.program_id(1))
    visible = jax.tree.map(
        lambda ref: jnp.where(here.live, here.row(ref), 0), x.visible
    )
    low, high = visible.spans()[-1]
    at, there, weight = _sample(low, high)
    at = jnp.clip(at, 0, sizes.slots - 1)
    coded = sketched.code_rows(here, x)
    found = sketched.bounds_at(here, x.sketch, coded, at)
    known = (there & (found.sound > 0))[:, None]
    lower = jnp.where(known, found.middle - found.slack, -jnp.inf)
    upper = jnp.where(known, found.middle + found.slack, -jnp.inf)
    peak = jnp.max(lower, axis=0)
    top = jnp.where(jnp.isfinite(peak), peak, 0.0)
    believed = jnp.where(weight > 1, _TRUSTED * weight, weight)[:, None]
    total = jnp.sum(believed * jnp.exp(lower - top[None, :]), axis=0)
    allowed = here.row(share) * total
    heavy = weight[:, None] * jnp.exp(upper - top[None, :])

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        below = jnp.sum(jnp.where(upper < middle[None, :], heavy, 0.0), axis=0)
        fits = below <= _CAUTION * allowed
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    # Below the lower end no key can have more than its part of the mass.
    number = jnp.maximum(high - low, 1).astype(jnp.float32)
    ends = top + jnp.log(allowed / number), top + jnp.log(_OF_ONE * allowed)
    offset, _ = jax.lax.fori_loop(0, _HALVINGS, halve, ends)
    offset = jnp.where(jnp.isfinite(offset) & jnp.isfinite(peak), offset, -jnp.inf)
    triton.store(out.at[(*here.lead[:2], here.out)], offset, mask=here.live)


def _sample(low, high):
    """Slots i32[C] from low to high, which are there, and keys that each speaks for."""
    number = jnp.arange(_SAMPLE, dtype=jnp.int32)
    between = low + _EXACT, high - _EXACT
    strided = _SAMPLE - 2 * _EXACT
    step = (between[1] - between[0] + (strided - 1)) // strided
    # Odd: keys that repeat are in the sample as often as others.
    step = jnp.maximum(step, 1) | 1
    others = between[0] + step // 2 + (number - 2 * _EXACT) * step
    newest = high - 1 - (number - _EXACT)
    first = number < _EXACT
    recent = ~first & (number < 2 * _EXACT)
    at = jnp.where(first, low + number, jnp.where(recent, newest, others))
    there = jnp.where(
        first,
        at < high,
        jnp.where(recent, at >= between[0], at < between[1]),
    )
    return at, there, jnp.where(first | recent, 1, step).astype(jnp.float32)
