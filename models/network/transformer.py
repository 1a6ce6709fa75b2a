"""A decoder-only transformer whose attention is hsrjax."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import hsrjax
from models.network.attention import Attention
from models.network.config import Method, ModelConfig
from models.network.layers import FeedForward, RMSNorm
from models.network.remat import remat as again

Caches = tuple[hsrjax.KVCache, ...]  # one per layer


class ThresholdScale(nnx.Variable):
    """The schedule value that multiplies every threshold of the thresholded kinds.

    Training sets it, no gradient reaches it, and it is saved with the model, so that
    generation uses the value the model was trained to.
    """


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    Args:
      config: the model's shape.
      layer: its number.
      rngs: `params` stream that draws the weights.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, config, rngs=rngs)
        self.attention = Attention(config, layer, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, config, rngs=rngs)
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        stream: jax.Array,
        positions: jax.Array,
        threshold_scale: jax.Array,
        *,
        return_info: bool = False,
    ) -> tuple[jax.Array, hsrjax.Info | None]:
        """f[B, T, E] -> f[B, T, E] and the info of its attention."""
        attended, info = self.attention(
            self.attention_norm(stream),
            positions,
            threshold_scale,
            return_info=return_info,
        )
        return self._feed_forward(stream + attended), info

    def step(
        self,
        stream: jax.Array,
        cache: hsrjax.KVCache,
        positions: jax.Array,
        threshold_scale: jax.Array,
        *,
        lengths: jax.Array,
    ) -> tuple[jax.Array, hsrjax.KVCache, hsrjax.Info]:
        """A call on new positions only: f[B, T, E], the longer cache, the info."""
        attended, cache, info = self.attention.step(
            self.attention_norm(stream),
            cache,
            positions,
            threshold_scale,
            lengths=lengths,
        )
        return self._feed_forward(stream + attended), cache, info

    def _feed_forward(self, stream: jax.Array) -> jax.Array:
        return stream + self.mlp(self.mlp_norm(stream))


class Transformer(nnx.Module):
    """A language model: embedding, pre-norm blocks, final norm, tied or free head.

    No method jits: split the model with `nnx.split` and jit the function around it.

    Args:
      config: the model's shape.
      rngs: `params` stream that draws all parameters.
      blocks: in place of new ones.

    Example:
      >>> config = ModelConfig(num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=1,
      ...                      head_dim=16, mlp_dim=64)
      >>> model = Transformer(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 8), jnp.int32)).shape
      (1, 8, 256)
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        blocks: Sequence[Block] | None = None,
    ):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.embed_dim,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        if blocks is None:
            layers = range(config.num_layers)
            blocks = [Block(config, layer, rngs=rngs) for layer in layers]
        self.blocks = nnx.List(list(blocks))
        self.final_norm = RMSNorm(config.embed_dim, config, rngs=rngs)
        if not config.tie_embeddings:
            self.head = nnx.Linear(
                config.embed_dim,
                config.vocab_size,
                use_bias=False,
                kernel_init=nnx.initializers.normal(0.02),
                dtype=jnp.dtype(config.dtype),
                param_dtype=jnp.dtype(config.param_dtype),
                rngs=rngs,
            )
        self.threshold_scale = ThresholdScale(jnp.ones((), jnp.float32))

    def __call__(
        self, tokens: jax.Array, *, return_info: bool = False, remat: bool = False
    ) -> Any:
        """Scores the next token at every position.

        Args:
          tokens: i32[B, T].
          return_info: whether to measure which keys fired.
          remat: whether a backward pass is to keep only the blocks' inputs and work the
            rest out again: less memory, about a third more work.

        Returns:
          Logits f32[B, T, V]; with `return_info`, logits and a tuple of hsrjax's info
          per layer, each with fields [B, T, N].
        """
        stream, infos = self.encode(tokens, return_info=return_info, remat=remat)
        logits = self.unembed(stream)
        return (logits, infos) if return_info else logits

    def encode(
        self, tokens: jax.Array, *, return_info: bool = False, remat: bool = False
    ) -> tuple[jax.Array, tuple[hsrjax.Info, ...] | None]:
        """A call without the output layer, for callers that need few of the logits.

        Args:
          tokens, return_info, remat: as in a call.

        Returns:
          The residual stream f[B, T, E] (see `unembed`), and the infos if asked for.
        """
        _check_tokens(tokens)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        stream, infos = self.embed(tokens), []
        for block in self.blocks:
            arguments = stream, positions, self.threshold_scale[...]
            if remat:
                graphdef, state = nnx.split(block)
                run = functools.partial(_run_block, graphdef, return_info)
                stream, info = again(run)(state, *arguments)
            else:
                stream, info = block(*arguments, return_info=return_info)
            infos.append(info)
        return stream, tuple(infos) if return_info else None

    def step(
        self,
        tokens: jax.Array,
        caches: Caches,
        *,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Caches, tuple[hsrjax.Info, ...]]:
        """Reads new tokens behind those in the caches: prefill (T > 1) and decode.

        Args:
          tokens: i32[B, T], padded on the right.
          caches: one hsrjax cache per layer, from `init_caches` or an earlier step.
          lengths: i32[B], real tokens per row; None means all T.

        Returns:
          Logits f32[B, T, V], the longer caches and hsrjax's info per layer. Token t
          of row b has position `old length + t`; what stands at padding means nothing.
        """
        stream, caches, infos = self.advance(tokens, caches, lengths=lengths)
        return self.unembed(stream), caches, infos

    def advance(
        self,
        tokens: jax.Array,
        caches: Caches,
        *,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Caches, tuple[hsrjax.Info, ...]]:
        """`step` without the output layer, for callers that need few of the logits.

        Args:
          tokens: i32[B, T], padded on the right.
          caches: one hsrjax cache per layer.
          lengths: i32[B], real tokens per row; None means all T.

        Returns:
          The residual stream f[B, T, E] (see `unembed`), the longer caches, the infos.
        """
        _check_tokens(tokens)
        if len(caches) != self.config.num_layers:
            raise ValueError(
                f"Transformer: caches must hold one cache for each of the "
                f"{self.config.num_layers} layers, got {len(caches)}; make them with "
                "init_caches."
            )
        batch, new = tokens.shape
        if lengths is None:
            lengths = jnp.full(batch, new, jnp.int32)
        offsets = jnp.arange(new, dtype=jnp.int32)[None, :]
        positions = caches[0].length[:, None] + offsets  # [B, T]
        stream, grown, infos = self.embed(tokens), [], []
        for block, cache in zip(self.blocks, caches, strict=True):
            stream, cache, info = block.step(
                stream, cache, positions, self.threshold_scale[...], lengths=lengths
            )
            grown.append(cache)
            infos.append(info)
        return stream, tuple(grown), tuple(infos)

    def unembed(self, stream: jax.Array) -> jax.Array:
        """Final norm and output layer: f[..., E] -> logits f32[..., V]."""
        stream = self.final_norm(stream)
        if self.config.tie_embeddings:
            return self.embed.attend(stream).astype(jnp.float32)
        return self.head(stream).astype(jnp.float32)

    def init_caches(self, batch: int, max_length: int) -> Caches:
        """Empty caches for `step`.

        Args:
          batch: B, the number of rows.
          max_length: the most tokens a row may reach.

        Returns:
          One hsrjax cache per layer.
        """
        return _init_caches(self.config, batch, max_length)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init_caches(config: ModelConfig, batch: int, max_length: int) -> Caches:
    return tuple(
        hsrjax.init_cache(
            batch,
            max_length,
            config.views * config.num_kv_heads,
            config.head_dim,
            value_dim=config.value_size,
            dtype=jnp.dtype(config.dtype),
            tail=config.tail,
        )
        for _ in range(config.num_layers)
    )


def _run_block(
    graphdef: Any, return_info: bool, state: Any, *arguments: jax.Array
) -> tuple[jax.Array, hsrjax.Info | None]:
    """A block as a function of its variables."""
    return nnx.merge(graphdef, state)(*arguments, return_info=return_info)


def with_attention(
    model: Transformer,
    attention: Method,
    *,
    top_r: int | None = None,
    epsilon: float | None = None,
    tail: int | None = None,
) -> Transformer:
    """The same parameters computed by another implementation.

    Args:
      model: any transformer; it is left as it is.
      attention: "dense", "hsr" or "auto".
      top_r: for softmax models, keep the r best keys of every query.
      epsilon: for softmax models, leave out at most this share of the mass.
      tail: with either, what is left out acts through sketches (`hsrjax.Softmax`).

    Returns:
      A model that shares the arrays of `model`.

    Raises:
      ValueError: top_r or epsilon on a model whose attention is not softmax.
    """
    config = dataclasses.replace(
        model.config, attention=attention, top_r=top_r, epsilon=epsilon, tail=tail
    )
    return with_config(model, config)


def with_length(model: Transformer, tokens: int) -> Transformer:
    """The same parameters for rows of so many tokens.

    Phi-3's positions turn otherwise in rows that are longer than those of its first
    training; every other model is returned as it is.
    """
    scaling = model.config.rope_scaling
    if scaling is None or scaling == scaling.for_length(tokens):
        return model
    scaling = scaling.for_length(tokens)
    return with_config(model, dataclasses.replace(model.config, rope_scaling=scaling))


def with_config(model: Transformer, config: ModelConfig) -> Transformer:
    """The same parameters under another config of the same shapes."""
    return nnx.merge(nnx.graphdef(abstract_model(config)), nnx.state(model))


def abstract_model(config: ModelConfig) -> Transformer:
    """A model of shapes only: nothing is drawn and no memory is taken.

    Blocks that are alike are made once: the time to trace them all grows with the
    square of their number.
    """
    kinds: dict[Any, Block] = {}
    blocks = []
    for layer in range(config.num_layers):
        kind = config.layer_window(layer), config.layer_turns(layer)
        if kind not in kinds:
            make = functools.partial(Block, config, layer)
            kinds[kind] = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
        blocks.append(nnx.clone(kinds[kind]))
    ends = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), blocks=()))
    ends.blocks = nnx.List(blocks)
    return ends


def _check_tokens(tokens: jax.Array) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            "Transformer: tokens must be integers of shape [B, T], got "
            f"{tokens.dtype}{list(tokens.shape)}; add a batch axis with tokens[None] "
            "and convert with tokens.astype('int32')."
        )
