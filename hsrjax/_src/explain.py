"""What a call will do, and why: the planner's choice in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hsrjax._src.activations.base import Activation
from hsrjax._src.attention import plan_call as plan_attention
from hsrjax._src.core import checks
from hsrjax._src.decode import KVCache
from hsrjax._src.decode import plan_call as plan_decode
from hsrjax._src.planning import costs, memory
from hsrjax._src.planning import plan as planner
from hsrjax._src.planning.plan import Choice, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """How a call will be carried out; `str()` says it in sentences.

    Attributes:
      method: "dense" or "hsr"; "auto" where the call itself chooses.
      implementation: that carries it out, "xla" where what was asked for cannot.
      reason: for it, in one sentence.
      capacity: slots of one gather of "hsr".
      tile: query positions that "hsr" bounds together.
      dense_us: microseconds that "dense" is expected to take.
      hsr_us: microseconds that "hsr" is expected to take if few keys are reported; for
        Softmax(epsilon) and Entmax, if they keep one key in twenty. None for full
        softmax.
      share_us: microseconds more for every 1 % of the keys that a tile reports.
      break_even: share of the keys from which on "hsr" is expected to cost more; 0
        where it always does.
      dense_bytes: memory that "dense" needs at least, beside its arguments.
      hsr_bytes: memory that "hsr" needs at least, beside its arguments.
      available_bytes: memory of the device, or None where it does not tell.
      refused: why the call will raise, or "".
      costs: which table the times are worked out from.
      differs: how that was measured on something else than this machine, or "".
    """

    method: str
    implementation: str
    reason: str
    capacity: int
    tile: int
    dense_us: float
    hsr_us: float | None
    share_us: float
    break_even: float
    dense_bytes: int
    hsr_bytes: int
    available_bytes: int | None
    refused: str
    costs: str
    differs: str

    def __str__(self) -> str:
        lines = [
            f"Refused: {self.refused}" if self.refused else "",
            f"{self.method}: {self.reason}.",
            self._at_run_time(),
            f"Expected: dense {_number(self.dense_us)} us; {self._reported()}.",
            f"Memory beside the arguments: dense at least "
            f"{memory.in_words(self.dense_bytes)}, hsr at least "
            f"{memory.in_words(self.hsr_bytes)}; {self._device()}.",
            f"Costs of {self.implementation}: {self.costs}, "
            f"{self.differs or 'measured on this machine'}.",
            "The times may be far off: run python -m benchmarks calibrate here and set "
            f"{costs.VARIABLE}."
            if self.differs
            else "",
        ]
        return "\n".join(line for line in lines if line)

    def _at_run_time(self) -> str:
        if self.implementation == "xla":
            return _AT_RUN_TIME[self.method].format(slots=self.capacity)
        return f"Kernels ({self.implementation}): {_IN_KERNELS[self.method]}"

    def _reported(self) -> str:
        if self.hsr_us is None:
            return "hsr would have to score all keys too"
        sizes = ""
        if self.implementation == "xla":
            tile, slots = self.tile, self.capacity
            sizes = f" (tiles of {tile} query positions, {slots} slots)"
        return (
            f"hsr {_number(self.hsr_us)} us if few keys are reported and "
            f"{_number(self.share_us)} us more for every 1 % of the keys{sizes}"
        )

    def _device(self) -> str:
        if self.available_bytes is None:
            return "the device does not tell what it has"
        return f"the device has {memory.in_words(self.available_bytes)}"


_AT_RUN_TIME = {
    "dense": "Every key is scored, however many fire.",
    "hsr": "However many keys fire, none is dropped: more than {slots} reported by a "
    "tile take further exact passes.",
    "auto": "The call bounds a sample of the keys first, and scores all if too many of "
    "them survive; it counts again once all are bounded. Either way is exact.",
}


_IN_KERNELS = {
    "dense": "every key is scored, however many fire.",
    "hsr": "each program lists the keys that may fire and scores these, or all of its "
    "keys where they are too many for its list. None is dropped.",
    "auto": "each program lists the keys that may fire and scores these, or all of its "
    "keys where many of the first ones may or its list is full. Either way is exact.",
}


def explain(
    query: jax.Array | jax.ShapeDtypeStruct,
    key: jax.Array | jax.ShapeDtypeStruct | None = None,
    value: jax.Array | jax.ShapeDtypeStruct | None = None,
    *,
    activation: Activation,
    cache: KVCache | None = None,
    **options: Any,
) -> Explanation:
    """Says how `attention`, or with a cache `decode_attention`, will be carried out.

    Runs nothing: only shapes and dtypes count, so that arrays may be
    `jax.ShapeDtypeStruct`s (of a cache: `jax.eval_shape(lambda: init_cache(...))`).

    Args:
      query: f[B, T, N, H].
      key: f[B, S, K, H]; None with a cache.
      value: f[B, S, K, D]; None with a cache.
      activation: as in `attention` and `decode_attention`.
      cache: of `init_cache`, in place of key and value.
      options: any other argument of `attention`, or of `decode_attention`.

    Returns:
      `Explanation`, whose `str()` is a few sentences. A call that would be refused for
      its memory is explained all the same, as `refused`.

    Raises:
      ValueError, TypeError: what the call itself would raise, but for memory; both or
        neither of cache and key with value.

    Cost: of Python alone, whatever the sizes; nothing is compiled or allocated.

    Example:
      >>> import jax, jax.numpy as jnp, hsrjax
      >>> query = jax.ShapeDtypeStruct((1, 1, 8, 64), jnp.float32)
      >>> cache = jax.eval_shape(lambda: hsrjax.init_cache(1, 96, 4, 64))
      >>> plan = hsrjax.explain(query, cache=cache, activation=hsrjax.ReLU())
      >>> print(plan)
      dense: at 96 keys scoring all costs no more than bounding all.
      Every key is scored, however many fire.
      Expected: ...

    Source: not in the paper.
    """
    given = tuple(x is not None for x in (key, value, cache))
    if given not in ((True, True, False), (False, False, True)):
        raise ValueError(
            "explain needs key and value, or cache in their place, got "
            f"key={_kind(key)}, value={_kind(value)}, cache={_kind(cache)}."
        )
    options = {name: checks.as_integer(_shaped(x)) for name, x in options.items()}
    for changes_nothing in ("scale", "return_info"):
        options.pop(changes_nothing, None)
    if cache is None:
        arrays = _shaped(query), _shaped(key), _shaped(value)
        found = plan_attention(*arrays, activation=activation, **options)
    else:
        found = plan_decode(_shaped(query), cache, activation=activation, **options)
    return _explain(activation, *found)


def _explain(activation: Activation, shape: Shape, choice: Choice) -> Explanation:
    """Adds what a plan does not hold: times, memory, and the table they come from."""
    plan = choice.plan
    implementation = planner.runner(activation, shape, plan.implementations)
    table = costs.current(implementation)
    expected = planner.expect(activation, shape, plan, table=table.costs)
    one_run_each = planner.sets(shape, plan) * expected.one_run
    survivors = expected.survivors if activation.whole_rows else one_run_each
    refused = ""
    try:
        planner.refuse(shape, plan)
    except ValueError as error:
        refused = str(error)
    return Explanation(
        method=plan.method,
        implementation=implementation,
        reason=choice.reason,
        capacity=plan.capacity,
        tile=plan.tile,
        dense_us=expected.dense / 1e3,
        hsr_us=None if activation.keeps_all else (expected.hsr + survivors) / 1e3,
        share_us=one_run_each * shape.keys / plan.capacity / 1e5,
        break_even=planner.break_even(shape, plan, expected),
        dense_bytes=planner.bytes_of_dense(shape, plan),
        hsr_bytes=planner.bytes_of_hsr(shape, plan),
        available_bytes=memory.available(),
        refused=refused,
        costs=table.source,
        differs=table.differs,
    )


def _shaped(x: Any) -> Any:
    """An array for what is a sequence of numbers; all else as it is."""
    return jnp.asarray(x) if isinstance(x, (list, tuple, np.ndarray)) else x


def _number(us: float) -> str:
    return f"{us:,.0f}" if us >= 100 else f"{us:.2g}"


def _kind(x) -> str:
    return "None" if x is None else type(x).__name__
