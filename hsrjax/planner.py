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
_LEAST_QUERIES = 8
_SCORES_AT_ONCE = 2**22
_CHUNK_SCORES = 2**20
_LEAST_SIDE = 128
_MOST_SIDE = 512


class Plan(NamedTuple):
    """How a call will be carried out.

    Attributes:
      implementation: "dense" or "hsr".
      capacity: slots of one gather.
      tile: query positions of one tile.
      parts: runs of a tile's positions that gather keys of their own.
      reason: one sentence for people.
      chunk: keys that a dense tile scores at once, None is all.
    """

    implementation: str
    capacity: int
    tile: int
    parts: int
    reason: str
    chunk: int | None = None


def plan(
    activation: Activation,
    implementation: Implementation,
    *,
    queries: int,
    keys: int,
    group: int,
    heads: int | None = None,
    capacity: int | None = None,
) -> Plan:
    """Chooses for T query positions against S keys.

    Args:
      activation: what is asked for.
      implementation: "dense", "hsr" or "auto".
      queries: T.
      keys: S.
      group: query heads per key head.
      heads: query heads of all batch rows, N B; None is `group`.
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
    rows, chunk = dense_tiling(
        activation, queries=queries, keys=keys, heads=heads or group
    )
    if isinstance(activation, Softmax) and activation.is_full:
        return Plan("dense", slots, rows, 1, "full softmax leaves no key out", chunk)
    if implementation != "auto":
        if implementation == "dense":
            return Plan("dense", slots, rows, 1, "asked for", chunk)
        return Plan("hsr", slots, tile, parts, "asked for")
    if keys < _LEAST_KEYS:
        reason = f"below {_LEAST_KEYS} keys the sketch costs more than it saves"
        return Plan("dense", slots, rows, 1, reason, chunk)
    reason = f"from {_LEAST_KEYS} keys on reporting is cheaper"
    return Plan("hsr", slots, tile, parts, reason)


def dense_tiling(
    activation: Activation, *, queries: int, keys: int, heads: int
) -> tuple[int, int | None]:
    """How dense attention cuts its scores: not where they or the queries are few.

    Args:
      activation: Softmax(top_r or epsilon) needs whole rows.
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
    if isinstance(activation, Softmax) and not activation.is_full:
        return max(1, min(queries, _CHUNK_SCORES // (keys * heads))), None
    room = _CHUNK_SCORES // heads
    side = 2 ** ((room.bit_length() - 1) // 2)
    tile = _even(queries, min(max(_LEAST_SIDE, side), _MOST_SIDE))
    chunk = min(max(_LEAST_SIDE, room // tile), max(_MOST_SIDE, keys // 8))
    return tile, min(keys, _round_up(_even(keys, chunk // 32 * 32)))


def _even(total: int, most: int) -> int:
    """The least size of as few parts of at most `most` as make up the total."""
    return -(-total // -(-total // most))


def _tile(queries: int, group: int) -> tuple[int, int]:
    """Positions of a tile and into how many equal parts it is cut."""
    part = max(1, _PART_ROWS // group)
    if queries <= part:
        return queries, 1
    parts = min(-(-queries // part), max(1, _TILE_ROWS // _PART_ROWS))
    return part * parts, parts


def _round_up(keys: int) -> int:
    return -(-keys // 32) * 32
