"""The parts of the transformer that are not attention: norms and feed-forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.network.config import ModelConfig

lecun_normal = nnx.initializers.lecun_normal


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + eps)` over the last axis, computed in float32.

    Unlike `nnx.RMSNorm` it also runs in bfloat16 under strict dtype promotion.

    Args:
      features: size of the last axis.
      config: gives eps and the compute dtype.
      rngs: unused, for the signature that layers share.
    """

    def __init__(self, features: int, config: ModelConfig, *, rngs: nnx.Rngs):
        del rngs
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(features, jnp.dtype(config.param_dtype)))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """f[..., features] -> the same shape and dtype."""
        wide = inputs.astype(jnp.float32)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = self.scale[...].reshape((1,) * (inputs.ndim - 1) + (-1,))
        scale = scale.astype(jnp.float32)
        return (scale * (wide * jax.lax.rsqrt(square + self.eps))).astype(inputs.dtype)


class FeedForward(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`.

    Args:
      config: the model's shape.
      rngs: `params` stream that draws the weights.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)

        def linear(
            inputs: int, outputs: int, kernel_init: nnx.Initializer
        ) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=config.mlp_bias,
                kernel_init=kernel_init,
                dtype=dtype,
                param_dtype=jnp.dtype(config.param_dtype),
                rngs=rngs,
            )

        self.gate = linear(config.embed_dim, config.mlp_dim, lecun_normal())
        self.up = linear(config.embed_dim, config.mlp_dim, lecun_normal())
        self.down = linear(config.mlp_dim, config.embed_dim, residual_init(config))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """f[B, T, E] -> f[B, T, E]."""
        return self.down(jax.nn.silu(self.gate(inputs)) * self.up(inputs))


def residual_init(config: ModelConfig) -> nnx.Initializer:
    """Initialiser of layers that add to the residual stream.

    The 2 L additions each start with variance 1 / (2 L), so that their sum starts near
    one at any depth.
    """
    return nnx.initializers.variance_scaling(
        1.0 / (2 * config.num_layers), "fan_in", "truncated_normal"
    )


def unit_norm(heads: jax.Array) -> jax.Array:
    """Divides f[..., H] by its length; zero stays zero, with finite gradients."""
    wide = heads.astype(jnp.float32)
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(square + 1e-6)).astype(heads.dtype)
