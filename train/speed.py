"""`python -m train speed RUN ...`: training steps of trained models, dense and hsr.

Every model takes the same steps from its trained parameters, with its own sparsity, by
every implementation; they take turns and medians count. Nothing is saved.
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
import tyro
from flax import nnx
from tqdm import tqdm

from models.command import carry_out
from models.config import Method
from models.load import load_run, write_atomic
from models.tokenizer import load_tokenizer
from train import checkpoints, data, step
from train.config import TrainConfig
from train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Command:
    """Measures training steps from trained parameters."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders."""
    row_length: int | None = None
    """Tokens of a row; none: that of the run."""
    batch: int | None = None
    """Rows of a step; none: that of the run."""
    attention: tuple[Method, ...] = ("dense", "hsr", "auto")
    """Implementations to compare."""
    rounds: int = 5
    """Steps of each, after one that is not timed."""
    out: Path | None = None
    """JSON file to write."""
    json: bool = False
    """End with one line on stdout that holds the results as JSON."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: instead of those of the process.

    Returns:
        Exit status: 0 done, 2 refused, 130 Ctrl-C.
    """

    def work(command: Command) -> None:
        rows = measure_runs(command)
        if command.out is not None:
            write_atomic(command.out, json.dumps(rows, indent=2) + "\n")
        for row in rows:
            print(
                f"{row['run']}, {row['attention']}, {row['batch']} x "
                f"{row['row_length']:,}: {row['tokens_per_second']:,.0f} tokens/s, "
                f"{row['over_dense']:.2f} times dense, loss {row['loss']:.4f}"
            )
        if command.json:
            print(json.dumps(rows))

    return carry_out(Command, arguments, work, prog="python -m train speed")


def measure_runs(command: Command) -> list[dict[str, Any]]:
    """Measures; a row for every run and implementation.

    Raises:
        ValueError: no run, or one that cannot be loaded.
    """
    if not command.runs:
        raise ValueError("no run was named: pass the folders of one or more runs")
    if command.rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {command.rounds}")
    return [row for folder in command.runs for row in _of_run(folder, command)]


def _of_run(folder: Path, command: Command) -> list[dict[str, Any]]:
    """The rows of one run."""
    config, _ = checkpoints.read_config(folder)
    config = dataclasses.replace(
        config,
        row_length=command.row_length or config.row_length,
        batch=command.batch or config.batch,
        accumulate=1,
        threshold_fraction=0.0,  # the thresholds that the model was trained to
    )
    tokenizer = load_tokenizer(folder, vocab_size=config.model.vocab_size)
    tokens = data.load_corpus(config.data).tokenized(tokenizer)
    rows, _ = data.split(tokens, row_length=config.row_length)
    batches = data.Batches(rows, batch=config.batch, seed=config.seed)
    batch = jnp.asarray(next(batches))
    model = load_run(folder)
    steps = {name: _Step(model, config, name) for name in command.attention}
    for each in tqdm(steps.values(), desc=f"{folder.name}: compiling", file=sys.stderr):
        each(batch)
    for _ in tqdm(range(command.rounds), desc=f"{folder.name}: steps", file=sys.stderr):
        batch = jnp.asarray(next(batches))
        for each in steps.values():
            each.seconds.append(each(batch))
    seconds = {name: statistics.median(each.seconds) for name, each in steps.items()}
    dense = seconds.get("dense", float("nan"))
    return [
        {
            "run": folder.name,
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
    """Train steps by one implementation, each from where the last one led."""

    def __init__(self, model: Any, config: TrainConfig, attention: Method):
        options = dataclasses.replace(config.model, attention=attention)
        config = dataclasses.replace(config, model=options)
        graphdef, fresh = step.init_state(config)
        params, rest = nnx.state(model, nnx.Param, ...)
        # Copies: a step consumes the state it is given.
        params, rest = jax.tree.map(jnp.copy, (params, rest))
        self._state: TrainState = dataclasses.replace(fresh, params=params, rest=rest)
        self._step = step.make_train_step(graphdef, config)
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


if __name__ == "__main__":
    sys.exit(main())
