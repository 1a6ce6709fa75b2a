"""Softmax attention weights: over all keys, the top r, or all but a mass epsilon."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from hsrjax._src.activations import certificates
from hsrjax._src.activations import tail as tails
from hsrjax._src.activations.base import Activation, Sight, integers, remember
from hsrjax._src.core import checks
from hsrjax._src.core.arrays import finite_or_zero
from hsrjax._src.core.batching import together
from hsrjax._src.core.tiles import Partial

_static = {"static": True}
_EPSILON_SHARE = 0.05
"""Keys that Softmax(epsilon) is expected to keep: what language models do at 0.1."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax(Activation):
    """Softmax attention weights: over all keys, the top r, or all but a mass epsilon.

    `exp(scale <q, k>)`, divided by its sum over the keys that are kept. What is left
    out is bounded, row by row, by `Info.missed_mass` and `Info.error_bound`.

    Args:
      top_r: static; keep the keys whose score is at least the r-th largest of the row;
        keys tied with the r-th are all kept. None keeps every key.
      epsilon: leave out keys that together hold at most this fraction of the row's
        softmax mass, 0 < epsilon < 1. May be traced.
      tail: static; what is left out acts all the same, through sketches: each key by
        its bounded score and by the 8-bit mean value of so many consecutive keys, 1, 2,
        4, 8, 16 or 32. An approximation of full softmax, with a bound in `Info`, that
        looks at no more keys: dense attention, which has all scores, is full softmax.
        Gradients take the tail for constant. None drops what is left out.

    Raises:
      ValueError: top_r < 1, epsilon outside (0, 1), or both given; tail is no such
        number, or nothing is left out.

    Cost: full softmax scores every key, by any method. "hsr" bounds every score by the
    sketch, finds an offset from these bounds, in O(S) a row, and scores the keys above
    it; a tail adds O(S) and S D / tail multiplications a row.

    Example:
      >>> import hsrjax
      >>> hsrjax.Softmax(top_r=64)
      Softmax(top_r=64, epsilon=None, tail=None)

    Source: Chen et al. 2024, Definitions 1.1, B.1 and B.2; the epsilon rule is
    Theorem 4.3 with a measured certificate in place of its assumption. The tail is
    not in the paper: see `hsrjax/_src/activations/tail.py`.
    """

    top_r: int | None = dataclasses.field(default=None, metadata=_static)
    epsilon: jax.typing.ArrayLike | None = None
    tail: int | None = dataclasses.field(default=None, metadata=_static)
    fusible = True

    def __post_init__(self):
        integers(self, "top_r", "tail")
        r = self.top_r
        if r is not None and (not checks.is_integer(r) or r < 1):
            raise ValueError(
                f"Softmax: top_r must be an integer >= 1 or None, got {r!r}."
            )
        if isinstance(self.epsilon, (int, float)) and not 0.0 < self.epsilon < 1.0:
            raise ValueError(
                f"Softmax: epsilon must lie strictly between 0 and 1, got "
                f"{self.epsilon!r}; use Softmax() to keep every key."
            )
        if self.top_r is not None and self.epsilon is not None:
            raise ValueError(
                "Softmax: top_r and epsilon exclude each other, got "
                f"top_r={self.top_r!r} and epsilon={self.epsilon!r}; give one of them."
            )
        if self.tail is not None:
            tails.check_tail(self.tail)
            if self.keeps_all:
                raise ValueError(
                    f"Softmax: tail={self.tail} is what keys left out contribute, got "
                    "neither top_r nor epsilon; give one of them."
                )

    @property
    def keeps_all(self) -> bool:
        """Whether every visible key keeps its weight."""
        return self.top_r is None and self.epsilon is None

    @property
    def whole_rows(self) -> bool:
        """Whether all scores of a row are needed to say which keys take part."""
        return not self.keeps_all

    relative: ClassVar[Any] = keeps_all
    spares_sinks: ClassVar[Any] = whole_rows

    @property
    def dense_form(self) -> Softmax:
        """Full softmax where what is left out acts too."""
        return self if self.tail is None else Softmax()

    def expected_keys(self, keys: int) -> float:
        """How many of so many keys a row is expected to keep."""
        kept = _EPSILON_SHARE * keys if self.top_r is None else self.top_r
        return min(keys, kept)

    # Full softmax: relative to the best score so far.

    def weigh_row(self, scores, *, sinks=None, peak=None):
        """exp(score - peak)."""
        del sinks
        return jnp.exp(scores if peak is None else scores - peak)

    def fires(self, scores, *, sinks=None):
        """Every key does."""
        del sinks
        return jnp.ones(scores.shape, jnp.bool_)

    # Top r and epsilon.

    def select(self, sight: Sight) -> tuple[Any, ...]:
        """The sets to look at, which keys of them are kept, and what is left out."""
        if self.top_r is not None and self.tail is None and sight.scores is None:
            return self._select_top_r(sight, self.top_r)
        if self.epsilon is not None and self.tail is None and sight.scores is None:
            return self._select_epsilon(sight)
        lower, upper, sinks = sight.lower, sight.upper, sight.sinks
        words, offset = None, jnp.full(lower.shape[:-1], -jnp.inf, jnp.float32)
        share = jnp.ones_like(offset)  # left out at most, beforehand
        if self.epsilon is not None:
            share = jnp.asarray(self.epsilon, jnp.float32)
            offset = certificates.epsilon_offset(share, lower, upper, sinks)
        elif self.top_r is not None and sight.scores is None:
            offset = certificates.top_r_offset(self.top_r, lower, sinks)
        if sight.scores is None:
            reported = Kept(offset[..., None], offset).fires(upper, sinks=sinks)
            if self.tail is not None:
                reported |= ~tails.whole(sight.visible, self.tail)
            words = sight.look_at(reported)
        peak, best, words = sight.best(words, 0 if self.tail else self.top_r or 0)
        if self.tail is None:
            return words, *self._judge(sight, share, offset, peak, best)
        shift, rounding = finite_or_zero(peak), sight.rounding()
        out = sight.left_out(words)
        tail = tails.sum_left_out(sight.values, lower, upper, out, shift, rounding)
        return words, Kept(jnp.full_like(shift, -jnp.inf), shift), tail

    def _select_top_r(self, sight: Sight, rank: int) -> tuple[Any, ...]:
        """The best r among the keys that may reach what a sample suggests.

        If r exact scores do reach it, the best r are among them, and it need not be a
        safe offset. Else that is looked for.
        """

        def above(offset, most=None):
            words = sight.reached(offset)
            peak, best, kept = sight.best(words, rank, most)
            return peak, best, kept, offset, words

        *_, queries, keys = sight.visible.shape
        stride = certificates.stride_for(rank, keys, queries)
        sample = sight.sample(stride)
        guess, most = certificates.guessed_offset(rank, sample, stride)
        found = above(guess, most)
        last, _ = found[1]
        failed = jnp.any(sight.visible, axis=-1) & ~(last >= guess)
        peak, best, kept, offset, words = jax.lax.cond(
            together(jnp.sum(failed.astype(jnp.float32))) > 0,
            lambda: above(certificates.top_r_offset(rank, sight.lower, sight.sinks)),
            lambda: found,
        )
        judged = self._judge(sight, jnp.ones_like(offset), offset, peak, best)
        return kept, *judged, sight.number(words)

    def _select_epsilon(self, sight: Sight) -> tuple[Any, ...]:
        """All keys that may reach an offset that a sample suggests and bounds verify.

        Where they do not, it is looked for among all bounds.
        """
        share = jnp.asarray(self.epsilon, jnp.float32)
        guess, near, sound = certificates.guessed_epsilon_offset(
            share, sight.lower, sight.upper, sight.sinks
        )

        def of_all_bounds():
            offset = certificates.epsilon_offset(
                share, sight.lower, sight.upper, sight.sinks
            )
            words = sight.reached(offset)
            return words, offset, sight.best(words, 0)[0]

        words, offset, shift = jax.lax.cond(
            together(jnp.sum(~sound, dtype=jnp.float32)) > 0,
            of_all_bounds,
            lambda: (sight.reached(guess), guess, near),
        )
        return words, *self._judge(sight, share, offset, shift, None)

    def _judge(self, sight: Sight, share, offset, peak, best) -> tuple[Any, Any]:
        """Which keys are kept of those that reach an offset, and what is left out."""
        shift = finite_or_zero(peak)
        # Keys that were not looked at are below the offset of the bounds, wherever the
        # best that were looked at leave off.
        kept = offset
        if best is not None:
            apart = certificates.as_good_as_equal(sight.remade(), peak, best[0])
            kept = certificates.between(best, apart)
        below = jnp.maximum(kept, offset)
        bounds = sight.lower, sight.upper, sight.sinks
        mass = certificates.mass_below(below, shift, *bounds)
        left_out = certificates.LeftOut(mass, share, sight.rounding())
        return remember((Kept(kept, shift), left_out))

    def finish(self, sums: Partial, certificate, *, length, value_bound, slots):
        """Divides by the mass, and bounds the error of what is left out."""
        if isinstance(certificate, tails.Tail):
            weighted = sums.weighted + certificate.weighted
            out = self.divide(weighted, sums.total + certificate.total, length)
            return out, *tails.error_bound(
                certificate, sums.total, value_bound, slots=slots
            )
        if certificate is None:
            return super().finish(
                sums, None, length=length, value_bound=value_bound, slots=slots
            )
        out = self.divide(sums.weighted, sums.total, length)
        return out, *certificates.error_bound(
            certificate, sums.total, sums.count, value_bound
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept(Activation):
    """The weight exp(score - shift) of sinks and of scores that reach an offset."""

    offset: jax.Array
    shift: jax.Array
    fusible = True

    def edge(self) -> jax.Array:
        """Scores below the offset weigh nothing."""
        return self.offset

    def weigh(self, scores: jax.Array) -> jax.Array:
        """Where there are no sinks."""
        return self.weigh_row(scores)

    def weigh_row(self, scores, *, sinks=None, peak=None):
        """As `weigh`; the shift is constant for gradients."""
        del peak
        shift = jax.lax.stop_gradient(self.shift)
        kept = self.fires(scores, sinks=sinks)
        return jnp.where(kept, jnp.exp(scores - shift), 0.0)

    def fires(self, scores, *, sinks=None):
        """A score that ties with the offset is kept."""
        reaches = ~(scores < self.offset)
        return reaches if sinks is None else reaches | sinks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reported(Activation):
    """The weights of full softmax, of all that an offset reports."""

    offset: jax.Array
    fusible = True
    relative = True

    weigh_row = Softmax.weigh_row
    fires = Softmax.fires

    def edge(self) -> jax.Array:
        """Where the keys are left off that nothing else says to keep."""
        return self.offset

    def weigh(self, scores: jax.Array) -> jax.Array:
        """exp(score)."""
        return self.weigh_row(scores)
