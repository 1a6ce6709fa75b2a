"""The operations that attention is made of, and the registry of implementations.

Dense attention is `sum_all`. Attention to reported keys is `scan`, or `select` where
all scores of a row are needed to say which keys take part, and then `sum_sets`; or
`scan_and_sum` and `select_and_sum` in one, where fusing pays. An index grows by
`append`, a cache by `grow`.

An operation that an implementation cannot do, at all or for these arguments, raises
NotImplementedError with a reason: the next one is tried.

Shapes: M tiles of Q queries with batch axes *B (batch, key heads), against P slots of
keys; a tile is cut into J parts, runs of its queries of equal length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hsrjax._src.activations import tail as tails
from hsrjax._src.core import windows
from hsrjax._src.core.arrays import positions
from hsrjax._src.core.tiles import Partial, Tiles, Values, summarize_values
from hsrjax._src.core.visible import Visible
from hsrjax._src.index.index import Index


class Selected(NamedTuple):
    """Which keys the parts of a tile look at, and what weighs them.

    Attributes:
      words: u32[*B, J, P/32], bit sets over slots that hold every key which weighs
        anything for a query of the part; None where all keys are looked at.
      law: an activation whose fields f32[*B, Q] say what every key weighs.
      certificate: what is known of the keys left out, [*B, Q] each, or None.
      candidates: i32[*B, Q], keys that were scored to say so; None where these are the
        keys of the sets.
    """

    words: Any
    law: Any
    certificate: Any
    candidates: Any = None


class Implementation:
    """Code that runs the operations; a subclass defines those that it can do.

    Attributes:
      name: what `implementation=` calls it.
      preferred: whether it is tried where nobody named an implementation.
    """

    name: str
    preferred: bool = False

    def unavailable(self, platform: str) -> str:
        """Why it cannot run on a platform ("cpu", "gpu", "tpu"), or ""."""
        del platform
        return ""

    def scan(
        self,
        index: Index,
        queries: jax.Array,
        offsets: jax.Array,
        *,
        visible: Visible | None = None,
        parts: int | None = None,
    ) -> jax.Array:
        """Certified supersets of half-spaces, before any exact score.

        Args:
          index: batch axes *B.
          queries: f[*B, Q, H].
          offsets: f32[*B, Q]; +inf asks for nothing.
          visible: i32[*B, Q]: sets end where no query of theirs sees anything; within,
            the exact stage has to look. None admits every slot in use.
          parts: J; a set is the union of what the queries of a part report. None is
            one set for each query.

        Returns:
          Bit sets u32[*B, J, P/32].
        """
        raise NotImplementedError(f"{self.name} has no scan")

    def select(
        self, index: Index, values: Any, tile: Tiles, *, capacity: int, parts: int
    ) -> Selected:
        """Which keys take part where all scores of a row are needed to say so.

        Args:
          index: batch axes *B.
          values: `ValueSketch` for a tail, or None.
          tile: one tile, without the axis M.
          capacity: slots of a gather.
          parts: J.
        """
        raise NotImplementedError(f"{self.name} has no select")

    def sum_sets(
        self,
        tiles: Tiles,
        keys: jax.Array,
        values: jax.Array,
        ids: jax.Array | None,
        words: jax.Array,
        *,
        capacity: int,
        counted: bool,
    ) -> Partial:
        """Exact sums over the keys of sets, differentiable once.

        Args:
          tiles: whose activation is the law that weighs.
          keys: f[*B, P, H].
          values: f[*B, P, D].
          ids: i32[*B, P], the position of each slot's key; None where it is the slot.
          words: u32[M, *B, J, P/32], a set for each part.
          capacity: slots of a gather.
          counted: whether the numbers of keys are wanted.

        Returns:
          Partial of [M, *B, Q]. Differentiable in queries, law, keys and values.
        """
        raise NotImplementedError(f"{self.name} has no sum_sets")

    def scan_and_sum(
        self,
        index: Index,
        tiles: Tiles,
        values: jax.Array,
        *,
        capacity: int,
        parts: int,
        counted: bool,
        or_all: bool = False,
    ) -> tuple[jax.Array, Partial]:
        """`scan` for the edges of the activation and `sum_sets`, in one.

        Args:
          index: batch axes *B.
          tiles: as in `sum_sets`.
          values: f[*B, P, D].
          capacity: slots of a gather.
          parts: J, or as many as suit the implementation.
          counted: whether the numbers of keys are wanted.
          or_all: may sum over all keys where so many are reported that this costs less.

        Returns:
          Sizes of the sets i32[M, *B, J], a set for every ceil(Q / J) queries, and what
          `sum_sets` returns.
        """
        raise NotImplementedError(f"{self.name} does not fuse scan and sums")

    def select_and_sum(
        self,
        index: Index,
        values: Any,
        tiles: Tiles,
        *,
        capacity: int,
        parts: int,
        counted: bool,
        or_all: bool = False,
    ) -> tuple[jax.Array, Partial, Any]:
        """`select` and `sum_sets` in one.

        Args:
          index: batch axes *B.
          values: `Values`.
          tiles: as in `sum_sets`.
          capacity: as in `scan_and_sum`, and what follows.
          parts: J.
          counted: whether the numbers of keys are wanted.
          or_all: may sum over all keys where that costs less.

        Returns:
          Sizes of the sets i32[M, *B, J], Partial and certificates of [M, *B, Q].
        """
        raise NotImplementedError(f"{self.name} does not fuse choosing and sums")

    def sum_all(
        self,
        tiles: Tiles,
        keys: jax.Array,
        values: jax.Array,
        ids: jax.Array | None,
        *,
        chunk: int | None,
        counted: bool,
    ) -> tuple[Partial, Any]:
        """Exact sums over all visible keys.

        Args:
          tiles: attended to one after the other.
          keys: f[*B, S, H].
          values: f[*B, S, D].
          ids: i32[*B, S], the position of each key, or None where they are in order.
          chunk: keys that are scored at once; None is all of them, and needed where
            whole rows say which keys take part.
          counted: False may leave the count of keys zero.

        Returns:
          Partial of [M, *B, Q], and the certificates of `select`.
        """
        raise NotImplementedError(f"{self.name} has no sum_all")

    def append(self, index: Index, keys: jax.Array, lengths: jax.Array) -> Index:
        """Adds keys f[*B, U, H], of which the first lengths are real.

        Lengths i32 broadcast against *B: where an axis is 1, rows hold equally many.
        """
        raise NotImplementedError(f"{self.name} has no append")

    def grow(
        self,
        index: Index,
        values: Values,
        keys: jax.Array,
        rows: jax.Array,
        lengths: jax.Array,
    ) -> tuple[Index, Values]:
        """`append` with a value f[*B, U, D] for each key: a cache grows."""
        shared = tuple(map(slice, lengths.shape))  # rows that hold equally many
        held = index.size[shared]
        index = self.append(index, keys, lengths)
        fits = index.size[shared] - held
        stored, sketch = windows.append(values.rows, held, rows, fits), values.sketch
        new = rows.shape[-2]
        if sketch is not None:
            sketch = tails.sketch_again(sketch, stored, held, new)
        fresh = positions(new, held.ndim + 1) < fits[..., None]
        facts = summarize_values(jnp.where(fresh[..., None], rows, 0))
        grown = Values(
            rows=stored,
            bound=jnp.maximum(values.bound, facts.bound),
            poison=values.poison + facts.poison,
            sketch=sketch,
        )
        return index, grown


class Impossible(NotImplementedError, ValueError):
    """No implementation that a call may use can do what it needs."""


_implementations: dict[str, Implementation] = {}


class InTurn:
    """Every operation by the first of several implementations that can do it."""

    def __init__(self, candidates: Sequence[Implementation]):
        self.candidates = candidates

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        return functools.partial(self._first, operation)

    def _first(self, operation: str, *args: Any, **options: Any) -> Any:
        reasons = []
        for candidate in self.candidates:
            try:
                return getattr(candidate, operation)(*args, **options)
            except NotImplementedError as reason:
                reasons.append(str(reason))
        names = " or ".join(repr(x.name) for x in self.candidates)
        raise Impossible(
            f"implementation {names} cannot do this: {'; '.join(reasons)}; use "
            "implementation=None."
        )


def register(implementation: Implementation) -> None:
    """Makes an implementation known by its name, which must be new.

    Raises:
      ValueError: the name is taken.
    """
    name = implementation.name
    if name in _implementations:
        raise ValueError(f"there is an implementation {name!r} already")
    _implementations[name] = implementation


def implementations() -> tuple[Implementation, ...]:
    """All that are known."""
    return tuple(_implementations.values())


def implementations_for(name: str | None, platform: str) -> tuple[str, ...]:
    """The names of the implementations that a call may use, in turn.

    Args:
      name: what was asked for, alone; None is the preferred ones, then XLA.
      platform: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: the name is unknown, or the implementation does not run here. Names
        those that do, and why the others do not.
    """
    known = _implementations.values()
    if name is None:
        preferred = [x for x in known if x.preferred]
        return (*(x.name for x in preferred if not x.unavailable(platform)), "xla")
    if name in _implementations and not _implementations[name].unavailable(platform):
        return (name,)
    reasons = {x.name: x.unavailable(platform) for x in known}
    here = [repr(x) for x, reason in reasons.items() if not reason]
    others = [f"{x!r} does not: {reason}" for x, reason in reasons.items() if reason]
    raise ValueError(
        f"implementation must be None or one that runs on this {platform} "
        f"({', '.join(here)}), got {name!r}"
        + "".join(f"; {words}" for words in others)
        + "."
    )


def operations(names: tuple[str, ...]) -> InTurn:
    """The operations of chosen implementations."""
    return InTurn([_implementations[name] for name in names])
