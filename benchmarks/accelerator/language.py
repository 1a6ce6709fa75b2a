"""Rows of a whole language model: a step of training, tokens behind a long prompt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.accelerator import choosing
from benchmarks.accelerator.findings import OURS, Finding, compare, lines
from benchmarks.accelerator.sequences import released, text
from benchmarks.accelerator.setting import Setting
from benchmarks.contestants.growing import rewound
from benchmarks.harness import loops
from benchmarks.harness.loops import Loop
from benchmarks.harness.timing import Contestant, Open, Unavailable, relative_error
from models.decoding.programs import Drawn, Reader, Sampling
from models.network.transformer import Transformer, with_attention, with_config
from train.config import TrainConfig
from train.step import TrainState, init_state, make_optimizer, make_train_step

ROW, PROMPT, PIECE = 1 << 14, 1 << 16, 1 << 10
TOLERANCE_STEP, TOLERANCE_LOGITS = 2**-5, 2**-8
"""Of the loss and the gradient's norm, and of logits, in bfloat16. The released model's
logits change by 2^-7 when all its attention is half as large again."""


def training(setting: Setting) -> list[Finding]:
    """Whole steps of the released model, beside softmax models of its size."""
    length = setting.size(ROW, 64)
    batch = jnp.asarray(text(length + 1))[None]
    loop = Loop(setting.size(3, 1))
    contestants = [_trained(*one, batch, loop) for one in _methods(setting)[:4]]
    contestants.append(_softmax("softmax model, cudnn", choosing.CUDNN, batch, loop))
    kernels = _softmax("softmax model, hsrjax dense", setting.kernels, batch, loop)
    contestants.append(kernels)
    with choosing.listening():
        timings = setting.race(contestants, _agreeing())
    shared = {"batch": 1, "queries": length, "keys": length, "dtype": "bfloat16"}
    return [compare(10, lines(10, timings, shared, allowed=TOLERANCE_STEP))]


def tokens(setting: Setting) -> list[Finding]:
    """Tokens behind a long prompt: what is read next is text, so that all read it."""
    length = setting.size(PROMPT, 96)
    loop = Loop(setting.size(32, 2))
    words = text(length + loop.steps)
    model = _in_bfloat16(released().model)
    caches, length = _read(
        model, words[:length], room=length + loop.steps, piece=setting.size(PIECE, 32)
    )
    following = jnp.asarray(words[length:], jnp.int32)
    contestants = [
        Contestant(
            name,
            "relu",
            functools.partial(
                _generating, model, method, chosen, caches, following, loop
            ),
            _arrays,
            detail=f"implementation {chosen}",
        )
        for name, method, chosen in _methods(setting)
    ]
    with choosing.listening():
        timings = setting.race(contestants, _agreeing())
    shared = {"batch": 1, "queries": 1, "keys": length, "dtype": "bfloat16"}
    found = lines(11, timings, shared, allowed=TOLERANCE_LOGITS)
    for row in found:
        row["tokens_per_second"] = 1e6 / row["us"] if row["us"] else None
    return [compare(11, found)]


def _agreeing() -> Callable[[Contestant, Any], float | None]:
    """Scores by what came first: XLA's dense attention, unless it fails."""
    first: list[Any] = []

    def score(contestant: Contestant, arrays: Any) -> float | None:
        if contestant.definition != "relu":
            return None
        first.append(arrays)
        return max(map(relative_error, arrays, first[0]))

    return score


def _methods(setting: Setting) -> list[tuple[str, str, str]]:
    """Names, methods and implementations; first what the others are compared with."""
    kernels, xla = setting.kernels, "xla"
    return [
        ("hsrjax dense (xla)", "dense", xla),
        (f"{OURS}kernels)", "hsr", kernels),
        ("hsrjax dense (kernels)", "dense", kernels),
        (f"{OURS}xla)", "hsr", xla),
        ("auto", "auto", kernels),
    ]


def _arrays(result: Any) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(x, np.float32) for x in result)


def _in_bfloat16(model: Transformer, **changes: Any) -> Transformer:
    config = dataclasses.replace(model.config, dtype="bfloat16", **changes)
    return with_config(model, config)


def _trained(name: str, method: str, chosen: str, batch, loop: Loop) -> Contestant:
    """Training goes on from the released parameters, whose thresholds are sparse."""

    def prepare() -> Open:
        model = _in_bfloat16(released().model, attention=method)
        config = _config(model.config, batch)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        state = TrainState(
            params=params,
            rest=rest,
            opt_state=make_optimizer(config).init(params),
            step=jnp.zeros((), jnp.int32),
            loss_average=jnp.full((), jnp.inf, jnp.float32),
            key=jax.random.key(0),
        )
        with choosing.by(chosen):
            return _steps(graphdef, config, state, batch, loop)

    return Contestant(name, "relu", prepare, _arrays, detail=f"implementation {chosen}")


def _softmax(name: str, chosen: str, batch, loop: Loop) -> Contestant:
    """A model of the same size that attends by softmax to all keys."""

    def prepare() -> Open:
        if chosen == choosing.CUDNN and jax.default_backend() != "gpu":
            raise Unavailable("needs a GPU")
        shape = released().model.config
        shape = dataclasses.replace(
            shape, attention_kind="softmax", attention="dense", dtype="bfloat16"
        )
        config = _config(shape, batch)
        with choosing.by(chosen):
            graphdef, state = init_state(config)
            return _steps(graphdef, config, state, batch, loop)

    definition = "other: a softmax model"
    return Contestant(name, definition, prepare, _arrays, detail=f"by {chosen}")


def _config(model: Any, batch: jax.Array) -> TrainConfig:
    """So small a rate that the model stays the one that was trained."""
    return TrainConfig(
        model=model,
        steps=1000,
        batch=1,
        row_length=batch.shape[1] - 1,
        tokenizer="bpe",
        learning_rate=1e-6,
        threshold_start=1.0,
        threshold_end=1.0,
        threshold_fraction=0.0,
    )


def _steps(graphdef, config, state, batch, loop: Loop) -> Open:
    one = make_train_step(graphdef, config)

    def step(state, moved, batch):
        del moved
        state, metrics = one(state, batch)
        return (metrics["loss"][None], metrics["grad_norm"][None]), state

    copy = lambda: loops.Held((jax.tree.map(jnp.copy, state),))
    return loops.repeated(step, loop, copy, (), batch)


def _read(model: Transformer, words: np.ndarray, *, room: int, piece: int):
    """Caches that hold the prompt, read in pieces, and how long it is."""
    reader = Reader(with_attention(model, "dense"), Sampling())
    caches = model.init_caches(1, room + 32)
    drawn = Drawn(jnp.zeros(1, jnp.int32), jnp.zeros((), jnp.int32), jax.random.key(0))
    whole = words.size // piece * piece
    pieces = jnp.asarray(words[:whole], jnp.int32).reshape(-1, 1, piece)
    step = reader.compile(caches, pieces[0], drawn)
    for tokens in pieces:
        caches, drawn, _ = step(caches, tokens, jnp.full(1, piece, jnp.int32), drawn)
    return caches, whole


def _generating(
    model: Transformer,
    method: Any,
    chosen: str,
    caches: Any,
    following: jax.Array,
    loop: Loop,
) -> Open:
    """A program of many tokens, each behind what the one before has appended."""
    graphdef, state = nnx.split(with_attention(model, method))

    def step(caches, moved, fixed):
        state, following, length = fixed
        place = caches[0].length[0] - length
        token = following[jnp.clip(place, 0, following.size - 1)]
        model = nnx.merge(graphdef, state)
        # For all that the compiler knows the next token depends on the last logits.
        token = token + moved.astype(jnp.int32)
        logits, caches, _ = model.step(token[None, None], caches)
        return (logits[:, -1],), caches

    length = caches[0].length[0]
    moved, fixed = jnp.float32(0), (state, following, length)
    with choosing.by(chosen):
        program = loops.compiled(
            step,
            loop,
            (caches,),
            moved,
            fixed,
            begin=lambda caches: tuple(rewound(x, length) for x in caches),
        )
    copy = lambda: loops.Held((jax.tree.map(jnp.copy, caches),))
    return lambda: loops.opened(program, loop, copy(), moved, fixed)
