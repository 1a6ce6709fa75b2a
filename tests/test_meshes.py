"""Every public function on a mesh: cut by jit, by `shard_map`, with explicit axes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from tests.contract import inputs

B, S, N, K, H = 4, 40, 4, 2, 16
ROWS = jax.sharding.PartitionSpec("data")
RELU = hsrjax.ReLU(power=2, bias=jnp.full(N, 0.3), normalize="none")
ACTIVATIONS = {
    "relu": RELU,
    "top_r": hsrjax.Softmax(top_r=4),
    "epsilon": hsrjax.Softmax(epsilon=0.1),
    "tail": hsrjax.Softmax(top_r=4, tail=8),
    "entmax": hsrjax.Entmax(),
    "prelu": hsrjax.PReLU(0.2),
}


def attend(q, k, v, *, name="relu", method="hsr"):
    return hsrjax.attention(
        q,
        k,
        v,
        activation=ACTIVATIONS[name],
        method=method,
        is_causal=True,
        return_info=True,
    )


def gradients(q, k, v, *, name="relu", method="hsr"):
    loss = lambda *x: jnp.sum(attend(*x, name=name, method=method)[0] ** 2)
    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


def decode(q, k, v, *, name="relu", method="hsr", reindexed=False):
    tail = getattr(ACTIVATIONS[name], "tail", None)
    cache = hsrjax.init_cache(len(q), S + 5, K, H, tail=tail)
    cache = hsrjax.extend(cache, k, v)
    cache = hsrjax.reindex(cache) if reindexed else cache
    return hsrjax.decode_attention(
        q[:, -1:], cache, activation=ACTIVATIONS[name], method=method
    )


def report(q, k, v):
    index = hsrjax.build(k[:, :, 0], max_keys=S + 2)
    index = hsrjax.insert(index, v[:, :2, 0])
    index = hsrjax.delete(index, jnp.zeros((len(q), 1), jnp.int32))
    counted = hsrjax.count(index, q[:, :3, 0], 0.5)
    return hsrjax.query(index, q[:, :3, 0], 0.5, capacity=8), counted


def case(function, *, marks=(), **options):
    name = "-".join([function.__name__, *map(str, options.values())])
    return pytest.param(functools.partial(function, **options), id=name, marks=marks)


CASES = [
    case(report),
    case(attend, marks=pytest.mark.slow, name="relu", method="hsr"),
    case(gradients, name="relu", method="hsr"),
    case(decode, name="relu", method="hsr"),
    case(decode, marks=pytest.mark.slow, name="relu", reindexed=True),
    *(
        case(function, marks=pytest.mark.slow, name=name, method=method)
        for function in (gradients, decode)
        for name in ACTIVATIONS
        for method in (("dense", "auto") if name == "relu" else ("dense", "hsr"))
        if (function, name) != (decode, "prelu")
    ),
]


def rows():
    *arrays, _ = inputs((B, S, S, N, K, H, H))
    return arrays


def close(got, expected):
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


def mesh(kind):
    return jax.make_mesh((2,), ("data",), axis_types=(kind,))


@pytest.mark.parametrize("function", CASES)
def test_by_jit_and_by_shard_map(function):
    expected = jax.jit(function)(*rows())
    two = mesh(jax.sharding.AxisType.Auto)
    sharded = jax.device_put(rows(), jax.NamedSharding(two, ROWS))
    close(jax.jit(function)(*sharded), expected)
    cut = jax.shard_map(function, mesh=two, in_specs=ROWS, out_specs=ROWS)
    close(jax.jit(cut)(*rows()), expected)


@pytest.mark.parametrize("function", CASES)
def test_on_a_mesh_with_explicit_axes(function):
    """Results are cut as the queries, or the keys, are."""
    expected = jax.jit(function)(*rows())
    two = mesh(jax.sharding.AxisType.Explicit)
    with jax.set_mesh(two):
        got = jax.jit(function)(*jax.device_put(rows(), jax.NamedSharding(two, ROWS)))
    close(got, expected)
    for leaf in jax.tree.leaves(got):
        assert leaf.sharding.spec[0] == "data", leaf.sharding


def test_what_is_the_same_on_all_devices_gets_the_sum_of_their_gradients():
    q, k, v = rows()
    everywhere = jax.sharding.PartitionSpec()

    def bias_gradient(bias, *arrays):
        def loss(bias):
            activation = hsrjax.ReLU(2, bias, "none")
            out = hsrjax.attention(*arrays, activation=activation, method="hsr")
            return jnp.sum(out**2)

        return jax.grad(loss)(bias)

    cut = jax.shard_map(
        bias_gradient,
        mesh=mesh(jax.sharding.AxisType.Auto),
        in_specs=(everywhere, ROWS, ROWS, ROWS),
        out_specs=everywhere,
    )
    bias = jnp.full(N, 0.3)
    got = jax.jit(cut)(bias, q, k, v)
    np.testing.assert_allclose(got, bias_gradient(bias, q, k, v), rtol=1e-4)
