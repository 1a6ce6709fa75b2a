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


def test_few_scores_are_made_at_once_many_in_chunks():
    short = plan("dense", queries=1024, keys=1024, heads=4)
    assert (short.tile, short.chunk) == (1024, None)
    for heads in (1, 4, 64):
        long = plan("dense", queries=9000, keys=9000, heads=heads)
        assert long.tile <= 512 and long.chunk is not None
        assert heads * long.tile * long.chunk <= 2**20
    decoding = plan("dense", queries=16, keys=1_000_000, heads=8)
    assert decoding.tile == 16 and 512 < decoding.chunk <= 8192
    assert plan("dense", queries=1, keys=1_000_000, heads=64).chunk is None


def test_selecting_softmax_sees_whole_rows():
    chosen = plan("dense", hsrjax.Softmax(top_r=4), queries=9000, keys=9000, heads=4)
    assert chosen.chunk is None and 1 <= chosen.tile < 200


@pytest.mark.parametrize("keys", [1, 31, 33, 5001])
@pytest.mark.parametrize("queries", [1, 5001])
@pytest.mark.parametrize("heads", [1, 5000])
def test_dense_sizes_are_possible(keys, queries, heads):
    for activation in (hsrjax.ReLU(), hsrjax.Softmax(epsilon=0.1)):
        chosen = plan("dense", activation, keys=keys, queries=queries, heads=heads)
        assert 1 <= chosen.tile <= queries
        assert chosen.chunk is None or 1 <= chosen.chunk <= keys
