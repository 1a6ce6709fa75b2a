"""`hsrjax.attention`: the shared contract, and what only this function promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hsrjax
from tests.contract import (
    AttentionContract,
    check_certificate,
    expected_of,
    inputs,
    reference_attention,
    relative_error,
    slow,
)


class TestDense(AttentionContract):
    pass


@pytest.mark.slow
class TestDenseInChunks(TestDense):
    dense_in_chunks = True


class TestHsr(AttentionContract):
    method = "hsr"


@pytest.mark.slow
class TestHsrOverflowing(AttentionContract):
    """Seven slots: nearly every tile needs several passes, nothing may change."""

    method = "hsr"
    capacity = 7

    def test_overflow_is_reported(self):
        query, key, value, _ = inputs((1, 4, 64, 1, 1, 8, 8))
        activation = hsrjax.ReLU(bias=-100.0)
        _, info = self.attend(query, key, value, activation=activation)
        assert info.overflow.all() and (info.count == 64).all()


def test_auto_is_one_of_the_two():
    query, key, value, _ = inputs((1, 9, 9, 2, 1, 8, 8))
    auto, dense = (
        hsrjax.attention(query, key, value, activation=hsrjax.ReLU(), method=name)
        for name in ("auto", "dense")
    )
    np.testing.assert_array_equal(auto, dense)


# Few examples: each compiles four programs. HYPOTHESIS_PROFILE=explore draws more.
@pytest.mark.slow
@settings(max_examples=max(6, settings().max_examples // 4))
@given(
    t=st.integers(1, 70),
    s=st.integers(1, 70),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    h=st.integers(1, 40),
    d=st.integers(1, 9),
    power=st.integers(1, 3),
    bias=st.floats(-1, 3, width=32),
    capacity=st.integers(1, 80),
    is_causal=st.booleans(),
    window=st.none() | st.integers(1, 80),
    sinks=st.integers(0, 9),
    segments=st.none() | st.integers(1, 9),
)
def test_hsr_equals_dense_whatever_the_shape(
    t,
    s,
    kv_heads,
    group,
    h,
    d,
    power,
    bias,
    capacity,
    is_causal,
    window,
    sinks,
    segments,
):
    visible = {}
    if window is not None and is_causal:
        visible = {"window": window, "sinks": sinks}
    if segments is not None:
        t = s
        visible["segment_ids"] = np.sort(np.arange(s)[None] * 7 % segments)
    query, key, value, cotangent = inputs((1, t, s, kv_heads * group, kv_heads, h, d))
    activation = hsrjax.ReLU(power=power, bias=bias, normalize="none")

    @functools.partial(jax.jit, static_argnames="method")
    def run(query, key, value, bias, method):
        def loss(query, key, value, bias):
            out, info = hsrjax.attention(
                query,
                key,
                value,
                activation=hsrjax.ReLU(power, bias, "none"),
                method=method,
                is_causal=is_causal,
                capacity=capacity,
                return_info=True,
                **visible,
            )
            return jnp.vdot(out, cotangent), (out, info.count)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(
            query, key, value, bias
        )

    arrays = query, key, value, jnp.float32(activation.bias)
    (_, (dense, count)), expected = run(*arrays, "dense")
    (_, (out, hsr_count)), got = run(*arrays, "hsr")
    np.testing.assert_array_equal(hsr_count, count)
    scale = max(1e-3, float(jnp.abs(dense).max()))
    assert float(jnp.abs(out - dense).max()) <= 1e-5 * scale
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) <= 1e-5 or jnp.abs(one - other).max() < 1e-6


@functools.cache
def values_and_gradients(method, activation):
    *arrays, cotangent = inputs((1, 33, 70, 4, 2, 24, 8))
    attend = functools.partial(hsrjax.attention, method=method, capacity=8)
    if method == "reference":
        attend = reference_attention
    loss = lambda *x: jnp.vdot(attend(*x, activation=activation), cotangent)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return jax.tree.leaves(run(*arrays))


@pytest.mark.exact
@pytest.mark.parametrize("method", ["dense", "hsr"])
@pytest.mark.parametrize(
    "activation", [hsrjax.ReLU(2, 0.3), hsrjax.Softmax(top_r=6), hsrjax.Entmax()]
)
def test_values_and_gradients_are_those_of_the_reference(activation, method):
    got = values_and_gradients(method, activation)
    expected = expected_of(
        ("values and gradients", activation),
        lambda: values_and_gradients("reference", activation),
    )
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) <= 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_low_precision_arrays(dtype):
    """In the arrays' dtype, and as close as it lets them be to those of float32."""
    *arrays, cotangent = inputs((1, 33, 70, 4, 2, 24, 8), dtype=dtype)

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(arrays, method):
        def loss(arrays):
            out = hsrjax.attention(
                *arrays, activation=hsrjax.ReLU(2, 0.3, "none"), method=method
            )
            return jnp.vdot(out.astype(jnp.float32), cotangent.astype(jnp.float32))

        return jax.grad(loss)(arrays)

    expected = gradients([x.astype(jnp.float32) for x in arrays], "dense")
    for one, other in zip(gradients(arrays, "hsr"), expected, strict=True):
        assert one.dtype == dtype
        assert relative_error(one.astype(jnp.float32), other) <= 1e-2


@pytest.mark.parametrize("limit", [{"epsilon": 0.1}, {"top_r": 8, "tail": 4}])
def test_auto_keeps_the_certificate_of_softmax(limit, made_up_costs):
    """Where auto takes the reported way it is that way; where not, full or as dense."""
    query, key, value, _ = inputs((1, 9, 300, 2, 1, 16, 8))
    query, activation = 3 * query, hsrjax.Softmax(**limit)
    attend = functools.partial(
        hsrjax.attention, activation=activation, return_info=True
    )
    runs = {
        method: jax.jit(functools.partial(attend, method=method))(query, key, value)
        for method in ("auto", "hsr", "dense")
    }
    chosen = hsrjax.explain(query, key, value, activation=activation).method
    np.testing.assert_array_equal(runs["auto"][0], runs[chosen][0])
    for out, info in runs.values():
        if info.error_bound.any():
            check_certificate(query, key, value, out, info)
        else:  # full softmax, of which dense attention has all scores
            full = reference_attention(query, key, value, activation=hsrjax.Softmax())
            assert activation.tail and relative_error(out, full) <= 1e-5


def test_rows_that_see_nothing_look_at_nothing():
    """Padding, also with a bias that is no number."""
    query, key, value, _ = inputs((1, 6, 200, 2, 1, 8, 4))
    cache = hsrjax.extend(hsrjax.init_cache(1, 200, 1, 8, value_dim=4), key, value)
    positions = jnp.array([[-1, 199, -1, 150, -1, -1]], jnp.int32)
    padding = positions < 0
    bias = jnp.where(padding, jnp.nan, -100.0)[..., None]
    for again in (cache, hsrjax.reindex(cache)):
        out, info = hsrjax.decode_attention(
            query,
            again,
            activation=hsrjax.ReLU(bias=bias),
            method="hsr",
            positions=positions,
        )
        looked_at = np.asarray(info.candidates)[0, :, 0]
        np.testing.assert_array_equal(looked_at, [0, 200, 0, 151, 0, 0])
        assert (np.asarray(out)[np.asarray(padding)] == 0).all()


def test_top_r_gradients_equal_dense():
    *arrays, cotangent = inputs((1, 30, 50, 2, 1, 8, 8))

    def gradients(method):
        def loss(*arrays):
            out = hsrjax.attention(
                *arrays,
                activation=hsrjax.Softmax(top_r=6),
                method=method,
                capacity=16,
            )
            return jnp.vdot(out, cotangent)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    for one, other in zip(gradients("hsr"), gradients("dense"), strict=True):
        assert relative_error(one, other) <= 1e-5


def test_only_reported_keys_are_looked_at():
    query, key, value, _ = inputs((1, 1, 4096, 1, 1, 64, 8))
    activation = hsrjax.ReLU(bias=2.5)
    _, info = hsrjax.attention(
        query,
        key,
        value,
        activation=activation,
        method="hsr",
        return_info=True,
    )
    assert 0 < int(info.count[0, 0, 0]) <= int(info.candidates[0, 0, 0]) < 100


@functools.partial(jax.jit, static_argnames="method")
def attend_to_sinks(query, key, value, activation, method):
    options = {"method": method, "capacity": 16, "sinks": 3, "return_info": True}
    return hsrjax.attention(query, key, value, activation=activation, **options)


@pytest.mark.parametrize("method", ["dense", "hsr"])
@pytest.mark.parametrize("sink_scale", [100.0, *slow((0.0,), (-100.0,))])
@pytest.mark.parametrize(
    "activation", [hsrjax.Softmax(epsilon=0.05), hsrjax.Softmax(top_r=7)]
)
def test_sinks_are_kept_and_certified(activation, sink_scale, method):
    """Values are unit vectors, so the output is the kept weights themselves."""
    query, key, _, _ = inputs((1, 9, 90, 1, 1, 16, 1), seed=2)
    key = key.at[:, :3].set(query[:, :3] * sink_scale)
    value = jnp.eye(90)[None, :, None]
    out, info = attend_to_sinks(query, key, value, activation, method)
    check_certificate(query, key, value, out, info)
    scores = np.einsum("thd,shd->hts", query[0], key[0])[0] / 4.0
    weights = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    others = np.asarray(info.count)[0, :, 0] - 3
    if activation.top_r:
        assert (others == 7).all()
    rank = np.argsort(np.argsort(-scores[:, 3:], axis=-1), axis=-1)
    left_out = np.pad(rank >= others[:, None], [(0, 0), (3, 0)])
    missed = np.where(left_out, weights, 0.0).sum(-1)
    assert (missed <= np.asarray(info.missed_mass)[0, :, 0] + 1e-37).all()
    assert (missed <= (1.0 if activation.top_r else 0.05)).all()
    kept = np.where(left_out, 0.0, weights)
    kept /= kept.sum(-1, keepdims=True)
    np.testing.assert_allclose(out[0, :, 0], kept, atol=3e-6)


@pytest.mark.parametrize("method", ["dense", "hsr"])
def test_sinks_are_never_counted_as_left_out(method):
    x = jnp.ones((1, 90, 1, 8))  # equal weights: all but the 85 sinks hold 5 of 90
    _, info = hsrjax.attention(
        x,
        x,
        x,
        activation=hsrjax.Softmax(epsilon=0.2),
        sinks=85,
        method=method,
        return_info=True,
    )
    assert (info.count == 85).all()
    np.testing.assert_allclose(info.missed_mass, 5 / 90, rtol=1e-3)


CERTIFIED = {
    method: jax.jit(
        functools.partial(
            hsrjax.attention,
            activation=hsrjax.Softmax(epsilon=0.05),
            method=method,
            return_info=True,
        )
    )
    for method in ("dense", "hsr")
}


@pytest.mark.exact
@pytest.mark.parametrize("method", ["dense", "hsr"])
@pytest.mark.parametrize("kind", ["outlier", "equal", "huge", "tiny", "cluster", "nan"])
def test_certificate_on_adversarial_scores(kind, method):
    query, key, value, _ = inputs((1, 20, 300, 2, 2, 16, 8), seed=3)
    if kind == "outlier":
        key = key.at[0, 17].multiply(1e4)
    elif kind == "equal":
        key = jnp.broadcast_to(key[:, :1], key.shape)
    elif kind == "huge":
        query = query * 200.0
    elif kind == "tiny":
        query = query * 1e-20
    elif kind == "cluster":
        key = jnp.round(key[:, :7].repeat(43, axis=1)[:, :300], 1)
    else:
        key = key.at[0, 5, 0, 0].set(jnp.nan)
    out, info = CERTIFIED[method](query, key, value)
    if kind == "nan":  # the head that sees it is NaN, and so is its bound
        assert np.isnan(np.asarray(out[:, :, 0])).all()
        query, key, value, out = (x[:, :, 1:] for x in (query, key, value, out))
        info = jax.tree.map(lambda x: x[:, :, 1:], info)
    check_certificate(query, key, value, out, info, epsilon=0.05)


def test_top_r_certificate():
    query, key, value, _ = inputs((1, 20, 300, 2, 1, 32, 8), seed=5)
    out, info = hsrjax.attention(
        query * 4,
        key,
        value,
        activation=hsrjax.Softmax(top_r=20),
        method="hsr",
        return_info=True,
    )
    assert (info.count == 20).all()
    error = check_certificate(query * 4, key, value, out, info)
    assert error.max() > 0 and float(info.error_bound.min()) < 1.0


def test_every_shape_of_bias():
    query, key, value, _ = inputs((2, 5, 9, 4, 2, 8, 8))
    per_row = jnp.linspace(0.0, 1.0, 5)[:, None]
    for bias in (0.3, jnp.full((4,), 0.3), per_row, jnp.full((2, 5, 4), 0.3)):
        dense, hsr = (
            hsrjax.attention(
                query,
                key,
                value,
                activation=hsrjax.ReLU(bias=bias),
                method=method,
            )
            for method in ("dense", "hsr")
        )
        assert relative_error(hsr, dense) <= 1e-5


SWAPPED = jnp.ones((1, 2, 7, 4))


def arrays_for_errors():
    x = jnp.ones((1, 3, 4, 8))
    return {"query": x, "key": x[:, :, :2], "value": x[:, :, :2]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": jnp.ones((3, 4, 8))}, ValueError, "query must have the 4 axes"),
        ({"key": jnp.ones((1, 3, 3, 8))}, ValueError, "value.shape"),
        (
            {"key": jnp.ones((1, 3, 3, 8)), "value": jnp.ones((1, 3, 3, 8))},
            ValueError,
            "multiple of the 3 key heads, got 4",
        ),
        (
            {"query": jnp.ones((1, 8, 9, 4)), "key": SWAPPED, "value": SWAPPED},
            ValueError,
            r"look like \[B, N, T, H\].* jnp.swapaxes\(x, 1, 2\)",
        ),
        ({"key": jnp.ones((1, 3, 2, 9))}, ValueError, "head size of the keys"),
        ({"key": jnp.ones((2, 3, 2, 8))}, ValueError, "batch size"),
        ({"value": jnp.ones((1, 2, 2, 8))}, ValueError, "value.shape"),
        ({"query": jnp.ones((1, 3, 4, 8), int)}, TypeError, "got int32"),
        ({"query": jnp.ones((1, 0, 4, 8))}, ValueError, "not be empty"),
        ({"capacity": 0}, ValueError, "capacity must be an integer >= 1"),
        ({"method": "fast"}, ValueError, "method must be one of"),
        ({"activation": "relu"}, TypeError, "activation must be"),
        (
            {"activation": hsrjax.ReLU(bias=jnp.ones(3))},
            ValueError,
            "activation.bias must broadcast",
        ),
    ],
)
def test_static_mistakes_are_named(change, error, message):
    arguments = arrays_for_errors() | {"activation": hsrjax.ReLU()} | change
    query, key, value = (arguments.pop(name) for name in ("query", "key", "value"))
    with pytest.raises(error, match=message):
        jax.eval_shape(
            functools.partial(hsrjax.attention, **arguments), query, key, value
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hsrjax.ReLU(power=0), "power must be an integer >= 1, got 0"),
        (lambda: hsrjax.ReLU(power=1.5), "power"),
        (lambda: hsrjax.ReLU(normalize="sum"), "normalize must be one of"),
        (lambda: hsrjax.Softmax(top_r=0), "top_r"),
        (lambda: hsrjax.Softmax(epsilon=1.0), "strictly between 0 and 1"),
        (lambda: hsrjax.Softmax(top_r=1, epsilon=0.1), "exclude each other"),
    ],
)
def test_activations_check_their_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
