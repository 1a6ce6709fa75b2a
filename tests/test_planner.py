"""The planner decides from shapes and costs, and says why."""

import dataclasses

import pytest

import hsrjax
from hsrjax._src.planning import costs
from hsrjax._src.planning import plan as planner
from hsrjax._src.planning.plan import Shape

RELU = hsrjax.ReLU()
DECODE = Shape(
    batch=1,
    queries=1,
    keys=100_000,
    heads=8,
    kv_heads=4,
    head_dim=64,
    value_dim=64,
    cached=True,
)
PREFILL = DECODE._replace(queries=4096, keys=4096, cached=False)
# Round numbers, not far from those of a small CPU.
TABLE = costs.Costs(
    machine=costs.Machine("cpu", "a processor", 2, "0.10"),
    origin="measured",
    dense=((1e5, 5e4), (1e6, 1e5), (1e7, 1e6)),
    scan=((1e5, 1e5), (1e7, 5e5)),
    dense_product=0.02,
    scan_product=0.005,
    build=1.0,
    probe=2e4,
    gather_row=40.0,
    gather_number=0.2,
    gather_product=0.01,
    top_r_dense=100.0,
    top_r_hsr=10.0,
    epsilon_dense=20.0,
    epsilon_hsr=60.0,
)


def plan(*args, **options):
    return choose(*args, **options).plan


def choose(method="auto", activation=RELU, shape=DECODE, capacity=None, **sizes):
    return planner.plan(
        activation,
        method,
        shape._replace(**sizes),
        capacity=capacity,
        table=TABLE,
    )


def test_short_rows_are_dense_long_ones_depend_on_how_many_keys_fire():
    assert plan(keys=512).method == "dense"
    assert "512" in choose(keys=512).reason
    chosen = choose(keys=100_000)
    assert chosen.plan.method == "auto"
    # 5.12 ms against 1.28 ms and 65.6 ns (+ 2.56) for each of 400,000 keys: 14.1 %.
    assert "14 %" in chosen.reason
    assert plan(shape=PREFILL).method == "auto"
    assert plan(shape=PREFILL, keys=64, queries=64).method == "dense"


def test_the_share_that_is_too_many_is_where_costs_meet():
    for shape in (DECODE, PREFILL, DECODE._replace(batch=3, heads=4, queries=2)):
        hsr = planner.lay_out(RELU, shape)
        expected = planner.expect(RELU, shape, hsr, table=TABLE)
        share = planner.break_even(shape, hsr, expected)
        runs = planner.sets(shape, hsr) * share * shape.keys / hsr.capacity
        hsr_ns = expected.hsr + runs * expected.one_run
        assert hsr_ns == pytest.approx(expected.dense) and 0 < share < 1


def test_costs_grow_with_every_size():
    for shape in (DECODE, PREFILL):
        hsr = planner.lay_out(RELU, shape)._replace(chunk=128)
        least = planner.expect(RELU, shape, hsr, table=TABLE)
        for size in ("batch", "keys", "heads", "head_dim"):
            larger = shape._replace(**{size: 2 * getattr(shape, size)})
            if size == "heads":
                larger = larger._replace(queries=8 * shape.queries)
            more = planner.expect(RELU, larger, hsr, table=TABLE)
            assert more.dense > least.dense and more.hsr > least.hsr, size
            assert more.one_run >= least.one_run
    seen = planner.expect(RELU, PREFILL._replace(seen=0.5), hsr, table=TABLE)
    assert seen.hsr < least.hsr and seen.dense < least.dense
    at_once = planner.expect(
        RELU, PREFILL._replace(seen=0.5), hsr._replace(chunk=None), table=TABLE
    )
    assert at_once.dense == least.dense  # hides what it has scored


def test_other_costs_other_choices():
    free = dataclasses.replace(
        TABLE, gather_row=0.0, gather_number=0.0, gather_product=1e-6
    )
    assert planner.plan(RELU, "auto", DECODE, table=free).plan.method == "hsr"
    dear = dataclasses.replace(TABLE, scan=((1.0, 1e9),))
    assert planner.plan(RELU, "auto", DECODE, table=dear).plan.method == "dense"


def test_what_is_asked_for_is_done():
    assert plan("hsr", keys=1).method == "hsr"
    assert plan("dense").method == "dense"


def test_softmax_is_decided_from_shapes_alone():
    assert plan("hsr", hsrjax.Softmax()).method == "dense"
    assert plan("hsr", hsrjax.Softmax(top_r=4)).method == "hsr"
    assert plan("auto", hsrjax.Softmax(top_r=64)).method == "hsr"
    assert plan("auto", hsrjax.Softmax(top_r=64), keys=64).method == "dense"
    assert plan("auto", hsrjax.Softmax(epsilon=0.1)).method == "dense"


def test_a_tail_is_planned_like_what_it_corrects():
    for limit in ({"top_r": 64}, {"epsilon": 0.1}):
        plain, tailed = (hsrjax.Softmax(**limit, **more) for more in ({}, {"tail": 8}))
        assert plan("hsr", tailed) == plan("hsr", plain)
        # Full softmax has nothing to choose, so that it is cheaper here.
        assert plan("auto", tailed).method == "dense"
    # Dense attention has all scores: no tail, and it may cut them into chunks.
    sizes = {"queries": 9000, "keys": 9000, "heads": 4}
    assert plan("dense", hsrjax.Softmax(top_r=64), **sizes).chunk is None
    assert plan("dense", hsrjax.Softmax(top_r=64, tail=8), **sizes).chunk < 9000


def test_a_tail_costs_what_it_does():
    """Dense attention chooses no keys then; hsr weighs the mean value of each group."""

    def expected(activation):
        laid_out = planner.lay_out(activation, DECODE)
        return planner.expect(activation, DECODE, laid_out, table=TABLE)

    full, plain = expected(RELU), expected(hsrjax.Softmax(top_r=8))
    fine, coarse = (expected(hsrjax.Softmax(top_r=8, tail=x)) for x in (1, 32))
    assert fine.dense == coarse.dense == full.dense < plain.dense
    groups = DECODE.sets * DECODE.keys * DECODE.rows
    assert fine.hsr == pytest.approx(plain.hsr + groups * 64 * 0.02)
    assert plain.hsr < coarse.hsr < fine.hsr


def test_where_an_index_does_not_fit_dense_is_chosen(monkeypatch):
    monkeypatch.setenv("HSRJAX_MEMORY", str(2**24))
    chosen = choose(shape=PREFILL)
    assert chosen.plan.method == "dense" and "memory" in chosen.reason
    assert plan(shape=PREFILL, devices=64).method == "auto"
    with pytest.raises(ValueError, match="or method='dense'"):
        planner.refuse(PREFILL, plan("hsr", shape=PREFILL))


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 5000])
@pytest.mark.parametrize("queries", [1, 2, 5000])
def test_sizes_are_possible(keys, queries):
    sizes = {"keys": keys, "queries": queries, "heads": 3, "kv_heads": 1}
    chosen = plan("hsr", **sizes)
    assert 1 <= chosen.tile <= queries and chosen.capacity >= 1
    assert chosen.capacity <= -(-keys // 32) * 32
    assert plan("hsr", **sizes, capacity=3).capacity == 3
    assert plan(**sizes).method in planner.METHODS


def test_few_scores_are_made_at_once_many_in_chunks():
    short = plan("dense", queries=1024, keys=1024, heads=4)
    assert (short.dense_tile, short.chunk) == (1024, None)
    for batch in (1, 4, 64):
        long = plan("dense", queries=9000, keys=9000, heads=1, kv_heads=1, batch=batch)
        assert long.dense_tile <= 512 and long.chunk is not None
        assert batch * long.dense_tile * long.chunk <= 2**20
    decoding = plan("dense", queries=16, keys=1_000_000, heads=8)
    assert decoding.dense_tile == 16 and 512 < decoding.chunk <= 8192
    assert plan("dense", queries=1, keys=1_000_000, heads=64).chunk is None


def test_selecting_softmax_sees_whole_rows():
    chosen = plan("dense", hsrjax.Softmax(top_r=4), queries=9000, keys=9000, heads=4)
    assert chosen.chunk is None and 1 <= chosen.dense_tile < 200


@pytest.mark.parametrize("keys", [1, 31, 33, 5001])
@pytest.mark.parametrize("queries", [1, 5001])
@pytest.mark.parametrize("heads", [1, 5000])
def test_dense_sizes_are_possible(keys, queries, heads):
    for activation in (hsrjax.ReLU(), hsrjax.Softmax(epsilon=0.1)):
        sizes = {"keys": keys, "queries": queries, "heads": heads, "kv_heads": 1}
        chosen = plan("dense", activation, **sizes)
        assert 1 <= chosen.dense_tile <= queries
        assert chosen.chunk is None or 1 <= chosen.chunk <= keys


def test_gradients_turn_the_choice_to_hsr():
    """Dense takes 3.5 times as long with them, bounding no longer."""
    close = dataclasses.replace(TABLE, scan_product=0.04)
    plans = [
        planner.plan(RELU, "auto", PREFILL, gradients=gradients, table=close)
        for gradients in (False, True)
    ]
    assert [choice.plan.method for choice in plans] == ["dense", "auto"]
    asked = planner.plan(RELU, "dense", PREFILL, gradients=True, table=close)
    assert asked.plan.method == "dense"


@pytest.fixture
def h100(monkeypatch):
    machine = costs.Machine("gpu", "NVIDIA H100 80GB HBM3", 0, "0.11.2")
    monkeypatch.setattr(costs, "this_machine", lambda: machine)


LONG = DECODE._replace(keys=131_072, itemsize=2)


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("dense", {"keys": 8192}),
        ("auto", {}),
        ("auto", {"keys": 8192, "batch": 64, "head_dim": 128, "value_dim": 128}),
        ("dense", {"queries": 4096, "keys": 4096, "cached": False, "seen": 0.5}),
    ],
)
def test_kernels_pay_on_shorter_rows_than_xla(method, sizes, h100):
    shape = LONG._replace(**sizes)
    choice = planner.plan(RELU, "auto", shape, implementations=("triton", "xla"))
    assert choice.plan.method == method
    assert planner.plan(RELU, "auto", shape).plan.method == "dense"


def test_kernels_cost_by_bytes_and_xla_by_numbers(h100):
    for names, ratio in ((("triton",), 2.0), (("xla",), 1.0)):
        layout = planner.lay_out(RELU, LONG, None, names)
        narrow, wide = (
            planner.expect(RELU, LONG._replace(itemsize=size, keys=2**24), layout)
            for size in (2, 4)
        )
        assert wide.dense == pytest.approx(ratio * narrow.dense, rel=0.01)
        assert wide.one_run == pytest.approx(ratio * narrow.one_run)
        assert wide.hsr == narrow.hsr


@pytest.mark.parametrize(
    ("activation", "sizes", "runs"),
    [
        (RELU, {}, "triton"),
        (hsrjax.Softmax(), {}, "triton"),
        (hsrjax.Softmax(top_r=8), {}, "xla"),
        (hsrjax.Entmax(), {}, "xla"),
        (RELU, {"value_dim": 257}, "xla"),
        (RELU, {"cells": True}, "xla"),
    ],
)
def test_what_kernels_do_not_take_has_the_costs_of_xla(activation, sizes, runs, h100):
    shape = LONG._replace(**sizes)
    assert planner.runner(activation, shape, ("triton", "xla")) == runs
    by_kernels, by_xla = (
        planner.expect(
            activation, shape, planner.lay_out(activation, shape, None, names)
        )
        for names in (("triton", "xla"), ("xla",))
    )
    assert (by_kernels == by_xla) == (runs == "xla")
