"""What the attention of every layer gets when a model reads tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

import hsrjax
from models.network.attention import Rule
from models.network.transformer import Transformer


class Operands(NamedTuple):
    """Of one layer, in float32.

    Attributes:
      query: f32[B, T, N, H], scaled: scores are plain inner products.
      key: f32[B, T, K, H].
      value: f32[B, T, K, D].
      activation: ReLU with biases [B, T, N], Softmax or Entmax.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    activation: Rule


def attention_operands(model: Transformer, tokens: jax.Array) -> list[Operands]:
    """The operands of every layer's attention.

    Args:
      model: any transformer.
      tokens: i32[B, T].

    Returns:
      One `Operands` per layer; a kind of attention with two views has twice the heads.
    """
    return [operands for operands, _ in operands_by_layer(model, tokens)]


def operands_by_layer(
    model: Transformer, tokens: jax.Array, *, return_info: bool = False
) -> Iterator[tuple[Operands, hsrjax.Info | None]]:
    """The same layer by layer, so that a caller may let go of one before the next.

    Args:
      model: any transformer.
      tokens: i32[B, T].
      return_info: whether to measure which keys fired, as in a call of the model.

    Yields:
      The operands of each layer, and its info (None unless asked for).
    """
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    threshold_scale = model.threshold_scale[...]
    stream = model.embed(tokens)
    for block in model.blocks:
        attention = block.attention
        query, key, value = attention.project(block.attention_norm(stream), positions)
        activation, scale = attention.rule(positions, threshold_scale)
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
        if isinstance(activation, hsrjax.ReLU):
            bias = jnp.asarray(activation.bias, jnp.float32)
            bias = jnp.broadcast_to(bias, query.shape[:3])
            activation = hsrjax.ReLU(activation.power, bias, activation.normalize)
        value = jnp.tile(value, (1, 1, key.shape[2] // value.shape[2], 1))
        stream, info = block(
            stream, positions, threshold_scale, return_info=return_info
        )
        yield Operands(query * scale, key, value, activation), info


def as_relu(operands: Operands) -> Operands:
    """Entmax as the ReLU^2 attention of the same weights; others as they are.

    The best key of a row, of weight (s / 2 - tau)^2, tells the threshold tau of all.
    Cost and memory O(B N T^2).
    """
    query, key, value, activation = operands
    if not isinstance(activation, hsrjax.Entmax):
        return operands
    batch, length, kv_heads = key.shape[:3]
    one_each = jnp.eye(length)[None, :, None]  # as values they bring out the weights
    weights = cast(
        jax.Array,
        hsrjax.attention(
            query,
            key,
            jnp.broadcast_to(one_each, (batch, length, kv_heads, length)),
            activation=activation,
            method="dense",
            is_causal=True,
            scale=1.0,
        ),
    )
    heads = jnp.repeat(key, query.shape[2] // kv_heads, axis=2)
    scores = jnp.einsum("btnh,bsnh->btns", query / 2, heads, precision="highest")
    best = jnp.argmax(weights, axis=-1)[..., None]
    peak = jnp.take_along_axis(scores, best, axis=-1)[..., 0]
    tau = peak - jnp.sqrt(jnp.max(weights, axis=-1))
    return Operands(query / 2, key, value, hsrjax.ReLU(2, tau, "row_sum"))
