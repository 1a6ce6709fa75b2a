"""Heads as few bytes, in a form that a page unpacks without a library.

A head is deflated bytes. Numbers by query are 16 bits each, those that change slowly as
the difference from the query before (modulo 2^16), all low bytes before all high bytes;
the keys of a query are ascending, as differences likewise, and their scores 8 bits
between the lowest and the highest listed of the query. `data.js` beside this file reads
it.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from models.exploration.rows import Head

LEVELS = {
    "count": None,
    "possible": None,
    "looked": None,
    "soft": None,
    "threshold": 65535,
    "top": 4095,
    "floor": 4095,
    "listed": 255,
    "mass": 1023,
    "slack": 63,
    "missed": 255,
    "error": 255,
}
"""Numbers by query, and the steps between the smallest and the largest that they are
rounded to; whole numbers are not. `possible` is written as what it has more than
`count`, and `looked` as what it has more than `possible`."""
SMOOTH = ("soft", "threshold", "mass")
"""Those that change slowly."""
_CAPS = (64, 48, 32, 24, 16, 12, 8, 6, 4, 2, 1)


class Packed(NamedTuple):
    """A head in text.

    Attributes:
      text: base64 of the deflated bytes.
      columns: for every number by query, in order, [name, smallest, step, whether it
        is written as differences].
    """

    text: str
    columns: list[list[Any]]


def pack_all(heads: Sequence[Head], *, budget: int) -> tuple[list[Packed], int]:
    """Packs heads with as many keys of a query as fit.

    Args:
      heads: to be packed.
      budget: bytes of text for all.

    Returns:
      The heads, and the keys listed of a query at most. Where not even one fits, the
      text is longer than the budget.
    """
    packed, cap = [], _CAPS[0]
    for cap in _CAPS:
        packed, size = [], 0
        for head in heads:
            packed.append(pack(head, cap=cap))
            size += len(packed[-1].text)
            if size > budget:
                break
        if size <= budget:
            break
    return packed, cap


def pack(head: Head, *, cap: int) -> Packed:
    """Packs one head, with at most `cap` keys of each query.

    Example:
      >>> pack(head, cap=8).columns[0]
      ['count', 0, 1, 0]
    """
    most = min(cap, head.keys.shape[-1])
    kept = np.minimum(head.kept, most)
    listed = np.arange(most) < kept[:, None]
    scores = np.where(listed, head.scores[:, :most], np.inf)
    floor, top = scores.min(-1), head.scores[:, 0]
    numbers = head._asdict() | {
        "possible": head.possible - head.count,
        "looked": head.looked - head.possible,
        "top": top,
        "floor": floor,
        "listed": np.where(listed, head.shares[:, :most], 0).sum(-1),
    }
    columns, data = [], []
    for name, levels in LEVELS.items():
        low, step, whole = _rounded(numbers[name], levels)
        smooth = name in SMOOTH
        columns.append([name, low, step, int(smooth)])
        data.append(_planes(np.diff(whole, prepend=0) if smooth else whole))
    keys = np.where(listed, head.keys[:, :most], 2**30)
    order = np.argsort(keys, axis=-1)
    width = np.maximum(top - floor, 1e-30)[:, None]
    steps = np.round(255 * np.clip((scores - floor[:, None]) / width, 0, 1))
    # A key that fires stays above one that does not, however close they are.
    fires = np.arange(most) < head.count[:, None]
    weakest = np.maximum(np.where(fires, steps, 256).min(-1, keepdims=True), 1)
    steps = np.where(fires, np.maximum(steps, 1), np.minimum(steps, weakest - 1))
    steps = np.take_along_axis(steps, order, -1)[listed]
    keys = np.take_along_axis(keys, order, -1)
    apart = np.diff(keys, axis=-1, prepend=0)[listed]
    data += [kept.astype(np.uint8).tobytes(), _planes(apart), _bytes(steps)]
    return Packed(deflate(b"".join(data)), columns)


def deflate(data: bytes) -> str:
    """Base64 of the bytes, deflated."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _rounded(values: np.ndarray, levels: int | None) -> tuple[float, float, np.ndarray]:
    """The smallest, the step, and whole numbers of steps above it."""
    if levels is None:
        return 0, 1, values.astype(np.int64)
    wide = values.astype(np.float64)
    low, high = float(wide.min()), float(wide.max())
    step = (high - low) / levels or 1.0
    return low, step, np.round((wide - low) / step).astype(np.int64)


def _planes(values: np.ndarray) -> bytes:
    """Whole numbers modulo 2^16: low bytes, then high bytes."""
    whole = values.astype(np.int64) & 0xFFFF
    return _bytes(whole & 0xFF) + _bytes(whole >> 8)


def _bytes(values: np.ndarray) -> bytes:
    return values.astype(np.uint8).tobytes()
