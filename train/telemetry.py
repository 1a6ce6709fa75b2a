"""What every head of a model does on held-out text: how sparse, how well indexed, dead.

Each number is by layer and head (of every view, where a kind of attention has two):

    nonzero_fraction  share of the visible keys whose weight is not zero
    empty_rows        share of the queries for which no key fires
    effective_keys    mean over queries that are not empty of (sum w)^2 / sum w^2
    survivors         share of the visible keys that a decode step with hsr looks at
    capacity_use      keys that such a step looks at, as a share of one gather's slots
    threshold_scale   the threshold's multiplier, learned times scheduled

A head is dead if hardly any query of it finds a key: `dead_heads`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hsrjax
from models.network.operands import Operands, as_relu, attention_operands
from models.network.transformer import Transformer

COLUMNS = (
    "nonzero_fraction",
    "empty_rows",
    "effective_keys",
    "survivors",
    "capacity_use",
    "threshold_scale",
)
DEAD = 0.99
"""Share of empty rows from which on a head is called dead."""
_STEPS = 32
"""Positions at which a decode step is tried."""


def measure(
    model: Transformer, tokens: np.ndarray, *, steps: int = _STEPS
) -> dict[str, np.ndarray]:
    """Reads rows and looks at every head.

    Args:
        model: any transformer.
        tokens: u[B, T], held-out rows.
        steps: positions at which decode steps are tried, spread over a row.

    Returns:
        f64[L, N] by name in `COLUMNS`; NaN where it has no meaning: full softmax looks
        at all keys and has no threshold. Memory O(B T^2) at a time.
    """
    graphdef, state = nnx.split(model)
    layers = _operands(state, jnp.asarray(tokens, jnp.int32), graphdef=graphdef)
    found = [_describe(layer, steps=steps) for layer in layers]
    scales = np.full((len(layers), model.config.num_heads), np.nan)
    if model.config.is_thresholded:
        scheduled = np.asarray(model.threshold_scale[...])
        scales = np.stack([block.attention.beta[...] for block in model.blocks])
        scales = scales * scheduled
    by_name = {
        name: np.stack([np.asarray(layer[name], np.float64) for layer in found])
        for name in COLUMNS[:-1]
    }
    return by_name | {"threshold_scale": np.tile(scales, (1, model.config.views))}


def dead_heads(empty_rows: np.ndarray) -> int:
    """Number of heads for which nearly every row is empty."""
    return int((empty_rows >= DEAD).sum())


@functools.partial(jax.jit, static_argnames="graphdef")
def _operands(state: Any, tokens: jax.Array, *, graphdef: Any) -> list[Operands]:
    return attention_operands(nnx.merge(graphdef, state), tokens)


# Compiled once for all layers, which have the same shapes.
@functools.partial(jax.jit, static_argnames="steps")
def _describe(operands: Operands, *, steps: int) -> dict[str, jax.Array]:
    """All but the threshold's multiplier of one layer, each f32[N]."""
    found = _of_weights(as_relu(operands))
    heads = operands.query.shape[2]
    nothing = jnp.full(heads, jnp.nan, jnp.float32)
    found |= {"survivors": nothing, "capacity_use": nothing}
    rule = operands.activation
    if isinstance(rule, hsrjax.Softmax) and rule.keeps_all:
        return found
    return found | _of_decoding(operands, steps=steps)


def _of_weights(operands: Operands) -> dict[str, jax.Array]:
    """From all the weights, head by head."""
    query, key, _, activation = operands
    length, heads = query.shape[1:3]
    key = jnp.repeat(key, heads // key.shape[2], axis=2)
    visible = jnp.tril(jnp.ones((length, length), bool))[None]

    def one_head(inputs: Any) -> dict[str, jax.Array]:
        query, key, bias = inputs
        scores = jnp.einsum("bth,bsh->bts", query, key)
        if isinstance(activation, hsrjax.ReLU):
            excess = jax.nn.relu(scores - bias[..., None])
            weights = jnp.where(visible, excess**activation.power, 0.0)
        else:
            weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        total, square = weights.sum(axis=-1), (weights * weights).sum(axis=-1)
        filled = square > 0
        effective = jnp.where(filled, total**2 / jnp.where(filled, square, 1.0), 0.0)
        pairs = query.shape[0] * length * (length + 1) / 2
        return {
            "nonzero_fraction": jnp.sum(weights > 0, dtype=jnp.float32) / pairs,
            "empty_rows": 1.0 - filled.mean(dtype=jnp.float32),
            "effective_keys": effective.sum()
            / jnp.maximum(filled.sum(dtype=jnp.float32), 1.0),
        }

    bias = getattr(activation, "bias", jnp.zeros(query.shape[:3], jnp.float32))
    by_head = [jnp.moveaxis(x, 2, 0) for x in (query, key, bias)]
    return jax.lax.map(one_head, tuple(by_head))


def _of_decoding(operands: Operands, *, steps: int) -> dict[str, jax.Array]:
    """From decode steps with hsr at positions spread over the rows."""
    query, key, value, activation = operands
    batch, length, kv_heads, head_dim = key.shape
    cache = hsrjax.init_cache(
        batch, length, kv_heads, head_dim, value_dim=value.shape[-1]
    )
    cache = hsrjax.extend(cache, key, value)
    number = min(steps, length)
    places = (jnp.arange(1, number + 1, dtype=jnp.int32) * length) // number - 1

    def of(place: jax.Array) -> Any:
        at = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=place, slice_size=1, axis=1
        )
        rule = activation
        if isinstance(rule, hsrjax.ReLU):
            bias = at(jnp.asarray(rule.bias))
            rule = hsrjax.ReLU(rule.power, bias, rule.normalize)
        return at(query), rule, jnp.full((batch, 1), place)

    def step(place: jax.Array) -> jax.Array:
        chosen, rule, position = of(place)
        _, info = hsrjax.decode_attention(
            chosen,
            cache,
            activation=rule,
            method="hsr",
            scale=1.0,
            positions=position,
        )
        return info.candidates.sum(axis=(0, 1)).astype(jnp.float32)  # [N]

    looked_at = jax.lax.map(step, places)
    first, rule, _ = of(places[0])
    plan = hsrjax.explain(first, cache=cache, activation=rule, method="hsr", scale=1.0)
    mean = looked_at.mean(axis=0) / batch
    visible = batch * (places + 1).sum().astype(jnp.float32)
    return {
        "survivors": looked_at.sum(axis=0) / visible,
        "capacity_use": mean / plan.capacity,
    }
