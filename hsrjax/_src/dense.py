"""Dense attention: every visible key is scored. The oracle, and fast for short rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hsrjax._src.core.tiles import Info, Tiles, Values
from hsrjax._src.kernels.base import InTurn
from hsrjax._src.planning.shape import Plan


def attend(
    kernels: InTurn,
    keys: jax.Array,
    values: Values,
    ids: jax.Array | None,
    tiles: Tiles,
    *,
    plan: Plan,
    counted: bool,
) -> tuple[jax.Array, Info]:
    """Attention of tiles of queries over all their visible keys.

    Args:
      kernels: the operations.
      keys: f[*B, S, H].
      values: rows f[*B, S, D].
      ids: i32[*B, S], the position of each key, None where they are in order.
      tiles: of `plan.dense_tile` positions.
      plan: its chunk is the keys scored at once; None is all of them.
      counted: False may leave Info.count zero, which saves time.

    Returns:
      Outputs f32[M, *B, Q, D] and Info, each [M, *B, Q]. Cost O(S (H + D)) a query,
      memory O(Q C) beside operands and results. First derivatives only with chunks.
    """
    tiles = tiles._replace(activation=tiles.activation.dense_form)
    sums, certificate = kernels.sum_all(
        tiles, keys, values.rows, ids, chunk=plan.chunk, counted=counted
    )
    if plan.chunk is not None:  # chunks out of sight are skipped with their NaN values
        sums = sums._replace(weighted=sums.weighted + values.poison[..., None, :][None])
    length = tiles.visible.count()
    out, missed, bound = tiles.activation.finish(
        sums,
        certificate,
        length=length,
        value_bound=values.bound[..., None][None],
        slots=keys.shape[-2],
    )
    overflow = jnp.zeros(length.shape, jnp.bool_)
    info = Info(sums.count, length, overflow, missed, bound)
    return out, jax.lax.stop_gradient(info)
