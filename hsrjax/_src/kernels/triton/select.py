"""Softmax that leaves keys out, or to a tail, by guesses that are verified.

The reported keys of a guessed offset are weighed as full softmax weighs them, and the
same kernel adds up a bound on what the others weigh. Rows where that is too much look
again, lower, and those where it still is over all keys: a launch that has nothing left
to do takes as long as a launch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hsrjax._src.activations import tail as tails
from hsrjax._src.activations.certificates import LeftOut
from hsrjax._src.activations.softmax import Reported, Softmax
from hsrjax._src.core.arrays import finite_or_zero, guard, score_rounding
from hsrjax._src.core.tiles import Partial, Tiles, Values
from hsrjax._src.index.index import Index
from hsrjax._src.kernels.triton import launch
from hsrjax._src.kernels.triton.guess import guess
from hsrjax._src.kernels.triton.left import Left
from hsrjax._src.kernels.triton.rules import TopR
from hsrjax._src.kernels.triton.sample import guessed


def within(
    index: Index,
    tiles: Tiles,
    values: Values,
    *,
    counted: bool,
    or_all: bool,
    interpret: bool,
) -> tuple[jax.Array, Partial, Any]:
    """As `Implementation.select_and_sum`, of one tile, for a field `epsilon`."""
    rows, means = values.rows, values.sketch
    options = _options(values, counted, interpret, or_all)
    share = jax.lax.stop_gradient(tiles.activation.epsilon)
    offset = _guess(index, tiles, rows, options, share)
    pending = tiles.visible.count() > 0
    sizes, sums, certificate = jnp.int32(0), None, None
    for _ in range(2):
        some = _among(tiles, pending)._replace(activation=Reported(offset))
        more, found, left = launch.reported(options, some, index, rows, means)
        left = _relative(left, offset, found)
        sums = found if sums is None else sums.merge(found)
        certificate = left if certificate is None else _pick(pending, left, certificate)
        sizes = sizes + more
        allowed = share * jax.lax.stop_gradient(found.total) / guard(rows.shape[-2])
        fits = left.most <= allowed
        over = jnp.log(left.most / jnp.maximum(allowed, 2.0**-120))
        offset = jnp.where(jnp.isfinite(over), offset - 2.0 * over - 0.5, -jnp.inf)
        offset = jnp.where(fits, jnp.inf, offset)
        # Sums of no use are taken back: what is looked at again begins anew.
        again = pending & ~fits
        nothing = Partial.zeros(again.shape, rows.shape[-1], relative=True)
        sums = _pick(again, nothing, sums)
        pending &= ~fits
    sums, left = _with_all(index, tiles, rows, options, pending, sums, certificate)
    return sizes, sums, _certificate(index, tiles, rows, left, share)


def with_tail(
    index: Index, tiles: Tiles, values: Values, *, counted: bool, interpret: bool
) -> tuple[jax.Array, Partial, Any]:
    """The same, for a field `top_r` and a tail.

    If r exact scores reach the guess, the best r are among the keys looked at, which
    all count. Else the row is summed over all keys.
    """
    del counted
    options = _options(values, True, interpret, False)
    rule = TopR(tiles.activation.top_r)
    offset = _guess(index, tiles, values.rows, options, rule)
    some = tiles._replace(activation=_Reaching(offset))
    rows, means = values.rows, values.sketch
    found: Any = launch.reported(options, some, index, rows, means)
    sizes, sums, left = found
    left, seen = _relative(left, offset, sums), tiles.visible.count()
    fits = (sums.count >= jnp.minimum(rule.rank, seen)) & jnp.isfinite(left.most)
    pending = ~fits & (seen > 0)
    nothing = Partial.zeros(seen.shape, rows.shape[-1], relative=True)
    sums = _pick(pending, nothing, sums._replace(count=sums.candidates))
    sums, left = _with_all(index, tiles, rows, options, pending, sums, left)
    return sizes, sums, _certificate(index, tiles, rows, left, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Reaching(Reported):
    """Counts the scores that reach the offset."""

    def fires(self, scores, *, sinks=None):
        """NaN does, too."""
        del sinks
        return ~(scores < self.offset)


def _with_all(index, tiles, rows, options, pending, sums, left):
    """With sums over all keys for the rows that are pending: nothing is left there."""
    every = _among(tiles, pending)._replace(activation=Softmax())
    found = launch.sum_all(
        every,
        index.keys,
        rows,
        None,
        counted=options.counted,
        interpret=options.interpret,
    )
    left = _pick(pending, jax.tree.map(jnp.zeros_like, left), left)
    return sums.merge(found), left


def _options(values, counted, interpret, or_all):
    most = launch.DENSE_SHARE if or_all else 1.0
    group = 0
    if values.sketch is not None:
        group = tails.group_of(values.sketch, values.rows)
    return launch.Options(counted, interpret, most, weighed=True, group=group)


def _guess(index, tiles, values, options, by):
    """By a share of the mass, or by a rule."""
    index, tiles = jax.lax.stop_gradient((index, tiles))
    nothing = tiles._replace(activation=None)
    x = launch.flat(nothing, index.keys, values, None, index.sketch)
    sizes = launch.sizes_of(x, options)
    lead = index.keys.shape[:-2]
    if isinstance(by, TopR):
        offset = guessed(x, sizes, by)
        return offset.reshape(offset.shape[0], *lead, -1)
    return guess(x, launch.flat_rows(by, lead), sizes).reshape(by.shape)


def _relative(left: Left | None, offset: jax.Array, found: Any) -> Left:
    """Relative to the best score instead of the offset.

    Not a number where that is far below, and nothing is known.
    """
    assert left is not None
    peak = finite_or_zero(found.peak)
    factor = jnp.where(jnp.isfinite(offset), jnp.exp(offset - peak), 0.0)
    return jax.lax.stop_gradient(left.times(factor))


def _certificate(index, tiles, values, left: Left, share):
    rounding = score_rounding(tiles.queries[0], index.sketch.key_norm())[None]
    if left.total is None:
        return LeftOut(left.most * guard(values.shape[-2]), share, rounding)
    error = jnp.stack([left.off, left.wrong], axis=-1)
    return tails.Tail(left.weighted, left.total, left.most, error, rounding)


def _among(tiles: Tiles, pending: jax.Array) -> Tiles:
    """Where other queries see nothing."""
    seen = jax.tree.map(lambda x: jnp.where(pending, x, 0), tiles.visible)
    return tiles._replace(visible=seen)


def _pick(rows: jax.Array, x: Any, y: Any) -> Any:
    """x for some rows, y for others."""
    pick = lambda x, y: jnp.where(
        rows.reshape(*rows.shape, *[1] * (x.ndim - rows.ndim)), x, y
    )
    return jax.tree.map(pick, x, y)
