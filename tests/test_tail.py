"""What is left out acts through sketches, and within the bound that is promised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from hsrjax._src.activations import tail as tail_module
from tests.contract import (
    SEGMENTS,
    SHAPE,
    expected_of,
    inputs,
    reference_attention,
    slow,
)

TAILS = (1, 2, 8, 32)
LIMITS = [{"top_r": 5}, {"epsilon": 0.3}]
VISIBLE = [
    {"is_causal": True},
    {"is_causal": False},
    {"is_causal": True, "window": 12, "sinks": 2},
    {"is_causal": False, "segment_ids": SEGMENTS},
]


def softmax(limit, tail):
    return hsrjax.Softmax(**limit, tail=tail)


@functools.partial(jax.jit, static_argnames=("is_causal", "window", "sinks"))
def attend(query, key, value, *, activation, **options):
    options |= {"method": "hsr", "return_info": True}
    return hsrjax.attention(query, key, value, activation=activation, **options)


def grown(key, value, tail, pieces=(5, 1, 40, 33)):
    """A cache that was filled piece by piece."""
    b, s, kv_heads, h = key.shape
    size = value.shape[-1]
    cache = hsrjax.init_cache(b, s + 9, kv_heads, h, value_dim=size, tail=tail)
    at = 0
    while at < s:
        for piece in pieces:
            cut = slice(at, min(at + piece, s))
            if cut.start < cut.stop:
                cache = hsrjax.extend(cache, key[:, cut], value[:, cut])
            at = cut.stop
    return cache


def newest(query, key, value):
    """Full softmax of queries that stand at the last positions."""
    before = key.shape[1] - query.shape[1]
    padded = jnp.pad(query, [(0, 0), (before, 0), (0, 0), (0, 0)])
    full = reference_attention(
        padded, key, value, activation=hsrjax.Softmax(), is_causal=True
    )
    return full[:, before:]


def errors(out, expected):
    return np.abs(np.asarray(out, np.float64) - np.asarray(expected)).max(-1)


# Any two of the three: every kind of visible keys with every tail, by turns with one of
# the limits.
SOME = [(0, 1, 0), (0, 8, 2), (1, 1, 1), (1, 8, 3)]
PAIRS = [((i + j) % 2, tail, j) for i, tail in enumerate(TAILS) for j in range(4)]
REST = sorted(set(PAIRS) - set(SOME))


@pytest.mark.parametrize(("limit", "tail", "visible"), [*SOME, *slow(*REST)])
def test_within_its_bound_of_full_softmax(limit, tail, visible):
    limit, visible = LIMITS[limit], VISIBLE[visible]
    query, key, value, _ = inputs(SHAPE)
    query = 2 * query
    out, info = attend(query, key, value, activation=softmax(limit, tail), **visible)
    full = expected_of(
        ("full softmax", visible),
        lambda: reference_attention(
            query, key, value, activation=hsrjax.Softmax(), **visible
        ),
    )
    assert (errors(out, full) <= np.asarray(info.error_bound)).all()
    assert (np.asarray(info.missed_mass) <= 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_every_value_of_its_own_is_nearly_exact(limit):
    query, key, value, _ = inputs((1, 200, 200, 4, 2, 16, 24))
    query = 2 * query
    full = reference_attention(
        query, key, value, activation=hsrjax.Softmax(), is_causal=True
    )
    worst = {}
    for tail in (None, 1, 32):
        activation = softmax(limit, tail)
        out, info = attend(query, key, value, activation=activation, is_causal=True)
        worst[tail] = errors(out, full).max()
        assert (errors(out, full) <= np.asarray(info.error_bound)).all()
        assert worst[tail] > 0 or tail is None
    assert worst[1] < 0.02 * worst[None] and worst[32] < 0.6 * worst[None]


@pytest.mark.parametrize("scale", [1e30, *slow((0.0,), (1e-30,))])
def test_values_of_any_size(scale):
    query, key, value, _ = inputs(SHAPE)
    value = value * scale
    activation = softmax({"top_r": 2}, 8)
    out, info = attend(query, key, value, activation=activation)
    full = reference_attention(query, key, value, activation=hsrjax.Softmax())
    assert (errors(out, full) <= np.asarray(info.error_bound)).all()


def test_the_sketch_is_within_its_radius():
    value = 3 * jax.random.normal(jax.random.key(3), (2, 64, 5))
    for tail in TAILS:
        sketch = tail_module.sketch_values(value, tail)
        assert tail_module.group_of(sketch, value) == tail
        coded = np.float64(sketch.scale)[..., None] * np.asarray(sketch.codes)
        off = np.abs(np.repeat(coded, tail, axis=1) - np.asarray(value)).max(-1)
        radius = np.repeat(np.asarray(sketch.radius), tail, axis=1)
        assert (off <= radius).all()
        assert radius.max() <= off.max() * 1.001 + 1e-6


def test_the_bound_covers_values_that_differ_within_a_group():
    """Signs are coded without error, so only the mean values are off."""
    query, key, value, _ = inputs((1, 4, 64, 2, 1, 16, 8))
    query, key = jnp.sign(query), jnp.sign(key)
    activation = softmax({"top_r": 2}, 8)
    out, info = attend(query, key, value, activation=activation)
    full = reference_attention(query, key, value, activation=hsrjax.Softmax())
    off, bound = errors(out, full), np.asarray(info.error_bound)
    assert (off <= bound).all()
    assert off.max() > 0.01 and (bound < 40 * off.max()).all()


def test_the_bound_is_reached():
    """The key left out has the other end's value, and all the weight it may have."""
    value = np.float32([[[-1.0], [1.0]] + 30 * [[0.0]]])
    sketch = tail_module.sketch_values(value, 1)
    left_out = np.arange(32)[None, None] == 1
    middle, half = np.log(0.01), 1.0
    lower, upper = (np.full((1, 1, 32), middle + x, np.float32) for x in (-half, half))
    none, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    tail = tail_module.sum_left_out(sketch, lower, upper, left_out, none, none)
    _, bound = tail_module.error_bound(tail, one, one, slots=32)
    acts, true = np.exp([middle, middle + half])
    off = (true - 1) / (true + 1) - (acts - 1) / (acts + 1)
    assert 0.96 * bound[0, 0] < off <= bound[0, 0]


def test_dense_has_all_scores():
    query, key, value, _ = inputs(SHAPE)
    full = hsrjax.attention(query, key, value, activation=hsrjax.Softmax())
    activation = softmax({"top_r": 2}, 16)
    dense, info = hsrjax.attention(
        query,
        key,
        value,
        activation=activation,
        method="dense",
        return_info=True,
    )
    np.testing.assert_allclose(dense, full, atol=1e-6)
    assert (np.asarray(info.error_bound) == 0).all()


def test_no_value_that_a_query_must_not_see_reaches_it():
    query, key, value, _ = inputs(SHAPE)
    activation = softmax({"top_r": 1}, 8)
    options = {"activation": activation, "is_causal": True, "window": 20}
    out, _ = attend(query, key, value, **options)
    later, _ = attend(query, key, value.at[:, 30:].add(1e3), **options)
    earlier, _ = attend(query, key, value.at[:, :9].add(1e3), **options)
    np.testing.assert_array_equal(out[:, :30], later[:, :30])
    np.testing.assert_array_equal(out[:, 28:], earlier[:, 28:])
    assert (np.asarray(out[:, 30:]) != np.asarray(later[:, 30:])).any()


def test_a_value_that_is_no_number_spoils_its_coordinate_alone():
    query, key, value, _ = inputs(SHAPE)
    value = value.at[0, 3, 0, 2].set(jnp.nan)
    out, _ = attend(query, key, value, activation=softmax({"top_r": 2}, 8))
    spoiled = np.isnan(np.asarray(out))
    assert spoiled[0, :, :2, 2].all()
    assert spoiled.sum() == 37 * 2


@pytest.mark.parametrize("tail", [8, *slow((1,), (2,), (32,))])
def test_a_cache_that_grew_is_as_good(tail):
    query, key, value, _ = inputs((2, 3, 90, 4, 2, 16, 16))
    cache = grown(key, value, tail)
    whole = tail_module.sketch_values(cache.values.rows, tail)
    for one, other in zip(cache.values.sketch, whole, strict=True):
        # Means of the same numbers: on GPUs not summed in the same order.
        np.testing.assert_allclose(
            np.float64(one), np.float64(other), rtol=1e-5, atol=1e-8
        )
    activation = softmax({"top_r": 4}, tail)
    out, info = hsrjax.decode_attention(
        query, cache, activation=activation, method="hsr"
    )
    full = newest(query, key, value)
    assert (errors(out, full) <= np.asarray(info.error_bound)).all()
    assert (np.asarray(info.candidates) < 90).any()


@pytest.mark.slow
def test_a_cache_in_spatial_order():
    query, key, value, _ = inputs((1, 2, 90, 2, 1, 4, 8))
    cache = hsrjax.reindex(grown(key, value, 8))
    activation = softmax({"top_r": 4}, 8)
    out, info = hsrjax.decode_attention(
        query, cache, activation=activation, method="hsr"
    )
    assert (
        errors(out, newest(query, key, value)) <= np.asarray(info.error_bound)
    ).all()


@pytest.mark.slow
def test_gradients_take_the_tail_for_constant():
    """Weights of a row add up to one, but those of the tail move nothing."""
    query, key, value, _ = inputs((1, 40, 40, 2, 1, 16, 8))

    def loss(value, tail):
        out, _ = attend(query, key, value, activation=softmax({"top_r": 3}, tail))
        return jnp.sum(out[..., 0])

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    moved = {tail: gradient(value, tail)[..., 0].sum() for tail in (None, 4)}
    np.testing.assert_allclose(moved[None], 40 * 2, rtol=1e-5)
    assert 0.05 < moved[4] / (40 * 2) < 0.95


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="tail must be None or one of"):
        hsrjax.Softmax(top_r=2, tail=3)
    with pytest.raises(ValueError, match="neither top_r nor epsilon"):
        hsrjax.Softmax(tail=8)
    with pytest.raises(ValueError, match="tail must be None or one of"):
        hsrjax.init_cache(1, 8, 1, 4, tail=64)
    query, activation = jnp.ones((1, 1, 2, 4)), softmax({"top_r": 2}, 8)
    for tail in (None, 4):
        cache = hsrjax.init_cache(1, 8, 1, 4, tail=tail)
        with pytest.raises(ValueError, match=f"got a cache with tail={tail}"):
            hsrjax.decode_attention(query, cache, activation=activation, method="hsr")
