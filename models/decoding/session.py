"""Prefill and decode of a batch of prompts, each compiled once per shape bucket."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hsrjax
from models.decoding.sampling import sample
from models.network.transformer import Caches, Transformer

_SHORTEST_PIECE = 32
_LONGEST_PIECE = 1024


class Sampling(NamedTuple):
    """The static options of `models.decoding.sampling.sample`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


class Counts(NamedTuple):
    """What attention did in one call: sums over real queries, heads and layers.

    Attributes:
      visible: f32[], keys the queries could see.
      looked_at: f32[], keys whose exact score was computed.
      fired: f32[], keys with a weight that is not zero.
      finite: bool[], whether the logits tokens were drawn from are finite.
    """

    visible: jax.Array
    looked_at: jax.Array
    fired: jax.Array
    finite: jax.Array


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
        graphdef, self._state = nnx.split(model)
        self._caches = model.init_caches(len(rows), cache_length)
        self._key = jax.random.key(seed)
        self._token = jnp.zeros(len(rows), jnp.int32)
        self._draws = jnp.zeros((), jnp.int32)
        self._pieces = _pad(rows, piece)
        self._sampling = sampling

        started = time.perf_counter()
        programs = _programs(graphdef, sampling)
        tokens, lengths = self._pieces[0]
        self._prefill = programs.prefill(*self._arguments(), tokens, lengths)
        self._decode = programs.decode(*self._arguments())
        compiled = programs.newly_compiled()
        self.compile_seconds = time.perf_counter() - started if compiled else 0.0

    def prefill(self) -> tuple[jax.Array, list[Counts]]:
        """Reads the prompts; the first new token i32[B] of each, and the counts."""
        counts = []
        for tokens, lengths in self._pieces:
            counts.append(self._advance(self._prefill, tokens, lengths))
        self._draws = jnp.ones((), jnp.int32)
        return self._token, counts

    def decode(self) -> tuple[jax.Array, list[Counts]]:
        """Reads the tokens drawn last; the next i32[B], and the counts."""
        counts = self._advance(self._decode)
        return self._token, [counts]

    def fork(self, model: Transformer) -> Session:
        """The same prompts, read already, continued by another implementation.

        Args:
          model: with the same parameters (see `with_attention`).

        Returns:
          A session of its own that stands where this one does.
        """
        other = object.__new__(Session)
        graphdef, other._state = nnx.split(model)
        other._caches = jax.tree.map(jnp.copy, self._caches)
        other._key, other._token, other._draws = self._key, self._token, self._draws
        other._pieces = []
        started = time.perf_counter()
        programs = _programs(graphdef, self._sampling)
        other._sampling = self._sampling
        other._decode = programs.decode(*other._arguments())
        compiled = programs.newly_compiled()
        other.compile_seconds = time.perf_counter() - started if compiled else 0.0
        return other

    def _arguments(self) -> tuple[Any, ...]:
        return self._state, self._caches, self._token, self._draws, self._key

    def _advance(self, program: Callable[..., Any], *inputs: jax.Array) -> Counts:
        self._caches, self._token, self._draws, counts = program(
            *self._arguments(), *inputs
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


class _Programs:
    """The compiled functions of one model shape and one way of sampling."""

    def __init__(self, graphdef: nnx.GraphDef[Transformer], sampling: Sampling):
        self._jitted = tuple(
            jax.jit(
                functools.partial(function, graphdef, sampling),
                donate_argnames=("caches",),
            )
            for function in (_prefill, _decode)
        )
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._new = 0

    def prefill(self, *args: Any) -> Callable[..., Any]:
        return self._compile(0, args)

    def decode(self, *args: Any) -> Callable[..., Any]:
        return self._compile(1, args)

    def newly_compiled(self) -> int:
        """How many functions were compiled since the last call."""
        new, self._new = self._new, 0
        return new

    def _compile(self, which: int, args: tuple[Any, ...]) -> Callable[..., Any]:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args))
        if (which, shapes) not in self._compiled:
            lowered = self._jitted[which].lower(*args)
            self._compiled[which, shapes] = lowered.compile()
            self._new += 1
        return self._compiled[which, shapes]


@functools.lru_cache(maxsize=8)
def _programs(graphdef: nnx.GraphDef[Transformer], sampling: Sampling) -> _Programs:
    return _Programs(graphdef, sampling)


def _prefill(
    graphdef: nnx.GraphDef[Transformer],
    sampling: Sampling,
    state: nnx.State,
    caches: Caches,
    token: jax.Array,
    draws: jax.Array,
    key: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
) -> tuple[Caches, jax.Array, jax.Array, Counts]:
    """Reads tokens i32[B, T]; draws for the rows with lengths > 0, others keep theirs.

    A row's last piece with a token in it is the one whose draw stands, because later
    pieces hold only its padding.
    """
    model = nnx.merge(graphdef, state)
    start = caches[0].length
    stream, caches, infos = model.advance(tokens, caches, lengths=lengths)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    logits = model.unembed(jnp.take_along_axis(stream, last, axis=1)[:, 0])
    # Every piece draws with number 0: only one draw per row is kept.
    drawn = sample(logits, jax.random.fold_in(key, 0), **sampling._asdict())
    real = lengths > 0
    counts = _count(infos, start, lengths, tokens.shape[1], logits, real)
    return caches, jnp.where(real, drawn, token), draws, counts


def _decode(
    graphdef: nnx.GraphDef[Transformer],
    sampling: Sampling,
    state: nnx.State,
    caches: Caches,
    token: jax.Array,
    draws: jax.Array,
    key: jax.Array,
) -> tuple[Caches, jax.Array, jax.Array, Counts]:
    """Reads token i32[B], the last drawn, and draws number `draws`."""
    model = nnx.merge(graphdef, state)
    start = caches[0].length
    stream, caches, infos = model.advance(token[:, None], caches)
    logits = model.unembed(stream[:, 0])
    drawn = sample(logits, jax.random.fold_in(key, draws), **sampling._asdict())
    real = jnp.ones(token.shape, bool)
    counts = _count(infos, start, real.astype(jnp.int32), 1, logits, real)
    return caches, drawn, draws + 1, counts


def _count(
    infos: tuple[hsrjax.Info, ...],
    start: jax.Array,
    lengths: jax.Array,
    new: int,
    logits: jax.Array,
    real: jax.Array,
) -> Counts:
    offsets = jnp.arange(new, dtype=jnp.int32)[None, :]
    inside = (offsets < lengths[:, None])[..., None]  # [B, T, 1]
    visible = (start[:, None] + offsets + 1)[..., None]

    def total(field: jax.Array) -> jax.Array:  # float32: int32 sums would overflow
        return jnp.sum(jnp.where(inside, field.astype(jnp.float32), 0.0))

    heads = infos[0].count.shape[-1]
    return Counts(
        visible=total(visible) * (heads * len(infos)),
        looked_at=sum((total(i.candidates) for i in infos), jnp.float32(0)),
        fired=sum((total(i.count) for i in infos), jnp.float32(0)),
        finite=jnp.all(jnp.isfinite(logits) | ~real[:, None]),
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
