"""The fixtures of conftest.py do what the other tests rely on."""

import jax
import jax.numpy as jnp
import pytest


def test_there_are_eight_devices():
    assert jax.device_count("cpu") == 8


def test_promotion_is_strict():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)


def test_lenient_promotion(lenient_promotion):
    assert (jnp.ones((2, 2), jnp.float32) + jnp.ones(2, jnp.int32)).shape == (2, 2)


def test_count_traces(count_traces):
    counted = count_traces(lambda x: x + 1)
    function = jax.jit(counted)
    function(jnp.zeros(3))
    function(jnp.ones(3))
    assert counted.traces == 1
    function(jnp.ones(4))
    assert counted.traces == 2


def test_count_compiles(count_compiles):
    @jax.jit
    def add_one(x):
        return x + 1

    three, four = jnp.zeros(3), jnp.zeros(4)
    with count_compiles() as compiles:
        add_one(three)
        add_one(three)
        assert compiles["add_one"] == 1
        add_one(four)
    assert compiles["add_one"] == 2
    add_one(jnp.zeros(5))
    assert compiles["add_one"] == 2  # no longer listening
