"""`python -m benchmarks paper-figure3`: perplexity with the top r keys of every query.

The protocol of Figure 3: the prompt is read with full attention, then the tokens that
follow it, each given the true ones before it, with softmax over the exact top r keys.
Here the top r are found by hsrjax, in its growing cache: reported up to r = 64, and by
its dense implementation above. Beside it the same with `tail=1`, where what is left
out acts through its sketch, and the paper's own curves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import hsrjax
from benchmarks.harness import pictures
from benchmarks.header import Results
from benchmarks.paper import printed
from benchmarks.paper.reading import Reading, pieces, read
from models.network.transformer import Caches, Transformer, with_attention, with_config
from models.opening import attending

REPORTED = 64
"""Largest r of which 256 queries together leave so much out that reporting pays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Reading):
    """Repeats Figure 3 with a model at hand.

    For example:

        python -m benchmarks paper-figure3 --model SmolLM2.gguf
    """

    contexts: tuple[int, ...] = ()
    """Tokens of prompt and continuation: 2,048, 4,096, 8,192; with --quick, 64."""
    continuation: int | None = None
    """Tokens read with the top r keys alone: 256; with --quick, 16."""
    r: tuple[int, ...] = ()
    """Keys kept, where the context has more: 4, 16, ... 4,096; with --quick, 4, 16."""
    starts: int | None = None
    """Places of the text to begin at: 4; with --quick, 2."""
    tail: int = 1
    """Group of the tail, measured beside the plain top r."""

    def __post_init__(self) -> None:
        """Refuses what cannot be read."""
        super().__post_init__()
        hsrjax.Softmax(top_r=1, tail=self.tail)
        contexts, continuation, _, _ = self.sizes
        if any(x % continuation or x == continuation for x in contexts):
            raise ValueError(
                f"contexts must be multiples of the continuation of {continuation} "
                f"tokens, twice as many at least, got {contexts}"
            )

    @property
    def sizes(self) -> tuple[tuple[int, ...], int, tuple[int, ...], int]:
        """Contexts, continuation, r and starts, with the defaults resolved."""
        quick = self.quick
        return (
            self.contexts or ((64,) if quick else (2048, 4096, 8192)),
            self.continuation or (16 if quick else 256),
            self.r or ((4, 16) if quick else tuple(4**i for i in range(1, 7))),
            self.starts or (2 if quick else 4),
        )


def run(command: Command) -> Results:
    """Reads every continuation by every rule."""
    opened, text, about = read(command)
    contexts, continuation, kept, starts = command.sizes
    model = opened.model
    found: dict[tuple[int, str], list[np.ndarray]] = {}
    looked: dict[tuple[int, str], list[float]] = {}
    rules: dict[str, tuple[int | None, Transformer]]
    rules = {"dense": (None, with_attention(model, "dense"))}
    for tail in (None, command.tail):
        for r in kept:
            label = f"top {r}" + ("" if tail is None else f" tail {tail}")
            limited = attending(model, "top_r", r=r, tail=tail)
            if tail is None and r > REPORTED:
                limited = with_attention(model, "dense", top_r=r)
            rules[label] = r, limited
    reader = rules[f"top {kept[0]} tail {command.tail}"][1]
    # Exact, into a cache that has the sketches of the tail.
    reader = with_config(reader, dataclasses.replace(reader.config, attention="dense"))
    total = len(contexts) * starts * len(rules)
    with tqdm(total=total, unit="reading") as bar:
        for context in contexts:
            places = pieces(text, length=context + 1, number=starts, seed=command.seed)
            for row in places:
                caches = prefill(reader, row[: context - continuation], continuation)
                for label, (r, limited) in rules.items():
                    bar.set_postfix_str(f"{context} {label}")
                    bar.update()
                    if r is not None and r >= context:
                        continue
                    losses, share = losses_of(limited, row[-continuation - 1 :], caches)
                    found.setdefault((context, label), []).append(losses)
                    looked.setdefault((context, label), []).append(share)
    rows = [
        _line(about["model"], key, rules[key[1]][0], np.stack(losses), found)
        | {"keys_looked_at_percent": 100 * float(np.mean(looked[key]))}
        for key, losses in found.items()
    ]
    wrong = [
        f"{row['rule']} of {row['context']}: perplexity {row['perplexity']}"
        for row in rows
        if not math.isfinite(row["perplexity"])
    ]
    rows += _papers()
    return Results(rows, {"read": about} | summarize(rows), draw(rows), wrong)


def prefill(model: Transformer, prompt: np.ndarray, piece: int) -> Caches:
    """Caches of a prompt read in pieces, with room for one more."""
    caches = model.init_caches(1, len(prompt) + piece)
    for first in range(0, len(prompt), piece):
        _, caches, _ = advance(model, prompt[first : first + piece], caches)
    return caches


def losses_of(
    model: Transformer, tokens: np.ndarray, caches: Caches
) -> tuple[np.ndarray, float]:
    """Nats f64[C] of all tokens but the first, and the share of keys looked at."""
    stream, _, infos = advance(model, tokens[:-1], caches)
    graphdef, state = nnx.split(model)
    losses = _losses(graphdef, state, stream, jnp.asarray(tokens[1:], jnp.int32))
    before = int(caches[0].length[0])
    visible = before + 1 + np.arange(len(tokens) - 1)
    counts = [np.asarray(info.candidates, np.float64)[0] for info in infos]
    share = float(np.mean([count / visible[:, None] for count in counts]))
    return np.asarray(losses, np.float64), share


def advance(
    model: Transformer, tokens: np.ndarray, caches: Caches
) -> tuple[jax.Array, Caches, list[hsrjax.Info]]:
    """`Transformer.advance` of one row, each block compiled once for all layers."""
    stream = model.embed(jnp.asarray(tokens, jnp.int32)[None])
    grown, infos = [], []
    for block, cache in zip(model.blocks, caches, strict=True):
        graphdef, state = nnx.split(block)
        scale = model.threshold_scale[...]
        stream, cache, info = _step(graphdef, state, stream, cache, scale)
        grown.append(cache)
        infos.append(info)
    return stream, tuple(grown), infos


@functools.partial(jax.jit, static_argnums=0)
def _step(graphdef, state, stream, cache, scale):
    new = stream.shape[1]
    positions = cache.length[:, None] + jnp.arange(new, dtype=jnp.int32)[None]
    lengths = jnp.full(1, new, jnp.int32)
    block = nnx.merge(graphdef, state)
    return block.step(stream, cache, positions, scale, lengths=lengths)


@functools.partial(jax.jit, static_argnums=0)
def _losses(graphdef, state, stream, targets):
    logits = nnx.merge(graphdef, state).unembed(stream)[0]
    picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _line(
    model: str,
    key: tuple[int, str],
    r: int | None,
    losses: np.ndarray,
    found: dict[tuple[int, str], list[np.ndarray]],
) -> dict[str, Any]:
    """A line of results.csv from the losses f64[starts, C] of one rule."""
    context, label = key
    more = losses - np.stack(found[context, "dense"])
    error = float(more.std() / math.sqrt(more.size))
    ratio = math.exp(min(more.mean(), 700.0))
    return {
        "model": model,
        "context": context,
        "rule": label,
        "r": context if r is None else r,
        "tail": "tail" in label,
        "perplexity": math.exp(min(losses.mean(), 700.0)),
        "over_dense": ratio,
        "over_dense_standard_error": ratio * error,
        "over_dense_least": math.exp(min(more.mean(1).min(), 700.0)),
        "over_dense_most": math.exp(min(more.mean(1).max(), 700.0)),
        "tokens": losses.size,
    }


def _papers() -> list[dict[str, Any]]:
    """The paper's curves, over their last point."""
    context = printed.FIGURE3_CONTEXT
    return [
        {
            "model": model,
            "context": context,
            "rule": f"top {r}" if r < context else "dense",
            "r": r,
            "tail": False,
            "perplexity": value,
            "over_dense": value / curve[-1],
        }
        for model, curve in printed.FIGURE3.items()
        for r, value in zip(printed.FIGURE3_R, curve, strict=True)
    ]


def _curves(rows: list[dict[str, Any]]) -> dict[tuple[str, int, bool], list]:
    """Rows by model, context and tail, the dense row at the end of each."""
    curves: dict[tuple[str, int, bool], list] = {}
    for row in rows:
        if row["rule"] != "dense":
            key = row["model"], row["context"], row["tail"]
            curves.setdefault(key, []).append(row)
    return curves


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (model, context, tail), curve in _curves(rows).items():
        name = f"{model}, {context}" + (", tail" if tail else "")
        found[name] = {str(row["r"]): row["over_dense"] for row in curve}
    return {"over_dense": found}


def draw(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Perplexity over dense: this model's at each context, and the paper's models."""
    model = rows[0]["model"]
    figure = pictures.figure(width=12, height=4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    curves = _curves(rows)
    contexts = sorted({key[1] for key in curves if key[0] == model})
    shades = pictures.colours(f"context {context}" for context in contexts)
    for (name, context, tail), curve in curves.items():
        x, y = [row["r"] for row in curve], [row["over_dense"] for row in curve]
        if name == model:
            label = f"{context:,} tokens" + (", with the tail" if tail else "")
            colour = shades[f"context {context}"]
            style = "o--" if tail else "o-"
            left.plot(x, y, style, color=colour, label=label, markersize=4)
        else:
            right.plot(x, y, "o-", label=name, markersize=4)
    longest = curves[model, contexts[-1], False]
    short = model.split("-Instruct")[0]
    right.plot(
        [row["r"] for row in longest],
        [row["over_dense"] for row in longest],
        "k.-",
        label=f"{short}, {contexts[-1]:,} tokens",
    )
    left.set(title=short, ylabel="perplexity / perplexity of dense attention")
    right.set(title="the paper's Figure 3 (32,768 tokens)")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="r: keys kept for each query")
        axes.set_xscale("log", base=2)
        axes.axvline(16, color="tab:gray", linestyle=":", linewidth=1)
        axes.axhline(1, color="tab:gray", linewidth=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    right.tick_params(labelleft=True)
    left.text(16, 0.97, " $r=2^4$", transform=left.get_xaxis_transform(), va="top")
    return {"figure3.png": figure}
