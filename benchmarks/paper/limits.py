"""Softmax with a guarantee: what is asked for, and full softmax in float64."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

import hsrjax
from benchmarks.paper.massive import Head
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


class Truth(NamedTuple):
    """Full softmax of one head in float64.

    Attributes:
      output: f64[T, D].
      held: f64[T, S], mass of the best 1, 2, ... keys.
      extreme: f64[T], max|V| of the visible keys.
    """

    output: np.ndarray
    held: np.ndarray
    extreme: np.ndarray


def exact(head: Head) -> Truth:
    """Full softmax of the newest rows of one head, causal."""
    query, key, value = (
        np.asarray(x, np.float64) for x in (head.query, head.key, head.value)
    )
    rows, keys = len(query), len(key)
    visible = keys - rows + 1 + np.arange(rows)
    scores = np.where(np.arange(keys) < visible[:, None], query @ key.T, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    held = np.cumsum(-np.sort(-weights, axis=-1), axis=-1)
    extreme = np.maximum.accumulate(np.abs(value).max(-1))[visible - 1]
    return Truth(weights @ value, held, extreme)


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
