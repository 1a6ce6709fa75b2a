"""Ranges of visible keys are what the words say, key by key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hsrjax
from hsrjax._src.core import visible
from tests.contract import reference_visibility


def sees(i, j, start, *, window, sinks):
    """Whether query i sees key j <= i of its own segment, and whether j is a sink."""
    sink = j - start < sinks
    return (window is None or i - window < j) or sink, sink


def by_hand(ids, queries, keys, *, is_causal, window, sinks):
    """bool[T, S] twice for one row, pair by pair; ids may be None."""
    seen = np.zeros((2, queries, keys), bool)
    for i in range(queries):
        for j in range(keys):
            start = 0
            if ids is not None:
                between = ids[min(i, j) : max(i, j) + 1]
                if len(set(between)) > 1:
                    continue
                start = max([p + 1 for p in range(i) if ids[p] != ids[i]], default=0)
            if is_causal and j > i:
                continue
            if j > i:
                seen[:, i, j] = True, j - start < sinks
            else:
                seen[:, i, j] = sees(i, j, start, window=window, sinks=sinks)
    seen[1] &= seen[0]
    return seen


def unfold(ranges, keys):
    """The masks bool[B, T, S], and the number of keys, that the ranges stand for."""
    slots = jnp.arange(keys, dtype=jnp.int32)[None, None, :]
    mask, sinks, count = ranges.mask(slots), ranges.sinks(slots), ranges.count()
    return mask, jnp.zeros_like(mask) if sinks is None else sinks, count


SIZES = st.sampled_from([1, 7, 20])  # few: each compiles anew
RUNS = st.lists(st.tuples(st.integers(-1, 1), st.integers(1, 9)), min_size=1)


@given(
    runs=st.none() | RUNS,
    queries=SIZES,
    keys=SIZES,
    is_causal=st.booleans(),
    window=st.none() | st.integers(1, 12),
    sinks=st.integers(0, 12),
)
def test_prefill(runs, queries, keys, is_causal, window, sinks):
    window = window if is_causal else None
    ids = rows = None
    if runs is not None:
        ids = np.concatenate([np.full(n, v, np.int32) for v, n in runs])
        queries, ids = keys, np.resize(ids, keys)
        rows = jnp.asarray(np.stack([ids, ids[::-1]]))
    options = {"is_causal": is_causal, "window": window, "sinks": sinks}
    ranges = visible.of_prefill(queries, keys, **options, segment_ids=rows)
    mask, sink, count = unfold(ranges, keys)
    oracle = reference_visibility(queries, keys, **options, segment_ids=rows)
    for row, one in enumerate([None] if ids is None else [ids, ids[::-1]]):
        expected, expected_sink = by_hand(one, queries, keys, **options)
        np.testing.assert_array_equal(mask[row], expected)
        np.testing.assert_array_equal(sink[row], expected_sink)
        np.testing.assert_array_equal(count[row], expected.sum(-1))
        np.testing.assert_array_equal(oracle[0][row], expected)
        np.testing.assert_array_equal(oracle[1][row], expected_sink)


@given(
    positions=st.lists(st.integers(-3, 25), min_size=3, max_size=3),
    length=st.integers(0, 20),
    window=st.none() | st.integers(1, 30),
    sinks=st.integers(0, 30),
)
def test_decode(positions, length, window, sinks):
    ranges = visible.of_decode(
        jnp.asarray(positions)[None],
        jnp.asarray([[length]]),
        window=window,
        sinks=sinks,
    )
    mask, sink, count = unfold(ranges, 20)
    expected = np.zeros((2, 3, 20), bool)
    for t, p in enumerate(positions):
        for j in range(min(p + 1, length)):
            expected[:, t, j] = sees(p, j, 0, window=window, sinks=sinks)
    np.testing.assert_array_equal(mask[0], expected[0])
    np.testing.assert_array_equal(sink[0], expected[1])
    np.testing.assert_array_equal(count[0], expected[0].sum(-1))


def test_what_is_not_asked_for_costs_nothing():
    full = visible.of_prefill(4, 5, is_causal=True)
    assert full.low is None and full.sink_high is None and full.sink_low is None
    assert full.high.tolist() == [[1, 2, 3, 4]]
    windowed = visible.of_decode(jnp.array([[7]]), jnp.array([[9]]), window=3)
    assert windowed.sink_high is None and windowed.low.tolist() == [[5]]


def test_spans_hold_what_is_seen_and_padding_does_not_widen_them():
    ranges = visible.of_prefill(90, 90, is_causal=True, window=5, sinks=2)
    tile = jax.tree.map(lambda x: jnp.pad(x[:, 70:80], [(0, 0), (0, 6)]), ranges)
    assert [tuple(map(int, span)) for span in tile.spans()] == [(0, 2), (66, 80)]
    nothing = jax.tree.map(jnp.zeros_like, tile)
    assert all(int(low) == int(high) for low, high in nothing.spans())


def test_windows_wider_than_any_integer():
    ranges = visible.of_prefill(3, 3, is_causal=True, window=2**40, sinks=2**40)
    assert ranges.count().tolist() == [[1, 2, 3]]
    ids = jnp.array([[0, 0, 1]])
    ranges = visible.of_prefill(
        3, 3, is_causal=True, window=2**40, sinks=2**40, segment_ids=ids
    )
    assert ranges.count().tolist() == [[1, 2, 1]]


def test_the_largest_cache():
    most, window = 2**31 - 32, 2**30 + 7
    last = jnp.array([[most - 1, -1, -(2**31)]], jnp.int32)
    seen = visible.of_decode(last, jnp.array([[most]]), window=window, sinks=2**31 - 1)
    assert seen.low.tolist() == [[most, 0, 0]]  # all others are sinks
    seen = visible.of_decode(last, jnp.array([[most]]), window=window)
    assert seen.low.tolist() == [[most - window, 0, 0]]
    assert seen.count().tolist() == [[window, 0, 0]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"window": 4, "is_causal": False},
            ValueError,
            "window=4 needs is_causal=True",
        ),
        ({"window": 0}, ValueError, "window must be an integer >= 1, got 0"),
        ({"window": 2.0}, ValueError, "window must be an integer"),
        ({"window": 2, "sinks": -1}, ValueError, "sinks must be .* >= 0, got -1"),
        ({"sinks": 3}, ValueError, "sinks must be 0 .* sinks=3.*ReLU.*give a window"),
        (
            {"sinks": 3, "activation": hsrjax.Softmax()},
            ValueError,
            r"sinks must be 0 .* sinks=3.*Softmax\(top_r",
        ),
        ({"segment_ids": jnp.zeros((1, 3))}, TypeError, "segment_ids .*got float32"),
        ({"segment_ids": jnp.zeros((1, 4), int)}, ValueError, r"must be \(1, 3\)"),
        ({"segment_ids": jnp.zeros(3, int)}, ValueError, r"must be \(1, 3\)"),
        (
            {"segment_ids": jnp.zeros((1, 3), int), "query": jnp.ones((1, 2, 4, 8))},
            ValueError,
            "T = 2 and S = 3; use segment_ids=None",
        ),
    ],
)
def test_static_mistakes_are_named(change, error, message):
    x = jnp.ones((1, 3, 4, 8))
    options = {"activation": hsrjax.ReLU(), "is_causal": True, "query": x} | change
    query = options.pop("query")
    with pytest.raises(error, match=message):
        hsrjax.attention(query, x, x, **options)
    if "segment_ids" in change or not options["is_causal"]:
        return
    del options["is_causal"]
    cache = hsrjax.init_cache(1, 4, 4, 8)
    with pytest.raises(error, match=message):
        hsrjax.decode_attention(x, cache, **options)
