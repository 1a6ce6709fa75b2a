"""`python -m train.demo`: train the tiny preset, then generate with dense and with hsr.

The whole takes about four minutes on two cores, set-up not counted. It generates 256
bytes greedily from one checkpoint with both implementations of attention, compares them
byte by byte, and leaves the pictures loss.png, sparsity.png and fires.png in the run
folder. It can be interrupted and started again; when the training is done already, only
the rest is repeated.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from models.command import JsonOption, carry_out, did_you_mean
from models.compilation import keep_programs
from models.decoding.generation import Generation, generate
from models.files.runs import load_run
from models.network.transformer import Transformer
from train import data, plots
from train.config import PRESETS, TrainConfig
from train.files.folder import check_folder
from train.loop import train

PROMPT, NEW_TOKENS, PICTURED, TEMPERATURE = 64, 256, 192, 0.7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(JsonOption):
    """Trains a small ReLU-attention model, then generates with dense and with hsr.

    For example:

        python -m train.demo --out runs/demo
    """

    out: Path = Path("runs/demo")
    """Folder of the run and the pictures."""
    preset: str = "tiny"
    """Which preset to train: micro, tiny, study, base or small."""
    steps: int | None = None
    """Optimizer steps instead of the preset's."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo.

    Args:
        arguments: instead of those of the process.

    Returns:
        Exit status: 0 done, 1 dense and hsr differ, 2 refused, 130 Ctrl-C.
    """
    keep_programs()
    return carry_out(
        Command,
        arguments,
        work,
        prog="python -m train.demo",
        stopped="stopped: run the demo again to go on",
    )


def work(command: Command) -> int:
    """Runs the demo and prints; the exit status says whether the tokens are equal."""
    results = run(command, Console(highlight=False))
    command.print_json(results)
    if results["tokens_equal"]:
        return 0
    print("error: dense and hsr generated different tokens", file=sys.stderr)
    return 1


def run(command: Command, console: Console) -> dict[str, Any]:
    """Trains, generates twice, draws.

    Args:
        command: the options.
        console: where to print.

    Returns:
        The results of `train.loop.train`, and tokens_equal, keys_looked_at, text.
    """
    config = demo_config(command)
    again = check_folder(command.out, resume=command.out.exists())
    console.print(
        f"continuing the run in {command.out}; delete that folder to start afresh"
        if again
        else f"training a byte-level language model with thresholded-ReLU attention on "
        f"the source of Python's standard library: {config.steps} steps"
    )
    results = train(config, command.out, resume=again)
    model = load_run(command.out)
    corpus = data.load_corpus(config.data)
    _, held_out = data.split(corpus, row_length=config.row_length)
    row = data.spread(held_out, limit=config.eval_rows)[0]
    console.print(f"generating {NEW_TOKENS} bytes with dense and with hsr attention")
    prompt = row[:PROMPT].tolist()
    dense, hsr = (_generate(model, prompt, name) for name in ("dense", "hsr"))
    # Greedily, a model as young as this one repeats itself: drawn text shows more.
    drawn = _generate(model, prompt, "hsr", temperature=TEMPERATURE)
    equal = dense.tokens == hsr.tokens
    plots.plot_loss(command.out, command.out / "loss.png")
    plots.plot_sparsity(command.out, command.out / "sparsity.png")
    tokens = jnp.asarray(row[:PICTURED], jnp.int32)
    plots.plot_fires(plots.fired_keys(model, tokens), command.out / "fires.png")
    text = bytes(drawn.tokens[0]).decode("utf-8", errors="replace")
    console.rule(f"prompt, then what the model wrote at temperature {TEMPERATURE}")
    console.print(bytes(prompt).decode("utf-8", errors="replace"), end="", markup=False)
    console.print(text, style="green", markup=False)
    console.print(_table(results, dense, hsr))
    console.print(f"pictures: loss.png, sparsity.png, fires.png in {command.out}")
    return results | {
        "tokens_equal": equal,
        "keys_looked_at": {
            "dense": dense.decode.keys_looked_at,
            "hsr": hsr.decode.keys_looked_at,
        },
        "text": text,
    }


def demo_config(command: Command) -> TrainConfig:
    """The preset, shortened if asked."""
    if command.preset not in PRESETS:
        raise ValueError(
            f"there is no preset {command.preset!r}: "
            f"{did_you_mean(command.preset, PRESETS)}choose one of {', '.join(PRESETS)}"
        )
    preset = PRESETS[command.preset]
    return preset if command.steps is None else _shortened(preset, command.steps)


def _shortened(preset: TrainConfig, steps: int) -> TrainConfig:
    """Fewer steps, evaluated as often in all."""
    every = max(1, steps // 4)
    return dataclasses.replace(
        preset, steps=steps, eval_every=every, checkpoint_every=every
    )


def _generate(
    model: Transformer, prompt: list[int], attention: Any, *, temperature: float = 0.0
) -> Generation:
    """256 bytes after the prompt, greedy unless a temperature is given."""
    return generate(
        model,
        [prompt],
        max_tokens=NEW_TOKENS,
        temperature=temperature,
        attention=attention,
    )


def _table(results: dict[str, Any], dense: Generation, hsr: Generation) -> Table:
    """The results side by side."""
    table = Table(title="one checkpoint, two implementations of attention")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("hsr", justify="right")
    loss = f"{results['validation_loss']:.3f}"
    fired = f"{100 * results['nonzero_fraction']:.1f} %"
    table.add_row("validation loss, nats/byte", loss, loss)
    table.add_row("non-zero scores, held-out text", fired, fired)
    runs = (dense, hsr)
    table.add_row(
        "keys looked at, decoding", *(_percent(x.decode.keys_looked_at) for x in runs)
    )
    table.add_row(
        "keys that fired, decoding", *(_percent(x.decode.keys_fired) for x in runs)
    )
    table.add_row(
        "decoding, tokens/s",
        *(f"{x.decode.tokens_per_second or 0:,.0f}" for x in runs),
    )
    same = np.mean(np.equal(dense.tokens, hsr.tokens))
    verdict = "yes, all" if same == 1 else f"NO, {100 * same:.0f} %"
    table.add_row(f"{NEW_TOKENS} greedy tokens equal?", "", verdict)
    return table


def _percent(share: float | None) -> str:
    """A share as text."""
    return "-" if share is None else f"{100 * share:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
