"""Gradients by fused kernels are those of XLA."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import extend

import hsrjax
from hsrjax._src.core.tiles import Tiles
from hsrjax._src.core.visible import Visible
from hsrjax._src.index.index import Index
from hsrjax._src.kernels.triton import entries, launch
from hsrjax._src.kernels.triton.implementation import Triton
from tests.contract import inputs, relative_error, slow
from tests.kernels import NAME, lowered

# (B, T, S, N, K, H, D): several parts of a tile, of queries of two heads.
CAUSAL = (1, 100, 100, 2, 1, 12, 20)
# Several programs share the keys of a part.
FEW = (1, 6, 500, 4, 2, 16, 8)


pytestmark = pytest.mark.usefixtures("fused_kernels")


def gradients(implementation, method, activation, arrays, **options):
    """Of query, key, value and the activation's fields."""
    *arrays, cotangent = arrays

    def loss(query, key, value, activation):
        out = hsrjax.attention(
            query,
            key,
            value,
            activation=activation,
            method=method,
            implementation=implementation,
            **options,
        )
        return jnp.vdot(out.astype(jnp.float32), cotangent.astype(jnp.float32))

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays, activation)
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(found)]


def relu(power, bias, **options):
    return hsrjax.ReLU(power=power, bias=jnp.array(bias), normalize="none", **options)


@contextlib.contextmanager
def both_ways():
    """Sees to it that some parts of tiles have a list and others do not."""
    split, every = entries.split, []

    def watched(*arrays):
        lists, all_keys = split(*arrays)
        jax.debug.callback(lambda x, y: every.append((x, y)), all_keys, lists.size)
        return lists, all_keys

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "split", watched)
        yield
    ((all_keys, size),) = every
    assert all_keys.any() and (size > 1).sum() > 2


def check(method, activation, arrays, *, tolerance=1e-5, **options):
    options |= {"method": method, "activation": activation, "arrays": arrays}
    got, expected = (gradients(name, **options) for name in (NAME, "xla"))
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape and np.isfinite(other).all()
        assert relative_error(one, other) <= tolerance
        if not activation.keeps_all:
            np.testing.assert_array_equal(one[other == 0], 0)
    return got


@pytest.mark.parametrize(
    ("power", "options"),
    [
        (1, {}),
        *slow(
            (2, {"window": 70, "sinks": 3}),
            (2, {"segment_ids": np.repeat([3, 7, 2], [10, 75, 15])[None]}),
        ),
    ],
)
def test_of_lists(power, options):
    """Early parts report many keys and go over all of them: both ways in one call."""
    bias = np.where(np.arange(100) < 40, 0.2, 2.7)[:, None]
    with both_ways():
        check("hsr", relu(power, bias), inputs(CAUSAL), is_causal=True, **options)


@pytest.mark.parametrize("method", ["hsr", *slow(("auto",), ("dense",))])
def test_of_keys_that_programs_share(method):
    check(method, relu(2, [2.2, 2.6, 2.4, 2.5]), inputs(FEW))


@pytest.mark.slow
def test_lists_are_gone_over_in_rounds_and_made_in_groups(monkeypatch):
    monkeypatch.setattr(entries, "_BYTES", 4096)
    monkeypatch.setattr(launch, "_LIST_BYTES", 1024)
    monkeypatch.setattr("hsrjax._src.planning.plan._MOST_PARTS", 2)
    once = functools.partial(check, "hsr", relu(1, [2.8, 3.0]), inputs(CAUSAL))
    got, again = once(is_causal=True), once(is_causal=True)
    for one, other in zip(got, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "activation", [hsrjax.Softmax(), *slow((relu(1, [0.3, -0.2]),))]
)
def test_of_dense(activation):
    check("dense", activation, inputs(CAUSAL), is_causal=True)


@pytest.mark.parametrize(
    ("dtype", "method", "head"),
    [
        (jnp.bfloat16, "hsr", 16),
        *slow((jnp.float16, "hsr", 16), (jnp.bfloat16, "dense", 16)),
        # Wide heads of float16 are made float32.
        *slow((jnp.float16, "hsr", 160)),
    ],
)
def test_low_precision(dtype, method, head):
    """Off by one rounding to the dtype, and by that of what leads to it."""
    arrays = inputs((1, 40, 40, 2, 1, head, head), dtype=dtype)
    tolerance = 2 * float(jnp.finfo(dtype).eps)
    check(method, relu(2, [0.5, 0.8]), arrays, tolerance=tolerance, is_causal=True)


@pytest.mark.parametrize("method", ["hsr", *slow(("dense",))])
@pytest.mark.parametrize("scale", [-0.37, 0.0])
def test_scores_of_16_bits_are_scaled_afterwards(method, scale):
    """By a scale that is learned."""
    *arrays, cotangent = inputs((1, 40, 40, 2, 1, 16, 16), dtype=jnp.bfloat16)

    def run(name, scale):
        def loss(arrays, scale):
            out = hsrjax.attention(
                *arrays,
                activation=relu(2, [0.1, -0.2]),
                scale=scale,
                is_causal=True,
                method=method,
                implementation=name,
            )
            return jnp.vdot(out.astype(jnp.float32), cotangent.astype(jnp.float32)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(arrays, scale)

    got, expected = (
        [np.asarray(x, np.float32) for x in jax.tree.leaves(run(name, scale))]
        for name in (NAME, "xla")
    )
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) <= 2**-6
    assert expected[3] != 0  # of the scale


def test_a_product_of_16_bits_is_one_of_matrix_units():
    arrays = inputs((1, 40, 40, 2, 1, 16, 16), dtype=jnp.bfloat16)[:3]

    def products(*arrays):
        jaxpr = jax.make_jaxpr(
            functools.partial(
                hsrjax.attention,
                activation=relu(2, [0.1, -0.2]),
                method="dense",
                implementation=NAME,
            )
        )(*arrays)
        return str(jaxpr).count("dot_general[")

    assert products(*arrays) == 3
    assert products(*(x.astype(jnp.float32) for x in arrays)) == 2


def test_nan_is_where_xla_has_it():
    """A key and a query of a tile; with more tiles it depends on where these end."""
    query, key, value, cotangent = inputs((1, 14, 14, 1, 1, 8, 8))
    key = key.at[0, 8, 0, 3].set(jnp.nan)
    query = query.at[0, 11, 0, 1].set(jnp.nan)
    arrays = query, key, value, cotangent
    run = functools.partial(
        gradients, method="hsr", activation=relu(2, [0.5]), arrays=arrays
    )
    got, expected = (run(name, is_causal=True) for name in (NAME, "xla"))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert np.isnan(got[0]).any() and not np.isnan(got[0]).all()


def shapes(tiles, kv_heads, slots, h, dtype, rows=512):
    """Of tiles of queries, an index and values."""

    def make():
        lead = tiles, 1, kv_heads, rows
        visible = Visible(jnp.zeros(lead, jnp.int32))
        law = hsrjax.ReLU(power=2, bias=jnp.zeros(lead))
        index = Index.empty((1, kv_heads), h, max_keys=slots, dtype=dtype)
        values = jnp.zeros((1, kv_heads, slots, h), dtype)
        return Tiles(jnp.zeros((*lead, h)), law, visible), index, values

    return jax.eval_shape(make)


def step(kernels, tiles, index, values, *, method="hsr"):
    """Gradients of queries and values."""

    def loss(queries, values):
        these = tiles._replace(queries=queries)
        options = {"counted": False}
        if method == "dense":
            found = kernels.sum_all(these, index.keys, values, None, chunk=1, **options)
            return jnp.sum(found[0].weighted)
        options |= {"capacity": 32, "parts": 1, "or_all": True}
        found = kernels.scan_and_sum(index, these, values, **options)
        return jnp.sum(found[1].weighted)

    return jax.grad(loss, argnums=(0, 1))(tiles.queries, values)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", ["hsr", "dense"])
def test_they_are_lowered_for_gpus_without_one(dtype, method):
    run = functools.partial(step, Triton(), method=method)
    names = {"row_grads", "key_grads"}
    names |= {"list_grads", "add_entries", "expand"} if method == "hsr" else set()
    text = lowered(run, *shapes(4, 2, 2048, 40, dtype))
    assert all(f"hsrjax_{name}" in text for name in names)


def arrays_of(jaxpr):
    """Bytes of every array that a program makes, but inside kernels."""
    for equation in jaxpr.eqns:
        yield from (x.aval.size * x.aval.dtype.itemsize for x in equation.outvars)
        if equation.primitive.name != "pallas_call":
            for inner in extend.core.jaxprs_in_params(equation.params):
                yield from arrays_of(inner)


@pytest.mark.parametrize("tokens", [2**14, 2**17])
def test_long_prompts_stay_in_kernels_and_memory(tokens):
    """But for sets and lists, which take 64 times less than the scores of a head."""
    run = functools.partial(step, Triton())
    arrays = shapes(tokens // 512, 1, tokens, 64, jnp.bfloat16)
    jaxpr = jax.make_jaxpr(run)(*arrays)
    assert "scatter" not in str(jaxpr)
    assert max(arrays_of(jaxpr.jaxpr)) <= 2**28
