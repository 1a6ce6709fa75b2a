"""What the benchmarks share: their options, and what they hand to the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path("benchmarks/results")
QUICK_RESULTS = Path("runs/benchmarks")
TOLERANCE = 1e-5
"""Largest relative error of hsrjax and of the dense baselines, in float32."""
PEER_TOLERANCE = 1e-4
"""Of peers, whose algorithms sum in another order (running maxima and the like)."""
TOLERANCE_BFLOAT16 = 2**-7
"""Of all, in bfloat16: half an ulp from the weights and half from the output."""


class Unavailable(Exception):
    """This implementation cannot be measured here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Basics:
    """Options that every command has."""

    out: Path | None = None
    """Folder of the results: benchmarks/results; with --quick, runs/benchmarks."""
    json: bool = False
    """End with one line on stdout that holds the results as JSON."""
    quick: bool = False
    """Small sizes: shows that everything runs, says nothing about speed."""
    seed: int = 0
    """Of the random inputs."""

    def __post_init__(self) -> None:
        """Refuses values that cannot work, in one sentence."""
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie between 0 and 2**32 - 1, got {self.seed}")

    @property
    def folder(self) -> Path:
        """Where results go, with the default resolved."""
        return self.out or (QUICK_RESULTS if self.quick else RESULTS)


@dataclasses.dataclass(frozen=True)
class Settings(Basics):
    """Options of what takes time and may have rivals."""

    repeats: int | None = None
    """Rounds in which everything takes a turn; medians count. 7; with --quick, 2."""
    peers: tuple[str, ...] = ("all",)
    """Peers to measure beside hsrjax and dense: names, or all, or none."""

    def __post_init__(self) -> None:
        """Refuses values that cannot work, in one sentence."""
        super().__post_init__()
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"repeats must be 1 or more, got {self.repeats}")
        if len(self.peers) > 1 and {"all", "none"} & set(self.peers):
            raise ValueError("peers are names, or all alone, or none alone")

    @property
    def rounds(self) -> int:
        """Rounds, with the default resolved."""
        return self.repeats or (2 if self.quick else 7)


def chosen_peers(settings: Settings, known: Iterable[str]) -> list[str]:
    """The peers that the settings ask for; ValueError where one is not known."""
    known = list(known)
    if settings.peers == ("all",):
        return known
    if settings.peers == ("none",) or not settings.peers:
        return []
    unknown = [name for name in settings.peers if name not in known]
    if unknown:
        raise ValueError(
            f"unknown peers {', '.join(unknown)}: choose from {', '.join(known)}, or "
            "all, or none"
        )
    return [name for name in known if name in settings.peers]


def sentence(error: Exception) -> str:
    """What is printed of an error, without what tyro puts before a dataclass's own."""
    return str(error).removeprefix("Error parsing Command: ")


@dataclasses.dataclass
class Results:
    """What a benchmark found.

    Attributes:
      rows: lines of results.csv.
      summary: the numbers that people quote; JSON values.
      figures: pictures by file name.
      wrong: results that differ from what they should be, in words.
      texts: further files by name.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    figures: dict[str, Figure] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
