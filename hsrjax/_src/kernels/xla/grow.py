"""A cache grows: keys with their index, and values with what is known of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hsrjax._src.activations import tail as tails
from hsrjax._src.core import windows
from hsrjax._src.core.arrays import positions
from hsrjax._src.core.tiles import Values, summarize_values
from hsrjax._src.index.index import Index, append


def grow(
    index: Index,
    values: Values,
    keys: jax.Array,
    rows: jax.Array,
    lengths: jax.Array,
) -> tuple[Index, Values]:
    """As `Implementation.grow`."""
    shared = tuple(map(slice, lengths.shape))  # rows that hold equally many
    held = index.size[shared]
    index = append(index, keys, lengths)
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
