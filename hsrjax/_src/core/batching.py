"""One choice for all that is mapped over.

Under vmap `lax.cond` runs both branches for every row and takes what it needs, unless
the predicate is the same for all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def together(excess: jax.Array) -> jax.Array:
    """What one way costs more than another, f32[]; under vmap the sum over all rows."""
    return excess


@together.def_vmap
def _together_batched(axis_size, in_batched, excess):
    del axis_size
    (batched,) = in_batched
    return together(jnp.sum(excess, axis=0) if batched else excess), False
