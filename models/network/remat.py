"""Rematerialisation that saves memory on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def remat(function: Callable[..., Any]) -> Callable[..., Any]:
    """Differentiates a function by running it again: only its arguments are kept.

    `jax.checkpoint` separates the second run from the first by an optimization barrier,
    which XLA drops on CPU before it schedules: both runs' intermediates then live at
    once and nothing is saved. Here the second run's arguments depend on the cotangents,
    so that it cannot begin earlier.

    Args:
      function: of pytrees of arrays, all of which it must take as arguments; its first
        result is a float array.

    Returns:
      The same function, for reverse mode only. Cotangents that are not finite spoil
      all gradients, as they would in the end.
    """

    @jax.custom_vjp
    def run(*arguments: Any) -> Any:
        return function(*arguments)

    def forward(*arguments: Any) -> tuple[Any, Any]:
        return function(*arguments), arguments

    def backward(arguments: Any, cotangents: Any) -> Any:
        first = jax.tree.leaves(cotangents)[0]
        nothing = 0.0 * first[(0,) * first.ndim].astype(jnp.float32)

        def wait(leaf: jax.Array) -> jax.Array:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            return leaf + nothing.astype(leaf.dtype)

        _, pull = jax.vjp(function, *jax.tree.map(wait, arguments))
        return pull(cotangents)

    run.defvjp(forward, backward)
    return run
