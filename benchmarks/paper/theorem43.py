"""`python -m benchmarks paper-theorem43`: what top-r softmax leaves out, and bounds.

r = n^gamma keys of every query are kept. Lemma 6.5 bounds the error by the softmax mass
left out, Theorem 4.3 by gamma, beta1 and beta2 of "massive activation" (Definition
B.3), here the best that each row has. On the attention of a trained model (every layer
and head, the newest positions of a text), and on keys for which the paper says that it
holds: Laplace, and n^(1 - gamma) Gaussian clusters; beside them Gaussian keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import hsrjax
from benchmarks.files.results import as_csv
from benchmarks.harness import pictures
from benchmarks.harness.tables import column, where
from benchmarks.header import Results
from benchmarks.paper import sources
from benchmarks.paper.findings import TOP_R_TOLERANCE
from benchmarks.paper.heads import Found, describe, join, measure
from benchmarks.paper.reading import (
    Layer,
    Reading,
    cache_of,
    heads_of,
    operands,
    pieces,
    read,
)

GAMMAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Reading):
    """Measures Lemma 6.5, Theorem 4.3 and massive activation on real attention.

    For example:

        python -m benchmarks paper-theorem43 --model SmolLM2.gguf
    """

    tokens: int | None = None
    """Tokens of the text to read: 8,192; with --quick, 96."""
    rows: int | None = None
    """Queries of every head, the newest: 128; with --quick, 8."""
    gammas: tuple[float, ...] = GAMMAS
    """n^gamma keys are kept."""
    engine_r: int = 256
    """Largest r with which hsrjax's own output and certificate are checked too."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        super().__post_init__()
        if not self.gammas or not all(0 < gamma < 1 for gamma in self.gammas):
            raise ValueError("gammas must lie between 0 and 1")
        tokens, rows = self.sizes
        if rows > tokens // 2:
            raise ValueError("tokens must be twice as many as rows, or more")

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens and rows, with the defaults resolved."""
        tokens = self.tokens or (96 if self.quick else 8192)
        return tokens, self.rows or (8 if self.quick else 128)


def run(command: Command) -> Results:
    """Measures the model's heads, then random keys."""
    opened, text, about = read(command)
    tokens, rows = command.sizes
    kept = [max(1, round(tokens**gamma)) for gamma in command.gammas]
    part = pieces(text, length=tokens, number=1, seed=command.seed)[0]
    layers = operands(opened.model, part, rows)
    lines: list[dict[str, Any]] = []
    wrong: list[str] = []
    measured: dict[tuple[str, float], list[Found]] = {}
    by_layer: dict[tuple[int, float], list[Found]] = {}
    name = about["model"]
    for number, layer in enumerate(tqdm(layers, unit="layer")):
        heads = heads_of(layer)
        found = [measure(head, kept) for head in heads]
        for place, gamma in enumerate(command.gammas):
            these = [one[place] for one in found]
            faults, engine = [], [{} for _ in heads]
            if kept[place] <= command.engine_r:
                faults, engine = check_engine(layer, these, kept[place])
            wrong += [f"layer {number}, gamma {gamma}: {fault}" for fault in faults]
            for head, one in enumerate(these):
                first = {"source": name, "layer": number, "head": head}
                first |= {"gamma": gamma, "kept": kept[place], "keys": tokens}
                line = first | describe(one)
                lines.append(line | engine[head])
            measured.setdefault((name, gamma), []).extend(these)
            by_layer[number, gamma] = these
    for first, one in _random(command, tokens, rows):
        lines.append(first | describe(one))
        if first["keys"] == tokens:
            measured[first["source"], first["gamma"]] = [one]
    joined = {key: join(found) for key, found in measured.items()}
    wrong += _impossible(lines)
    table = [
        {"layer": layer, "gamma": gamma} | describe(join(found))
        for (layer, gamma), found in by_layer.items()
    ]
    values = _values(layers)
    texts = {"layers.csv": as_csv(table), "values.csv": as_csv(values)}
    summary = {"read": about, "tokens": tokens} | summarize(
        lines, joined, values, tokens
    )
    figures = {"theorem43.png": draw(joined, table)}
    return Results(lines, summary, figures, wrong, texts)


def check_engine(
    layer: Layer, found: list[Found], r: int
) -> tuple[list[str], list[dict[str, float]]]:
    """hsrjax's own top r on the same rows: output and certificate against float64.

    Returns:
      What is wrong, in words; and for each head columns that say how far the output is
      off, and the median of error / certificate.
    """
    out, info = hsrjax.decode_attention(
        layer.query,
        cache_of(layer.key, layer.value),
        activation=hsrjax.Softmax(top_r=r),
        method="hsr",
        scale=1.0,
    )
    out, bound = np.asarray(out, np.float64)[0], np.asarray(info.error_bound)[0]
    faults, columns = [], []
    for head, one in enumerate(found):
        off = np.abs(out[:, head] - one.output).max(-1)
        slack = TOP_R_TOLERANCE * one.largest / 2
        if (off > slack).any():
            faults.append(f"head {head}: output off by {off.max():.1e}")
        if (one.error > bound[:, head] + slack).any():
            faults.append(f"head {head}: error above the certificate")
        tightness = np.median(one.error / np.maximum(bound[:, head], 1e-30))
        columns.append(
            {
                "engine_off_over_v": float((2 * off / one.largest).max()),
                "engine_bound_tightness_50": float(tightness),
            }
        )
    return faults, columns


def _random(command: Command, tokens: int, rows: int):
    """First columns and what was measured, of keys that are drawn, by their number."""
    for source, draw in sources.SOURCES.items():
        for keys in (tokens // 8, tokens, 8 * tokens):
            for number, gamma in enumerate(command.gammas):
                r = max(1, round(keys**gamma))
                rng = np.random.default_rng([command.seed, keys, number])
                head = draw(rng, keys=keys, rows=rows, kept=r)
                first = {"source": source, "gamma": gamma, "kept": r, "keys": keys}
                yield first, measure(head, [r])[0]


def _impossible(lines: list[dict[str, Any]]) -> list[str]:
    """Rows above a bound that is proved."""
    return [
        f"{line['source']}, gamma {line['gamma']}: {line[name]} rows above the {bound}"
        for line in lines
        for bound in ("lemma", "theorem")
        if line[name := f"{bound}_exceeded_rows"]
    ]


def _values(layers: list[Layer]) -> list[dict[str, Any]]:
    """max|V| of every layer over more and more tokens (Remark 4.4)."""
    found = []
    for number, layer in enumerate(layers):
        value = np.abs(np.asarray(layer.value, np.float64)[0])
        deviation = float(np.sqrt(np.mean(np.square(value))))
        size = len(value)
        while size >= 64:
            largest = float(value[:size].max())
            found.append(
                {
                    "layer": number,
                    "keys": size,
                    "max_v": largest,
                    "rms_v": deviation,
                    "max_over_rms": largest / deviation,
                    "max_over_rms_log_n": largest / deviation / np.log(size),
                }
            )
            size //= 4
    return found


def summarize(
    lines: list[dict[str, Any]],
    joined: dict[tuple[str, float], Found],
    values: list[dict[str, Any]],
    tokens: int,
) -> dict[str, Any]:
    by_source: dict[str, Any] = {}
    for (source, gamma), found in joined.items():
        mine = where(lines, source=source, gamma=gamma, keys=tokens)
        says = np.array([x["theorem_says_something_percent"] for x in mine])
        about = describe(found) | {"heads": len(mine)}
        about |= {"heads_mostly_covered_percent": 100 * float(np.mean(says >= 50))}
        engine = [x.get("engine_bound_tightness_50") for x in mine]
        checked = [x for x in engine if x is not None]
        if checked:
            about |= {"engine_bound_tightness_50": float(np.median(checked))}
        by_source.setdefault(source, {})[str(gamma)] = about
    sizes = column(values, "keys")
    ends = [
        column(where(values, keys=size), "max_over_rms_log_n")
        for size in (min(sizes), max(sizes))
    ]
    return {
        "sources": by_source,
        "max_over_rms_log_n": {
            "least_keys": float(np.median(ends[0])),
            "most_keys": float(np.median(ends[1])),
            "largest": float(np.max(ends[1])),
        },
    }


def draw(found: dict[tuple[str, float], Found], layers: list[dict[str, Any]]) -> Figure:
    """Errors and bounds by gamma; where Theorem 4.3 says something, by keys and layer.

    Args:
      found: all rows by source and gamma; the first source is the model.
      layers: a line for each layer and gamma of the model.
    """
    sources = list(dict.fromkeys(source for source, _ in found))
    gammas = sorted({gamma for _, gamma in found})
    figure = pictures.figure(width=13, height=4.2)
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
