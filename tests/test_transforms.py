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


SOME = ["decode", *slow(("relu",), ("report",), ("top_r",), ("epsilon",))]


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


@pytest.mark.parametrize("name", ["decode", *slow(("relu",), ("report",))])
def test_scan_and_vmap(name):
    function = FUNCTIONS[name]
    rows = arrays(lead=(3,))
    mapped = jax.jit(jax.vmap(function))(*rows)

    def step(carry, row):
        return carry, function(*row)

    _, scanned = jax.jit(lambda *x: jax.lax.scan(step, None, x))(*rows)
    close(scanned, mapped)


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def index():
    return hsrjax.build(jnp.eye(4), max_keys=8)


@pytest.fixture(scope="module")
def cache():
    return hsrjax.init_cache(1, 8, 1, 4)


TWO = np.ones((2, 4), np.float32)
# What is closed over, or ids, lengths and positions beside it.
CLOSED_OVER = {
    "insert": lambda index, _, new: hsrjax.insert(index, new).size,
    "delete": lambda index, _, new: (
        hsrjax.delete(index, np.array([1, 3])).alive,
        new,
    ),
    "query": lambda index, _, new: hsrjax.query(index, new, 0.5, capacity=2),
    "extend": lambda _, cache, new: (
        hsrjax.extend(
            cache, new[None, :, None], new[None, :, None], lengths=np.array([1])
        ).length
    ),
    "decode": lambda _, cache, new: hsrjax.decode_attention(
        new[None, :1, None], cache, activation=RELU, positions=np.array([[0]])
    ),
}
TRANSFORMS = {
    "jit": jax.jit,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (c, f(x)), None, None, 1)[1],
    "cond": lambda f: lambda x: jax.lax.cond(jnp.any(x > 0), f, f, x),
    "checkpoint": jax.checkpoint,
    "eval_shape": lambda f: functools.partial(jax.eval_shape, f),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CLOSED_OVER)
def test_what_is_closed_over_is_known(name, transform, index, cache):
    function = functools.partial(CLOSED_OVER[name], index, cache)
    got, expected = TRANSFORMS[transform](function)(TWO), function(TWO)
    if transform == "eval_shape":
        chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    else:
        if transform == "scan":
            got = jax.tree.map(lambda x: x[0], got)
        close(got, expected)


def test_what_is_known_is_checked_under_jit_too(index, cache):
    many = jnp.ones((5, 4))
    with pytest.raises(ValueError, match="room for 8 keys and holds 4, got 5 more"):
        jax.jit(lambda new: hsrjax.insert(index, new))(many)
    with pytest.raises(ValueError, match=r"ids must lie in \[0, size\)"):
        jax.jit(lambda new: hsrjax.delete(index, np.array([5])).size)(many)
    with pytest.raises(ValueError, match="room for 8 keys and holds 0, got 9 more"):
        jax.jit(hsrjax.insert)(index, jnp.ones((9, 4)))
    token = jnp.ones((1, 9, 1, 4))
    with pytest.raises(ValueError, match="room for 8 tokens per row, got 9"):
        jax.jit(hsrjax.extend)(cache, token, token)
    full = hsrjax.extend(cache, token[:, :8], token[:, :8])
    with pytest.raises(ValueError, match="room for 8 tokens per row, got 10"):
        jax.jit(lambda new: hsrjax.extend(full, new, new))(token[:, :2])
    # Padding is no token: how many are real is a value.
    grown = jax.jit(hsrjax.extend)(cache, token, token, lengths=jnp.array([3]))
    assert grown.length.tolist() == [3] and grown.dropped.tolist() == [0]


def test_an_integer_is_an_integer(index):
    q, k, v = (x[:1, :9] for x in arrays())
    three = np.int64(3)
    for activation in (hsrjax.ReLU(three), hsrjax.Softmax(top_r=three)):
        options = {"activation": activation, "is_causal": True, "method": "hsr"}
        got = hsrjax.attention(
            q, k, v, **options, window=np.int32(4), sinks=np.uint8(1), capacity=three
        )
        close(got, hsrjax.attention(q, k, v, **options, window=4, sinks=1, capacity=3))
    assert hsrjax.ReLU(three) == hsrjax.ReLU(3)
    assert type(hsrjax.Softmax(top_r=np.array(3)).top_r) is int
    sized = hsrjax.init_cache(np.int64(1), np.int32(8), np.int64(2), np.int64(4))
    assert type(sized.max_length) is int
    assert type(hsrjax.build(jnp.eye(4), max_keys=np.int64(8)).max_keys) is int
    assert hsrjax.query(index, TWO, 0.5, capacity=three).indices.shape == (2, 3)
    for wrong in (True, 2.0, "2"):
        with pytest.raises(ValueError, match="capacity must be an integer >= 1"):
            hsrjax.query(index, TWO, 0.5, capacity=wrong)
    with pytest.raises(ValueError, match='static_argnames="capacity"'):
        jax.jit(hsrjax.query)(index, TWO, 0.5, capacity=3)


@pytest.mark.parametrize("name", ["report", *slow(("top_r",), ("decode",))])
def test_the_same_numbers_with_64_bits(name):
    inputs = [np.asarray(x) for x in arrays()]
    expected = jax.tree.map(np.asarray, jax.jit(FUNCTIONS[name])(*inputs))
    with jax.enable_x64(True):
        got = jax.tree.map(np.asarray, jax.jit(FUNCTIONS[name])(*inputs))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    close(got, expected)


def test_spatial_order_with_64_bits():
    keys = np.asarray(jax.random.normal(jax.random.key(0), (300, 4)))
    expected = hsrjax.build(keys, reorder=True)
    with jax.enable_x64(True):
        got = hsrjax.build(keys, reorder=True)
        cache = hsrjax.extend(
            hsrjax.init_cache(1, 300, 1, 4), *[keys[None, :, None]] * 2
        )
        out, _ = hsrjax.decode_attention(
            keys[None, :1, None], hsrjax.reindex(cache), activation=RELU, method="hsr"
        )
    np.testing.assert_array_equal(got.ids, expected.ids)
    assert out.dtype == np.float32 and np.isfinite(out).all()


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
