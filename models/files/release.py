"""A trained model as two files: config.json and model.safetensors.

What `python -m train export` writes and `load_run` reads like a run folder. Variables
have names like "blocks.0.mlp.up.kernel"; float16 halves the file and is made float32
again when it is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy

from models.files.atomic import replacing

WEIGHTS = "model.safetensors"
_DTYPES = {"F32": np.float32, "F16": np.float16}


def write_weights(
    folder: Path,
    variables: dict[str, Any],
    *,
    dtype: Literal["float32", "float16"] = "float32",
    layout: Literal["np", "pt"] = "np",
) -> Path:
    """Writes model.safetensors so that a reader sees the old file or the new one.

    Args:
      folder: where; it must exist.
      variables: arrays by name.
      dtype: to store them in.
      layout: whose names and shapes these are; `transformers` reads "pt" alone.

    Returns:
      The file's path.

    Raises:
      ValueError: a value is not finite, or too large for float16.
    """
    kind = np.dtype(dtype)
    stored = {}
    for name, value in variables.items():
        with np.errstate(over="ignore"):
            stored[name] = np.array(value, dtype=kind, order="C")
        if not np.isfinite(stored[name]).all():
            raise ValueError(f"{name} holds values that are not finite in {dtype}")
    with replacing(folder / WEIGHTS) as temporary:
        safetensors.numpy.save_file(stored, temporary, metadata={"format": layout})
    return folder / WEIGHTS


def read_weights(path: Path, shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Reads model.safetensors, trusting nothing: names and shapes are checked first.

    Args:
      path: the file.
      shapes: what it must hold: anything with a `shape`, by name.

    Returns:
      Arrays f32 by name.

    Raises:
      ValueError: it is damaged, or does not hold these variables.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            found = set(file.keys())
            if found != shapes.keys():
                raise ValueError(
                    f"missing variables {sorted(shapes.keys() - found)[:5]}, unknown "
                    f"variables {sorted(found - shapes.keys())[:5]}"
                )
            for name, want in shapes.items():
                view = file.get_slice(name)
                shape, kind = tuple(view.get_shape()), view.get_dtype()
                if shape != tuple(want.shape) or kind not in _DTYPES:
                    raise ValueError(
                        f"{name} must be float32 or float16 {list(want.shape)}, got "
                        f"{kind} {list(shape)}"
                    )
            return {name: file.get_tensor(name).astype(np.float32) for name in shapes}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(str(error).splitlines()[0][:200]) from error
