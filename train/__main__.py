"""`python -m train`: read the options, train, print the results.

What else there is, each a module of `train.commands`:

    python -m train report RUN ...          shows runs side by side in one HTML file
    python -m train compare RUN ...         keeps their curves and numbers as files
    python -m train export RUN --out DIR    writes a trained model to hand on
    python -m train length RUN ...          measures models on longer rows
    python -m train speed RUN ...           measures the time of their steps
    python -m train study STAGE ...         repeats the recipe study
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro

from models.command import (
    JsonOption,
    at_home,
    carry_out,
    did_you_mean,
    early_value,
    exit_status,
    parse,
)
from models.compilation import keep_programs
from train import processes
from train.commands import compare, export, length, report, speed, study
from train.config import PRESETS, TrainConfig
from train.files.folder import check_folder, read_config
from train.loop import train

_COMMANDS = {
    "report": report,
    "compare": compare,
    "export": export,
    "length": length,
    "speed": speed,
    "study": study,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(JsonOption):
    """Trains a ReLU-attention language model on text.

    Other commands, each with its own help: python -m train report | compare |
    export | length | speed | study.

    For example:

        python -m train --preset tiny --out runs/mine --attention-kind softmax
    """

    out: Path
    """Folder of the run: config, checkpoints, metrics."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, with its own options."""
    distributed: bool = False
    """Be one of several processes, on one machine or many, that train together; with
    --data-parallel. All of them run the same command and see the same folder."""
    coordinator: str = ""
    """With --distributed: host:port of the first process; empty: jax finds out."""
    num_processes: int | None = None
    """With --distributed: how many there are."""
    process_index: int | None = None
    """With --distributed: which of them this is, from 0."""
    train: TrainConfig


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: instead of those of the process.

    Returns:
        Exit status: 0 done, 1 failed, 2 refused or diverged, 130 stopped by Ctrl-C.
    """
    keep_programs()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and (command := _COMMANDS.get(words[0])):
        prog = f"python -m train {words[0]}"
        return carry_out(command.Command, words[1:], command.work, prog=prog)
    return exit_status(
        lambda: work(_parse(_options(words))),
        stopped="stopped before the first step: nothing was saved",
    )


def work(command: Command) -> None:
    """Trains and prints the results."""
    if command.distributed:
        processes.join(
            command.coordinator,
            number=command.num_processes,
            index=command.process_index,
        )
    results = train(command.train, command.out, resume=command.resume)
    if not processes.is_leader():
        return
    command.print_json(results)
    if not command.json:
        print(
            f"{results['steps']} steps in {results['seconds']:.0f} s, validation loss "
            f"{results['validation_loss']:.3f} nats/byte, non-zero scores "
            f"{100 * results['nonzero_fraction']:.1f} %, saved in {results['out']}"
        )


def _options(words: list[str]) -> list[str]:
    """The words, unless the first is a command that there is not."""
    if words and not words[0].startswith("-"):
        raise ValueError(
            f"there is no command {words[0]!r}: {did_you_mean(words[0], _COMMANDS)}"
            f"choose one of {', '.join(_COMMANDS)}, or none to train"
        )
    return words


def _parse(arguments: list[str]) -> Command:
    """Reads the options; the preset, or the run to resume, supplies the defaults."""
    early = {name: early_value(arguments, f"--{name}") for name in ("preset", "out")}
    name = early["preset"] or "tiny"
    if name not in PRESETS:
        raise ValueError(
            f"there is no preset {name!r}: {did_you_mean(name, PRESETS)}choose one of "
            f"{', '.join(PRESETS)}"
        )
    defaults, out = PRESETS[name], at_home(early["out"] or "")
    if "--resume" in arguments and early["out"] and check_folder(out, resume=True):
        defaults, _ = read_config(out)
    default = Command(out=tyro.MISSING, train=defaults)
    return parse(Command, arguments, prog="python -m train", default=default)


if __name__ == "__main__":
    sys.exit(main())
