"""The bounds hold for every float32 score, in any summation order, for any input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import hsrjax
from hsrjax._src.core import arrays
from hsrjax._src.index.balls import Balls
from hsrjax._src.index.sketch import Sketch
from tests.contract import slow

pytestmark = pytest.mark.exact
KEYS, QUERIES = 64, 5


def sketched(keys, queries):
    index = hsrjax.build(keys, reorder=False)
    coded = index.sketch.code(queries)
    products = arrays.integer_product(coded.codes, index.sketch.codes)
    lower, upper = index.sketch.intervals(queries)
    blocks = jax.lax.map(coded.thresholds, _offsets(keys, queries))
    balls = Balls.build(keys, jnp.ones(KEYS, bool), index.sketch.centre, size=32)
    cells = balls.upper(queries)[:, : KEYS // 32]
    return lower, upper, products, blocks, cells


def _offsets(keys, queries):
    """Every query with every one of its own scores as the offset: all ties."""
    return arrays.dot(queries, keys).T


run = jax.jit(sketched)


def float32_scores(keys, queries):
    """The same products summed forwards, backwards and pairwise, all in float32."""
    with np.errstate(all="ignore"):
        terms = queries[:, None, :] * keys[None, :, :]
        forwards = np.zeros(terms.shape[:2], np.float32)
        for h in range(terms.shape[-1]):
            forwards = forwards + terms[..., h]
        backwards = np.zeros(terms.shape[:2], np.float32)
        for h in reversed(range(terms.shape[-1])):
            backwards = backwards + terms[..., h]
        return [forwards, backwards, terms.sum(-1, dtype=np.float32)]


def check(keys, queries):
    keys, queries = keys.astype(np.float32), queries.astype(np.float32)
    lower, upper, products, levels, cells = (np.asarray(x) for x in run(keys, queries))
    own = np.asarray(arrays.dot(queries, keys))
    for scores in [*float32_scores(keys, queries), own]:
        usable = ~np.isnan(scores)
        assert (lower <= scores)[usable].all() and (scores <= upper)[usable].all()
        per_key = np.repeat(cells, 32, axis=-1)
        assert not (per_key < scores)[usable].any()  # NaN rules out nothing
    # With its own score as the offset, no key is below its block's integer.
    for key, score in enumerate(own.T):
        passing = products[:, key] >= levels[key][:, key // 32]
        assert passing[~np.isnan(score)].all()


floats = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1.0, 1e-30, -1e30])


@given(
    keys=hnp.arrays(np.float32, (KEYS, 6), elements=floats),
    queries=hnp.arrays(np.float32, (QUERIES, 6), elements=floats),
)
def test_any_numbers(keys, queries):
    check(keys, queries)


@pytest.mark.parametrize("h", [1, 64, *slow((8,), (256,))])
@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-3, 1.0, 1e18, 1e30, 1e37])
def test_sizes(h, size):
    rng = np.random.default_rng(h)
    keys = rng.standard_normal((KEYS, h)) * size
    check(keys, rng.standard_normal((QUERIES, h)))
    check(rng.standard_normal((KEYS, h)), rng.standard_normal((QUERIES, h)) * size)


def test_numbers_whose_squares_or_products_are_flushed():
    rng = np.random.default_rng(0)
    keys, queries = rng.standard_normal((KEYS, 64)), rng.standard_normal((QUERIES, 64))
    check(keys * 1e-37, queries * 1e30)  # too small to be coded, scores are not
    signs = np.sign(keys[:, :1]) * 8e-18
    check(np.repeat(signs, 64, axis=1), np.full((QUERIES, 64), 8e-18))


@pytest.mark.parametrize("h", [3, 64])
def test_wide_range_outlier_and_worst_signs(h):
    rng = np.random.default_rng(0)
    exponent = rng.uniform(-30, 8, (KEYS, 1))
    check(
        rng.standard_normal((KEYS, h)) * 10.0**exponent, rng.normal(size=(QUERIES, h))
    )
    keys = rng.standard_normal((KEYS, h))
    keys[7] *= 1e30
    check(keys, rng.standard_normal((QUERIES, h)))
    # Coordinates half way between codes, all errors of one sign.
    step = np.ones((KEYS, h)) / 127
    halves = step * (rng.integers(-100, 100, (KEYS, h)) + 0.499)
    halves[:, 0] = 1.0
    check(halves, np.ones((QUERIES, h)) * (1 + np.arange(QUERIES)[:, None]))


@pytest.mark.parametrize("h", [64, *slow((2,), (1024,))])
def test_keys_that_the_sketch_holds_exactly(h):
    """Nothing but the rounding of the scores themselves is left to bound."""
    rng = np.random.default_rng(h)
    one = rng.standard_normal((1, h)).astype(np.float32)
    queries = rng.standard_normal((QUERIES, h))
    same = np.repeat(one, KEYS, axis=0)
    direction = np.float32(np.where(rng.random((KEYS, h)) < 0.5, -np.inf, np.inf))
    check(same, queries)
    check(np.nextafter(same, direction), queries)
    check(1e4 + 1e-3 * rng.standard_normal((KEYS, h)), queries)


@pytest.mark.parametrize("lost", ["of the key", "of the query"])
def test_a_score_reaches_its_bound(lost):
    """All that the codes leave out points one way: no smaller bound would do."""
    key, query = np.zeros((32, 16), np.float32), np.zeros((1, 16), np.float32)
    if lost == "of the key":
        key[0, 0], key[1:, 1:], query[:, 1:] = 127.0, 10.4999, 127.0
    else:
        key[:, 1:], query[:, 0], query[:, 1:] = 127.0, 127.0, 0.4999
    sketch = Sketch.build(key, np.ones(32, bool), jnp.zeros(16))
    lower, upper = (np.float64(x)[0, 1] for x in sketch.intervals(query))
    score = np.float64(query[0]) @ key[1]
    middle, slack = (upper + lower) / 2, (upper - lower) / 2
    assert lower <= score <= upper
    assert score > middle + 0.9992 * slack


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_bad_keys_and_queries_are_never_ruled_out(bad):
    rng = np.random.default_rng(1)
    keys = rng.standard_normal((KEYS, 6)).astype(np.float32)
    queries = rng.standard_normal((QUERIES, 6)).astype(np.float32)
    keys[40, 2], queries[3, 0] = bad, bad
    _, upper, products, levels, cells = run(keys, queries)
    assert (np.asarray(upper)[:, 32:] == np.inf).all()
    cells = np.asarray(cells)
    assert not (cells[:, 1] < np.inf).any() and not (cells[3] < np.inf).any()
    passing = np.asarray(products)[:, 40] >= np.asarray(levels)[40][:, 1]
    assert passing.all()
    assert (np.asarray(upper)[3] == np.inf).all()
    check(keys, queries)


@pytest.mark.parametrize("h", [64, *slow((16,), (128,))])
def test_the_sketch_is_tight(h):
    """On Gaussian keys it passes few more than are members: a bound that is only
    sound could pass everything."""
    rng = np.random.default_rng(2)
    keys = rng.standard_normal((4096, h)).astype(np.float32)
    queries = rng.standard_normal((8, h)).astype(np.float32)
    index = hsrjax.build(keys)
    scores = queries @ keys.T
    offsets = np.sort(scores, axis=-1)[:, -41].astype(np.float32)
    passed = np.asarray(index.sketch.passing(queries, offsets)).mean()
    assert 0.01 <= passed <= 0.02


@pytest.mark.parametrize(("h", "codes"), [(16, "bf16"), (64, "i8"), *slow((3, "bf16"))])
def test_products_of_codes_on_a_gpu(h, codes):
    """Small heads go by bfloat16 there, which is as exact; lowered without a GPU."""
    rng = np.random.default_rng(0)
    index = hsrjax.build(jnp.asarray(rng.standard_normal((64, h)), jnp.float32))
    normals = jnp.asarray(rng.standard_normal((4, h)), jnp.float32)
    codes_of_queries = index.sketch.code(normals).codes
    multiply = jax.jit(arrays.integer_product)

    def program(platform):
        traced = multiply.trace(codes_of_queries, index.sketch.codes)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return next(line for line in text.splitlines() if "dot_general" in line)

    assert f"x{codes}>" in program("cuda") and "xi8>" in program("cpu")
    extreme = jnp.full((2, h), -127, jnp.int8).at[1, ::2].set(127)
    worst = rng.choice([-127, 127], (96, h)).astype(np.int8)
    for left, right in [(codes_of_queries, index.sketch.codes), (extreme, worst)]:
        exact = np.asarray(left, np.int64) @ np.asarray(right, np.int64).T
        for way in (arrays.whole_product, arrays.floating_product):
            np.testing.assert_array_equal(way(left, jnp.asarray(right)), exact)


def test_balls_hold_keys_that_come_later():
    """Keys put into cells one after the other, and cells that hold none so far."""
    rng = np.random.default_rng(3)
    keys = rng.standard_normal((KEYS, 6)).astype(np.float32) * 10.0 ** rng.integers(
        -9, 9, (KEYS, 1)
    )
    queries = rng.standard_normal((QUERIES, 6)).astype(np.float32)
    slot = np.arange(KEYS)
    append = jax.jit(lambda balls, *block: balls.append(*block))

    def widened(first):
        balls = Balls.build(keys, slot < first, jnp.ones(6), size=32)
        for last in range(first, KEYS):
            block = last // 32
            valid = (slot <= last).reshape(-1, 32)[block]
            held = keys.reshape(-1, 32, 6)[block]
            balls = append(balls, held, valid, jnp.int32(block))
        return np.asarray(balls.upper(queries))

    scores = np.asarray(arrays.dot(queries, keys))
    for first in (0, 20, 40):
        assert (np.repeat(widened(first)[:, :2], 32, axis=-1) >= scores).all()


@pytest.mark.parametrize("size", [1e-33, 1e-20, 1.0, 1e17])
def test_a_ball_bound_is_tight(size):
    """For one key it is that key's score up to rounding, also at extreme sizes."""
    rng = np.random.default_rng(4)
    keys = (rng.standard_normal((1, 8)) * size).astype(np.float32)
    queries = rng.standard_normal((QUERIES, 8)).astype(np.float32)
    balls = Balls.build(keys, jnp.ones(1, bool), jnp.zeros(8), size=32)
    slack = np.asarray(balls.upper(queries))[:, :1] - queries @ keys.T
    allowed = 2e-5 * np.linalg.norm(queries, axis=1) * np.linalg.norm(keys) + 1e-32
    assert (slack[:, 0] <= allowed).all() and (slack >= 0).all()


def test_norm_neither_overflows_nor_underflows():
    for size in (1e-37, 1e-20, 1.0, 1e20, 3e37):
        x = jnp.full((3, 16), size, jnp.float32)
        np.testing.assert_allclose(arrays.norm(x), 4 * size, rtol=1e-6)
    assert (arrays.norm(jnp.zeros((2, 3))) == 0).all()


def test_norm_is_not_rearranged_by_the_compiler():
    """XLA once made c^2 sum x^2 of sum (c x)^2: NaN for a constant zero in a loop."""
    keys = jax.random.normal(jax.random.key(0), (1, 25, 16))

    @jax.jit
    def run(rows):
        first = jnp.zeros((1,), jnp.int32) != 0  # constants that XLA folds late
        zero = jnp.where(first[:, None], jnp.sort(keys, axis=-2)[:, 3], 0.0)

        def body(_, row):
            return None, arrays.norm(zero) + row

        return jax.lax.scan(body, None, rows)[1]

    np.testing.assert_array_equal(run(jnp.zeros((1, 1))), 0.0)
