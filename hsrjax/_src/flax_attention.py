"""hsrjax in the place of flax's dot product attention, without importing flax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from hsrjax._src.activations.base import Activation, check_activation
from hsrjax._src.attention import attention


def attention_fn(
    *, activation: Activation, is_causal: bool = False, **options: Any
) -> Callable[..., jax.Array]:
    """The drop-in for `flax.nnx.MultiHeadAttention` and its twin in flax.linen.

    Args:
      activation: as in `attention`.
      is_causal: static; for linen, whose layers say it by a mask only; nnx layers may
        say it in their call instead.
      options: any other argument of `attention`, such as method, window or scale.

    Returns:
      A function for the layer's argument `attention_fn`, from query f[..., T, N, H],
      key f[..., S, K, H] and value f[..., S, K, D] to f[..., T, N, D]. It refuses, with
      a ValueError, what cannot be honoured: masks, biases, dropout on the weights and
      sowing the weights, which are never all computed.

    Raises:
      TypeError: activation is none.

    Cost: that of `attention`.

    Example:
      >>> import jax.numpy as jnp, hsrjax
      >>> attend = hsrjax.attention_fn(activation=hsrjax.ReLU(power=2), method="hsr")
      >>> x = jnp.ones((1, 8, 4, 16))
      >>> attend(x, x, x, is_causal=True).shape
      (1, 8, 4, 16)

    Source: not in the paper.
    """
    check_activation(activation)
    always_causal = is_causal

    def attend(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        dtype: Any = None,
        module: Any = None,
        is_causal: bool = False,
        **ignored: Any,  # dropout_rng, broadcast_dropout, precision: never loosened
    ) -> jax.Array:
        del ignored
        dropping = dropout_rate > 0 and not deterministic
        _refuse(bias, mask, dropping=dropping, sowing=module is not None)
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        lead = query.shape[:-3]
        one_batch = (x.reshape((-1, *x.shape[-3:])) for x in (query, key, value))
        causal = is_causal or always_causal
        out = attention(*one_batch, activation=activation, is_causal=causal, **options)
        return out.reshape((*lead, *out.shape[-3:]))

    return attend


def _refuse(bias: Any, mask: Any, *, dropping: bool, sowing: bool) -> None:
    if mask is not None:
        raise ValueError(
            "attention_fn: mask must be None, got an array of shape "
            f"{mask.shape}; for a causal mask call the layer, or hsrjax.attention_fn, "
            "with is_causal=True, and for decoding use hsrjax.decode_attention."
        )
    if bias is not None:
        raise ValueError(
            "attention_fn: bias must be None because half-space reporting knows only "
            f"<query, key>, got an array of shape {bias.shape}; a bias per row or "
            "head goes into hsrjax.ReLU(bias=...)."
        )
    if dropping:
        raise ValueError(
            "attention_fn: dropout on the attention weights is not supported; build "
            "the layer with dropout_rate=0 or call it with deterministic=True, and "
            "apply dropout to its output."
        )
    if sowing:
        raise ValueError(
            "attention_fn: sow_weights=True asks for weights that are never all "
            "computed; call the layer with sow_weights=False."
        )
