"""The operations that fused kernels run, and for which arguments."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import jax

from hsrjax._src.activations.entmax import Entmax
from hsrjax._src.activations.softmax import Softmax
from hsrjax._src.core.bitset import WORD
from hsrjax._src.kernels.xla.implementation import XLA
from hsrjax._src.planning import costs
from hsrjax._src.planning.plan import WIDEST

_DEPRECATED = "The Pallas Triton backend is deprecated"
"""How the warning of jax 0.11 and later begins."""
_LEAST_CAPABILITY = 8.0
"""Of a card: Ampere, whose matrix units Triton uses."""


class Triton(XLA):
    """Kernels for what is worth it, and XLA for all else.

    Args:
      interpret: JAX plays the kernels on any platform, slowly.
    """

    def __init__(self, name: str = "triton", *, interpret: bool = False):
        self.name, self.interpret = name, interpret

    def unavailable(self, platform: str) -> str:
        if self.interpret:
            return ""
        if platform != "gpu":
            return "it needs an NVIDIA GPU"
        return _old_card() or _no_pallas()

    def scan_and_sum(
        self, index, tiles, values, *, capacity, parts, counted, or_all=False
    ):
        del capacity, parts
        if index.cells is not None or not _fits(tiles, index.keys, values):
            raise NotImplementedError("XLA does it in two steps")
        return self._launch().scan_and_sum(
            index,
            tiles,
            values,
            counted=counted,
            or_all=or_all,
            interpret=self.interpret,
        )

    def select_and_sum(
        self, index, values, tiles, *, capacity, parts, counted, or_all=False
    ):
        law, seen = tiles.activation, tiles.visible
        known = isinstance(law, (Entmax, Softmax))
        few = tiles.queries.shape[0] == 1 and index.ids is None
        narrow = max(index.keys.shape[-1], values.rows.shape[-1]) <= WIDEST
        if not (known and few and narrow) or seen.sink_high is not None:
            raise NotImplementedError("XLA does it in two steps")
        options: dict[str, Any] = {
            "counted": counted,
            "interpret": self.interpret,
        }
        if isinstance(law, Softmax) and law.epsilon is not None:
            return self._launch().within(index, tiles, values, or_all=or_all, **options)
        if values.sketch is not None:
            return self._launch().with_tail(index, tiles, values, **options)
        options |= {"capacity": capacity, "parts": parts}
        return self._launch().best(XLA(), index, tiles, values.rows, **options)

    def sum_all(self, tiles, keys, values, ids, *, chunk, counted):
        if not _fits(tiles, keys, values):
            return super().sum_all(
                tiles, keys, values, ids, chunk=chunk, counted=counted
            )
        sums = self._launch().sum_all(
            tiles, keys, values, ids, counted=counted, interpret=self.interpret
        )
        return sums, None

    def grow(self, index, values, keys, rows, lengths):
        few = keys.shape[-2] < WORD and max(keys.shape[-1], rows.shape[-1]) <= WIDEST
        if not few or index.cells is not None or values.sketch is not None:
            return super().grow(index, values, keys, rows, lengths)
        return self._launch().append(
            index, values, keys, rows, lengths, interpret=self.interpret
        )

    def _launch(self):
        # Said when a kernel is compiled; `hsrjax._src.kernels.triton` says what then.
        warnings.filterwarnings("ignore", _DEPRECATED, DeprecationWarning)
        from hsrjax._src.kernels.triton import calls

        return calls


def _fits(tiles, keys, values) -> bool:
    """Whether the kernels take activation, dtypes and heads."""
    law = tiles.activation
    narrow = max(keys.shape[-1], values.shape[-1]) <= WIDEST
    return law.fusible and not law.whole_rows and narrow


@functools.cache
def _no_pallas() -> str:
    """Why this jax cannot compile the kernels, or ""."""
    try:
        importlib.import_module("jax.experimental.pallas.triton")
    except ImportError as error:
        return (
            f"jax {jax.__version__} comes without Pallas for Triton ({error}): use "
            "implementation=None, or a jax between 0.10 and 0.12"
        )
    return ""


def _old_card() -> str:
    """Why the default device is too old, or ""."""
    device = costs.default_device()
    capability = getattr(device, "compute_capability", "")
    try:
        new = float(capability) >= _LEAST_CAPABILITY
    except ValueError:
        return f"{device.device_kind} is no NVIDIA GPU"
    return "" if new else f"{device.device_kind} is older than Ampere"
