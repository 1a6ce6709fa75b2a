"""explain: what is going to happen, in sentences that are true."""

import jax
import jax.numpy as jnp
import pytest

import hsrjax
from hsrjax._src.planning import costs
from tests.contract import inputs
from tests.test_decode import fill

RELU = hsrjax.ReLU(power=2, bias=0.5)


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_shapes_are_enough():
    query, key, value, _ = inputs((2, 40, 40, 4, 2, 16, 8))
    shapes = [struct(*x.shape) for x in (query, key, value)]
    options = {"activation": RELU, "is_causal": True, "window": 8, "sinks": 2}
    assert hsrjax.explain(query, key, value, **options) == hsrjax.explain(
        *shapes, **options
    )
    cache = fill(key, value)
    step = query[:, -1:]
    given = hsrjax.explain(step, cache=cache, activation=RELU)
    planned = hsrjax.explain(
        struct(*step.shape),
        cache=jax.eval_shape(lambda: hsrjax.init_cache(2, 40, 2, 16, value_dim=8)),
        activation=RELU,
    )
    assert given == planned


def test_it_is_the_plan_of_the_call(made_up_costs):
    """What is said to happen is seen in Info: at few keys, at many, and in between."""
    query, key, value, _ = inputs((1, 1, 512, 4, 2, 16, 8))
    cache = fill(key, value)
    for method in ("dense", "hsr", "auto"):
        options = {"method": method, "capacity": 32}
        plan = hsrjax.explain(query, cache=cache, activation=RELU, **options)
        assert plan.method == method and plan.capacity == 32
        for bias in (9.0, -9.0):
            activation = hsrjax.ReLU(bias=bias)
            _, info = hsrjax.decode_attention(
                query, cache, activation=activation, **options
            )
            looked_at = int(info.candidates.max())
            assert looked_at == (0 if bias > 0 and method != "dense" else 512)
    # Scoring takes 2 * 512 * 24 ns; gathering as many 32 at a time twice that.
    assert plan.dense_us == pytest.approx(24.576) and plan.break_even == (
        pytest.approx(0.5)
    )
    assert plan.hsr_us == pytest.approx(2 * 32 * 24 * 2 / 1e3, rel=1e-3)
    assert 100 * plan.share_us == pytest.approx(2 * 24.576)


def test_sentences(made_up_costs):
    cache = jax.eval_shape(lambda: hsrjax.init_cache(1, 512, 2, 16))
    query = struct(1, 1, 4, 16)
    told = {
        name: str(
            hsrjax.explain(
                query, cache=cache, activation=RELU, method=name, capacity=32
            )
        )
        for name in ("dense", "hsr", "auto")
    }
    assert told["dense"].startswith("dense: asked for.\nEvery key is scored")
    assert "more than 32 reported by a tile take further exact passes" in told["hsr"]
    assert "unless more than about 50 % of the keys" in told["auto"]
    assert "bounds a sample of the keys first" in told["auto"]
    for words in told.values():
        assert "Expected: dense 33 us; hsr 4.1 us if few keys" in words
        assert "costs.json, measured on this machine." in words
        assert "Memory beside the arguments: dense at least 8.25 KiB" in words


def test_full_softmax_has_no_other_way():
    x = struct(1, 64, 2, 16)
    plan = hsrjax.explain(x, x, x, activation=hsrjax.Softmax(), method="hsr")
    assert plan.method == "dense" and plan.hsr_us is None
    assert "hsr would have to score all keys too" in str(plan)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "key and value, or cache in their place"),
        ({"key": 1}, ValueError, "key=ShapeDtypeStruct, value=None, cache=None"),
        ({"key": 1, "value": 1, "cache": 1}, ValueError, "got key=ShapeDtypeStruct"),
        ({"key": 1, "cache": 1}, ValueError, "value=None, cache=ShapeDtypeStruct"),
        ({"key": 1, "value": 1, "capacity": 0}, ValueError, "capacity"),
        ({"key": 1, "value": 1, "window": 3}, ValueError, "is_causal=True"),
        ({"key": 1, "value": 1, "activation": None}, TypeError, "activation"),
        ({"cache": 2}, TypeError, "init_cache"),
    ],
)
def test_mistakes_are_those_of_the_call(arguments, error, message):
    stands_for = {1: struct(1, 9, 2, 8), 2: struct(3)}
    arguments = {
        name: stands_for.get(x, x) if name in ("key", "value", "cache") else x
        for name, x in arguments.items()
    }
    with pytest.raises(error, match=message):
        hsrjax.explain(struct(1, 9, 2, 8), **{"activation": RELU} | arguments)


class H100:
    platform, device_kind, compute_capability = "gpu", "NVIDIA H100 80GB HBM3", "9.0"

    def memory_stats(self):
        return {"bytes_limit": 80 * 2**30}


def test_what_kernels_do_is_said_of_kernels(monkeypatch):
    monkeypatch.setattr(costs, "default_device", H100)
    query = jax.ShapeDtypeStruct((1, 1, 8, 64), jnp.bfloat16)
    cache = jax.eval_shape(
        lambda: hsrjax.init_cache(1, 131072, 4, 64, dtype=jnp.bfloat16)
    )
    explain = lambda **options: hsrjax.explain(
        query, cache=cache, **{"activation": RELU, "implementation": "triton"} | options
    )
    auto, dense, hsr = (explain(method=name) for name in ("auto", "dense", "hsr"))
    assert auto.implementation == "triton" and auto.method == "auto"
    assert "Kernels (triton): each program lists" in str(auto)
    assert "slots" not in str(auto) and "sample" not in str(auto)
    assert "Costs of triton: packaged with hsrjax, estimated for NVIDIA" in str(auto)
    assert "Kernels (triton): every key is scored" in str(dense)
    assert "None is dropped" in str(hsr)
    by_xla = explain(implementation=None)
    assert by_xla.implementation == "xla" and by_xla.method == "dense"
    assert by_xla.hsr_us > 10 * auto.hsr_us and "Kernels" not in str(by_xla)
    top = explain(activation=hsrjax.Softmax(top_r=8))
    assert top.implementation == "xla" and "Costs of xla" in str(top)


def test_kernels_read_bytes_and_leave_cells_to_xla(monkeypatch):
    monkeypatch.setattr(costs, "default_device", H100)
    options = {"activation": RELU, "implementation": "triton"}

    def cached(dtype, h=64, make=lambda x: x):
        cache = lambda: make(hsrjax.init_cache(1, 2**19, 4, h, dtype=dtype))
        query = jax.ShapeDtypeStruct((1, 1, 8, h), dtype)
        return hsrjax.explain(query, cache=jax.eval_shape(cache), **options)

    def prefilled(dtype):
        x = jax.ShapeDtypeStruct((1, 2**19, 4, 64), dtype)
        return hsrjax.explain(x, x, x, method="dense", **options)

    half, full = cached(jnp.bfloat16), cached(jnp.float32)
    assert full.dense_us == pytest.approx(2 * half.dense_us, rel=0.1)
    assert prefilled(jnp.float32).dense_us > prefilled(jnp.bfloat16).dense_us
    assert cached(jnp.float32, 8).implementation == "triton"
    assert cached(jnp.float32, 8, hsrjax.reindex).implementation == "xla"
