"""Writes what a benchmark found: CSV, summary, pictures, and what it ran on."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import os
import platform
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import hsrjax
from benchmarks.common import Results
from benchmarks.peers import PEERS, versions
from benchmarks.range_peers import PEERS as RANGE_PEERS

OURS = {"hsr": "tab:red", "auto": "tab:purple", "dense": "black"}
"""Colours of what every picture shows; peers get what is left."""
_OTHERS = ("tab:blue", "tab:orange", "tab:green", "tab:brown", "tab:pink", "tab:gray")
_OTHERS += ("tab:olive", "tab:cyan", "navy", "teal", "gold", "darkorange")


def write(folder: Path, results: Results, *, words: Sequence[str], quick: bool) -> None:
    """Writes a benchmark's folder: each file whole, or none of them.

    Args:
      folder: made where it is missing; other files in it are left alone.
      results: what was found.
      words: the command line.
      quick: whether the sizes were the small ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=folder, prefix=".new-"))
    try:
        (stage / "results.csv").write_text(as_csv(results.rows), newline="")
        (stage / "summary.json").write_text(_json(results.summary))
        about = environment(words) | {"quick": quick}
        (stage / "environment.json").write_text(_json(about))
        for name, text in results.texts.items():
            (stage / name).write_text(text, newline="")
        for name, figure in results.figures.items():
            FigureCanvasAgg(figure)
            figure.savefig(stage / name, dpi=110, format="png")
        for file in sorted(stage.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV; columns are those of all rows, in the order they first appear."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _short(v) for k, v in row.items()} for row in rows)
    return text.getvalue()


def _short(value: Any) -> Any:
    """Floats with five digits; nothing at all for None."""
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else value


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


def _json(value: Any) -> str:
    return json.dumps(clean(value), indent=2) + "\n"


def environment(words: Sequence[str]) -> dict[str, Any]:
    """What was run on what; nothing that tells whose machine it is."""
    peers = [peer.package for peer in (*PEERS.values(), *RANGE_PEERS.values())]
    shown = [Path(word).name if os.path.isabs(word) else word for word in words]
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *shown]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hsrjax": hsrjax.__version__,
        "jax": jax.__version__,
        "jaxlib": versions(["jaxlib"])["jaxlib"],
        "numpy": np.__version__,
        "peers": versions([name for name in peers if name not in ("jax", "numpy")]),
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "matmul_precision": _matmul_precision(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def _matmul_precision() -> str:
    """The precision of products where none is asked for: "default" is the backend's."""
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return precision or "default"


def _processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, the same ones for hsrjax in every picture."""
    others = [name for name in dict.fromkeys(names) if name not in OURS]
    rest = {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}
    return OURS | rest


def plot_lines(
    axes: Axes, rows: list[dict[str, Any]], *, x: str, y: str, by: str = "name"
) -> None:
    """Draws a line per name, both axes logarithmic, from the rows that have numbers."""
    names = list(dict.fromkeys(row[by] for row in rows))
    palette = colours(names)
    for name in names:
        points = [(r[x], r[y]) for r in rows if r[by] == name and r[y] is not None]
        if points:
            style = "o-" if name in OURS else ".--"
            axes.plot(
                *zip(*points, strict=True), style, label=name, color=palette[name]
            )
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")


def slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Of log y over log x by least squares; None below two points."""
    if len(x) < 2:
        return None
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def crossing(x: Sequence[float], ratio: Sequence[float]) -> float | None:
    """Where a ratio over ascending x rises above 1 for good, log-log interpolated.

    None where it never does; the first x where it always is above.
    """
    above = [r >= 1 for r in ratio]
    if not above or not above[-1]:
        return None
    last_below = max((i for i, yes in enumerate(above) if not yes), default=None)
    if last_below is None:
        return float(x[0])
    (x0, x1), (r0, r1) = (v[last_below : last_below + 2] for v in (x, ratio))
    share = math.log(1 / r0) / math.log(r1 / r0)
    return float(x0 * (x1 / x0) ** share)


def figure(*, width: float = 8, height: float = 5) -> Figure:
    """An empty figure, drawn without pyplot: no window, no global state."""
    return Figure(figsize=(width, height), layout="constrained")
