"""`python -m train length RUN ...`: loss and sparsity on rows longer than in training.

The same held-out text is cut in rows of 1, 2, 4, ... times the training length. What
matters is the loss at the positions that training never saw: the last half of each row.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

from models.files.atomic import write_atomic
from models.files.runs import load_run
from models.network.transformer import Transformer
from train import data
from train.commands import OfRuns
from train.files.folder import read_text
from train.plots import save


@dataclasses.dataclass(frozen=True)
class Command(OfRuns):
    """Measures trained models on rows longer than they were trained on.

    For example:

        python -m train length runs/mine --factors 1 4
    """

    factors: tuple[int, ...] = (1, 2, 4, 8)
    """Row lengths, as multiples of the training length."""
    tokens: int = 131_072
    """Held-out tokens to read at each length, at most."""
    out: Path = Path("runs/length")
    """Folder of length.json, length.csv and length.png."""


def work(command: Command) -> None:
    """Measures, writes and prints."""
    rows = measure_runs(command)
    for row in rows:
        print(
            f"{row['run']}: rows of {row['row_length']:,}: {row['loss']:.4f} "
            f"nats/byte, last half {row['loss_last_half']:.4f}, "
            f"{100 * (1 - row['nonzero_fraction']):.2f} % zeros"
        )
    command.print_json(rows)


def measure_runs(command: Command) -> list[dict[str, Any]]:
    """Measures and writes; a row for every run and length.

    Raises:
        ValueError: a run that cannot be loaded, or too little held-out text.
    """
    if min(command.factors, default=0) < 1:
        raise ValueError(f"factors must be 1 or more, got {command.factors}")
    rows = []
    for run in command.runs:
        config, corpus, tokenizer = read_text(run)
        model, length = load_run(run), config.row_length
        stretches = data.held_out(corpus, row_length=length)
        for factor in tqdm(command.factors, desc=run.name, file=sys.stderr):
            cut = rows_of(stretches, factor * length, limit=command.tokens)
            measured = measure(model, cut, token_bytes=tokenizer.token_bytes)
            about = {"run": run.name, "factor": factor}
            about |= {"row_length": factor * length, "rows": len(cut)}
            rows.append(about | {"kind": model.config.attention_kind} | measured)
    command.out.mkdir(parents=True, exist_ok=True)
    lines = [",".join(rows[0])]
    lines += [",".join(_cell(value) for value in row.values()) for row in rows]
    write_atomic(command.out / "length.csv", "\n".join(lines) + "\n")
    write_atomic(command.out / "length.json", json.dumps(rows, indent=2) + "\n")
    save(_draw(rows), command.out / "length.png")
    return rows


def rows_of(stretches: list[np.ndarray], length: int, *, limit: int) -> np.ndarray:
    """Rows u[n, length + 1] of held-out stretches, at most `limit` tokens.

    Raises:
        ValueError: no stretch is that long.
    """
    width = length + 1
    cut = [
        stretch[: stretch.size // width * width].reshape(-1, width)
        for stretch in stretches
    ]
    rows = np.concatenate(cut)
    if not len(rows):
        longest = max(stretch.size for stretch in stretches)
        raise ValueError(
            f"the longest stretch of held-out text has {longest:,} tokens, fewer than "
            f"rows of {length:,}: give smaller --factors or train on more text"
        )
    number = max(1, min(len(rows), limit // length))
    return rows[np.arange(number) * len(rows) // number]


def measure(
    model: Transformer, rows: np.ndarray, *, token_bytes: np.ndarray
) -> dict[str, float]:
    """Loss in nats per byte, over rows and over their last halves, and sparsity.

    Args:
        model: any transformer.
        rows: u[n, T+1].
        token_bytes: i32[V], bytes of each token.
    """
    graphdef, state = nnx.split(model)

    @jax.jit
    def of_row(state: Any, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs, targets = row[None, :-1], row[None, 1:]
        logits, infos = nnx.merge(graphdef, state)(inputs, return_info=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        fired = jnp.stack([info.count.astype(jnp.float32).mean() for info in infos])
        return losses[0], fired.mean()

    found = [of_row(state, jnp.asarray(row, jnp.int32)) for row in rows]
    losses = np.stack([np.asarray(loss, np.float64) for loss, _ in found])  # [n, T]
    counts = token_bytes[rows[:, 1:]]
    length = losses.shape[1]
    half = slice(length // 2, None)
    fired = np.mean([float(fired) for _, fired in found])
    return {
        "loss": float(losses.sum() / counts.sum()),
        "loss_last_half": float(losses[:, half].sum() / counts[:, half].sum()),
        "nonzero_fraction": float(fired / ((length + 1) / 2)),
    }


def _draw(rows: list[dict[str, Any]]) -> Figure:
    """Loss at unseen positions, and keys that fire, against the length."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row["run"] for row in rows):
        chosen = [row for row in rows if row["run"] == name]
        factors = [row["factor"] for row in chosen]
        left.plot(factors, [row["loss_last_half"] for row in chosen], "o-", label=name)
        percent = [100 * row["nonzero_fraction"] for row in chosen]
        right.plot(factors, percent, "o-", label=name)
    left.set(ylabel="nats per byte", title="Loss at the last half of the positions")
    right.set(ylabel="%", yscale="log", title="Non-zero scores")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("row length / training length")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    return figure


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
