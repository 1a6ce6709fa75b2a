"""A folder of results: CSV, summary, pictures, and what it ran on."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclasses.dataclass
class Results:
    """What a benchmark found.

    Attributes:
      rows: lines of results.csv.
      summary: the numbers that people quote; JSON values.
      figures: pictures by file name.
      wrong: results that differ from what they should be, in words.
      texts: further files by name.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    figures: dict[str, Figure] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder whose files move to `folder` at the end: each whole, or none of them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as stage:
        yield Path(stage)
        for file in sorted(Path(stage).iterdir()):
            os.replace(file, folder / file.name)


def write(folder: Path, results: Results, about: dict[str, Any]) -> None:
    """Writes a folder of results; other files in it are left alone.

    Args:
      folder: made where it is missing.
      results: what was found.
      about: what it ran on.
    """
    with staged(folder) as stage:
        texts = results.texts | {
            "results.csv": as_csv(results.rows),
            "summary.json": as_json(results.summary),
            "environment.json": as_json(about),
        }
        for name, text in texts.items():
            (stage / name).write_text(text, newline="")
        for name, figure in results.figures.items():
            FigureCanvasAgg(figure)
            figure.savefig(stage / name, dpi=110, format="png")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The summary of a folder, and the lines of its CSV files by their stems.

    Raises:
      OSError: there is none.
    """
    summary = json.loads((folder / "summary.json").read_text())
    tables = {}
    for file in sorted(folder.glob("*.csv")):
        with file.open(newline="") as lines:
            tables[file.stem] = [
                {name: _value(cell) for name, cell in line.items()}
                for line in csv.DictReader(lines)
            ]
    return summary, tables


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV; columns are those of all rows, in the order they first appear."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _cell(v) for k, v in row.items()} for row in rows)
    return text.getvalue()


def as_json(value: Any) -> str:
    """JSON for people, with a null for numbers that are not finite."""
    return json.dumps(clean(value), indent=2) + "\n"


def clean(value: Any) -> Any:
    """The same with JSON values alone: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, (np.integer, np.floating)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cell(value: Any) -> Any:
    """Floats with five digits; nothing at all for None."""
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else value


def _value(cell: str) -> Any:
    """What `_cell` was given, floats to five digits."""
    known = {"": None, "True": True, "False": False}
    for kind in (known.__getitem__, int, float):
        with contextlib.suppress(KeyError, ValueError):
            return kind(cell)
    return cell
