"""One head of attention in float64: full softmax, and what the top r keys leave out.

What they leave out is held against Lemma 6.5, Definition B.3 and Theorem 4.3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

import hsrjax

QUANTILES = (0.1, 0.5, 0.9)


@dataclasses.dataclass(frozen=True)
class Head:
    """One head: queries at the newest positions, each sees the keys up to its own.

    Attributes:
      query: f[T, H], scaled: a score is the plain inner product.
      key: f[S, H].
      value: f[S, D].
      causal: query t sees the first S - T + t + 1 keys; else all.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    causal: bool = True


class Truth(NamedTuple):
    """Full softmax of one head.

    Attributes:
      visible: i[T], number of keys that a query sees.
      scores: f64[T, S], -inf where a key is not seen.
      ordered: f64[T, S], the same from the largest down.
      weights: f64[T, S].
      held: f64[T, S], mass of the best 1, 2, ... keys.
      output: f64[T, D].
      extreme: f64[T], max|V| of the visible keys.
    """

    visible: np.ndarray
    scores: np.ndarray
    ordered: np.ndarray
    weights: np.ndarray
    held: np.ndarray
    output: np.ndarray
    extreme: np.ndarray


@dataclasses.dataclass(frozen=True)
class Found:
    """Of T rows of a head with the top r keys, f64[T] each.

    Attributes:
      missed: share of the softmax mass outside the top r.
      error: ||Attn - Attn_hat||_inf.
      largest: 2 ||V||_inf, above which a bound says nothing.
      lemma: Lemma 6.5's bound, 2 missed ||V||_inf.
      theorem: Theorem 4.3's bound, with |q| / sqrt(d) for |q|, which scores that are
        divided by sqrt(d) need.
      theorem_printed: the same without the 1 / sqrt(d).
      beta_top: the largest beta1 of Definition B.3.
      beta_rest: the smallest beta2.
      gap: mean score of the top r less the best of the rest, in nats.
      gap_printed: the same with beta2 >= 0, as the definition has it.
      needed: gap from which on Theorem 4.3 says something, (1 - gamma) log n.
      output: f64[T, D], Attn_hat.
    """

    missed: np.ndarray
    error: np.ndarray
    largest: np.ndarray
    lemma: np.ndarray
    theorem: np.ndarray
    theorem_printed: np.ndarray
    beta_top: np.ndarray
    beta_rest: np.ndarray
    gap: np.ndarray
    gap_printed: np.ndarray
    needed: np.ndarray
    output: np.ndarray


def exact(head: Head) -> Truth:
    """Full softmax of a head."""
    query, key, value = (
        np.asarray(x, np.float64) for x in (head.query, head.key, head.value)
    )
    rows, keys = len(query), len(key)
    visible = np.full(rows, keys)
    if head.causal:
        visible = keys - rows + 1 + np.arange(rows)
    scores = np.where(np.arange(keys) < visible[:, None], query @ key.T, -np.inf)
    ordered = -np.sort(-scores, axis=-1)
    weights = np.exp(scores - ordered[:, :1])
    mass = weights.sum(-1, keepdims=True)
    weights /= mass
    held = np.cumsum(np.exp(ordered - ordered[:, :1]), axis=-1) / mass
    extreme = np.maximum.accumulate(np.abs(value).max(-1))[visible - 1]
    return Truth(visible, scores, ordered, weights, held, weights @ value, extreme)


def measure(head: Head, kept: list[int]) -> list[Found]:
    """Measures a head for several r.

    Args:
      head: with more than max(kept) keys visible to every query.
      kept: the r.
    """
    visible, scores, ordered, weights, _, full, extreme = exact(head)
    value, d = np.asarray(head.value, np.float64), head.query.shape[1]
    norms = np.linalg.norm(np.asarray(head.query, np.float64), axis=-1) * math.sqrt(d)
    log_n = np.log(visible)
    found = []
    for r in kept:
        top = np.where(scores >= ordered[:, r - 1 : r], weights, 0.0)
        held = top.sum(-1)
        output = top @ value / held[:, None]
        mean, rest = ordered[:, :r].mean(-1), ordered[:, r]
        missed = np.maximum(1.0 - held, 0.0)
        gamma = math.log(r) / log_n
        unit = norms / math.sqrt(d) * log_n  # nats of beta = 1
        betas = mean / unit, rest / unit
        found.append(
            Found(
                missed=missed,
                error=np.abs(full - output).max(-1),
                largest=2.0 * extreme,
                lemma=2.0 * missed * extreme,
                theorem=_theorem(visible, r, *betas, norms, extreme, head_dim=d),
                theorem_printed=_theorem(visible, r, *betas, norms, extreme),
                beta_top=betas[0],
                beta_rest=betas[1],
                gap=mean - rest,
                gap_printed=mean - np.maximum(rest, 0.0),
                needed=(1.0 - gamma) * log_n,
                output=output,
            )
        )
    return found


def _theorem(visible, r, top, rest, norms, extreme, **options) -> np.ndarray:
    gamma = math.log(r) / np.log(visible)
    bound = hsrjax.theory.massive_activation_bound(
        visible, gamma, top, rest, norms, extreme, **options
    )
    return np.asarray(bound, np.float64)


def join(found: list[Found]) -> Found:
    """The rows of several heads as those of one."""
    names = [field.name for field in dataclasses.fields(Found)]
    return Found(*(np.concatenate([getattr(x, n) for x in found]) for n in names))


def describe(found: Found) -> dict[str, Any]:
    """Columns that say how large errors and bounds are, over rows."""
    says = found.theorem < found.largest
    # Bounds are compared in float32's precision, which the theorem's is computed in;
    # an error near nothing is rounding.
    slack = 1e-12 * found.largest
    missed = found.missed
    return {
        "rows": missed.size,
        "missed_mean": float(missed.mean()),
        "missed_median": float(np.median(missed)),
        "error_over_2v_median": float(np.median(found.error / found.largest)),
        "lemma_over_2v_median": float(np.median(found.lemma / found.largest)),
        "theorem_over_2v_median": float(np.median(found.theorem / found.largest)),
        "lemma_exceeded_rows": _exceeded(found.error, found.lemma, slack),
        "theorem_exceeded_rows": _exceeded(found.error, found.theorem, slack),
        "printed_theorem_exceeded_rows": _exceeded(
            found.error, found.theorem_printed, slack
        ),
        **_tightness("lemma", found.error, found.lemma, missed > 1e-12),
        "theorem_says_something_percent": 100 * float(says.mean()),
        **_tightness("theorem", found.error, found.theorem, says),
        "beta_top_mean": float(found.beta_top.mean()),
        "beta_rest_mean": float(found.beta_rest.mean()),
        "definition_b3_percent": 100
        * float(np.mean(found.beta_top >= np.maximum(found.beta_rest, 0.0))),
        "says_something_as_printed_percent": 100
        * float(np.mean(found.gap_printed > found.needed)),
        "gap_nats_mean": float(found.gap.mean()),
        "needed_nats": float(found.needed.mean()),
    }


def _exceeded(error: np.ndarray, bound: np.ndarray, slack: np.ndarray) -> int:
    return int(np.sum(error > bound * (1 + 1e-4) + slack))


def _tightness(
    name: str, error: np.ndarray, bound: np.ndarray, where: np.ndarray
) -> dict[str, float | None]:
    """Quantiles of error / bound over the rows that count."""
    names = [f"{name}_tightness_{100 * q:.0f}" for q in QUANTILES]
    if not where.any():
        return dict.fromkeys(names)
    ratios = np.quantile(error[where] / bound[where], QUANTILES)
    return dict(zip(names, map(float, ratios), strict=True))
