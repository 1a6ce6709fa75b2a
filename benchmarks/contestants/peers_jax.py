"""Attention of JAX packages. Queries come scaled, so every scale here is 1."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contestants.dense import cached
from benchmarks.harness import loops
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.timing import Arrays, Open, Unavailable

Causal = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Causal attention: [B, T, N, H], [B, S, K, H], [B, S, K, D] -> [B, T, N, D]."""

NSA_BLOCK, NSA_BLOCKS = 64, 16


def finish(result: Any) -> Arrays:
    """Arrays of what a call returned."""
    return tuple(np.asarray(x, np.float32) for x in jax.tree.leaves(result))


def cotangent(inputs: Inputs) -> np.ndarray:
    """What gradients are taken of: sum(out * cotangent), f32[B, T, N, D]."""
    shape = (*inputs.query.shape[:3], inputs.value.shape[-1])
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def arrays(inputs: Inputs) -> tuple[jax.Array, ...]:
    """Query, key and value on the device."""
    return tuple(map(inputs.on_device, (inputs.query, inputs.key, inputs.value)))


def jitted(attend: Callable[..., Any], *operands: Any) -> Open:
    """One call of a jitted function on arrays that do not change."""
    compiled = jax.jit(attend)
    return lambda: lambda: jax.block_until_ready(compiled(*operands))


def attending(attend: Callable[..., Any], inputs: Inputs, *more: Any) -> Open:
    """attend(query, key, value, *more), a jitted call or many in one program."""
    if inputs.loop is None:
        return jitted(attend, *arrays(inputs), *more)
    return loops.repeated(
        lambda cache, moved, fixed: (attend(*moved, *fixed), cache),
        inputs.loop,
        loops.Held,
        arrays(inputs),
        more,
    )


def train(attend: Callable[..., jax.Array], inputs: Inputs, *more: Any) -> Open:
    """The output and the gradients by query, key and value.

    Args:
      attend: (query, key, value, *more) -> output.
      inputs: what is attended to.
      more: further operands, without gradient.
    """
    upstream = inputs.on_device(cotangent(inputs))

    def forward_backward(query, key, value, upstream, *more):
        out, pull = jax.vjp(lambda *x: attend(*x, *more), query, key, value)
        return out, *pull(upstream.astype(out.dtype))

    return attending(forward_backward, inputs, upstream, *more)


def _causal(make: Callable[[Any, Inputs], Causal]) -> dict[str, Any]:
    """Prefill and training of one causal function."""
    return {
        "prefill": lambda module, x: attending(make(module, x), x),
        "train": lambda module, x: train(make(module, x), x),
    }


# --- jax.nn ---------------------------------------------------------------------------


def _dot_product_decode(module: Any, inputs: Inputs) -> Open:
    attend = functools.partial(module.nn.dot_product_attention, scale=1.0)
    return cached(inputs, "bskh", "bskh", lambda q, k, v, bias: attend(q, k, v))


def _cudnn(module: Any, inputs: Inputs, **options: Any) -> Causal:
    """FlashAttention of cuDNN, which has no float32."""
    if jax.default_backend() != "gpu":
        raise Unavailable("needs a GPU")
    if inputs.dtype == "float32":
        raise Unavailable("has no float32: --dtype bfloat16")
    return functools.partial(
        module.nn.dot_product_attention, scale=1.0, implementation="cudnn", **options
    )


def _cudnn_decode(module: Any, inputs: Inputs) -> Open:
    attend = _cudnn(module, inputs)
    return cached(inputs, "bskh", "bskh", lambda q, k, v, bias: attend(q, k, v))


def _dot_product(module: Any, inputs: Inputs) -> Causal:
    return functools.partial(module.nn.dot_product_attention, scale=1.0, is_causal=True)


CUDNN: Any = {
    "decode": _cudnn_decode,
    **_causal(functools.partial(_cudnn, is_causal=True)),
}
DOT_PRODUCT: Any = {"decode": _dot_product_decode, **_causal(_dot_product)}


# --- flash-attention-jax: scales by 1/sqrt(H) itself, knows no shared key heads -------


def _flash_decode(module: Any, inputs: Inputs) -> Open:
    _check_chunks(inputs)
    b, _, n, h = inputs.query.shape
    s, kv_heads = inputs.key.shape[1:3]
    mask = jnp.ones((b, s), bool)

    def attend(query, keys, values, bias):
        # The heads that share a key head are to it so many query positions.
        grouped = query.reshape(b, kv_heads, n // kv_heads, h) * math.sqrt(h)
        out = module.flash_attention(grouped, keys, values, mask)
        return out.reshape(b, 1, n, -1)

    return cached(inputs, "bksh", "bksh", attend)


def _flash(module: Any, inputs: Inputs) -> Causal:
    _check_chunks(inputs)
    group, h = inputs.group, inputs.query.shape[-1]

    def attend(query, key, value):
        key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
        q, k, v = (x.swapaxes(1, 2) for x in (query * math.sqrt(h), key, value))
        return module.causal_flash_attention(q, k, v).swapaxes(1, 2)

    return attend


def _check_chunks(inputs: Inputs) -> None:
    keys = inputs.key.shape[1]
    if keys > 1024 and keys % 1024:
        raise Unavailable(f"is wrong unless keys are a multiple of 1024, not {keys}")


FLASH: Any = {"decode": _flash_decode, **_causal(_flash)}


# --- tokamax --------------------------------------------------------------------------


def _tokamax_attend(module: Any, *, is_causal: bool) -> Causal:
    return functools.partial(
        module.dot_product_attention,
        scale=1.0,
        is_causal=is_causal,
        # On accelerators the best that it knows of there.
        implementation="xla_chunked" if jax.default_backend() == "cpu" else None,
    )


def _tokamax_decode(module: Any, inputs: Inputs) -> Open:
    attend = _tokamax_attend(module, is_causal=False)
    return cached(inputs, "bskh", "bskh", lambda q, k, v, bias: attend(q, k, v))


def _tokamax(module: Any, inputs: Inputs) -> Causal:
    return _tokamax_attend(module, is_causal=True)


TOKAMAX: Any = {"decode": _tokamax_decode, **_causal(_tokamax)}


# --- ejkernel -------------------------------------------------------------------------


def _native_sparse(module: Any, inputs: Inputs) -> Open:
    """Outside jit: inside, or under grad, it asks a tracer for its device and fails."""
    gate = jnp.ones(inputs.query.shape[:3], jnp.float32)
    attend = functools.partial(
        module.native_sparse_attention,
        g_cmp=gate,
        g_slc=gate,
        block_counts=NSA_BLOCKS,
        block_size=NSA_BLOCK,
        softmax_scale=1.0,
    )
    operands = arrays(inputs)
    return lambda: lambda: jax.block_until_ready(attend(*operands))


NATIVE_SPARSE: Any = {
    "decode": "takes as many queries as keys",
    "prefill": _native_sparse,
    "train": "fails under jit and grad: asks a tracer for its device",
}
