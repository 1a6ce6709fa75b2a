"""Attention of PyTorch and of packages on top of it. Queries come scaled."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contestants.peers_jax import NSA_BLOCK, NSA_BLOCKS, cotangent
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.timing import Arrays, Call, Open

Torch = Any


def finish(result: Any) -> Arrays:
    """[B, N, T, D] tensors as [B, T, N, D] arrays."""
    return tuple(x.detach().numpy().swapaxes(1, 2) for x in result)


def _tensors(torch: Torch, inputs: Inputs) -> list[Any]:
    """Query, key and value as [B, N, T, H]."""
    return [
        torch.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2)))
        for x in (inputs.query, inputs.key, inputs.value)
    ]


def _decode(torch: Torch, inputs: Inputs, attend: Callable[..., Any]) -> Open:
    """Writes the newest token into the cache [B, K, S, H] and attends to all of it.

    `attend` gets the query as [B, K, G, H]: heads that share keys stand side by side.
    """
    b, _, n, h = inputs.query.shape
    kv_heads = inputs.key.shape[2]
    bias = torch.from_numpy(inputs.bias.reshape(b, kv_heads, -1, 1))

    def open_() -> Call:
        query, keys, values = _tensors(torch, inputs)
        query = query.reshape(b, kv_heads, n // kv_heads, h)
        new_key, new_value = keys[:, :, -1].clone(), values[:, :, -1].clone()

        def call() -> Any:
            with torch.inference_mode():
                keys[:, :, -1] = new_key
                values[:, :, -1] = new_value
                return (attend(query, keys, values, bias).reshape(b, n, 1, -1),)

        return call

    return open_


def _train(torch: Torch, inputs: Inputs, attend: Callable[..., Any]) -> Open:
    query, key, value = (x.requires_grad_() for x in _tensors(torch, inputs))
    upstream = torch.from_numpy(np.ascontiguousarray(cotangent(inputs).swapaxes(1, 2)))

    def call() -> Any:
        out = attend(query, key, value)
        return out, *torch.autograd.grad(out, (query, key, value), upstream)

    return lambda: call


def _prefill(torch: Torch, inputs: Inputs, attend: Callable[..., Any]) -> Open:
    tensors = _tensors(torch, inputs)

    def call() -> Any:
        with torch.inference_mode():
            return (attend(*tensors),)

    return lambda: call


# --- softmax --------------------------------------------------------------------------


def _sdpa_decode(torch: Torch, inputs: Inputs) -> Open:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return _decode(torch, inputs, lambda q, k, v, bias: sdpa(q, k, v, scale=1.0))


def _sdpa(torch: Torch, inputs: Inputs) -> Callable[..., Any]:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    grouped = inputs.group > 1
    return lambda q, k, v: sdpa(q, k, v, scale=1.0, is_causal=True, enable_gqa=grouped)


SDPA: Any = {
    "decode": _sdpa_decode,
    "prefill": lambda torch, x: _prefill(torch, x, _sdpa(torch, x)),
    "train": lambda torch, x: _train(torch, x, _sdpa(torch, x)),
}


# --- thresholded ReLU, eager ----------------------------------------------------------


def _relu_decode(torch: Torch, inputs: Inputs) -> Open:
    def attend(query, keys, values, bias):
        weights = torch.relu(query @ keys.mT - bias) ** inputs.power
        return _divide(weights @ values, weights, inputs, inputs.key.shape[1])

    return _decode(torch, inputs, attend)


def _relu(torch: Torch, inputs: Inputs) -> Callable[..., Any]:
    """A head at a time: the score matrix of one head is all that is held."""
    bias = torch.from_numpy(np.ascontiguousarray(inputs.bias.swapaxes(1, 2)))[..., None]
    length = inputs.query.shape[1]
    seen = torch.arange(1, length + 1, dtype=torch.float32)[:, None]

    def one(query, keys, values, offset):
        weights = torch.relu(query @ keys.mT - offset).tril() ** inputs.power
        return _divide(weights @ values, weights, inputs, seen)

    return _by_head(torch, inputs, one, bias)


def _divide(out, weights, inputs: Inputs, visible):
    if inputs.normalize == "none":
        return out
    if inputs.normalize == "length":
        return out / visible
    total = weights.sum(-1, keepdim=True)
    return out / total.masked_fill(total == 0, 1.0)


def _by_head(torch: Torch, inputs: Inputs, one: Callable[..., Any], *more: Any):
    """Causal attention from a function of one head."""
    group = inputs.group

    def attend(query, key, value):
        rows = []
        for b in range(query.shape[0]):
            heads = [
                one(
                    query[b, n],
                    key[b, n // group],
                    value[b, n // group],
                    *(x[b, n] for x in more),
                )
                for n in range(query.shape[1])
            ]
            rows.append(torch.stack(heads))
        return torch.stack(rows)

    return attend


RELU: Any = {
    "decode": _relu_decode,
    "prefill": lambda torch, x: _prefill(torch, x, _relu(torch, x)),
    "train": lambda torch, x: _train(torch, x, _relu(torch, x)),
}


# --- entmax ---------------------------------------------------------------------------


def entmax(function: str) -> Callable[[Any, Inputs], Open]:
    """Training with 1.5-entmax in the place of softmax."""

    def prepare(module: Any, inputs: Inputs) -> Open:
        torch = importlib.import_module("torch")
        normalise = getattr(module, function)
        length = inputs.query.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)

        def one(query, keys, values):
            scores = (query @ keys.mT).masked_fill(hidden, -1e9)
            return normalise(scores, dim=-1) @ values

        # Head by head also backwards: what autograd keeps of one head is let go.
        tensors = [x.requires_grad_() for x in _tensors(torch, inputs)]
        upstream = torch.from_numpy(
            np.ascontiguousarray(cotangent(inputs).swapaxes(1, 2))
        )
        return lambda: lambda: _head_by_head(torch, one, tensors, upstream)

    return prepare


def _head_by_head(torch: Torch, one, tensors, upstream):
    query, key, _ = tensors
    group = query.shape[1] // key.shape[1]
    out = torch.empty_like(upstream)
    grads = [torch.zeros_like(x) for x in tensors]
    for b in range(query.shape[0]):
        for n in range(query.shape[1]):
            places = ((b, n), (b, n // group), (b, n // group))
            parts = [x[place] for x, place in zip(tensors, places, strict=True)]
            result = one(*parts)
            out[b, n] = result.detach()
            found = torch.autograd.grad(result, parts, upstream[b, n])
            for total, place, part in zip(grads, places, found, strict=True):
                total[place] += part
    return out, *grads


# --- native sparse attention ----------------------------------------------------------


def native_sparse_decode(module: Any, inputs: Inputs) -> Open:
    """`forward_inference` of a fresh layer over a cache of the given keys and values.

    It projects its input itself, so its queries are its own. The compressed keys that
    it would have computed while it read the S - 1 tokens are random here.
    """
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    b, _, n, h = inputs.query.shape
    kv_heads = inputs.key.shape[2]
    layer = module.SparseAttention(
        dim=n * h,
        dim_head=h,
        heads=n,
        kv_heads=kv_heads,
        causal=True,
        sliding_window_size=NSA_BLOCK,
        compress_block_size=NSA_BLOCK // 2,
        compress_block_sliding_stride=NSA_BLOCK // 4,
        selection_block_size=NSA_BLOCK,
        num_selected_blocks=NSA_BLOCKS,
    ).eval()
    length = inputs.key.shape[1] - 1
    compressed, waiting = divmod(length, NSA_BLOCK // 4)
    token = torch.from_numpy(inputs.query.reshape(b, 1, n * h))

    def open_() -> Call:
        _, keys, values = _tensors(torch, inputs)
        shapes = [(b, kv_heads, compressed, h)] * 2
        shapes += [(b, kv_heads, waiting + NSA_BLOCK // 4, h)] * 2
        ck, cv, run_k, run_v = (torch.randn(shape) for shape in shapes)
        past = (keys[:, :, :-1], values[:, :, :-1])
        cache = (past, ((ck, cv), (run_k, run_v)))

        def call() -> Any:
            with torch.inference_mode():
                out, _ = layer(token, cache=cache, return_cache=True)
                return (out.reshape(b, n, 1, h),)

        return call

    return open_
