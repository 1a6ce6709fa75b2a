"""How well a model predicts a text, and what its attention looked at meanwhile."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hsrjax
from models.network.transformer import Transformer, with_attention, with_length

_PIECE = 256  # positions whose logits exist at the same time


class Perplexity(NamedTuple):
    """What `perplexity` found.

    Attributes:
      losses: f64[n, T], nats of each predicted token.
      text_bytes: of the predicted tokens.
      looked_at: f64[L, N], exact scores computed, as a share of the visible keys.
      fired: f64[L, N], weights that are not zero, likewise.
      missed_mass: f64[L, N], mean bound on the share of the softmax mass left out.
      error_bound: f64[L, N], mean bound on the error of the output, maximum norm.
    """

    losses: np.ndarray
    text_bytes: int
    looked_at: np.ndarray
    fired: np.ndarray
    missed_mass: np.ndarray
    error_bound: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token; infinite where that overflows."""
        mean = float(self.losses.mean())
        return math.exp(mean) if mean < 700 else math.inf

    def summary(self) -> dict[str, float | int]:
        """The means as plain numbers."""
        return {
            "perplexity": self.perplexity,
            "nats_per_token": float(self.losses.mean()),
            "bits_per_byte": float(
                self.losses.sum() / math.log(2) / max(1, self.text_bytes)
            ),
            "tokens": int(self.losses.size),
            "keys_looked_at": float(self.looked_at.mean()),
            "keys_fired": float(self.fired.mean()),
            "missed_mass_bound": float(self.missed_mass.mean()),
            "error_bound": float(self.error_bound.mean()),
        }


def rows_of(
    tokens: Sequence[int] | np.ndarray, *, context: int, limit: int | None = None
) -> np.ndarray:
    """A text as rows of context + 1 tokens, of which the first is only read.

    Args:
      tokens: of the whole text.
      context: T, predicted tokens per row.
      limit: the most rows, the first ones.

    Returns:
      i32[n, T + 1]; what is left at the end of the text is not used.

    Raises:
      ValueError: the text is shorter than a row.
    """
    if context < 1:
        raise ValueError(f"context must be 1 or more tokens, got {context}")
    if limit is not None and limit < 1:
        raise ValueError(f"rows must be 1 or more, got {limit}")
    kept = np.asarray(tokens, np.int32)
    rows = kept[: kept.size // (context + 1) * (context + 1)].reshape(-1, context + 1)
    if not len(rows):
        raise ValueError(
            f"the text has {kept.size:,} tokens and a row needs {context + 1:,}: give "
            "a longer text or a smaller --context"
        )
    return rows[:limit]


def perplexity(
    model: Transformer,
    rows: np.ndarray,
    *,
    token_bytes: np.ndarray,
    on_row: Callable[[np.ndarray], None] | None = None,
) -> Perplexity:
    """Reads rows one after the other, every position predicting the next.

    Args:
      model: any transformer; `with_attention` says how it attends.
      rows: i32[n, T + 1].
      token_bytes: i32[V], bytes of each token.
      on_row: called with the losses f32[T] of each row.

    Raises:
      FloatingPointError: the model's losses became NaN or infinite.
    """
    model = with_length(model, rows.shape[1])
    losses, counts = [], []
    for row in rows:
        found = read_row(model, row)
        losses.append(found.losses)
        counts.append(found.counts)
        if on_row is not None:
            on_row(found.losses)
    shares = np.asarray(counts, np.float64).mean(axis=0)  # [4, L, N]
    return Perplexity(
        np.asarray(losses, np.float64),
        int(token_bytes[rows[:, 1:]].sum()),
        *shares,
    )


class Row(NamedTuple):
    """What `read_row` found.

    Attributes:
      losses: f32[T], nats of each predicted token.
      is_greedy: bool[T], whether it was the most probable one.
      counts: f32[4, L, N], what attention did.
    """

    losses: np.ndarray
    is_greedy: np.ndarray
    counts: np.ndarray


def read_row(model: Transformer, row: np.ndarray) -> Row:
    """Reads a row, every position predicting the next.

    Blocks of one shape share a program: compiled as one, a deep model takes minutes.

    Args:
      model: any transformer, for rows of this length (see `with_length`).
      row: i32[T + 1]; the first token is only read.

    Raises:
      FloatingPointError: the model's losses became NaN or infinite.
    """
    # What is not attention is compiled once, whatever attends.
    ends = nnx.graphdef(with_attention(model, "dense"))
    state, tokens = nnx.state(model), jnp.asarray(row)
    stream, counts = _embed(ends, state, tokens[None, :-1]), []
    for block in model.blocks:
        stream, found = _run_block(
            *nnx.split(block), stream, model.threshold_scale[...]
        )
        counts.append(found)
    losses, is_greedy = _losses(ends, state, stream, tokens[1:])
    read = Row(*jax.device_get((losses, is_greedy, jnp.stack(counts, axis=1))))
    if not np.isfinite(read.losses).all():
        raise FloatingPointError(
            "the model's losses are not finite: compute in float32"
        )
    return read


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: Any, state: Any, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).embed(tokens)


@functools.partial(jax.jit, static_argnums=0)
def _run_block(
    graphdef: Any, state: Any, stream: jax.Array, threshold_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One block: the residual stream f[1, T, E], and what attention did f32[4, N]."""
    length = stream.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    block = nnx.merge(graphdef, state)
    stream, info = block(stream, positions, threshold_scale, return_info=True)
    return stream, _measure(info, length)


@functools.partial(jax.jit, static_argnums=0)
def _losses(
    graphdef: Any, state: Any, stream: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, state)

    def loss(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = model.unembed(pair[0][None, None])[0, 0]
        is_greedy = jnp.argmax(logits) == pair[1]
        return jax.nn.logsumexp(logits) - logits[pair[1]], is_greedy

    return jax.lax.map(loss, (stream[0], targets), batch_size=_PIECE)


def _measure(info: hsrjax.Info, length: int) -> jax.Array:
    """Shares of the visible keys, and mean bounds: f32[4, N]."""
    visible = length * (length + 1) / 2

    def over_rows(field: jax.Array) -> jax.Array:
        return jnp.sum(field.astype(jnp.float32)[0], axis=0)

    return jnp.stack(
        [
            over_rows(info.candidates) / visible,
            over_rows(info.count) / visible,
            over_rows(info.missed_mass) / length,
            over_rows(info.error_bound) / length,
        ]
    )


def table(found: Perplexity) -> list[dict[str, Any]]:
    """What each head did, as lines of a CSV file."""
    layers, heads = found.looked_at.shape
    return [
        {
            "layer": layer,
            "head": head,
            "keys_looked_at": found.looked_at[layer, head],
            "keys_fired": found.fired[layer, head],
            "missed_mass_bound": found.missed_mass[layer, head],
            "error_bound": found.error_bound[layer, head],
        }
        for layer in range(layers)
        for head in range(heads)
    ]
