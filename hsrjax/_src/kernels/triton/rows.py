"""Weights of a part of a tile and their derivatives, made anew for gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hsrjax._src.core.arrays import finite_or_zero
from hsrjax._src.core.visible import Visible
from hsrjax._src.kernels.triton.attend import Operands
from hsrjax._src.kernels.triton.entries import ByKey
from hsrjax._src.kernels.triton.loads import rows_of
from hsrjax._src.kernels.triton.place import Place
from hsrjax._src.kernels.triton.products import Split, split, times


class Bars(NamedTuple):
    """What gradients start from.

    Attributes:
      weighted: f32[M, X, Q, D], of the sums of weighted values.
      total: f32[M, X, Q], of the sums of weights.
      peak: f32[M, X, Q], the best scores that weights are relative to, or None.
    """

    weighted: Any
    total: Any
    peak: Any


class Rows(NamedTuple):
    """Queries of a part of a tile with what their gradients start from.

    Products have keys first, [C, Q]: so what they give is multiplied as it is.

    Attributes:
      factor: of the scores, f32, or None.
    """

    queries: Split
    factor: Any
    weighted: Split
    total: jax.Array
    law: Any
    visible: Visible
    shift: Any

    @classmethod
    def of(cls, here: Place, x: Operands, bars: Bars) -> Rows:
        sizes = here.sizes
        row = lambda ref: here.row(ref)[None, :]
        # Rows that are no queries may not be those of others: these may hold NaN.
        rows = functools.partial(rows_of, where=here.query, there=here.live)
        queries = rows(x.queries, width=sizes.head_dim)
        weighted = rows(bars.weighted, width=sizes.value_dim)
        return cls(
            queries=split(queries, x.keys, 3),
            factor=here.factor(x),
            weighted=split(weighted, x.values, 2),
            total=jnp.where(here.live, here.row(bars.total), 0.0)[None, :],
            law=jax.tree.map(row, x.law),
            visible=jax.tree.map(
                lambda ref: jnp.where(here.live, here.row(ref), 0)[None, :], x.visible
            ),
            shift=None if bars.peak is None else finite_or_zero(row(bars.peak)),
        )

    def pull(self, keys, values, position, there):
        """Weights f32[C, Q] of keys, and cotangents of scores f32[C, Q] and law."""
        position = position[:, None, None]
        seen = self.visible.mask(position)[..., 0] & there[:, None]
        sinks = self.visible.sinks(position)
        sinks = None if sinks is None else sinks[..., 0]
        scores = times(split(keys, keys, 1), self.queries.T, order=3)
        if self.factor is not None:
            scores *= self.factor
        scores = jnp.where(seen, scores, -jnp.inf)

        def weigh(scores, law):
            return law.weigh_row(scores, sinks=sinks, peak=self.shift)

        weights, pull = jax.vjp(weigh, scores, self.law)
        bar = times(split(values, values, 1), self.weighted.T, order=2) + self.total
        scores_bar, law_bar = pull(bar)
        # On a GPU the larger of a number and NaN is the number.
        unknown = jnp.isnan(scores)
        if not self.law.keeps_all:
            unknown |= jnp.isnan(jnp.asarray(self.law.edge()))
        weights = jnp.where(unknown, jnp.nan, weights)
        return (
            split(jnp.where(seen, weights, 0.0), values, 2),
            split(jnp.where(seen, scores_bar, 0.0), keys, 2),
            jax.tree.map(lambda x: x[0], law_bar),
        )

    def by_key(self, weights: Split, scores_bar: Split) -> ByKey:
        """What the keys get: f32[C, H'] and f32[C, D']."""
        keys = times(scores_bar, self.queries, order=2)
        if self.factor is not None:
            keys *= self.factor
        return ByKey(keys, times(weights, self.weighted, order=2))
