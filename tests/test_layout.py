"""Tiles go there and back, and keep the heads that share keys together."""

import jax.numpy as jnp
import numpy as np
import pytest

from hsrjax._src.core.tiles import from_tiles, to_tiles


@pytest.mark.parametrize(("length", "tile"), [(1, 1), (7, 3), (8, 4), (5, 8)])
@pytest.mark.parametrize("rest", [(), (3,)])
def test_there_and_back(length, tile, rest):
    shape = (2, length, 6, *rest)
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    tiles = to_tiles(x, kv_heads=2, tile=tile)
    assert tiles.shape == (-(-length // tile), 2, 2, tile * 3, *rest)
    np.testing.assert_array_equal(from_tiles(tiles, length=length, heads=6), x)


def test_heads_of_a_group_share_a_tile():
    heads = jnp.broadcast_to(jnp.arange(6), (1, 4, 6))
    tiles = to_tiles(heads, kv_heads=2, tile=2)
    assert set(np.unique(tiles[:, :, 0])) == {0, 1, 2}
    assert set(np.unique(tiles[:, :, 1])) == {3, 4, 5}
