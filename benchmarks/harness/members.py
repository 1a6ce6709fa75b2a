"""Who belongs to a half-space in float64, and whether a report says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import hsrjax


@dataclasses.dataclass(frozen=True)
class Truth:
    """The members of one query, in float64.

    Attributes:
      members: ids that must be reported: beyond rounding above the offset.
      either: ids within rounding of the offset, which may fall on either side.
    """

    members: np.ndarray
    either: np.ndarray


def truth(keys: np.ndarray, normal: np.ndarray, offset: float) -> Truth:
    """Exact for the keys near the offset; the rest is far beyond any rounding."""
    rough = keys @ normal
    slack = float(np.abs(rough).max()) * 1e-4
    near = np.flatnonzero(rough >= offset - slack)
    exact = keys[near].astype(np.float64) @ normal.astype(np.float64)
    margin = hsrjax.reference.rounding(keys[near], normal)
    gap = exact - np.float64(offset)
    return Truth(near[gap > margin], near[np.abs(gap) <= margin])


def judge(found: Any, truths: list[Truth]) -> tuple[float, str]:
    """Recall over all members, and in words what an exact answer may not have.

    Args:
      found: ids per query, or counts.
      truths: of the same queries.
    """
    if isinstance(found, np.ndarray):
        least = np.array([t.members.size for t in truths])
        most = least + [t.either.size for t in truths]
        off = int(np.sum((found < least) | (found > most)))
        recall = float(np.minimum(found, least).sum() / max(1, least.sum()))
        return recall, f"{off} wrong counts" if off else ""
    missed = extra = 0
    for ids, truth in zip(found, truths, strict=True):
        missed += np.setdiff1d(truth.members, ids).size
        extra += np.setdiff1d(ids, np.union1d(truth.members, truth.either)).size
        extra += len(ids) - np.unique(ids).size
    total = sum(truth.members.size for truth in truths)
    fault = f"{missed} members missed, {extra} others reported"
    return 1 - missed / max(1, total), fault if missed or extra else ""
