"""The list of work: every member of every set is gathered once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrjax._src.core import arrays, bitset
from hsrjax._src.kernels.xla import runs as list_of_work


def random_sets(seed, shares, *, batch=2, heads=2, parts=3, slots=4224):
    """Members bool[batch, heads, parts, slots], of which a share each is in."""
    shares = np.resize(shares, (batch, heads, parts))
    return (
        np.random.default_rng(seed).random((*shares.shape, slots)) < shares[..., None]
    )


def walk(members, *, capacity, count):
    """The runs of all passes: (batch row, set or None, slots, rows)."""
    parts = members.shape[2]
    todo = list_of_work.work(bitset.pack(jnp.asarray(members)), capacity)
    take = jax.jit(
        lambda i: list_of_work.take(
            todo, i, count=count, capacity=capacity, parts=parts
        )
    )
    return [take(jnp.int32(i)) for i in range(int(list_of_work.pieces(todo, count)))]


@settings(max_examples=15)
@given(
    seed=st.integers(0, 99),
    shares=st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0]), min_size=1, max_size=12),
    capacity=st.sampled_from([1000, 4224]),
    count=st.sampled_from([1, 4, 6, None]),
)
def test_every_member_is_in_one_run(seed, shares, capacity, count):
    members = random_sets(seed, shares)
    batch, heads, parts, slots = members.shape
    found = np.zeros((batch, heads * parts, slots), int)
    for runs in walk(members, capacity=capacity, count=count):
        for row in range(batch):
            in_turn = range(heads * parts)
            sets = in_turn if runs.sets is None else np.asarray(runs.sets[row])
            for w, number in enumerate(sets):
                held = np.asarray(runs.slots[row, w])
                there = held < slots
                found[row, number, held[there]] += 1
                assert (held[~there] == slots).all()
                rows = np.asarray(runs.rows[row, w])
                if runs.sets is not None:
                    head = number // parts
                    np.testing.assert_array_equal(
                        rows[there], held[there] + head * slots
                    )
                    assert (rows[~there] == heads * slots).all()
    np.testing.assert_array_equal(found, members.reshape(found.shape).astype(int))


def test_one_full_set_does_not_cost_every_set_its_passes():
    """Five passes of six runs for 4,224 and 33 x 6 members, not 132 of one of each."""
    members = random_sets(0, [1.0] + [0.0] * 5, batch=1)
    members[..., :33] = True
    listed = walk(members, capacity=32, count=6)
    in_turn = walk(members, capacity=32, count=None)
    assert len(in_turn) == 132 and len(listed) == -(-(132 + 5 * 2) // 6)


@pytest.mark.parametrize("width", [32, 96, 2016])
def test_bytes_are_packed_like_bits(width):
    mask = np.random.default_rng(0).random((2, 3, width)) < 0.5
    packed = bitset.pack(jnp.asarray(mask))
    as_bytes = bitset.pack_bytes(jnp.asarray(mask.astype(np.uint8)))
    assert packed.dtype == as_bytes.dtype == jnp.uint32
    np.testing.assert_array_equal(packed, as_bytes)
    np.testing.assert_array_equal(bitset.unpack(as_bytes), mask)


def test_members_are_selected_from_the_set_asked_for():
    """Of sets as long as one group of words and as many: both ways to the group."""
    for slots in (2048, 32 * 64 * 65):
        members = random_sets(1, [0.1, 0.0, 0.9], batch=1, heads=1, slots=slots)[0, 0]
        ranked = bitset.rank(bitset.pack(jnp.asarray(members)))
        asked = jnp.array([2, 0, 0, 1], jnp.int32)
        ranks = jnp.array([[0, 7], [3, 100], [slots, 4], [0, 1]], jnp.int32)
        found = bitset.select(ranked, ranks, asked)
        for number, some, got in zip(asked, ranks, found, strict=True):
            held = np.append(np.flatnonzero(members[number]), slots)
            wanted = held[np.minimum(some, len(held) - 1)]
            np.testing.assert_array_equal(got, wanted)


def test_two_sums_have_the_derivatives_of_one():
    x = jnp.linspace(-1.0, 2.0, 12).reshape(3, 4)
    numbers = jnp.arange(12, dtype=jnp.int32).reshape(3, 4)
    total, count = arrays.sum_both(x, numbers)
    np.testing.assert_allclose(total, np.sum(x, axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(count, np.sum(numbers, axis=-1))
    curve = lambda x: jnp.sum(arrays.sum_both(x**3, numbers)[0] ** 2)
    same = lambda x: jnp.sum(jnp.sum(x**3, axis=-1) ** 2)
    for derive, rtol in ((jax.grad, 1e-5), (jax.hessian, 1e-4)):
        got, expected = (jax.jit(derive(f))(x) for f in (curve, same))
        np.testing.assert_allclose(got, expected, rtol=rtol)
