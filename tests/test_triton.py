"""Fused kernels: the shared contract, and what is theirs alone.

On an NVIDIA GPU from Ampere on they run as users run them, elsewhere in interpret mode.
"""

import functools
import sys
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from hsrjax._src.activations.softmax import Reported
from hsrjax._src.core.tiles import Tiles
from hsrjax._src.core.visible import Visible
from hsrjax._src.index.index import Index
from hsrjax._src.kernels import base as registry
from hsrjax._src.kernels.triton import implementation, launch, select
from hsrjax._src.kernels.triton.implementation import Triton
from hsrjax._src.planning import costs
from tests.contract import AttentionContract, CacheContract, relative_error, slow
from tests.kernels import NAME, PLAYED, decode, lowered

pytestmark = pytest.mark.usefixtures("fused_kernels")


class TestReported(AttentionContract):
    method, implementation = "hsr", NAME


class TestDense(AttentionContract):
    method, implementation = "dense", NAME


class TestCache(CacheContract):
    method, implementation = "hsr", NAME
    pytestmark = [pytest.mark.slow] if NAME == PLAYED else []


@pytest.mark.slow
class TestDenseCache(CacheContract):
    method, implementation = "dense", NAME


def both(attend):
    """Results by the kernels, and by XLA."""
    run = lambda name: jax.jit(lambda: attend(name))()
    return run(NAME), run("xla")


def filled(dtype, *, tokens=500, kv_heads=2, h=20, d=40, scale=1.0):
    rng = np.random.default_rng(0)
    cache = hsrjax.init_cache(2, tokens + 60, kv_heads, h, value_dim=d, dtype=dtype)
    new = lambda size: jnp.asarray(
        scale * rng.standard_normal((2, tokens, kv_heads, size)), dtype
    )
    lengths = jnp.array([tokens, tokens // 2])
    return hsrjax.extend(cache, new(h), new(d), lengths=lengths)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (jnp.bfloat16, {"window": 130, "sinks": 3}),
        (jnp.float16, {}),
        *slow((jnp.float32, {"window": 7})),
    ],
)
@pytest.mark.parametrize("method", ["hsr", "auto", "dense"])
def test_decode_is_xlas(dtype, options, method):
    """Rows of two lengths, heads that are no power of two, four newest positions."""
    cache = filled(dtype)
    query = jnp.asarray(np.random.default_rng(1).standard_normal((2, 4, 6, 20)), dtype)
    bias = jnp.linspace(0.0, 2.5, 6)
    positions = cache.length[:, None] - 4 + jnp.arange(4, dtype=jnp.int32)[None, :]
    options = options | {"method": method, "positions": positions}
    attend = lambda name: hsrjax.decode_attention(
        query,
        cache,
        activation=hsrjax.ReLU(power=2, bias=bias),
        implementation=name,
        **options,
    )
    (got, info), (expected, reference) = both(attend)
    assert relative_error(got, expected) <= 4e-3  # of one rounding to the dtype
    np.testing.assert_array_equal(info.count, reference.count)
    assert (info.candidates >= info.count).all()


@pytest.mark.parametrize("method", ["hsr", "dense"])
def test_wide_rows_are_taken_few_at_a_time(method):
    """Not more than the registers and shared memory of smaller cards take."""
    cache = filled(jnp.float32, tokens=150, kv_heads=1, h=144, d=5)
    query = jax.random.normal(jax.random.key(0), (2, 20, 2, 144))
    attend = lambda name: hsrjax.decode_attention(
        query,
        cache,
        activation=hsrjax.ReLU(bias=1.0),
        method=method,
        implementation=name,
    )
    with mock.patch.object(launch, "attend", wraps=launch.attend) as launched:
        (got, info), (expected, reference) = both(attend)
    (_, sizes), _ = launched.call_args
    assert sizes.rows <= sizes.gathered == 16 and sizes.warps == 8
    assert relative_error(got, expected) <= 1e-6
    np.testing.assert_array_equal(info.count, reference.count)


def test_auto_goes_over_all_keys_where_most_fire():
    cache = filled(jnp.float32, tokens=1200, h=32, d=8)
    query = jnp.ones((2, 1, 2, 32))
    run = lambda bias, method: hsrjax.decode_attention(
        query,
        cache,
        activation=hsrjax.ReLU(bias=bias),
        method=method,
        implementation=NAME,
    )[1]
    few, many = run(1.5, "hsr"), run(-9.0, "hsr")
    every = cache.length[:, None, None]
    assert (few.candidates < every // 2).all()
    np.testing.assert_array_equal(many.count, jnp.broadcast_to(every, many.count.shape))
    assert (many.candidates == every).all()


@functools.partial(jax.jit, static_argnames="name")
def extended(cache, key, value, lengths, name):
    return hsrjax.extend(cache, key, value, lengths=lengths, implementation=name)


@pytest.mark.parametrize("bad", [None, *slow(("key",), ("value",))])
def test_a_cache_grows_as_by_xla(bad):
    """A few tokens a time, over the ends of blocks, ragged, until there is no room."""
    rng = np.random.default_rng(2)
    caches = [hsrjax.init_cache(2, 75, 3, 20, value_dim=5) for _ in range(2)]
    for number, new in enumerate([40, 1, 1, 5, 20, 31, 1]):
        key = jnp.asarray(rng.standard_normal((2, new, 3, 20)), jnp.float32)
        value = jnp.asarray(rng.standard_normal((2, new, 3, 5)), jnp.float32)
        if bad == "key" and number == 2:
            key = key.at[0, 0, 1, 3].set(jnp.nan)
        if bad == "value" and number == 2:
            value = value.at[0, 0, 1, 3].set(jnp.inf)
        lengths = jnp.asarray(rng.integers(0, new + 1, 2), jnp.int32)
        caches = [
            extended(cache, key, value, lengths, name)
            for cache, name in zip(caches, (NAME, "xla"), strict=True)
        ]
    got, expected = map(jax.tree_util.tree_leaves_with_path, caches)
    for (path, one), (_, other) in zip(got, expected, strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        tolerance = 1e-4 if "radius" in jax.tree_util.keystr(path) else 0.0
        np.testing.assert_allclose(one, other, rtol=tolerance, equal_nan=True)
    assert int(caches[0].dropped.sum()) > 0


def cuda_text(kv_heads, slots, h, dtype=jnp.bfloat16):
    """What a decode step is lowered to for a GPU that need not be there."""
    shapes = jax.eval_shape(
        lambda: (
            Index.empty((1, kv_heads), h, max_keys=slots, dtype=dtype),
            jnp.zeros((1, kv_heads, slots, h), dtype),
            jnp.zeros((1, 1, kv_heads, 2, h)),
            jnp.zeros((1, 1, kv_heads, 2)),
            jnp.zeros((1, 1, kv_heads, 2), jnp.int32),
        )
    )

    def step(index, values, queries, bias, high):
        tiles = Tiles(queries, hsrjax.ReLU(power=2, bias=bias), Visible(high))
        options = {"capacity": 32, "parts": 1, "counted": True, "or_all": True}
        return Triton().scan_and_sum(index, tiles, values, **options)

    return lowered(step, *shapes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("h", [16, 40, 256])
def test_a_step_is_lowered_for_gpus_without_one(dtype, h):
    assert "hsrjax_attend" in cuda_text(2, 4096, h, dtype)


def test_arrays_whose_offsets_overflow_are_left_to_xla():
    """Triton counts in int32 up to 2^32 bytes, and in int64 beyond."""
    assert "hsrjax_attend" in cuda_text(8, 2**21, 128)
    assert "hsrjax_attend" in cuda_text(8, 2**23, 128)
    with pytest.raises(NotImplementedError, match="offsets overflow"):
        cuda_text(8, 2**21 + 128, 128)


def test_what_kernels_cannot_do_xla_does():
    cache = filled(jnp.float32)
    query = jnp.ones((2, 1, 2, 20))
    attend = lambda name: hsrjax.decode_attention(
        query,
        cache,
        activation=hsrjax.Softmax(top_r=5),
        method="hsr",
        window=100,
        sinks=3,
        implementation=name,
    )
    (got, _), (expected, _) = both(attend)
    np.testing.assert_array_equal(got, expected)


class Card:
    """A device that is not there."""

    platform = "gpu"

    def __init__(self, kind, capability):
        self.device_kind, self.compute_capability = kind, capability


H100, T4 = Card("NVIDIA H100 80GB HBM3", "9.0"), Card("Tesla T4", "7.5")
RADEON = Card("AMD Instinct MI300X", "gfx942")


def triton():
    return registry._implementations["triton"]


@pytest.mark.parametrize(
    ("card", "why"),
    [(T4, "Tesla T4 is older than Ampere"), (RADEON, "AMD .* is no NVIDIA GPU")],
)
def test_kernels_are_for_new_nvidia_cards(card, why, monkeypatch):
    """Others fall back to XLA without a word, warnings being errors here."""
    monkeypatch.setattr(costs, "default_device", lambda: card)
    monkeypatch.setattr(triton(), "preferred", True)
    assert registry.implementations_for(None, "gpu") == ("xla",)
    assert registry.implementations_for("xla", "gpu") == ("xla",)
    with pytest.raises(ValueError, match=f"'triton' does not: {why}"):
        registry.implementations_for("triton", "gpu")
    monkeypatch.setattr(costs, "default_device", lambda: H100)
    assert registry.implementations_for(None, "gpu") == ("triton", "xla")


def test_cpus_have_no_kernels(monkeypatch):
    monkeypatch.setattr(triton(), "preferred", True)
    assert registry.implementations_for(None, "cpu") == ("xla",)
    with pytest.raises(ValueError, match="'triton' does not: it needs an NVIDIA GPU"):
        registry.implementations_for("triton", "cpu")


def test_a_jax_without_pallas_for_triton_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setattr(costs, "default_device", lambda: H100)
    monkeypatch.setattr(triton(), "preferred", True)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    implementation._no_pallas.cache_clear()
    try:
        assert registry.implementations_for(None, "gpu") == ("xla",)
        with pytest.raises(ValueError, match=r"without Pallas for Triton.*use impl"):
            registry.implementations_for("triton", "gpu")
    finally:
        implementation._no_pallas.cache_clear()


def test_nothing_is_imported_for_kernels_that_nobody_asks_for(monkeypatch):
    monkeypatch.setattr(costs, "default_device", lambda: H100)
    monkeypatch.setattr(implementation, "_no_pallas", lambda: pytest.fail("imported"))
    assert registry.implementations_for(None, "gpu") == ("xla",)
    assert registry.implementations_for("xla", "gpu") == ("xla",)


def test_the_warning_that_pallas_for_triton_is_deprecated_stays_inside():
    """As jax 0.11 says it, when a kernel is compiled; other warnings are heard."""
    Triton()._launch()
    said = "The Pallas Triton backend is deprecated and will be removed"
    warnings.warn(said, DeprecationWarning, stacklevel=1)
    with pytest.raises(DeprecationWarning, match="another"):
        warnings.warn("another", DeprecationWarning, stacklevel=1)


def with_heavy_keys(dtype, *, tokens=700):
    """A cache of which few keys have most of the mass of a row, and a query."""
    rng = np.random.default_rng(5)
    draw = lambda *shape: rng.standard_normal((2, *shape))
    direction = draw(1, 3, 32)
    along = rng.gumbel(size=(2, tokens, 3, 1)) * 2.0
    cache = hsrjax.init_cache(2, tokens + 60, 3, 32, value_dim=8, dtype=dtype)
    key = jnp.asarray(draw(tokens, 3, 32) + along * direction, dtype)
    value = jnp.asarray(draw(tokens, 3, 8), dtype)
    cache = hsrjax.extend(cache, key, value, lengths=jnp.array([tokens, tokens // 2]))
    query = jnp.repeat(direction, 2, axis=2) + 0.3 * draw(1, 6, 32)
    return cache, jnp.asarray(query, dtype)


def attend_by_mass(cache, query, epsilon):
    return decode(cache, query, hsrjax.Softmax(epsilon=epsilon))


def check_by_mass(cache, query, epsilon, found):
    """Nothing that was promised is broken, against full softmax; keys left out."""
    out, info = found
    full, _ = hsrjax.decode_attention(
        query, cache, activation=hsrjax.Softmax(), method="dense", implementation="xla"
    )
    wrong = jnp.max(jnp.abs(out.astype(jnp.float32) - full.astype(jnp.float32)), -1)
    rounding = 2.0**-7 if out.dtype == jnp.bfloat16 else 1e-5
    assert (info.missed_mass <= epsilon).all()
    assert (wrong <= info.error_bound + rounding).all()
    return cache.length[:, None, None] - info.count


@pytest.mark.parametrize("dtype", [jnp.bfloat16, *slow((jnp.float32,))])
@pytest.mark.parametrize("epsilon", [0.1, *slow((1e-3,))])
def test_a_share_of_the_mass_is_left_out(dtype, epsilon):
    cache, query = with_heavy_keys(dtype)
    found = attend_by_mass(cache, query, epsilon)
    left_out = check_by_mass(cache, query, epsilon, found)
    assert (left_out >= 0).all()
    assert float(jnp.mean(left_out / cache.length[:, None, None])) > 0.5


def test_what_is_not_listed_is_weighed():
    """At least what it weighs, and not much more."""
    cache, offset = filled(jnp.float32, kv_heads=3, h=32), 1.5
    draw = np.random.default_rng(6).standard_normal((1, 2, 3, 2, 32))
    queries, keys = jnp.asarray(32**-0.5 * draw, jnp.float32), cache.index.keys
    scores = np.einsum("mbkqh,bksh->mbkqs", queries, keys, dtype=np.float64)
    length = jnp.broadcast_to(cache.length[None, :, None, None], (1, 2, 3, 2))
    seen = np.arange(keys.shape[-2]) < np.asarray(length)[..., None]
    weights = np.exp(np.minimum(scores - offset, 0.0))

    def below(edge):
        """Mass of the keys that no query of the tile lists."""
        unlisted = np.all(scores < edge, axis=-2, keepdims=True)
        return np.sum(np.where(seen & unlisted, weights, 0.0), axis=-1)

    law = Reported(jnp.full(length.shape, offset))
    options = launch.Options(False, NAME == PLAYED, weighed=True)
    _, _, left = jax.jit(
        lambda: launch.reported(
            options,
            Tiles(queries, law, Visible(length)),
            cache.index,
            cache.values.rows,
        )
    )()
    left = np.asarray(left.most, np.float64)
    assert (left >= below(offset - 0.1)).all()
    assert (left <= 1.1 * below(offset)).all()


@pytest.mark.parametrize(
    ("too_high", "tokens", "dense"), [(4.0, 520, False), (1e3, 440, True)]
)
def test_a_guess_that_is_too_high_is_noticed(too_high, tokens, dense, monkeypatch):
    """A second look repairs it, or all keys of the row are summed.

    Sizes are those of no other test, which would leave its program to this one.
    """
    cache, query = with_heavy_keys(jnp.float32, tokens=tokens)
    guess, guessed = select.guess, []

    def too_high_a_guess(*arguments):
        guessed.append(too_high)
        return guess(*arguments) + too_high

    monkeypatch.setattr(select, "guess", too_high_a_guess)
    left_out = check_by_mass(cache, query, 0.1, attend_by_mass(cache, query, 0.1))
    assert guessed and bool((left_out == 0).all()) == dense


@pytest.mark.slow
def test_a_key_that_is_no_number_is_not_left_out():
    cache, query = with_heavy_keys(jnp.float32)
    key = jnp.full((2, 1, 3, 32), jnp.nan)
    cache = hsrjax.extend(cache, key, jnp.ones((2, 1, 3, 8)))
    out, _ = attend_by_mass(cache, query, 0.1)
    assert jnp.isnan(out).all()


@pytest.mark.slow
def test_gradients_where_mass_is_left_out():
    """Those of full softmax over the keys that were kept."""
    cache, query = with_heavy_keys(jnp.float32, tokens=300)
    loss = lambda attend: lambda q: jnp.sum(jnp.sin(attend(q)))
    by_mass = lambda q: attend_by_mass(cache, q, 1e-3)[0]
    full = lambda q: hsrjax.decode_attention(
        q, cache, activation=hsrjax.Softmax(), method="dense", implementation="xla"
    )[0]
    got, expected = (jax.grad(loss(f))(query) for f in (by_mass, full))
    assert relative_error(got, expected) < 1e-2
