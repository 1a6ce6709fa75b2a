"""Pure functions of training: state, schedules, loss, train step, evaluation step.

Letters: B rows, T predicted tokens, V tokens in the vocabulary, L layers, N query
heads (of every view, where a kind of attention has two).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models.network.transformer import ThresholdScale, Transformer, abstract_model
from train.config import TrainConfig

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Attributes:
        params: nnx.State of the model's learned variables.
        rest: nnx.State of its other variables, the thresholds' multiplier among them.
        opt_state: state of the optimizer.
        step: i32[], steps done.
        loss_average: f32[], running mean of the loss, infinite before the first step.
        key: key[], for layers that draw random numbers: they fold in the step.
    """

    params: Any
    rest: Any
    opt_state: optax.OptState
    step: jax.Array
    loss_average: jax.Array
    key: jax.Array


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then half a cosine down to its share of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / max(1, config.warmup_steps),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_learning_rate,
    )


def threshold_schedule(config: TrainConfig) -> optax.Schedule:
    """Multiplier of the attention thresholds: rises linearly, then stays.

    A threshold that is tight from the first step starves the heads before they learn.
    """
    if config.threshold_steps == 0:
        return optax.constant_schedule(config.threshold_end)
    return optax.linear_schedule(
        config.threshold_start, config.threshold_end, config.threshold_steps
    )


def next_threshold(
    config: TrainConfig, scale: jax.Array, loss: jax.Array, average: jax.Array
) -> jax.Array:
    """The multiplier after a step, where the loss decides: it waits for the loss.

    Args:
        config: the run.
        scale: f32[], the multiplier now.
        loss: f32[], of this step.
        average: f32[], running mean of the loss before it.

    Returns:
        f32[]: one step of twice the linear schedule's size further if the loss is not
        above its mean, else the same.
    """
    if config.threshold_steps == 0:
        return scale
    reach = config.threshold_end - config.threshold_start
    further = scale + 2.0 * reach / config.threshold_steps
    limit = jnp.minimum if reach >= 0 else jnp.maximum
    return jnp.where(loss <= average, limit(further, config.threshold_end), scale)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm; decay on matrices alone."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def init_state(config: TrainConfig) -> tuple[Any, TrainState]:
    """Draws the parameters.

    Args:
        config: the run; its seed decides the parameters.

    Returns:
        The graph definition of the model and the state before the first step.
    """

    def draw(key: jax.Array) -> TrainState:
        init_key, key = jax.random.split(key)
        model = Transformer(config.model, rngs=nnx.Rngs(init_key))
        params, rest = nnx.state(model, nnx.Param, ...)
        return TrainState(
            params=params,
            rest=set_threshold_scale(rest, threshold_schedule(config)(0)),
            opt_state=make_optimizer(config).init(params),
            step=jnp.zeros((), jnp.int32),
            loss_average=jnp.full((), jnp.inf, jnp.float32),
            key=key,
        )

    graphdef = nnx.graphdef(abstract_model(config.model))
    return graphdef, jax.jit(draw)(jax.random.key(config.seed))


def set_threshold_scale(rest: nnx.State, value: Any) -> nnx.State:
    """Returns the variables with the multiplier of the thresholds set to f32[]."""

    def replace(variable: Any) -> Any:
        if isinstance(variable, ThresholdScale):
            return variable.replace(jnp.asarray(value, jnp.float32))
        return variable

    return jax.tree.map(
        replace, rest, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def get_threshold_scale(rest: nnx.State) -> jax.Array:
    """The multiplier of the thresholds among the variables, f32[]."""
    variables = jax.tree.leaves(
        rest, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    (scale,) = (x[...] for x in variables if isinstance(x, ThresholdScale))
    return scale


def row_losses(
    model: Transformer, batch: jax.Array, *, remat: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Loss and share of keys that fire, row by row.

    The loss of a token is -log softmax(logits)[token]; a row's loss is the mean over
    its T tokens. A head's share is (sum over queries of the keys that fire) / (sum over
    queries of the keys that are visible), the latter T (T + 1) / 2.

    Args:
        model: the network.
        batch: u[B, T+1]; position t predicts token t + 1.
        remat: as in `Transformer`.

    Returns:
        Loss in nats per token f32[B], share of non-zero scores f32[B, L, N].
    """
    inputs, targets = batch[:, :-1].astype(jnp.int32), batch[:, 1:].astype(jnp.int32)
    logits, infos = model(inputs, return_info=True, remat=remat)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)  # [B, T]
    length = inputs.shape[1]
    counts = [jnp.sum(info.count.astype(jnp.float32), axis=1) for info in infos]
    visible = length * (length + 1) / 2
    return losses.mean(axis=1), jnp.stack(counts, axis=1) / visible


def loss_fn(
    params: nnx.State,
    rest: nnx.State,
    batch: jax.Array,
    *,
    graphdef: Any,
    sparsity_weight: float = 0.0,
    remat: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What a step makes smaller: the mean loss of a batch, and what thresholds earn.

    Args:
        params: learned variables.
        rest: the other variables.
        batch: u[B, T+1].
        graphdef: of the model.
        sparsity_weight: reward for a unit of the heads' mean threshold scale.
        remat: as in `Transformer`.

    Returns:
        Objective f32[], (loss f32[] in nats per token, share of non-zero scores
        f32[L, N]).
    """
    model = nnx.merge(graphdef, params, rest)
    losses, fired = row_losses(model, batch, remat=remat)
    objective = loss = losses.mean()
    if sparsity_weight:
        scales = jnp.stack([block.attention.beta[...] for block in model.blocks])
        objective = loss - sparsity_weight * scales.mean()
    return objective, (loss, fired.mean(axis=0))


def _gradients(
    config: TrainConfig, graphdef: Any, state: TrainState, rest: Any, batch: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    """Gradients, loss and share of non-zero scores of a batch, in as many parts."""
    grad_fn = jax.grad(
        functools.partial(
            loss_fn,
            graphdef=graphdef,
            sparsity_weight=config.sparsity_weight,
            remat=config.remat,
        ),
        has_aux=True,
    )
    if config.accumulate == 1:
        grads, (loss, fired) = grad_fn(state.params, rest, batch)
        return grads, loss, fired
    # A part takes every n-th row, so that each device has its share of every part.
    parts = batch.reshape(-1, config.accumulate, batch.shape[1]).swapaxes(0, 1)

    def add(total: Any, part: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad_fn(state.params, rest, part)), None

    shapes = jax.eval_shape(grad_fn, state.params, rest, parts[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, parts)
    grads, (loss, fired) = jax.tree.map(lambda x: x / config.accumulate, total)
    return grads, loss, fired


def make_train_step(
    graphdef: Any, config: TrainConfig, *, replicated: Any = None
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
    """Builds the jitted train step.

    Args:
        graphdef: of the model.
        config: the run.
        replicated: sharding of the state and the metrics when the batch is split over
            several devices.

    Returns:
        `step(state, batch) -> (state, metrics)` with batch u[B, T+1]; it consumes the
        state it is given. Metrics: loss (nats per token), grad_norm (before the clip),
        learning_rate, threshold_scale, nonzero_fraction, each f32[], and sparsity
        f32[L, N], the share of non-zero scores by layer and head.
    """
    optimizer = make_optimizer(config)
    rate, threshold = learning_rate_schedule(config), threshold_schedule(config)
    by_loss = config.threshold_schedule == "loss"

    def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, Metrics]:
        old = get_threshold_scale(state.rest)
        scale = old if by_loss else jnp.asarray(threshold(state.step), jnp.float32)
        rest = set_threshold_scale(state.rest, scale)
        grads, loss, fired = _gradients(config, graphdef, state, rest, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
            "threshold_scale": scale,
            "nonzero_fraction": fired.mean(),
            "sparsity": fired,
        }
        if by_loss:
            following = next_threshold(config, scale, loss, state.loss_average)
            rest = set_threshold_scale(rest, following)
        known = jnp.isfinite(state.loss_average)
        average = jnp.where(known, 0.98 * state.loss_average + 0.02 * loss, loss)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(params, rest, opt_state, state.step + 1, average, state.key)
        return new, metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=replicated)


def make_eval_step(
    graphdef: Any, *, replicated: Any = None
) -> Callable[[nnx.State, nnx.State, jax.Array], tuple[jax.Array, jax.Array]]:
    """Builds the jitted evaluation step.

    Args:
        graphdef: of the model.
        replicated: as for `make_train_step`.

    Returns:
        `step(params, rest, batch)`, which returns what `row_losses` does.
    """

    def eval_step(
        params: nnx.State, rest: nnx.State, batch: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return row_losses(nnx.merge(graphdef, params, rest), batch)

    return jax.jit(eval_step, out_shardings=replicated)
