"""The planner decides from shapes, and says why."""

import pytest

import hsrjax
from hsrjax import planner


def plan(implementation="auto", activation=None, **sizes):
    sizes = {"queries": 1, "keys": 100_000, "group": 4} | sizes
    return planner.plan(activation or hsrjax.ReLU(), implementation, **sizes)


def test_long_rows_are_reported_short_ones_dense():
    assert plan(keys=100_000).implementation == "hsr"
    assert plan(keys=512).implementation == "dense"
    assert "512" not in plan(keys=512).reason and plan(keys=512).reason


def test_what_is_asked_for_is_done():
    assert plan("hsr", keys=1).implementation == "hsr"
    assert plan("dense").implementation == "dense"


def test_full_softmax_is_dense_whatever_is_asked():
    assert plan("hsr", hsrjax.Softmax()).implementation == "dense"
    assert plan("hsr", hsrjax.Softmax(top_r=4)).implementation == "hsr"


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 5000])
@pytest.mark.parametrize("queries", [1, 2, 5000])
def test_sizes_are_possible(keys, queries):
    chosen = plan("hsr", keys=keys, queries=queries, group=3)
    assert 1 <= chosen.tile <= queries and chosen.capacity >= 1
    assert chosen.capacity <= -(-keys // 32) * 32
    assert plan("hsr", capacity=3).capacity == 3
