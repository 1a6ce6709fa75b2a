"""Keys that softmax leaves to a tail, by fused kernels: within the bound, near it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from tests.contract import slow
from tests.kernels import NAME, known
from tests.test_triton import with_heavy_keys


@pytest.fixture(autouse=True, scope="module")
def played():
    with known():
        yield


def attend(cache, query, activation, name=NAME, method="hsr"):
    return jax.jit(
        lambda cache, query: hsrjax.decode_attention(
            query, cache, activation=activation, method=method, implementation=name
        )
    )(cache, query)


def with_tail(tail, dtype=jnp.float32, new=1):
    """A cache whose values are alike within groups, and queries of some tokens."""
    cache, query = with_heavy_keys(dtype)
    keys, values = (
        np.asarray(x, np.float32) for x in (cache.index.keys, cache.values.rows)
    )
    token = np.arange(values.shape[-2])[:, None]
    smooth = np.sin(token / 50 + np.arange(8)) + 0.05 * values
    grown = hsrjax.init_cache(2, 760, 3, 32, value_dim=8, dtype=dtype, tail=tail)
    swap = lambda x: jnp.asarray(np.swapaxes(x, 1, 2)[:, :700], dtype)
    lengths = jnp.array([700, 350])
    grown = hsrjax.extend(grown, swap(keys), swap(smooth), lengths=lengths)
    return grown, jnp.repeat(query, new, axis=1)


@pytest.mark.parametrize(
    ("activation", "new"),
    [
        (hsrjax.Softmax(epsilon=0.1, tail=8), 1),
        (hsrjax.Softmax(top_r=8, tail=8), 3),
        *slow(
            (hsrjax.Softmax(epsilon=0.01, tail=1), 3),
            (hsrjax.Softmax(epsilon=0.3, tail=32), 3),
            (hsrjax.Softmax(top_r=8, tail=1), 1),
            (hsrjax.Softmax(top_r=2, tail=32), 1),
        ),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, *slow((jnp.bfloat16,))])
def test_what_is_left_out_acts(activation, new, dtype):
    cache, query = with_tail(activation.tail, dtype, new)
    out, info = attend(cache, query, activation)
    by_xla, expected = attend(cache, query, activation, "xla")
    full, _ = attend(cache, query, hsrjax.Softmax(), "xla", "dense")
    out, by_xla, full = (np.asarray(x, np.float32) for x in (out, by_xla, full))
    rounding = 1e-2 if dtype == jnp.bfloat16 else 1e-5
    wrong = np.max(np.abs(out - full), axis=-1)
    assert (wrong <= info.error_bound + rounding).all()
    if activation.epsilon is not None:
        assert (info.missed_mass <= activation.epsilon).all()
    # As good as two steps, which know all bounds and look at fewer keys.
    assert wrong.max() <= 2 * np.abs(by_xla - full).max() + rounding
    assert np.mean(info.error_bound) <= 2 * np.mean(expected.error_bound) + rounding
    assert np.mean(info.count) <= 5 * np.mean(expected.count)
    assert np.mean(info.missed_mass) > 0
