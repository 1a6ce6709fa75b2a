"""The threshold of 1.5-entmax, which makes it one of the ReLU^2 kinds of attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_MOST_STEPS = 12
"""Newton's steps: from below they converge for any scores, most in six or seven."""
_CLOSE = 1e-6
"""Change of every threshold, in half scores, at which it is found."""


def entmax_threshold(
    query: jax.Array, key: jax.Array, visible: jax.Array, *, scale: float
) -> jax.Array:
    """The bias tau that makes `sum_s relu(scale <q, k_s> - tau)^2 = 1` over a row.

    With `scale` half the scale of the scores these are the weights of 1.5-entmax. Every
    score of a row is needed to find tau, so this is dense whatever attends afterwards.

    Args:
      query: f[B, T, N, H].
      key: f[B, S, K, H], N a multiple of K.
      visible: bool, broadcasts to [B, T, S]; rows that see nothing get an infinite tau.
      scale: multiplies the scores.

    Returns:
      f32[B, T, N], differentiable. Cost O(B N T S H), memory O(B N T S).

    Source: Peters, Niculae, Martins, *Sparse sequence-to-sequence models*, ACL 2019.
    """
    b, t, n, h = query.shape
    grouped = query.reshape(b, t, key.shape[2], -1, h)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32
    )
    seen = jnp.broadcast_to(visible, (b, t, key.shape[1]))[:, None, None]
    scores = jnp.where(seen, scores * scale, -jnp.inf)
    # Finite where nothing is visible: no NaN may come back through the gradients.
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    empty = peak == -jnp.inf
    start = jnp.where(empty, 0.0, peak) - 1.0  # the largest score alone weighs 1 here

    fixed = jax.lax.stop_gradient(scores)

    def goes_on(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        steps, before, tau = state
        return (steps < _MOST_STEPS) & ~jnp.all(jnp.abs(tau - before) <= _CLOSE)

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        steps, _, tau = state
        return steps + 1, tau, _newton(fixed, tau)

    begun = jnp.zeros((), jnp.int32), start - 1.0, start
    _, _, found = jax.lax.while_loop(goes_on, step, begun)
    tau = jnp.where(empty, jnp.inf, _implicit(scores, jax.lax.stop_gradient(found)))
    return jnp.moveaxis(tau, 3, 1).reshape(b, t, n)


def _newton(scores: jax.Array, tau: jax.Array) -> jax.Array:
    """A step on the norm of the excess, which is convex in tau, towards norm 1."""
    excess = jax.nn.relu(scores - tau[..., None])
    norm = jnp.sqrt(jnp.sum(excess * excess, axis=-1))
    total = jnp.sum(excess, axis=-1)
    return tau + (norm - 1.0) * norm / jnp.where(total > 0, total, 1.0)


def _implicit(scores: jax.Array, tau: jax.Array) -> jax.Array:
    """The solution again, with the derivative `sum(r ds) / sum(r)`, r the excess."""
    excess = jax.nn.relu(scores - tau[..., None])
    total = jax.lax.stop_gradient(jnp.sum(excess, axis=-1))
    residual = jnp.sum(excess * excess, axis=-1) - 1.0
    return tau + residual / jnp.where(total > 0, 2.0 * total, 1.0)
