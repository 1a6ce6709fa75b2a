"""The repaired formulas against simulation, and the printed ones against their flaw."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsrjax import theory


def test_expected_count_by_simulation():
    """Gaussian keys, per-query sigma: what paper.md calls the usable rule."""
    n, d = 32768, 64
    k1, k2 = jax.random.split(jax.random.key(0))
    keys, queries = jax.random.normal(k1, (n, d)), jax.random.normal(k2, (64, d))
    sigma = theory.score_sigma(jnp.linalg.norm(queries, axis=-1), d)
    bias = theory.threshold(n, sigma=sigma)
    scores = queries @ keys.T / jnp.sqrt(float(d))
    fired = jnp.sum(scores > bias[:, None], axis=-1)
    expected = theory.expected_count(n, bias, sigma=sigma)
    np.testing.assert_allclose(expected, 680, atol=5)
    assert abs(float(fired.mean()) / float(expected[0]) - 1) < 0.02
    assert (fired.astype(jnp.float32) <= theory.count_bound(n, bias, sigma=sigma)).all()


def test_the_bound_is_the_papers_table():
    """Table 1 is n^(4/5): the bound without its factor 2, never a measurement."""
    for n, printed in ((1000, 251), (32000, 4019), (1024000, 64304)):
        bound = theory.count_bound(n, theory.threshold(n)) / 2
        assert abs(float(bound) - printed) < 1 + 1e-3 * printed


def test_the_printed_threshold_leaves_every_row_empty():
    n, d, m, delta = 32768, 64, 1, 0.1
    printed_sigma = 4 * np.sqrt(1 + np.log(m / delta) / d)
    bias = theory.threshold(n, sigma=printed_sigma)
    assert float(theory.expected_count(n, bias)) < 1e-3
    assert float(bias) > np.sqrt(2 * np.log(n))


def test_gamma_interpolates():
    assert float(theory.threshold(1000, gamma=1.0)) == 0
    full = theory.threshold(1000, gamma=0.0)
    np.testing.assert_allclose(full, np.sqrt(2 * np.log(1000)), rtol=1e-6)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
        theory.threshold(10, gamma=1.5)


@pytest.mark.parametrize("r", [1, 8, 64])
def test_lemma_6_5_holds_for_top_r_softmax(r):
    rng = np.random.default_rng(r)
    scores, values = rng.standard_normal((50, 200)) * 3, rng.standard_normal((200, 4))
    weights = np.exp(scores)
    keep = scores >= np.sort(scores, axis=-1)[:, -r, None]
    full = weights @ values / weights.sum(-1, keepdims=True)
    kept = (weights * keep) @ values / (weights * keep).sum(-1, keepdims=True)
    missed = (weights * ~keep).sum(-1) / weights.sum(-1)
    bound = theory.softmax_error_bound(missed, np.abs(values).max())
    error = np.abs(full - kept).max(-1)
    assert (error <= np.asarray(bound) * (1 + 1e-6)).all()
    assert (error >= 0.005 * np.asarray(bound)).any()  # it says something


def test_theorem_4_3_holds_where_its_assumption_is_measured():
    """gamma, beta1, beta2 measured on the row itself, with d in its right place."""
    rng = np.random.default_rng(0)
    n, d, r = 1024, 16, 64
    gamma = np.log(r) / np.log(n)
    keys, values = rng.standard_normal((n, d)), rng.standard_normal((n, 4))
    for _ in range(20):
        query = rng.standard_normal(d) * 6
        direct = keys @ query
        order = np.argsort(-direct)
        scale = np.linalg.norm(query) * np.log(n)
        top, rest = direct[order[:r]].mean() / scale, direct[order[r]] / scale
        weights = np.exp((direct - direct.max()) / np.sqrt(d))
        full = weights @ values / weights.sum()
        kept = weights[order[:r]] @ values[order[:r]] / weights[order[:r]].sum()
        bound = theory.massive_activation_bound(
            n,
            gamma,
            top,
            rest,
            np.linalg.norm(query),
            np.abs(values).max(),
            head_dim=d,
        )
        assert np.abs(full - kept).max() <= float(bound)


def test_relu_threshold_grows_with_length():
    tau = theory.relu_threshold(jnp.array([1, 2, 512]), 32, scale=0.7)
    np.testing.assert_allclose(tau, 0.7 * np.sqrt(2 * np.log([1, 2, 512]) / 32), 1e-6)


def test_count_failure_is_a_probability():
    failure = theory.count_failure(jnp.array([10, 100]), jnp.array([3.0, 1.0]))
    expected = np.exp(-0.375 * np.array([10, 100]) * np.exp([-4.5, -0.5]))
    np.testing.assert_allclose(failure, expected, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [2, 4, 8, 16, 64])
def test_cap_threshold_leaves_the_share_that_a_normal_variable_would(head_dim):
    """Counted on the sphere: a normalised Gaussian vector has any direction."""
    points = np.random.default_rng(0).normal(size=(1_000_000, head_dim))
    cosine = points[:, 0] / np.linalg.norm(points, axis=1)
    for scale in (0.3, 0.6, 0.8):
        tau = theory.relu_threshold(512, head_dim, scale=scale, law="cap")
        z = scale * math.sqrt(2 * math.log(512))
        share = 0.5 * math.erfc(z / math.sqrt(2))
        spread = 5 * math.sqrt(share / 1e6)
        assert abs((cosine > float(tau)).mean() - share) < spread


def test_cap_threshold_approaches_the_gaussian_one_and_is_differentiable():
    def threshold(scale, law, head_dim=1024):
        return theory.relu_threshold(512, head_dim, scale=scale, law=law)

    pair = [float(threshold(0.7, law)) for law in ("cap", "gaussian")]
    assert pair[0] == pytest.approx(pair[1], rel=5e-3)
    small = [float(threshold(0.7, law, 8)) for law in ("cap", "gaussian")]
    assert small[0] < 0.95 * small[1]
    slope = jax.grad(lambda scale: threshold(scale, "cap", 8))(jnp.float32(0.7))
    around = [float(threshold(0.7 + step, "cap", 8)) for step in (-0.01, 0.01)]
    assert float(slope) == pytest.approx((around[1] - around[0]) / 0.02, rel=0.02)


def test_unknown_law_is_refused():
    with pytest.raises(ValueError, match="law must be gaussian or cap"):
        theory.relu_threshold(8, 8, law="cauchy")
