"""What prefill and training share: their inputs, and who takes part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import hsrjax
from benchmarks.contestants import chunked, dense, peers, peers_jax
from benchmarks.contestants.peers import Task
from benchmarks.harness import inputs, internals
from benchmarks.harness.inputs import Inputs, Shape, Source
from benchmarks.harness.timing import Contestant, Open

SHARE = 0.01
"""Of the visible keys that fire in each row."""
_SQUARE = ("hsrjax dense", "dense einsum")


def make_inputs(source: Source, keys: int, *, exact: bool = True) -> Inputs:
    """A sequence of 8 query / 4 key heads of 64, or of a captured file's heads."""
    return inputs.causal(source, Shape(keys=keys), SHARE, exact=exact)


def contestants(
    names: list[str], task: Task, given: Inputs, *, quick: bool = False
) -> list[Contestant]:
    """hsrjax, the dense baselines and the peers.

    Args:
      names: of peers.
      task: "prefill", or "train" with gradients by query, key and value.
      given: what is attended to.
      quick: try one tiling of the chunked baseline instead of all.
    """
    makers: dict[str, Callable[[], Open]] = {
        "hsr": lambda: _hsrjax("hsr", task, given),
        "auto": lambda: _hsrjax("auto", task, given),
        "hsrjax dense": lambda: _hsrjax("dense", task, given),
        "dense einsum": lambda: _einsum(task, given),
    }
    if given.loop is not None and not internals.kernels_missing():
        makers["hsr (triton)"] = lambda: _hsrjax("hsr", task, given, "triton")
        makers["hsrjax dense (triton)"] = lambda: _hsrjax(
            "dense", task, given, "triton"
        )
    ours = [
        Contestant(
            name,
            "relu",
            functools.partial(_prepare, name, make, task, given),
            peers_jax.finish,
        )
        for name, make in makers.items()
    ]
    return [*ours, _chunked(task, given, quick), *peers.contestants(names, task, given)]


def contestant(
    name: str, method: str, implementation: str, task: Task, given: Inputs
) -> Contestant:
    """A method of hsrjax by an implementation."""
    return Contestant(
        name,
        "relu",
        lambda: _hsrjax(method, task, given, implementation),
        peers_jax.finish,
        detail=f"implementation {implementation}",
    )


def _prepare(name: str, make: Callable[[], Open], task: Task, given: Inputs) -> Open:
    if name in _SQUARE:
        peers.check_memory(peers.score_gib(task, given))
    return make()


def _relu(given: Inputs) -> hsrjax.ReLU:
    bias = jnp.asarray(given.bias)
    return hsrjax.ReLU(power=given.power, bias=bias, normalize=given.normalize)


def _hsrjax(
    method: Any, task: Task, given: Inputs, implementation: str | None = None
) -> Open:
    """Building the index is part of the call."""

    def attend(query, key, value, relu) -> Any:
        return hsrjax.attention(
            query,
            key,
            value,
            activation=relu,
            method=method,
            implementation=implementation,
            is_causal=True,
            scale=1.0,
        )

    if task == "train":
        return peers_jax.train(attend, given, _relu(given))
    return peers_jax.attending(attend, given, _relu(given))


def _einsum(task: Task, given: Inputs) -> Open:
    attend, bias = dense.natural_einsum(given), jnp.asarray(given.bias)
    if task == "train":
        return peers_jax.train(attend, given, bias)
    return peers_jax.attending(attend, given, bias)


def _chunked(task: Task, given: Inputs, quick: bool) -> Contestant:
    """The tiled baseline, with the tiling that is fastest on this input."""
    operands = [*peers_jax.arrays(given), jnp.asarray(given.bias)]
    if task == "train":
        operands.append(jnp.asarray(peers_jax.cotangent(given)))
    kinds = {"prefill": chunked.attention, "train": chunked.attention_and_gradients}

    def make(tiling: chunked.Tiling):
        compiled = jax.jit(kinds[task](given, tiling))
        return lambda: jax.block_until_ready(compiled(*operands))

    def prepare() -> Open:
        if given.loop is not None:
            contestant.detail = str(chunked.LARGE)
            attend = kinds[task](given, chunked.LARGE)
            return peers_jax.attending(attend, given, *operands[3:])
        tilings = chunked.TILINGS[:1] if quick else chunked.TILINGS
        best = chunked.best_tiling(make, tilings)
        contestant.detail = str(best)
        call = make(best)
        return lambda: call

    contestant = Contestant("dense in tiles", "relu", prepare, peers_jax.finish)
    return contestant
