"""Heads as few bytes, in a form that a page unpacks without a library.

A head is deflated bytes. Numbers by query are 16 bits each, as the difference from the
query before (modulo 2^16), all low bytes before all high bytes; the keys of a query are
ascending, as differences likewise, and their scores 8 bits between the lowest and the
highest listed of the query. `data.js` beside this file reads it.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from models.exploration.rows import Head

WHOLE = ("count", "possible", "looked", "soft")
"""Fields of `Head` that are written as they are."""
LEVELS = {
    "threshold": 65535,
    "top": 4095,
    "floor": 4095,
    "listed": 255,
    "mass": 1023,
    "slack": 255,
    "missed": 4095,
    "error": 1023,
}
"""Numbers that are rounded, to so many steps between the smallest and the largest."""
_CAPS = (64, 48, 32, 24, 16, 12, 8, 6, 4, 2, 1)


class Packed(NamedTuple):
    """A head in text.

    Attributes:
      text: base64 of the deflated bytes.
      columns: for every number by query [name, smallest, step], in order.
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
      ['count', 0, 1]
    """
    most = min(cap, head.keys.shape[-1])
    kept = np.minimum(head.kept, most)
    listed = np.arange(most) < kept[:, None]
    scores = np.where(listed, head.scores[:, :most], np.inf)
    floor, top = scores.min(-1), head.scores[:, 0]
    numbers = {
        "threshold": head.threshold,
        "top": top,
        "floor": floor,
        "listed": np.where(listed, head.shares[:, :most], 0).sum(-1),
        "mass": head.mass,
        "slack": head.slack,
        "missed": head.missed,
        "error": head.error,
    }
    columns, data = [], []
    for name in WHOLE:
        columns.append([name, 0, 1])
        data.append(_differences(getattr(head, name)))
    for name, values in numbers.items():
        low, step, whole = _rounded(values, LEVELS[name])
        columns.append([name, low, step])
        data.append(_differences(whole))
    keys = np.where(listed, head.keys[:, :most], 2**30)
    order = np.argsort(keys, axis=-1)
    width = np.maximum(top - floor, 1e-30)[:, None]
    steps = np.round(255 * np.clip((scores - floor[:, None]) / width, 0, 1))
    steps = np.take_along_axis(steps, order, -1)[listed]
    keys = np.take_along_axis(keys, order, -1)
    apart = np.diff(keys, axis=-1, prepend=0)[listed]
    data += [kept.astype(np.uint8).tobytes(), _planes(apart), _bytes(steps)]
    return Packed(deflate(b"".join(data)), columns)


def deflate(data: bytes) -> str:
    """Base64 of the bytes, deflated."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _rounded(values: np.ndarray, levels: int) -> tuple[float, float, np.ndarray]:
    """The smallest, the step, and whole numbers of steps above it."""
    wide = values.astype(np.float64)
    low, high = float(wide.min()), float(wide.max())
    step = (high - low) / levels or 1.0
    return low, step, np.round((wide - low) / step)


def _differences(values: np.ndarray) -> bytes:
    return _planes(np.diff(values.astype(np.int64), prepend=0) & 0xFFFF)


def _planes(values: np.ndarray) -> bytes:
    """Low bytes, then high bytes."""
    whole = values.astype(np.uint16)
    return _bytes(whole & 0xFF) + _bytes(whole >> 8)


def _bytes(values: np.ndarray) -> bytes:
    return values.astype(np.uint8).tobytes()
