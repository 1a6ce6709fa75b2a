"""`python -m train study STAGE ... --out DIR`: the recipe study, run by run.

A stage is a list of training runs that differ in named options; every run is one
`python -m train` in a process of its own, resumed if it was cut off and skipped if it
is done. The table, the data behind it and the figure are written anew after each run,
so that a study can be stopped and continued at any time.
"""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import fnmatch
import json
import os
import queue
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from models.command import did_you_mean
from models.files.atomic import write_atomic
from train.commands.recipes import STAGES, Run
from train.plots import plot_study

_FILES = ("study.json", "config.json")
_TEXTS = frozenset({"stage", "name", "kind", "commit", "command"})
_COUNTS = frozenset(
    {"power", "head_dim", "row_length", "seed", "steps", "parameters", "cores"}
)


@dataclasses.dataclass(frozen=True)
class Command:
    """Trains the runs of a recipe study and tabulates them.

    For example:

        python -m train study kinds --workers 2
    """

    stages: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(
            metavar="[STAGE ...]",
            help=f"Stages to run, in this order, of {', '.join(STAGES)}; none: only "
            "tabulate what is there.",
        ),
    ] = ()
    out: Path = Path("runs/study")
    """Folder of the run folders."""
    results: Path = Path("runs/study/results")
    """Folder of the table and the figure."""
    only: tuple[str, ...] = ()
    """Names of the runs of these stages to train, as patterns; none: all."""
    workers: int = 1
    """Runs at a time; the cores are divided among them."""


def work(command: Command) -> int:
    """Trains and tabulates.

    Returns:
        Exit status: 1 where a run failed.
    """
    try:
        failed = study(chosen(command.stages, only=command.only), command)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped: the same command goes on") from None
    for name, words in failed.items():
        print(f"error: {name}: {words}", file=sys.stderr)
    return 1 if failed else 0


def chosen(stages: Iterable[str], *, only: tuple[str, ...] = ()) -> list[Run]:
    """The runs of stages that match a pattern, each once, in the patterns' order.

    Raises:
        ValueError: there is no such stage, or a pattern matches nothing.
    """
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        raise ValueError(
            f"there is no stage {', '.join(unknown)}: "
            f"{did_you_mean(unknown[0], STAGES)}choose from {', '.join(STAGES)}"
        )
    runs = {run.name: run for stage in stages for run in STAGES[stage]}
    found: dict[str, Run] = {}
    for pattern in only or ("*",):
        matching = fnmatch.filter(runs, pattern)
        if stages and not matching:
            raise ValueError(f"no run matches {pattern}: there are {', '.join(runs)}")
        found |= {name: runs[name] for name in matching}
    return list(found.values())


def study(runs: list[Run], command: Command) -> dict[str, str]:
    """Trains what is not there yet and tabulates; returns what failed, in words."""
    if command.workers < 1:
        raise ValueError(f"workers must be 1 or more, got {command.workers}")
    command.out.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    shares: queue.Queue[list[int]] = queue.Queue()
    for worker in range(command.workers):
        shares.put(cores[worker :: command.workers] or cores)
    failed: dict[str, str] = {}

    def train(run: Run) -> None:
        share = shares.get()
        try:
            if (words := _train(run, command.out, share)) is not None:
                failed[run.name] = words
        finally:
            shares.put(share)

    with (
        concurrent.futures.ThreadPoolExecutor(command.workers) as pool,
        tqdm(total=len(runs), unit="run", file=sys.stderr) as bar,
    ):
        waiting = [pool.submit(train, run) for run in runs]
        for done in concurrent.futures.as_completed(waiting):
            done.result()
            bar.update()
            tabulate(command.out, command.results)
    tabulate(command.out, command.results)
    return failed


def _train(run: Run, out: Path, cores: list[int]) -> str | None:
    """One run in a process of its own; what went wrong, or None."""
    folder, about = out / run.name, out / run.name / _FILES[0]
    if about.exists():
        return None
    words = ["python", "-m", "train", *run.words, "--out", str(folder)]
    resumed = ["--resume"] if (folder / "config.json").exists() else []
    with (out / f"{run.name}.log").open("ab") as log:
        started = subprocess.Popen(
            [sys.executable, *words[1:], *resumed, "--json"],
            stdout=subprocess.PIPE,
            stderr=log,
        )
        os.sched_setaffinity(started.pid, cores)
        printed, _ = started.communicate()
    if started.returncode:
        return f"status {started.returncode}, see {out / f'{run.name}.log'}"
    results = json.loads(printed.splitlines()[-1])
    content = {
        "name": run.name,
        "stage": run.stage,
        "command": shlex.join(words),
        "commit": _commit(),
        "cores": len(cores),
        "results": results,
    }
    write_atomic(about, json.dumps(content, indent=2) + "\n")
    return None


def _commit() -> str:
    """The commit of the checkout, with a plus where files differ from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=10", "--dirty=+"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def tabulate(out: Path, results: Path) -> list[dict[str, Any]]:
    """Writes results.csv and study.png; returns the rows.

    Rows of runs that are in the table but not in `out` stay: they were made elsewhere.
    """
    rows = _tabulated(results / "results.csv")
    for about in out.glob(f"*/{_FILES[0]}"):
        done, config = (
            json.loads((about.parent / name).read_text()) for name in _FILES
        )
        rows[done["name"]] = summarize(done, config)
    if not rows:
        return []
    results.mkdir(parents=True, exist_ok=True)
    table = sorted(rows.values(), key=lambda row: (row["stage"], row["name"]))
    columns = list(table[0])
    lines = [",".join(columns)]
    lines += [",".join(_cell(row[name]) for name in columns) for row in table]
    write_atomic(results / "results.csv", "\n".join(lines) + "\n")
    plot_study(table, results / "study.png")
    return table


def _tabulated(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a table that is there already, by name, as `summarize` has them.

    Raises:
        ValueError: it is not such a table.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="") as file:
            rows = [
                {name: _value(name, cell) for name, cell in row.items()}
                for row in csv.DictReader(file, strict=True)
            ]
        return {str(row["name"]): row for row in rows}
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{path} is not a study's table ({error}): choose another --results"
        ) from None


def _value(column: str, cell: str) -> str | int | float:
    """A cell as a value: text, a whole number, or a number."""
    if column in _TEXTS:
        return cell
    return int(cell) if column in _COUNTS else float(cell or "nan")


def summarize(done: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A finished run as a line of the table.

    Args:
        done: content of its study.json.
        config: content of its config.json.
    """
    model, options, found = config["model"], config["train"], done["results"]
    return {
        "stage": done["stage"],
        "name": done["name"],
        "kind": model["attention_kind"],
        "power": model["relu_power"],
        "head_dim": model["head_dim"],
        "row_length": options["row_length"],
        "learning_rate": options["learning_rate"],
        "seed": options["seed"],
        "steps": options["steps"],
        "validation_loss": found["validation_loss"],
        "zeros_percent": 100.0 * (1.0 - found["nonzero_fraction"]),
        "empty_rows_percent": 100.0 * found.get("empty_rows", float("nan")),
        "effective_keys": found.get("effective_keys", float("nan")),
        "dead_heads": found.get("dead_heads", float("nan")),
        "parameters": found["parameters"],
        "tokens_per_second": found["tokens_per_second"],
        "cores": done["cores"],
        "commit": done["commit"],
        # Where the run was put says nothing of what it was.
        "command": done["command"].split(" --out ")[0],
    }


def _cell(value: Any) -> str:
    """A value as a cell of a CSV file."""
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    text = "" if text == "nan" else text
    return f'"{text}"' if "," in text or " " in text else text
