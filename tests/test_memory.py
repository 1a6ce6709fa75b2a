"""Sizes that cannot fit are refused before anything is allocated, in numbers."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest

import hsrjax
from hsrjax._src.planning import memory
from hsrjax._src.planning import plan as planner
from hsrjax._src.planning.plan import Shape

PREFILL = Shape(2, 300, 500, 4, 2, 16, 32)
DECODE = Shape(2, 1, 4096, 4, 2, 16, 32, cached=True)


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.fixture
def small_device(monkeypatch):
    """A device of 16 MiB."""
    monkeypatch.setenv("HSRJAX_MEMORY", str(2**24))


def test_a_cache_larger_than_the_machine_is_refused():
    total = memory.available()
    assert total is not None
    with pytest.raises(ValueError) as error:
        hsrjax.init_cache(2, 10**12, 4, 64)
    message = str(error.value)
    # 8 rows of 10**12 keys and values of 64 float32 and 64 codes each: 4.09 PiB.
    assert "4.09 PiB" in message and memory.in_words(total) in message
    assert "smaller max_length" in message and "bfloat16" in message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hsrjax.init_cache(1, 40_000, 1, 64), "max_length=40000 .* 22 MiB"),
        (lambda: hsrjax.build(jnp.ones((9, 8)), max_keys=10**6), "max_keys=1000000"),
        (
            lambda: hsrjax.attention(
                *[jnp.ones((8, 50_000, 1, 16))] * 3,
                activation=hsrjax.ReLU(),
                method="dense",
            ),
            "50000 queries to 50000 keys needs at least 2[0-9.]* MiB .* smaller batch",
        ),
        (
            lambda: hsrjax.attention(
                *[jnp.ones((1, 1, 1, 8)), *[jnp.ones((1, 5_000_000, 1, 8))] * 2],
                activation=hsrjax.Softmax(),
            ),
            "dense attention of 1 queries to 5000000 keys",
        ),
        (
            lambda: hsrjax.attention(
                *[jnp.ones((8, 50_000, 1, 8))] * 3,
                activation=hsrjax.ReLU(),
                method="hsr",
            ),
            "reported keys of 50000 queries .* method='dense'",
        ),
    ],
)
def test_refusals_name_size_and_setting(call, message, small_device):
    with pytest.raises(ValueError, match=f"{message}") as error:
        jax.eval_shape(call)
    assert "the device has 16 MiB" in str(error.value)


def test_what_fits_runs(small_device):
    cache = hsrjax.init_cache(1, 1000, 1, 64)
    query = jnp.ones((1, 1, 1, 64))
    hsrjax.decode_attention(query, cache, activation=hsrjax.ReLU())


def test_auto_avoids_what_does_not_fit(small_device):
    query, key = struct(1, 64, 1, 8), struct(1, 450_000, 1, 8)
    options = {"activation": hsrjax.ReLU()}
    plan = hsrjax.explain(query, key, key, **options)
    assert plan.method == "dense" and not plan.refused
    assert "does not fit into memory" in str(plan) and "16 MiB" in str(plan)
    refused = hsrjax.explain(query, key, key, method="hsr", **options)
    assert "21.4 MiB" in refused.refused and refused.refused in str(refused)


@pytest.mark.parametrize("shape", [PREFILL, DECODE])
@pytest.mark.parametrize("method", ["dense", "hsr"])
def test_estimates_are_not_more_than_xla_takes(shape, method):
    """Of what is counted all is needed, and no larger thing is forgotten."""
    b, t, s, n, k, h, d = shape[:7]
    options = {"activation": hsrjax.ReLU(), "method": method}
    if shape.cached:
        arguments = (
            struct(b, t, n, h),
            jax.eval_shape(
                functools.partial(hsrjax.init_cache, b, s, k, h, value_dim=d)
            ),
        )
        call = functools.partial(hsrjax.decode_attention, **options)
    else:
        arguments = struct(b, t, n, h), struct(b, s, k, h), struct(b, s, k, d)
        call = functools.partial(hsrjax.attention, **options)
    compiled = jax.jit(call).lower(*arguments).compile().memory_analysis()
    taken = compiled.temp_size_in_bytes + compiled.output_size_in_bytes
    plan = planner.lay_out(hsrjax.ReLU(), shape)
    needed = (planner.bytes_of_dense if method == "dense" else planner.bytes_of_hsr)(
        shape, plan
    )
    assert needed <= taken
    if method == "dense":
        assert taken <= 4 * needed


def test_room_is_counted_to_the_byte_where_it_matters():
    cache = jax.eval_shape(lambda: hsrjax.init_cache(3, 10_000, 2, 64, value_dim=32))
    taken = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    slots = cache.index.keys.shape[-2]
    needed = memory.of_index(6, slots, 64, itemsize=4) + 6 * slots * 32 * 4
    assert 0.99 * taken < needed <= taken


def test_slots_are_counted_in_int32(monkeypatch):
    monkeypatch.setenv("HSRJAX_MEMORY", str(2**60))
    with pytest.raises(ValueError, match="max_length must be at most 2147483616"):
        hsrjax.init_cache(1, 2**31, 1, 8)


@pytest.mark.parametrize("given", ["", "0", "8GiB", "-5", "1.5"])
def test_a_malformed_limit_is_named(given, monkeypatch):
    monkeypatch.setenv("HSRJAX_MEMORY", given)
    with pytest.raises(ValueError, match="HSRJAX_MEMORY must be a number of bytes"):
        memory.available()


@pytest.mark.parametrize(
    ("stats", "total"), [({"bytes_limit": 100}, 100), ({}, None), (None, None)]
)
def test_devices_that_do_not_tell_are_not_checked(stats, total, monkeypatch):
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    # A cache needs a device that can be hashed.
    monkeypatch.setattr(memory, "_of_device", memory._of_device.__wrapped__)
    monkeypatch.setattr(memory.costs, "default_device", lambda: device)
    assert memory.available() == total
    assert memory.fits(101, devices=1) == (total is None)


def test_whole_arrays_of_many_devices_may_be_larger(monkeypatch):
    """Under jit a shape is that of all devices together, unless memory is shared."""
    x = jnp.ones(3)
    assert memory.devices(x) == jax.process_count()
    gpu = types.SimpleNamespace(platform="gpu")
    monkeypatch.setattr(memory.costs, "default_device", lambda: gpu)
    assert memory.devices(x) == 1 and memory.devices() == 1
    found = []
    jax.jit(lambda x: found.append((memory.devices(x), memory.devices())))(x)
    assert found == [(8, 8)]
    assert memory.devices(struct(3)) == 1


def test_bytes_in_words():
    for size, words in ((0, "0 B"), (1023, "1.02e+03 B"), (2**20, "1 MiB")):
        assert memory.in_words(size) == words
