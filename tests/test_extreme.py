"""Selections among scores that are neighbours, that tie, and that nearly overflow."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from tests.contract import slow


def after(x):
    """The next float32 number."""
    return np.nextafter(np.float32(x), np.float32(np.inf))


SCORES = {
    "neighbours": [1.0, after(1.0), -3.0, 0.5],
    "three in a row": [after(1.0), after(after(1.0)), 1.0, 0.0],
    "ties": [2.0, 2.0, 1.0, 1.0],
    "smallest numbers": [1.2e-38, 0.0, 2.4e-38, -1.2e-38],
    "both ends": [2.5e38, -2.5e38, 1.0, -1e38],
    "all at one end": [3.2e38, 3e38, after(3e38), -3.2e38],
    "huge neighbours": [3e38, after(3e38), 0.0, 1.0],
    "all far below": [-2.5e38, -2.6e38, -3e38, -3.3e38],
}
ACTIVATIONS = {
    "top 1": hsrjax.Softmax(top_r=1),
    "top 2": hsrjax.Softmax(top_r=2),
    "top 3": hsrjax.Softmax(top_r=3),
    "epsilon": hsrjax.Softmax(epsilon=0.1),
    "entmax": hsrjax.Entmax(),
    "sparsemax": hsrjax.Entmax(2.0),
}


def weights_of(scores, kept):
    weights = np.where(kept, np.exp(scores - scores.max()), 0.0)
    return weights / weights.sum()


def entmax_weights(scores, alpha):
    """By halving, in float64."""
    z = (alpha - 1) * (scores - scores.max())
    low, high = -1.0, 0.0
    for _ in range(100):
        tau = (low + high) / 2
        enough = (np.maximum(z - tau, 0) ** (1 / (alpha - 1))).sum() >= 1
        low, high = (tau, high) if enough else (low, tau)
    weights = np.maximum(z - low, 0) ** (1 / (alpha - 1))
    return weights / weights.sum()


FAST = [("top 2", "hsr"), ("top 2", "dense"), ("entmax", "hsr")]
REST = [
    (name, method)
    for name in ACTIVATIONS
    for method in ("dense", "hsr")
    if (name, method) not in FAST
]


@pytest.mark.exact
@pytest.mark.parametrize(("name", "method"), [*FAST, *slow(*REST)])
def test_what_is_kept_and_what_is_promised(name, method):
    """Keys are their scores and values unit vectors: outputs are the weights."""
    activation = ACTIVATIONS[name]
    attend = jax.jit(
        functools.partial(
            hsrjax.attention,
            activation=activation,
            method=method,
            scale=1.0,
            return_info=True,
        )
    )
    for case, first in SCORES.items():
        scores = np.full(60, min(first), np.float32)
        scores[:4] = first
        key, value = scores[None, :, None, None], np.eye(60, dtype=np.float32)
        out, info = attend(jnp.ones((1, 1, 1, 1)), key, value[None, :, None])
        out, exact = np.asarray(out)[0, 0, 0], scores.astype(np.float64)
        if name == "epsilon":
            assert info.missed_mass[0, 0, 0] <= 0.1, case
        elif activation.whole_rows and isinstance(activation, hsrjax.Softmax):
            kept = exact >= np.sort(exact)[-activation.top_r]
            assert info.count[0, 0, 0] == kept.sum(), case
            np.testing.assert_allclose(
                out, weights_of(exact, kept), atol=1e-6, err_msg=case
            )
        else:
            expected = entmax_weights(exact, activation.alpha)
            np.testing.assert_allclose(out, expected, atol=1e-6, err_msg=case)
        if isinstance(activation, hsrjax.Softmax):
            full = weights_of(exact, np.ones(60, bool))
            assert np.abs(out - full).max() <= info.error_bound[0, 0, 0], case


WEIGHTS = {
    "relu": hsrjax.ReLU(bias=0.3),
    "relu squared": hsrjax.ReLU(power=2, bias=0.3, normalize="none"),
    "top 4": hsrjax.Softmax(top_r=4),
    "entmax": hsrjax.Entmax(),
}


@pytest.mark.parametrize(
    "name", ["relu", *slow(("relu squared",), ("top 4",), ("entmax",))]
)
def test_gradients_are_not_finite_only_where_those_of_dense_are_not(name):
    """One number is no number; in a dense product it reaches whole rows and columns."""
    rng = np.random.default_rng(0)
    shapes = (1, 40, 2, 8), (1, 40, 1, 8), (1, 40, 1, 4), (40, 2), (1, 40, 2, 4)
    *given, cotangent = (np.float32(rng.standard_normal(shape)) for shape in shapes)
    places = ("query", "key", "value", "bias")[: 4 if "relu" in name else 3]
    spots = (0, 20, 1, 3), (0, 11, 0, 2), (0, 11, 0, 2), (20, 1)

    @functools.partial(jax.jit, static_argnames="method")
    def gradients(*arrays, method):
        def attend(query, key, value, bias=None):
            own = WEIGHTS[name]
            if bias is not None:
                own = dataclasses.replace(own, bias=bias)
            options = {"activation": own, "method": method, "is_causal": True}
            return hsrjax.attention(query, key, value, **options)

        return jax.vjp(attend, *arrays)[1](cotangent)

    for place, bad in itertools.product(places, (np.nan, np.inf, -np.inf)):
        arrays = {key: x.copy() for key, x in zip(places, given, strict=False)}
        arrays[place][spots[places.index(place)]] = bad
        pair = [gradients(*arrays.values(), method=way) for way in ("dense", "hsr")]
        dense, hsr = jax.device_get(pair)
        assert any(np.isfinite(x).any() for x in dense)
        for of, x, y in zip(arrays, dense, hsr, strict=True):
            fine, case = np.isfinite(x), f"{bad} in {place}, of {of}"
            np.testing.assert_allclose(
                y[fine], x[fine], rtol=1e-4, atol=1e-5, err_msg=case
            )


@pytest.mark.exact
def test_members_among_numbers_too_small_to_be_normal():
    """Flushed or not: what is a member stays one, and what becomes one is near zero."""
    keys = np.float32([4e-39, -4e-39, 0.0, 2e-38, 1e-39, -2e-38, 1.0])
    offsets = np.float32([1e-40, -1e-40, 4e-39, 0.0, 3e-38, -1.5e-38])
    index = hsrjax.build(keys[:, None])
    normals = jnp.ones((len(offsets), 1))
    report = hsrjax.query(index, normals, offsets, capacity=8)
    flush = lambda x: np.where(np.abs(x) < np.finfo(np.float32).tiny, 0.0, x)
    for row, offset in enumerate(offsets):
        exact = set(np.flatnonzero(np.float64(keys) >= np.float64(offset)))
        flushed = set(np.flatnonzero(flush(keys) >= flush(offset)))
        found = set(np.asarray(report.indices[row])[: int(report.count[row])].tolist())
        assert exact <= found <= flushed, offset
    np.testing.assert_array_equal(report.count, hsrjax.count(index, normals, offsets))
