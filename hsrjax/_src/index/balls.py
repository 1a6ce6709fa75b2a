r"""Balls around groups of keys: certified upper bounds that rule out whole cells.

The keys of a cell lie in a ball around the cell's middle m and in one around a point c
common to all cells, so that <a, k> <= <a, m> + |a| d for the largest distance
d = |k - m|, and likewise for c. u and g are those of the sketch's proof, whose points 1
and 3 are used below. Let A be the computed norm of a, inflated and at least 2^-90, so
that A >= |a|. The ball around m has the stored radius

    r = inflate(d' + (4H + 64) u (|m| + d')) + 2^-118

with d' the computed distance. The computed bound is fl(fl(<a, m>) + A r) + 2^-110.

1.  d <= (1 + (H + 5) u) d' + 2^-121 by its point 3 and the rounding of k - m, whose
    flushed coordinates add at most sqrt(H) 2^-126. The inflation and 2^-118 cover both.
2.  The score S exceeds <a, k> by at most g |a| (|m| + d), and the bound falls short of
    its exact value by at most g |a| |m| + 4u (|a| |m| + A r): together less than
    (4H + 64) u A (|m| + d') and the inflation of r, which are in A r. So is the error
    of coordinates of a that are flushed, at most 2^-121 (|m| + d): A >= 2^-90.
3.  Products flushed add at most (2H + 1) 2^-126 < 2^-114. Where A >= 16, what is left
    of 2^-118 in A r is more. Elsewhere either A (|m| + d') < 2^-95, and then the bound
    is small enough to feel 2^-110 added, or u A (|m| + d') is larger.
4.  Where A or |m| + d' is 2^60 or more, or not a number, A r is +inf or NaN, and so is
    the bound: it rules out nothing, as NaN never does. Elsewhere nothing overflows.

The ball around c is the same with c for m.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp

from hsrjax._src.core.arrays import (
    TINY,
    UNIT,
    dot,
    inflation,
    max_rows,
    norm,
    positions,
    product,
    take_windows,
)
from hsrjax._src.core.bitset import WORD
from hsrjax._src.index.bound import Bound

_SHORTEST = 2.0**-90
_LEAST_RADIUS = 2.0**-118
_FARTHEST = 2.0**60


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["middles", "radius", "reach", "centre"],
    meta_fields=["size"],
)
@dataclasses.dataclass(frozen=True)
class Balls(Bound):
    """Where the keys of each cell are; W is the number of cells rounded up to 32 more.

    Attributes:
      middles: f32[*B, H, W].
      radius: f32[*B, W], of the ball around the cell's own middle.
      reach: f32[*B, W], of the ball around the common centre.
      centre: f32[*B, H], where a cell without a middle has it, too.
      size: slots of a cell, static.
    """

    middles: jax.Array
    radius: jax.Array
    reach: jax.Array
    centre: jax.Array
    size: int

    @classmethod
    def build(
        cls, keys: jax.Array, valid: jax.Array, centre: jax.Array, *, size: int
    ) -> Self:
        """As `Bound.build`."""
        *lead, slots, h = keys.shape
        padding = [(0, 0)] * len(lead) + [(0, -slots % (size * WORD))]
        valid = jnp.pad(valid, padding).reshape(*lead, -1, size)
        cells = jnp.pad(keys, [*padding, (0, 0)]).reshape(*valid.shape, h)
        cells = jnp.where(valid[..., None], cells.astype(jnp.float32), 0.0)
        number = jnp.maximum(jnp.sum(valid, axis=-1, dtype=jnp.int32), 1)
        middle = jnp.sum(cells, axis=-2) / number[..., None].astype(jnp.float32)
        common = jnp.broadcast_to(centre[..., None, :], middle.shape)
        usable = jnp.all(jnp.isfinite(middle), axis=-1) & jnp.any(valid, axis=-1)
        # Worked out once: the radius has to be that of the very middle that is stored.
        middle = jnp.where(usable[..., None], middle, common)
        middle = jax.lax.optimization_barrier(middle)
        return cls(
            middles=jnp.moveaxis(middle, -1, -2),
            radius=_radius(cells, valid, middle),
            reach=_radius(cells, valid, common),
            centre=centre,
            size=size,
        )

    def append(self, keys: jax.Array, valid: jax.Array, first: jax.Array) -> Self:
        """As `Bound.append`: balls grow, their middles stay."""
        valid = valid.reshape(*valid.shape[:-1], -1, WORD)
        blocks = keys.reshape(*valid.shape, keys.shape[-1])
        block = first[..., None] + positions(valid.shape[-2], valid.ndim - 1)
        cell = block // (self.size // WORD)
        middle = take_windows(self.middles, cell, 1)[..., 0]
        common = jnp.broadcast_to(self.centre[..., None, :], middle.shape)
        return dataclasses.replace(
            self,
            radius=max_rows(self.radius, cell, _radius(blocks, valid, middle)),
            reach=max_rows(self.reach, cell, _radius(blocks, valid, common)),
        )

    def upper(self, queries: jax.Array) -> jax.Array:
        """As `Bound.upper`: the lower of what the two balls say."""
        a = queries.astype(jnp.float32)
        length = jnp.maximum(inflation(a.shape[-1]) * norm(a), _SHORTEST)[..., None]
        length = jnp.where(length < _FARTHEST, length, jnp.inf)
        own = product("...qh,...hw->...qw", a, self.middles)
        own = own + length * self.radius[..., None, :]
        common = dot(a, self.centre[..., None, :]) + length * self.reach[..., None, :]
        return jnp.minimum(own, common) + TINY


def _radius(keys: jax.Array, valid: jax.Array, middle: jax.Array) -> jax.Array:
    """r f32[*B, W] of the keys f[*B, W, C, H] around middles f32[*B, W, H]."""
    rest = keys.astype(jnp.float32) - middle[..., None, :]
    distance = norm(jnp.where(valid[..., None], rest, 0.0))
    far = norm(middle) + jnp.max(distance, axis=-1)
    h = keys.shape[-1]
    radius = jnp.max(distance, axis=-1) + (4 * h + 64) * UNIT * far
    radius = inflation(h) * radius + _LEAST_RADIUS
    return jnp.where(far < _FARTHEST, radius, jnp.inf)
