"""method="auto" that chooses inside the call: exact whatever it chooses."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from hsrjax._src import sparse
from hsrjax._src.core.tiles import cut_queries
from hsrjax._src.core.visible import of_decode
from hsrjax._src.planning import costs
from hsrjax._src.planning.plan import Plan
from tests.contract import (
    AttentionContract,
    inputs,
    predicates,
    relative_error,
    slow,
)
from tests.test_decode import fill

pytestmark = pytest.mark.usefixtures("made_up_costs")

KEYS = 1024
# Biases, and whether so many keys pass them that dense is expected to be cheaper.
BIASES = {"none": 1e4, "few": 2.0, "most": -1.0, "all": -1e4}
CHOOSES_DENSE = {"none": False, "few": False, "most": True, "all": True}


@pytest.mark.slow
class TestPrefill(AttentionContract):
    def attend(self, *arrays, **options):
        return hsrjax.attention(
            *arrays, **options, method="auto", capacity=7, return_info=True
        )

    # As dense or as hsr: the planner chooses these from their shapes alone.
    test_epsilon_keeps_its_promises = None
    test_zero_inputs = None
    test_low_precision_inputs = None


def cached(keys=KEYS, batch=1):
    query, key, value, _ = inputs((batch, 1, keys, 4, 2, 16, 8))
    return query, fill(key, value)


def decode(query, cache, bias, method="auto", **options):
    activation = hsrjax.ReLU(power=2, bias=bias, normalize="none")
    return hsrjax.decode_attention(
        query,
        cache,
        activation=activation,
        method=method,
        **{"capacity": 32} | options,
    )


def chose_dense(info, seen=KEYS):
    """Whether every key was looked at, though not all are reported."""
    everything = np.asarray(info.candidates == seen)
    assert everything.all() or not everything.any()
    return bool(everything.all())


@pytest.mark.parametrize("share", BIASES)
@pytest.mark.parametrize("batch", [2, *slow((1,))])
def test_decoding_takes_the_cheaper_way(share, batch):
    query, cache = cached(batch=batch)
    bias = jnp.float32(BIASES[share])
    out, info = decode(query, cache, bias)
    expected, dense_info = decode(query, cache, bias, "dense")
    assert relative_error(out, expected) <= 1e-5
    np.testing.assert_array_equal(info.count, dense_info.count)
    assert chose_dense(info) == CHOOSES_DENSE[share]
    assert chose_dense(dense_info)
    if not CHOOSES_DENSE[share]:
        _, reported = decode(query, cache, bias, "hsr")
        chex.assert_trees_all_equal(info, reported)


@pytest.mark.parametrize("share", BIASES)
def test_a_reindexed_cache_takes_the_cheaper_way(share):
    """Without a look at a sample: keys in spatial order have none."""
    query, cache = cached()
    bias = jnp.float32(BIASES[share])
    expected, dense_info = decode(query, cache, bias, "dense")
    out, info = decode(query, hsrjax.reindex(cache), bias)
    assert relative_error(out, expected) <= 1e-5
    np.testing.assert_array_equal(info.count, dense_info.count)
    assert chose_dense(info) == CHOOSES_DENSE[share]


@pytest.mark.parametrize("share", BIASES)
def test_prefill_takes_the_cheaper_way(share):
    query, key, value, _ = inputs((2, 300, 300, 4, 2, 16, 8))
    bias = jnp.float32(BIASES[share])
    attend = functools.partial(
        hsrjax.attention,
        query,
        key,
        value,
        activation=hsrjax.ReLU(power=2, bias=bias),
        capacity=8,
        return_info=True,
    )
    out, info = attend(method="auto")
    expected, dense_info = attend(method="dense")
    assert relative_error(out, expected) <= 1e-5
    np.testing.assert_array_equal(info.count, dense_info.count)
    assert chose_dense(info, 300) == CHOOSES_DENSE[share]


def split_keys(sampled, rest):
    """A cache in whose sample of the sketch other keys lie than elsewhere.

    The sample are four runs of one block in the middle of as many parts.
    """
    query = jnp.ones((1, 1, 2, 16))
    position = jnp.arange(4096)
    inside = jnp.abs(position % 1024 - 512) < 128
    level = jnp.where(inside, sampled, rest)
    noise = 0.01 * jax.random.normal(jax.random.key(0), (1, 4096, 1, 16))
    key = noise + level[None, :, None, None] / 16
    return query, fill(key, jax.random.normal(jax.random.key(1), key.shape))


@pytest.mark.parametrize(
    ("sampled", "rest", "dense"), [(0.0, 2.0, True), (2.0, 0.0, True)]
)
def test_a_misleading_sample_changes_no_result(sampled, rest, dense, monkeypatch):
    query, cache = split_keys(sampled, rest)
    looks = {}
    for way in ("auto", "dense", "hsr"):
        out, info = decode(query, cache, 1.0, way, scale=1.0)
        looks[way] = out
    share = float(info.count.max()) / 4096
    assert share < 0.3 if sampled else share > 0.7  # of all keys: the sample differs
    out, info = decode(query, cache, 1.0, scale=1.0)
    assert chose_dense(info, 4096) == dense
    for way in ("auto", "hsr"):
        assert relative_error(looks[way], looks["dense"]) <= 1e-5


def test_the_sample_is_right_about_keys_in_any_order():
    """Expected runs are those needed, but for chance, also in a half-full cache."""
    query, key, value, _ = inputs((1, 1, 8192, 2, 2, 16, 8))
    cache = hsrjax.extend(hsrjax.init_cache(1, 16384, 2, 16, value_dim=8), key, value)
    plan = Plan("hsr", ("xla",), 32, 1, 1, 1, None)

    @jax.jit
    def runs(bias, window):
        activation = hsrjax.ReLU(bias=bias)
        seen = of_decode(jnp.array([[8191]]), cache.length[:, None])
        seen = seen._replace(low=seen.high - window)
        rows = activation.prepare(query.shape[:3])
        tiles = cut_queries(query, rows, seen, scale=None, kv_heads=2, tile=1)
        return sparse.expected_runs(cache.index, tiles, plan)

    for bias in (-0.5, 0.0, 0.5):
        for window in (8192, 2048):
            _, info = decode(query, cache, bias, "hsr", window=window)
            needed = int(info.candidates.sum()) / 32
            assert 0.6 * needed < float(runs(bias, window)) < 1.15 * needed
    assert float(runs(1e4, 8192)) == 0


def test_one_compilation_serves_both_ways(count_traces):
    counted = count_traces(decode)
    step = jax.jit(counted)
    query, cache = cached()
    ways = {share: chose_dense(step(query, cache, b)[1]) for share, b in BIASES.items()}
    assert ways == CHOOSES_DENSE and counted.traces == 1


def test_under_vmap_one_choice_is_made_for_all():
    query, cache = cached()
    mapped = jax.vmap(decode, in_axes=(None, None, 0))
    few, many, mixed = (
        jnp.array([BIASES[x] for x in names])
        for names in (("few", "none"), ("most", "all"), ("few", "most"))
    )
    for biases, dense in ((few, False), (many, True), (mixed, None)):
        out, info = jax.jit(mapped)(query, cache, biases)
        if dense is None:
            chose_dense(info)  # one or the other
        else:
            assert chose_dense(info) == dense
        for row, bias in enumerate(biases):
            expected, _ = decode(query, cache, bias, "dense")
            assert relative_error(out[row], expected) <= 1e-5
    # The choice is one number, so that only one side is run.
    jaxpr = jax.make_jaxpr(jax.vmap(mapped, in_axes=(None, None, 0)))(
        query, cache, jnp.stack([few, many])
    )
    assert [x.shape for x in predicates(jaxpr.jaxpr)] == [(), ()]


def test_under_scan_every_step_chooses_for_itself():
    query, cache = cached()

    def step(_, bias):
        return None, decode(query, cache, bias)

    biases = jnp.array(list(BIASES.values()))
    _, (out, info) = jax.jit(lambda b: jax.lax.scan(step, None, b))(biases)
    for row, share in enumerate(BIASES):
        assert (
            chose_dense(jax.tree.map(lambda x, i=row: x[i], info))
            == (CHOOSES_DENSE[share])
        )
        expected, _ = decode(query, cache, BIASES[share], "dense")
        assert relative_error(out[row], expected) <= 1e-5


def test_gradients_are_those_of_dense():
    *arrays, cotangent = inputs((1, 40, 64, 4, 2, 8, 8))

    def loss(arrays, bias, method):
        out, info = hsrjax.attention(
            *arrays,
            activation=hsrjax.ReLU(power=2, bias=bias, normalize="none"),
            method=method,
            capacity=8,
            return_info=True,
        )
        return jnp.vdot(out, cotangent), info

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    for share in BIASES:
        bias = jnp.float32(BIASES[share])
        got, info = gradient(arrays, bias, "auto")
        expected, _ = gradient(arrays, bias, "dense")
        assert chose_dense(info, 64) == CHOOSES_DENSE[share]
        for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            assert relative_error(one, other) <= 1e-5


def test_lowers_for_every_platform():
    query, cache = cached()
    shapes = jax.eval_shape(lambda: (query, cache, jnp.float32(0)))
    exported = jax.export.export(jax.jit(decode), platforms=("cpu", "cuda", "tpu"))
    assert "callback" not in exported(*shapes).mlir_module()


@pytest.mark.slow
def test_auto_reports_where_gradients_are_asked_for(monkeypatch):
    """Bounding costs as much as dense here: not worth it, but for the gradients."""
    products = {"dense_product": 1e-3, "scan_product": 2e-3, "gather_product": 0.0}
    close = dataclasses.replace(costs.current().costs, gather_row=0.1, **products)
    table = costs.Table(close, "here", "")
    monkeypatch.setattr(costs, "current", lambda *_: table)
    *arrays, cotangent = inputs((1, 1200, 1200, 4, 2, 16, 8))

    def loss(arrays, bias, method):
        activation = hsrjax.ReLU(power=2, bias=bias, normalize="none")
        out, info = hsrjax.attention(
            *arrays,
            activation=activation,
            method=method,
            return_info=True,
        )
        return jnp.vdot(out, cotangent), info

    bias = jnp.full(4, 3.0)
    assert chose_dense(loss(arrays, bias, "auto")[1], 1200)
    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    got, info = jax.jit(gradient, static_argnums=2)(arrays, bias, "auto")
    assert not chose_dense(info, 1200)
    expected, _ = jax.jit(gradient, static_argnums=2)(arrays, bias, "dense")
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert relative_error(one, other) <= 1e-5
    eager, _ = gradient(arrays, bias, "auto")
    for one, other in zip(*map(jax.tree.leaves, (eager, got)), strict=True):
        assert relative_error(one, other) <= 1e-5


@pytest.mark.parametrize("cheaper", ["dense", *slow(("hsr",))])
def test_what_approximates_keeps_its_bounds_whichever_way(
    cheaper, made_up_costs, tmp_path, monkeypatch
):
    """Full softmax is as far as Info says, and a row is one of the two ways' own."""
    table = made_up_costs | {"scan": [[1.0, 1e15 if cheaper == "dense" else 1e-6]]}
    file = tmp_path / "other.json"
    file.write_text(json.dumps({costs.this_machine().backend: table}))
    monkeypatch.setenv("HSRJAX_COSTS", str(file))
    query, key, value, _ = inputs((1, 1, 512, 4, 2, 16, 8))
    cache = hsrjax.init_cache(1, 512, 2, 16, value_dim=8, tail=4)
    cache = hsrjax.extend(cache, key, value)
    step = functools.partial(hsrjax.decode_attention, 4 * query, cache)
    full, _ = step(activation=hsrjax.Softmax(), method="dense")
    for activation in (
        hsrjax.Softmax(top_r=8),
        hsrjax.Softmax(epsilon=0.1),
        hsrjax.Softmax(epsilon=0.1, tail=4),
    ):
        ways = {x: step(activation=activation, method=x) for x in ("dense", "hsr")}
        out, info = step(activation=activation)
        np.testing.assert_allclose(out, ways[cheaper][0], rtol=1e-6)
        assert relative_error(*(x[0] for x in ways.values())) < 0.2
        for found, told in (*ways.values(), (out, info)):
            distance = jnp.max(jnp.abs(found - full), axis=-1)
            assert (distance <= told.error_bound + 1e-6).all()
            if activation.epsilon is not None and activation.tail is None:
                assert (told.missed_mass <= activation.epsilon).all()
        assert (info.candidates == 512).all() == (cheaper == "dense")


def test_cells_under_vmap_are_read_apart_or_not_for_all():
    """Keys in spatial order: where few cells are left only those are read."""
    keys = jax.random.normal(jax.random.key(0), (2, 4096, 4))
    normals = jax.random.normal(jax.random.key(1), (2, 3, 4))
    index = jax.vmap(hsrjax.build)(keys)
    assert index.cells is not None
    report = jax.vmap(functools.partial(hsrjax.query, capacity=64))
    for offset in (8.0, 1.0):
        found = report(index, normals, jnp.full((2, 3), offset))
        expected = hsrjax.query(hsrjax.build(keys), normals, offset, capacity=64)
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
    jaxpr = jax.make_jaxpr(report)(index, normals, jnp.zeros((2, 3)))
    assert [x.shape for x in predicates(jaxpr.jaxpr)] == [()]
