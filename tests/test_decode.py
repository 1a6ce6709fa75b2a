"""Growing caches: the shared contract through `decode_attention`, and Algorithm 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from hsrjax._src.planning import plan as planner
from tests.contract import CacheContract, fill, inputs, relative_error, slow


@pytest.mark.slow
class TestDenseCache(CacheContract):
    pass


@pytest.mark.slow
class TestDenseCacheInChunks(CacheContract):
    dense_in_chunks = True


@pytest.mark.slow
class TestHsrCache(CacheContract):
    method = "hsr"


@pytest.mark.slow
class TestHsrCacheGrownInPieces(CacheContract):
    method = "hsr"
    chunk = 13

    # Three appends are slow to compile: the rest is covered by one append, above.
    test_vmap_equals_a_loop = None
    test_compiles_once = None
    test_zero_inputs = None
    test_low_precision_inputs = None


@pytest.mark.slow
class TestReindexedCache(CacheContract):
    method = "hsr"
    appended = 5  # after it was reindexed

    test_compiles_once = None  # that is below, without a compilation for each length


def attend_both(query, key, value, lengths, *, method="hsr", **options):
    """(output, info) of a cache in arrival order, dense, and of one reindexed.

    The second gets its last ten tokens after it was reindexed.
    """
    b, s, kv_heads, h = key.shape
    empty = hsrjax.init_cache(b, s + 40, kv_heads, h, value_dim=value.shape[-1])
    arrived = hsrjax.extend(empty, key, value, lengths=lengths)
    early = jnp.maximum(lengths - 10, 0)
    cache = hsrjax.reindex(hsrjax.extend(empty, key, value, lengths=early))
    late = early[:, None, None, None] + jnp.arange(10)[None, :, None, None]
    late = jnp.minimum(late, s - 1)
    key, value = (jnp.take_along_axis(x, late, axis=1) for x in (key, value))
    cache = hsrjax.extend(cache, key, value, lengths=lengths - early)
    np.testing.assert_array_equal(cache.length, arrived.length)
    return (
        hsrjax.decode_attention(query, arrived, method="dense", **options),
        hsrjax.decode_attention(query, cache, method=method, **options),
    )


BIG = (3, 5, 1500, 4, 2)
"""Rows long enough for cells of 128 slots."""


@pytest.mark.parametrize("visible", [{"window": 700, "sinks": 3}, *slow(({},))])
@pytest.mark.parametrize("h", [8, *slow((4,), (24,))])
@pytest.mark.parametrize("fire", ["few", "many"])
def test_reindexed_rows_attend_to_what_they_did_before(h, fire, visible):
    """Several newest positions of rows of 1500, 600, 7 and no tokens."""
    query, key, value, _ = inputs((4, *BIG[1:], h, 3), seed=h)
    far = jnp.zeros(1500, bool).at[::37].set(True).at[-8:].set(True)
    key = key * jnp.where(far, 4.0, 0.3)[None, :, None, None]
    (expected, wanted), (out, info) = attend_both(
        query,
        key,
        value,
        jnp.array([1500, 600, 7, 0]),
        activation=hsrjax.ReLU(2, {"few": 2.0, "many": -0.2}[fire], "none"),
        **visible,
    )
    np.testing.assert_array_equal(info.count, wanted.count)
    assert (info.candidates >= info.count).all()
    assert (info.candidates <= wanted.candidates).all()
    assert relative_error(out, expected) <= 1e-5
    most = int(info.count.max())
    assert 400 < most if fire == "many" else 3 < most < 30
    assert (out[3] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "activation",
    [
        hsrjax.Softmax(top_r=9),
        hsrjax.Softmax(),
        hsrjax.Softmax(epsilon=0.1),
    ],
)
def test_softmax_over_a_reindexed_cache(activation):
    query, key, value, _ = inputs((*BIG, 8, 3))
    (expected, wanted), (out, info) = attend_both(
        query,
        key,
        value,
        jnp.array([1500, 600, 7]),
        activation=activation,
        method="auto" if activation.keeps_all else "hsr",
        window=100,
        sinks=2,
    )
    if activation.epsilon is None:
        np.testing.assert_array_equal(info.count, wanted.count)
        assert relative_error(out, expected) <= 1e-5
    assert (jnp.abs(out - expected).max(-1) <= 2 * info.error_bound + 1e-5).all()


@pytest.mark.parametrize(
    "activation", [hsrjax.ReLU(2, -0.2, "none"), *slow((hsrjax.Softmax(),))]
)
def test_dense_attention_of_a_reindexed_cache_in_chunks(monkeypatch, activation):
    monkeypatch.setattr(planner, "_SCORES_AT_ONCE", 0)
    monkeypatch.setattr(planner, "_CHUNK_SCORES", 1)
    query, key, value, _ = inputs((2, 9, 1500, 2, 1, 4, 3))
    (expected, wanted), (out, info) = attend_both(
        query,
        key,
        value,
        jnp.array([1500, 1450]),
        activation=activation,
        method="dense",
        window=500,
        sinks=2,
    )
    np.testing.assert_array_equal(info.count, wanted.count)
    assert relative_error(out, expected) <= 1e-5
    assert int(info.candidates.max()) == 502


def test_nan_in_a_reindexed_cache_reaches_all_that_see_it():
    """Its cell is never ruled out, whatever else is in there."""
    query, key, value, _ = inputs((1, 3, 1500, 2, 2, 4, 3))
    key = key.at[0, 1498, 1, 2].set(jnp.nan).at[0, 5, 0].set(1e30)
    cache = hsrjax.reindex(fill(key, value))
    activation = hsrjax.ReLU(bias=2.0)
    out, _ = hsrjax.decode_attention(query, cache, activation=activation, method="hsr")
    seen = np.array([[False, False], [False, True], [False, True]])
    np.testing.assert_array_equal(np.isnan(out[0]).all(-1), seen)
    assert not np.isnan(np.asarray(out)[0][~seen]).any()


def test_reindex_and_what_follows_compile_once(count_traces):
    decode = count_traces(hsrjax.decode_attention)
    reindex = count_traces(hsrjax.reindex)

    @jax.jit
    def step(cache, query, key, value):
        cache = hsrjax.extend(reindex(cache), key, value)
        return cache, decode(
            query, cache, activation=hsrjax.ReLU(bias=1.0), method="hsr"
        )

    query, key, value, _ = inputs((1, 1, 48, 1, 1, 8, 8))
    cache = hsrjax.reindex(hsrjax.init_cache(1, 64, 1, 8))
    for start in range(0, 48, 16):
        part = slice(start, start + 16)
        cache, (out, info) = step(cache, query, key[:, part], value[:, part])
    assert decode.traces == reindex.traces == 1
    expected = hsrjax.attention(query, key, value, activation=hsrjax.ReLU(bias=1.0))
    assert relative_error(out, expected) <= 1e-5 and int(info.count[0, 0, 0]) > 0


@pytest.mark.parametrize("visible", [{"window": 9, "sinks": 2}, *slow(({},))])
def test_generation_equals_causal_attention(visible):
    """Token by token, from an empty cache, under one scan and one compilation."""
    query, key, value, _ = inputs((2, 70, 70, 4, 2, 16, 8))
    activation = hsrjax.ReLU(power=2, bias=0.4)

    def step(cache, token):
        q, k, v = (x[:, None] for x in token)
        cache = hsrjax.extend(cache, k, v)
        out, info = hsrjax.decode_attention(
            q, cache, activation=activation, method="hsr", **visible
        )
        return cache, (out[:, 0], info.count[:, 0])

    cache = hsrjax.init_cache(2, 70, 2, 16, value_dim=8)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (query, key, value))
    cache, (out, count) = jax.jit(functools.partial(jax.lax.scan, step))(cache, tokens)
    expected, info = hsrjax.attention(
        query,
        key,
        value,
        activation=activation,
        method="dense",
        is_causal=True,
        return_info=True,
        **visible,
    )
    assert relative_error(jnp.moveaxis(out, 0, 1), expected) <= 1e-5
    np.testing.assert_array_equal(jnp.moveaxis(count, 0, 1), info.count)
    assert cache.length.tolist() == [70, 70]


def test_a_grown_cache_has_the_sketch_of_one_built_at_once():
    _, key, value, _ = inputs((1, 1, 100, 1, 2, 16, 8))
    at_once = fill(key, value)
    grown = fill(key, value, chunk=64)
    for one, other in zip(
        jax.tree.leaves(grown.index), jax.tree.leaves(at_once.index), strict=True
    ):
        if one.dtype != jnp.float32:
            continue
        np.testing.assert_allclose(one, other, atol=0.5)
    np.testing.assert_array_equal(grown.index.alive, at_once.index.alive)
    np.testing.assert_array_equal(grown.index.keys, at_once.index.keys)


def test_what_is_known_of_values_outlives_later_pieces():
    """The largest value, and one that is no number, in the first piece of three."""
    _, key, value, _ = inputs((1, 1, 30, 1, 2, 8, 4))
    value = value.at[0, 3, 0, 1].set(-50.0).at[0, 5, 1, 2].set(jnp.nan)
    for chunk in (None, 10):
        values = fill(key, value, chunk=chunk).values
        np.testing.assert_array_equal(values.bound[0, 0], 50.0)
        spoiled = np.isnan(np.asarray(values.poison))
        assert spoiled.sum() == 1 and spoiled[0, 1, 2]


def test_the_newest_positions_by_default():
    query, key, value, _ = inputs((1, 3, 20, 2, 1, 8, 8))
    cache = fill(key, value, room=10)
    out, _ = hsrjax.decode_attention(query, cache, activation=hsrjax.ReLU())
    wide = jnp.zeros((1, 20, 2, 8)).at[:, 17:].set(query)
    expected = hsrjax.attention(
        wide, key, value, activation=hsrjax.ReLU(), is_causal=True
    )
    assert relative_error(out, expected[:, 17:]) <= 1e-5


@pytest.mark.parametrize("method", ["dense", "hsr"])
def test_ragged_rows(method):
    query, key, value, _ = inputs((3, 1, 40, 2, 1, 8, 8))
    lengths = jnp.array([40, 1, 17])
    cache = hsrjax.extend(hsrjax.init_cache(3, 50, 1, 8), key, value, lengths=lengths)
    assert cache.length.tolist() == [40, 1, 17]
    options = {"activation": hsrjax.ReLU(), "method": method}
    out, info = hsrjax.decode_attention(query, cache, **options)
    for row, length in enumerate([40, 1, 17]):
        alone = hsrjax.attention(
            query[row : row + 1],
            key[row : row + 1, :length],
            value[row : row + 1, :length],
            **options,
        )
        assert relative_error(out[row : row + 1], alone) <= 1e-5
    # Positions before the start of a row see nothing.
    out, info = hsrjax.decode_attention(jnp.ones((3, 2, 2, 8)), cache, **options)
    assert (out[1, 0] == 0).all() and (info.count[1, 0] == 0).all()


def test_keys_outside_the_window_are_not_gathered():
    query, key, value, _ = inputs((1, 1, 300, 1, 1, 16, 8))
    _, info = hsrjax.decode_attention(
        query,
        fill(key, value),
        activation=hsrjax.ReLU(bias=-100.0),  # all keys fire
        method="hsr",
        window=8,
        sinks=2,
        capacity=10,
    )
    assert not info.overflow.any() and (info.count == 10).all()


def test_tokens_without_room_are_counted_not_stored():
    _, key, value, _ = inputs((1, 1, 10, 1, 1, 8, 8))
    cache = jax.jit(hsrjax.extend)(hsrjax.init_cache(1, 12, 1, 8), key, value)
    cache = jax.jit(hsrjax.extend)(cache, key, value)
    assert int(cache.length[0]) == 12 and int(cache.dropped[0]) == 8
    np.testing.assert_array_equal(cache.index.keys[0, 0, 10:12], key[0, :2, 0])
    with pytest.raises(ValueError, match="room for 12 tokens per row, got 22"):
        hsrjax.extend(cache, key, value)


def test_one_compilation_serves_every_length(count_traces):
    counted = count_traces(hsrjax.decode_attention)
    decode = jax.jit(functools.partial(counted, activation=hsrjax.ReLU(), method="hsr"))
    query, key, value, _ = inputs((1, 1, 64, 1, 1, 8, 8))
    cache = hsrjax.init_cache(1, 64, 1, 8)
    for start in range(0, 64, 16):
        part = slice(start, start + 16)
        cache = hsrjax.extend(cache, key[:, part], value[:, part])
        decode(query, cache)
    assert counted.traces == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, x: hsrjax.init_cache(1, 0, 1, 8), ValueError, "max_length"),
        (
            lambda c, x: hsrjax.init_cache(1, 4, 1, 8, dtype=jnp.int8),
            TypeError,
            "dtype",
        ),
        (lambda c, x: hsrjax.extend(c, x[..., :4], x), ValueError, "key.shape"),
        (lambda c, x: hsrjax.extend(c, x, x[:, :1]), ValueError, "value.shape"),
        (
            lambda c, x: hsrjax.extend(c, x.astype(jnp.bfloat16), x),
            TypeError,
            "stored dtype float32",
        ),
        (
            lambda c, x: hsrjax.extend(c, x, x, lengths=jnp.ones(2, int)),
            ValueError,
            "lengths.shape",
        ),
        (lambda c, x: hsrjax.extend(x, x, x), TypeError, "init_cache"),
        (lambda c, x: hsrjax.reindex(x), TypeError, "init_cache"),
        (
            lambda c, x: hsrjax.decode_attention(x[:, :, :1], c, activation=None),
            TypeError,
            "activation",
        ),
        (
            lambda c, x: hsrjax.decode_attention(
                jnp.ones((1, 1, 3, 8)), c, activation=hsrjax.ReLU()
            ),
            ValueError,
            "multiple of the 2 key heads",
        ),
        (
            lambda c, x: hsrjax.decode_attention(
                x, c, activation=hsrjax.ReLU(), positions=jnp.zeros((1, 9), int)
            ),
            ValueError,
            "positions.shape",
        ),
    ],
)
def test_static_mistakes_are_named(call, error, message):
    cache, x = hsrjax.init_cache(1, 4, 2, 8), jnp.ones((1, 2, 2, 8))
    with pytest.raises(error, match=message):
        call(cache, x)
