"""The only place that looks inside hsrjax: its costs, its plans, its balls."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hsrjax
from hsrjax import adaptive, planner
from hsrjax import shape as shapes
from hsrjax.bounds import ball_upper
from hsrjax.costs import VARIABLE as VARIABLE
from hsrjax.costs import Costs as Costs
from hsrjax.costs import Curve as Curve
from hsrjax.costs import current as current
from hsrjax.costs import interpolate as interpolate
from hsrjax.costs import this_machine as this_machine
from hsrjax.costs import to_json as to_json
from hsrjax.layout import query_tiles
from hsrjax.planner import Plan as Plan
from hsrjax.visible import of_decode


class Work(NamedTuple):
    """What a call of "hsr" on a whole sequence has to do.

    Attributes:
      codes: numbers in all keys.
      rows: query rows of a key head.
      head_dim: H, the size of a value too.
      part_rows: query rows that gather their keys together.
      slots: keys that are gathered if all fire, by all these parts.
    """

    codes: int
    rows: int
    head_dim: int
    part_rows: float
    slots: int


def work(*, keys: int, heads: int, kv_heads: int, head_dim: int) -> Work:
    """Of a sequence of so many keys, every query seeing all of them."""
    shape = shapes.Shape(1, keys, keys, heads, kv_heads, head_dim, head_dim)
    plan = planner.plan(hsrjax.ReLU(), "hsr", shape)
    runs = -(-keys // plan.capacity) * planner.sets(shape, plan)
    return Work(
        codes=shape.sets * keys * head_dim,
        rows=shape.rows,
        head_dim=head_dim,
        part_rows=plan.tile * shape.group / plan.parts,
        slots=runs * plan.capacity,
    )


def break_even(keys: int, table: Costs) -> float | None:
    """Share of the keys over which dense wins a decode step; None where it always does.

    Args:
      keys: in the cache, for 8 query and 4 key heads of 64.
      table: costs to go by.
    """
    relu = hsrjax.ReLU()
    step = shapes.Shape(1, 1, keys, 8, 4, 64, 64, cached=True)
    chosen = planner.plan(relu, "auto", step, table=table)
    if chosen.method == "dense":
        return None
    expected = planner.expect(relu, step, chosen, table=table)
    return min(1.0, planner.break_even(step, chosen, expected))


def room(cache: hsrjax.KVCache) -> int:
    """Tokens that a cache can hold."""
    return cache.index.keys.shape[-2]


def plan_of(activation: Any, query: jax.Array, cache: hsrjax.KVCache) -> Plan:
    """Of a decode step by hsr."""
    keys, values = cache.index.keys, cache.values.rows
    step = shapes.of_decode(query, keys, values, devices=1)
    return planner.plan(activation, "hsr", step)


def never_dense(plan: Plan) -> Plan:
    """The same by "auto" that looks at a sample and goes on with hsr in any case."""
    far = planner.Expected(math.inf, 0.0, 0.0, 0.0, 0.0)
    return plan._replace(method="auto", expected=far)


def step_by(
    plan: Plan, activation: Any, *, scale: float
) -> Callable[[jax.Array, hsrjax.KVCache], Any]:
    """A jitted decode step (query, cache) -> (output, info) that follows a plan."""

    @jax.jit
    def step(query, cache):
        length = cache.length[:, None]
        cut = functools.partial(
            query_tiles,
            activation,
            query,
            of_decode(length - 1, length),
            scale=scale,
            kv_heads=cache.index.keys.shape[1],
        )
        return adaptive.attend(
            activation,
            cache.index,
            cache.values,
            lambda tile: cut(tile=tile),
            length=1,
            heads=query.shape[2],
            plan=plan,
        )

    return step


def keys_in_reach(index: hsrjax.Index, normal: np.ndarray, offset: float) -> int:
    """Keys whose balls touch a half-space: those that have to be looked at.

    Args:
      index: in spatial order, over one set of keys.
      normal: f32[H].
      offset: of the half-space.
    """
    balls, keys = index.balls, int(index.size)
    assert balls is not None
    reached = np.asarray(ball_upper(balls, jnp.asarray(normal)[None]))[0] >= offset
    return min(int(reached[: -(-keys // balls.size)].sum()) * balls.size, keys)
