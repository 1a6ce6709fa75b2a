"""`make gpu-check`: compiles every kernel for GPUs that need not be there.

Prints registers, spills and shared memory of each and writes them to a folder. Exit
status 1 where something spills, is not compiled, or is not as its case wants it.
"""

import argparse
import csv
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
from concurrent import futures
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from tests.gpu import compiled
from tests.gpu.cases import CASES

OUT = Path("runs/gpu-check")
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")


def main(words: list[str] | None = None) -> int:
    cards = sorted(file.stem for file in compiled.CARDS.glob("*.textproto"))
    parser = argparse.ArgumentParser(
        prog="make gpu-check ARGS=",
        description=__doc__,
        epilog='For example: make gpu-check ARGS="--cards h100 --only append"',
    )
    parser.add_argument("--cards", nargs="+", choices=cards, default=cards)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder ({OUT})")
    options = parser.parse_args(words)
    chosen = [case for case in CASES if options.only in case.name]
    if not chosen:
        parser.error(f"no case has {options.only!r} in its name")
    rows, faults, start = [], [], time.time()
    print(f"{'case':<34}{'card':<6}{'kernel':<16}registers spilled shared launches")
    jobs = [(case.name, card) for card in options.cards for case in chosen]
    spawned = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(os.cpu_count(), spawned) as pool:
        for job, (found, wrong) in zip(
            jobs, pool.map(compiled.check, jobs), strict=True
        ):
            show(found)
            rows += found
            faults += [f"{', '.join(job)}: {fault}" for fault in wrong]
    write(options.out, rows)
    print(f"{len(rows)} kernels in {time.time() - start:.0f} s: {options.out}")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults or not rows else 0


def show(rows) -> None:
    for row in rows:
        print(
            f"{row['case']:<34}{row['card']:<6}{row['kernel']:<16}"
            f"{row['registers']:>9}{row['spilled_bytes']:>8}{row['shared_bytes']:>7}"
            f"{row['launches']:>9}",
            flush=True,
        )


def write(folder: Path, rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file, list(rows[0]) if rows else [], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    command = 'make gpu-check ARGS="--out benchmarks/results/compile"'
    about = {"command": command, **versions}
    (folder / "environment.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
