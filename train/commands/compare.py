"""`python -m train compare RUN [RUN ...] --out DIR`: several runs in one picture.

Writes curves.png, results.json (a line of results per run) and each run's metrics as
NAME.csv, so that a comparison can be kept and committed without the runs.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import jax

from models.files.atomic import write_atomic
from models.files.runs import read_run_config
from train.commands import OfRuns
from train.files.metrics import evaluated, read_metrics
from train.plots import plot_comparison


@dataclasses.dataclass(frozen=True)
class Command(OfRuns):
    """Compares finished runs of `python -m train`.

    For example:

        python -m train compare runs/mine runs/other
    """

    out: Path = Path("runs/comparison")
    """Folder that the results are written to."""


def work(command: Command) -> None:
    """Compares and prints."""
    results = compare(command.runs, command.out)
    for name, result in results.items():
        print(
            f"{name}: validation loss {result['validation_loss']:.3f} nats/byte, "
            f"{100 * result['nonzero_fraction']:.1f} % non-zero scores"
        )
    command.print_json(results)


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
        ValueError: two of one name, or a folder without the files of a run.
    """
    results, curves = {}, {}
    for run in runs:
        if run.name in results:
            raise ValueError(
                f"two runs are named {run.name}: rename one of the folders"
            )
        curves[run.name] = read_metrics(run)
        last = evaluated(curves[run.name])[-1]
        model, options = read_run_config(run)
        results[run.name] = {
            "steps": int(last["step"]),
            "validation_loss": last["validation_loss"],
            "nonzero_fraction": last["validation_nonzero_fraction"],
            "config": {"model": model.to_dict(), "train": options},
        }
    return results, curves
