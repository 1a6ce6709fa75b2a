"""Lets a model attend by an implementation that its code does not name."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import hsrjax

CUDNN = "cudnn"
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "implementation", default=None
)


@contextlib.contextmanager
def by(implementation: str) -> Iterator[None]:
    """What this thread traces within `listening` attends so; `CUDNN` is softmax."""
    token = _chosen.set(implementation)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """hsrjax's functions do what the tracing thread has chosen."""
    with contextlib.ExitStack() as stack:
        for name in ("attention", "decode_attention", "extend"):
            real = getattr(hsrjax, name)
            stack.enter_context(mock.patch.object(hsrjax, name, _listens(name, real)))
        yield


def _listens(name: str, real: Any) -> Any:
    def call(*arrays: Any, **options: Any) -> Any:
        chosen = _chosen.get()
        if chosen == CUDNN and name == "attention":
            return _by_cudnn(*arrays, **options)
        return real(*arrays, **({"implementation": chosen} | options))

    return call


def _by_cudnn(query, key, value, *, scale, return_info=False, **options):
    del options
    out = jax.nn.dot_product_attention(
        query, key, value, scale=scale, is_causal=True, implementation=CUDNN
    )
    if not return_info:
        return out
    none = jnp.zeros(query.shape[:3], jnp.int32)
    zero = none.astype(jnp.float32)
    return out, hsrjax.Info(none, none, none > 0, zero, zero)
