"""Attention over keys found by half-space reporting, and a dense twin to check it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from hsrjax import checks, closed, dense, memory, planner, visible
from hsrjax import shape as shape_module
from hsrjax.activations import Activation, core_of
from hsrjax.layout import from_tiles, heads_first, query_tiles
from hsrjax.planner import Method
from hsrjax.prefill import prefill
from hsrjax.reported import Info, summarize_values
from hsrjax.shape import Shape


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    activation: Activation,
    method: Method = "auto",
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    sinks: int = 0,
    scale: jax.typing.ArrayLike | None = None,
    capacity: int | None = None,
    return_info: bool = False,
) -> jax.Array | tuple[jax.Array, Info]:
    """Attention `sum_j w_ij v_j` that looks only at the keys whose weight is not zero.

    For ReLU^p, w_ij = relu(scale <q_i, k_j> - bias)^p, divided as the activation says:
    the same numbers, values and gradients, whichever the method.

    Args:
      query: f[B, T, N, H], float32, bfloat16 or float16.
      key: f[B, S, K, H], N a multiple of K: query heads n K/N share a key head.
      value: f[B, S, K, D]; D may differ from H.
      activation: `hsrjax.ReLU`, `Softmax`, `PReLU`, `CELU`, `SELU` or `Entmax`.
      method: "dense" scores every key; "hsr" those that half-space reporting
        finds; "auto" takes the one expected to be faster, if need be after a look at
        how many keys fire (`hsrjax.explain` says what it will do). Under vmap it
        takes one way for all.
      is_causal: query i sees keys 0..i, as in `jax.nn.dot_product_attention`.
      segment_ids: i32[B, S] for rows that hold several documents, T = S. Every run of
        equal ids is a segment, whose queries see its keys alone; an id that comes back
        after another starts a new segment.
      window: static, needs is_causal: query i sees keys i - window + 1 to i.
      sinks: static. The first so many keys of the row, or of the query's segment,
        stay visible outside the window; and Softmax(top_r or epsilon) keeps them
        whatever they score: top_r counts the best of the other visible keys, epsilon
        bounds what is left out of the whole row.
      scale: multiplies the scores, None is 1/sqrt(H). May be traced.
      capacity: slots of one gather, None chooses. It changes speed, never the result.
      return_info: also return what is known about each row.

    Returns:
      f[B, T, N, D] in the query's dtype, or (output, `Info` with fields [B, T, N]).
      A row in which no key fires is zero, and so are its gradients. A NaN key makes
      exactly the rows that see it NaN; a NaN value spoils its coordinate in all rows
      but empty ones, as it does in a dense product. Cost and memory: see
      `hsrjax.prefill` for "hsr"; "dense" costs O(B N T S) and takes memory O(T + S).
      Forward mode and second derivatives only for "dense" with B N T S up to 2**22.

    Raises:
      ValueError: shapes that do not fit, unknown names, capacity < 1, window without
        is_causal, sinks where nothing leaves keys out, segment_ids where T != S,
        sizes that do not fit into memory.
      TypeError: unsupported dtypes, or an activation of another kind.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> q = jnp.ones((1, 2, 4, 8)); k = v = jnp.ones((1, 3, 2, 8))
      >>> hsrjax.attention(q, k, v, activation=hsrjax.ReLU(power=2)).shape
      (1, 2, 4, 8)

    Source: Chen et al. 2024, Definition 1.2 and Algorithm 2; softmax: Theorem 4.3.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
    call = functools.partial(
        plan_call,
        query,
        key,
        value,
        activation=activation,
        method=method,
        is_causal=is_causal,
        segment_ids=segment_ids,
        window=window,
        sinks=sinks,
        capacity=capacity,
    )
    shape, plan = call()
    planner.refuse(shape, plan)
    attend = functools.partial(
        _attend, is_causal=is_causal, window=window, sinks=sinks, counted=return_info
    )
    arrays = query, key, value, segment_ids, activation, scale
    differentiated = call(gradients=True)[1]
    if plan == differentiated or plan.chunk is None:
        out, info = attend(*arrays, plan=plan)
    else:
        out, info = _by_use(attend, arrays, plan=plan, differentiated=differentiated)
    return (out, info) if return_info else out


def plan_call(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    activation: Activation,
    method: Method,
    is_causal: bool,
    segment_ids: jax.Array | None,
    window: int | None,
    sinks: int,
    capacity: int | None,
    gradients: bool = False,
) -> tuple[Shape, planner.Plan]:
    """Static checks of a call of `attention`, its sizes and its plan."""
    _check(query, key, value, activation)
    visible.check_options(activation, is_causal=is_causal, window=window, sinks=sinks)
    if segment_ids is not None:
        b, t = query.shape[:2]
        visible.check_segment_ids(segment_ids, b, t, key.shape[1])
    shape = shape_module.of_prefill(
        query,
        key,
        value,
        is_causal=is_causal,
        window=window,
        devices=memory.devices(query, key, value),
    )
    plan = planner.plan(
        activation, method, shape, capacity=capacity, gradients=gradients
    )
    return shape, plan


def _by_use(attend, arrays, *, plan, differentiated):
    """attend(*arrays, plan=...) by one plan, or by another where it is differentiated.

    Gradients cost dense attention more than they cost hsr, and only JAX knows whether
    they are asked for: it calls `forward` if they are.
    """

    @jax.custom_vjp
    def attended(arrays):
        return attend(*arrays, plan=plan)

    def forward(arrays):
        return jax.vjp(lambda arrays: attend(*arrays, plan=differentiated), arrays)

    attended.defvjp(forward, lambda pull, cotangents: pull(cotangents))
    return attended(arrays)


@functools.partial(
    jax.jit, static_argnames=("is_causal", "window", "sinks", "plan", "counted")
)
def _attend(
    query,
    key,
    value,
    segment_ids,
    activation,
    scale,
    *,
    is_causal,
    window,
    sinks,
    plan,
    counted,
):
    """Carries out the plan; jitted for the sake of callers outside jit."""
    t, n = query.shape[1:3]
    s, kv_heads = key.shape[1:3]
    seen = visible.of_prefill(
        t, s, is_causal=is_causal, window=window, sinks=sinks, segment_ids=segment_ids
    )
    core = core_of(activation)
    if plan.method == "dense":
        tiles = query_tiles(
            core,
            query,
            seen,
            scale=scale,
            kv_heads=kv_heads,
            tile=plan.dense_tile,
        )
        values = summarize_values(heads_first(value))
        found = dense.attend(
            core,
            heads_first(key),
            values,
            tiles,
            chunk=plan.chunk,
            counted=counted,
        )
        out, info = jax.tree.map(lambda x: from_tiles(x, length=t, heads=n), found)
    else:
        out, info = prefill(
            query,
            key,
            value,
            seen,
            activation=core,
            scale=scale,
            plan=plan,
            counted=counted,
        )
    out = closed.complete(activation, out, query, key, value, seen, scale=scale)
    return out.astype(query.dtype), info


def _check(query, key, value, activation) -> None:
    """Static checks of shapes, dtypes and the activation."""
    check_query(query, activation)
    for name, x, layout in (
        ("key", key, "[B, S, K, H]"),
        ("value", value, "[B, S, K, D]"),
    ):
        checks.check_float(name, x)
        checks.check_rank(name, x, layout)
        checks.check_nonempty(name, x)
    checks.check_equal("key.shape[0]", key.shape[0], query.shape[0], "the batch size")
    checks.check_equal(
        "value.shape[:3]", value.shape[:3], key.shape[:3], "the key's B, S, K"
    )
    check_heads(query, key.shape[2], key.shape[3])


def check_query(query: jax.Array, activation: Activation) -> None:
    """Static checks of a query f[B, T, N, H] and the activation."""
    if not isinstance(activation, Activation):
        raise TypeError(
            "activation must be hsrjax.ReLU(...), hsrjax.Softmax(...), PReLU, CELU, "
            f"SELU or Entmax, got {activation!r}."
        )
    checks.check_float("query", query)
    checks.check_rank("query", query, "[B, T, N, H]")
    checks.check_nonempty("query", query)
    checks.check_head_dim("query", query.shape[3])


def check_heads(query: jax.Array, kv_heads: int, head_dim: int) -> None:
    """Raises ValueError unless the query's heads fit the keys'."""
    checks.check_equal(
        "query.shape[3]", query.shape[3], head_dim, "the head size of the keys"
    )
    if query.shape[2] % kv_heads:
        raise ValueError(
            f"query heads must be a multiple of the {kv_heads} key heads, got "
            f"{query.shape[2]}; use N = G * K heads."
        )
