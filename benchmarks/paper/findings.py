"""What came of a claim, and the results that it is read from."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.harness.tables import where

HOLDS = "holds"
REPAIRED = "holds repaired"
EMPTY = "holds, says nothing"
FAILS = "does not hold"
UNTESTABLE = "not testable"

TOP_R_TOLERANCE = 1e-3
"""Of an output's difference to the exact one, in parts of max|V|."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim and what came of it.

    Attributes:
      id: of the statement in the paper.
      claim: in short.
      verdict: one of those above, or how an erratum was seen.
      found: the figures.
      source: file of the results they come from.
    """

    id: str
    claim: str
    verdict: str
    found: str
    source: str


@dataclasses.dataclass(frozen=True)
class Found:
    """What the experiments wrote.

    Attributes:
      summaries: summary.json by experiment.
      tables: lines of results.csv by experiment, of NAME.csv by EXPERIMENT/NAME.
    """

    summaries: dict[str, dict[str, Any]]
    tables: dict[str, list[dict[str, Any]]]

    @property
    def model(self) -> str:
        """Name of the model of theorem43."""
        return self.summaries["theorem43"]["read"]["model"].split("-Instruct")[0]

    @property
    def by_gamma(self) -> dict[str, dict[str, Any]]:
        """Summary of the model's rows by gamma."""
        return next(iter(self.summaries["theorem43"]["sources"].values()))

    def exponents(self, task: str, name: str) -> list[dict[str, Any]]:
        """Fitted exponents of one task and name, by d."""
        return where(self.summaries["time"]["exponents"], task=task, name=name)

    def curve(self, r: int, *, model: str, tail: bool = False) -> dict[int, float]:
        """Perplexity over dense with the top r keys, by context."""
        return {
            int(line["context"]): line["over_dense"]
            for line in where(self.tables["figure3"], r=r, tail=tail)
            if line["model"].startswith(model)
        }


def exponents_in_words(lines: list[dict[str, Any]]) -> str:
    """Measured exponents by d with the theorem's in brackets."""
    return ", ".join(
        f"d = {line['head_dim']}: {line['exponent']:.2f} ({line['theorem']:.2f})"
        for line in lines
        if line["exponent"] is not None
    )
