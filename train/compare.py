"""`python -m train.compare RUN [RUN ...] --out DIR`: several runs in one picture.

Writes curves.png, results.json (a line of results per run) and each run's metrics as
NAME.csv, so that a comparison can be kept and committed without the runs.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import tyro

from models.command import carry_out
from models.files.atomic import write_atomic
from train.metrics import read_csv
from train.plots import plot_comparison


@dataclasses.dataclass(frozen=True)
class Command:
    """Compares finished runs of `python -m train`."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders."""
    out: Path = Path("runs/comparison")
    """Folder that the results are written to."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: instead of those of the process.

    Returns:
        Exit status: 0 done, 2 refused, 130 Ctrl-C.
    """

    def work(command: Command) -> None:
        for name, result in compare(command.runs, command.out).items():
            print(
                f"{name}: validation loss {result['validation_loss']:.3f} nats/byte, "
                f"{100 * result['nonzero_fraction']:.1f} % non-zero scores"
            )

    return carry_out(Command, arguments, work, prog="python -m train.compare")


def compare(runs: tuple[Path, ...], out: Path) -> dict[str, Any]:
    """Collects the metrics of runs and draws them together.

    Args:
        runs: run folders; the names of the folders name the runs.
        out: folder to write to.

    Returns:
        Results by name of run.

    Raises:
        ValueError: as `collect`.
    """
    results, curves = collect(runs)
    out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        shutil.copyfile(run / "metrics.csv", out / f"{run.name}.csv")
    about = {"jax": jax.__version__, "python": platform.python_version()}
    text = json.dumps({"versions": about, "runs": results}, indent=2)
    write_atomic(out / "results.json", text + "\n")
    plot_comparison(curves, out / "curves.png")
    return results


def collect(
    runs: tuple[Path, ...],
) -> tuple[dict[str, Any], dict[str, list[dict[str, float]]]]:
    """What runs led to, and the lines of their metrics.csv, by name of run.

    Raises:
        ValueError: no run, two of one name, or a folder without the files of a run.
    """
    if not runs:
        raise ValueError("no run was named: pass the folders of one or more runs")
    results, curves = {}, {}
    for run in runs:
        if run.name in results:
            raise ValueError(
                f"two runs are named {run.name}: rename one of the folders"
            )
        if not (run / "metrics.csv").is_file() or not (run / "config.json").is_file():
            raise ValueError(f"{run} is not a run folder: it lacks metrics.csv")
        curves[run.name] = read_csv(run / "metrics.csv")
        evaluated = [line for line in curves[run.name] if "validation_loss" in line]
        if not evaluated:
            raise ValueError(f"{run} was never evaluated: train it further")
        config = json.loads((run / "config.json").read_text())
        results[run.name] = {
            "steps": int(evaluated[-1]["step"]),
            "validation_loss": evaluated[-1]["validation_loss"],
            "nonzero_fraction": evaluated[-1]["validation_nonzero_fraction"],
            "config": {key: config[key] for key in ("model", "train")},
        }
    return results, curves


if __name__ == "__main__":
    sys.exit(main())
