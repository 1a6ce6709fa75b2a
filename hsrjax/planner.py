"""Which implementation, how many slots and how large a tile.

Decided from shapes and the costs of this machine (`hsrjax.costs`); where it depends on
how many keys fire, the plan says "auto" and `hsrjax.adaptive` decides inside the call.
Every choice is exact, only the speed depends on it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from hsrjax import checks, costs, memory
from hsrjax.activations import Activation, Softmax
from hsrjax.costs import Costs
from hsrjax.shape import Shape

Implementation = Literal["dense", "hsr", "auto"]
IMPLEMENTATIONS = ("dense", "hsr", "auto")

_TILE_ROWS = 256
_PART_ROWS = 32
_LEAST_SLOTS = 256
_MOST_SLOTS = 1024
_SLOT_SHARE = 64
_MEASURED_ROWS = 2
"""Query rows of a key head that the curves of `Costs` were measured with."""
_EPSILON_SHARE = 0.05
"""Keys that Softmax(epsilon) is expected to keep: what language models do at 0.1."""


class Expected(NamedTuple):
    """Nanoseconds that a call is expected to take.

    Attributes:
      dense: of dense attention.
      hsr: of bounding every key; what survives comes on top.
      one_pass: of gathering and scoring one pass of survivors of one tile.
      survivors: of all passes where the activation says how many there are, else 0.
      probe: of looking at a sample before choosing.
    """

    dense: float
    hsr: float
    one_pass: float
    survivors: float
    probe: float


class Plan(NamedTuple):
    """How a call will be carried out.

    Attributes:
      implementation: "dense", "hsr", or "auto": the call itself chooses.
      capacity: slots of one gather.
      tile: query positions of one tile.
      parts: runs of a tile's positions that gather keys of their own.
      expected: what the call chooses by, if it does.
      reason: one sentence for people.
    """

    implementation: str
    capacity: int
    tile: int
    parts: int
    expected: Expected | None
    reason: str


def plan(
    activation: Activation,
    implementation: Implementation,
    shape: Shape,
    *,
    capacity: int | None = None,
    table: Costs | None = None,
) -> Plan:
    """Chooses how a call is carried out.

    Args:
      activation: what is asked for.
      implementation: "dense", "hsr" or "auto".
      shape: of the call.
      capacity: slots of one gather, or None to choose.
      table: costs, None is those of this machine.

    Raises:
      ValueError: unknown implementation, capacity < 1, a table of costs that is none.
    """
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    if capacity is not None:
        checks.check_positive("capacity", capacity)
    hsr = slots(shape, capacity)
    dense = hsr._replace(implementation="dense", tile=shape.queries, parts=1)
    if isinstance(activation, Softmax) and activation.is_full:
        return dense._replace(reason="full softmax leaves no key out")
    if implementation != "auto":
        return hsr if implementation == "hsr" else dense
    if not memory.fits(memory.of_dense(shape), devices=shape.devices):
        return hsr._replace(reason="dense attention does not fit into memory")
    expected = expect(activation, shape, hsr, table=table)
    return _choose(activation, shape, hsr, dense, expected)


def slots(shape: Shape, capacity: int | None = None) -> Plan:
    """The plan of reporting, with its tiles and slots."""
    tile, parts = _tile(shape.queries, shape.group)
    if capacity is None:
        share = max(_LEAST_SLOTS, shape.keys // _SLOT_SHARE)
        capacity = _round_up(min(shape.keys, share, _MOST_SLOTS))
    return Plan("hsr", capacity, tile, parts, None, "asked for")


def _choose(
    activation: Activation, shape: Shape, hsr: Plan, dense: Plan, expected: Expected
) -> Plan:
    """The static part of "auto"."""
    if isinstance(activation, Softmax):
        if expected.hsr + expected.survivors < expected.dense:
            return hsr._replace(reason="reporting is expected to be cheaper")
        return dense._replace(reason="scoring every key is expected to be cheaper")
    tiles = -(-shape.queries // hsr.tile)
    if expected.hsr + tiles * expected.one_pass + expected.probe >= expected.dense:
        return dense._replace(
            reason=f"at {shape.keys} keys scoring all costs no more than bounding all"
        )
    share = break_even(shape, hsr, expected)
    if share >= 1:
        return hsr._replace(reason="reporting is cheaper even if all keys fire")
    reason = (
        f"reporting is cheaper unless more than about {100 * share:.2g} % of the keys "
        "are reported for a tile of queries: the call looks, and takes the cheaper way"
    )
    return hsr._replace(implementation="auto", expected=expected, reason=reason)


def refuse(shape: Shape, plan: Plan) -> None:
    """Raises ValueError where a call cannot fit into memory.

    Args:
      shape: of the call.
      plan: of the call.
    """
    remedy = "use fewer queries a call or a smaller batch"
    if plan.implementation == "dense":
        what, needed = "dense attention", memory.of_dense(shape)
        remedy += ", or implementation='hsr' with an activation that leaves keys out"
    else:
        what = "attention to reported keys"
        needed = memory.of_hsr(shape, tile=plan.tile, parts=plan.parts)
    what = f"{what} of {shape.queries} queries to {shape.keys} keys"
    memory.check(what, needed, remedy=remedy, devices=shape.devices)


def break_even(shape: Shape, plan: Plan, expected: Expected) -> float:
    """The share of the keys from which on gathering them costs more than dense."""
    tiles = -(-shape.queries // plan.tile)
    passes = (expected.dense - expected.hsr) / (tiles * expected.one_pass)
    return max(0.0, passes * plan.capacity / shape.keys)


def expect(
    activation: Activation, shape: Shape, plan: Plan, *, table: Costs | None = None
) -> Expected:
    """What a call costs, dense and reported.

    Args:
      activation: what is asked for.
      shape: of the call.
      plan: tile, parts and capacity of reporting.
      table: costs, None is those of this machine.
    """
    table = costs.current().costs if table is None else table
    sets, rows = shape.sets, shape.rows
    further = max(0, rows - _MEASURED_ROWS)
    width = shape.head_dim + shape.value_dim
    numbers, codes = sets * shape.keys * width, sets * shape.keys * shape.head_dim
    dense = costs.interpolate(table.dense, numbers)
    dense += numbers * further * table.dense_product
    hsr = costs.interpolate(table.scan, codes)
    hsr += codes * further * shape.seen * table.scan_product
    if not shape.cached:
        hsr += codes * table.build
    part_rows = plan.tile * shape.group / plan.parts
    number = table.gather_number + part_rows * table.gather_product
    slots = sets * plan.parts * plan.capacity
    one_pass = slots * (table.gather_row + width * number)
    survivors = 0.0
    if isinstance(activation, Softmax) and not activation.is_full:
        top_r = activation.top_r
        kept = _EPSILON_SHARE * shape.keys if top_r is None else top_r
        kept = min(shape.keys, kept * part_rows)
        scores = sets * shape.keys * rows
        dense += scores * (table.epsilon_dense if top_r is None else table.top_r_dense)
        hsr += scores * (table.epsilon_hsr if top_r is None else table.top_r_hsr)
        passes = -(-kept // plan.capacity) * -(-shape.queries // plan.tile)
        survivors = passes * one_pass
    return Expected(dense, hsr, one_pass, survivors, table.probe)


def _tile(queries: int, group: int) -> tuple[int, int]:
    """Positions of a tile and into how many equal parts it is cut."""
    part = max(1, _PART_ROWS // group)
    if queries <= part:
        return queries, 1
    parts = min(-(-queries // part), max(1, _TILE_ROWS // _PART_ROWS))
    return part * parts, parts


def _round_up(keys: int) -> int:
    return -(-keys // 32) * 32
