"""Softmax that leaves out a share of its mass, by guesses that are verified.

The reported keys of a guessed offset are weighed as full softmax weighs them, and the
same kernel adds up a bound on what the others weigh. Rows where that is too much look
again, lower, and those where it still is over all keys: a launch that has nothing left
to do takes as long as a launch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hsrjax._src.activations.certificates import LeftOut
from hsrjax._src.activations.softmax import Reported, Softmax
from hsrjax._src.core.arrays import finite_or_zero, guard, score_rounding
from hsrjax._src.core.tiles import Partial, Tiles
from hsrjax._src.index.index import Index
from hsrjax._src.kernels.triton import launch
from hsrjax._src.kernels.triton.guess import guess


def within(
    index: Index,
    tiles: Tiles,
    values: jax.Array,
    *,
    counted: bool,
    or_all: bool,
    interpret: bool,
) -> tuple[jax.Array, Partial, LeftOut]:
    """As `Implementation.select_and_sum`, of one tile, for a field `epsilon`."""
    most = launch.DENSE_SHARE if or_all else 1.0
    options = launch.Options(counted, interpret, most, weighed=True)
    share = jax.lax.stop_gradient(tiles.activation.epsilon)
    offset = _guess(index, tiles, share, options)
    pending = tiles.visible.count() > 0
    sizes, sums, mass = jnp.int32(0), None, jnp.zeros(share.shape, jnp.float32)
    for _ in range(2):
        some = _among(tiles, pending)._replace(activation=Reported(offset))
        more, found, left = launch.reported(options, some, index, values)
        assert left is not None and found.peak is not None
        left = left * jnp.exp(offset - finite_or_zero(found.peak))
        left = jax.lax.stop_gradient(jnp.where(jnp.isfinite(offset), left, 0.0))
        sums, mass = _merged(sums, found), jnp.where(pending, left, mass)
        sizes = sizes + more
        allowed = share * jax.lax.stop_gradient(found.total) / guard(values.shape[-2])
        fits = left <= allowed
        over = jnp.log(left / jnp.maximum(allowed, 2.0**-120))
        offset = jnp.where(jnp.isfinite(over), offset - 2.0 * over - 0.5, -jnp.inf)
        offset = jnp.where(fits, jnp.inf, offset)
        # Sums of no use are taken back: what is looked at again begins anew.
        sums = _but(sums, pending & ~fits)
        pending &= ~fits
    every = _among(tiles, pending)._replace(activation=Softmax())
    found = launch.sum_all(
        every, index.keys, values, None, counted=counted, interpret=interpret
    )
    mass = jnp.where(pending, 0.0, mass) * guard(values.shape[-2])
    rounding = score_rounding(tiles.queries[0], index.sketch.key_norm())[None]
    return sizes, _merged(sums, found), LeftOut(mass, share, rounding)


def _guess(index, tiles, share, options):
    index, tiles = jax.lax.stop_gradient((index, tiles))
    keys = index.keys
    x = launch.flat(tiles._replace(activation=None), keys, keys, None, index.sketch)
    rows = launch.flat_rows(share, keys.shape[:-2])
    offset = guess(x, rows, launch.sizes_of(x, options))
    return offset.reshape(share.shape)


def _among(tiles: Tiles, pending: jax.Array) -> Tiles:
    """Where other queries see nothing."""
    seen = jax.tree.map(lambda x: jnp.where(pending, x, 0), tiles.visible)
    return tiles._replace(visible=seen)


def _merged(sums: Partial | None, found: Partial) -> Partial:
    return found if sums is None else sums.merge(found)


def _but(sums: Partial, rows: jax.Array) -> Partial:
    """Without what was found for some rows."""
    nothing = Partial.zeros(rows.shape, sums.weighted.shape[-1], relative=True)
    pick = lambda x, y: jnp.where(
        rows.reshape(*rows.shape, *[1] * (x.ndim - rows.ndim)), y, x
    )
    return jax.tree.map(pick, sums, nothing)
