"""A run's numbers in trackio or wandb as well as in its files; off unless asked for."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = "hsrjax"
NONE = "none"


def check_tracker(name: str) -> None:
    """Raises ValueError where the package of a tracker is not installed."""
    if name != NONE and importlib.util.find_spec(name) is None:
        raise ValueError(
            f"--track {name} needs the package {name}, which is not installed: pip "
            f"install {name}, or leave --track out"
        )


class Tracker:
    """Sends what is logged to a tracker; a context that ends its run there.

    Both have the interface of wandb: `init`, `log` and `finish`.

    Args:
        name: "trackio" or "wandb".
        out: run folder; its name is the run's, its path makes out a run that goes on.
        options: of the model and its training.
    """

    def __init__(self, name: str, out: Path, *, options: dict[str, Any]) -> None:
        """Begins a run of the tracker, or goes on with it."""
        place = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
        # trackio knows runs by their names alone.
        own = {"id": place, "dir": str(out)} if name == "wandb" else {}
        module = importlib.import_module(name)
        self._run = module.init(
            project=PROJECT, name=out.name, config=options, resume="allow", **own
        )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        self._run.finish()

    def write(self, row: dict[str, Any]) -> None:
        """Sends one line of metrics.csv."""
        numbers = {name: value for name, value in row.items() if name != "step"}
        self._run.log(numbers, step=row["step"])

    def write_heads(self, step: int, measured: dict[str, np.ndarray]) -> None:
        """Sends numbers f[L, N] by name; NaN is left out."""
        self._run.log(
            {
                f"{name}/layer_{layer}/head_{head}": float(value)
                for name, values in measured.items()
                for (layer, head), value in np.ndenumerate(values)
                if not np.isnan(value)
            },
            step=step,
        )
