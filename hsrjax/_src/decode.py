"""Algorithm 1 of the paper, generation decoding: a long-lived index over the KV cache.

Init is `init_cache`, and `reindex` over keys that are there already; Inference is
`decode_attention`. The paper scans new keys by brute force; here `extend` inserts them
into the index, at a cost that does not depend on the length, so a cache that has grown
token by token is as fast as one built at once.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hsrjax._src import run
from hsrjax._src.activations import tail as tails
from hsrjax._src.activations.base import Activation, check_activation
from hsrjax._src.core import checks, meshes, visible
from hsrjax._src.core.arrays import shape_text
from hsrjax._src.core.tiles import Info, Values, heads_first
from hsrjax._src.index.index import Index, group_keys
from hsrjax._src.kernels.base import implementations_for, operations
from hsrjax._src.planning import costs, memory
from hsrjax._src.planning import plan as planner
from hsrjax._src.planning.plan import Choice, Method, Shape


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "values"],
    meta_fields=["max_length"],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys with their index, and values, of a batch of growing rows; a pytree.

    Attributes:
      index: over keys f[B, K, P, H].
      values: rows f[B, K, P, D] and what must be known of those not looked at.
      max_length: room per row, static.
    """

    index: Index
    values: Values
    max_length: int

    def __repr__(self) -> str:
        """One line of shapes: the arrays would fill screens."""
        keys = shape_text(getattr(self.index, "keys", self.index))
        values = shape_text(getattr(self.values, "rows", self.values))
        return f"KVCache(keys={keys}, values={values}, max_length={self.max_length})"

    @property
    def length(self) -> jax.Array:
        """Tokens stored in each row, i32[B]."""
        return self.index.size[:, 0]

    @property
    def dropped(self) -> jax.Array:
        """Tokens that found no room in each row, i32[B]: not zero, some are missing."""
        return self.index.dropped[:, 0]


def init_cache(
    batch: int,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    value_dim: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    tail: int | None = None,
) -> KVCache:
    """An empty KV cache whose index grows with it.

    Args:
      batch: B rows.
      max_length: tokens each row has room for.
      num_kv_heads: K.
      head_dim: H of the keys.
      value_dim: D of the values, None is H.
      dtype: of keys and values.
      tail: keep the mean values that `Softmax(tail=...)` needs, of so many consecutive
        tokens; None is none.

    Returns:
      `KVCache` of length 0.

    Raises:
      ValueError: a size below 1, H > 1024, a tail that Softmax would refuse, or more
        room than there is memory.
      TypeError: dtype is not float32, bfloat16 or float16.

    Cost: memory B K P (H + D) numbers, P being max_length rounded up as in `build`, and
    beside them H bytes a token and head for the sketch, D / tail more with a tail.

    Example:
      >>> import hsrjax
      >>> hsrjax.init_cache(2, 100, 4, 64).length
      Array([0, 0], dtype=int32)

    Source: Chen et al. 2024, Algorithm 1 (Init).
    """
    batch = checks.check_positive("batch", batch)
    max_length = checks.check_positive("max_length", max_length)
    num_kv_heads = checks.check_positive("num_kv_heads", num_kv_heads)
    head_dim = checks.check_positive("head_dim", head_dim)
    value_dim = head_dim if value_dim is None else value_dim
    value_dim = checks.check_positive("value_dim", value_dim)
    tail = checks.as_integer(tail)
    checks.check_float_dtype("dtype", jnp.dtype(dtype))
    checks.check_head_dim("head_dim", head_dim)
    if tail is not None:
        tails.check_tail(tail)
    lead = (batch, num_kv_heads)
    beside = value_dim
    if tail is not None:  # bytes, in numbers of the dtype
        beside += -(-value_dim // (tail * jnp.dtype(dtype).itemsize))
    memory.check_room("max_length", max_length, lead, head_dim, dtype, beside=beside)
    index = Index.empty(lead, head_dim, max_keys=max_length, dtype=dtype)
    rows = jnp.zeros((*index.keys.shape[:-1], value_dim), dtype)
    sketch = None if tail is None else tails.sketch_values(rows, tail)
    values = Values(
        rows=rows,
        bound=jnp.zeros(lead, jnp.float32),
        poison=jnp.zeros((*lead, value_dim), jnp.float32),
        sketch=sketch,
    )
    return KVCache(index, values, max_length)


def extend(
    cache: KVCache,
    key: jax.Array,
    value: jax.Array,
    *,
    lengths: jax.Array | None = None,
    implementation: str | None = None,
) -> KVCache:
    """Appends the keys and values of U tokens to every row.

    Args:
      cache: from `init_cache` or `extend`.
      key: f[B, U, K, H] in the cache's dtype.
      value: f[B, U, K, D].
      lengths: i32[B], how many leading tokens of the U are real in each row; None is
        all of them.
      implementation: the code that runs, as in `attention`.

    Returns:
      `KVCache` with U more tokens. Under jit, where lengths are not known, tokens
      beyond `max_length` are not stored and are counted in `dropped`.

    Raises:
      ValueError: shapes that do not fit, U > max_length without lengths, or (outside
        jit) no room.
      TypeError: another dtype than the cache's.

    Cost: O((U + 64) (H + D)) time a row and key head, whatever the length; in place
    where the cache is donated to jit.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> cache = hsrjax.init_cache(1, 8, 2, 4)
      >>> token = jnp.ones((1, 3, 2, 4))
      >>> hsrjax.extend(cache, token, token, lengths=jnp.array([2])).length
      Array([2], dtype=int32)

    Source: Chen et al. 2024, Theorem 4.1, where new keys are scanned instead.
    """
    key, value = jnp.asarray(key), jnp.asarray(value)
    _check_extension(cache, key, value)
    given: Any = lengths
    if lengths is None:
        _check_room(cache, key.shape[1])
        given = np.full(key.shape[:1], key.shape[1], np.int32)
    known, lengths = checks.values(cache.index.size, given), jnp.asarray(given)
    _check_lengths(cache, lengths)
    if known is not None:
        _check_room(cache, int(np.max(known[0][:, 0] + known[1], initial=0)))
    names = implementations_for(implementation, costs.platform())
    run = functools.partial(_extend, implementations=names)
    arrays = cache, key, value, lengths
    return meshes.automatic(run, cache.index.size, lead=2)(*arrays)


@functools.partial(jax.jit, static_argnames="implementations")
def _extend(cache, key, value, lengths, *, implementations):
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, key.shape[1])[:, None]
    index, values = operations(implementations).grow(
        cache.index, cache.values, heads_first(key), heads_first(value), lengths
    )
    return KVCache(index, values, cache.max_length)


def reindex(cache: KVCache) -> KVCache:
    """Puts what the cache holds into spatial order: the same tokens, found faster.

    For head sizes up to 8, where a bound on 128 keys that are near each other rules
    them out together, so that the time of a decode step grows far slower than the
    cache. Larger heads gain only if their keys lie in few dimensions, and lose little.
    It is worth its cost once a prompt is in, and again when many tokens have followed:
    those stay in the order they came in, where they are found no faster than before.

    Args:
      cache: from `extend`; rows may differ in length.

    Returns:
      `KVCache`, in which every token keeps its position: outputs are the same up to
      the order of summation.

    Raises:
      TypeError: cache is not a KVCache.

    Cost: O(P (log^2 P + H + D)) time a row and key head for the P tokens there is room
    for, and memory for P int32 more.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> token = jnp.ones((1, 3, 2, 4))
      >>> cache = hsrjax.extend(hsrjax.init_cache(1, 8, 2, 4), token, token)
      >>> hsrjax.reindex(cache).length
      Array([3], dtype=int32)

    Source: Chen et al. 2024, Algorithm 1 (Init), over keys that are there already.
    """
    _check_cache(cache)
    return meshes.automatic(_reindex, cache.index.size, lead=2)(cache)


@jax.jit
def _reindex(cache):
    index, order = group_keys(cache.index)
    rows = jnp.take_along_axis(cache.values.rows, order[..., None], axis=-2)
    sketch = cache.values.sketch
    if sketch is not None:
        group = tails.group_of(sketch, rows)
        sketch = tails.sketch_values(rows, group)
    values = cache.values._replace(rows=rows, sketch=sketch)
    return dataclasses.replace(cache, index=index, values=values)


def decode_attention(
    query: jax.Array,
    cache: KVCache,
    *,
    activation: Activation,
    method: Method = "auto",
    implementation: str | None = None,
    window: int | None = None,
    sinks: int = 0,
    scale: jax.typing.ArrayLike | None = None,
    positions: jax.Array | None = None,
    capacity: int | None = None,
) -> tuple[jax.Array, Info]:
    """Attention `sum_j w_ij v_j` of the newest positions over the cache.

    Looks only at the keys whose weight is not zero, as `attention` does.

    Args:
      query: f[B, T, N, H]; query t of a row stands at position length - T + t and sees
        the keys up to and including that position.
      cache: holds the keys of these positions already.
      activation: `hsrjax.ReLU`, `Softmax`, `Entmax` or one of your own; the others have
        closed forms over all keys, for which a cache would have to keep running sums.
      method: "dense", "hsr" or "auto", as in `attention`.
      implementation: the code that runs, as in `attention`.
      window: static; a query at position p sees positions p - window + 1 to p.
      sinks: static; the first so many tokens of each row stay visible outside the
        window, and under Softmax(top_r or epsilon) are always kept, as in `attention`.
      scale: multiplies the scores, None is 1/sqrt(H). May be traced.
      positions: i32[B, T] to place the queries elsewhere; needed after an `extend` with
        ragged `lengths`. Negative positions see nothing.
      capacity: slots of one gather, None chooses. It changes speed, never the result.

    Returns:
      (f[B, T, N, D] in the query's dtype, `Info` with fields [B, T, N]).

    Raises:
      ValueError: shapes that do not fit, unknown names, capacity < 1, window < 1,
        sinks where nothing leaves keys out, sizes that do not fit into memory.
      TypeError: unsupported dtypes, or an activation of another kind.

    Cost: "dense" reads P (H + D) numbers a row and key head, P being the tokens there
    is room for. "hsr" reads the P H bytes of the sketch, or what the balls of a
    reindexed cache leave of it, and then H + D numbers for each reported key.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> token = jnp.ones((1, 1, 2, 4))
      >>> cache = hsrjax.extend(hsrjax.init_cache(1, 8, 2, 4), token, token)
      >>> query = jnp.ones((1, 1, 6, 4))
      >>> out, info = hsrjax.decode_attention(query, cache, activation=hsrjax.ReLU())
      >>> out.shape, int(info.count[0, 0, 0])
      ((1, 1, 6, 4), 1)

    Source: Chen et al. 2024, Algorithm 1 (Inference), Theorem 4.1.
    """
    query = jnp.asarray(query)
    positions = None if positions is None else jnp.asarray(positions)
    window, sinks, capacity = map(checks.as_integer, (window, sinks, capacity))
    shape, choice = plan_call(
        query,
        cache,
        activation=activation,
        method=method,
        implementation=implementation,
        window=window,
        sinks=sinks,
        positions=positions,
        capacity=capacity,
    )
    planner.refuse(shape, choice.plan)
    run = functools.partial(_decode, window=window, sinks=sinks, plan=choice.plan)
    arrays = query, cache, activation, scale, positions, choice.expected
    return meshes.automatic(run, query, lead=3)(*arrays)


def plan_call(
    query: jax.Array,
    cache: KVCache,
    *,
    activation: Activation,
    method: Method = "auto",
    implementation: str | None = None,
    window: int | None = None,
    sinks: int = 0,
    positions: jax.Array | None = None,
    capacity: int | None = None,
) -> tuple[Shape, Choice]:
    """Static checks of a call of `decode_attention`, its sizes and its plan."""
    _check_decode(query, cache, activation, positions)
    visible.check_options(activation, is_causal=True, window=window, sinks=sinks)
    keys, values = cache.index.keys, cache.values.rows
    shape = planner.of_decode(query, keys, values, devices=memory.devices(query, keys))
    shape = shape._replace(cells=cache.index.cells is not None)
    choice = planner.plan(
        activation,
        method,
        shape,
        implementations=implementations_for(implementation, costs.platform()),
        capacity=capacity,
    )
    if choice.plan.method != "dense":
        _check_sketch(cache, activation.tail)
    return shape, choice


@functools.partial(jax.jit, static_argnames=("window", "sinks", "plan"))
def _decode(
    query, cache, activation, scale, positions, expected, *, window, sinks, plan
):
    t = query.shape[1]
    length = cache.length[:, None]
    if positions is None:
        positions = length - t + jnp.arange(t, dtype=jnp.int32)[None, :]
    out, info = run.attend(
        query,
        cache.index.keys,
        cache.values,
        cache.index,
        visible.of_decode(positions, length, window=window, sinks=sinks),
        activation=activation,
        scale=scale,
        plan=plan,
        expected=expected,
    )
    return out.astype(query.dtype), info


def _check_extension(cache, key, value) -> None:
    _check_cache(cache)
    b, kv_heads, _, h = cache.index.keys.shape
    value_dim = cache.values.rows.shape[-1]
    for name, x, layout, size in (
        ("key", key, "[B, U, K, H]", h),
        ("value", value, "[B, U, K, D]", value_dim),
    ):
        checks.check_float(name, x)
        checks.check_rank(name, x, layout)
        checks.check_nonempty(name, x)
        expected = (b, key.shape[1], kv_heads, size)
        checks.check_equal(f"{name}.shape", x.shape, expected, "to fit the cache")
        checks.check_same_dtype(name, x, cache.values.rows)


def _check_lengths(cache, lengths) -> None:
    checks.check_integer("lengths", lengths)
    expected = cache.length.shape
    checks.check_equal("lengths.shape", lengths.shape, expected, "one per row")


def _check_room(cache, tokens: int) -> None:
    if tokens > cache.max_length:
        raise ValueError(
            f"the cache has room for {cache.max_length} tokens per row, got {tokens}; "
            "create it with a larger max_length."
        )


def _check_decode(query, cache, activation, positions) -> None:
    _check_cache(cache)
    check_activation(activation)
    checks.check_query(query)
    b, kv_heads, _, h = cache.index.keys.shape
    if activation.closed_form:
        raise TypeError(
            "decode_attention takes hsrjax.ReLU, Softmax or Entmax, got "
            f"{activation!r}: its closed form needs running sums that a cache does not "
            "keep; use hsrjax.attention."
        )
    checks.check_equal("query.shape[0]", query.shape[0], b, "the cache's batch size")
    checks.check_heads(query, kv_heads, h, swapped=kv_heads)
    if positions is not None:
        checks.check_integer("positions", positions)
        expected = query.shape[:2]
        checks.check_equal("positions.shape", positions.shape, expected, "[B, T]")


def _check_sketch(cache, tail) -> None:
    values = cache.values
    found = None
    if values.sketch is not None:
        found = tails.group_of(values.sketch, values.rows)
    if tail is not None and found != tail:
        raise ValueError(
            f"activation has tail={tail}, which needs mean values of so many tokens in "
            f"the cache, got a cache with tail={found}; make it with "
            f"hsrjax.init_cache(..., tail={tail})."
        )


def _check_cache(cache) -> None:
    if not isinstance(cache, KVCache):
        raise TypeError(
            f"cache must come from hsrjax.init_cache, got {type(cache).__name__}."
        )
