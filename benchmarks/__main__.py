"""`python -m benchmarks decode`: measures, writes CSV, a plot and what it ran on."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, Literal

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import decode
from models.command import parse
from models.load import write_atomic

TIMES = {
    "hsr_ms": "half-space reporting, append included",
    "dense_ms": "dense ReLU, einsum",
    "jax_nn_softmax_ms": "jax.nn.dot_product_attention (softmax)",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """Times one decode step of ReLU attention over caches of growing length."""

    what: Literal["decode"] = "decode"
    """What to measure."""
    keys: tuple[int, ...] = (1024, 4096, 16384, 65536, 131072)
    """Lengths of the cache."""
    repeats: int = 15
    """Timed calls of each; the median counts."""
    out: Path = Path("benchmarks/results")
    """Folder that the results are written to."""
    json: bool = False
    """End with one line on stdout that holds the results as JSON."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: instead of those of the process.

    Returns:
      Exit status: 0 done, 1 a result differs from dense, 2 refused, 130 Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-"):
        words = ["--what", *words]
    try:
        command = parse(Command, words, prog="python -m benchmarks", default=Command())
        if not command.keys or min(command.keys) < 1 or command.repeats < 1:
            raise ValueError("keys and repeats must be 1 or more")
        rows = run(command)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130
    if command.json:
        print(json.dumps({"rows": rows}))
    wrong = [row["keys"] for row in rows if row["max_relative_error"] > 1e-5]
    if wrong:
        print(f"error: results differ from dense at {wrong} keys", file=sys.stderr)
    return 1 if wrong else 0


def run(command: Command) -> list[dict[str, Any]]:
    """Measures, prints and writes."""
    measured = decode.measure(command.keys, repeats=command.repeats)
    rows = []
    for row in tqdm(measured, total=len(command.keys), unit="length"):
        rows.append(row)
        tqdm.write(
            f"{row['keys']:>8,} keys: hsr {row['hsr_ms']:.2f} ms, dense "
            f"{row['dense_ms']:.2f} ms, ratio {row['dense_over_hsr']:.2f}"
        )
    folder = command.out / command.what
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    about = {
        "command": f"python -m benchmarks {command.what} --repeats {command.repeats}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
    }
    write_atomic(folder / "environment.json", json.dumps(about, indent=2) + "\n")
    plot(rows, folder / "times.png")
    return rows


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Draws time against length, both logarithmic."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lengths = [row["keys"] for row in rows]
    for name, label in TIMES.items():
        axes.plot(lengths, [row[name] for row in rows], "o-", label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="keys in the cache",
        ylabel="milliseconds per step",
        title="One decode step, 8 query / 4 key heads of 64, about 1 % firing",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(target, dpi=110)


def _processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
