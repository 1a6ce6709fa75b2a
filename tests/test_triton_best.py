"""Top r and entmax in decode by fused kernels: the same keys as all scores say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from hsrjax._src.activations.entmax import threshold
from hsrjax._src.kernels.triton import best, rules
from tests.contract import relative_error, slow
from tests.kernels import NAME, decode
from tests.test_triton import with_heavy_keys

TOP_8, ENTMAX = hsrjax.Softmax(top_r=8), hsrjax.Entmax()


pytestmark = pytest.mark.usefixtures("fused_kernels")


def check(cache, query, activation):
    """Keys, values and certificate, against all scores; what was found."""
    found = decode(cache, query, activation)
    exact = decode(cache, query, activation, "xla", "dense")
    full = decode(cache, query, hsrjax.Softmax(), "xla", "dense")
    rounding = 1e-2 if query.dtype == jnp.bfloat16 else 3e-5
    out, dense, full = (np.asarray(x, np.float32) for x, _ in (found, exact, full))
    (_, info), (_, exact) = found, exact
    np.testing.assert_allclose(out, dense, atol=rounding)
    np.testing.assert_array_equal(info.count, exact.count)
    assert (info.candidates >= info.count).all()
    if isinstance(activation, hsrjax.Softmax):
        wrong = np.max(np.abs(out - full), axis=-1)
        assert (wrong <= info.error_bound + rounding).all()
        # As much as dense leaves out, and hardly more: it is bounded but for what was
        # looked at.
        assert (info.missed_mass >= 0.99 * exact.missed_mass).all()
        assert (info.missed_mass <= 3 * exact.missed_mass + 1e-6).all()
    return info


@pytest.mark.parametrize(
    "activation",
    [TOP_8, ENTMAX, *slow((hsrjax.Softmax(top_r=90),), (hsrjax.Entmax(2.0),))],
)
@pytest.mark.parametrize("dtype", [jnp.float32, *slow((jnp.bfloat16,))])
def test_the_best_keys_and_no_others(activation, dtype):
    cache, query = with_heavy_keys(dtype)
    info = check(cache, query, activation)
    looked = info.candidates / cache.length[:, None, None]
    assert float(jnp.mean(looked)) < 0.4


@pytest.mark.parametrize("activation", [TOP_8, *slow((ENTMAX,))])
def test_a_guess_that_is_too_high_is_noticed(activation, monkeypatch):
    """Then a row is done over all of its keys.

    Sizes are those of no other test, which would leave its program to this one.
    """
    cache, query = with_heavy_keys(jnp.float32, tokens=330)
    guessed = best.guessed
    monkeypatch.setattr(best, "guessed", lambda *given: guessed(*given) + 40.0)
    info = check(cache, query, activation)
    assert (info.candidates == cache.length[:, None, None]).all()


@pytest.mark.parametrize("activation", [TOP_8, *slow((ENTMAX,))])
def test_more_ties_than_lists_have_room_for(activation):
    _, query = with_heavy_keys(jnp.float32)
    key = jnp.ones((2, 280, 3, 32))
    cache = hsrjax.init_cache(2, 280, 3, 32, value_dim=8)
    value = jnp.arange(2 * 280 * 3 * 8, dtype=jnp.float32).reshape(2, 280, 3, 8) % 7
    cache = hsrjax.extend(cache, key, value)
    out, info = decode(cache, query, activation)
    assert (info.count == 280).all()
    mean = jnp.repeat(jnp.mean(value, axis=1, keepdims=True), 2, axis=2)
    np.testing.assert_allclose(out, mean, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("activation", [TOP_8, ENTMAX])
def test_what_is_not_finite_is_as_in_dense(activation):
    cache, query = with_heavy_keys(jnp.float32, tokens=300)
    key = jnp.zeros((2, 1, 3, 32)).at[0, :, 0].set(jnp.nan).at[1, :, 1].set(1e38)
    cache = hsrjax.extend(cache, key, jnp.ones((2, 1, 3, 8)))
    out, _ = decode(cache, query, activation)
    dense, _ = decode(cache, query, activation, "xla", "dense")
    assert jnp.isnan(out[0, 0, 0]).all()
    np.testing.assert_allclose(out, dense, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("activation", [TOP_8, ENTMAX])
def test_gradients_are_those_of_two_steps(activation):
    cache, query = with_heavy_keys(jnp.float32, tokens=300)
    loss = lambda name: (
        lambda q: jnp.sum(jnp.sin(decode(cache, q, activation, name)[0]))
    )
    got, expected = (jax.grad(loss(name))(query) for name in (NAME, "xla"))
    assert relative_error(got, expected) < 1e-3


INF = float("inf")
AWKWARD = {
    "ties": [1.0, 2.0, 2.0, 2.0, 0.5],
    "zeros": [0.0, -0.0, -1.0, -0.0, 0.0],
    "neighbours": [1.0, np.nextafter(np.float32(1), np.float32(2)), -3.0, 1.0],
    "both ends": [3e38, -3e38, 1e-45, -1e-45, 0.0, 3e38],
    "one": [-INF, -2.5, -INF],
    "none": [-INF, -INF],
}


@pytest.mark.parametrize("scores", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_last_of_the_best(scores, rank):
    scores = jnp.pad(
        jnp.asarray(scores, jnp.float32), (0, 8 - len(scores)), constant_values=-INF
    )
    expected = jnp.sort(scores)[-rank]
    rule = rules.TopR(rank)
    all_of_it = lambda measure, start: start + measure(scores)
    for by in (rule.settle(scores), rule.settle_all(all_of_it, jnp.max(scores))):
        assert by.offset == expected
        fires = (scores >= expected) & (scores > -INF)
        np.testing.assert_array_equal(rule.fires(scores, by), fires)


@pytest.mark.parametrize("scores", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("power", [1, 2])
def test_the_threshold_of_entmax(scores, power):
    scores = jnp.asarray(scores, jnp.float32)
    tau, rule = threshold(scores, power), rules.Gap(power)
    all_of_it = lambda measure, start: start + measure(scores)
    for by in (rule.settle(scores), rule.settle_all(all_of_it, jnp.max(scores))):
        np.testing.assert_allclose(by.offset, tau, rtol=1e-6, atol=1e-6)
        total = jnp.sum(rule.weigh(scores, by))
        np.testing.assert_allclose(total > 0, tau < INF)
