"""The protocol of activations: what turns scores into weights, in one class.

An activation is a frozen dataclass and a pytree. Its fields are numbers or arrays that
broadcast to [B, T, N]; they may be traced and differentiated. Static fields are marked
`metadata={"static": True}`.

Most need two methods: `weigh`, and `edge`, the score up to which a key weighs exactly
nothing: that is the half-space. Others have no edge that is known before all scores of
a row are; they say so by `whole_rows` and define `select`, as softmax does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hsrjax._src.core import checks
from hsrjax._src.core.tiles import Partial
from hsrjax._src.core.visible import Visible

Normalize = Literal["row_sum", "length", "none"]
NORMALIZE = ("row_sum", "length", "none")
SELECTION = "selection"
"""Name of what a backward pass keeps instead of selecting again."""


class Activation:
    """What turns scores into attention weights; subclass it for one of your own.

    `out_i = sum_j weigh(s_ij) v_j` with `s_ij = scale <q_i, k_j>`, divided as
    `normalize` says. A subclass is a frozen dataclass and a pytree. Its fields are
    numbers or arrays that broadcast to [B, T, N]; they may be traced and
    differentiated. It defines

      weigh(self, scores): weights f32[..., Q, C] of scores; fields are f32[..., Q, 1].
      edge(self): f32, a score at or below which a key weighs exactly nothing. -inf
        where there is none: then every visible key is looked at.

    and may set `normalize`, as a class attribute or a field: "row_sum" divides by the
    sum of the weights, "length" by the number of visible keys, "none" not at all.

    It then runs dense, by half-space reporting, in `attention` and `decode_attention`,
    with gradients by queries, keys, values and its own fields. `weigh` must be zero at
    and below the edge, up to rounding, and may be any JAX code for single scores.

    Raises:
      TypeError: a subclass that lacks a method, when an instance is made.

    Cost: a call of `weigh` for each query and key that is looked at.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, hsrjax
      >>> @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass(frozen=True)
      ... class Huber(hsrjax.Activation):
      ...     bias: jax.typing.ArrayLike = 0.0
      ...     delta: jax.typing.ArrayLike = 1.0
      ...     def edge(self):
      ...         return self.bias
      ...     def weigh(self, scores):
      ...         x = jax.nn.relu(scores - self.bias)
      ...         curve = 0.5 * x * x / self.delta
      ...         return jnp.where(x < self.delta, curve, x - 0.5 * self.delta)
      >>> q = jnp.ones((1, 2, 4, 8)); k = v = jnp.ones((1, 3, 2, 8))
      >>> hsrjax.attention(q, k, v, activation=Huber(bias=0.5), method="hsr").shape
      (1, 2, 4, 8)

    Source: Chen et al. 2024, Definition 1.2, for ReLU^p.
    """

    normalize: Normalize = "row_sum"
    """What the sum of weighted values is divided by."""
    score_factor: ClassVar[float] = 1.0
    """Multiplies the scores before anything else."""
    whole_rows: bool = False
    """Whether all scores of a row are needed to say which keys take part."""
    keeps_all: bool = False
    """Whether every visible key has a weight: then only dense attention makes sense."""
    relative: bool = False
    """Whether weights are relative to the best score, exp(score - peak)."""
    spares_sinks: bool = False
    """Whether sinks are kept that it would leave out otherwise."""
    fusible: bool = False
    """Whether a kernel may run `weigh`: arithmetic, comparisons and exp, no more."""
    closed_form: bool = False
    """Whether `complete` adds sums over all visible keys."""
    tail: int | None = None
    """Keys that share a mean value where what is left out acts too."""

    def __new__(cls, *args, **kwargs):
        del args, kwargs
        needed = ("select",) if cls.whole_rows else ("weigh", "edge")
        lacks = lambda name: getattr(cls, name) is getattr(Activation, name)
        missing = [name for name in needed if lacks(name)]
        if missing and lacks("prepare"):
            raise TypeError(
                f"{cls.__name__} must define {' and '.join(missing)} to be an "
                "activation: see hsrjax.Activation."
            )
        return super().__new__(cls)

    def weigh(self, scores: jax.Array) -> jax.Array:
        """Weights f32[..., Q, C] of scores f32[..., Q, C]."""
        raise NotImplementedError

    def edge(self) -> jax.typing.ArrayLike:
        """Scores at or below this weigh nothing."""
        raise NotImplementedError

    # What the library asks for; the activations that are built in override it.

    def prepare(self, rows: tuple[int, ...]) -> Activation:
        """What is summed key by key, with every field f32[B, T, N]."""
        found = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None and not field.metadata.get("static"):
                found[field.name] = per_row(field.name, value, rows)
        return dataclasses.replace(self, **found)  # type: ignore[type-var]

    def weigh_row(
        self,
        scores: jax.Array,
        *,
        sinks: jax.Array | None = None,
        peak: jax.Array | None = None,
    ) -> jax.Array:
        """`weigh`, told which keys are sinks and what weights are relative to."""
        del sinks, peak
        return self.weigh(scores)

    def fires(self, scores: jax.Array, *, sinks: jax.Array | None = None) -> jax.Array:
        """Whether a key takes part: its weight is not exactly zero by definition."""
        del sinks
        return ~(scores <= self.edge())

    def select(self, sight: Sight) -> Any:
        """`Selected` of a tile, from what is known of all its scores."""
        raise NotImplementedError

    def settle(
        self, sums: Partial, sum_sets: Callable[..., Partial], arrays: tuple
    ) -> Partial:
        """Sums with the derivative that they have by what `select` found.

        Args:
          sums: `sum_sets(*arrays)`, as if the law were constant.
          sum_sets: sums over the same sets.
          arrays: its arguments, the tiles first.
        """
        del sum_sets, arrays
        return sums

    def finish(
        self,
        sums: Partial,
        certificate: Any,
        *,
        length: jax.Array,
        value_bound: jax.Array,
        slots: int,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Outputs f32[..., D], the mass left out and the error bound, f32[...] each.

        Args:
          sums: of the rows.
          certificate: from `select`.
          length: i32[...], number of visible keys.
          value_bound: f32, broadcasts to rows; at least every |value coordinate|.
          slots: P.
        """
        del certificate, value_bound, slots
        nothing = jnp.zeros_like(sums.total)
        return self.divide(sums.weighted, sums.total, length), nothing, nothing

    def divide(
        self, weighted: jax.Array, total: jax.Array, length: jax.Array
    ) -> jax.Array:
        """Sums of weighted values f32[..., D], divided as `normalize` says."""
        if self.normalize == "none":
            return weighted
        if self.normalize == "length":
            total = length.astype(weighted.dtype)
        empty = total == 0
        divisor = jnp.where(empty, jnp.ones_like(total), total)
        return jnp.where(empty[..., None], 0.0, weighted / divisor[..., None])

    def complete(
        self,
        out: jax.Array,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        seen: Visible,
        *,
        scale: jax.typing.ArrayLike | None,
    ) -> jax.Array:
        """Adds to outputs f32[B, T, N, D] what is a closed form over all keys."""
        del query, key, value, seen, scale
        return out

    # What the planner asks for.

    @property
    def dense_form(self) -> Activation:
        """What dense attention computes: it has all scores."""
        return self

    def expected_keys(self, keys: int) -> float:
        """How many of so many keys a row of `whole_rows` is expected to keep."""
        return float(keys)


class Sight(Protocol):
    """What is known of the scores of a tile before its keys are chosen.

    Attributes:
      lower: f32[*B, Q, S], lower bounds of the scores; -inf where not visible.
      upper: f32[*B, Q, S], upper bounds likewise; no gradient goes through either.
      visible: bool[*B, Q, S].
      sinks: bool[*B, Q, S] or None.
      scores: f32[*B, Q, S], the scores themselves where all are known, differentiable;
        else None.
      values: `ValueSketch` for a tail, or None.
    """

    lower: jax.Array
    upper: jax.Array
    visible: jax.Array
    sinks: jax.Array | None
    scores: jax.Array | None
    values: Any

    def look_at(self, kept: jax.Array) -> jax.Array | None:
        """Sets u32[*B, J, S/32] of the keys bool[*B, Q, S] any query of a part keeps.

        None where all are looked at.
        """
        ...

    def number(self, words: jax.Array) -> jax.Array:
        """How many visible keys of sets there are, i32[*B, Q]."""
        ...

    def left_out(self, words: jax.Array | None) -> jax.Array:
        """Which visible keys are in no set, bool[*B, Q, S]."""
        ...

    def sample(self, stride: int) -> jax.Array:
        """Estimated scores f32[*B, Q, C] of one key in `stride`, sinks left out."""
        ...

    def reached(self, offset: jax.Array) -> jax.Array:
        """Sets u32[*B, J, S/32] of all sinks and keys that may reach f32[*B, Q]."""
        ...

    def best(
        self,
        words: jax.Array | None,
        rank: int,
        most: Callable[[int], int] | None = None,
    ) -> tuple[jax.Array, Any, jax.Array | None]:
        """The best exact scores of sets, and which keys have them.

        Args:
          words: the sets.
          rank: r, or 0.
          most: keys of a set, by the queries of a part, that there is room for; None
            is all of them.

        Returns:
          The largest score f32[*B, Q]; the r-th of all but sinks and the next, f32
          [*B, Q] each, -inf where there is none, NaN where there is no room, and None
          where r is 0; sets, maybe smaller, with all that reach the r-th and sinks.
        """
        ...

    def fold(self, words: jax.Array | None) -> Callable[..., tuple[jax.Array, ...]]:
        """Sums over the exact scores of the sets: `fold(words)(step, row)`.

        `step(row, scores)` is given row f32[..., Q] and scores f32[..., Q, C], and
        returns arrays f32[..., Q]: the first is a maximum, the others add up.
        """
        ...

    def rounding(self) -> jax.Array:
        """Bound f32[*B, Q] on the rounding error of any score."""
        ...

    def remade(self) -> jax.Array:
        """Bound f32[*B, Q] on how far the scores of the sums are from those here."""
        ...


def remember(x: Any) -> Any:
    """Without gradient, and kept by a backward pass that makes scores again."""
    return checkpoint_name(jax.lax.stop_gradient(x), SELECTION)


def check_activation(activation: Any) -> None:
    """Raises TypeError unless it is an activation, and a pytree."""
    if not isinstance(activation, Activation):
        raise TypeError(
            "activation must be hsrjax.ReLU(...), hsrjax.Softmax(...), PReLU, CELU, "
            f"SELU, Entmax or a hsrjax.Activation of your own, got {activation!r}."
        )
    if jax.tree_util.all_leaves([activation]):
        raise TypeError(
            f"{type(activation).__name__} must be a pytree: decorate it with "
            "@jax.tree_util.register_dataclass above @dataclasses.dataclass("
            "frozen=True)."
        )


def check_normalize(activation: Any, choices: tuple[str, ...], why: str = "") -> None:
    """Raises ValueError unless `normalize` is one of choices."""
    if activation.normalize not in choices:
        raise ValueError(
            f"{type(activation).__name__}: normalize must be one of {choices}, got "
            f"{activation.normalize!r}{why}."
        )


def integers(activation: Any, *names: str) -> None:
    """Makes integers of NumPy's, in static fields, Python's."""
    for name in names:
        value = checks.as_integer(getattr(activation, name))
        object.__setattr__(activation, name, value)  # frozen, but just made


def per_row(name: str, x: jax.typing.ArrayLike, rows: tuple[int, ...]) -> jax.Array:
    """A field of an activation as f32[B, T, N]."""
    x = jnp.asarray(x).astype(jnp.float32)
    try:
        return jnp.broadcast_to(x, rows)
    except ValueError:
        raise ValueError(
            f"activation.{name} must broadcast to [B, T, N] = {rows}, got shape "
            f"{x.shape}; one per head is [N], one per row [T, 1]."
        ) from None
