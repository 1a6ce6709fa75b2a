"""Algorithm 2 of the paper, prompt prefilling: keys and queries are new in every call.

Init: the index is built over the keys of the call. Inference: for every tile of
queries, report the keys in the union of their half-spaces, score those exactly and sum.
Rows report none but visible keys (causality, windows, segments), which the paper
leaves open.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hsrjax import adaptive, reported
from hsrjax.activations import Activation, tail_of
from hsrjax.index import build
from hsrjax.layout import heads_first, query_tiles
from hsrjax.planner import Plan
from hsrjax.visible import Visible


def prefill(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visible,
    *,
    activation: Activation,
    scale: jax.typing.ArrayLike | None,
    plan: Plan,
    counted: bool = True,
) -> tuple[jax.Array, reported.Info]:
    """Exact attention over reported keys, all queries of a call.

    Args:
      query: f[B, T, N, H].
      key: f[B, S, K, H].
      value: f[B, S, K, D].
      visible: i32[B, T], the keys that each row sees.
      activation: ReLU, or Softmax with top_r or epsilon.
      scale: of the scores, None is 1/sqrt(H).
      plan: "hsr" or "auto".
      counted: False may leave Info.count zero, which saves time.

    Returns:
      f32[B, T, N, D] and Info, each [B, T, N]. Cost O(S H) to build, T S H int8
      multiplications, then (H + D) float32 ones per query and reported key.

    Source: Chen et al. 2024, Algorithm 2, Theorem 5.1.
    """
    t, n = query.shape[1:3]
    index = build(heads_first(key), reorder=False)
    padding = index.keys.shape[-2] - key.shape[1]
    rows = jnp.pad(heads_first(value), [(0, 0), (0, 0), (0, padding), (0, 0)])
    values = reported.summarize_values(rows, tail_of(activation))
    cut = lambda tile: query_tiles(
        activation, query, visible, scale=scale, kv_heads=key.shape[2], tile=tile
    )
    return adaptive.attend(
        activation,
        index,
        values,
        cut,
        length=t,
        heads=n,
        plan=plan,
        counted=counted,
    )
