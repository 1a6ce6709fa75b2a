"""What the experiments on softmax with a guarantee ask for."""

from __future__ import annotations

import dataclasses
from typing import Any

import hsrjax
from benchmarks.paper.reading import Reading

TOLERANCE = 1e-4
"""Of the engine's float32 output to float64, in parts of max|V|."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits(Reading):
    """Options of what leaves keys out."""

    tokens: int | None = None
    """Tokens of the text to read: 8,192; with --quick, 96."""
    r: tuple[int, ...] = (16, 64, 256)
    """Keys kept per query."""
    epsilon: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
    """Largest shares of the mass left out."""
    tail: int = 1
    """Group of the tail, measured beside what is left out without one."""

    @property
    def length(self) -> int:
        """Tokens, with the default resolved."""
        return self.tokens or (96 if self.quick else 8192)

    @property
    def activations(self) -> list[hsrjax.Softmax]:
        """All that is measured."""
        found = []
        for tail in (None, self.tail):
            found += [hsrjax.Softmax(top_r=r, tail=tail) for r in self.r]
            found += [hsrjax.Softmax(epsilon=e, tail=tail) for e in self.epsilon]
        return found


def columns(activation: hsrjax.Softmax) -> dict[str, Any]:
    """The columns that say what was asked for."""
    return {
        "r": activation.top_r,
        "epsilon": activation.epsilon,
        "tail": activation.tail,
    }


def in_words(r: int | None, epsilon: float | None, tail: int | None) -> str:
    """What a setting is called in tables."""
    name = f"r {r:g}" if r else f"epsilon {epsilon:g}"
    return f"{name} tail {tail:g}" if tail else name
