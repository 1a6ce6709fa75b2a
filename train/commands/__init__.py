"""What `python -m train NAME` does beside training, a module each.

Every one of them holds its options, `Command`, and `work`, which is given them and
prints; `train.__main__` is the header of all.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from models.command import JsonOption


@dataclasses.dataclass(frozen=True)
class OfRuns(JsonOption):
    """Options of a command about runs that are there."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders."""

    def __post_init__(self) -> None:
        """Refuses to have nothing to do."""
        if not self.runs:
            raise ValueError("no run was named: pass the folders of one or more runs")
