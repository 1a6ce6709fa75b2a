"""Static checks: every mistake in shapes, dtypes and options raises at trace time.

Each message names the argument, what was expected, what was given and the fix. Facts
about values are never checked here: they are fields of results.
"""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

MAX_HEAD_DIM = 1024
"""The bounds are proved for heads up to this size (`hsrjax._src.index.sketch`)."""

_FLOATS = tuple(np.dtype(x) for x in (jnp.float32, jnp.bfloat16, jnp.float16))


def check_float(name: str, x: jax.Array) -> None:
    """Raises TypeError unless x is float32, bfloat16 or float16."""
    check_float_dtype(name, getattr(x, "dtype", type(x).__name__))


def check_float_dtype(name: str, dtype) -> None:
    """Raises TypeError unless dtype is float32, bfloat16 or float16."""
    if dtype not in _FLOATS:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16, got {dtype}; cast it, e.g. "
            "with .astype(jnp.float32)."
        )


def check_rank(name: str, x: jax.Array, layout: str) -> None:
    """Raises ValueError unless x has the rank of `layout`, e.g. "[B, T, N, H]"."""
    rank = layout.count(",") + 1
    if layout.startswith("[*B"):
        if x.ndim < rank - 1:
            raise ValueError(
                f"{name} must be {layout} (at least {rank - 1} axes), got shape "
                f"{x.shape}."
            )
    elif x.ndim != rank:
        raise ValueError(
            f"{name} must have the {rank} axes {layout}, got shape {x.shape}."
        )


def check_nonempty(name: str, x: jax.Array) -> None:
    """Raises ValueError if any axis of x has size 0."""
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {x.shape}.")


def check_equal(name: str, got, expected, why: str) -> None:
    """Raises ValueError unless got == expected."""
    if got != expected:
        raise ValueError(f"{name} must be {expected} ({why}), got {got}.")


def check_head_dim(name: str, head_dim: int) -> None:
    """Raises ValueError if the head size is larger than the bounds are proved for."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{name} must have a head size H (last axis) of at most {MAX_HEAD_DIM}, "
            f"got {head_dim}; the int8 bounds are proved only up to there."
        )


def check_positive(name: str, value: Any) -> int:
    """The integer as Python's; raises ValueError unless it is >= 1."""
    return _check_at_least(1, name, value)


def check_natural(name: str, value: Any) -> int:
    """The integer as Python's; raises ValueError unless it is >= 0."""
    return _check_at_least(0, name, value)


def _check_at_least(least: int, name: str, value: Any) -> int:
    value = as_integer(value)
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} must be an integer that is known when the call is traced, got a "
            f'traced {value.dtype}; use jax.jit(f, static_argnames="{name}"), or close '
            "over it."
        )
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")
    return value


def is_integer(value) -> bool:
    """Whether value is an integer of Python's."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_integer(value: Any) -> Any:
    """NumPy's integers, and arrays of one, as Python's; anything else as it is.

    NumPy's would promote what they are added to, and equal options of two kinds would
    compile two programs.
    """
    if isinstance(value, (bool, np.bool_, jax.core.Tracer)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def check_integer(name: str, x: jax.Array) -> None:
    """Raises TypeError unless x is an integer array."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.integer):
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name} must be an integer array, got {got}.")


def check_query(query: jax.Array) -> None:
    """Static checks of a query f[B, T, N, H]."""
    check_float("query", query)
    check_rank("query", query, "[B, T, N, H]")
    check_nonempty("query", query)
    check_head_dim("query", query.shape[3])


def check_heads(
    query: jax.Array, kv_heads: int, head_dim: int, *, swapped: int
) -> None:
    """Raises ValueError unless the query's heads fit the keys'.

    Args:
      query: f[B, T, N, H].
      kv_heads: K.
      head_dim: H of the keys.
      swapped: what K would be if heads and positions had changed places.
    """
    check_equal("query.shape[3]", query.shape[3], head_dim, "the head size of the keys")
    t, heads = query.shape[1:3]
    if heads % kv_heads:
        fix = "use N = G * K heads"
        if t < heads and t % swapped == 0:
            fix = (
                "the arrays look like [B, N, T, H], and hsrjax takes [B, T, N, H], as "
                "jax.nn does: use jnp.swapaxes(x, 1, 2)"
            )
        raise ValueError(
            f"query heads must be a multiple of the {kv_heads} key heads, got {heads} "
            f"with query.shape={query.shape}; {fix}."
        )


def check_same_dtype(name: str, x: jax.Array, stored: jax.Array) -> None:
    """Raises TypeError unless x has the dtype of what is stored."""
    if x.dtype != stored.dtype:
        raise TypeError(
            f"{name} must have the stored dtype {stored.dtype}, got {x.dtype}; "
            f"cast it with {name}.astype({stored.dtype})."
        )


def concrete(*arrays) -> bool:
    """Whether values are at hand: not traced, nor on devices of other processes."""
    return not any(
        isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True)
        for x in arrays
    )


def values(*arrays: jax.typing.ArrayLike) -> tuple[np.ndarray, ...] | None:
    """The values as NumPy's, or None where they are not at hand.

    To be asked of arrays as they were given: while a function is traced, all that jax
    makes of arrays that it closes over, and of NumPy's, is traced as well.
    """
    return tuple(map(np.asarray, arrays)) if concrete(*arrays) else None
