"""Choosing the next token: greedy, temperature, top-k, top-p. Pure and jittable."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(
    logits: jax.Array,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Draws one token per row from softmax(logits / temperature), cut to its head.

    First the `top_k` most probable tokens are kept, then the shortest list of the most
    probable of those that together hold at least `top_p` of what is left. Ties go to
    the smaller token. Costs one sort of the vocabulary; greedy costs none.

    Args:
      logits: f32[B, V].
      key: a `jax.random.key`; unused when greedy.
      temperature: 0 takes the most probable token.
      top_k: how many tokens to keep; None keeps all. 1 is greedy.
      top_p: share of the probability to keep; None keeps all.

    Returns:
      i32[B].

    Raises:
      ValueError: an option is out of its range.

    Example:
      >>> logits = jnp.array([[0.0, 2.0, 1.0]])
      >>> sample(logits, jax.random.key(0), temperature=0.0).tolist()
      [1]
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if logits.ndim != 2:
        raise ValueError(
            f"sample: logits must have shape [B, V], got {list(logits.shape)}; take "
            "one position of a sequence first."
        )
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k is not None:
        rank = jnp.arange(ranked.shape[-1], dtype=jnp.int32)[None, :]
        ranked = jnp.where(rank < top_k, ranked, -jnp.inf)
    if top_p is not None:
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        keep = (before < top_p).at[:, 0].set(True)
        ranked = jnp.where(keep, ranked, -jnp.inf)
    choice = jax.random.categorical(key, ranked, axis=-1)
    chosen = jnp.take_along_axis(order, choice[:, None], axis=-1)
    return chosen[:, 0].astype(jnp.int32)


def check_sampling(
    *, temperature: float, top_k: int | None, top_p: float | None
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
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(
            f"top_p must be above 0 and at most 1, got {top_p}; leave it out to keep "
            "all tokens."
        )
