"""What the keys that a program does not list weigh, from their bounds.

Relative to the edge of the law, below which they score. With a tail they act, as in
`activations/tail.py`: each by the middle of its bounds and the mean value of its group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

from hsrjax._src.core.arrays import UNIT
from hsrjax._src.kernels.triton.loads import padded, rows_of
from hsrjax._src.kernels.triton.place import Place, Sizes
from hsrjax._src.kernels.triton.products import wide
from hsrjax._src.kernels.triton.sketched import Bounds


class Left(NamedTuple):
    """Sums over the keys that are not listed, f32[..., Q].

    Attributes:
      most: at least sum exp(score - edge).
      total: sum exp(middle - edge), and what follows for a tail only; else None.
      wrong: what that may be off by.
      off: the same weights times the radius of the group.
      weighted: f32[..., Q, D], times its mean value.
    """

    most: Any
    total: Any = None
    wrong: Any = None
    off: Any = None
    weighted: Any = None

    @classmethod
    def zeros(cls, sizes: Sizes, rows: int) -> Left:
        """Of a program's rows."""
        row = jnp.zeros((rows,), jnp.float32)
        if not sizes.group:
            return cls(row)
        weighted = jnp.zeros((rows, padded(sizes.value_dim)), jnp.float32)
        return cls(row, row, row, row, weighted)

    def times(self, factor: jax.Array) -> Left:
        """All sums times f32[..., Q]."""
        return jax.tree.map(
            lambda x: x * factor.reshape(*factor.shape, *[1] * (x.ndim - factor.ndim)),
            self,
        )


def more(
    here: Place, x: Any, left: Left, bounds: Bounds, others: Any, edge: Any, at: Any
) -> Left:
    """With the keys at slots i32[S] that bool[S, Q] says."""
    middle, slack = bounds.middle - edge[None, :], bounds.slack
    add = lambda weights: jnp.sum(jnp.where(others, weights, 0.0), axis=0)
    if not here.sizes.group:
        return Left(left.most + add(jnp.exp(middle + slack)))
    half = slack + 8 * UNIT * (jnp.abs(bounds.middle) + slack)
    # No weight times exp(half): where bounds are wide that is zero times infinity.
    weights, heavy = jnp.where(others, jnp.exp(middle), 0.0), jnp.exp(middle + half)
    group = at // here.sizes.group
    scale, radius = (triton.load(y.at[here.set, group]) for y in x.means[1:])
    width = here.sizes.value_dim
    means = rows_of(x.means.codes, (here.set, group[:, None]), width)
    # Whole numbers below 2^8: bfloat16 holds them.
    means = means.astype(jnp.float32).astype(jnp.bfloat16)
    return Left(
        most=left.most + add(heavy),
        total=left.total + add(weights),
        wrong=left.wrong + add(heavy - weights),
        off=left.off + add(weights * radius[:, None]),
        weighted=left.weighted + wide((weights * scale[:, None]).T, means),
    )


def in_part(visible: Any, at: jax.Array, group: int) -> jax.Array:
    """Keys i32[S] that some query sees, but not all of their group, bool[S, Q]."""
    first = (at // group) * group
    low = 0 if visible.low is None else visible.low[None, :]
    high = visible.high[None, :]
    sees = (at[:, None] >= low) & (at[:, None] < high)
    return sees & ~((first[:, None] >= low) & (first[:, None] + group <= high))


def keep(here: Place, out: Left, left: Left) -> None:
    """Writes a program's sums."""
    for ref, x in zip(out[:4], left[:4], strict=True):
        if ref is not None:
            triton.store(ref.at[(*here.lead, here.out)], x, mask=here.live)
    if out.weighted is not None:
        width = here.sizes.value_dim
        number = jnp.arange(padded(width), dtype=jnp.int32)[None, :]
        mask = here.live[:, None] & (number < width)
        where = (*here.lead, here.out[:, None], number)
        triton.store(out.weighted.at[where], left.weighted, mask=mask)
