"""Which implementation, how many slots and how large a tile: decided from shapes alone.

The numbers come from measurements on CPU; every choice is exact, only the speed
depends on it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from hsrjax import checks
from hsrjax.activations import Activation, Softmax

Implementation = Literal["dense", "hsr", "auto"]
IMPLEMENTATIONS = ("dense", "hsr", "auto")

_TILE_ROWS = 256
_PART_ROWS = 32
_LEAST_KEYS = 4096
_LEAST_SLOTS = 256
_MOST_SLOTS = 1024
_SLOT_SHARE = 64


class Plan(NamedTuple):
    """How a call will be carried out.

    Attributes:
      implementation: "dense" or "hsr".
      capacity: slots of one gather.
      tile: query positions of one tile.
      parts: runs of a tile's positions that gather keys of their own.
      reason: one sentence for people.
    """

    implementation: str
    capacity: int
    tile: int
    parts: int
    reason: str


def plan(
    activation: Activation,
    implementation: Implementation,
    *,
    queries: int,
    keys: int,
    group: int,
    capacity: int | None = None,
) -> Plan:
    """Chooses for T query positions against S keys.

    Args:
      activation: what is asked for.
      implementation: "dense", "hsr" or "auto".
      queries: T.
      keys: S.
      group: query heads per key head.
      capacity: slots of one gather, or None to choose.

    Raises:
      ValueError: unknown implementation, capacity < 1.
    """
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    if capacity is not None:
        checks.check_positive("capacity", capacity)
    tile, parts = _tile(queries, group)
    slots = capacity or min(
        _round_up(keys),
        _round_up(min(max(_LEAST_SLOTS, keys // _SLOT_SHARE), _MOST_SLOTS)),
    )
    if isinstance(activation, Softmax) and activation.is_full:
        return Plan("dense", slots, queries, 1, "full softmax leaves no key out")
    if implementation != "auto":
        if implementation == "dense":
            return Plan("dense", slots, queries, 1, "asked for")
        return Plan("hsr", slots, tile, parts, "asked for")
    if keys < _LEAST_KEYS:
        reason = f"below {_LEAST_KEYS} keys the sketch costs more than it saves"
        return Plan("dense", slots, queries, 1, reason)
    reason = f"from {_LEAST_KEYS} keys on reporting is cheaper"
    return Plan("hsr", slots, tile, parts, reason)


def _tile(queries: int, group: int) -> tuple[int, int]:
    """Positions of a tile and into how many equal parts it is cut."""
    part = max(1, _PART_ROWS // group)
    if queries <= part:
        return queries, 1
    parts = min(-(-queries // part), max(1, _TILE_ROWS // _PART_ROWS))
    return part * parts, parts


def _round_up(keys: int) -> int:
    return -(-keys // 32) * 32
