"""The plan of a call: which method, how many slots, how large a tile.

Decided from its sizes and the costs of this machine; where it depends on how many keys
fire, the plan says "auto" and the call itself decides (`hsrjax._src.run`). Of an
activation only what `Activation` says for the planner is asked.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from hsrjax._src.core import checks
from hsrjax._src.core.bitset import WORD
from hsrjax._src.planning import costs, memory
from hsrjax._src.planning.costs import Costs
from hsrjax._src.planning.shape import Shape as Shape
from hsrjax._src.planning.shape import of_decode as of_decode
from hsrjax._src.planning.shape import of_prefill as of_prefill

Method = Literal["dense", "hsr", "auto"]
METHODS = ("dense", "hsr", "auto")

_PART_ROWS = 16
_MOST_PARTS = 32
_BOUNDS_AT_ONCE = 2**21
_RUN_SLOTS = 64
_LEAST_SLOTS = 128
_MOST_SLOTS = 1024
_SLOT_SHARE = 64
WIDEST = 256
"""Heads that kernels take, at most: queries, keys and sums fit into registers."""
_MEASURED_ROWS = 2
"""Query rows of a key head that the curves of `Costs` were measured with."""
_CLEARLY_LESS = 0.75
"""Of dense, for "auto" to choose inside the call: that costs time as well."""
_GRADIENTS_DENSE = 3.5
"""Times what dense takes without its gradients: seven products instead of two."""
_GRADIENTS_RUN = 3.0
"""The same of a run of reported keys; which they are is found once."""
_PRODUCTS = 2**20
"""Products that are held at a time at least; few queries hold all of theirs."""
_LEAST_QUERIES = 8
_SCORES_AT_ONCE = 2**22
_CHUNK_SCORES = 2**20
_LEAST_SIDE = 128
_MOST_SIDE = 512


class Plan(NamedTuple):
    """How a call will be carried out; all that a compiled program depends on.

    Attributes:
      method: "dense", "hsr", or "auto": the call itself chooses.
      implementations: their names, in the order in which they are tried.
      capacity: slots of a run of gathered keys.
      tile: query positions of one tile of "hsr".
      parts: runs of a tile's positions that gather keys of their own.
      dense_tile: query positions of one tile of "dense".
      chunk: keys that a dense tile scores at once, None is all.
    """

    method: str
    implementations: tuple[str, ...]
    capacity: int
    tile: int
    parts: int
    dense_tile: int
    chunk: int | None


class Expected(NamedTuple):
    """Nanoseconds that a call is expected to take.

    Attributes:
      dense: of dense attention.
      hsr: of bounding every key; what survives comes on top.
      one_run: of gathering and scoring `capacity` survivors of one set.
      survivors: of all runs where the activation says how many there are, else 0.
      probe: of looking at a sample before choosing.
    """

    dense: float
    hsr: float
    one_run: float
    survivors: float
    probe: float


class Choice(NamedTuple):
    """A plan, and why.

    Attributes:
      plan: static.
      reason: one sentence for people.
      expected: what the call chooses by, if it does.
    """

    plan: Plan
    reason: str
    expected: Expected | None = None


def plan(
    activation: Any,
    method: Method,
    shape: Shape,
    *,
    implementations: tuple[str, ...] = ("xla",),
    capacity: int | None = None,
    gradients: bool = False,
    table: Costs | None = None,
) -> Choice:
    """Chooses how a call is carried out.

    Args:
      activation: what is asked for.
      method: "dense", "hsr" or "auto".
      shape: of the call.
      implementations: that it may use, in turn.
      capacity: slots of one gather, or None to choose.
      gradients: choose for a call that is differentiated.
      table: costs, None is those of this machine.

    Raises:
      ValueError: unknown method, capacity < 1, a table of costs that is none.
    """
    checks.check_choice("method", method, METHODS)
    if capacity is not None:
        checks.check_positive("capacity", capacity)
    hsr = lay_out(activation, shape, capacity, implementations)
    dense = hsr._replace(method="dense")
    if activation.keeps_all:
        return Choice(dense, "full softmax leaves no key out")
    if method != "auto":
        return Choice(hsr if method == "hsr" else dense, "asked for")
    if not memory.fits(bytes_of_hsr(shape, hsr), devices=shape.devices):
        return Choice(dense, "reporting does not fit into memory")
    expected = expect(activation, shape, hsr, table=table)
    if gradients:
        expected = expected._replace(
            dense=_GRADIENTS_DENSE * expected.dense,
            one_run=_GRADIENTS_RUN * expected.one_run,
            survivors=_GRADIENTS_RUN * expected.survivors,
        )
    return _choose(activation, shape, hsr, dense, expected)


def lay_out(
    activation: Any,
    shape: Shape,
    capacity: int | None = None,
    implementations: tuple[str, ...] = ("xla",),
) -> Plan:
    """Tiles, slots and chunks of either way, in a plan of "hsr"."""
    heads = shape.batch * shape.heads
    part_scores = max(1, _PART_ROWS // shape.group) * heads * shape.keys
    parts = _MOST_PARTS
    if activation.whole_rows:
        # It goes over the bounds of all keys many times: they should stay in cache.
        parts = max(1, min(parts, _BOUNDS_AT_ONCE // part_scores))
    tile, parts = _tile(shape.queries, shape.group, parts)
    dense_tile, chunk = dense_tiling(
        activation.dense_form, queries=shape.queries, keys=shape.keys, heads=heads
    )
    if capacity is None:
        # Few queries should need one run a set; of many sets, runs should end full.
        share = min(max(_LEAST_SLOTS, shape.keys // _SLOT_SHARE), _MOST_SLOTS)
        slots = share if tile * shape.group < _PART_ROWS else _RUN_SLOTS
        capacity = _round_up(min(shape.keys, slots))
    return Plan("hsr", implementations, capacity, tile, parts, dense_tile, chunk)


def _choose(
    activation: Any, shape: Shape, hsr: Plan, dense: Plan, expected: Expected
) -> Choice:
    """The static part of "auto"."""
    if activation.whole_rows:
        if expected.hsr + expected.survivors < expected.dense:
            return Choice(hsr, "reporting is expected to be cheaper")
        return Choice(dense, "scoring every key is expected to be cheaper")
    least = sets(shape, hsr) * expected.one_run
    if expected.hsr + least + expected.probe >= _CLEARLY_LESS * expected.dense:
        return Choice(
            dense,
            f"at {shape.keys} keys scoring all costs no more than bounding all",
        )
    share = break_even(shape, hsr, expected)
    if share >= 1:
        return Choice(hsr, "reporting is cheaper even if all keys fire")
    reason = (
        f"reporting is cheaper unless more than about {100 * share:.2g} % of the keys "
        "are reported for a tile of queries: the call looks, and takes the cheaper way"
    )
    return Choice(hsr._replace(method="auto"), reason, expected)


def runner(activation: Any, shape: Shape, implementations: tuple[str, ...]) -> str:
    """The implementation that does the work of a call, whose costs therefore count.

    What kernels do not take XLA does: most rows that have to be known whole, wide
    heads, keys in cells.
    """
    widest = max(shape.head_dim, shape.value_dim)
    fused = activation.fusible and not activation.whole_rows
    return (
        implementations[0] if fused and widest <= WIDEST and not shape.cells else "xla"
    )


def refuse(shape: Shape, plan: Plan) -> None:
    """Raises ValueError where a call cannot fit into memory.

    Args:
      shape: of the call.
      plan: of the call.
    """
    dense = plan.method == "dense"
    what = "dense attention" if dense else "attention to reported keys"
    memory.check(
        f"{what} of {shape.queries} queries to {shape.keys} keys",
        (bytes_of_dense if dense else bytes_of_hsr)(shape, plan),
        remedy="use fewer queries a call, a smaller batch"
        + (" or fewer keys" if dense else " or method='dense'"),
        devices=shape.devices,
    )


def bytes_of_dense(shape: Shape, plan: Plan) -> int:
    """Bytes of dense attention: the scores of a tile, float32, and the output."""
    scores = shape.sets * shape.group * plan.dense_tile * (plan.chunk or shape.keys)
    return 4 * (scores + _outputs(shape))


def bytes_of_hsr(shape: Shape, plan: Plan) -> int:
    """Bytes of reporting: index if it is made, sets, products of a tile, the output."""
    parts = -(-shape.queries // plan.tile) * plan.parts
    words = parts * shape.sets * -(-shape.keys // WORD)
    products = shape.sets * shape.group * plan.tile * shape.keys
    found = 4 * (words + min(products, _PRODUCTS) + _outputs(shape))
    if not shape.cached:
        found += memory.of_index(shape.sets, shape.keys, shape.head_dim, itemsize=4)
    return found


def _outputs(shape: Shape) -> int:
    return shape.sets * shape.rows * shape.value_dim


def break_even(shape: Shape, plan: Plan, expected: Expected) -> float:
    """The share of the keys from which on gathering them costs more than dense."""
    runs = (expected.dense - expected.hsr) / (sets(shape, plan) * expected.one_run)
    return max(0.0, runs * plan.capacity / shape.keys)


def sets(shape: Shape, plan: Plan) -> int:
    """How many sets of keys a call reports: one for every part of every tile."""
    return -(-shape.queries // plan.tile) * plan.parts * shape.sets


def expect(
    activation: Any, shape: Shape, plan: Plan, *, table: Costs | None = None
) -> Expected:
    """What a call costs, dense and reported.

    Args:
      activation: what is asked for.
      shape: of the call.
      plan: from `lay_out`.
      table: costs, None is those of this machine.
    """
    if table is None:
        table = costs.current(runner(activation, shape, plan.implementations)).costs
    rows = shape.rows
    further = max(0, rows - _MEASURED_ROWS)
    width = shape.head_dim + shape.value_dim
    keys = shape.sets * shape.keys
    numbers, codes = keys * width, keys * shape.head_dim
    size = shape.itemsize if table.by_bytes else 1
    dense = costs.interpolate(table.dense, size * numbers)
    looked_at = 1.0 if plan.chunk is None else shape.seen
    dense += numbers * further * looked_at * table.dense_product
    hsr = costs.interpolate(table.scan, codes)
    hsr += codes * further * shape.seen * table.scan_product
    if not shape.cached:
        hsr += codes * table.build
    part_rows = plan.tile * shape.group / plan.parts
    number = size * table.gather_number + part_rows * table.gather_product
    one_run = max(1.0, plan.capacity * (table.gather_row + width * number))
    survivors = 0.0
    if activation.whole_rows:
        top_r = getattr(activation, "top_r", None)
        kept = activation.expected_keys(shape.keys)
        kept = min(shape.keys, kept * part_rows)
        scores = keys * rows
        if activation.dense_form.whole_rows:
            choose = table.epsilon_dense if top_r is None else table.top_r_dense
            dense += scores * choose
        tail = getattr(activation, "tail", None)
        if tail is not None:  # mean values of all groups, weighted
            hsr += scores * shape.value_dim / tail * table.dense_product
        hsr += scores * (table.epsilon_hsr if top_r is None else table.top_r_hsr)
        survivors = -(-kept // plan.capacity) * sets(shape, plan) * one_run
    return Expected(dense, hsr, one_run, survivors, table.probe)


def dense_tiling(
    activation: Any, *, queries: int, keys: int, heads: int
) -> tuple[int, int | None]:
    """How dense attention cuts its scores: not where they or the queries are few.

    Args:
      activation: Softmax(top_r or epsilon) and Entmax need whole rows.
      queries: T.
      keys: S.
      heads: query heads of all batch rows.

    Returns:
      Query positions of a tile, and keys scored at once (None is all). On CPU the
      scores of a tile against a chunk should stay in cache, and all temporaries of a
      call below 32 MB: beyond, they are mapped anew at every call.
    """
    if queries < _LEAST_QUERIES or queries * keys * heads <= _SCORES_AT_ONCE:
        return queries, None
    if activation.whole_rows:
        return max(1, min(queries, _CHUNK_SCORES // (keys * heads))), None
    room = _CHUNK_SCORES // heads
    side = 2 ** ((room.bit_length() - 1) // 2)
    tile = _even(queries, min(max(_LEAST_SIDE, side), _MOST_SIDE))
    chunk = min(max(_LEAST_SIDE, room // tile), max(_MOST_SIDE, keys // 8))
    return tile, min(keys, _round_up(_even(keys, chunk // 32 * 32)))


def _even(total: int, most: int) -> int:
    """The least size of as few parts of at most `most` as make up the total."""
    return -(-total // -(-total // most))


def _tile(queries: int, group: int, most: int) -> tuple[int, int]:
    """Positions of a tile and into how many equal parts, at most so many, it is cut."""
    part = max(1, _PART_ROWS // group)
    if queries <= part:
        return queries, 1
    parts = min(-(-queries // part), most)
    return part * parts, parts


def _round_up(keys: int) -> int:
    return -(-keys // 32) * 32
