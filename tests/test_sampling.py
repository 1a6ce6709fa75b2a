"""Which tokens are drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoding.sampling import sample


def draw(logits, count, **options):
    """Tokens drawn `count` times from the same logits."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.asarray(sample(rows, jax.random.key(0), **options))


def test_temperature_zero_is_argmax_with_ties_to_the_smaller():
    assert set(draw([0.0, 3.0, 3.0, 1.0], 2000, temperature=0.0).tolist()) == {1}


def test_draws_follow_the_softmax_of_the_tempered_logits():
    logits, count = np.array([0.0, 1.0, 2.0, -1.0]), 20_000
    for temperature in (0.5, 1.0, 2.0):
        drawn = draw(logits, count, temperature=temperature)
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        observed = np.bincount(drawn, minlength=4) / count
        np.testing.assert_allclose(observed, expected, atol=5 / np.sqrt(count))


def test_top_k_keeps_exactly_k_also_among_ties():
    drawn = draw([1.0, 5.0, 1.0, 4.0], 2000, top_k=3, temperature=5.0)
    assert set(drawn.tolist()) == {0, 1, 3}
    drawn = draw([1.0, 5.0, 1.0, 4.0], 2000, top_k=1, temperature=5.0)
    assert set(drawn.tolist()) == {1}


@pytest.mark.parametrize(
    ("top_p", "support"),
    [(0.05, {2}), (0.55, {2, 0}), (0.85, {2, 0, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_shortest_list_that_holds_the_mass(top_p, support):
    drawn = draw(np.log([0.3, 0.05, 0.5, 0.15]), 2000, top_p=top_p)
    assert set(drawn.tolist()) == support


def test_top_p_counts_what_top_k_left():
    drawn = draw(np.log([0.4, 0.3, 0.2, 0.1]), 2000, top_k=2, top_p=0.56)
    assert set(drawn.tolist()) == {0}  # of 0.7, the first token holds 0.57


@pytest.mark.parametrize(
    ("min_p", "support"),
    [(0.09, {0, 1, 2, 3}), (0.11, {0, 2, 3}), (0.5, {0, 2}), (1.0, {2})],
)
def test_min_p_keeps_what_is_a_share_of_the_most_probable(min_p, support):
    drawn = draw(np.log([0.3, 0.05, 0.5, 0.15]), 2000, min_p=min_p)
    assert set(drawn.tolist()) == support
    cut = draw(np.log([0.3, 0.05, 0.5, 0.15]), 2000, min_p=min_p, top_k=3)
    assert set(cut.tolist()) == support & {0, 2, 3}


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.5}])
@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-300])
def test_the_coldest_temperatures_draw_the_most_probable(options, temperature):
    logits = [0.0, 20.0, 100.0, 99.0]
    assert set(draw(logits, 3, temperature=temperature, **options).tolist()) == {2}
    huge = [-3e38, 3e38, 0.0, 2.9e38]
    assert set(draw(huge, 3, temperature=temperature, **options).tolist()) == {1}


def test_all_of_the_probability_is_every_token():
    """A sum of float32 may reach 1 before the last of them, so that none is made."""
    logits = [0.0, 1.0, 2.0, 3.0]
    np.testing.assert_array_equal(draw(logits, 50, top_p=1.0), draw(logits, 50))


def test_rows_are_drawn_independently_and_the_seed_decides():
    logits = jnp.zeros((64, 100))
    first = sample(logits, jax.random.key(1))
    assert len(set(first.tolist())) > 20
    np.testing.assert_array_equal(first, sample(logits, jax.random.key(1)))
    assert (first != sample(logits, jax.random.key(2))).any()
