"""What is said of every head, against the same by brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.network.config import ModelConfig
from models.network.operands import as_relu
from models.network.transformer import Transformer, abstract_model
from tests.contract import slow
from train import telemetry

# Long enough for a head that fires in its first row alone to be dead.
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 128))


def make_model(kind, *, threshold_scale=0.5, num_layers=2):
    config = ModelConfig(
        num_layers=num_layers,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        attention_kind=kind,
        attention="dense",
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    model.threshold_scale[...] = jnp.float32(threshold_scale)
    return model


def brute_force(model, tokens):
    """nonzero_fraction, empty_rows, effective_keys by loops over rows."""
    graphdef, state = nnx.split(model)
    tokens = jnp.asarray(tokens, jnp.int32)
    layers = telemetry._operands(state, tokens, graphdef=graphdef)
    found = []
    for query, key, _, activation in map(as_relu, layers):
        biases = np.asarray(getattr(activation, "bias", 0.0), np.float64)
        heads, length = query.shape[2], query.shape[1]
        key = np.repeat(np.asarray(key, np.float64), heads // key.shape[2], axis=2)
        query = np.asarray(query, np.float64)
        for head in range(heads):
            fired, effective, empty = 0, [], 0
            for b, t in np.ndindex(query.shape[:2]):
                scores = key[b, : t + 1, head] @ query[b, t, head]
                if hasattr(activation, "bias"):
                    excess = np.maximum(scores - biases[b, t, head], 0)
                    weights = excess**activation.power
                else:
                    weights = np.exp(scores - scores.max())
                fired += (weights > 0).sum()
                empty += not weights.any()
                if weights.any():
                    effective.append(weights.sum() ** 2 / (weights**2).sum())
            rows = query.shape[0] * length
            pairs = rows * (length + 1) / 2
            found.append([fired / pairs, empty / rows, np.mean(effective or [0])])
    return np.array(found).reshape(len(layers), -1, 3)


@pytest.mark.parametrize(
    "kind",
    [
        "threshold_relu",
        "entmax",
        *slow(("softmax",), ("differential_relu",), ("relu",)),
    ],
)
def test_equals_brute_force(kind):
    model = make_model(kind)
    found = telemetry.measure(model, TOKENS)
    expected = brute_force(model, TOKENS)
    # A score within rounding of its threshold may count on either side.
    np.testing.assert_allclose(found["nonzero_fraction"], expected[..., 0], atol=2e-3)
    np.testing.assert_allclose(found["empty_rows"], expected[..., 1], atol=0.02)
    np.testing.assert_allclose(found["effective_keys"], expected[..., 2], rtol=0.02)
    assert set(found) == set(telemetry.COLUMNS)
    heads = 4 * model.config.views
    assert all(values.shape == (2, heads) for values in found.values())
    if kind == "softmax":
        assert np.isnan(found["survivors"]).all()
        assert (found["nonzero_fraction"] == 1).all()
    else:
        # The step looks at the keys of a whole group, and misses none that fires.
        assert (found["survivors"] > 0).all()
        assert (found["survivors"] <= 1).all()
    if model.config.is_thresholded:
        np.testing.assert_allclose(found["threshold_scale"], 0.5)


def test_survivors_and_slots_are_those_of_decode_steps():
    """At the last position alone: as many keys as `decode_attention` says."""
    model = make_model("threshold_relu", num_layers=1)
    tokens = np.random.default_rng(1).integers(0, 256, (1, 40))
    one = telemetry.measure(model, tokens, steps=1)
    hsr = dataclasses.replace(model.config, attention="hsr")
    stepping = nnx.merge(nnx.graphdef(abstract_model(hsr)), nnx.state(model))

    @jax.jit
    def last_step(model, stepping, tokens):
        caches = model.init_caches(1, 40)
        _, caches, _ = model.step(tokens[:, :-1], caches)
        return stepping.step(tokens[:, -1:], caches)[2]

    infos = last_step(model, stepping, jnp.asarray(tokens, jnp.int32))
    looked_at = np.stack([info.candidates[0, 0] for info in infos])
    np.testing.assert_allclose(one["survivors"], looked_at / 40, rtol=1e-5)
    ratio = one["survivors"] / one["capacity_use"]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)


def test_a_head_that_never_fires_is_dead():
    model = make_model("threshold_relu", threshold_scale=9.0)
    found = telemetry.measure(model, TOKENS)
    assert telemetry.dead_heads(found["empty_rows"]) == 8
    assert telemetry.dead_heads(np.array([[0.98, 0.0]])) == 0
