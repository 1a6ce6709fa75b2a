"""hsrjax as the attention of flax's own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

import hsrjax
from models.network.config import Method


def hsr_attention_fn(
    *,
    activation: hsrjax.ReLU | hsrjax.Softmax,
    method: Method = "auto",
    scale: float | None = None,
    capacity: int | None = None,
) -> Callable[..., jax.Array]:
    """Makes `flax.nnx.MultiHeadAttention` attend by hsrjax.

    Args:
      activation: `hsrjax.ReLU(...)` or `hsrjax.Softmax(...)`.
      method: "dense", "hsr" or "auto".
      scale: multiplies the scores; None is 1/sqrt(H).
      capacity: slots of the hsr method; None lets hsrjax choose.

    Returns:
      A function for the argument `attention_fn`. It takes `is_causal` from the layer's
      call and refuses what hsrjax cannot honour: masks, dropout on the weights and
      sowing the weights, which are never all computed.

    Example:
      >>> attention_fn = hsr_attention_fn(activation=hsrjax.ReLU(power=2))
      >>> layer = nnx.MultiHeadAttention(4, 32, attention_fn=attention_fn, decode=False,
      ...                                rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 8, 32)), is_causal=True).shape
      (1, 8, 32)
    """

    def attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        dtype: Any = None,
        module: nnx.Module | None = None,
        is_causal: bool = False,
        **ignored: Any,  # dropout_rng, broadcast_dropout, precision: never loosened
    ) -> jax.Array:
        dropping = dropout_rate > 0 and not deterministic
        _refuse(bias, mask, dropping=dropping, sowing=module is not None)
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        lead = query.shape[:-3]
        query, key, value = (
            x.reshape((-1, *x.shape[-3:])) for x in (query, key, value)
        )
        out: Any = hsrjax.attention(
            query,
            key,
            value,
            activation=activation,
            method=method,
            is_causal=is_causal,
            scale=scale,
            capacity=capacity,
        )
        return out.reshape((*lead, *out.shape[-3:]))

    return attention_fn


def _refuse(bias: Any, mask: Any, *, dropping: bool, sowing: bool) -> None:
    if mask is not None:
        raise ValueError(
            "hsr_attention_fn: mask must be None, got an array of shape "
            f"{mask.shape}; for a causal mask call the layer with is_causal=True, and "
            "for decoding use models.network.transformer.Transformer.step or "
            "hsrjax.decode_attention."
        )
    if bias is not None:
        raise ValueError(
            "hsr_attention_fn: bias must be None because half-space reporting knows "
            f"only <query, key>, got an array of shape {bias.shape}; a bias per row or "
            "head goes into hsrjax.ReLU(bias=...)."
        )
    if dropping:
        raise ValueError(
            "hsr_attention_fn: dropout on the attention weights is not supported; "
            "build the layer with dropout_rate=0 or call it with deterministic=True, "
            "and apply dropout to its output."
        )
    if sowing:
        raise ValueError(
            "hsr_attention_fn: sow_weights=True asks for weights that are never all "
            "computed; call the layer with sow_weights=False."
        )
