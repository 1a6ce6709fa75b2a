"""Algorithm 2 of the paper, prompt prefilling: keys and queries are new in every call.

Init: the index is built over the keys of the call. Inference: for every tile of
queries, report the keys in the union of their half-spaces, score those exactly and sum
(`hsrjax._src.sparse`). Rows report none but visible keys (causality, windows,
segments), which the paper leaves open. Beside it a dense twin to check it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from hsrjax._src import run
from hsrjax._src.activations import tail as tails
from hsrjax._src.activations.base import Activation, check_activation
from hsrjax._src.core import checks, meshes, visible
from hsrjax._src.core.tiles import Info, heads_first, summarize_values
from hsrjax._src.index.index import Index
from hsrjax._src.kernels.base import implementations_for
from hsrjax._src.planning import costs, memory
from hsrjax._src.planning import plan as planner
from hsrjax._src.planning.plan import Choice, Method, Shape


class _Seen(NamedTuple):
    """What queries see of the keys, static."""

    is_causal: bool
    window: int | None
    sinks: int


@overload
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    return_info: Literal[False] = False,
    **options: Any,
) -> jax.Array: ...


@overload
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    return_info: Literal[True],
    **options: Any,
) -> tuple[jax.Array, Info]: ...


def attention(  # pyright: ignore[reportInconsistentOverload]
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    activation: Activation,
    method: Method = "auto",
    implementation: str | None = None,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    sinks: int = 0,
    scale: jax.typing.ArrayLike | None = None,
    capacity: int | None = None,
    return_info: bool = False,
) -> jax.Array | tuple[jax.Array, Info]:
    """Attention `sum_j w_ij v_j` that looks only at the keys whose weight is not zero.

    For ReLU^p, `w_ij = relu(scale <q_i, k_j> - bias)^p`, divided as the activation
    says: the same numbers, values and gradients, whichever the method.

    A row in which no key fires is zero, and so are its gradients. A NaN key makes
    exactly the rows that see it NaN; a NaN value spoils its coordinate in all rows but
    empty ones, as it does in a dense product.

    Args:
      query: f[B, T, N, H], float32, bfloat16 or float16.
      key: f[B, S, K, H], N a multiple of K: query heads n K/N share a key head.
      value: f[B, S, K, D]; D may differ from H.
      activation: `hsrjax.ReLU`, `Softmax`, `PReLU`, `CELU`, `SELU`, `Entmax`, or one
        of your own: see `hsrjax.Activation`.
      method: "dense" scores every key; "hsr" those that half-space reporting
        finds; "auto" takes the one expected to be faster, if need be after a look at
        how many keys fire (`hsrjax.explain` says what it will do). Under vmap it
        takes one way for all. What approximates keeps its bounds (`Info`) either way:
        `Softmax(epsilon)` may keep other keys by the other, and a tail is what hsr
        makes of the keys it leaves out, which dense attends to in full.
      implementation: the code that runs, as in jax.nn: "xla" runs everywhere, "triton"
        has kernels for NVIDIA GPUs from Ampere on, and XLA for what they cannot do.
        None is the best that was measured here.
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
      Differentiable by query, key, value, scale and the fields of the activation;
      forward mode and second derivatives only for "dense" with B N T S up to 2**22.

    Raises:
      ValueError: shapes that do not fit, unknown names, capacity < 1, window without
        is_causal, sinks where nothing leaves keys out, segment_ids where T != S,
        sizes that do not fit into memory.
      TypeError: unsupported dtypes, or an activation of another kind.

    Cost: "dense" takes B N T S (H + D) float32 multiplications and memory O(T + S) a
    head beside the arguments. "hsr" builds an index in O(B K S H), takes B N T S H int8
    multiplications, and then H + D float32 ones for each query and reported key.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> q = jnp.ones((1, 2, 4, 8)); k = v = jnp.ones((1, 3, 2, 8))
      >>> hsrjax.attention(q, k, v, activation=hsrjax.ReLU(power=2)).shape
      (1, 2, 4, 8)

    Source: Chen et al. 2024, Definition 1.2 and Algorithm 2; softmax: Theorem 4.3.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    window, sinks, capacity = map(checks.as_integer, (window, sinks, capacity))
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
    choose = functools.partial(
        plan_call,
        query,
        key,
        value,
        activation=activation,
        method=method,
        implementation=implementation,
        is_causal=is_causal,
        segment_ids=segment_ids,
        window=window,
        sinks=sinks,
        capacity=capacity,
    )
    shape, choice = choose()
    planner.refuse(shape, choice.plan)
    seen = _Seen(is_causal, window, sinks)

    def attend(*arrays, plan):
        run = functools.partial(_attend, seen=seen, counted=return_info, plan=plan)
        return meshes.automatic(run, query, lead=3)(*arrays)

    arrays = query, key, value, segment_ids, activation, scale
    _, differentiated = choose(gradients=True)
    if choice == differentiated or choice.plan.chunk is None:
        out, info = attend(*arrays, choice.expected, plan=choice.plan)
    else:
        out, info = _by_use(attend, arrays, choice, differentiated)
    return (out, info) if return_info else out


def plan_call(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    activation: Activation,
    method: Method = "auto",
    implementation: str | None = None,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    sinks: int = 0,
    capacity: int | None = None,
    gradients: bool = False,
) -> tuple[Shape, Choice]:
    """Static checks of a call of `attention`, its sizes and its plan."""
    check_activation(activation)
    _check(query, key, value)
    visible.check_options(activation, is_causal=is_causal, window=window, sinks=sinks)
    if segment_ids is not None:
        b, t = query.shape[:2]
        visible.check_segment_ids(segment_ids, b, t, key.shape[1])
    shape = planner.of_prefill(
        query,
        key,
        value,
        is_causal=is_causal,
        window=window,
        devices=memory.devices(query, key, value),
    )
    choice = planner.plan(
        activation,
        method,
        shape,
        implementations=implementations_for(implementation, costs.platform()),
        capacity=capacity,
        gradients=gradients,
    )
    return shape, choice


def _by_use(attend: Callable, arrays: tuple, choice: Choice, differentiated: Choice):
    """attend(*arrays) by one plan, or by another where it is differentiated.

    Gradients cost dense attention more than they cost hsr, and only JAX knows whether
    they are asked for: it calls `forward` if they are.
    """

    @jax.custom_vjp
    def attended(arrays):
        return attend(*arrays, choice.expected, plan=choice.plan)

    def forward(arrays):
        plan, _, expected = differentiated
        return jax.vjp(lambda arrays: attend(*arrays, expected, plan=plan), arrays)

    attended.defvjp(forward, lambda pull, cotangents: pull(cotangents))
    return attended(arrays)


@functools.partial(jax.jit, static_argnames=("seen", "plan", "counted"))
def _attend(
    query,
    key,
    value,
    segment_ids,
    activation,
    scale,
    expected,
    *,
    seen,
    plan,
    counted,
):
    """Carries out the plan; jitted for the sake of callers outside jit."""
    ranges = visible.of_prefill(
        query.shape[1], key.shape[1], segment_ids=segment_ids, **seen._asdict()
    )
    keys, rows, index, sketch = heads_first(key), heads_first(value), None, None
    if plan.method != "dense":
        index = Index.of(keys, max_keys=keys.shape[-2], whole_cells=False)
        keys = index.keys
        padding = keys.shape[-2] - rows.shape[-2]
        rows = jnp.pad(rows, [(0, 0), (0, 0), (0, padding), (0, 0)])
        if activation.tail is not None:
            frozen = jax.lax.stop_gradient(rows).astype(jnp.float32)
            sketch = tails.sketch_values(frozen, activation.tail)
    out, info = run.attend(
        query,
        keys,
        summarize_values(rows, sketch),
        index,
        ranges,
        activation=activation,
        scale=scale,
        plan=plan,
        expected=expected,
        counted=counted,
    )
    out = activation.complete(out, query, key, value, ranges, scale=scale)
    return out.astype(query.dtype), info


def _check(query, key, value) -> None:
    """Static checks of shapes and dtypes."""
    checks.check_query(query)
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
    checks.check_heads(query, *key.shape[2:], swapped=key.shape[1])
