"""Self-attention by hsrjax: its kinds, RoPE, grouped heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import hsrjax
from models.network.config import ModelConfig
from models.network.layers import RMSNorm, lecun_normal, residual_init, unit_norm
from models.network.rope import rotate

Rule = hsrjax.ReLU | hsrjax.Softmax | hsrjax.Entmax
"""Weight functions of the kinds of attention."""


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads.

    Args:
      config: the model's shape and its kind of attention.
      layer: its number; some models have windows or positions in part of the layers.
      rngs: `params` stream that draws the projections.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, *, rngs: nnx.Rngs):
        self.config = config
        self.window = config.layer_window(layer)
        self.turns = config.layer_turns(layer)
        heads, kv_heads = config.num_heads, config.num_kv_heads
        dtype, kept = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)

        def project(features: tuple[int, int]) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                config.embed_dim,
                features,
                use_bias=config.qkv_bias,
                kernel_init=lecun_normal(),
                dtype=dtype,
                param_dtype=kept,
                rngs=rngs,
            )

        views = config.views
        self.query = project((views * heads, config.head_dim))
        self.key = project((views * kv_heads, config.head_dim))
        self.value = project((kv_heads, config.value_size))
        self.out = nnx.LinearGeneral(
            (heads, config.value_size),
            config.embed_dim,
            axis=(-2, -1),
            use_bias=config.out_bias,
            kernel_init=residual_init(config),
            dtype=dtype,
            param_dtype=kept,
            rngs=rngs,
        )

        def per_head(value: float) -> nnx.Param:
            return nnx.Param(jnp.full(heads, value, jnp.float32))

        if config.attention_kind in ("relu", "relu_length"):
            self.bias = per_head(0.0)
        if config.is_thresholded:
            self.beta = per_head(1.0)
        elif config.normalizes_heads:
            self.gain = nnx.Param(jnp.ones(views * heads, jnp.float32))
        if views == 2:
            self.subtracted = per_head(0.5)
        if config.keep_self:
            self.self_weight = per_head(0.05)
        if config.head_norm:
            self.query_norm = RMSNorm(config.head_dim, config, rngs=rngs)
            self.key_norm = RMSNorm(config.head_dim, config, rngs=rngs)
        if config.normalizes_output:
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
        activation, scale = self.rule(positions, threshold_scale)
        result = hsrjax.attention(
            query,
            key,
            self._in_views(value),
            activation=activation,
            method=self.config.attention,
            is_causal=True,
            window=self.window,
            scale=scale,
            capacity=self.config.capacity,
            return_info=return_info,
        )
        attended, info = result if isinstance(result, tuple) else (result, None)
        return self._finish(attended, value), info

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
        cache = hsrjax.extend(cache, key, self._in_views(value), lengths=lengths)
        offsets = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None, :]
        seen_from = jnp.where(offsets < lengths[:, None], positions, -1)
        activation, scale = self.rule(positions, threshold_scale)
        attended, info = hsrjax.decode_attention(
            query,
            cache,
            activation=activation,
            method=self.config.attention,
            window=self.window,
            scale=scale,
            positions=seen_from,
            capacity=self.config.capacity,
        )
        return self._finish(attended, value), cache, info

    def project(
        self, inputs: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries f[B, T, W N, H], keys f[B, T, W K, H] and values f[B, T, K, D].

        W is the number of views; heads of one view stand side by side.
        """
        query, key = self.query(inputs), self.key(inputs)
        if self.config.head_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.turns:
            query, key = self._turn(query, positions), self._turn(key, positions)
        if self.config.normalizes_heads:
            query, key = unit_norm(query), unit_norm(key)
        if self.config.normalizes_heads and not self.config.is_thresholded:
            gain = self.gain[...].astype(query.dtype)[None, None, :, None]
            query = query * (gain * self.config.head_dim)  # as of RMS-normed vectors
        return query, key, self.value(inputs)

    def _turn(self, heads: jax.Array, positions: jax.Array) -> jax.Array:
        config = self.config
        return rotate(
            heads,
            positions,
            theta=config.rope_theta,
            rotary_dim=config.rotary_dim,
            scaling=config.rope_scaling,
        )

    def rule(
        self, positions: jax.Array, threshold_scale: jax.Array
    ) -> tuple[Rule, float]:
        """The weight function of queries, and what multiplies their scores.

        Args:
          positions: i32[B, T]; a query sees keys up to its own position.
          threshold_scale: f32[].
        """
        config = self.config
        kind, scale = config.attention_kind, config.head_dim**-0.5
        if kind == "softmax":
            activation = hsrjax.Softmax(
                top_r=config.top_r, epsilon=config.epsilon, tail=config.tail
            )
            return activation, scale
        if kind == "entmax":
            return hsrjax.Entmax(), scale
        if not config.is_thresholded:
            bias = self.bias[...][None, None, :]
            normalize = "length" if kind == "relu_length" else "row_sum"
            return hsrjax.ReLU(config.relu_power, bias, normalize), scale
        beta = jnp.tile(threshold_scale * self.beta[...], config.views)
        tau = hsrjax.theory.relu_threshold(
            positions[..., None] + 1,
            config.head_dim,
            scale=beta[None, None, :],
            law=config.threshold,
        )  # [B, T, W N]
        return hsrjax.ReLU(config.relu_power, tau, "none"), 1.0

    def _in_views(self, value: jax.Array) -> jax.Array:
        """Every view attends to the same values: f[B, T, K, D] -> f[B, T, W K, D]."""
        return jnp.tile(value, (1, 1, self.config.views, 1))

    def _finish(self, attended: jax.Array, value: jax.Array) -> jax.Array:
        """From what the views attended to, f[B, T, W N, D], to f[B, T, E]."""
        config, heads = self.config, self.config.num_heads
        if config.views == 2:
            share = self.subtracted[...].astype(attended.dtype)[None, None, :, None]
            attended = attended[:, :, :heads] - share * attended[:, :, heads:]
        if config.keep_self:
            weight = self.self_weight[...].astype(value.dtype)[None, None, :, None]
            own = jnp.repeat(value, heads // config.num_kv_heads, axis=2)
            attended = attended + weight * own
        attended = attended.astype(jnp.dtype(config.dtype))
        if config.normalizes_output:
            attended = self.out_norm(attended)
        return self.out(attended)
