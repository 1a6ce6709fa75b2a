"""Carries out a plan: the only place that chooses between dense, hsr and auto.

With "auto" the call itself decides, by how many keys are reported. A look at a sample
of the sketch comes first. Where so many keys survive that gathering them would cost
more than scoring all, dense attention runs at once. After the scan of the whole sketch
the survivors are counted, and the same choice is made again, so that a sample which
promised too little costs one scan and no more. A kernel that has both ways in it
decides for itself.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hsrjax._src import sparse
from hsrjax._src.activations.base import Activation
from hsrjax._src.core import meshes
from hsrjax._src.core.batching import together
from hsrjax._src.core.tiles import Info, Partial, Tiles, Values, cut_queries, from_tiles
from hsrjax._src.core.visible import Visible
from hsrjax._src.index.index import Index
from hsrjax._src.kernels.base import InTurn, operations
from hsrjax._src.planning.plan import Expected, Plan


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
    # Gradients of what is the same on all devices are then summed over them.
    arrays = query, keys, values, index, visible, activation, scale
    query, keys, values, index, visible, activation, scale = meshes.varying(
        arrays, arrays
    )
    kernels = operations(plan.implementations)
    prepared = activation.prepare(query.shape[:3])

    def cut(tile: int) -> Tiles:
        return cut_queries(
            query, prepared, visible, scale=scale, kv_heads=keys.shape[1], tile=tile
        )

    def uncut(found):
        _, length, heads, _ = query.shape
        join = functools.partial(from_tiles, length=length, heads=heads)
        return jax.tree.map(join, found)

    def score_all():
        tiles = cut(plan.dense_tile)
        tiles = tiles._replace(activation=tiles.activation.dense_form)
        ids = None if index is None else index.ids
        sums, certificate = kernels.sum_all(
            tiles, keys, values.rows, ids, chunk=plan.chunk, counted=counted
        )
        sums = sums._replace(candidates=tiles.visible.count())
        sums = _poison(sums, values)  # of keys that are skipped because none is seen
        return uncut(_finish(sums, certificate, values, tiles, keys.shape[-2]))

    if plan.method == "dense" or index is None:
        return score_all()
    tiles = cut(plan.tile)
    arrays = kernels, index, values, tiles
    options = {"plan": plan, "counted": counted}
    sum_sets = functools.partial(sparse.sum_sets, *arrays, **options)

    def finish_sets(sums, certificate, sizes):
        sums = _poison(sums, values)
        rows, parts = sums.total.shape[-1], sizes.shape[-1]
        overflow = jnp.repeat(sizes > plan.capacity, -(-rows // parts), axis=-1)
        overflow = overflow[..., :rows]
        found = _finish(sums, certificate, values, tiles, keys.shape[-2], overflow)
        return uncut(found)

    if plan.method == "hsr" or expected is None:
        return finish_sets(*sum_sets(None))
    found = sparse.fused(*arrays, **options, or_all=True)
    if found is not None:
        return finish_sets(*found)
    if plan.chunk is None:
        # Under grad a cond keeps what either side needs: now not all scores.
        score_all = jax.checkpoint(score_all)
    dense_wins, sets = _look(*arrays, plan, expected)
    return jax.lax.cond(dense_wins, score_all, lambda: finish_sets(*sum_sets(sets)))


def _poison(sums: Partial, values: Values) -> Partial:
    """NaN where a dense product has it, from values that were not looked at."""
    return sums._replace(weighted=sums.weighted + values.poison[..., None, :][None])


def _finish(
    sums: Partial,
    certificate: Any,
    values: Values,
    tiles: Tiles,
    slots: int,
    overflow: jax.Array | None = None,
) -> tuple[jax.Array, Info]:
    """Outputs f32[M, *B, Q, D] and Info, each [M, *B, Q]."""
    length = tiles.visible.count()
    out, missed, bound = tiles.activation.finish(
        sums,
        certificate,
        length=length,
        value_bound=values.bound[..., None][None],
        slots=slots,
    )
    if overflow is None:
        overflow = jnp.zeros(length.shape, jnp.bool_)
    info = Info(sums.count, sums.candidates, overflow, missed, bound)
    return out, jax.lax.stop_gradient(info)


def _look(kernels: InTurn, index, values, tiles, plan, expected):
    """Whether dense attention is cheaper, bool, and the sets if it is not."""
    report = lambda: sparse.report(kernels, index, values, tiles, plan=plan)
    if index.ids is None:
        number = sparse.expected_runs(index, tiles, plan)
        excess = expected.hsr + expected.one_run * number - expected.dense
        dense_wins = together(excess) > 0
        shapes = jax.eval_shape(report)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        nothing = meshes.varying(nothing, index, values, tiles)
        sets = jax.lax.cond(dense_wins, lambda: nothing, report)
    else:
        # Runs of keys in spatial order are no sample, and balls look sooner.
        dense_wins, sets = jnp.zeros((), jnp.bool_), report()
    number = sparse.runs(sets.words, plan.capacity)
    excess = expected.one_run * number - expected.dense
    return dense_wins | (together(excess) > 0), sets
