"""`python -m train report RUN [RUN ...]`: runs side by side in one HTML file.

The file holds its pictures and needs nothing else: results, options that differ,
curves, and for every run what each of its heads did at the last evaluation.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models.files.atomic import write_atomic
from train import telemetry
from train.commands import OfRuns
from train.commands.compare import collect
from train.files.metrics import read_heads
from train.plots import draw_comparison, draw_heads

_TITLES = {
    "nonzero_fraction": ("Non-zero scores, %", 100.0),
    "empty_rows": ("Queries without a key, %", 100.0),
    "effective_keys": ("Effective number of keys", 1.0),
    "survivors": ("Keys a decode step looks at, %", 100.0),
    "capacity_use": ("Slots of one gather in use, %", 100.0),
    "threshold_scale": ("Threshold scale", 1.0),
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem;
       padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid #ccc; padding: .3rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } code { overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True)
class Command(OfRuns):
    """Compares finished or running runs of `python -m train` in one HTML file.

    For example:

        python -m train report runs/mine runs/other --out report.html
    """

    out: Path = Path("report.html")
    """File to write."""


def work(command: Command) -> None:
    """Writes the file and says so."""
    results = report(command.runs, command.out)
    print(f"{len(results)} runs: {command.out}")
    command.print_json(results)


def report(runs: tuple[Path, ...], out: Path) -> dict[str, Any]:
    """Writes the file.

    Args:
        runs: run folders; the names of the folders name the runs.
        out: HTML file to write.

    Returns:
        Results by name of run, as `train.commands.compare` has them.

    Raises:
        ValueError: as `collect`.
    """
    results, curves = collect(runs)
    parts = [
        "<h1>hsrjax training report</h1>",
        _table(_results_table(results, curves)),
        "<h2>Options that differ</h2>",
        _table(_differences(results)),
        "<h2>Curves</h2>",
        _picture(draw_comparison(curves), "loss and sparsity over the steps"),
    ]
    for run in runs:
        parts += [f"<h2>{html.escape(run.name)}</h2>", *_heads(run)]
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>hsrjax training report</title><style>{_STYLE}</style>\n"
        + "\n".join(parts)
        + "</html>\n"
    )
    write_atomic(out, text)
    return results


def _results_table(
    results: dict[str, Any], curves: dict[str, list[dict[str, float]]]
) -> list[list[str]]:
    """Header and a line per run."""
    lines = [
        ["run", "steps", "validation loss, nats/byte", "zeros, %", "tokens/s"],
    ]
    for name, result in results.items():
        speeds = [line["tokens_per_second"] for line in curves[name]]
        lines.append(
            [
                name,
                f"{result['steps']:,}",
                f"{result['validation_loss']:.4f}",
                f"{100 * (1 - result['nonzero_fraction']):.2f}",
                f"{speeds[-1]:,.0f}",
            ]
        )
    return lines


def _differences(results: dict[str, Any]) -> list[list[str]]:
    """Header and a line per option that is not the same in all runs."""
    flat = {
        name: {
            f"{part}.{option}": value
            for part, options in result["config"].items()
            for option, value in options.items()
        }
        for name, result in results.items()
    }
    options = list(dict.fromkeys(key for config in flat.values() for key in config))
    lines = [["option", *flat]]
    for option in options:
        values = [str(config.get(option, "")) for config in flat.values()]
        if len(set(values)) > 1:
            lines.append([option, *values])
    return lines


def _heads(run: Path) -> list[str]:
    """Heat maps of a run's last evaluation, and what is wrong with its heads."""
    step, found = read_heads(run)
    if not step:
        return ["<p>Not evaluated yet.</p>"]
    parts, pictures = [f"<p>Step {step:,}, held-out text.</p>"], {}
    for name, (title, factor) in _TITLES.items():
        if np.isfinite(found[name]).any():
            pictures[title] = factor * found[name]
    if np.isfinite(found["empty_rows"]).any():
        dead = telemetry.dead_heads(found["empty_rows"])
        parts.append(f"<p>Dead heads (99 % of rows empty): {dead}.</p>")
    return [*parts, _picture(draw_heads(pictures), f"heads of {run.name}")]


def _table(lines: list[list[str]]) -> str:
    """Rows of text as an HTML table; the first one is the header."""
    if len(lines) == 1:
        return "<p>None.</p>"
    rows = []
    for number, line in enumerate(lines):
        tag = "td" if number else "th"
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
        rows.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _picture(figure: Figure, about: str) -> str:
    """A figure as part of the page."""
    written = io.BytesIO()
    FigureCanvasAgg(figure).print_png(written)
    data = base64.b64encode(written.getvalue()).decode()
    return f'<img alt="{html.escape(about)}" src="data:image/png;base64,{data}">'
