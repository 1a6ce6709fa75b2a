"""Plain JAX, compiled by XLA: runs everywhere, and can do every operation."""

from __future__ import annotations

from hsrjax._src.index.index import append
from hsrjax._src.kernels.base import Implementation, Selected
from hsrjax._src.kernels.xla.chunks import Chunks
from hsrjax._src.kernels.xla.runs import Runs
from hsrjax._src.kernels.xla.scan import scan
from hsrjax._src.kernels.xla.select import SketchSight
from hsrjax._src.kernels.xla.sums import sum_tiles
from hsrjax._src.kernels.xla.whole import sum_whole


class XLA(Implementation):
    """See `Implementation` for what the operations compute."""

    name = "xla"

    def scan(self, index, queries, offsets, *, visible=None, parts=None):
        return scan(index, queries, offsets, visible=visible, parts=parts)

    def select(self, index, values, tile, *, capacity, parts):
        sight = SketchSight(index, values, tile, capacity=capacity, parts=parts)
        return Selected(*tile.activation.select(sight))

    def sum_sets(self, tiles, keys, values, ids, words, *, capacity, counted):
        tiles = tiles._replace(short=None)
        return sum_tiles(Runs(capacity), counted, tiles, keys, values, ids, words)

    def sum_all(self, tiles, keys, values, ids, *, chunk, counted):
        tiles = tiles._replace(short=None)
        if chunk is None:
            return sum_whole(tiles, keys, values, ids)
        walk = Chunks(chunk)
        return sum_tiles(walk, counted, tiles, keys, values, ids, None), None

    def append(self, index, keys, lengths):
        return append(index, keys, lengths)
