"""`hsrjax.attention_fn` in the place of flax's own attention, nnx and linen."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import hsrjax
from hsrjax._src import flax_attention

pytestmark = pytest.mark.usefixtures("lenient_promotion")


def nnx_layer(**options):
    options = {"decode": False, "rngs": nnx.Rngs(0)} | options
    return nnx.MultiHeadAttention(4, 32, num_kv_heads=2, **options)


@pytest.mark.parametrize("lead", [(2, 3), ()])
def test_it_equals_the_softmax_of_nnx(lead):
    attention_fn = hsrjax.attention_fn(activation=hsrjax.Softmax())
    inputs = jax.random.normal(jax.random.key(0), (*lead, 9, 32))
    ours, theirs = nnx_layer(attention_fn=attention_fn), nnx_layer()

    @functools.partial(jax.jit, static_argnames="is_causal")
    def both(inputs, is_causal):
        return ours(inputs, is_causal=is_causal), theirs(inputs, is_causal=is_causal)

    for is_causal in (False, True):
        chex.assert_trees_all_close(*both(inputs, is_causal=is_causal), atol=1e-5)


def test_it_equals_the_softmax_of_linen():
    """Whose layers say by a mask what is causal: here the function says it."""
    inputs = jax.random.normal(jax.random.key(0), (2, 9, 32))
    attention_fn = hsrjax.attention_fn(activation=hsrjax.Softmax(), is_causal=True)
    ours = nn.MultiHeadDotProductAttention(4, attention_fn=attention_fn)
    theirs = nn.MultiHeadDotProductAttention(4)
    params = theirs.init(jax.random.key(1), inputs)
    mask = nn.make_causal_mask(jnp.ones((2, 9)))
    expected = jax.jit(lambda x: theirs.apply(params, x, mask=mask))(inputs)
    out = jax.jit(lambda x: ours.apply(params, x))(inputs)
    chex.assert_trees_all_close(out, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"mask must be None.*is_causal=True"):
        jax.eval_shape(lambda x: ours.apply(params, x, mask=mask), inputs)


def test_options_are_handed_on(monkeypatch):
    options = {"method": "hsr", "scale": 0.2, "capacity": 4, "window": 3}
    seen, attention = {}, hsrjax.attention
    spy = lambda *args, **given: seen.update(given) or attention(*args, **given)
    monkeypatch.setattr(flax_attention, "attention", spy)
    rows = jnp.ones((1, 9, 4, 8))
    activation = hsrjax.ReLU(power=2, bias=0.1)
    attention_fn = hsrjax.attention_fn(activation=activation, **options)
    jax.eval_shape(lambda x: attention_fn(x, x, x, is_causal=True), rows)
    assert seen == options | {"activation": activation, "is_causal": True}


def test_the_dtype_is_the_layers():
    attention_fn = hsrjax.attention_fn(activation=hsrjax.ReLU(power=2))
    layer = nnx_layer(attention_fn=attention_fn, dtype=jnp.bfloat16)
    assert jax.eval_shape(layer, jnp.ones((1, 4, 32))).dtype == jnp.bfloat16


def test_what_it_cannot_honour_is_refused():
    attention_fn = hsrjax.attention_fn(activation=hsrjax.Softmax())

    def call(*, of=None, **options):
        layer = lambda: nnx_layer(attention_fn=attention_fn, **(of or {}))
        return jax.eval_shape(lambda x: layer()(x, **options), jnp.ones((1, 9, 32)))

    with pytest.raises(ValueError, match=r"mask must be None.*is_causal=True"):
        call(mask=nnx.make_causal_mask(jnp.ones((1, 9))))
    with pytest.raises(ValueError, match="sow_weights=False"):
        call(sow_weights=True)
    with pytest.raises(ValueError, match="bias must be None"):
        attention_fn(*[jnp.ones((1, 9, 4, 8))] * 3, bias=jnp.ones((1, 4, 9, 9)))
    dropping = {"dropout_rate": 0.5, "deterministic": False}
    with pytest.raises(ValueError, match="dropout_rate=0"):
        call(of=dropping)
    call(of=dropping, deterministic=True)
    with pytest.raises(TypeError, match="activation must be"):
        hsrjax.attention_fn(activation="relu")
