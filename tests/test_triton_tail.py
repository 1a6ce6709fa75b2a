"""Keys that softmax leaves to a tail, by fused kernels: within the bound, near it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from hsrjax._src.activations.softmax import Reported
from hsrjax._src.activations.tail import sketch_values
from hsrjax._src.core.tiles import Tiles
from hsrjax._src.core.visible import Visible
from hsrjax._src.kernels.triton import launch, select
from tests.contract import slow
from tests.kernels import NAME, PLAYED, decode
from tests.test_triton import with_heavy_keys

pytestmark = pytest.mark.usefixtures("fused_kernels")


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
    out, info = decode(cache, query, activation)
    by_xla, expected = decode(cache, query, activation, "xla")
    full, _ = decode(cache, query, hsrjax.Softmax(), "xla", "dense")
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


@pytest.mark.parametrize("tail", [1, 32])
def test_no_key_acts_on_a_query_that_must_not_see_it(tail):
    """Not by the mean value of its group either."""
    cache, query = with_tail(tail, new=3)
    last = int(cache.length[0]) - 1
    rows = cache.values.rows.at[0, :, last].add(1e30)
    sketch = sketch_values(rows, tail)
    values = cache.values._replace(rows=rows, sketch=sketch)
    other = dataclasses.replace(cache, values=values)
    activation = hsrjax.Softmax(top_r=8, tail=tail)
    (out, _), (changed, _) = (decode(x, query, activation) for x in (cache, other))
    np.testing.assert_array_equal(changed[0, :2], out[0, :2])
    assert (changed[0, 2] != out[0, 2]).any()


@pytest.mark.parametrize(("too_high", "tokens"), [(8.0, 310), (1e3, 230)])
def test_a_guess_that_misses_some_of_the_best_is_noticed(too_high, tokens, monkeypatch):
    """Then the row is summed over all keys: the best r are always looked at.

    Sizes are those of no other test, which would leave its program to this one.
    """
    cache, query = with_heavy_keys(jnp.float32, tokens=tokens)
    rows = cache.values.rows
    values = cache.values._replace(sketch=sketch_values(rows, 4))
    cache = dataclasses.replace(cache, values=values)
    guessed = select.guessed
    monkeypatch.setattr(select, "guessed", lambda *given: guessed(*given) + too_high)
    out, info = decode(cache, query, hsrjax.Softmax(top_r=40, tail=4))
    full, _ = decode(cache, query, hsrjax.Softmax(), "xla", "dense")
    wrong = jnp.max(jnp.abs(out - full), axis=-1)
    assert (wrong <= info.error_bound + 1e-5).all()
    length = cache.length[:, None, None]
    assert (info.count >= 40).all()
    assert (info.count == length).any()
    assert too_high < 1e3 or (info.count == length).all()


@pytest.mark.parametrize("name", ["xla", NAME])
def test_a_key_of_a_huge_norm_leaves_a_bound(name):
    """One far below, in bounds so wide that exp overflows."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal((1, *shape)).astype(np.float32)
    query, key, value = 4 * draw(1, 1, 32), draw(256, 1, 32), draw(256, 1, 8)
    away = query[0, 0] / np.linalg.norm(query)
    key[0, 70] = -3000 * away + 200 * draw(1, 32)[0]
    cache = hsrjax.init_cache(1, 256, 1, 32, value_dim=8, tail=1)
    cache = hsrjax.extend(cache, jnp.asarray(key), jnp.asarray(value))
    out, info = decode(cache, jnp.asarray(query), hsrjax.Softmax(top_r=8, tail=1), name)
    full, _ = decode(cache, jnp.asarray(query), hsrjax.Softmax(), "xla", "dense")
    assert jnp.max(jnp.abs(out - full)) <= info.error_bound
    assert info.candidates < 256


def test_a_tail_knows_how_wrong_its_weights_may_be():
    cache, _ = with_tail(8)
    rng = np.random.default_rng(6)
    queries = jnp.asarray(0.05 * rng.standard_normal((1, 2, 3, 2, 32)), jnp.float32)
    index, values, offset = cache.index, cache.values, 0.5
    length = jnp.broadcast_to(cache.length[None, :, None, None], (1, 2, 3, 2))
    tiles = Tiles(queries, Reported(jnp.full(length.shape, offset)), Visible(length))
    options = launch.Options(True, NAME == PLAYED, weighed=True, group=8)
    _, sums, left = jax.jit(
        lambda: launch.reported(options, tiles, index, values.rows, values.sketch)
    )()
    scores = np.einsum("mbkqh,bksh->mbkqs", queries, index.keys, dtype=np.float64)
    seen = np.arange(index.keys.shape[-2]) < np.asarray(length)[..., None]
    mass = np.sum(np.where(seen, np.exp(scores - offset), 0.0), axis=-1)
    listed = np.asarray(sums.total * jnp.exp(sums.peak - offset), np.float64)
    off = np.abs(listed + np.asarray(left.total) - mass)
    assert (off <= 1e-5 * mass + np.asarray(left.wrong)).all()
    # What scores are away from the middle of their bounds shows.
    assert (off > 1e-4 * mass).any()
    assert (left.wrong <= 0.2 * left.total).all()
