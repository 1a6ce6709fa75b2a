"""From scores to weights: one formula for dense and for reported keys."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Saturating(NamedTuple):
    """The law `x + height` above 0, else `height exp(x / width)`; x = score - offset.

    Zero where it is less than half a unit in the last place of `height`.
    """

    height: float
    width: float

    @property
    def reach(self) -> float:
        """How far below the offset the weight is zero: exp(-17.4) < 2**-25."""
        return 17.4 * self.width


Law = int | Saturating | None
"""The static part of a weight function: p for ReLU^p, None for softmax."""


def edge(law: Law, offset: jax.Array) -> jax.Array:
    """Scores at or below this weigh nothing, for all laws but softmax."""
    return offset - law.reach if isinstance(law, Saturating) else offset


def weigh(
    scores: jax.Array,
    offset: jax.Array,
    shift: jax.Array,
    *,
    law: Law,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Weights f32 of scores f32, one formula for dense and reported keys.

    ReLU^p: `relu(scores - offset) ** p`, for p = 0 a step. Softmax:
    `exp(scores - shift)` where the score is at least `offset` or the key is a sink,
    else 0. NaN scores and offsets give NaN weights, but for p = 0.
    """
    if law == 0:
        return fires(scores, offset, law=law).astype(jnp.float32)
    if isinstance(law, int):
        return jax.nn.relu(scores - offset) ** law
    kept = fires(scores, offset, law=law, sinks=sinks)
    if law is None:
        return jnp.where(kept, jnp.exp(scores - shift), 0.0)
    x = scores - offset
    below = law.height * jnp.exp(jnp.where(x > 0, 0.0, x) / law.width)
    return jnp.where(kept, jnp.where(x > 0, x + law.height, below), 0.0)


def fires(
    scores: jax.Array,
    offset: jax.Array,
    *,
    law: Law,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Whether a key takes part: its weight is not exactly zero by definition."""
    if law is not None:
        return ~(scores <= edge(law, offset))
    reaches = ~(scores < offset)
    return reaches if sinks is None else reaches | sinks
