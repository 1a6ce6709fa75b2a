"""Choosing the next token: greedy, temperature, top-k, top-p. Pure and jittable."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

_COLDEST = float(np.finfo(np.float32).tiny)


def sample(
    logits: jax.Array,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> jax.Array:
    """Draws one token per row from softmax(logits / temperature), cut to its head.

    First the `top_k` most probable tokens are kept, then the shortest list of the most
    probable of those that together hold at least `top_p` of what is left, then those
    with at least `min_p` of the largest probability. Ties go to the smaller token.
    `top_k` and `top_p` cost one sort of the vocabulary; greedy and `min_p` none.

    Args:
      logits: f32[B, V].
      key: a `jax.random.key`; unused when greedy.
      temperature: 0 takes the most probable token.
      top_k: how many tokens to keep; None keeps all. 1 is greedy.
      top_p: share of the probability to keep; None keeps all.
      min_p: smallest probability to keep, as a share of the largest; None keeps all.

    Returns:
      i32[B].

    Raises:
      ValueError: an option is out of its range.

    Example:
      >>> logits = jnp.array([[0.0, 2.0, 1.0]])
      >>> sample(logits, jax.random.key(0), temperature=0.0).tolist()
      [1]
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if logits.ndim != 2:
        raise ValueError(
            f"sample: logits must have shape [B, V], got {list(logits.shape)}; take "
            "one position of a sequence first."
        )
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # With the largest at 0 no quotient overflows but to -inf, which is never drawn.
    logits = logits.astype(jnp.float32)
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / max(temperature, _COLDEST)
    if top_k is None and top_p in (None, 1.0):
        logits = _likely(logits, min_p)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
    order, ranked = _ranked(logits, top_k, top_p)
    choice = jax.random.categorical(key, _likely(ranked, min_p), axis=-1)
    chosen = jnp.take_along_axis(order, choice[:, None], axis=-1)
    return chosen[:, 0].astype(jnp.int32)


def _ranked(
    logits: jax.Array, top_k: int | None, top_p: float | None
) -> tuple[jax.Array, jax.Array]:
    """Tokens from the most probable on, i32[B, V], and their logits, cut to -inf."""
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k is not None:
        rank = jnp.arange(ranked.shape[-1], dtype=jnp.int32)[None, :]
        ranked = jnp.where(rank < top_k, ranked, -jnp.inf)
    if top_p not in (None, 1.0):
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        keep = (before < top_p).at[:, 0].set(True)
        ranked = jnp.where(keep, ranked, -jnp.inf)
    return order, ranked


def _likely(logits: jax.Array, min_p: float | None) -> jax.Array:
    """Logits whose largest is 0 without those less probable than `min_p` of it."""
    if min_p is None:
        return logits
    return jnp.where(logits >= math.log(min_p), logits, -jnp.inf)


def check_sampling(
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None = None,
) -> None:
    """Raises ValueError unless the options of `sample` are in their ranges."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be a finite number of at least 0, got {temperature}; "
            "0 is greedy, 1 samples from the model as it is."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(
            f"top_k must be at least 1, got {top_k}; leave it out to keep all tokens."
        )
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if share is not None and not 0.0 < share <= 1.0:
            raise ValueError(
                f"{name} must be above 0 and at most 1, got {share}; leave it out to "
                "keep all tokens."
            )
