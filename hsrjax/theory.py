r"""The paper's formulas, repaired where they cannot work as printed.

n keys of head size d with coordinates of standard deviation sigma_k, a query q; scores
are `<q, k> / sqrt(d)`. Every function works element by element on arrays that broadcast
against each other. References are to Chen et al. 2024 (arXiv 2410.10165).
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


def score_sigma(
    query_norm: jax.typing.ArrayLike, head_dim: int, *, key_sigma: float = 1.0
) -> jax.Array:
    """Standard deviation `|q| sigma_k / sqrt(d)` of a query's scores.

    Args:
      query_norm: f[...], norms of the queries.
      head_dim: d.
      key_sigma: standard deviation of a key coordinate.

    Returns:
      f32[...].

    Example:
      >>> import hsrjax
      >>> float(hsrjax.theory.score_sigma(8.0, 64))
      1.0

    Source: Lemma E.1.
    """
    return jnp.asarray(query_norm, jnp.float32) * key_sigma / jnp.sqrt(float(head_dim))


def threshold(
    num_keys: jax.typing.ArrayLike,
    *,
    gamma: float = 0.8,
    sigma: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Threshold `b = sigma sqrt(2 (1 - gamma) log n)` that leaves at most n^gamma keys.

    With gamma = 4/5 this is the paper's `sigma sqrt(0.4 log n)`. The paper prints
    `sigma = 4 sqrt(1 + log(m/delta)/d) sigma_q sigma_k`, four times too large under its
    own model: every row would be empty. Use `score_sigma` per query instead.

    Args:
      num_keys: n >= 1, f or i[...].
      gamma: in [0, 1]; the expected number of keys above b is at most n^gamma.
      sigma: standard deviation of the scores, f[...].

    Returns:
      f32[...], in units of scaled scores; the half-space is `<q, k> >= b sqrt(d)`.

    Raises:
      ValueError: gamma outside [0, 1].

    Example:
      >>> import hsrjax
      >>> round(float(hsrjax.theory.threshold(4096)), 3)
      1.824

    Source: Lemma 6.1, repaired.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma!r}.")
    log_n = jnp.log(jnp.asarray(num_keys, jnp.float32))
    return jnp.asarray(sigma, jnp.float32) * jnp.sqrt(2.0 * (1.0 - gamma) * log_n)


def expected_count(
    num_keys: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike,
    *,
    sigma: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Expected number `n (1 - Phi(b / sigma))` of Gaussian scores above the bias.

    Args:
      num_keys: n, f or i[...].
      bias: b, f[...].
      sigma: standard deviation of the scores.

    Returns:
      f32[...]. About six times below the paper's `n exp(-b^2 / 2 sigma^2)`, which is
      the Chernoff bound of the same number.

    Example:
      >>> import hsrjax
      >>> n = 4096
      >>> b = hsrjax.theory.threshold(n)
      >>> round(float(hsrjax.theory.expected_count(n, b)))
      140

    Source: Lemma E.1, without Chernoff.
    """
    z = jnp.asarray(bias, jnp.float32) / jnp.asarray(sigma, jnp.float32)
    return jnp.asarray(num_keys, jnp.float32) * jax.scipy.stats.norm.sf(z)


def count_bound(
    num_keys: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike,
    *,
    sigma: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """The paper's high-probability bound `2 n exp(-b^2 / 2 sigma^2)` on the count.

    Args:
      num_keys: n, f or i[...].
      bias: b, f[...].
      sigma: standard deviation of the scores.

    Returns:
      f32[...], exceeded with probability at most `count_failure`.

    Example:
      >>> import hsrjax
      >>> round(float(hsrjax.theory.count_bound(4096, hsrjax.theory.threshold(4096))))
      1552

    Source: Lemma E.1.
    """
    z = jnp.asarray(bias, jnp.float32) / jnp.asarray(sigma, jnp.float32)
    return 2.0 * jnp.asarray(num_keys, jnp.float32) * jnp.exp(-0.5 * z * z)


def count_failure(
    num_keys: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike,
    *,
    sigma: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Probability with which `count_bound` may fail.

    It is `exp(-3/8 n exp(-b^2 / 2 sigma^2))`.

    Args:
      num_keys: n, f or i[...].
      bias: b, f[...].
      sigma: standard deviation of the scores.

    Returns:
      f32[...], Bernstein's bound with `t = n exp(-b^2 / 2 sigma^2)`.

    Example:
      >>> import hsrjax
      >>> float(hsrjax.theory.count_failure(100, 0.0)) < 1e-12
      True

    Source: Lemma E.1; the constant hidden in its Omega is 3/8.
    """
    return jnp.exp(-0.1875 * count_bound(num_keys, bias, sigma=sigma))


def softmax_error_bound(
    missed_mass: jax.typing.ArrayLike, value_bound: jax.typing.ArrayLike
) -> jax.Array:
    """Bound `2 (missed mass) max|v|` on what leaving keys out of softmax changes.

    Args:
      missed_mass: f[...], fraction of the row's softmax mass left out.
      value_bound: f[...], maximum |value coordinate|.

    Returns:
      f32[...], bound on the maximum norm of the difference of the outputs.

    Example:
      >>> import hsrjax
      >>> round(float(hsrjax.theory.softmax_error_bound(0.01, 3.0)), 3)
      0.06

    Source: Lemma 6.5.
    """
    missed = jnp.asarray(missed_mass, jnp.float32)
    return 2.0 * missed * jnp.asarray(value_bound, jnp.float32)


def massive_activation_bound(
    num_keys: jax.typing.ArrayLike,
    gamma: jax.typing.ArrayLike,
    beta_top: jax.typing.ArrayLike,
    beta_rest: jax.typing.ArrayLike,
    query_norm: jax.typing.ArrayLike,
    value_bound: jax.typing.ArrayLike,
    *,
    head_dim: int | None = None,
) -> jax.Array:
    """Bound on the error of softmax over its best n^gamma keys.

    It is `2 max|v| / n^(gamma + (beta1 - beta2) |q| - 1)`.

    Args:
      num_keys: n.
      gamma: n^gamma keys are kept, f[...].
      beta_top: beta1: the kept scores average at least `beta1 |q| log n`.
      beta_rest: beta2: every other score is at most `beta2 |q| log n`.
      query_norm: |q|, f[...].
      value_bound: maximum |value coordinate|.
      head_dim: d. The paper leaves the 1/sqrt(d) of its own Definition 1.1 out of this
        theorem; with head_dim given, |q| / sqrt(d) takes the place of |q|.

    Returns:
      f32[...]; says nothing (is above 2 max|v|) unless the exponent is positive.

    Example:
      >>> import hsrjax
      >>> bound = hsrjax.theory.massive_activation_bound(1000, 0.8, 2.0, 1.0, 1.0, 1.0)
      >>> round(float(bound), 4)
      0.008

    Source: Theorem 4.3.
    """
    length = jnp.asarray(query_norm, jnp.float32)
    if head_dim is not None:
        length = length / jnp.sqrt(float(head_dim))
    gap = jnp.asarray(beta_top, jnp.float32) - jnp.asarray(beta_rest, jnp.float32)
    exponent = jnp.asarray(gamma, jnp.float32) + gap * length - 1.0
    n = jnp.asarray(num_keys, jnp.float32)
    return 2.0 * jnp.asarray(value_bound, jnp.float32) * n ** (-exponent)


def relu_threshold(
    visible: jax.typing.ArrayLike,
    head_dim: int,
    *,
    scale: jax.typing.ArrayLike = 1.0,
    law: Literal["gaussian", "cap"] = "gaussian",
) -> jax.Array:
    """Threshold `scale sqrt(2 log(i) / d)` for unit queries and keys, i keys visible.

    On the unit sphere scores have standard deviation 1/sqrt(d), so scale = 1
    lets O(1) unrelated keys through and scale = sqrt(1 - gamma) lets i^gamma. Scores
    are not quite normal, though: at d = 8 the same threshold leaves a fifth of the keys
    it is meant to leave. "cap" puts it where the share of the sphere beyond it is
    exactly the share of a normal variable beyond z = scale sqrt(2 log i).

    Args:
      visible: i >= 1, number of keys the row sees, f or i[...].
      head_dim: d >= 2.
      scale: beta, f[...], usually learned per head.
      law: "gaussian" or "cap", of the scores.

    Returns:
      f32[...], a bias for `hsrjax.ReLU` with scale=1. With "cap" it is interpolated, to
      about 1e-5, and differentiable in `scale` as well.

    Raises:
      ValueError: an unknown law.

    Example:
      >>> import hsrjax
      >>> round(float(hsrjax.theory.relu_threshold(512, 32, scale=0.7)), 3)
      0.437

    Source: Lemma 6.1 with sigma = 1/sqrt(d); Huang et al. 2026 (TDA).
    """
    log_i = jnp.log(jnp.asarray(visible, jnp.float32))
    z = jnp.asarray(scale, jnp.float32) * jnp.sqrt(2.0 * log_i)
    if law == "gaussian":
        return z / jnp.sqrt(float(head_dim))
    if law == "cap":
        return _cap(z, head_dim)
    raise ValueError(f"law must be gaussian or cap, got {law!r}.")


def _cap(z: jax.Array, head_dim: int) -> jax.Array:
    """The cosine f32[...] beyond which a sphere has the share 1 - Phi(z) of its area.

    The cosine of the angle to a fixed direction is sin(t) with density cos(t)^(d - 2).
    """
    t = np.linspace(0.0, np.pi / 2, 4097)
    density = np.cos(t) ** (head_dim - 2)
    slices = 0.5 * (density[1:] + density[:-1])
    beyond = np.append(np.cumsum(slices[::-1])[::-1], 0.0)
    share = np.maximum(0.5 * beyond / beyond[0], 1e-300)
    knots = np.linspace(0.0, 9.0, 1025)
    wanted = [0.5 * math.erfc(knot / math.sqrt(2.0)) for knot in knots]
    cosine = np.interp(np.log(wanted), np.log(share[::-1]), np.sin(t[::-1]))
    table = [jnp.asarray(x, jnp.float32) for x in (knots, cosine)]
    return jnp.sign(z) * jnp.interp(jnp.abs(z), *table)
