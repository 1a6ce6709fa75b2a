"""A captured file, .npz: what one layer's attention got, to be attended to again.

query  f32[1, T, N, H]  scaled: the score is the plain inner product
key    f32[1, T, K, H]
value  f32[1, T, K, D]
bias   f32[1, T, N]     the threshold of each row; absent for softmax models
about  JSON: power and normalize of the ReLU, and where it comes from
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.files.results import staged


class Captured(NamedTuple):
    """The contents of a file; its arrays are named above."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    bias: np.ndarray | None
    about: dict[str, Any]


def save(path: Path, captured: Captured) -> None:
    """Writes a file, whole or not at all."""
    arrays = {k: x for k, x in captured._asdict().items() if x is not None}
    arrays["about"] = np.array(json.dumps(captured.about))
    with staged(path.parent) as stage:
        np.savez(stage / path.name, **arrays)


def load(path: Path) -> Captured:
    """Reads a file.

    Raises:
      ValueError: names what is wrong with it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays["about"]))
        q, k, v = (arrays[x].astype(np.float32) for x in ("query", "key", "value"))
        about |= {"power": int(about["power"]), "normalize": str(about["normalize"])}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path.name} is not a captured file ({type(error).__name__}): make one "
            "with python -m benchmarks.capture"
        ) from error
    bias = arrays["bias"].astype(np.float32) if "bias" in arrays else None
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]
    if not fits or q.shape[:2] != k.shape[:2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{path.name}: query, key and value must be [1, T, N, H], [1, T, K, H] and "
            f"[1, T, K, D], got {q.shape}, {k.shape} and {v.shape}"
        )
    if bias is not None and bias.shape != q.shape[:3]:
        raise ValueError(f"{path.name}: bias must be {q.shape[:3]}, got {bias.shape}")
    return Captured(q, k, v, bias, about)
