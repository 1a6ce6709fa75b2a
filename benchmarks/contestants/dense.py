"""Dense ReLU attention in the forms that XLA might like: the baselines of decoding.

All score every key. The fastest of them counts as "dense". Each keeps a cache that is
exactly full with the new token, writes the token at its end and needs no mask: what a
dense decode step costs at least.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import loops
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.timing import Arrays, Call, Contestant, Open

_CHUNK = 1024

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(query [B, T, N, H], keys, values, bias [B, T, N]) -> [B, T, N, D]."""


def decode_contestants(inputs: Inputs) -> list[Contestant]:
    """Three einsums over two layouts of the cache."""
    forms = {
        "dense einsum": ("bksh", _product),
        "dense einsum (keys transposed)": ("bkhs", _product),
        "dense einsum (values in chunks)": ("bkhs", _product_in_chunks),
    }

    def prepare(keys: str, product) -> Open:
        attend = _one_position(inputs, f"bkgh,{keys}->bkgs", product)
        return cached(inputs, keys, "bksh", attend)

    if inputs.loop is not None:  # GPUs like these two
        forms.pop("dense einsum (values in chunks)")
    return [
        Contestant(name, "relu", functools.partial(prepare, *form), only_output)
        for name, form in forms.items()
    ]


def cached(inputs: Inputs, key_layout: str, value_layout: str, attend: Attend) -> Open:
    """A decode step over a cache: writes the newest token at its end, attends to all.

    The write is a call of its own, in place: inside the same jit, XLA's CPU backend
    takes eight times as long for the products that follow. With a loop all is one
    program.

    Args:
      inputs: with one query position.
      key_layout: order of the axes in which the cache keeps keys, of "bskh".
      value_layout: the same of the values.
      attend: attention over arrays of these layouts.
    """
    key_axes = ["bskh".index(axis) for axis in key_layout]
    value_axes = ["bskh".index(axis) for axis in value_layout]
    key_place, value_place = key_layout.index("s"), value_layout.index("s")
    last = inputs.key.shape[1] - 1

    def write(keys, values, new_key, new_value):
        update = jax.lax.dynamic_update_slice_in_dim
        keys = update(keys, new_key, last, key_place)
        return keys, update(values, new_value, last, value_place)

    query, bias = inputs.on_device(inputs.query), jnp.asarray(inputs.bias)
    new_key = inputs.on_device(inputs.key[:, -1:].transpose(key_axes))
    new_value = inputs.on_device(inputs.value[:, -1:].transpose(value_axes))

    def make() -> tuple[jax.Array, jax.Array]:
        keys = inputs.on_device(inputs.key.transpose(key_axes)).copy()
        return keys, inputs.on_device(inputs.value.transpose(value_axes)).copy()

    if inputs.loop is not None:

        def step(cache, moved, fixed):
            query, new_key, new_value = moved
            keys, values = cache
            keys, values = write(keys, values, new_key, new_value)
            return attend(query, keys, values, fixed), (keys, values)

        number = inputs.loop.caches
        return loops.repeated(
            step,
            inputs.loop,
            lambda: loops.Held(tuple(make() for _ in range(number))),
            (query, new_key, new_value),
            bias,
            like=lambda: tuple(make() for _ in range(number)),
        )

    write, attend = jax.jit(write, donate_argnums=(0, 1)), jax.jit(attend)

    def open_() -> Call:
        keys, values = make()

        def call() -> Any:
            nonlocal keys, values
            keys, values = write(keys, values, new_key, new_value)
            return jax.block_until_ready(attend(query, keys, values, bias))

        return call

    return open_


def only_output(out: Any) -> Arrays:
    """`finish` of implementations that return the output alone."""
    return (np.asarray(out, np.float32),)


def natural_einsum(inputs: Inputs) -> Attend:
    """The plainest form, on caches [B, S, K, H]; also for whole sequences."""
    kv_heads = inputs.key.shape[2]

    def attend(query, keys, values, bias):
        grouped = _grouped(query, kv_heads)
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, keys)
        weights = weigh(scores, _grouped(bias, kv_heads).transpose(0, 2, 3, 1), inputs)
        if inputs.causal:
            t, s = scores.shape[-2:]
            visible = jnp.tril(jnp.ones((1, 1, 1, t, s), bool))
            weights = jnp.where(visible, weights, 0.0)
        out = jnp.einsum("bkgts,bskd->bkgtd", weights, values)
        out = normalise(out, weights, inputs)
        b, _, _, t, d = out.shape
        return out.transpose(0, 3, 1, 2, 4).reshape(b, t, -1, d)

    return attend


def _one_position(inputs: Inputs, scores_of: str, product) -> Attend:
    """For one query position, which then needs no axis."""
    kv_heads = inputs.key.shape[2]

    def attend(query, keys, values, bias):
        queries = _grouped(query, kv_heads)[:, 0]
        scores = _einsum(scores_of, queries, keys)
        weights = weigh(scores, _grouped(bias, kv_heads)[:, 0], inputs)
        out = normalise(product(weights, values), weights, inputs)
        return out.reshape(*query.shape[:3], -1)

    return attend


def _product(weights: jax.Array, values: jax.Array) -> jax.Array:
    return _einsum("bkgs,bksd->bkgd", weights.astype(values.dtype), values)


def _product_in_chunks(weights: jax.Array, values: jax.Array) -> jax.Array:
    """The same as one product per chunk of keys, then summed."""
    b, k, g, s = weights.shape
    chunk = min(_CHUNK, s & -s)  # the largest power of two that divides S
    parts = weights.astype(values.dtype).reshape(b, k, g, s // chunk, chunk)
    blocks = values.reshape(b, k, s // chunk, chunk, -1)
    return _einsum("bkgnc,bkncd->bkngd", parts, blocks).sum(axis=2)


def weigh(scores: jax.Array, bias: jax.Array, inputs: Inputs) -> jax.Array:
    """relu(scores - bias)^p, the bias without the axis of the keys."""
    return jax.nn.relu(scores - bias[..., None]) ** inputs.power


def normalise(out: jax.Array, weights: jax.Array, inputs: Inputs) -> jax.Array:
    """Divides as `inputs.normalize` says; empty rows stay zero."""
    if inputs.normalize == "none":
        return out
    if inputs.normalize == "length":
        t, s = inputs.query.shape[1], weights.shape[-1]
        seen = jnp.arange(1, t + 1) if inputs.causal else jnp.full(t, s)
        return out / seen.astype(out.dtype).reshape([1] * (out.ndim - 2) + [-1, 1])
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return out / jnp.where(total == 0, 1.0, total)


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """Sums in float32 whatever the dtype."""
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, ...] -> [B, T, K, G, ...]."""
    return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])
