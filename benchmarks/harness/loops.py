"""Many steps in one program, so that launches from Python do not count.

On an accelerator a step takes less than Python needs to start one. Here a compiled loop
takes K steps, each of which depends on the one before: what it attends with is moved by
a multiple, zero, of the last result, which no compiler can know to be zero, and its
caches are the loop's own, extended in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.harness.timing import Open

COLD = 64 << 20
"""Bytes that steps must read in turn so that no L2 holds them (an H100's has 50 MB)."""
_MOST_CACHES = 8


class Loop(NamedTuple):
    """How steps are repeated.

    Attributes:
      steps: of a call.
      caches: that take turns, so that what is read is not in a cache of the device.
    """

    steps: int
    caches: int = 1


def of_step(scanned: int, *, steps: int) -> Loop:
    """A loop over as many caches as it takes to find them cold.

    Args:
      scanned: bytes of a cache that every step reads, whatever the method: its sketch.
      steps: at least, of a call.
    """
    caches = min(_MOST_CACHES, -(-COLD // max(1, scanned)), steps)
    return Loop(-(-steps // caches) * caches, caches)


class Held:
    """Caches, which calls take away and bring back longer."""

    def __init__(self, caches: tuple[Any, ...] = (None,)):
        self.caches = caches


class Repeated:
    """A call of the program; `steps` of them are what is timed."""

    def __init__(self, program: Callable[..., Any], held: Held, operands, steps: int):
        self.steps = steps
        self._program, self._held, self._operands = program, held, operands

    def __call__(self) -> Any:
        held, taken = self._held, self._held.caches
        held.caches, result = self._program(taken, *self._operands)
        return jax.block_until_ready(result)


def repeated(
    step: Callable[..., tuple[Any, Any]],
    loop: Loop,
    hold: Callable[[], Held],
    moved: Any,
    fixed: Any = (),
    *,
    like: Callable[[], Any] | None = None,
) -> Open:
    """Compiles a loop, and says how to open it for a turn.

    Args:
      step: (cache, moved, fixed) -> (result, cache), a pytree of arrays each.
      loop: how many steps over how many caches.
      hold: the caches of a turn.
      moved: arrays of floats that each step gets anew, moved by nothing.
      fixed: arrays that all steps share.
      like: makes the caches' shapes, traced; None is those of `hold`.
    """
    caches = jax.eval_shape(like) if like else hold().caches
    program = compiled(step, loop, caches, moved, fixed)
    return lambda: opened(program, loop, hold(), moved, fixed)


def compiled(
    step: Callable[..., tuple[Any, Any]],
    loop: Loop,
    caches: tuple[Any, ...],
    moved: Any,
    fixed: Any,
    *,
    begin: Callable[[Any], Any] = lambda cache: cache,
) -> Callable[..., Any]:
    """The program of a loop, for operands of these shapes.

    Args:
      step, loop, moved, fixed: as in `repeated`.
      caches: or their shapes.
      begin: what a call does to each cache before its first step.
    """
    program = _program(step, loop, begin)
    return program.lower(caches, moved, fixed, _zero()).compile()


def opened(
    program: Callable[..., Any], loop: Loop, held: Held, moved: Any, fixed: Any
) -> Repeated:
    """A call of a compiled program."""
    return Repeated(program, held, (moved, fixed, _zero()), loop.steps)


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.float32)


def _program(step, loop: Loop, begin):
    def run(caches, moved, fixed, zero):
        def once(cache, last):
            # All of the last result is needed, not only the number that is looked at.
            last = jax.lax.optimization_barrier(last)
            number = jax.tree.leaves(last)[0].reshape(-1)[0].astype(jnp.float32)
            nudge = lambda x: x + (zero * number).astype(x.dtype)
            return step(cache, jax.tree.map(nudge, moved), fixed)

        def body(_, carry):
            caches, last = carry
            grown = []
            for cache in caches:
                last, cache = once(cache, last)
                grown.append(cache)
            return tuple(grown), last

        caches = tuple(map(begin, caches))
        result, _ = jax.eval_shape(step, caches[0], moved, fixed)
        none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)
        trips = loop.steps // len(caches)
        return jax.lax.fori_loop(0, trips, body, (caches, none))

    return jax.jit(run, donate_argnums=0)
