"""A model reads a text: what all heads do, and every row of those that are listed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from models.exploration.rows import Head, heads_of, pictures, power_of
from models.network.config import Method
from models.network.operands import operands_by_layer
from models.network.transformer import Transformer, with_config, with_length

_DRAWN = 512
"""Queries that make up the picture of a head, about."""
_SPARSE, _FULL = 30, 50
"""Bytes of a row on the page, about."""


class Reading(NamedTuple):
    """What the heads of a model do with a text of T tokens; L layers of N heads.

    Attributes:
      fired: f64[L, N], keys that fire as a share of those visible.
      empty: f64[L, N], queries for which none fires, as a share of all but the first,
        which sees itself only and has no threshold to speak of.
      pictures: f32[L, N, M, M], where the weights are, see `rows.pictures`.
      heads: every row of the heads of some layers, by layer and head.
      windows: keys a query sees, by layer; None is all.
      power: p of weights (score - threshold)^p; None where they are exp(score).
      group: heads that share their keys.
    """

    fired: np.ndarray
    empty: np.ndarray
    pictures: np.ndarray
    heads: dict[tuple[int, int], Head]
    windows: list[int | None]
    power: int | None
    group: int


def read(
    model: Transformer,
    tokens: Sequence[int],
    *,
    layers: Sequence[int],
    method: Method = "hsr",
    on_layer: Callable[[], object] = lambda: None,
) -> Reading:
    """Reads a text once, as the model attends, and looks at every head.

    Args:
      model: any transformer; `models.opening.attending` says how it attends.
      tokens: of the text, at least one.
      layers: whose heads are listed row by row.
      method: "hsr" counts what decoding looks at through the index, "dense" all keys.
      on_layer: called after each layer.

    Raises:
      FloatingPointError: the model's scores are NaN or infinite.

    Example:
      >>> read(model, tokens, layers=[0]).heads[0, 2].count
      array([1, 1, 0, 2], dtype=int32)
    """
    model = with_length(without_tail(model), len(tokens))
    array = jnp.asarray(tokens, jnp.int32)[None]
    length, stride = len(tokens), -(-len(tokens) // _DRAWN)
    fired, empty, images, heads, windows = [], [], [], {}, []
    power, group = None, 1
    listed = operands_by_layer(model, array, return_info=True)
    for layer, (operands, info) in enumerate(listed):
        assert info is not None
        window = model.config.layer_window(layer)
        counts = np.asarray(info.count)[0]
        if layer in layers:
            found = heads_of(operands, window=window, method=method)
            heads |= {(layer, number): head for number, head in enumerate(found)}
        images.append(pictures(operands, counts, window=window, stride=stride))
        if not np.isfinite(images[-1]).all():
            raise FloatingPointError(
                f"the scores of layer {layer} are not finite: compute in float32"
            )
        visible = np.minimum(np.arange(1, length + 1), window or length).sum()
        fired.append(counts.sum(axis=0) / visible)
        empty.append(np.mean(counts[min(1, length - 1) :] == 0, axis=0))
        windows.append(window)
        power = power_of(operands.activation)
        group = operands.query.shape[2] // operands.key.shape[2]
        on_layer()
    return Reading(
        np.array(fired), np.array(empty), np.array(images), heads, windows, power, group
    )


def without_tail(model: Transformer) -> Transformer:
    """The model without what left-out keys contribute, which is no list of keys."""
    if model.config.tail is None:
        return model
    return with_config(model, dataclasses.replace(model.config, tail=None))


def layers_that_fit(
    layers: int, *, heads: int, tokens: int, sparse: bool, budget: int
) -> list[int]:
    """Layers, evenly spread, whose rows fit into so many bytes with a dozen keys each.

    Args:
      layers: L.
      heads: N.
      tokens: T.
      sparse: whether most rows have fewer keys than that.
      budget: bytes.
    """
    bytes_of_layer = (_SPARSE if sparse else _FULL) * heads * tokens
    number = int(np.clip(budget // max(bytes_of_layer, 1), 1, layers))
    if number == 1:
        return [layers // 2]
    return sorted({round(x) for x in np.linspace(0, layers - 1, number)})
