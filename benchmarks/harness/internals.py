"""The only place that looks inside hsrjax: its costs, plans, balls and kernels."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hsrjax
from hsrjax._src import run
from hsrjax._src.core.visible import of_decode
from hsrjax._src.kernels import base as registry
from hsrjax._src.kernels.triton.implementation import Triton
from hsrjax._src.planning import costs as costs
from hsrjax._src.planning import plan as planner

STEPS = 20
"""Steps of one call on accelerators, each after the one before: in a model a step does
not wait for the host."""
KERNELS = "triton"
PLAYED = "interpreted"


def kernels_missing() -> str:
    """Why the fused kernels do not run here, or ""."""
    try:
        registry.implementations_for(KERNELS, costs.platform())
    except ValueError as reason:
        return str(reason)
    return ""


def play_kernels() -> str:
    """Lets JAX play the kernels, slowly; the name of that implementation."""
    with contextlib.suppress(ValueError):  # it is known already
        registry.register(Triton(PLAYED, interpret=True))
    return PLAYED


@contextlib.contextmanager
def preferring(implementation: str):
    """Calls that name no implementation use this one, where it can."""
    chosen = registry._implementations[implementation]
    before, chosen.preferred = chosen.preferred, True
    try:
        yield
    finally:
        chosen.preferred = before


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
    shape = planner.Shape(1, keys, keys, heads, kv_heads, head_dim, head_dim)
    plan = planner.lay_out(hsrjax.ReLU(), shape)
    runs = -(-keys // plan.capacity) * planner.sets(shape, plan)
    return Work(
        codes=shape.sets * keys * head_dim,
        rows=shape.rows,
        head_dim=head_dim,
        part_rows=plan.tile * shape.group / plan.parts,
        slots=runs * plan.capacity,
    )


def break_even(keys: int, table: costs.Costs) -> float | None:
    """Share of the keys over which dense wins a decode step; None where it always does.

    Args:
      keys: in the cache, for 8 query and 4 key heads of 64.
      table: costs to go by.
    """
    relu = hsrjax.ReLU()
    step = planner.Shape(1, 1, keys, 8, 4, 64, 64, cached=True)
    if table.by_bytes:
        step = step._replace(itemsize=2)
    chosen = planner.plan(relu, "auto", step, table=table).plan
    if chosen.method == "dense":
        return None
    expected = planner.expect(relu, step, chosen, table=table)
    return min(1.0, planner.break_even(step, chosen, expected))


def implementations() -> tuple[str, ...]:
    """Those that run here and have costs of their own."""
    platform, known = costs.platform(), registry.implementations()
    run_here = [x.name for x in known if not x.unavailable(platform)]
    return tuple(name for name in run_here if name == "xla" or costs.has_own(name))


def steps_of_a_call() -> int:
    """How many steps `Step.call` makes, one after the other."""
    return 1 if costs.platform() == "cpu" else STEPS


class Step:
    """Decode steps on one cache by plans of our choice.

    Args:
      query: f[B, 1, N, H]; values are as wide.
      cache: that it attends to; does not grow.
      implementation: that runs them.
    """

    def __init__(
        self, query: jax.Array, cache: hsrjax.KVCache, implementation: str = "xla"
    ):
        self._query, self._cache = query, cache
        self._implementation = implementation
        self.room = cache.index.keys.shape[-2]

    def plan(self, activation: Any) -> planner.Plan:
        """Of "hsr"."""
        keys, values = self._cache.index.keys, self._cache.values.rows
        step = planner.of_decode(self._query, keys, values, devices=1)
        names = (self._implementation,)
        return planner.lay_out(activation, step, implementations=names)

    def call(self, activation: Any, method: str, *, scale: float) -> Callable[[], Any]:
        """Steps, (output, info) of the last; "auto" only looks, and never is dense."""
        plan = self.plan(activation)._replace(method=method)
        far = planner.Expected(math.inf, 0.0, 0.0, 0.0, 0.0)
        expected = far if method == "auto" else None
        operands = (self._query, self._cache, activation, scale, expected)
        options = {"plan": plan, "steps": steps_of_a_call()}
        return lambda: jax.block_until_ready(_steps(*operands, **options))


@functools.partial(jax.jit, static_argnames=("plan", "steps"))
def _steps(query, cache, activation, scale, expected, *, plan, steps):
    length = cache.length[:, None]

    def step(query):
        return run.attend(
            query,
            cache.index.keys,
            cache.values,
            cache.index,
            of_decode(length - 1, length),
            activation=activation,
            scale=scale,
            plan=plan,
            expected=expected,
        )

    def another(_, found):
        # Nothing is added, but what is not known before.
        return step(query + (0 * found[0]).astype(query.dtype))

    return jax.lax.fori_loop(1, steps, another, step(query))


def keys_in_reach(index: hsrjax.Index, normal: np.ndarray, offset: float) -> int:
    """Keys whose balls touch a half-space: those that have to be looked at.

    Args:
      index: in spatial order, over one set of keys.
      normal: f32[H].
      offset: of the half-space.
    """
    balls, keys = index.cells, int(index.size)
    assert balls is not None
    reached = np.asarray(balls.upper(jnp.asarray(normal)[None]))[0] >= offset
    return min(int(reached[: -(-keys // balls.size)].sum()) * balls.size, keys)
