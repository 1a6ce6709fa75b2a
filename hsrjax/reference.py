"""Slow, obviously right: dense attention and brute-force reporting, for tests.

Written for reading, in plain loops over formulas, sharing no code with the rest.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hsrjax._src.activations.base import Activation
from hsrjax._src.activations.closed import CELU, SELU, PReLU
from hsrjax._src.activations.entmax import Entmax
from hsrjax._src.activations.relu import ReLU
from hsrjax._src.activations.softmax import Softmax


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    activation: Activation,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    sinks: int = 0,
    scale: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Dense attention, head by head: `sum_j w_ij v_j` with every weight computed.

    Args:
      query: f[B, T, N, H].
      key: f[B, S, K, H].
      value: f[B, S, K, D].
      activation: as in `hsrjax.attention`; Softmax's epsilon leaves nothing out, and
        nor does top_r with a tail.
      is_causal: query i sees keys 0..i.
      segment_ids: i32[B, S]; queries see the keys of their own run of equal ids.
      window: query i sees keys i - window + 1..i, and the sinks.
      sinks: the first so many keys of the segment, or of the row. Softmax(top_r) keeps
        them beside the r best others.
      scale: None is 1/sqrt(H).

    Returns:
      f32[B, T, N, D]. Differentiable by JAX.

    Cost: B N T S (H + D) multiplications, and memory O(B N T S).

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> x = jnp.ones((1, 2, 1, 4))
      >>> hsrjax.reference.attention(x, x, x, activation=hsrjax.ReLU()).shape
      (1, 2, 1, 4)

    Source: Chen et al. 2024, Definitions 1.1, 1.2 and B.2; the other activations name
    theirs.
    """
    _, t, n, h = query.shape
    group = n // key.shape[2]
    k = jnp.repeat(key.astype(jnp.float32), group, axis=2)
    v = jnp.repeat(value.astype(jnp.float32), group, axis=2)
    factor = h**-0.5 if scale is None else scale
    scores = factor * jnp.einsum(
        "btnh,bsnh->btns", query.astype(jnp.float32), k, precision="highest"
    )
    visible, sink = visibility(
        t,
        k.shape[1],
        is_causal=is_causal,
        segment_ids=segment_ids,
        window=window,
        sinks=sinks,
    )
    visible, sink = visible[:, :, None, :], sink[:, :, None, :]
    if isinstance(activation, Entmax):
        weights = _entmax(scores, visible, activation.alpha)
    elif isinstance(activation, Softmax):
        weights = _softmax(scores, visible, sink, activation)
    else:
        weights = _each_by_itself(scores, activation)
        weights = jnp.where(visible, weights, 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if activation.normalize == "none":
            total = jnp.ones_like(total)
        if activation.normalize == "length":
            total = jnp.sum(visible, axis=-1, keepdims=True).astype(jnp.float32)
        weights = jnp.where(total == 0, 0.0, weights / jnp.where(total == 0, 1, total))
    return jnp.einsum("btns,bsnd->btnd", weights, v, precision="highest")


def _each_by_itself(scores, activation):
    """Weights that each depend on one score; fields broadcast to [B, T, N]."""
    rows = scores.shape[:-1]
    per_row = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), rows)[..., None]
    if not isinstance(activation, (ReLU, PReLU, CELU, SELU)):  # one of the user's own
        return jax.tree.map(per_row, activation).weigh(scores)
    x = scores - per_row(activation.bias)
    if isinstance(activation, ReLU):
        return jax.nn.relu(x) ** activation.power
    if isinstance(activation, PReLU):
        return jnp.where(x > 0, x, per_row(activation.slope) * x)
    if isinstance(activation, CELU):
        return jax.nn.celu(x, activation.alpha)
    return jax.nn.selu(x)


def _softmax(scores, visible, sink, activation):
    """Of the sinks and the r best others, or of all."""
    scores = jnp.where(visible, scores, -jnp.inf)
    keys = scores.shape[-1]
    r = keys if activation.tail else activation.top_r or keys
    if r < keys:
        others = jnp.where(sink, -jnp.inf, scores)
        kth = jnp.sort(others, axis=-1)[..., -r, None]
        scores = jnp.where((scores < kth) & ~sink, -jnp.inf, scores)
    return jax.nn.softmax(scores, axis=-1)


def _entmax(scores, visible, alpha):
    """tau from sorted scores: with r keys it is one number, and that many exceed it."""
    z = (alpha - 1.0) * scores
    best = jnp.max(jnp.where(visible, z, -jnp.inf), axis=-1, keepdims=True)
    z = jnp.where(visible, z - jnp.where(best == -jnp.inf, 0.0, best), -2.0)
    ranked = -jnp.sort(-z, axis=-1)
    rank = jnp.arange(1, z.shape[-1] + 1).astype(jnp.float32)
    mean = jnp.cumsum(ranked, axis=-1) / rank
    if alpha == 2.0:
        tau = mean - 1.0 / rank
    else:
        spread = jnp.cumsum(ranked**2, axis=-1) / rank - mean**2
        tau = mean - jnp.sqrt(jnp.maximum(1.0 / rank - spread, 1e-30))
    number = jnp.sum(ranked > tau, axis=-1, keepdims=True)
    tau = jnp.take_along_axis(tau, jnp.maximum(number - 1, 0), axis=-1)
    weights = jax.nn.relu(z - tau) ** (1 if alpha == 2.0 else 2)
    return jnp.where(visible, weights, 0.0)


def visibility(
    queries: int,
    keys: int,
    *,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    sinks: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Which keys each query sees, and which of them are its sinks.

    Args:
      queries: T.
      keys: S.
      is_causal: as in `attention`, and so are the others.
      segment_ids: i32[B, S].
      window: a number of keys.
      sinks: a number of keys.

    Returns:
      bool[B, T, S] twice; B is 1 without segment ids.

    Cost: O(B T S), and with segment ids O(B S^2).

    Example:
      >>> import hsrjax
      >>> seen, _ = hsrjax.reference.visibility(3, 3, is_causal=True, window=2)
      >>> seen[0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [0, 1, 1]]

    Source: not in the paper, where every query sees every key.
    """
    i, j = jnp.arange(queries)[None, :, None], jnp.arange(keys)[None, None, :]
    seen, rank = jnp.ones((1, queries, keys), bool), j
    if segment_ids is not None:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        run = jnp.cumsum(jnp.pad(changes, [(0, 0), (1, 0)]).astype(int), axis=1)
        seen = run[:, :, None] == run[:, None, :]
        rank = jnp.sum(seen & (i > j), axis=2)[:, None, :]  # keys before j in its run
    if is_causal:
        seen = seen & (j <= i)
    sink = seen & (rank < sinks)
    return (seen if window is None else (seen & (i - j < window)) | sink), sink


def query(keys: np.ndarray, normal: np.ndarray, offset: float) -> np.ndarray:
    """Ids of all keys with `<normal, key> >= offset`, in float64, for one half-space.

    Args:
      keys: f[S, H].
      normal: f[H].
      offset: a number.

    Returns:
      i64[count], ascending.

    Cost: S H multiplications.

    Example:
      >>> import numpy as np, hsrjax
      >>> hsrjax.reference.query(np.eye(3), np.array([1.0, 0.0, 2.0]), 1.0)
      array([0, 2])

    Source: Chen et al. 2024, Definition B.10.
    """
    scores = np.asarray(keys, np.float64) @ np.asarray(normal, np.float64)
    return np.nonzero(scores >= np.float64(offset))[0]


def rounding(keys: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """How far a float32 score may be from the exact one: `(H + 2) u sum |a_h k_h|`.

    With `u = 2^-24`, and as many smallest normal numbers more.

    Args:
      keys: f[S, H].
      normal: f[H].

    Returns:
      f64[S]; a key within this distance of an offset may fall on either side.

    Cost: S H multiplications.

    Example:
      >>> import numpy as np, hsrjax
      >>> bool((hsrjax.reference.rounding(np.eye(3), np.ones(3)) < 1e-6).all())
      True

    Source: not in the paper; the usual bound of a sum of rounded products.
    """
    size = np.abs(np.asarray(keys, np.float64)) @ np.abs(np.asarray(normal, np.float64))
    h = np.shape(keys)[-1]
    return (h + 2) * 2.0**-24 * size + (h + 2) * 2.0**-126
