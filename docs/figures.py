"""Draws the pictures of the README and of these pages: `python docs/figures.py`.

Speeds are read from `benchmarks/results`. The idea is drawn from random keys, and the
rest is what `notebooks/01_half_space_reporting.py` draws. `--only NAME` is one of them.
"""

import argparse
import csv
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt

import hsrjax

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results"
FIGURES = REPO / "docs" / "_static" / "figures"
NOTEBOOK = REPO / "notebooks" / "01_half_space_reporting.py"
NOTEBOOK_FIGURES = ("balls", "bounds-by-head-size", "intervals")

# GitHub's and Furo's backgrounds, by day and by night.
THEMES = {
    "light": {
        "paper": "#ffffff",
        "ink": "#1f2328",
        "quiet": "#9aa4af",
        "key": "#1668c7",
        "doubt": "#d9730d",
        "plane": "#c62828",
    },
    "dark": {
        "paper": "#0d1117",
        "ink": "#e6edf3",
        "quiet": "#5b6672",
        "key": "#58a6ff",
        "doubt": "#f0a14a",
        "plane": "#ff7b72",
    },
}


def style(theme):
    """matplotlib's settings of a theme."""
    ink, paper = theme["ink"], theme["paper"]
    names = ("text", "axes.label", "axes.title", "xtick", "ytick")
    colors = {f"{x}color" if "." in x else f"{x}.color": ink for x in names}
    return colors | {
        "axes.edgecolor": theme["quiet"],
        "axes.facecolor": paper,
        "figure.facecolor": paper,
        "savefig.facecolor": paper,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 12,
        "font.size": 11,
        "figure.dpi": 160,
    }


def draw_plane(ax, theme):
    """Keys in the plane, a query, and the keys on the far side of its plane."""
    keys = np.asarray(jax.random.normal(jax.random.key(4), (500, 2)))
    normal, offset = np.array([0.8, 0.6]), 1.3
    fires = keys @ normal >= offset
    foot, along = normal * offset, np.array([-normal[1], normal[0]])
    ends = np.array([foot - 6 * along, foot + 6 * along])
    beyond = np.concatenate([ends, ends[::-1] + 6 * normal])
    ax.fill(*beyond.T, color=theme["key"], alpha=0.10, lw=0)
    ax.plot(*ends.T, color=theme["plane"], lw=1.6)
    ax.scatter(*keys[~fires].T, s=9, color=theme["quiet"], lw=0)
    ax.scatter(*keys[fires].T, s=20, color=theme["key"], lw=0)
    arrow = {"arrowstyle": "-|>", "color": theme["plane"], "lw": 1.8}
    ax.annotate("", 1.05 * normal, (0, 0), arrowprops=arrow)
    halo = {"facecolor": theme["paper"], "edgecolor": "none", "pad": 1.5}
    ax.text(-0.75, -0.35, "query", color=theme["plane"], bbox=halo)
    ax.text(-3.15, 2.75, f"{fires.sum()} of {len(keys)} keys\nhave a weight")
    ax.set(xlim=(-3.3, 3.3), ylim=(-3.3, 3.3), aspect="equal", xticks=[], yticks=[])
    ax.set_title("Only keys beyond a plane have a weight")


def draw_intervals(ax, theme):
    """The certified intervals of one query's best scores, at head size 64."""
    of_keys, of_query = jax.random.split(jax.random.key(64))
    keys = jax.random.normal(of_keys, (16_384, 64))
    query = jax.random.normal(of_query, (1, 64))
    scores = jnp.matmul(query, keys.T, precision="highest")[0]
    sketch = hsrjax.build(keys, reorder=False).sketch
    lower, upper = (np.asarray(x)[0] for x in sketch.intervals(query))
    scores = np.asarray(scores)
    best = np.argsort(-scores)[:130]
    offset = scores[best[63]]
    fires, doubtful = scores >= offset, (scores < offset) & (upper >= offset)
    for mask, color, label in (
        (fires, "key", f"{fires.sum()} fire"),
        (doubtful, "doubt", f"{doubtful.sum()} more must be scored"),
        (upper < offset, "quiet", f"{(upper < offset).sum():,} never are"),
    ):
        at = np.flatnonzero(mask[best])
        of = best[at]
        ax.vlines(at, lower[of], upper[of], color=theme[color], lw=1.7)
        ax.plot(at, scores[of], ".", color=theme[color], ms=5, label=label)
    ax.axhline(offset, color=theme["plane"], lw=1.3)
    ax.text(129, offset, "threshold", color=theme["plane"], ha="right", va="bottom")
    ax.legend(frameon=False, title="of 16,384 keys of 64 numbers", alignment="left")
    ax.set(xlabel="the best 130 keys", ylabel="score, within bounds", xticks=[])
    ax.set_title("8-bit bounds rule out the rest, with certainty")


def rows_of(folder):
    """The rows of a committed results.csv."""
    with open(RESULTS / folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def curve(rows, name, x, y):
    """Sorted numbers of the rows of one contestant."""
    column = "implementation" if "implementation" in rows[0] else "name"
    points = [(float(r[x]), float(r[y])) for r in rows if r[column] == name and r[y]]
    return np.array(sorted(points)).T


def draw_speed(axes, theme):
    """Milliseconds on a CPU and a GPU, and tokens a second of a trained model."""
    cpu, generate, gpu = map(rows_of, ("decode", "generate", "decode-gpu"))
    styles = {
        "dense": ("dense", "o-", theme["ink"]),
        "hsr": ("hsr", "o-", theme["key"]),
        "torch-sdpa": ("torch SDPA", "--", theme["doubt"]),
    }

    def lines(ax, rows, names, x, y):
        for name in names:
            label, line, color = styles[name]
            ax.plot(*curve(rows, name, x, y), line, color=color, ms=5, label=label)
        ax.set(xscale="log")
        ax.grid(color=theme["quiet"], alpha=0.25, lw=0.6)
        ax.minorticks_off()
        ax.set_ylim(bottom=0) if y != "ms" else ax.set_yscale("log")

    def ticks(ax, numbers):
        ax.set_xticks(numbers, [f"{n // 1024}k" for n in numbers])

    left, middle, right = axes
    lines(left, cpu, ("torch-sdpa", "dense", "hsr"), "keys", "ms")
    lines(middle, generate, ("dense", "hsr"), "context", "tokens_per_second")
    lines(right, gpu, ("dense", "hsr"), "keys", "ms")
    ticks(left, [1024, 8192, 65536, 524288])
    ticks(middle, [1024, 4096, 16384, 65536])
    ticks(right, [8192, 32768, 131072, 524288])
    left.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    right.set_yticks([0.2, 0.5, 1], ["0.2", "0.5", "1"])
    right.tick_params(axis="y", which="minor", labelleft=False)
    left.set(title="CPU, a decode step: ms", xlabel="keys in the cache")
    middle.set(title="CPU, a whole model: tokens/s", xlabel="tokens of the prompt")
    right.set(title="GPU by XLA, a decode step: ms", xlabel="keys in the cache")
    left.legend(frameon=False)


def save(name, draw, shape, **options):
    """One picture in both themes."""
    for label, theme in THEMES.items():
        with plt.rc_context(style(theme)):
            figure, axes = plt.subplots(*shape, layout="constrained", **options)
            draw(axes, theme)
            figure.savefig(FIGURES / f"{name}-{label}.png")
            plt.close(figure)


def idea():
    """What half-space reporting is, and how the sketch does it."""

    def draw(axes, theme):
        draw_plane(axes[0], theme)
        draw_intervals(axes[1], theme)

    save("idea", draw, (1, 2), figsize=(10.5, 4.3), width_ratios=(1, 1.4))


def speed():
    """What was measured."""
    save("speed", draw_speed, (1, 3), figsize=(10.8, 3.6))


def notebook():
    """What the first notebook draws."""
    before = set(plt.get_fignums())
    runpy.run_path(str(NOTEBOOK), run_name="notebook")
    drawn = sorted(set(plt.get_fignums()) - before)
    for name, number in zip(NOTEBOOK_FIGURES, drawn, strict=True):
        path = FIGURES / f"{name}.png"
        plt.figure(number).savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.15)


def main():
    """Draws all, or the one that is asked for."""
    parts = {"idea": idea, "speed": speed, "notebook": notebook}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=parts)
    only = parser.parse_args().only
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in [only] if only else parts:
        parts[name]()


if __name__ == "__main__":
    main()
