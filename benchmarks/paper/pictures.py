"""Pictures of the experiments on attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.paper.massive import Found


def massive_activation(
    found: dict[tuple[str, float], Found], layers: list[dict[str, Any]]
) -> Figure:
    """Errors and bounds by gamma; where Theorem 4.3 says something, by keys and layer.

    Args:
      found: all rows by source and gamma; the first source is the model.
      layers: a line for each layer and gamma of the model.
    """
    sources = list(dict.fromkeys(source for source, _ in found))
    gammas = sorted({gamma for _, gamma in found})
    figure = report.figure(width=13, height=4.2)
    left, middle, right = figure.subplots(1, 3)
    model = [found[sources[0], gamma] for gamma in gammas]
    for label, name, style in (
        ("error", "error", "o-"),
        ("Lemma 6.5", "lemma", "s-"),
        ("Theorem 4.3", "theorem", "^-"),
    ):
        ratios = [getattr(one, name) / one.largest for one in model]
        low, mid, high = (
            [float(np.quantile(x, q)) for x in ratios] for q in (0.25, 0.5, 0.75)
        )
        (line,) = left.plot(gammas, mid, style, label=label)
        left.fill_between(gammas, low, high, color=line.get_color(), alpha=0.2)
    left.axhline(1, color="tab:gray", linestyle="--")
    left.set(
        yscale="log",
        xlabel="gamma: $n^\\gamma$ keys are kept",
        ylabel="over $2\\,\\Vert V\\Vert_\\infty$, above which a bound is empty",
        title=f"{_short(sources[0])}: median and quartiles",
    )
    left.legend()
    for source in sources:
        share = [
            100 * float(np.mean(one.theorem < one.largest))
            for one in (found[source, gamma] for gamma in gammas)
        ]
        width = 6 - 1.5 * sources.index(source)  # those at zero lie on each other
        middle.plot(gammas, share, "o-", label=_short(source), linewidth=width)
    middle.set(
        xlabel="gamma",
        ylabel="rows in which Theorem 4.3 says something, %",
        ylim=(-3, 103),
        title="by keys",
    )
    middle.legend()
    for axes in (left, middle):
        axes.grid(alpha=0.3)
    numbers = sorted({line["layer"] for line in layers})
    by_place = {(x["gamma"], x["layer"]): x for x in layers}
    grid = [
        [by_place[gamma, n]["theorem_says_something_percent"] for n in numbers]
        for gamma in gammas
    ]
    image = right.imshow(grid, aspect="auto", origin="lower", vmin=0, vmax=100)
    right.set(
        yticks=range(len(gammas)),
        yticklabels=[str(gamma) for gamma in gammas],
        xlabel="layer",
        ylabel="gamma",
        title=f"{_short(sources[0])}: the same by layer",
    )
    figure.colorbar(image, ax=right, label="rows, %")
    return figure


def _short(name: str) -> str:
    return name.split("-Instruct")[0]
