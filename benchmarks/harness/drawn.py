"""Inputs drawn and thresholds found on the device: where it is lent, seconds count.

The same as `inputs` for one decode step, at the speed of the device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.harness.inputs import DType, Inputs, Shape
from benchmarks.harness.loops import Loop

Heads = Literal["gaussian", "trained"]
_COOLEST, _HOTTEST = 2.6, 5.2
"""Standard deviation of the scores of heads, evenly spread.

SmolLM2's softmax over 8,192 keys has all but a tenth of its mass in 78 keys and all but
3 % in 344 (medians over heads and rows; means 221 and 621); Gaussian scores of this
spread in 81 and 295 (207 and 582)."""
_LOUD, _LOUDER, _SHIFT = 16, 4.0, 2.0
"""One channel in so many is so many times as large; keys share a mean of this norm, in
units of a key's own. Neither changes the weights; both are what sketches must bear."""


class Drawn(NamedTuple):
    """Keys, values and the newest query, and what its scores are.

    Attributes:
      inputs: arrays on the device, without thresholds.
      ordered: f32[B, 1, N, S], the scores in ascending order.
    """

    inputs: Inputs
    ordered: jax.Array

    def firing(self, keys: int) -> Inputs:
        """The inputs, with thresholds that exactly so many keys exceed in each row."""
        return self.inputs_at((keys,))[0]

    def inputs_at(self, firing: Sequence[int]) -> list[Inputs]:
        """The same for several numbers."""
        found = []
        for number in firing:
            size = self.ordered.shape[-1]
            if number >= size:
                bias = self.ordered[..., 0] - 1.0
            elif number == 0:
                bias = self.ordered[..., -1] + 1.0
            else:
                low, high = (self.ordered[..., size - number - i] for i in (1, 0))
                bias = (low + high) / 2
            found.append(dataclasses.replace(self.inputs, bias=bias))
        return found


def decode(
    heads: Heads, shape: Shape, *, seed: int, dtype: DType, loop: Loop | None
) -> Drawn:
    """The newest query against all keys.

    Args:
      heads: "gaussian"; "trained" has scores that are spread as in a softmax model:
        heavy tails of weights, channels of unequal size, a common mean of the keys.
      shape: sizes.
      seed: of the draws.
      dtype: of queries, keys and values.
      loop: of the inputs.
    """
    key = jax.random.key(seed)
    query, keys, values, ordered = _draw(key, heads=heads, shape=shape, dtype=dtype)
    bias = jnp.zeros(query.shape[:3], jnp.float32)
    inputs = Inputs(
        query=query, key=keys, value=values, bias=bias, dtype=dtype, loop=loop
    )
    return Drawn(inputs, ordered)


@functools.partial(jax.jit, static_argnames=("heads", "shape", "dtype"))
def _draw(key, *, heads: Heads, shape: Shape, dtype: DType):
    b, s, n, k, h = (
        shape.batch,
        shape.keys,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
    )
    kind = jnp.dtype(dtype)
    of_query, of_key, of_value, of_mean = jax.random.split(key, 4)
    query = jax.random.normal(of_query, (b, 1, n, h))
    keys = jax.random.normal(of_key, (b, s, k, h))
    values = jax.random.normal(of_value, (b, s, k, shape.value_dim)).astype(kind)
    if heads == "trained":
        loud = jnp.arange(h) % _LOUD == 0
        size = jnp.where(loud, jnp.float32(_LOUDER), jnp.float32(1.0))
        mean = jax.random.normal(of_mean, (1, 1, k, h)) * size * jnp.float32(_SHIFT)
        norm = jnp.linalg.norm(query * size[None, None, None], axis=-1, keepdims=True)
        hot = jnp.linspace(_COOLEST, _HOTTEST, n, dtype=jnp.float32)
        query = query / norm * hot[None, None, :, None]
        keys = keys * size[None, None, None] + mean
    else:
        query = query / math.sqrt(h)
    query, keys = query.astype(kind), keys.astype(kind)
    grouped = query.reshape(b, k, n // k, h)
    scores = jnp.einsum(
        "bkgh,bskh->bkgs",
        grouped.astype(jnp.float32),
        keys.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return query, keys, values, jnp.sort(scores.reshape(b, 1, n, s), axis=-1)
