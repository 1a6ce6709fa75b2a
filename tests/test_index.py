"""Building, growing and shrinking the index."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hsrjax
from hsrjax._src.core import bitset
from hsrjax._src.index.balls import Balls
from hsrjax._src.index.index import group_keys
from hsrjax._src.index.spatial import spatial_order
from tests.contract import slow


@pytest.mark.slow
@given(
    h=st.sampled_from([2, 12]),
    first=st.sampled_from([1, 45]),
    inserts=st.lists(st.sampled_from([3, 40]), max_size=3),
    seed=st.integers(0, 9),
)
def test_inserts_and_deletes_leave_what_brute_force_leaves(h, first, inserts, seed):
    rng = np.random.default_rng(seed)
    total = 170  # room for every draw: few shapes, few compilations
    keys = rng.standard_normal((total, h)).astype(np.float32)
    index = hsrjax.build(keys[:first], max_keys=total)
    size, alive = first, np.ones(total, bool)
    for number in inserts:
        index = hsrjax.insert(index, keys[size : size + number])
        size += number
        gone = rng.choice(size, min(5, size), replace=False)
        index = hsrjax.delete(index, jnp.asarray(gone))
        alive[gone] = False
    normals = rng.standard_normal((4, h)).astype(np.float32)
    report = hsrjax.query(index, normals, 0.2, capacity=total)
    for row, normal in enumerate(normals):
        members = hsrjax.reference.query(keys, normal, 0.2)
        members = members[alive[members] & (members < size)]
        count = int(report.count[row])
        np.testing.assert_array_equal(report.indices[row, :count], members)
    assert int(index.size) == size and int(index.dropped) == 0


def test_a_deleted_key_never_comes_back():
    index = hsrjax.build(jnp.ones((5, 3)), max_keys=40)
    index = hsrjax.delete(index, jnp.array([1, 3, 3]))
    for _ in range(3):  # inserts sketch the block of the deleted keys again
        index = hsrjax.insert(index, jnp.ones((4, 3)))
        report = hsrjax.query(index, jnp.ones((1, 3)), 0.0, capacity=40)
        assert not {1, 3} & set(report.indices[0].tolist())
    assert int(report.count[0]) == 5 - 2 + 12


def test_rows_of_a_batch_are_deleted_apart():
    index = hsrjax.build(jnp.ones((2, 6, 4)))
    index = hsrjax.delete(index, jnp.array([[0, 1], [5, 5]]))
    count = hsrjax.count(index, jnp.ones((2, 1, 4)), 0.0)
    assert count.tolist() == [[4], [5]]


def test_no_room():
    index = hsrjax.build(jnp.ones((5, 4)), max_keys=8)
    with pytest.raises(ValueError, match="room for 8 keys and holds 5, got 4 more"):
        hsrjax.insert(index, jnp.ones((4, 4)))
    grown = jax.jit(hsrjax.insert)(index, jnp.ones((4, 4)))
    assert int(grown.size) == 8 and int(grown.dropped) == 1
    assert int(hsrjax.count(grown, jnp.ones((1, 4)), 0.0)[0]) == 8


def test_pads_with_one_past_the_end():
    index = hsrjax.build(jnp.eye(4), max_keys=7)
    report = hsrjax.query(index, jnp.ones((1, 4)), 5.0, capacity=2)
    assert report.indices.tolist() == [[7, 7]]


def test_what_query_reports_can_be_deleted_padding_and_all():
    index = hsrjax.build(jnp.eye(4), max_keys=8)
    report = hsrjax.query(index, jnp.eye(4)[:1], 0.5, capacity=2)
    assert report.indices.tolist() == [[0, 8]]
    left = hsrjax.delete(index, report.indices[0])
    assert hsrjax.count(left, jnp.ones((1, 4)), 0.5).tolist() == [3]


def test_ids_out_of_range():
    index = hsrjax.build(jnp.eye(4), max_keys=8)
    for ids in ([4], [-1], [100]):
        with pytest.raises(ValueError, match=r"ids must lie in \[0, size\)"):
            hsrjax.delete(index, jnp.array(ids))
        same = jax.jit(hsrjax.delete)(index, jnp.array(ids))
        assert int(hsrjax.count(same, jnp.ones((1, 4)), 0.0)[0]) == 4
    full = hsrjax.build(jnp.eye(32))  # the last slot is a key's
    same = jax.jit(hsrjax.delete)(full, jnp.array([-1, -32]))
    assert int(hsrjax.count(same, jnp.ones((1, 32)), 0.5)[0]) == 32


@pytest.mark.parametrize("h", [8, *slow((2,), (4,))])
def test_balls_prune_small_heads_and_only_group_keys(h):
    """Why `build` reorders up to H = 8: the share of cells a ball cannot rule out."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((16384, h)).astype(np.float32)
    normals = rng.standard_normal((16, h)).astype(np.float32)
    offsets = np.sort(normals @ keys.T, axis=1)[:, -64, None]

    def visited(reorder):
        index = hsrjax.build(keys, reorder=reorder)
        balls = index.cells or Balls.build(
            index.keys, jnp.ones(16384, bool), jnp.zeros(h), size=128
        )
        assert balls.size == 128 and balls.radius.shape == (128,)
        return float(np.mean(np.asarray(balls.upper(normals)) >= offsets))

    assert visited(True) < {2: 0.04, 4: 0.18, 8: 0.75}[h]
    assert visited(False) > 0.95


@pytest.mark.parametrize("keys", [1, 31, 33, 333, 1025, 5000])
def test_spatial_order_is_a_permutation_even_with_nan(keys):
    rng = np.random.default_rng(0)
    points = rng.standard_normal((2, keys, 3)).astype(np.float32)
    points[0, keys // 2], points[1, keys // 3, 1] = np.nan, np.inf
    used = np.array([keys, keys // 2], np.int32)
    order = np.asarray(jax.jit(spatial_order)(points, used))
    slots = np.arange(keys)
    for row, number in zip(order, used, strict=True):
        np.testing.assert_array_equal(np.sort(row[:number]), slots[:number])
        np.testing.assert_array_equal(row[number:], slots[number:])


def test_spatial_order_keeps_its_leaves_small_despite_an_outlier():
    """One key is far larger than the rest: integers of few bits must not care."""
    rng = np.random.default_rng(0)
    keys = rng.uniform(size=(4096, 2)).astype(np.float32)
    keys[7] = 1e30
    order = np.asarray(jax.jit(spatial_order)(keys, 4096))
    leaves = keys[order].reshape(-1, 32, 2)
    extent = np.sort((leaves.max(1) - leaves.min(1)).max(1))
    assert np.median(extent) < 0.3 and (extent > 1.0).sum() == 1


@pytest.mark.parametrize("keys", [100, *slow((2000,))])
def test_spatial_order_changes_no_id(keys):
    """Also when it is made again, after inserts and deletes in between."""
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((2, keys, 3)).astype(np.float32)
    normals = rng.standard_normal((2, 4, 3)).astype(np.float32)
    index = hsrjax.build(stored[:, :-20], max_keys=keys, reorder=False)
    index = hsrjax.delete(index, jnp.array([[3, 50, 7], [0, 1, 79]]))
    expected = hsrjax.insert(index, stored[:, -20:])
    reordered, order = jax.jit(group_keys)(index)
    assert not (order == jnp.arange(order.shape[-1])[None]).all()
    again, _ = jax.jit(group_keys)(hsrjax.insert(reordered, stored[:, -20:]))
    for grown in (hsrjax.insert(reordered, stored[:, -20:]), again):
        got = hsrjax.query(grown, normals, 0.5, capacity=keys)
        wanted = hsrjax.query(expected, normals, 0.5, capacity=keys)
        np.testing.assert_array_equal(got.indices, wanted.indices)
        np.testing.assert_array_equal(got.count, wanted.count)
    gone = hsrjax.delete(again, jnp.array([[keys - 1, 10], [4, 5]]))
    wanted = hsrjax.delete(expected, jnp.array([[keys - 1, 10], [4, 5]]))
    np.testing.assert_array_equal(
        hsrjax.count(gone, normals, 0.5), hsrjax.count(wanted, normals, 0.5)
    )


@functools.partial(jax.jit, static_argnums=2)
def select(words, start, capacity):
    ranks = start + jnp.arange(capacity, dtype=jnp.int32)
    return bitset.select(bitset.rank(words[None]), ranks)[0]


@given(
    members=st.sets(st.integers(0, 95), max_size=96),
    start=st.integers(0, 100),
    capacity=st.sampled_from([1, 33, 100]),
)
def test_select_finds_members_by_rank(members, start, capacity):
    mask = np.isin(np.arange(96), sorted(members))
    words = bitset.pack(jnp.asarray(mask))
    np.testing.assert_array_equal(bitset.unpack(words), mask)
    assert int(bitset.size(words)) == len(members)
    expected = sorted(members)[start : start + capacity]
    expected += [96] * (capacity - len(expected))
    got = select(words, jnp.int32(start), capacity)
    np.testing.assert_array_equal(got, expected)


def test_insert_compiles_once_for_all_sizes(count_traces):
    counted = count_traces(hsrjax.insert)
    insert = jax.jit(counted)
    index = hsrjax.build(jnp.ones((3, 12)), max_keys=80)
    for _ in range(5):
        index = insert(index, jnp.ones((7, 12)))
    assert counted.traces == 1 and int(index.size) == 38


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hsrjax.build(jnp.ones(4)), ValueError, "at least 2 axes"),
        (lambda: hsrjax.build(jnp.ones((0, 4))), ValueError, "not be empty"),
        (lambda: hsrjax.build(jnp.ones((4, 4), int)), TypeError, "got int32"),
        (lambda: hsrjax.build(jnp.ones((1, 1025))), ValueError, "at most 1024"),
        (
            lambda: hsrjax.build(jnp.eye(4), max_keys=3),
            ValueError,
            "at least the number",
        ),
        (
            lambda: hsrjax.insert(hsrjax.build(jnp.eye(4)), jnp.ones((1, 5))),
            ValueError,
            "to fit the index",
        ),
        (
            lambda: hsrjax.insert(
                hsrjax.build(jnp.eye(4), max_keys=8), jnp.ones((1, 4), jnp.bfloat16)
            ),
            TypeError,
            "stored dtype float32",
        ),
        (
            lambda: hsrjax.delete(hsrjax.build(jnp.eye(4)), jnp.ones(2)),
            TypeError,
            "integer",
        ),
        (
            lambda: hsrjax.delete(
                hsrjax.build(jnp.ones((2, 4, 4))), jnp.ones((3, 1), int)
            ),
            ValueError,
            "batch axes",
        ),
    ],
)
def test_static_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_empty_delete_and_vmap():
    index = hsrjax.build(jnp.ones((3, 5, 4)))
    same = hsrjax.delete(index, jnp.zeros((3, 0), int))
    np.testing.assert_array_equal(same.alive, index.alive)
    mapped = jax.vmap(functools.partial(hsrjax.build, max_keys=8))(jnp.ones((3, 5, 4)))
    np.testing.assert_array_equal(mapped.size, index.size)
