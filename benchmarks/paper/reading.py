"""The text and the model of the experiments, and what its layers attend to."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hsrjax
from benchmarks.header import Basics
from benchmarks.paper.heads import Head
from models.network.operands import attention_operands
from models.network.transformer import Transformer, with_attention
from models.opening import Opened, open_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(Basics):
    """Options of what reads a text with a model."""

    model: Path
    """A .gguf file, Hugging Face folder, run folder or released model; softmax."""
    text: Path | None = None
    """Text file (UTF-8); None is the documentation that Python carries (pydoc)."""


class Layer(NamedTuple):
    """What one layer's attention gets.

    Attributes:
      query: f32[1, T, N, H] of the newest T positions, scaled.
      key: f32[1, S, K, H].
      value: f32[1, S, K, D].
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array


def read(command: Reading) -> tuple[Opened, np.ndarray, dict[str, str]]:
    """The model, the tokens i32[n] of the whole text, and what they are.

    Raises:
      ValueError: files that cannot be read, or attention that is not softmax.
    """
    if command.text is None:
        text = "\n\n".join(topics.values()).encode()
    else:
        text = command.text.read_bytes()
    opened = open_model(command.model)
    kind = opened.model.config.attention_kind
    if kind != "softmax":
        raise ValueError(
            f"{command.model} attends by {kind}, and the paper's claims are about "
            "softmax: give a softmax model"
        )
    about = {
        "model": command.model.name,
        "text": command.text.name if command.text else "pydoc_data.topics",
        "text_sha256": hashlib.sha256(text).hexdigest(),
    }
    return opened, np.asarray(opened.tokenizer.encode(text), np.int32), about


def pieces(
    tokens: np.ndarray, *, length: int, number: int, seed: int
) -> list[np.ndarray]:
    """Stretches of a text, evenly apart, the first at a place the seed chooses.

    Raises:
      ValueError: the text is shorter than one of them.
    """
    room = tokens.size - length
    if room < 0:
        raise ValueError(
            f"the text has {tokens.size:,} tokens, fewer than the {length:,} needed: "
            "give smaller sizes or another --text"
        )
    first = int(np.random.default_rng(seed).integers(room // number + 1))
    starts = [first + i * room // number for i in range(number)]
    return [tokens[start : start + length] for start in starts]


def operands(model: Transformer, tokens: np.ndarray, rows: int) -> list[Layer]:
    """What every layer's attention gets, queries of the newest rows alone."""
    graph, state = nnx.split(with_attention(model, "dense"))

    @jax.jit
    def run(state, tokens):
        found = attention_operands(nnx.merge(graph, state), tokens)
        return [(one.query[:, -rows:], one.key, one.value) for one in found]

    return [Layer(*x) for x in run(state, jnp.asarray(tokens, jnp.int32)[None])]


def cache_of(
    key: jax.Array, value: jax.Array, *, tail: int | None = None
) -> hsrjax.KVCache:
    """A cache that is exactly full with f32[1, S, K, H] and f32[1, S, K, D]."""
    (_, keys, heads, dim), width = key.shape, value.shape[-1]
    cache = hsrjax.init_cache(1, keys, heads, dim, value_dim=width, tail=tail)
    return hsrjax.extend(cache, key, value)


def heads_of(layer: Layer) -> list[Head]:
    """The heads of a layer, each with the keys it shares."""
    query, key, value = (np.asarray(x)[0] for x in layer)
    group = query.shape[1] // key.shape[1]
    return [
        Head(query[:, head], key[:, head // group], value[:, head // group])
        for head in range(query.shape[1])
    ]
