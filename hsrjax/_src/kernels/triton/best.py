"""Top r and entmax in decode: the best keys of a row, by a guess that is verified.

A sample says where they begin, about; the keys that may score so much are scored, and a
kernel with all of these of a row chooses and sums. Rows whose guess was too high, or
that have more keys than a kernel holds, are done over all keys: `rest` needs no luck.
All launches are in one program, which the host need not wait for.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from hsrjax._src.activations.certificates import LeftOut
from hsrjax._src.activations.entmax import Entmax
from hsrjax._src.activations.softmax import Reported
from hsrjax._src.core import bitset
from hsrjax._src.core.arrays import guard, score_rounding
from hsrjax._src.core.tiles import Partial, Tiles
from hsrjax._src.index.index import Index
from hsrjax._src.kernels.triton import launch
from hsrjax._src.kernels.triton.choose import MOST, choose
from hsrjax._src.kernels.triton.rest import finish
from hsrjax._src.kernels.triton.rules import Gap, Rule, TopR
from hsrjax._src.kernels.triton.sample import guessed, sample_size
from hsrjax._src.kernels.triton.scores import ROOM, score

_LIST_BYTES = 2**28
_SPARE = 2.0
"""Keys there is room for are so many times as many as are expected."""


def rule_of(activation: Any, slots: int) -> Rule:
    """What the kernels go by.

    Raises:
      NotImplementedError: so many keys may take part that there is no room for them.
    """
    if isinstance(activation, Entmax):
        return Gap(activation.power)
    rule = TopR(activation.top_r)
    if _SPARE * rule.most(max(1.0, slots / sample_size(slots))) > MOST:
        raise NotImplementedError(f"the best {rule.rank} of {slots} keys are too many")
    return rule


def best(
    xla: Any,
    index: Index,
    tiles: Tiles,
    rows: jax.Array,
    *,
    capacity: int,
    parts: int,
    counted: bool,
    interpret: bool,
) -> tuple[jax.Array, Partial, Any]:
    """As `Implementation.select_and_sum`, of one tile; `xla` does both steps.

    Raises:
      NotImplementedError: lists would be too long.
    """
    rule = rule_of(tiles.activation, index.keys.shape[-2])
    weighed = isinstance(rule, TopR)
    options = launch.Options(counted, interpret, weighed=weighed)

    @jax.custom_vjp
    def run(tiles, keys, rows, index):
        return _by_kernels(index, tiles, keys, rows, options, rule)

    def forward(*arrays):
        return run(*arrays), arrays

    def backward(arrays, cotangents):
        *some, index = arrays
        two_steps = functools.partial(
            _in_two_steps, xla, index, capacity=capacity, parts=parts, counted=counted
        )
        return (*jax.vjp(two_steps, *some)[1](cotangents), None)

    run.defvjp(forward, backward)
    return run(tiles, index.keys, rows, jax.lax.stop_gradient(index))


def _by_kernels(index, tiles, keys, rows, options, rule):
    lead = keys.shape[:-2]
    nothing = tiles._replace(activation=None)
    x = launch.flat(nothing, keys, rows, None, index.sketch)
    sizes = launch.sizes_of(x, options)
    _check_room(x, sizes)
    guess = guessed(x, sizes, rule)
    found = score(x._replace(law=Reported(guess)), sizes)
    found = choose(found, x.values, guess, sizes, rule)
    found = finish(x, found, sizes, rule)
    unflat = lambda x: x.reshape(x.shape[0], *lead, *x.shape[2:])
    found = jax.tree.map(unflat, found)
    if found.left is None:
        return found.size, found.sums, None
    rounding = score_rounding(tiles.queries[0], index.sketch.key_norm())[None]
    left = found.left * guard(keys.shape[-2])
    certificate = LeftOut(left, jnp.ones_like(left), rounding)
    return found.size, found.sums, certificate


def _in_two_steps(xla, index, tiles, keys, rows, *, capacity, parts, counted):
    index = dataclasses.replace(index, keys=keys)
    tile = jax.lax.stop_gradient(jax.tree.map(lambda x: x[0], tiles))
    found = xla.select(
        jax.lax.stop_gradient(index), None, tile, capacity=capacity, parts=parts
    )
    words, law, certificate, candidates = jax.tree.map(lambda x: x[None], found)
    sum_keys = functools.partial(xla.sum_sets, capacity=capacity, counted=counted)
    arrays = tiles._replace(activation=law), keys, rows, index.ids, words
    sums = tiles.activation.settle(sum_keys(*arrays), sum_keys, arrays)
    if candidates is not None:
        sums = sums._replace(candidates=candidates)
    sizes = bitset.size(words)
    queries = tiles.queries.shape[-2]
    return jnp.repeat(sizes, queries // sizes.shape[-1], axis=-1), sums, certificate


def _check_room(x, sizes):
    """Of scores and slots, by program and of all."""
    rows = x.queries.shape[1] * sizes.queries
    if 8 * rows * (sizes.programs * ROOM + MOST) > _LIST_BYTES:
        raise NotImplementedError(f"the lists would take over {_LIST_BYTES} bytes")
