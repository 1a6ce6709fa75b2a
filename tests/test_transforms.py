"""Every public function under jit, vmap, grad, scan, pmap and export."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import hsrjax
from tests.contract import slow

RELU = hsrjax.ReLU(power=2, bias=0.3)
B, S, N, K, H = 2, 40, 4, 2, 16
AUTO = jax.sharding.AxisType.Auto


def arrays(lead=()):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, S, N, H), (B, S, K, H), (B, S, K, H)
    return [
        jax.random.normal(key, (*lead, *shape))
        for key, shape in zip(keys, shapes, strict=True)
    ]


def report(q, k, v):
    index = hsrjax.build(k[:, :, 0], max_keys=S + 2)
    index = hsrjax.insert(index, v[:, :2, 0])
    index = hsrjax.delete(index, jnp.zeros((B, 1), jnp.int32))
    counted = hsrjax.count(index, q[:, :3, 0], 0.5)
    return hsrjax.query(index, q[:, :3, 0], 0.5, capacity=8), counted


def attend(q, k, v, *, activation=RELU):
    return hsrjax.attention(
        q, k, v, activation=activation, method="hsr", is_causal=True
    )


def decode(q, k, v, *, activation=RELU):
    cache = hsrjax.init_cache(B, S + 5, K, H)
    cache = hsrjax.extend(cache, k, v, lengths=jnp.array([S, 7]))
    return hsrjax.decode_attention(
        q[:, -1:], cache, activation=activation, method="hsr"
    )


FUNCTIONS = {
    "report": report,
    "relu": attend,
    "top_r": functools.partial(attend, activation=hsrjax.Softmax(top_r=4)),
    "epsilon": functools.partial(attend, activation=hsrjax.Softmax(epsilon=0.1)),
    "decode": decode,
}


SOME = ["relu", "decode", *slow(("report",), ("top_r",), ("epsilon",))]


def close(got, expected):
    chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SOME)
def test_pmap_over_eight_devices(name):
    assert jax.device_count() == 8
    function = FUNCTIONS[name]
    rows = arrays(lead=(8,))
    got = jax.pmap(function)(*rows)
    expected = jax.jit(function)(*(x[5] for x in rows))
    close(jax.tree.map(lambda x: x[5], got), expected)


@pytest.mark.parametrize("name", ["relu", "decode"])
def test_sharded_by_batch(name):
    """Arrays on two devices, as jit cuts them and as shard_map does."""
    rows, mesh = arrays(), jax.make_mesh((2,), ("data",), axis_types=(AUTO,))
    by_row = jax.sharding.PartitionSpec("data")
    expected = jax.jit(attend if name == "relu" else decode_rows)(*rows)
    sharded = jax.device_put(rows, jax.NamedSharding(mesh, by_row))
    run = attend if name == "relu" else decode_rows
    close(jax.jit(run)(*sharded), expected)
    specs = {"in_specs": by_row, "out_specs": by_row, "check_vma": False}
    close(jax.jit(jax.shard_map(run, mesh=mesh, **specs))(*rows), expected)


def decode_rows(q, k, v):
    """`decode` of rows of one length, whatever the batch."""
    cache = hsrjax.extend(hsrjax.init_cache(len(q), S + 5, K, H), k, v)
    return hsrjax.decode_attention(q[:, -1:], cache, activation=RELU, method="hsr")


@pytest.mark.parametrize("name", ["decode", *slow(("relu",), ("report",))])
def test_scan_and_vmap(name):
    function = FUNCTIONS[name]
    rows = arrays(lead=(3,))
    mapped = jax.jit(jax.vmap(function))(*rows)

    def step(carry, row):
        return carry, function(*row)

    _, scanned = jax.jit(lambda *x: jax.lax.scan(step, None, x))(*rows)
    close(scanned, mapped)


def test_grad_through_scan_and_remat():
    rows = arrays(lead=(2,))

    @jax.jit
    @jax.grad
    def scanned(rows):
        def step(total, row):
            return total + jnp.sum(jax.checkpoint(attend)(*row) ** 2), None

        return jax.lax.scan(step, jnp.float32(0), tuple(rows))[0]

    @jax.jit
    @jax.grad
    def row_gradient(row):
        return jnp.sum(attend(*row) ** 2)

    got = scanned(rows)
    close([x[1] for x in got], row_gradient([x[1] for x in rows]))


def test_bias_and_scale_are_differentiable_and_traced():
    q, k, v = arrays()

    def loss(bias, scale, method):
        out = hsrjax.attention(
            q,
            k,
            v,
            activation=hsrjax.ReLU(power=2, bias=bias, normalize="none"),
            scale=scale,
            method=method,
        )
        return jnp.sum(out**2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    point = jnp.full((N,), 0.2), jnp.float32(0.3)
    hsr, dense = gradient(*point, "hsr"), gradient(*point, "dense")
    chex.assert_trees_all_close(hsr, dense, rtol=1e-4)
    step = 1e-2
    plus, minus = (loss(point[0], point[1] + d, "dense") for d in (step, -step))
    np.testing.assert_allclose(hsr[1], (plus - minus) / (2 * step), rtol=1e-2)


@pytest.mark.parametrize("name", SOME)
def test_lowers_for_every_platform(name):
    """No host callbacks, no dynamic shapes: one artifact for CPU, CUDA and TPU."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays()]
    exported = export.export(
        jax.jit(FUNCTIONS[name]), platforms=("cpu", "cuda", "tpu")
    )(*shapes)
    text = exported.mlir_module()
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert "callback" not in text and "tensor<?" not in text


def test_gradients_lower_for_every_platform():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays()]
    loss = jax.grad(lambda *x: jnp.sum(attend(*x)), argnums=(0, 1, 2))
    exported = export.export(jax.jit(loss), platforms=("cpu", "cuda", "tpu"))(*shapes)
    assert "callback" not in exported.mlir_module()


def test_an_exported_program_gives_the_same_numbers():
    inputs = arrays()
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    exported = export.export(jax.jit(attend))(*shapes)
    close(exported.call(*inputs), attend(*inputs))


def test_results_are_pytrees_that_survive_a_round_trip():
    index = hsrjax.build(jnp.eye(4), max_keys=6)
    leaves, tree = jax.tree.flatten(index)
    again = jax.tree.unflatten(tree, leaves)
    assert again.max_keys == 6
    for activation in (RELU, hsrjax.Softmax(epsilon=0.1), hsrjax.Softmax(top_r=2)):
        leaves, tree = jax.tree.flatten(activation)
        assert jax.tree.unflatten(tree, leaves) == activation
