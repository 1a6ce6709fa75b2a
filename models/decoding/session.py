"""Prefill and decode of a batch of prompts, each compiled once per shape bucket."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models.decoding.programs import Counts, Drawn, Reader, Sampling, Step
from models.network.transformer import Transformer

_SHORTEST_PIECE = 32
_LONGEST_PIECE = 1024


class Session:
    """A batch of prompts that is being continued.

    Prompts are padded to a power of two, long ones are read in pieces, and the cache
    has a power of two of slots, so that few shapes are ever compiled.

    Args:
      model: any transformer.
      rows: one list of tokens per prompt, none empty.
      max_tokens: how many tokens will be drawn per prompt.
      sampling: how they are drawn.
      seed: of the draws.

    Attributes:
      compile_seconds: time spent compiling; 0 for shapes seen before.
    """

    def __init__(
        self,
        model: Transformer,
        rows: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling,
        seed: int,
    ):
        longest = max(map(len, rows))
        piece = bucket(longest, at_least=_SHORTEST_PIECE, at_most=_LONGEST_PIECE)
        cache_length = bucket(longest + max_tokens, at_least=piece)
        self._sampling = sampling
        self._reader = Reader(model, sampling)
        self._caches = model.init_caches(len(rows), cache_length)
        self._pieces = _pad(rows, piece)
        self._drawn = Drawn(
            token=jnp.zeros(len(rows), jnp.int32),
            draws=jnp.zeros((), jnp.int32),
            key=jax.random.key(seed),
        )
        self._prefill = self._compile(self._pieces[0][0])
        self._one = jnp.ones(len(rows), jnp.int32)
        self._decode: Step | None = None

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling; 0 for shapes seen before."""
        return self._reader.compile_seconds

    def prefill(self) -> tuple[jax.Array, list[Counts]]:
        """Reads the prompts; the first new token i32[B] of each, and the counts."""
        counts, first = [], self._drawn.draws
        for tokens, lengths in self._pieces:
            # Every piece draws with the same number: only one draw per row is kept.
            self._drawn = self._drawn._replace(draws=first)
            counts.append(self._advance(self._prefill, tokens, lengths))
        return self._drawn.token, counts

    def ready(self) -> None:
        """Compiles `decode`, whose first call would: the first token need not wait."""
        if self._decode is None:
            self._decode = self._compile(self._drawn.token)

    def decode(self) -> tuple[jax.Array, list[Counts]]:
        """Reads the tokens drawn last; the next i32[B], and the counts."""
        self.ready()
        assert self._decode is not None
        counts = self._advance(self._decode, self._drawn.token, self._one)
        return self._drawn.token, [counts]

    def fork(self, model: Transformer) -> Session:
        """The same prompts, read already, continued by another implementation.

        Args:
          model: with the same parameters (see `with_attention`).

        Returns:
          A session of its own that stands where this one does.
        """
        other = object.__new__(Session)
        other._reader = Reader(model, self._sampling)
        other._sampling = self._sampling
        other._caches = jax.tree.map(jnp.copy, self._caches)
        other._drawn = self._drawn
        other._pieces = []
        other._one = self._one
        other._decode = None
        other.ready()
        return other

    def _compile(self, tokens: jax.Array) -> Step:
        return self._reader.compile(self._caches, tokens, self._drawn)

    def _advance(self, step: Step, tokens: jax.Array, lengths: jax.Array) -> Counts:
        self._caches, self._drawn, counts = step(
            self._caches, tokens, lengths, self._drawn
        )
        return counts


def bucket(length: int, *, at_least: int, at_most: int | None = None) -> int:
    """The next power of two, between two powers of two."""
    size = max(at_least, 1 << (length - 1).bit_length())
    return size if at_most is None else min(size, at_most)


def check_request(
    model: Transformer,
    prompts: Sequence[bytes | Sequence[int]],
    *,
    max_tokens: int,
    seed: int,
    max_length: int,
) -> list[list[int]]:
    """Checks what is asked of a model before anything is compiled.

    Args:
      model: gives the vocabulary.
      prompts: bytes or token sequences.
      max_tokens: tokens to draw per prompt.
      seed: of the draws.
      max_length: the most tokens a prompt may grow to.

    Returns:
      The prompts as lists of tokens.

    Raises:
      ValueError: what cannot be generated, and what to do about it.
    """
    if isinstance(prompts, (bytes, str)) or not prompts:
        raise ValueError(
            "prompts must be a list with at least one prompt, got "
            f"{type(prompts).__name__} of length {len(prompts)}; use [prompt]."
        )
    if max_tokens < 1:
        raise ValueError(
            f"max_tokens must be at least 1, got {max_tokens}; ask for one or more."
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {seed}; use seed=0.")
    rows = [[int(token) for token in prompt] for prompt in prompts]
    for number, row in enumerate(rows):
        _check_row(number, row, model.config.vocab_size)
        if len(row) + max_tokens > max_length:
            raise ValueError(
                f"prompt {number} has {len(row)} tokens and max_tokens is "
                f"{max_tokens}, together above max_length={max_length}; shorten the "
                "prompt, ask for fewer tokens or raise max_length."
            )
    return rows


def _check_row(number: int, row: list[int], vocabulary: int) -> None:
    if not row:
        raise ValueError(
            f"prompt {number} is empty; give at least one token to continue from."
        )
    for token in (min(row), max(row)):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"prompt {number} holds token {token}, outside the model's vocabulary "
                f"of {vocabulary}; use tokens from 0 to {vocabulary - 1}."
            )


def _pad(
    rows: Sequence[Sequence[int]], piece: int
) -> list[tuple[jax.Array, jax.Array]]:
    """Tokens i32[B, piece] and lengths i32[B] of each piece of the prompts."""
    lengths = np.array([len(row) for row in rows], np.int32)
    pieces = -(-int(lengths.max()) // piece)
    tokens = np.zeros((len(rows), pieces * piece), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return [
        (
            jnp.asarray(tokens[:, start : start + piece]),
            jnp.asarray(np.clip(lengths - start, 0, piece)),
        )
        for start in range(0, pieces * piece, piece)
    ]
