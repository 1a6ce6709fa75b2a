"""ReLU^p attention weights: the paper's, and exactly zero outside a half-space."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from hsrjax._src.activations.base import (
    NORMALIZE,
    Activation,
    Normalize,
    check_normalize,
    integers,
)
from hsrjax._src.core import checks

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Excess(Activation):
    """`relu(scores - bias) ** power`; a step where the power is 0."""

    power: int = dataclasses.field(default=1, metadata=_static)
    bias: jax.typing.ArrayLike = 0.0
    fusible = True

    def edge(self) -> jax.typing.ArrayLike:
        """The bias."""
        return self.bias

    def weigh(self, scores: jax.Array) -> jax.Array:
        """NaN scores and biases give NaN weights, but for power 0."""
        if self.power == 0:
            return self.fires(scores).astype(jnp.float32)
        return jax.nn.relu(scores - self.bias) ** self.power


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReLU(Excess):
    """ReLU^p attention weights: `relu(scale <q, k> - bias) ** power`.

    A key whose scaled score is at or below `bias` has weight exactly zero, so the keys
    that matter are a half-space and half-space reporting finds all of them.

    Args:
      power: p >= 1, the paper's alpha; static.
      bias: b in units of the scaled score; float, or an array that broadcasts to
        [B, T, N]: one per head is f[N], one per row is f[T, 1]. May be traced and
        differentiated.
      normalize: "row_sum" divides by the sum of the row's weights (the paper's D^-1;
        a row in which nothing fires is zero), "length" by the number of visible keys,
        "none" leaves the sum as it is (for models that normalise the output); static.

    Raises:
      ValueError: power is not an integer >= 1, or normalize is unknown.

    Cost: "hsr" scores the keys above the bias, and hardly any more.

    Example:
      >>> import hsrjax
      >>> hsrjax.ReLU(power=2, bias=0.5).power
      2

    Source: Chen et al. 2024, Definition 1.2.
    """

    normalize: Normalize = dataclasses.field(default="row_sum", metadata=_static)

    def __post_init__(self):
        integers(self, "power")
        if not checks.is_integer(self.power) or self.power < 1:
            raise ValueError(
                f"ReLU: power must be an integer >= 1, got {self.power!r}; "
                "use power=1 or 2."
            )
        check_normalize(self, NORMALIZE)
