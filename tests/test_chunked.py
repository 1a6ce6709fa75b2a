"""Dense attention in chunks: the same as all at once, in linear memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hsrjax
from hsrjax._src.core import visible
from hsrjax._src.kernels.xla.chunks import Chunks
from hsrjax._src.planning import plan as planner
from tests.contract import (
    SEGMENTS,
    SHAPE,
    inputs,
    relative_error,
    slow,
    small_dense_tiling,
)

SELECTING = [hsrjax.Softmax(top_r=4), hsrjax.Softmax(epsilon=0.05)]
ACTIVATIONS = [
    hsrjax.ReLU(power=1, bias=-0.5),
    hsrjax.Softmax(),
    SELECTING[1],
    *slow((hsrjax.ReLU(power=3, bias=-0.3, normalize="length"),), SELECTING[:1]),
]


def with_gradients(monkeypatch, tiling, arrays, cotangent, activation, **options):
    """(output, Info) and the gradients by query, key, value and activation."""
    if tiling is not None:
        monkeypatch.setattr(planner, "dense_tiling", tiling)

    def loss(query, key, value, activation):
        out, info = hsrjax.attention(
            query,
            key,
            value,
            activation=activation,
            method="dense",
            return_info=True,
            **options,
        )
        return jnp.vdot(out.astype(jnp.float32), cotangent), (out, info)

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    grads, results = jax.jit(gradient)(*arrays, activation)
    monkeypatch.undo()
    return results, jax.tree.leaves(grads)


def check_equal_to_one_shot(monkeypatch, tiling, arrays, *rest, **options):
    args = arrays, *rest
    (expected, facts), grads = with_gradients(monkeypatch, None, *args, **options)
    (out, info), got = with_gradients(monkeypatch, tiling, *args, **options)
    tolerance = 1e-5 if out.dtype == jnp.float32 else 1e-2
    assert out.dtype == expected.dtype
    for one, other in zip((out, *got), (expected, *grads), strict=True):
        assert one.dtype == other.dtype
        one, other = (x.astype(jnp.float32) for x in (one, other))
        close = jnp.abs(one - other).max() < tolerance * 0.1
        assert relative_error(one, other) <= tolerance or close
    chex.assert_trees_all_equal_shapes_and_dtypes(info, facts)
    for name in ("count", "candidates", "overflow"):
        np.testing.assert_array_equal(getattr(info, name), getattr(facts, name))
    for name in ("missed_mass", "error_bound"):
        np.testing.assert_allclose(
            getattr(info, name), getattr(facts, name), rtol=1e-3, atol=1e-7
        )


@pytest.mark.parametrize("dtype", [jnp.float32, *slow((jnp.bfloat16,))])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_gradients_and_facts_are_those_of_one_shot(
    activation, dtype, monkeypatch
):
    query, key, value, cotangent = inputs(SHAPE)
    arrays = [x.astype(dtype) for x in (query, key, value)]
    options = {"is_causal": True, "segment_ids": SEGMENTS, "window": 6, "sinks": 3}
    check_equal_to_one_shot(
        monkeypatch, small_dense_tiling, arrays, cotangent, activation, **options
    )


# Few examples: each compiles two programs. HYPOTHESIS_PROFILE=explore draws more.
@pytest.mark.slow
@settings(max_examples=max(5, settings().max_examples // 5))
@given(
    t=st.integers(1, 70),
    s=st.integers(1, 70),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    tile=st.integers(1, 80),
    chunk=st.integers(1, 80),
    power=st.none() | st.integers(1, 3),
    is_causal=st.booleans(),
    window=st.none() | st.integers(1, 80),
    sinks=st.integers(0, 9),
    segments=st.none() | st.integers(1, 9),
)
def test_whatever_the_tiling(
    t, s, kv_heads, group, tile, chunk, power, is_causal, window, sinks, segments
):
    options = {"is_causal": is_causal}
    if window is not None and is_causal:
        options |= {"window": window, "sinks": sinks}
    if segments is not None:
        t = s
        options["segment_ids"] = np.sort(np.arange(s)[None] * 7 % segments)
    *arrays, cotangent = inputs((1, t, s, kv_heads * group, kv_heads, 8, 4))
    bias = jnp.float32(0.2)
    activation = hsrjax.ReLU(power, bias, "none") if power else hsrjax.Softmax()
    tiling = lambda *_, **sizes: (min(tile, t), min(chunk, s))
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_equal_to_one_shot(
            monkeypatch, tiling, arrays, cotangent, activation, **options
        )


@given(
    rows=st.lists(st.integers(0, 60), min_size=3, max_size=3),
    window=st.none() | st.integers(1, 70),
    sinks=st.integers(0, 70),
    chunk=st.sampled_from([1, 7, 64]),
)
def test_chunks_are_visited_once_and_only_where_something_is_seen(
    rows, window, sinks, chunk
):
    positions = jnp.array(rows)[None]
    seen = visible.of_decode(positions, jnp.array([[60]]), window=window, sinks=sinks)
    count = jnp.zeros(-(-60 // chunk), jnp.int32)
    keys = jnp.zeros((1, 60, 1))
    walk = Chunks(chunk).walk(keys, keys, None, None)
    visits = walk.over(seen, None, lambda piece, x: x.at[piece.i].add(1), count)
    mask = seen.mask(jnp.arange(60, dtype=jnp.int32)[None, None])[0].any(0)
    mask = np.resize(np.pad(mask, (0, -60 % chunk)), (len(count), chunk)).any(1)
    assert (np.asarray(visits)[mask] == 1).all() and (visits <= 1).all()
    if window is None:
        np.testing.assert_array_equal(visits, mask)
    first_seen = min(rows) - (window or 70) + 1
    skipped = np.arange(len(count)) * chunk > max(rows)
    skipped |= (np.arange(1, len(count) + 1) * chunk <= first_seen) & ~mask
    assert (np.asarray(visits)[skipped] == 0).all()


def test_keys_that_no_query_of_a_tile_sees_are_not_looked_at(monkeypatch):
    """Tiles of 5 rows, chunks of 7: rows 0 to 9 need no key from 14 on."""
    query, key, value, _ = inputs((1, 20, 20, 1, 1, 8, 8))
    key = key.at[0, 14].set(jnp.nan)
    attend = functools.partial(
        hsrjax.attention,
        activation=hsrjax.ReLU(power=2),
        method="dense",
        is_causal=True,
    )
    gradient = lambda *x: jax.grad(lambda *x: jnp.sum(attend(*x)))(*x)
    finite = lambda x: np.isfinite(x).all(-1)[0, :, 0]
    assert not finite(gradient(query, key, value)).any()  # 0 * NaN
    monkeypatch.setattr(planner, "dense_tiling", small_dense_tiling)
    assert finite(gradient(query, key, value))[:10].all()


@pytest.mark.parametrize("activation", [hsrjax.ReLU(), hsrjax.Softmax()])
def test_a_bad_value_spoils_rows_that_never_look_at_it(activation, monkeypatch):
    query, key, value, _ = inputs((1, 20, 20, 1, 1, 8, 4))
    value = value.at[0, 19, 0, 1].set(jnp.inf)
    monkeypatch.setattr(planner, "dense_tiling", small_dense_tiling)
    out = hsrjax.attention(
        query,
        key,
        value,
        activation=activation,
        method="dense",
        is_causal=True,
    )
    bad = ~np.isfinite(out[0, :, 0])
    full = np.abs(np.nan_to_num(out[0, :, 0, [0, 2, 3]])).sum(0) > 0  # not empty
    np.testing.assert_array_equal(bad[:, 1], full)
    assert full.sum() > 15 and not bad[:, [0, 2, 3]].any()


@pytest.mark.parametrize("activation", [hsrjax.Softmax(), hsrjax.Softmax(top_r=4)])
def test_gradients_are_summed_in_float32(activation, monkeypatch):
    """Each of 600 queries adds a quarter: in bfloat16 the sum would stop at 64."""
    query, key, value, _ = (
        jnp.ones_like(x) for x in inputs((1, 600, 4, 1, 1, 2, 1), dtype=jnp.bfloat16)
    )
    monkeypatch.setattr(planner, "dense_tiling", small_dense_tiling)
    attend = functools.partial(hsrjax.attention, activation=activation, method="dense")
    gradient = jax.grad(lambda v: jnp.sum(attend(query, key, v).astype(jnp.float32)))
    np.testing.assert_array_equal(gradient(value).astype(jnp.float32), 150.0)


@pytest.mark.parametrize(
    "activation", [hsrjax.ReLU(power=2), *slow((hsrjax.Softmax(),))]
)
def test_jit_of_vmap_equals_one_shot(activation, monkeypatch):
    rows = [jnp.stack([x, 2 * x]) for x in inputs((1, 20, 20, 2, 1, 8, 8))]

    def gradients(query, key, value, cotangent):
        attend = functools.partial(
            hsrjax.attention,
            activation=activation,
            method="dense",
            is_causal=True,
            segment_ids=jnp.arange(20)[None] // 8,
        )
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(cotangent)

    expected = jax.jit(jax.vmap(gradients))(*rows)
    monkeypatch.setattr(planner, "dense_tiling", small_dense_tiling)
    got = jax.jit(jax.vmap(gradients))(*rows)
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_second_derivatives_where_all_is_scored_at_once():
    query, key, value, _ = inputs((1, 4, 4, 1, 1, 4, 4))
    loss = lambda scale: jnp.sum(
        hsrjax.attention(
            query,
            key,
            value,
            activation=hsrjax.Softmax(),
            method="dense",
            scale=scale,
        )
    )
    second = jax.grad(jax.grad(loss))(1.0)
    slope = jax.grad(loss)
    numerical = (slope(1.0 + 1e-2) - slope(1.0 - 1e-2)) / 2e-2
    np.testing.assert_allclose(second, numerical, rtol=2e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("activation", [hsrjax.ReLU(2, 0.5), hsrjax.Softmax()])
def test_memory_is_linear(activation):
    """Forward and backward, against 4 GiB for one array of all scores."""

    def loss(query, key, value):
        out = hsrjax.attention(
            query,
            key,
            value,
            activation=activation,
            method="dense",
            is_causal=True,
        )
        return jnp.sum(out**2)

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        compiled = gradients.lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16384) < 2**26
    assert temporaries(32768) < 2.2 * temporaries(16384)


@pytest.mark.parametrize("activation", [SELECTING[0], *slow((SELECTING[1],))])
def test_whole_rows_take_memory_by_tile(activation):
    def loss(query, key, value):
        out = hsrjax.attention(query, key, value, activation=activation, method="dense")
        return jnp.sum(out**2)

    x = jax.ShapeDtypeStruct((1, 16384, 4, 32), jnp.float32)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = gradients.lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**26
