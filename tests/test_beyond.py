"""What is special about entmax, and about activations with closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from hsrjax._src.activations import closed, entmax
from hsrjax._src.core import visible
from hsrjax._src.kernels.xla import select
from tests.contract import inputs, reference_attention, relative_error, slow

METHODS = ["dense", "hsr"]


def exact_threshold(z, power):
    """tau of f64[S] by bisection, which no method uses."""
    low, high = z.max() - 1.0, z.max()
    for _ in range(100):
        middle = 0.5 * (low + high)
        over = np.maximum(z - middle, 0.0) ** power
        low, high = (middle, high) if over.sum() >= 1 else (low, middle)
    return low


def attend(query, key, value, activation, method="hsr", **options):
    call = functools.partial(
        hsrjax.attention, method=method, return_info=True, **options
    )
    return jax.jit(call)(query, key, value, activation=activation)


@pytest.mark.parametrize("power", [1, 2])
def test_threshold_is_exact(power):
    generator = np.random.default_rng(power)
    rows = generator.normal(size=(40, 96)) * np.logspace(-3, 3, 40)[:, None]
    rows[3], rows[4, 5:] = 0.7, rows[4, 4]  # ties
    rows = rows.astype(np.float32)
    tau = jax.jit(entmax.threshold, static_argnums=1)(jnp.asarray(rows), power)
    expected = [exact_threshold(row, power) for row in rows.astype(np.float64)]
    np.testing.assert_allclose(tau, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 100.0])
def test_bounds_on_scores_bracket_the_threshold(power, spread):
    generator = np.random.default_rng(7)
    z = (spread * generator.normal(size=(30, 512))).astype(np.float32)
    slack = np.float32(0.1) * generator.random(z.shape, np.float32)
    lower, upper = z - slack, z + slack
    lower[:, ::7] = -np.inf  # nothing is known of these
    low = np.asarray(entmax.safe_threshold(jnp.asarray(lower), power), np.float64)
    for row in range(30):
        tau = exact_threshold(z[row].astype(np.float64), power)
        assert low[row] <= tau
        assert tau <= exact_threshold(upper[row].astype(np.float64), power)
        # No key that weighs anything is ruled out.
        assert (upper[row][z[row] > tau] > low[row]).all()
    everything = np.asarray(entmax.safe_threshold(jnp.asarray(z), power), np.float64)
    assert (everything >= z.max(-1) - 1.001 - 1e-3 * spread).all()
    nothing = entmax.safe_threshold(jnp.full((1, 64), -jnp.inf), power)
    assert (nothing == -jnp.inf).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alpha", [1.5, *slow((2.0,))])
def test_entmax_reports_its_support(alpha, method, monkeypatch):
    """Values are unit vectors, so the output is the weights themselves."""
    monkeypatch.setattr(select, "_KEPT", 8)  # the reported keys take further runs
    query, key, _, _ = inputs((1, 20, 300, 1, 1, 16, 1), seed=4)
    # No query sees this coordinate, but it makes all bounds but of one half loose.
    query = (query * 3).at[..., 15].set(0.0)
    key = key.at[0, :150:32, 0, 15].set(30.0)
    value = jnp.eye(300)[None, :, None]
    activation = hsrjax.Entmax(alpha)
    out, info = attend(query, key, value, activation, method, capacity=8)
    weights = np.asarray(out)[0, :, 0]
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    scores = np.asarray(query, np.float64)[0, :, 0] @ np.asarray(key)[0, :, 0].T / 4
    power = 2 if alpha == 1.5 else 1
    z = (alpha - 1) * scores
    tau = np.array([exact_threshold(row, power) for row in z])[:, None]
    np.testing.assert_allclose(weights, np.maximum(z - tau, 0) ** power, atol=3e-6)
    support = np.abs(z - tau) < 1e-5
    count, surely = np.asarray(info.count)[0, :, 0], (z > tau).sum(-1)
    assert (np.abs(count - surely) <= support.sum(-1)).all()
    if method == "hsr":
        assert (np.asarray(info.candidates) < 300).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alpha", [1.5, *slow((2.0,))])
def test_entmax_gradients_are_those_of_float64(alpha, method):
    """By central differences of the weights from bisection."""
    query, key, value, cotangent = inputs((1, 1, 40, 1, 1, 4, 3), seed=6)
    power = 2 if alpha == 1.5 else 1

    def loss64(q):
        z = (alpha - 1) * (np.asarray(key, np.float64)[0, :, 0] @ q) / 2
        weights = np.maximum(z - exact_threshold(z, power), 0) ** power
        return weights @ np.asarray(value)[0, :, 0] @ np.asarray(cotangent)[0, 0, 0]

    def loss(q):
        out, _ = attend(q, key, value, hsrjax.Entmax(alpha), method)
        return jnp.vdot(out, cotangent)

    got = np.asarray(jax.grad(loss)(query))[0, 0, 0]
    at = np.asarray(query, np.float64)[0, 0, 0]
    steps = 1e-6 * np.eye(4)
    expected = [(loss64(at + e) - loss64(at - e)) / 2e-6 for e in steps]
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("method", ["hsr", *slow(("dense",))])
@pytest.mark.parametrize("name", ["entmax", "prelu"])
def test_rows_that_see_nothing_or_no_number(name, method):
    query, key, value, _ = inputs((1, 6, 40, 1, 1, 8, 4))
    key = key.at[0, 30].set(jnp.nan)
    activation = hsrjax.Entmax() if name == "entmax" else hsrjax.PReLU()
    cache = hsrjax.init_cache(1, 40, 1, 8, value_dim=4)
    cache = hsrjax.extend(cache, key, value)
    if name == "entmax":
        positions = jnp.array([[-1, 5, 29, 30, 39, -7]], jnp.int32)
        out, info = hsrjax.decode_attention(
            query,
            cache,
            activation=activation,
            method=method,
            positions=positions,
        )
        assert (np.asarray(out)[0, [0, 5]] == 0).all()
        assert (np.asarray(info.count)[0, [0, 5]] == 0).all()
        spoiled = np.array([False, False, False, True, True, False])
    else:
        query = jnp.pad(query, [(0, 0), (27, 7), (0, 0), (0, 0)])
        out, _ = attend(query, key, value, activation, method, is_causal=True, window=3)
        spoiled = np.zeros(40, bool)
        spoiled[30:33] = True  # not those whose window is past it
    np.testing.assert_array_equal(np.isnan(np.asarray(out)[0, :, 0]).any(-1), spoiled)


@pytest.mark.parametrize("activation", [hsrjax.CELU(0.1, normalize="none")])
def test_saturated_keys_are_exact_without_being_looked_at(activation):
    """One key in reach, the others at the constant to the last bit of float32."""
    x = jnp.arange(1, 65, dtype=jnp.float32)
    key = jnp.where(x == 9, 0.5, -1.74 - 0.01 * x)[None, :, None, None]
    value = jnp.eye(64)[None, :, None]
    out, info = attend(jnp.ones((1, 1, 1, 1)), key, value, activation, scale=1.0)
    expected = np.where(x == 9, np.float32(0.5), np.float32(-0.1))
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=2e-7)
    exact = 0.1 * np.expm1(-(1.74 + 0.01 * np.asarray(x, np.float64)) / 0.1)
    assert (np.abs(exact + 0.1)[x != 9] <= 0.1 * 2.0**-25).all()
    assert int(info.count[0, 0, 0]) == 1 and int(info.candidates[0, 0, 0]) < 3


def test_sums_of_ranges_far_from_zero():
    """Running sums are about the mean: a short window keeps its digits."""
    x = 100.0 + np.random.default_rng(0).normal(size=(1, 1, 5000, 2))
    x = x.astype(np.float32)
    seen = visible.of_prefill(5000, 5000, is_causal=True, window=4, sinks=2)
    seen = jax.tree.map(lambda i: jnp.broadcast_to(i, (1, 5000)), seen)
    got = np.asarray(closed.sum_ranges(jnp.asarray(x), seen))[0, 0]
    exact = x.astype(np.float64)[0, 0]
    for i in (0, 1, 2, 63, 64, 4999):
        rows = {*range(max(0, i - 3), i + 1), *range(min(2, i + 1))}
        np.testing.assert_allclose(got[i], exact[sorted(rows)].sum(0), rtol=1e-6)


def test_bfloat16_and_auto():
    query, key, value, _ = inputs((1, 30, 30, 2, 1, 8, 8), dtype=jnp.bfloat16)
    for activation in (hsrjax.Entmax(), hsrjax.SELU()):
        out, _ = attend(query, key, value, activation, "auto", is_causal=True)
        assert out.dtype == jnp.bfloat16
        expected = reference_attention(
            query, key, value, activation=activation, is_causal=True
        )
        assert relative_error(out.astype(jnp.float32), expected) <= 8e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hsrjax.Entmax(1.2), "alpha must be 1.5 or 2.0, got 1.2"),
        (lambda: hsrjax.CELU(alpha=0.0), "alpha must be a Python number > 0, got 0.0"),
        (lambda: hsrjax.PReLU(normalize="row_sum"), "PReLU: normalize must be"),
        (lambda: hsrjax.SELU(normalize="row_sum"), "SELU: normalize must be"),
        (lambda: hsrjax.CELU(normalize="rows"), "CELU: normalize must be"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_slope_that_fits_no_row_is_refused():
    query, key, value, _ = inputs((1, 3, 3, 2, 1, 8, 8))
    activation = hsrjax.PReLU(slope=jnp.ones(5))
    with pytest.raises(ValueError, match="slope must broadcast"):
        attend(query, key, value, activation)
