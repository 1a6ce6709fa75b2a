"""What JAX asks of code that runs on a mesh of devices, in either of its two ways.

Inside `jax.shard_map` every array says over which axes of the mesh it differs; on a
mesh with explicit axes every array says how it is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def varying(x: Any, *like: Any) -> Any:
    """The arrays of x, marked as different on each device where those of `like` are.

    Inside `jax.shard_map` what a loop carries has to be, from the first. Elsewhere, and
    where nothing differs, x as it is.
    """

    def axes(leaf):
        marks = getattr(jax.typeof(leaf), "mat", None)
        return frozenset() if marks is None else marks.varying

    wanted = frozenset().union(*map(axes, jax.tree.leaves(like)))

    def mark(leaf):
        missing = tuple(wanted - axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, x)


def automatic(function: Callable[..., Any], like: jax.Array, lead: int) -> Callable:
    """A function of arrays, cut by XLA on meshes with explicit axes as on others.

    Args:
      function: whose results have the first `lead` axes of `like`.
      like: they are cut as its are.
      lead: axes.
    """
    sharding = getattr(jax.typeof(like), "sharding", None)
    if sharding is None or not sharding.mesh.explicit_axes:
        return function
    spec = jax.sharding.PartitionSpec(*sharding.spec[:lead])
    cut = jax.NamedSharding(sharding.mesh, spec)
    return jax.sharding.auto_axes(function, out_sharding=cut)
