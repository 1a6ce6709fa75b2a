"""Offsets found by counting are those that sorting finds."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from hsrjax._src.activations import search

at_ranks = jax.jit(search.at_ranks, static_argnums=1)


def sorted_ranks(scores, rank):
    """The r-th largest of each row and the next, -inf where there is none."""
    last, after = (
        np.sort(scores, axis=-1)[:, -i]
        if i <= scores.shape[-1]
        else np.full(len(scores), -np.inf)
        for i in (rank, rank + 1)
    )
    return last, np.where(last == -np.inf, -np.inf, after)


def rows_of(kind):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((8, 300)).astype(np.float32)
    if kind == "sink":
        rows[:, 0] += 30
    elif kind == "floor":
        rows[:, ::7] -= 1e6
    elif kind == "ties":
        rows = np.round(rows, 1)
    elif kind == "crowd":
        rows = np.float32(1) + np.float32(2.0**-22) * np.round(100 * rows)
    elif kind == "tiny":
        rows *= np.float32(1e-30)
    elif kind == "huge":
        rows *= np.float32(1e37)
    elif kind == "causal":
        rows[np.arange(300) >= 40 * np.arange(8)[:, None]] = -np.inf
    return rows.astype(np.float32)


KINDS = ("normal", "sink", "floor", "ties", "crowd", "tiny", "huge", "causal")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 16, 299, 300, 301])
def test_ranks_are_those_of_a_sort(kind, rank):
    rows = rows_of(kind)
    for found, expected in zip(
        at_ranks(rows, rank), sorted_ranks(rows, rank), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_nothing_is_ranked_beside_what_is_not_finite():
    for odd in (np.nan, np.inf):
        rows = rows_of("normal")
        rows[1, 5] = odd
        last, after = at_ranks(rows, 3)
        assert last[1] == after[1] == -jnp.inf
        assert np.isfinite(np.delete(np.asarray(last), 1)).all()


@hypothesis.given(st.integers(0, 20_000), st.floats(0, 1))
@hypothesis.settings(max_examples=15)
def test_counts_of_any_size(size, share):
    mask = np.random.default_rng(size).uniform(size=(2, size)) < share
    np.testing.assert_array_equal(search.count(jnp.asarray(mask)), mask.sum(-1))


def test_a_byte_holds_what_is_added_up_in_it():
    size = search._LANES * search._MOST_ADDED * 3 + 5
    assert (search.count(jnp.ones((2, size), bool)) == size).all()


def test_masked_sums():
    rng = np.random.default_rng(0)
    mask, terms = rng.uniform(size=(3, 500)) < 0.4, rng.uniform(size=(3, 500))
    found = search.masked_sum(jnp.asarray(mask), jnp.asarray(terms, jnp.float32))
    np.testing.assert_allclose(found, np.where(mask, terms, 0).sum(-1), rtol=1e-6)


def test_ordinary_scores_take_few_passes():
    rows = jnp.asarray(rows_of("normal"))
    passes = []

    def measure(offset):
        jax.debug.callback(lambda: passes.append(1))
        return search.rank_measure(rows, 16)(offset)

    bracket = search.rank_bracket(rows, 16)[1]
    jax.block_until_ready(
        search.largest_offset(measure, bracket, slack=0.125, resolution=1e-4)
    )
    jax.effects_barrier()
    assert 1 <= len(passes) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("sinks", [0, 3])
def test_top_r_keeps_the_same_keys_whether_picked_or_counted(sinks):
    """A capacity above 2 r picks the best scores in each pass, a smaller one counts."""
    keys = jax.random.split(jax.random.key(7), 3)
    q, k, v = (jax.random.normal(key, (1, 96, 2, 16)) for key in keys)
    k = k.at[:, 40:44].set(k[:, 40:41])  # scores that are equal
    found = {
        capacity: hsrjax.attention(
            q,
            k,
            v,
            activation=hsrjax.Softmax(top_r=5),
            method="hsr",
            is_causal=True,
            sinks=sinks,
            window=48 if sinks else None,
            capacity=capacity,
            return_info=True,
        )
        for capacity in (8, 64)
    }
    (counted, info), (picked, other) = found.values()
    np.testing.assert_allclose(counted, picked, atol=1e-6)
    np.testing.assert_array_equal(info.count, other.count)
    np.testing.assert_allclose(info.missed_mass, other.missed_mass, atol=1e-6)
