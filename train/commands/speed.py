"""`python -m train speed RUN ...`: training steps of trained models, dense and hsr.

Every model takes the same steps from its trained parameters, with its own sparsity, by
every method; they take turns and medians count. Nothing is saved.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from models.files.atomic import write_atomic
from models.files.runs import load_run
from models.network.config import Method
from models.network.transformer import abstract_model
from train import data, step
from train.commands import OfRuns
from train.config import TrainConfig
from train.files.folder import read_text
from train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Command(OfRuns):
    """Measures training steps from trained parameters.

    For example:

        python -m train speed runs/mine --attention dense hsr
    """

    row_length: int | None = None
    """Tokens of a row; none: that of the run."""
    batch: int | None = None
    """Rows of a step; none: that of the run."""
    attention: tuple[Method, ...] = ("dense", "hsr", "auto")
    """Methods to compare."""
    rounds: int = 5
    """Steps of each, after one that is not timed."""
    out: Path | None = None
    """JSON file to write."""


def work(command: Command) -> None:
    """Measures, writes and prints."""
    rows = measure_runs(command)
    if command.out is not None:
        write_atomic(command.out, json.dumps(rows, indent=2) + "\n")
    for row in rows:
        print(
            f"{row['run']}, {row['attention']}, {row['batch']} x "
            f"{row['row_length']:,}: {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['over_dense']:.2f} times dense, loss {row['loss']:.4f}"
        )
    command.print_json(rows)


def measure_runs(command: Command) -> list[dict[str, Any]]:
    """Measures; a row for every run and method.

    Raises:
        ValueError: a run that cannot be loaded.
    """
    if command.rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {command.rounds}")
    return [row for run in command.runs for row in _of_run(run, command)]


def _of_run(run: Path, command: Command) -> list[dict[str, Any]]:
    """The rows of one run."""
    config, corpus, _ = read_text(run)
    config = dataclasses.replace(
        config,
        row_length=command.row_length or config.row_length,
        batch=command.batch or config.batch,
        accumulate=1,
        threshold_fraction=0.0,  # the thresholds that the model was trained to
    )
    rows, _ = data.split(corpus, row_length=config.row_length)
    batches = data.Batches(rows, batch=config.batch, seed=config.seed)
    batch = jnp.asarray(next(batches))
    _, fresh = step.init_state(config)
    params, rest = nnx.state(load_run(run), nnx.Param, ...)
    start = dataclasses.replace(fresh, params=params, rest=rest)
    steps = {name: _Step(start, config, name) for name in command.attention}
    for each in tqdm(steps.values(), desc=f"{run.name}: compiling", file=sys.stderr):
        each(batch)
    for _ in tqdm(range(command.rounds), desc=f"{run.name}: steps", file=sys.stderr):
        batch = jnp.asarray(next(batches))
        for each in steps.values():
            each.seconds.append(each(batch))
    seconds = {name: statistics.median(each.seconds) for name, each in steps.items()}
    dense = seconds.get("dense", float("nan"))
    return [
        {
            "run": run.name,
            "kind": config.model.attention_kind,
            "attention": name,
            "row_length": config.row_length,
            "batch": config.batch,
            "tokens_per_second": config.batch * config.row_length / seconds[name],
            "over_dense": dense / seconds[name],
            "loss": each.loss,
            "nonzero_fraction": each.nonzero_fraction,
        }
        for name, each in steps.items()
    ]


class _Step:
    """Train steps by one method, each from where the last one led."""

    def __init__(self, start: TrainState, config: TrainConfig, attention: Method):
        model = abstract_model(dataclasses.replace(config.model, attention=attention))
        self._step = step.make_train_step(nnx.graphdef(model), config)
        # A copy, since a step consumes its state; where a step leaves the next one, or
        # the second step would compile anew.
        copy = jax.tree.map(jnp.copy, start)
        self._state: TrainState = jax.device_put(copy, jax.devices()[0])
        self.seconds: list[float] = []
        self.loss = self.nonzero_fraction = float("nan")

    def __call__(self, batch: jax.Array) -> float:
        """One step; its seconds."""
        started = time.perf_counter()
        self._state, measured = self._step(self._state, batch)
        jax.block_until_ready((self._state, measured))
        seconds = time.perf_counter() - started
        self.loss = float(measured["loss"])
        self.nonzero_fraction = float(measured["nonzero_fraction"])
        return seconds
