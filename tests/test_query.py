"""`query` and `count` against brute force in float64, on inputs chosen to be nasty."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hsrjax
from hsrjax._src.core import arrays, bitset
from hsrjax._src.core.visible import Visible, of_prefill
from hsrjax._src.kernels.xla import scan
from tests.contract import slow

QUERIES = 20_000
KEYS = 90


def nasty_keys(kind, h, rng):
    keys = rng.standard_normal((KEYS, h))
    if kind == "duplicates":
        keys = np.round(keys[rng.integers(0, 9, KEYS)], 1)
    elif kind == "zeros":
        keys[rng.random(KEYS) < 0.5] = 0.0
    elif kind == "norms":
        keys *= 10.0 ** rng.uniform(-30, 30, (KEYS, 1))
    elif kind == "outlier":
        keys[KEYS // 2] *= 1e30
    elif kind == "integers":
        keys = rng.integers(-3, 4, (KEYS, h)).astype(float)
    return keys.astype(np.float32)


def nasty_normals(kind, h, rng):
    normals = rng.standard_normal((QUERIES, h))
    if kind == "integers":
        normals = np.round(normals)
    normals[::50] = 0.0
    normals[1::50] *= 1e-25
    normals[2::50] *= 1e6
    return normals.astype(np.float32)


def nasty_offsets(scores, rng):
    """Scores themselves (ties), their neighbours, zero, infinities and anything."""
    own = scores[np.arange(QUERIES), rng.integers(0, scores.shape[1], QUERIES)]
    own = own.astype(np.float32)
    choice = rng.integers(0, 8, QUERIES)
    inf = np.float32(np.inf)
    options = [
        own,
        own,
        np.nextafter(own, inf),
        np.nextafter(own, -inf),
        np.zeros_like(own),
        np.where(rng.random(QUERIES) < 0.5, inf, -inf).astype(np.float32),
        (own * rng.uniform(0.5, 2, QUERIES)).astype(np.float32),
        rng.standard_normal(QUERIES).astype(np.float32),
    ]
    return np.choose(choice, options)


@functools.partial(jax.jit, static_argnames="capacity")
def reported_set(index, normals, offsets, capacity):
    return hsrjax.query(index, normals, offsets, capacity=capacity)


def check_report(report, keys, alive, normals, offsets):
    """No miss and no false member beyond float32 rounding; returns pairs checked."""
    with np.errstate(over="ignore", invalid="ignore"):
        a, k = normals.astype(np.float64), keys.astype(np.float64)
        scores = a @ k.T
        h = keys.shape[1]
        slack = (h + 2) * (2.0**-24 * (np.abs(a) @ np.abs(k).T) + 2.0**-126)
    reported = np.zeros((len(normals), len(keys) + 1), bool)
    indices = np.minimum(np.asarray(report.indices), len(keys))
    np.put_along_axis(reported, indices, True, axis=1)
    reported = reported[:, :-1]
    must = (scores >= offsets[:, None].astype(np.float64) + slack) & alive
    may = (scores >= offsets[:, None].astype(np.float64) - slack) & alive
    assert not (must & ~reported).any(), "missed"
    assert not (reported & ~may).any(), "reported a key outside"
    np.testing.assert_array_equal(report.count, reported.sum(-1))
    assert not report.overflow.any()
    steps = np.diff(np.asarray(report.indices), axis=1)
    assert ((steps > 0) | (indices[:, 1:] == len(keys))).all(), "ascending, no repeat"
    found = np.asarray(report.scores) > -np.inf
    assert (found.sum(-1) == reported.sum(-1)).all()
    return len(normals)


@pytest.mark.slow
@pytest.mark.exact
@pytest.mark.skipif(
    "HSRJAX_TEST_OPTIMIZED" not in os.environ, reason="once, as users compile it"
)
def test_a_million_nasty_half_spaces():
    """60 sets of keys x 20,000 (query, offset) pairs, each against every key."""
    pairs = 0
    kinds = ["gaussian", "duplicates", "zeros", "norms", "outlier", "integers"]
    for h in (1, 8, 64, 256):
        for number, kind in enumerate(kinds * (1 if h == 256 else 3)):
            rng = np.random.default_rng((h, number))
            keys, normals = nasty_keys(kind, h, rng), nasty_normals(kind, h, rng)
            half = KEYS // 2
            index = hsrjax.build(keys[:half], max_keys=KEYS)
            index = hsrjax.insert(index, keys[half:])
            gone = rng.choice(KEYS, 10, replace=False)
            index = hsrjax.delete(index, jnp.asarray(gone, jnp.int32))
            alive = ~np.isin(np.arange(KEYS), gone)
            own = np.asarray(arrays.dot(jnp.asarray(normals), jnp.asarray(keys)))
            own = np.where(np.isfinite(own), own, 0)
            offsets = nasty_offsets(own, rng)
            report = reported_set(index, normals, offsets, KEYS)
            pairs += check_report(report, keys, alive, normals, offsets)
    assert pairs >= 1_000_000
    for number in range(8):  # large sets: several blocks, PCA-like spectra, unit norm
        rng = np.random.default_rng(number)
        keys = rng.standard_normal((3000, 32)) * 0.9 ** np.arange(32)
        if number % 2:
            keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        keys = keys.astype(np.float32)
        normals = rng.standard_normal((500, 32)).astype(np.float32)
        own = np.asarray(arrays.dot(jnp.asarray(normals), jnp.asarray(keys)))
        offsets = np.sort(own, axis=1)[:, -rng.integers(1, 60)].astype(np.float32)
        index = hsrjax.build(keys)
        report = reported_set(index, normals, offsets, 100)
        pairs += check_report(report, keys, np.ones(3000, bool), normals, offsets)


@pytest.mark.exact
@pytest.mark.parametrize("h", [40, *slow((3,))])
def test_ties_are_members(h):
    """Whole numbers: every score is exact, so there is no rounding to hide behind."""
    rng = np.random.default_rng(h)
    keys = rng.integers(-3, 4, (300, h)).astype(np.float32)
    normals = rng.integers(-3, 4, (200, h)).astype(np.float32)
    scores = normals @ keys.T
    offsets = scores[np.arange(200), rng.integers(0, 300, 200)]
    report = reported_set(hsrjax.build(keys), normals, offsets, 300)
    members = scores >= offsets[:, None]
    assert (scores == offsets[:, None]).any(-1).all()
    for row in range(200):
        found = np.asarray(report.indices[row])
        np.testing.assert_array_equal(found[found < 300], np.nonzero(members[row])[0])


@given(
    shape=st.sampled_from([(1, 40), (200, 4)]),
    capacity=st.sampled_from([1, 50]),
    seed=st.integers(0, 99),
)
def test_overflow_keeps_the_first_members(shape, capacity, seed):
    count, h = shape
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((count, h)).astype(np.float32)
    normals = rng.standard_normal((3, h)).astype(np.float32)
    report = hsrjax.query(hsrjax.build(keys), normals, 0.1, capacity=capacity)
    for row, normal in enumerate(normals):
        members = hsrjax.reference.query(keys, normal, 0.1)
        assert int(report.count[row]) == len(members)
        assert bool(report.overflow[row]) == (len(members) > capacity)
        expected = np.full(capacity, count)
        first = members[:capacity]
        expected[: len(first)] = first
        np.testing.assert_array_equal(report.indices[row], expected)
        np.testing.assert_allclose(
            report.scores[row, : len(first)], keys[first] @ normal, rtol=1e-4, atol=1e-6
        )
        assert (report.scores[row, len(first) :] == -jnp.inf).all()
    np.testing.assert_array_equal(
        hsrjax.count(hsrjax.build(keys), normals, 0.1), report.count
    )


def test_batch_axes_and_broadcast_offsets():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 3, 50, 5)).astype(np.float32)
    normals = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    index = hsrjax.build(keys)
    for offsets in (0.5, jnp.array([0.0, 0.5, 1.0, 2.0]), jnp.zeros((2, 3, 4))):
        count = hsrjax.count(index, normals, offsets)
        scores = np.einsum("abth,absh->abts", normals, keys)
        expected = scores >= np.broadcast_to(offsets, (2, 3, 4))[..., None]
        np.testing.assert_array_equal(count, expected.sum(-1))


def test_scores_are_differentiable():
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.standard_normal((60, 6)), jnp.float32)
    normals = jnp.asarray(rng.standard_normal((2, 6)), jnp.float32)

    def sparse(keys, normals):
        report = hsrjax.query(hsrjax.build(keys), normals, 0.5, capacity=60)
        return jnp.sum(jnp.where(report.scores > 0, report.scores, 0.0) ** 2)

    def dense(keys, normals):
        scores = jnp.matmul(normals, keys.T, precision="highest")  # TF32 on GPUs
        return jnp.sum(jnp.where(scores >= 0.5, scores, 0.0) ** 2)

    got = jax.grad(sparse, argnums=(0, 1))(keys, normals)
    for one, other in zip(got, jax.grad(dense, (0, 1))(keys, normals), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_nan_keys_and_normals_are_members_of_nothing():
    keys = np.ones((40, 4), np.float32)
    keys[3, 0] = np.nan
    normals = np.ones((2, 4), np.float32)
    normals[1, 2] = np.nan
    report = hsrjax.query(hsrjax.build(keys), normals, 1.0, capacity=64)
    assert report.count.tolist() == [39, 0]
    assert 3 not in report.indices[0].tolist()


def test_low_precision_keys():
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.standard_normal((100, 24)), jnp.bfloat16)
    normals = jnp.asarray(rng.standard_normal((5, 24)), jnp.bfloat16)
    report = hsrjax.query(hsrjax.build(keys), normals, 3.0, capacity=100)
    for row in range(5):
        expected = hsrjax.reference.query(keys, normals[row], 3.0)
        found = report.indices[row][: len(expected) + 1]
        np.testing.assert_array_equal(found[: len(expected)], expected)
        assert int(report.count[row]) == len(expected)


def test_one_compilation_serves_all_offsets(count_traces):
    counted = count_traces(hsrjax.query)
    run = jax.jit(functools.partial(counted, capacity=4))
    index = hsrjax.build(jnp.eye(16))
    for offset in (0.0, 1.0, 2.0):
        run(index, jnp.ones((3, 16)), jnp.float32(offset))
    assert counted.traces == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda i: hsrjax.query(i, jnp.ones((1, 4)), 0.0, capacity=0),
            ValueError,
            ">= 1",
        ),
        (
            lambda i: hsrjax.query(i, jnp.ones(4), 0.0, capacity=1),
            ValueError,
            "at least",
        ),
        (
            lambda i: hsrjax.query(i, jnp.ones((1, 5)), 0.0, capacity=1),
            ValueError,
            "must be 4 .the keys' size., got 5",
        ),
        (
            lambda i: hsrjax.query(i, jnp.ones((2, 1, 4)), 0.0, capacity=1),
            ValueError,
            "batch axes",
        ),
        (
            lambda i: hsrjax.count(i, jnp.ones((2, 4)), jnp.zeros(3)),
            ValueError,
            "offsets must broadcast",
        ),
        (lambda i: hsrjax.count(i, jnp.ones((2, 4), int), 0.0), TypeError, "int32"),
        (lambda i: hsrjax.count(jnp.eye(4), jnp.ones((2, 4)), 0.0), TypeError, "build"),
    ],
)
def test_static_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(hsrjax.build(jnp.eye(4)))


@pytest.mark.parametrize(
    ("window", "sinks", "parts"), [(None, 0, 1), (150, 0, 5), (150, 3, 1)]
)
def test_a_tile_in_chunks_reports_unions_of_its_queries(
    monkeypatch, window, sinks, parts
):
    monkeypatch.setattr(scan, "_CHUNK_PRODUCTS", 1)  # chunks of 256: 2.75 of them
    keys, normals = (
        jax.random.normal(jax.random.key(seed), (2, 700, 16)) for seed in (0, 1)
    )
    index = hsrjax.build(keys, reorder=False)
    rows = slice(390, 640)
    seen = of_prefill(700, 700, is_causal=True, window=window, sinks=sinks)
    tile = jax.tree.map(lambda x: jnp.broadcast_to(x[:, rows], (2, 250)), seen)
    arguments = index, normals[:, rows], jnp.full((2, 250), 13.0)
    each = np.asarray(jax.jit(scan.scan)(*arguments))
    survive = functools.partial(scan.scan, visible=tile, parts=parts)
    together = jax.jit(survive)(*arguments)
    size = 250 // parts
    expected = np.bitwise_or.reduce(each.reshape(2, parts, size, -1), axis=-2)
    slots = np.arange(each.shape[-1] * 32)
    first = 390 + size * np.arange(parts)[:, None]
    inside = slots < first + size
    if window:
        inside &= (slots > first - window) | (slots < sinks)
    expected = np.asarray(bitset.unpack(jnp.asarray(expected))) & inside
    np.testing.assert_array_equal(bitset.unpack(together), expected)
    assert 0 < int(bitset.size(together).min()) < 640
    scores = np.einsum("bqh,bsh->bqs", normals[:, rows], keys)
    members = (scores >= 13.0) & np.asarray(tile.mask(slots[None, None, :700]))
    members = members.reshape(2, parts, size, -1).any(axis=2)
    found = np.asarray(bitset.unpack(together))[..., :700]
    assert members[..., 512:].any() and not (members & ~found).any()


def spatial_survivors(monkeypatch, offset, parts, visible=None, **patched):
    """`survivors` of two rows of 2,000 keys in spatial order, under patched names.

    Returns the index, and bool[2, J, P] each: what must be reported, what may be, at
    least nearly, and what is.
    """
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 2000, 3)).astype(np.float32)
    normals = rng.standard_normal((2, 6, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    index = hsrjax.delete(hsrjax.build(keys, max_keys=2100), jnp.array([[1], [1999]]))
    for name, value in patched.items():
        monkeypatch.setattr(scan, name, value)
    offsets = jnp.full((2, 6), offset)
    if visible is not None:
        offsets = jnp.where(visible.count() > 0, offsets, jnp.inf)
    survive = lambda: scan.scan(index, normals, offsets, visible=visible, parts=parts)
    words = bitset.unpack(jax.jit(survive)())
    alive = np.asarray(bitset.unpack(index.alive))[:, None]
    members = alive & (np.einsum("bqh,bsh->bqs", normals, index.keys) >= offset)
    union = lambda x: x.reshape(2, parts or 6, -1, x.shape[-1]).any(axis=2)
    if visible is None:
        return index, union(members), union(members), np.asarray(words)
    seen, hull = (
        np.asarray(x.mask(index.ids[:, None]))
        for x in (visible, visible.hull(parts or 6))
    )
    allowed = union(members & seen.any(axis=-1, keepdims=True)) & hull
    return index, union(members & seen), allowed, np.asarray(words)


@pytest.mark.parametrize("parts", [2, *slow((None,))])
@pytest.mark.parametrize("offset", [2.8, *slow((0.5,))])
@pytest.mark.parametrize("share", [0, 10**6])
@pytest.mark.parametrize("windows", [True, *slow((False,))])
def test_cells_and_the_whole_sketch_report_the_members(
    monkeypatch, offset, parts, share, windows
):
    """Read apart (share 0, in five passes) or in one go: no member is missed."""
    visible = None
    if windows:
        high = jnp.array([[2000] * 3 + [900] * 3, [0, 2000, 0] * 2])
        low = jnp.maximum(high - 500, 0)
        visible = Visible(high, low, jnp.minimum(high, 9), None)
    _, members, allowed, words = spatial_survivors(
        monkeypatch,
        offset,
        parts,
        visible,
        _CELL_SHARE=share,
        _PASS_BYTES=2 * (parts or 6) * 128 * 3 * 4,
    )
    assert not (members & ~words).any()
    assert words.sum() <= 1.1 * allowed.sum() + 20


@pytest.mark.parametrize(("offset", "fewest"), [(2.8, True), (0.5, False)])
def test_cells_are_read_apart_where_few_are_reached(monkeypatch, offset, fewest):
    everything = lambda index, normals, *_: jnp.full(
        (2, 6, index.alive.shape[-1]), 2**32 - 1, jnp.uint32
    )
    index, *_, words = spatial_survivors(
        monkeypatch, offset, None, _scan_cells=everything
    )
    alive = np.asarray(bitset.unpack(index.alive))[:, None]
    assert (words == alive).all() == fewest
    monkeypatch.undo()
    *_, words = spatial_survivors(monkeypatch, offset, None, _scan_sketch=everything)
    assert (words == alive).all() != fewest
