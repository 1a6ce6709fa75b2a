"""Offsets chosen from bounds alone keep what they promise about the true scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from hsrjax._src.activations import certificates
from tests.contract import slow

pytestmark = pytest.mark.exact


@jax.jit
def safe_offset(activation, lower, upper):
    if activation.top_r is not None:
        return certificates.top_r_offset(activation.top_r, lower)
    return certificates.epsilon_offset(activation.epsilon, lower, upper)


def bounded_scores(spread, width, seed=0):
    rng = np.random.default_rng(seed)
    scores = (rng.standard_normal((6, 400)) * spread).astype(np.float32)
    below, above = rng.uniform(0, width, (2, 6, 400)).astype(np.float32)
    return scores, jnp.asarray(scores - below), jnp.asarray(scores + above)


@pytest.mark.parametrize("width", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("r", [1, 7, 400, 500])
def test_the_r_best_are_in_the_half_space(r, width):
    scores, lower, upper = bounded_scores(2.0, width)
    offset = np.asarray(safe_offset(hsrjax.Softmax(top_r=r), lower, upper))
    best = np.sort(scores, axis=-1)[:, -r] if r <= 400 else np.full(6, -np.inf)
    assert (offset <= best).all()
    if r < 400 and width == 0:  # and hardly more than those: 12 bits of the offset
        reported = (scores >= offset[:, None]).sum(-1)
        assert (reported <= r + 3).all()


@pytest.mark.parametrize("width", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("spread", [0.01, 3.0, 60.0])
@pytest.mark.parametrize("epsilon", [0.5, 1e-2, 1e-6])
def test_no_more_than_epsilon_is_left_out(epsilon, spread, width):
    scores, lower, upper = bounded_scores(spread, width)
    activation = hsrjax.Softmax(epsilon=jnp.float32(epsilon))
    offset = np.asarray(safe_offset(activation, lower, upper))
    weights = np.exp((scores - scores.max(-1, keepdims=True)).astype(np.float64))
    left_out = np.where(scores < offset[:, None], weights, 0.0).sum(-1)
    assert (left_out <= epsilon * weights.sum(-1)).all()


def test_as_much_as_possible_is_left_out():
    """With exact scores nearly all of what may be left out is: not merely sound."""
    scores, lower, upper = bounded_scores(3.0, 0.0)
    activation = hsrjax.Softmax(epsilon=jnp.float32(0.1))
    offset = np.asarray(safe_offset(activation, lower, upper))
    weights = np.exp(scores.astype(np.float64))
    higher = offset + 2 * certificates._CLOSE
    left_out = np.where(scores < higher[:, None], np.exp(scores), 0.0).sum(-1)
    assert (left_out > 0.093 * weights.sum(-1)).all()


def test_nothing_known_nothing_left_out():
    unknown = jnp.full((2, 50), jnp.inf)
    for activation in (hsrjax.Softmax(epsilon=0.9), hsrjax.Softmax(top_r=1)):
        offset = safe_offset(activation, -unknown, unknown)
        assert (offset == -jnp.inf).all()


def test_no_visible_key():
    nothing = jnp.full((1, 4), -jnp.inf)
    for activation in (hsrjax.Softmax(epsilon=0.5), hsrjax.Softmax(top_r=2)):
        assert (safe_offset(activation, nothing, nothing) == -jnp.inf).all()


def test_the_bound_covers_what_is_left_out():
    scores, lower, upper = bounded_scores(2.0, 0.3)
    values = np.random.default_rng(1).standard_normal((400, 3))
    top = jax.lax.top_k(jnp.asarray(scores), 11)[0]
    shift, offset = top[:, 0], certificates.between((top[:, 9], top[:, 10]), 0.0)
    mass = certificates.mass_below(offset, shift, lower, upper)
    weights = np.exp((scores - np.asarray(shift)[:, None]).astype(np.float64))
    kept = np.where(scores >= np.asarray(offset)[:, None], weights, 0.0)
    assert ((kept > 0).sum(-1) == 10).all()
    missed, bound = certificates.error_bound(
        certificates.LeftOut(mass, jnp.ones(6), jnp.zeros(6)),
        jnp.asarray(kept.sum(-1), jnp.float32),
        jnp.full(6, 10),
        jnp.full(6, np.abs(values).max(), jnp.float32),
    )
    assert (1 - kept.sum(-1) / weights.sum(-1) <= np.asarray(missed)).all()
    full = weights @ values / weights.sum(-1, keepdims=True)
    sparse = kept @ values / kept.sum(-1, keepdims=True)
    assert (np.abs(full - sparse).max(-1) <= np.asarray(bound)).all()


@pytest.mark.parametrize("decoding", [False, *slow((True,))])
@pytest.mark.parametrize("nearest", [None, 0.9])
def test_keys_that_were_not_looked_at_count_as_left_out(nearest, decoding):
    """The sketch lets the best past it with two of the sample, or some that score less.

    Key 10 shares its block with a huge one, beside which its 39 is rounded to nothing:
    all of that block are looked at.
    """
    key = jnp.zeros((1, 96, 1, 8)).at[0, 80, 0, 0].set(1.0)
    key = key.at[0, 82:88:5, 0, 0].set(0.95)
    if nearest is not None:
        key = key.at[0, 10, 0, :2].set(jnp.array([nearest - 0.6, 39.0]))
        key = key.at[0, 11, 0, 1].set(1e4)
        key = key.at[0, 32:64, 0, 0].set(nearest)
    value = jnp.where(key[..., :1] == 1.0, 1.0, -1.0)
    query = jnp.zeros((1, 1, 1, 8)).at[..., 0].set(1.0)
    options = {"activation": hsrjax.Softmax(top_r=1), "method": "hsr", "scale": 1.0}
    if decoding:
        cache = hsrjax.init_cache(1, 96, 1, 8, value_dim=1)
        cache = hsrjax.extend(cache, key, value)
        out, info = hsrjax.decode_attention(query, cache, **options)
    else:
        out, info = hsrjax.attention(query, key, value, return_info=True, **options)
    weights = np.exp(np.asarray(key, np.float64)[0, :, 0, 0])
    weights /= weights.sum()
    kept = np.arange(96) == 80
    assert int(info.candidates[0, 0, 0]) == (3 if nearest is None else 35)
    assert int(info.count[0, 0, 0]) == 1 and float(out[0, 0, 0, 0]) == 1.0
    assert 1 - weights[kept].sum() <= float(info.missed_mass[0, 0, 0]) <= 1.0
    error = abs(1.0 - float(weights @ np.asarray(value)[0, :, 0, 0]))
    assert error <= float(info.error_bound[0, 0, 0])


@pytest.mark.exact
@pytest.mark.parametrize(("rank", "size", "stride"), [(1, 9, 32), (64, 256, 32)])
def test_a_guess_is_reached_by_as_many_of_the_sample_as_are_asked_for(
    rank, size, stride
):
    sample = np.random.default_rng(rank).standard_normal((50, size)).astype(np.float32)
    guess, room = certificates.guessed_offset(rank, jnp.asarray(sample), stride)
    reached = (sample >= np.asarray(guess)[:, None]).sum(-1)
    least = 1 if rank == 1 else 64 / 32 + 3
    assert (reached >= least).all() and (reached.mean() * stride <= room(1)).all()
    nothing, _ = certificates.guessed_offset(rank, jnp.full((1, 3), -jnp.inf), stride)
    assert float(nothing[0]) == -np.inf


@pytest.mark.exact
@pytest.mark.parametrize("sampled", ["all", "none", "same"])
def test_the_best_are_found_whatever_the_sample_says(sampled):
    """The keys of the sample are the best, but too few; or the worst; or all tie."""
    rng = np.random.default_rng(3)
    key = rng.standard_normal((1, 2048, 1, 16)).astype(np.float32)
    lane = np.arange(2048) % 32 == 16
    if sampled == "same":
        key[:] = key[:, :1]
    else:
        key[:, lane, :, 0] += 30.0 if sampled == "all" else -30.0
    query = jnp.asarray(np.abs(rng.standard_normal((1, 2, 2, 16))), jnp.float32)
    key, value = (
        jnp.asarray(key),
        jnp.asarray(rng.standard_normal(key.shape), key.dtype),
    )
    cache = hsrjax.extend(hsrjax.init_cache(1, 2048, 1, 16), key, value)
    activation = hsrjax.Softmax(top_r=100)
    run = lambda method: hsrjax.decode_attention(
        query, cache, activation=activation, method=method
    )
    (out, info), (expected, dense) = run("hsr"), run("dense")
    np.testing.assert_array_equal(info.count, dense.count)
    tied = np.array([2047, 2048])[None, :, None]
    assert (np.asarray(info.count) == (tied if sampled == "same" else 100)).all()
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert (info.missed_mass >= dense.missed_mass - 1e-6).all()
