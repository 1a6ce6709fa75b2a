"""benchmarks on accelerators, rehearsed on the CPU: loops, inputs, rows, failures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.contestants import dense, growing, peers_jax
from benchmarks.harness import drawn, inputs, loops, oracle, plain, timing
from benchmarks.harness.loops import Loop

pytestmark = pytest.mark.usefixtures("lenient_promotion")

SHAPE = inputs.Shape(keys=300, heads=4, kv_heads=2, head_dim=16, value_dim=8)


@pytest.mark.parametrize("heads", ["gaussian", "trained"])
def test_inputs_of_the_device_are_what_they_say(heads):
    made = drawn.decode(heads, SHAPE, seed=1, dtype="bfloat16", loop=None)
    for firing in (0, 7, 300):
        given = made.firing(firing)
        out, fired = plain.step(given, "relu")
        assert (fired == firing).all()
        host = dataclasses.replace(
            given,
            **{
                name: np.asarray(getattr(given, name), np.float32)
                for name in ("query", "key", "value", "bias")
            },
        )
        expected = oracle.attend(host, "relu")
        assert timing.relative_error(out, expected.out) <= 1e-5
    soft, _ = plain.step(given, "softmax")
    assert timing.relative_error(soft, oracle.attend(host, "softmax").out) <= 1e-5
    kept, number = plain.step(given, plain.KEPT, np.full((1, 1, 4), 300))
    assert timing.relative_error(kept, soft) <= 1e-6 and (number == 300).all()


def test_scores_of_trained_heads_have_the_tails_of_smollm2():
    shape = inputs.Shape(
        keys=8192, heads=8, kv_heads=2, head_dim=16, value_dim=1, batch=8
    )
    made = drawn.decode("trained", shape, seed=0, dtype="bfloat16", loop=None)
    weights = np.exp(np.asarray(made.ordered[:, 0], np.float64)[..., ::-1])
    mass = np.cumsum(weights, axis=-1) / weights.sum(-1, keepdims=True)
    kept = [(mass < 1 - epsilon).sum(-1) + 1 for epsilon in (0.1, 0.03)]
    assert 50 < np.median(kept[0]) < 120 and 120 < kept[0].mean() < 320
    assert 230 < np.median(kept[1]) < 500 and 400 < kept[1].mean() < 900


@pytest.mark.parametrize("definition", ["relu", "softmax"])
@pytest.mark.parametrize("normalize", ["row_sum", "length"])
def test_plain_gradients_are_those_of_float64(definition, normalize):
    given = inputs.causal(inputs.Source(), dataclasses.replace(SHAPE, keys=150), 0.1)
    given = dataclasses.replace(given, normalize=normalize)
    upstream = peers_jax.cotangent(given)
    got = plain.gradients(given, definition, upstream)
    expected = oracle.gradients(given, definition, upstream)
    for one, other in zip(got, expected, strict=True):
        assert timing.relative_error(one, other) <= 1e-5


def test_a_loop_takes_every_step_on_the_last_one():
    """Steps count in their caches, and see what the one before has made."""

    def step(cache, moved, fixed):
        return (moved[0] * fixed + cache,), cache + 1

    held = loops.Held((jnp.float32(0), jnp.float32(10)))
    opened = loops.repeated(
        step, Loop(6, 2), lambda: held, (jnp.ones(3),), jnp.float32(2)
    )
    call = opened()
    (result,) = call()
    assert call.steps == 6 and [float(x) for x in held.caches] == [3, 13]
    np.testing.assert_array_equal(result, 2 + 12.0)
    # Not a number stays one: steps depend on results, whatever is multiplied by zero.
    held.caches = (jnp.float32(jnp.nan), jnp.float32(0))
    assert np.isnan(opened()()[0]).all()


def test_small_caches_take_turns():
    assert loops.of_step(200 << 20, steps=40) == Loop(40, 1)
    assert loops.of_step(32 << 20, steps=41) == Loop(42, 2)
    assert loops.of_step(1 << 20, steps=40).caches == 8
    assert loops.of_step(1 << 10, steps=2) == Loop(2, 2)


def test_looped_steps_are_scored_like_single_ones():
    made = drawn.decode("gaussian", SHAPE, seed=0, dtype="bfloat16", loop=Loop(4, 2))
    given = made.firing(9)
    caches = growing.Looped(given)
    contestants = [
        growing.looped_contestant(caches, "hsr", "hsr", informed=True),
        dense.decode_contestants(given)[0],
    ]
    expected, _ = plain.step(given, "relu")
    seen = {}

    def score(contestant, arrays):
        seen[contestant.name] = arrays
        return timing.relative_error(arrays[0], expected)

    timings = timing.race(
        contestants, rounds=2, score=score, tick=lambda name: None, together=True
    )
    for one in timings.values():
        assert one.calls == 6 and one.error <= 2**-7
    assert (seen["hsr"][1] == 9).all() and (seen["hsr"][-1] >= 9).all()
    first = jax.tree.leaves(caches.hold().caches)
    assert len(caches.hold().caches) == 2 and not first[0].is_deleted()
    first[0].delete()
    assert not jax.tree.leaves(caches.hold().caches)[0].is_deleted()


def failing():
    raise RuntimeError("CUDA_ERROR of /some/where/file.cc:\nmore")


def test_a_failure_is_a_remark_where_that_is_asked_for():
    prepare = lambda: lambda: lambda: (np.ones(1),)
    contestants = [
        timing.Contestant("ours", "relu", failing),
        timing.Contestant("other", "relu", prepare),
    ]
    options = {"rounds": 2, "score": lambda *_: 0.0, "tick": lambda name: None}
    for together in (False, True):
        found = timing.race(contestants, lenient=True, together=together, **options)
        assert found["ours"].failure.startswith("RuntimeError: CUDA_ERROR of file.cc")
        assert found["other"].calls == 6
    with pytest.raises(RuntimeError):
        timing.race(contestants, **options)
    late = timing.race(contestants[1:], until=0.0, **options)["other"]
    assert late.failure == timing.NO_TIME and late.ms is None
