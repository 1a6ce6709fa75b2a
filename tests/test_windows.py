"""Windows of tables: where they lie, what is written, and how much is moved for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hsrjax
from hsrjax._src.core import windows

LEADS = [(), (1,), (3,), (2, 3), (1, 3), (2, 1)]


@st.composite
def appends(draw):
    """A table, what it holds and rows to append; some batch axes share their size."""
    lead = draw(st.sampled_from(LEADS))
    shared = draw(st.integers(0, len(lead)))
    apart = (*lead[:shared], *[1] * (len(lead) - shared))
    slots, new = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    number = lambda top: draw(
        st.lists(st.integers(0, top), min_size=1, max_size=6).map(
            lambda x: np.resize(x, apart).astype(np.int32)
        )
    )
    held = number(slots)
    count = np.minimum(number(new), slots - held)
    return lead, slots, new, held, count


@given(appends())
def test_rows_go_behind_those_held_and_nowhere_else(drawn):
    lead, slots, new, held, count = drawn
    table = np.random.default_rng(0).standard_normal((*lead, slots, 2))
    table, rows = np.float32(table), np.full((*lead, new, 2), 7, np.float32)
    rows += np.arange(new)[:, None]
    expected = table.copy()
    for place in np.ndindex(lead):
        first = np.broadcast_to(held, lead)[place]
        number = np.broadcast_to(count, lead)[place]
        expected[place][first : first + number] = rows[place][:number]
    found = windows.append(*map(jnp.asarray, (table, held, rows, count)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("lead", LEADS)
def test_a_window_past_an_end_ends_there(lead, axis):
    table = np.random.default_rng(0).standard_normal((*lead, 6, 7)).astype(np.float32)
    start = np.resize([4, -2, 1, 9], lead).astype(np.int32)
    found = windows.read(jnp.asarray(table), jnp.asarray(start), 3, axis=axis)
    again = windows.write(jnp.asarray(table), jnp.asarray(start), -found, axis=axis)
    expected = table.copy()
    for place in np.ndindex(lead):
        first = np.clip(start[place], 0, table.shape[axis] - 3)
        row = np.moveaxis(expected[place], axis, 0)
        np.testing.assert_array_equal(
            np.moveaxis(np.asarray(found)[place], axis, 0), row[first : first + 3]
        )
        row[first : first + 3] *= -1
    np.testing.assert_array_equal(again, expected)


@pytest.mark.exact
@pytest.mark.parametrize("tail", [None, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_more_token_touches_what_it_writes(batch, tail):
    """In a donated cache of 64k tokens as much as in one of 4k, and without a copy."""
    found = []
    for room in (4096, 65536):
        cache = jax.eval_shape(
            lambda n=room: hsrjax.init_cache(batch, n, 2, 64, tail=tail)
        )
        token = jax.ShapeDtypeStruct((batch, 1, 2, 64), jnp.float32)
        extend = jax.jit(hsrjax.extend, donate_argnums=0)
        program = extend.lower(cache, token, token).compile()
        memory = program.memory_analysis()
        size = lambda tree: sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
        )
        assert memory.alias_size_in_bytes >= size(cache)
        # XLA counts what a scatter writes to as read and written whole.
        scattered = 2 * size((cache.index.keys, cache.values.rows))
        touched = program.cost_analysis()["bytes accessed"] - scattered
        found.append((memory.temp_size_in_bytes, touched))
        if batch == 1:
            assert 0 < touched < (0.02 if tail is None else 0.04) * size(cache)
    (less, few), (more, many) = found
    assert less == more < 2**19
    assert batch > 1 or abs(few - many) < 0.01 * few
