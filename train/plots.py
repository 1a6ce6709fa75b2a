"""Pictures of a run: loss, sparsity by layer and head, which keys fire for which query.

Figures are drawn without pyplot, so no global state and no window is touched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import hsrjax
from models.network.operands import as_relu, attention_operands
from models.network.transformer import Transformer
from train.files.metrics import evaluated, read_csv, read_heads

_SMOOTH = 25  # steps in the running mean of the training loss


def plot_loss(run: Path, target: Path) -> None:
    """Draws the losses, and the threshold with the share of non-zero scores.

    Args:
        run: run folder; its metrics.csv is read.
        target: PNG file to write.
    """
    lines = read_csv(run / "metrics.csv")
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*_columns(lines, "loss"), color="tab:blue", alpha=0.25, linewidth=0.8)
    left.plot(*_smoothed(lines, "loss"), color="tab:blue", label="training")
    held_out = _columns(evaluated(lines), "validation_loss")
    left.plot(*held_out, "o-", color="tab:orange", label="held out")
    left.set(xlabel="step", ylabel="loss, nats per byte", title="Loss")
    left.legend()
    fired = _columns(lines, "nonzero_fraction")
    right.plot(fired[0], 100 * fired[1], color="tab:green", label="non-zero scores")
    right.set(xlabel="step", ylabel="non-zero scores, %", title="Sparsity appears")
    right.set_ylim(bottom=0)
    scale = right.twinx()
    scale.plot(*_columns(lines, "threshold_scale"), color="tab:gray", linestyle="--")
    scale.set_ylabel("threshold multiplier (dashed)")
    save(figure, target)


def plot_comparison(runs: dict[str, list[dict[str, float]]], target: Path) -> None:
    """Writes what `draw_comparison` draws to a PNG file."""
    save(draw_comparison(runs), target)


def draw_comparison(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """Draws held-out loss and the share of non-zero scores of several runs.

    Args:
        runs: lines of metrics.csv by name of run.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, lines) in enumerate(runs.items()):
        color = f"C{number}"
        left.plot(*_smoothed(lines, "loss"), color=color, alpha=0.35, linewidth=1)
        held_out = _columns(evaluated(lines), "validation_loss")
        final = f"{name}: {held_out[1][-1]:.3f}"
        left.plot(*held_out, "o-", color=color, label=final)
        steps, fired = _columns(lines, "nonzero_fraction")
        right.plot(steps, 100 * fired, color=color, label=name)
    left.set(xlabel="step", ylabel="nats per byte", title="Loss (dots: held out)")
    left.set_ylim(top=3.2)
    right.set(xlabel="step", ylabel="%", title="Non-zero attention scores")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def plot_study(rows: list[dict[str, Any]], target: Path) -> None:
    """Draws every run of a study by its loss and its share of non-zero scores.

    Args:
        rows: of `train.commands.study.summarize`.
        target: PNG file to write.
    """
    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    axes = figure.subplots()

    def name(row: dict[str, Any]) -> str:
        powered = row["kind"] not in ("softmax", "entmax")
        return f"{row['kind']}, p = {row['power']}" if powered else row["kind"]

    names = sorted({name(row) for row in rows})
    lengths = sorted({row["row_length"] for row in rows})
    for place, kind in enumerate(names):
        for marker, length in zip("os^Dv", lengths, strict=False):
            chosen = [r for r in rows if (name(r), r["row_length"]) == (kind, length)]
            if not chosen:
                continue
            axes.plot(
                [max(1e-2, 100 - row["zeros_percent"]) for row in chosen],
                [row["validation_loss"] for row in chosen],
                marker=marker,
                linestyle="",
                color=f"C{place % 10}",
                label=f"{kind}, rows of {length:,}",
            )
    axes.set_xscale("log")
    axes.set(xlabel="non-zero scores, %", ylabel="held-out loss, nats per byte")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, target)


def plot_sparsity(run: Path, target: Path) -> None:
    """Draws the share of non-zero scores by layer and head at the last evaluation.

    Args:
        run: run folder; its sparsity.csv is read.
        target: PNG file to write.
    """
    _, found = read_heads(run)
    percent = 100 * found["nonzero_fraction"]
    save(draw_heads({"Non-zero scores, % (held-out text)": percent}), target)


def draw_heads(pictures: dict[str, np.ndarray]) -> Figure:
    """Draws numbers by layer and head as heat maps beside each other.

    Args:
        pictures: f[L, N] by title; NaN stays white.
    """
    columns = min(3, len(pictures))
    rows = -(-len(pictures) // columns)
    layers, heads = next(iter(pictures.values())).shape
    size = (columns * (2.5 + 0.8 * heads), rows * (1.6 + 0.6 * layers))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(pictures) :]:
        axes.set_axis_off()
    for axes, (title, values) in zip(grid.flat, pictures.items(), strict=False):
        top = np.nanmax(values) or 1.0
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        for (layer, head), value in np.ndenumerate(values):
            color = "white" if value < top / 2 else "black"
            text = f"{value:.3g}"
            axes.text(head, layer, text, ha="center", va="center", color=color)
        axes.set(xlabel="head", ylabel="layer", title=title)
        axes.set_xticks(range(heads))
        axes.set_yticks(range(layers))
        figure.colorbar(image, ax=axes)
    return figure


def fired_keys(model: Transformer, tokens: jax.Array) -> np.ndarray:
    """Which keys have a non-zero weight for which query.

    Key s fires for query t when s <= t and scale <q_t, k_s> > bias_t.

    Args:
        model: with one of the ReLU kinds of attention.
        tokens: i32[T].

    Returns:
        bool[L, N, T, T]: layer, head, query, key.

    Raises:
        ValueError: the model's attention is softmax, where every key fires.
    """
    if model.config.attention_kind == "softmax":
        raise ValueError(
            "every key fires in softmax attention: give a model with another "
            "attention_kind"
        )
    return np.asarray(jax.jit(_fired)(model, tokens))


def _fired(model: Transformer, tokens: jax.Array) -> jax.Array:
    """`fired_keys`, to be jitted."""
    length = tokens.shape[0]
    visible = jnp.tril(jnp.ones((length, length), bool))[None]
    fired = []
    layers = map(as_relu, attention_operands(model, tokens[None]))
    for query, key, _, activation in layers:
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
        scores = jnp.einsum("tnh,snh->nts", query[0], key[0], precision="highest")
        bias: Any = cast(hsrjax.ReLU, activation).bias
        fired.append((scores > bias[0].T[:, :, None]) & visible)
    return jnp.stack(fired)


def plot_fires(fired: np.ndarray, target: Path, *, heads: int = 4) -> None:
    """Draws one causal picture per layer and head: a dot where a key fires.

    Args:
        fired: bool[L, N, T, T] of `fired_keys`.
        target: PNG file to write.
        heads: heads to draw, at most.
    """
    layers, columns = fired.shape[0], min(heads, fired.shape[1])
    visible = np.tril(np.ones(fired.shape[2:], bool))
    size = (2.6 * columns, 2.8 * layers)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(layers, columns, squeeze=False)
    for (layer, head), axes in np.ndenumerate(grid):
        # 0 hidden (grey), 1 visible and zero (white), 2 fires (black)
        picture = np.where(fired[layer, head], 0.0, np.where(visible, 1.0, 0.85))
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
        share = 100 * fired[layer, head].sum() / visible.sum()
        axes.set_title(f"layer {layer}, head {head}: {share:.1f} %", fontsize=9)
        axes.tick_params(labelsize=7)
    figure.supxlabel("key")
    figure.supylabel("query")
    save(figure, target)


def _smoothed(lines: list[dict[str, float]], name: str) -> tuple[Any, Any]:
    """Steps and running mean of one column."""
    steps, values = _columns(lines, name)
    width = min(_SMOOTH, len(values))
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    return steps[width - 1 :], mean


def _columns(lines: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Step and one column of metrics.csv."""
    return np.array([x["step"] for x in lines]), np.array([x[name] for x in lines])


def save(figure: Figure, target: Path) -> None:
    """Writes a PNG file."""
    FigureCanvasAgg(figure).print_png(str(target))
