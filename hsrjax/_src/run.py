"""Carries out a plan: the only place that chooses between dense, hsr and auto.

With "auto" the call itself decides, by how many keys are reported. A look at a sample
of the sketch comes first. Where so many keys survive that gathering them would cost
more than scoring all, dense attention runs at once. After the scan of the whole sketch
the survivors are counted, and the same choice is made again, so that a sample which
promised too little costs one scan and no more.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hsrjax._src import dense, sparse
from hsrjax._src.activations.base import Activation
from hsrjax._src.core.tiles import Info, Tiles, Values, cut_queries, from_tiles
from hsrjax._src.core.visible import Visible
from hsrjax._src.index.index import Index
from hsrjax._src.kernels import registry
from hsrjax._src.kernels.base import InTurn
from hsrjax._src.planning.plan import Expected
from hsrjax._src.planning.shape import Plan


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: Values,
    index: Index | None,
    visible: Visible,
    *,
    activation: Activation,
    scale: jax.typing.ArrayLike | None,
    plan: Plan,
    expected: Expected | None = None,
    counted: bool = True,
) -> tuple[jax.Array, Info]:
    """Attention by a plan.

    Args:
      query: f[B, T, N, H].
      keys: f[B, K, S, H]; the index's own, where there is one.
      values: rows f[B, K, S, D].
      index: over the keys; may be None where the plan is "dense".
      visible: i32[B, T] or i32[1, T], the keys that each row sees.
      activation: any that the plan was made for.
      scale: of the scores, None is 1/sqrt(H).
      plan: static.
      expected: costs by which "auto" chooses here.
      counted: False may leave Info's numbers of keys zero, which saves time.

    Returns:
      f32[B, T, N, D] and Info, each [B, T, N]. Under vmap one choice is made for all
      that is mapped over.
    """
    kernels = registry.operations(plan.implementations)
    prepared = activation.prepare(query.shape[:3])
    common: dict[str, Any] = {"plan": plan, "counted": counted}

    def cut(tile: int) -> Tiles:
        return cut_queries(
            query, prepared, visible, scale=scale, kv_heads=keys.shape[1], tile=tile
        )

    def uncut(found):
        _, length, heads, _ = query.shape
        join = functools.partial(from_tiles, length=length, heads=heads)
        return jax.tree.map(join, found)

    def score_all():
        ids = None if index is None else index.ids
        tiles = cut(plan.dense_tile)
        return uncut(dense.attend(kernels, keys, values, ids, tiles, **common))

    if plan.method == "dense" or index is None:
        return score_all()
    tiles = cut(plan.tile)
    if plan.method == "hsr" or expected is None:
        return uncut(sparse.attend(kernels, index, values, tiles, **common))

    def sum_reported():
        arrays = index, values, tiles, reported
        return uncut(sparse.sum_reported(kernels, *arrays, **common))

    if plan.chunk is None:
        # Under grad a cond keeps what either side needs: now not all scores.
        score_all = jax.checkpoint(score_all)
    dense_wins, reported = _look(kernels, index, values, tiles, plan, expected)
    return jax.lax.cond(dense_wins, score_all, sum_reported)


def _look(kernels: InTurn, index, values, tiles, plan, expected):
    """Whether dense attention is cheaper, bool, and what is reported if it is not."""
    report = lambda: sparse.report(kernels, index, values, tiles, plan=plan)
    if index.ids is None:
        number = sparse.expected_runs(index, tiles, plan)
        excess = expected.hsr + expected.one_run * number - expected.dense
        dense_wins = _together(excess) > 0
        shapes = jax.eval_shape(report)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        reported = jax.lax.cond(dense_wins, lambda: nothing, report)
    else:
        # Runs of keys in spatial order are no sample, and balls look sooner.
        dense_wins, reported = jnp.zeros((), jnp.bool_), report()
    number = sparse.runs(reported.words, plan.capacity)
    excess = expected.one_run * number - expected.dense
    return dense_wins | (_together(excess) > 0), reported


@jax.custom_batching.custom_vmap
def _together(excess: jax.Array) -> jax.Array:
    """Under vmap the sum over what is mapped over: one choice, so a cond stays one."""
    return excess


@_together.def_vmap
def _together_batched(axis_size, in_batched, excess):
    del axis_size
    (batched,) = in_batched
    return _together(jnp.sum(excess, axis=0) if batched else excess), False
