"""What the attention of every layer gets when a model reads tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

import hsrjax
from models.transformer import Transformer


class Operands(NamedTuple):
    """Of one layer, in float32.

    Attributes:
      query: f32[B, T, N, H], scaled: scores are plain inner products.
      key: f32[B, T, K, H].
      value: f32[B, T, K, D].
      activation: ReLU with biases [B, T, N], or Softmax.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    activation: hsrjax.ReLU | hsrjax.Softmax


def attention_operands(model: Transformer, tokens: jax.Array) -> list[Operands]:
    """The operands of every layer's attention.

    Args:
      model: any transformer.
      tokens: i32[B, T].

    Returns:
      One `Operands` per layer; a kind of attention with two views has twice the heads.
    """
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    threshold_scale = model.threshold_scale[...]
    stream, found = model.embed(tokens), []
    for block in model.blocks:
        attention = block.attention
        query, key, value = attention.project(block.attention_norm(stream), positions)
        activation, scale = attention.rule(
            query, key, positions, threshold_scale, key_positions=positions
        )
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
        if isinstance(activation, hsrjax.ReLU):
            bias = jnp.asarray(activation.bias, jnp.float32)
            bias = jnp.broadcast_to(bias, query.shape[:3])
            activation = hsrjax.ReLU(activation.power, bias, activation.normalize)
        value = jnp.tile(value, (1, 1, key.shape[2] // value.shape[2], 1))
        found.append(Operands(query * scale, key, value, activation))
        stream, _ = block(stream, positions, threshold_scale)
    return found
