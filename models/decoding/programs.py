"""The programs that read tokens: one for layers that are alike, one for each end.

A model of thirty equal layers compiled as one function takes XLA thirty times as long
as one layer. So a step is a call for each layer, of the same program with other arrays,
between one that looks up tokens and one that draws the next.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.decoding.sampling import sample
from models.network.transformer import Caches, Transformer


class Sampling(NamedTuple):
    """The static options of `models.decoding.sampling.sample`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


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


class Drawn(NamedTuple):
    """What one call has to know of those before, besides the caches.

    Attributes:
      token: i32[B], the last one drawn of each row.
      draws: i32[], the number of the next draw.
      key: of the draws.
    """

    token: jax.Array
    draws: jax.Array
    key: jax.Array


class Part(NamedTuple):
    """A module as a static side, equal for equal modules, and its arrays."""

    static: Any
    arrays: tuple[jax.Array, ...]

    @classmethod
    def of(cls, module: nnx.Module) -> Part:
        graphdef, state = nnx.split(module)
        arrays, tree = jax.tree.flatten(state)
        return cls((graphdef, tree), tuple(arrays))


def merge(static: Any, arrays: tuple[jax.Array, ...]) -> Any:
    """The module of a `Part`."""
    graphdef, tree = static
    return nnx.merge(graphdef, jax.tree.unflatten(tree, arrays))


class Reader:
    """A model taken apart, and the programs of its parts.

    Args:
      model: any transformer.
      sampling: how tokens are drawn.

    Attributes:
      compile_seconds: time spent compiling; 0 for shapes seen before in this process.
    """

    def __init__(self, model: Transformer, sampling: Sampling):
        self._blocks = [Part.of(block) for block in model.blocks]
        ends = nnx.merge(*nnx.split(model))
        ends.blocks = nnx.List([])
        self._ends = Part.of(ends)
        self._embed = _program(_embed, self._ends.static)
        self._draw = _program(_draw, self._ends.static, sampling, len(self._blocks))
        self._reads = [_program(_read, block.static) for block in self._blocks]
        self.compile_seconds = 0.0

    def compile(self, caches: Caches, tokens: jax.Array, drawn: Drawn) -> Step:
        """What reads tokens of this shape behind those in such caches."""
        started = time.perf_counter()
        size, lengths = caches[0].index.size, drawn.token
        embed = self._embed.compile(self._ends.arrays, tokens, size, lengths)
        stream, place, counts = embed.results
        reads = []
        for program, block, cache in zip(
            self._reads, self._blocks, caches, strict=True
        ):
            read = program.compile(block.arrays, stream, cache, place, counts)
            stream, _, counts = read.results
            reads.append(read)
        draw = self._draw.compile(self._ends.arrays, stream, place, counts, drawn)
        if any(program.new for program in (embed, *reads, draw)):
            self.compile_seconds += time.perf_counter() - started
        return functools.partial(
            self._run, embed.run, [read.run for read in reads], draw.run
        )

    def _run(self, embed, reads, draw, caches, tokens, lengths, drawn):
        ends, size = self._ends.arrays, caches[0].index.size
        stream, place, counts = embed(ends, tokens, size, lengths)
        grown = []
        for read, block, cache in zip(reads, self._blocks, caches, strict=True):
            stream, cache, counts = read(block.arrays, stream, cache, place, counts)
            grown.append(cache)
        return tuple(grown), *draw(ends, stream, place, counts, drawn)


Step = Callable[[Caches, jax.Array, jax.Array, Drawn], tuple[Caches, Drawn, Counts]]
"""Reads tokens i32[B, T], padded on the right, of which the first lengths i32[B] of
each row are real (or i32[B], one of each), and draws each row's next; a row without any
keeps its token. The caches are given away."""


class _Compiled(NamedTuple):
    """A program for arrays of certain shapes, and those of its results."""

    run: Callable[..., Any]
    results: Any
    new: bool


class _Program:
    """A function compiled ahead of its first call, once for each set of shapes."""

    def __init__(self, function: Callable[..., Any], donate: tuple[str, ...]):
        self._jitted = jax.jit(function, donate_argnames=donate)
        self._compiled: dict[Any, _Compiled] = {}

    def compile(self, *arrays: Any) -> _Compiled:
        settings: Any = jax.config
        bit_by_bit = settings.jax_disable_jit
        shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays)]
        key = (bit_by_bit, *shapes)
        if key in self._compiled:
            return self._compiled[key]
        with jax.disable_jit(False):
            lowered = self._jitted.lower(*arrays)
            run = lowered.compile()
        if bit_by_bit:
            run = functools.partial(_as_program, run)
        found = _Compiled(run, lowered.out_info, new=True)
        self._compiled[key] = found._replace(new=False)
        return found


def _as_program(run: Callable[..., Any], *arrays: Any) -> Any:
    """A step is a program also where JAX_DISABLE_JIT has all else run bit by bit."""
    with jax.disable_jit(False):
        return run(*arrays)


@functools.lru_cache(maxsize=64)
def _program(function: Callable[..., Any], *static: Any) -> _Program:
    donate = ("cache",) if function is _read else ()
    return _Program(functools.partial(function, *static), donate)


class _Place(NamedTuple):
    """Where tokens stand: their positions i32[B, T], how many of each row are real."""

    positions: jax.Array
    lengths: jax.Array
    scale: jax.Array  # of thresholds


class _Sums(NamedTuple):
    looked_at: jax.Array
    fired: jax.Array


def _embed(static, arrays, tokens, size, lengths):
    """Tokens behind those of a cache, i32[B, K] of them, as a residual stream."""
    model, tokens = merge(static, arrays), tokens.reshape(len(tokens), -1)
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    place = _Place(size[:, :1] + offsets, lengths, model.threshold_scale[...])
    none = jnp.zeros((), jnp.float32)  # int32 sums would overflow
    return model.embed(tokens), place, _Sums(none, none)


def _read(static, arrays, stream, cache, place, counts):
    """A block: the residual stream, the longer cache, and what attention did so far."""
    positions, lengths, scale = place
    stream, cache, info = merge(static, arrays).step(
        stream, cache, positions, scale, lengths=lengths
    )
    inside = _real(place)[..., None]  # [B, T, 1]
    total = lambda field: jnp.sum(jnp.where(inside, field.astype(jnp.float32), 0.0))
    looked_at, fired = total(info.candidates), total(info.count)
    return stream, cache, _Sums(counts.looked_at + looked_at, counts.fired + fired)


def _draw(static, sampling, layers, arrays, stream, place, counts, drawn):
    """The next token of each row, drawn behind its last real one.

    A row's last piece with a token in it is the one whose draw stands, because later
    pieces hold only its padding.
    """
    model = merge(static, arrays)
    last = jnp.maximum(place.lengths - 1, 0)[:, None, None]
    logits = model.unembed(jnp.take_along_axis(stream, last, axis=1)[:, 0])
    key = jax.random.fold_in(drawn.key, drawn.draws)
    real = place.lengths > 0
    token = jnp.where(real, sample(logits, key, **sampling._asdict()), drawn.token)
    heads = model.config.views * model.config.num_heads
    visible = jnp.where(_real(place), (place.positions + 1).astype(jnp.float32), 0.0)
    found = Counts(
        visible=jnp.sum(visible) * (heads * layers),
        looked_at=counts.looked_at,
        fired=counts.fired,
        finite=jnp.all(jnp.isfinite(logits) | ~real[:, None]),
    )
    return drawn._replace(token=token, draws=drawn.draws + 1), found


def _real(place):
    """Which tokens bool[B, T] are no padding."""
    offsets = jnp.arange(place.positions.shape[1], dtype=jnp.int32)[None, :]
    return offsets < place.lengths[:, None]
