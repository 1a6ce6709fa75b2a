"""Pictures in one style, hsrjax in the same colours everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS = {"hsr": "tab:red", "auto": "tab:purple", "dense": "black"}
"""Colours of what every picture shows; peers get what is left."""
_OTHERS = ("tab:blue", "tab:orange", "tab:green", "tab:brown", "tab:pink", "tab:gray")
_OTHERS += ("tab:olive", "tab:cyan", "navy", "teal", "gold", "darkorange")


def figure(*, width: float = 8, height: float = 5) -> Figure:
    """An empty figure, drawn without pyplot: no window, no global state."""
    return Figure(figsize=(width, height), layout="constrained")


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
