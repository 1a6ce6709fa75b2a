"""Self-attention by hsrjax: the three kinds, RoPE, grouped heads, the flax adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import hsrjax
from models.config import Implementation, ModelConfig
from models.layers import RMSNorm, lecun_normal, residual_init, rotate, unit_norm


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads.

    Args:
      config: the model's shape and its kind of attention.
      rngs: `params` stream that draws the projections.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        dtype = jnp.dtype(config.dtype)

        def project(features: tuple[int, int]) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                config.embed_dim,
                features,
                use_bias=False,
                kernel_init=lecun_normal(),
                dtype=dtype,
                rngs=rngs,
            )

        self.query = project((heads, config.head_dim))
        self.key = project((kv_heads, config.head_dim))
        self.value = project((kv_heads, config.value_size))
        self.out = nnx.LinearGeneral(
            (heads, config.value_size),
            config.embed_dim,
            axis=(-2, -1),
            use_bias=False,
            kernel_init=residual_init(config),
            dtype=dtype,
            rngs=rngs,
        )
        if config.attention_kind == "relu":
            self.bias = nnx.Param(jnp.zeros(heads, jnp.float32))
        if config.attention_kind == "threshold_relu":
            self.beta = nnx.Param(jnp.ones(heads, jnp.float32))
            self.out_norm = RMSNorm(config.value_size, config, rngs=rngs)

    def __call__(
        self,
        inputs: jax.Array,
        positions: jax.Array,
        threshold_scale: jax.Array,
        *,
        return_info: bool = False,
    ) -> tuple[jax.Array, hsrjax.Info | None]:
        """Attends within one sequence.

        Args:
          inputs: f[B, T, E].
          positions: i32[B, T], 0, 1, ... along T; B may be 1.
          threshold_scale: f32[], multiplies the thresholds of "threshold_relu".
          return_info: whether to measure which keys fired.

        Returns:
          f[B, T, E], and hsrjax's info (None unless asked for).
        """
        query, key, value = self.project(inputs, positions)
        result: Any = hsrjax.attention(
            query,
            key,
            value,
            activation=self.activation(positions, threshold_scale),
            implementation=self.config.attention,
            is_causal=True,
            scale=self.scale,
            capacity=self.config.capacity,
            return_info=return_info,
        )
        attended, info = result if return_info else (result, None)
        return self._finish(attended), info

    def step(
        self,
        inputs: jax.Array,
        cache: hsrjax.KVCache,
        positions: jax.Array,
        threshold_scale: jax.Array,
        *,
        lengths: jax.Array,
    ) -> tuple[jax.Array, hsrjax.KVCache, hsrjax.Info]:
        """Appends the keys of new positions to the cache and attends to all of it.

        Args:
          inputs: f[B, T, E].
          cache: hsrjax cache of this layer.
          positions: i32[B, T], absolute.
          threshold_scale: f32[].
          lengths: i32[B], how many of the T positions of each row are real.

        Returns:
          f[B, T, E], the extended cache and hsrjax's info. Positions past `lengths`
          attend to nothing.
        """
        query, key, value = self.project(inputs, positions)
        cache = hsrjax.extend(cache, key, value, lengths=lengths)
        offsets = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None, :]
        seen_from = jnp.where(offsets < lengths[:, None], positions, -1)
        attended, info = hsrjax.decode_attention(
            query,
            cache,
            activation=self.activation(positions, threshold_scale),
            implementation=self.config.attention,
            scale=self.scale,
            positions=seen_from,
            capacity=self.config.capacity,
        )
        return self._finish(attended), cache, info

    @property
    def scale(self) -> float | None:
        """Of the scores: 1 between unit vectors, else None for 1/sqrt(H)."""
        return 1.0 if self.config.attention_kind == "threshold_relu" else None

    def project(
        self, inputs: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries f[B, T, N, H], keys f[B, T, K, H] and values f[B, T, K, D]."""
        query = rotate(self.query(inputs), positions, theta=self.config.rope_theta)
        key = rotate(self.key(inputs), positions, theta=self.config.rope_theta)
        if self.config.attention_kind == "threshold_relu":
            query, key = unit_norm(query), unit_norm(key)
        return query, key, self.value(inputs)

    def activation(
        self, positions: jax.Array, threshold_scale: jax.Array
    ) -> hsrjax.ReLU | hsrjax.Softmax:
        """The weight function at positions i32[B, T], with its biases [B, T, N]."""
        config = self.config
        if config.attention_kind == "softmax":
            return hsrjax.Softmax(top_r=config.top_r, epsilon=config.epsilon)
        if config.attention_kind == "relu":
            bias = self.bias[...][None, None, :]
            return hsrjax.ReLU(power=config.relu_power, bias=bias, normalize="row_sum")
        growth = hsrjax.theory.relu_threshold(positions + 1, config.head_dim)  # [B, T]
        beta = threshold_scale * self.beta[...]
        tau = growth[..., None] * beta[None, None, :]  # [B, T, N]
        return hsrjax.ReLU(power=config.relu_power, bias=tau, normalize="none")

    def _finish(self, attended: jax.Array) -> jax.Array:
        attended = attended.astype(jnp.dtype(self.config.dtype))
        if self.config.attention_kind == "threshold_relu":
            attended = self.out_norm(attended)
        return self.out(attended)


def hsr_attention_fn(
    *,
    activation: hsrjax.ReLU | hsrjax.Softmax,
    implementation: Implementation = "auto",
    scale: float | None = None,
    capacity: int | None = None,
) -> Callable[..., jax.Array]:
    """Makes `flax.nnx.MultiHeadAttention` attend by hsrjax.

    Args:
      activation: `hsrjax.ReLU(...)` or `hsrjax.Softmax(...)`.
      implementation: "dense", "hsr" or "auto".
      scale: multiplies the scores; None is 1/sqrt(H).
      capacity: slots of the hsr implementation; None lets hsrjax choose.

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
            implementation=implementation,
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
            "for decoding use models.transformer.Transformer.step or "
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
