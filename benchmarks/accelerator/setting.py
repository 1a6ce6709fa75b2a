"""What all rows are told: how long, how small, by which kernels."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from benchmarks.harness.timing import Contestant, Score, Timing, race

BUDGET = 3.0
"""Seconds of calls after which a contestant takes no further turns."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How rows are measured.

    Attributes:
      kernels: the name of the implementation with fused kernels.
      quick: tiny sizes.
      rounds: turns of every contestant.
      seed: of the inputs.
      until: time of `time.monotonic` at which all must be written.
      without: names of contestants that are left out.
      peers: names of peers that take part.
      tell: is told whose turn it is.
    """

    kernels: str = "triton"
    quick: bool = False
    rounds: int = 3
    seed: int = 0
    until: float = float("inf")
    without: Sequence[str] = ()
    peers: Sequence[str] = ("jax-cudnn", "tokamax")
    tell: Callable[[str], None] = lambda name: None

    @property
    def implementations(self) -> dict[str, str]:
        """Those of hsrjax, by what their names have in brackets."""
        return {"kernels": self.kernels, "xla": "xla"}

    def size(self, full: int, small: int) -> int:
        """One of two sizes."""
        return small if self.quick else full

    def race(
        self, contestants: Sequence[Contestant], score: Score
    ) -> dict[str, Timing]:
        """All that are not left out, whose failures are remarks."""
        return race(
            [one for one in contestants if one.name not in self.without],
            rounds=self.rounds,
            score=score,
            tick=self.tell,
            budget=BUDGET,
            until=self.until,
            lenient=True,
            together=True,
        )

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()
