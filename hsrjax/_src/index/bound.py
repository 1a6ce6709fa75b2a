"""What a bound on the scores of keys must do.

A bound knows groups of consecutive slots and, for a query, an upper bound of the
*float32* scores of the keys in each group. It may be loose, never too low: whoever
writes one proves it, rounding included. `hsrjax._src.index.sketch` and `balls` are the
two that are built in; another one takes part in everything once it is given to
`hsrjax._src.index.index.group_keys`.
"""

from __future__ import annotations

from typing import Self

import jax


class Bound:
    """Upper bounds by group; a subclass is a frozen dataclass and a pytree.

    Attributes:
      size: slots of a group, a multiple of 32 or 1; static.
    """

    size: int

    @classmethod
    def build(
        cls, keys: jax.Array, valid: jax.Array, centre: jax.Array, *, size: int
    ) -> Self:
        """Of all keys.

        Args:
          keys: f[*B, P, H]; may hold NaN and infinities.
          valid: bool[*B, P]; other slots are ignored.
          centre: f32[*B, H], a point among the keys, for bounds that need one.
          size: slots of a group, a divisor of P; static.
        """
        raise NotImplementedError

    def append(self, keys: jax.Array, valid: jax.Array, first: jax.Array) -> Self:
        """With consecutive blocks of 32 keys that changed.

        Args:
          keys: f[*B, U, H], all keys of these blocks, old and new.
          valid: bool[*B, U]; other slots are ignored.
          first: i32[*B], the number of the first of them.
        """
        raise NotImplementedError

    def upper(self, queries: jax.Array) -> jax.Array:
        """f32[*B, Q, W]: no float32 score of a key of group w < W is above, or NaN.

        W may be more than there are groups.
        """
        raise NotImplementedError
