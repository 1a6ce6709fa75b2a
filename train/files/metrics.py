"""Files of numbers that a run writes: metrics.csv, sparsity.csv, TensorBoard events.

metrics.csv has one line per logged step; the validation columns are filled where the
run was evaluated. sparsity.csv has one line per evaluation, layer and head: the share
of scores that are not zero on held-out text, and what else `train.telemetry` measures.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensorboardX import SummaryWriter

from train import telemetry
from train.files import tracking

COLUMNS = (
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "threshold_scale",
    "nonzero_fraction",
    "tokens_per_second",
    "validation_loss",
    "validation_nonzero_fraction",
)
SPARSITY_COLUMNS = ("step", "layer", "head", *telemetry.COLUMNS)


class Writer(Protocol):
    """What the loop writes to."""

    def write(self, row: dict[str, Any]) -> None:
        """Takes one logged step."""
        ...

    def write_heads(self, step: int, measured: dict[str, np.ndarray]) -> None:
        """Takes what was measured of every head, f[L, N] by name."""
        ...


class MetricsWriter:
    """Appends to the files of a run; what was written is on disk line by line."""

    def __init__(self, out: Path, *, step: int) -> None:
        """Opens the files and drops what they hold beyond `step`.

        Args:
            out: run folder.
            step: steps done, 0 for a new run.
        """
        self._metrics = _open(out / "metrics.csv", COLUMNS, step=step)
        self._sparsity = _open(out / "sparsity.csv", SPARSITY_COLUMNS, step=step)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        for file in (self._metrics, self._sparsity, self._board):
            # A disk that is full fails again here, and the first error says more.
            with contextlib.suppress(*(() if kind is None else (OSError,))):
                file.close()

    def write(self, row: dict[str, Any]) -> None:
        """Writes one line of metrics.csv; `row` maps some of COLUMNS to numbers."""
        step = row["step"]
        line = [_text(row[name]) if name in row else "" for name in COLUMNS]
        _write(self._metrics, [line])
        for name in COLUMNS[1:]:
            if name in row:
                self._board.add_scalar(name, row[name], step)

    def write_heads(self, step: int, measured: dict[str, np.ndarray]) -> None:
        """Writes numbers f[L, N] by name in `telemetry.COLUMNS`; NaN is left out."""
        lines = []
        for layer, head in np.ndindex(measured["nonzero_fraction"].shape):
            line = [str(step), str(layer), str(head)]
            for name in telemetry.COLUMNS:
                value = measured[name][layer, head] if name in measured else np.nan
                line.append("" if np.isnan(value) else _text(value))
                if not np.isnan(value):
                    board = f"{name}/layer_{layer}/head_{head}"
                    self._board.add_scalar(board, value, step)
            lines.append(line)
        _write(self._sparsity, lines)
        self._board.flush()


class _Writers:
    """Hands everything to several writers, or to none."""

    def __init__(self, *writers: Writer) -> None:
        """Any number of them."""
        self._writers = writers

    def write(self, row: dict[str, Any]) -> None:
        """Hands on one logged step."""
        for writer in self._writers:
            writer.write(row)

    def write_heads(self, step: int, measured: dict[str, np.ndarray]) -> None:
        """Hands on what was measured of every head."""
        for writer in self._writers:
            writer.write_heads(step, measured)


@contextlib.contextmanager
def open_writer(
    out: Path,
    *,
    step: int,
    writes: bool,
    track: str = tracking.NONE,
    options: dict[str, Any] | None = None,
) -> Iterator[Writer]:
    """A `MetricsWriter` and a tracker; in all processes but one, nothing is written.

    Args:
        out: run folder.
        step: steps done, 0 for a new run.
        writes: whether this process is the one.
        track: "none", "trackio" or "wandb".
        options: of the run, for the tracker.
    """
    with contextlib.ExitStack() as stack:
        writers: list[Writer] = []
        if writes:
            writers.append(stack.enter_context(MetricsWriter(out, step=step)))
        if writes and track != tracking.NONE:
            tracker = tracking.Tracker(track, out, options=options or {})
            writers.append(stack.enter_context(tracker))
        yield _Writers(*writers)


def read_csv(path: Path) -> list[dict[str, float]]:
    """Reads a CSV file of a run; empty cells are left out of their line."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: float(cell) for name, cell in line.items() if cell}
            for line in csv.DictReader(file)
        ]


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.csv, among them one with a held-out loss.

    Raises:
        ValueError: no metrics.csv, or the run was never evaluated.
    """
    if not (run / "metrics.csv").is_file():
        raise ValueError(
            f"{run} is not a run folder, it lacks metrics.csv: give one that "
            "python -m train wrote"
        )
    lines = read_csv(run / "metrics.csv")
    if not evaluated(lines):
        raise ValueError(f"{run} was never evaluated: train it further")
    return lines


def evaluated(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """Those lines of metrics.csv that hold a held-out loss."""
    return [line for line in lines if "validation_loss" in line]


def read_heads(run: Path) -> tuple[int, dict[str, np.ndarray]]:
    """What sparsity.csv says of every head at the last evaluation.

    Returns:
        The step, 0 before the first evaluation, and f64[L, N] by name in
        `telemetry.COLUMNS`, NaN where there is no number.
    """
    lines = read_csv(run / "sparsity.csv")
    if not lines:
        return 0, {}
    last = [line for line in lines if line["step"] == lines[-1]["step"]]
    places = [(int(line["layer"]), int(line["head"])) for line in last]
    found = {
        name: np.full(np.max(places, axis=0) + 1, np.nan) for name in telemetry.COLUMNS
    }
    for place, line in zip(places, last, strict=True):
        for name in telemetry.COLUMNS:
            found[name][place] = line.get(name, np.nan)
    return int(last[0]["step"]), found


def _text(value: Any) -> str:
    """A number with all the digits that float32 has."""
    return str(value) if isinstance(value, int) else f"{float(value):.9g}"


def _open(path: Path, columns: tuple[str, ...], *, step: int) -> io.TextIOWrapper:
    """Opens a CSV file for appending, after its whole lines up to `step`."""
    kept = [",".join(columns)]
    if path.exists() and step > 0:
        # A killed run may leave half a line at the end: it has no newline.
        whole = path.read_text(encoding="utf-8").split("\n")[1:-1]
        kept += [line for line in whole if int(line.split(",")[0]) <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("\n".join(kept) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path.open("a", encoding="utf-8", newline="")


def _write(file: io.TextIOWrapper, lines: list[list[str]]) -> None:
    """Appends lines in one write, so that a kill leaves whole lines behind."""
    file.write("".join(",".join(line) + "\n" for line in lines))
    file.flush()
