"""The threshold of 1.5-entmax against its closed form, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.entmax import entmax_threshold


def exact(scores):
    """tau of 1.5-entmax for half scores f64[S]: Peters et al. 2019, Algorithm 2."""
    ranked = np.sort(scores)[::-1]
    number = np.arange(1, len(ranked) + 1)
    mean = np.cumsum(ranked) / number
    spread = np.cumsum(ranked**2) - number * mean**2
    tau = mean - np.sqrt(np.maximum(0.0, (1.0 - spread) / number))
    support = int((tau <= ranked).sum())
    return tau[support - 1]


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
def test_equals_the_closed_form(size):
    k1, k2 = jax.random.split(jax.random.key(0))
    query = size * jax.random.normal(k1, (2, 7, 4, 8))
    key = jax.random.normal(k2, (2, 9, 2, 8))
    slot, limit = jnp.arange(9)[None, None], jnp.arange(2, 9)[None, :, None]
    tau = entmax_threshold(query, key, slot <= limit, scale=0.3)
    assert (tau.shape, tau.dtype) == ((2, 7, 4), jnp.float32)
    heads = np.repeat(np.asarray(key, np.float64), 2, axis=2)
    scores = 0.3 * np.einsum("btnh,bsnh->btns", np.asarray(query, np.float64), heads)
    for b, t, n in np.ndindex(2, 7, 4):
        expected = exact(scores[b, t, n, : t + 3])
        np.testing.assert_allclose(tau[b, t, n], expected, rtol=3e-6, atol=3e-6)


def test_rows_that_see_nothing_have_no_key_and_no_gradient():
    key = jnp.ones((1, 3, 1, 4))

    def threshold(query, visible):
        return entmax_threshold(query, key, visible, scale=1.0)

    query = jnp.ones((1, 1, 1, 4))
    assert np.isposinf(threshold(query, jnp.zeros((1, 1, 3), bool)))
    for visible in (jnp.zeros((1, 1, 3), bool), jnp.ones((1, 1, 3), bool)):
        grad = jax.grad(lambda q, v=visible: jnp.exp(-threshold(q, v)).sum())(query)
        assert bool(jnp.isfinite(grad).all())


def test_gradient_is_that_of_the_implicit_equation():
    """Against differences of the closed form in float64."""
    generator = np.random.default_rng(0)
    query, key = generator.normal(size=(6,)), generator.normal(size=(11, 6))

    def closed(q):
        return exact(0.7 * (key @ q))

    def ours(q):
        tau = entmax_threshold(
            q[None, None, None],
            jnp.asarray(key, jnp.float32)[None, :, None],
            jnp.ones((1, 1, 11), bool),
            scale=0.7,
        )
        return tau[0, 0, 0]

    grad = jax.grad(ours)(jnp.asarray(query, jnp.float32))
    step = 1e-6 * np.eye(6)
    expected = [(closed(query + e) - closed(query - e)) / 2e-6 for e in step]
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)
