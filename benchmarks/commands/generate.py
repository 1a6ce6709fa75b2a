"""`python -m benchmarks generate`: a trained model's tokens per second, end to end.

One prompt of held-out text is read once; then every implementation goes on from a copy
of the same caches, in turns of a few tokens, drawing greedily. What is timed is what
`models.generate` runs: a jitted step and the token's way to the host. The tokens must
be the same, but for approximations of softmax. Beside it the same with a short prompt:
what a step takes without a long cache.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.harness import pictures, tables
from benchmarks.header import Results, Settings
from models.decoding.session import Sampling, Session
from models.files.runs import read_run_config
from models.network.config import Method
from models.network.transformer import Transformer, with_config
from models.opening import attending, is_published, open_model
from models.text.tokenizer import Tokenizer
from train.data import held_out, load_corpus

CONTEXTS = (1024, 4096, 16384, 65536)
SHORT = 128
IMPLEMENTATIONS: tuple[Method, ...] = ("dense", "hsr", "auto")
TURN = 25
"""Tokens in a row; the first of a turn is not timed."""
_PUBLISHED_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Command(Settings):
    """Times the decoding of a trained model by dense, hsr and auto.

    For example:

        python -m benchmarks generate --model runs/mine --contexts 1024
    """

    model: Path = Path("models/released/python-2.8m")
    """Run folder or released model, Hugging Face folder, or .gguf file."""
    contexts: tuple[int, ...] = ()
    """Tokens of the prompt: 1,024 to 65,536; with --quick, 256."""
    tokens: int | None = None
    """Tokens to draw by each: 1,000; with --quick, 50."""
    data: str | None = None
    """Text of the prompt, where it is not that of the run, as for training."""
    r: tuple[int, ...] = ()
    """Softmax models: race the r best keys of every query too."""
    epsilon: tuple[float, ...] = ()
    """Softmax models: race all keys but a share of the mass too."""
    tail: int | None = None
    """With either: once more with what is left out acting through sketches."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        super().__post_init__()
        if self.tokens is not None and self.tokens < 2 * TURN:
            raise ValueError(f"tokens must be {2 * TURN} or more, got {self.tokens}")
        if self.tail is not None and not (self.r or self.epsilon):
            raise ValueError(f"tail={self.tail} needs --r or --epsilon")


def run(command: Command) -> Results:
    """Measures every context."""
    model, tokenizer = open_model(command.model)
    text = _text(command, tokenizer)
    models = entrants(command, model)
    contexts = command.contexts or ((256,) if command.quick else CONTEXTS)
    tokens = command.tokens or (2 * TURN if command.quick else 1000)
    if text.size < max(contexts):
        raise ValueError(
            f"the held-out text has {text.size:,} tokens, fewer than a context of "
            f"{max(contexts):,}: give smaller --contexts or other text with --data"
        )
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    rest = _race(models, text[:SHORT], tokens=4 * TURN)
    base = {name: one["ms"] for name, one in rest.items()}
    for context in contexts:
        found = _race(models, text[:context], tokens=tokens)
        dense = found["dense"]
        for name, one in found.items():
            same = int(np.sum(np.equal(one["tokens"], dense["tokens"])))
            if same != tokens and name in IMPLEMENTATIONS:
                wrong.append(f"{name}, {context:,} keys: {same} of {tokens} tokens")
            rows.append(
                {
                    "context": context,
                    "implementation": name,
                    "tokens_per_second": 1e3 / one["ms"],
                    "ms": one["ms"],
                    "without_context_ms": base[name],
                    "of_context_ms": max(0.0, one["ms"] - base[name]),
                    "over_dense": dense["ms"] / one["ms"],
                    "tokens": tokens,
                    "equal_tokens": same,
                    "keys_looked_at_percent": 100 * one["looked_at"],
                    "keys_fired_percent": 100 * one["fired"],
                    "prefill_s": one["prefill_s"],
                }
            )
            tqdm.write(
                f"{context:,} keys, {name}: {1e3 / one['ms']:,.0f} tokens/s, "
                f"{dense['ms'] / one['ms']:.2f} times dense, {same} of {tokens} tokens "
                f"equal, {100 * one['looked_at']:.2f} % of the keys looked at"
            )
    return Results(rows, summarize(rows), draw(rows), wrong)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed over that of dense."""
    return {
        f"{row['implementation']}_{row['context']}": row["over_dense"] for row in rows
    }


def entrants(command: Command, model: Transformer) -> dict[str, Transformer]:
    """The model under every attention that is raced; they share its parameters."""
    # Full softmax leaves no key out.
    full = model.config.attention_kind == "softmax"
    names = ("dense",) if full else IMPLEMENTATIONS
    models = {name: attending(model, name) for name in names}
    limits: list[tuple[str, dict[str, Any]]] = [
        *(("top_r", {"r": r}) for r in command.r),
        *(("epsilon", {"epsilon": epsilon}) for epsilon in command.epsilon),
    ]
    for tail in dict.fromkeys((None, command.tail)):
        for name, limit in limits:
            label = f"{name} {next(iter(limit.values())):g}"
            label += "" if tail is None else f" tail {tail}"
            models[label] = attending(model, name, **limit, tail=tail)
    return models


def _text(command: Command, tokenizer: Tokenizer) -> np.ndarray:
    """Held-out text of the run as tokens, its stretches one after the other.

    Published models read from the beginning.
    """
    if is_published(command.model):
        corpus = load_corpus(command.data or "")
        return tokenizer.encode(bytes(corpus.data[:_PUBLISHED_BYTES]))
    _, options = read_run_config(command.model)
    path = options.get("data", "") if command.data is None else command.data
    corpus = load_corpus(path).tokenized(tokenizer)
    row_length = int(options.get("row_length", 1024))
    return np.concatenate(held_out(corpus, row_length=row_length))


def _race(
    models: dict[str, Transformer], prompt: np.ndarray, *, tokens: int
) -> dict[str, dict[str, Any]]:
    """Draws tokens by every implementation in turns; what was found, by name."""
    started = time.perf_counter()
    read = Session(
        _reader(models),
        [prompt.tolist()],
        max_tokens=tokens + 1,
        sampling=Sampling(),
        seed=0,
    )
    first, _ = read.prefill()
    prefill = time.perf_counter() - started - read.compile_seconds
    runs = {name: _Run(read.fork(one), int(first[0])) for name, one in models.items()}
    with tqdm(total=tokens, unit="token", desc=f"{prompt.size:,} keys") as bar:
        for turn in range(-(-tokens // TURN)):
            number = min(TURN, tokens - turn * TURN)
            names = list(runs)
            first_up = turn % len(names)
            for name in names[first_up:] + names[:first_up]:
                runs[name].draw(number)
            bar.update(number)
    return {name: one.results() | {"prefill_s": prefill} for name, one in runs.items()}


def _reader(models: dict[str, Transformer]) -> Transformer:
    """What reads the prompt exactly, into a cache that all can go on from."""
    tails = {model.config.tail: model for model in models.values()}
    with_sketch = next((model for tail, model in tails.items() if tail), None)
    if with_sketch is None:
        return models.get("auto", models["dense"])
    return with_config(
        with_sketch, dataclasses.replace(with_sketch.config, attention="dense")
    )


class _Run:
    """One implementation going on from the prompt."""

    def __init__(self, session: Session, first: int):
        self._session = session
        self._tokens, self._seconds = [first], []
        self._counts = np.zeros(3)

    def draw(self, number: int) -> None:
        """Draws some tokens and reads each one step late, as generation does."""
        pending = None
        began = time.perf_counter()
        for drawn in range(number):
            following = self._session.decode()
            if pending is not None:
                self._take(pending)
            if drawn == 0:
                self._take(following)
                began, pending = time.perf_counter(), None
            else:
                pending = following
        if pending is not None:
            self._take(pending)
            self._seconds.append((time.perf_counter() - began) / (number - 1))

    def _take(self, pending: Any) -> None:
        token, counts = pending
        self._tokens.append(int(token[0]))
        self._counts += [float(x) for x in counts[0][:3]]

    def results(self) -> dict[str, Any]:
        """Median milliseconds of a token, the tokens, and shares of keys."""
        visible, looked_at, fired = self._counts
        return {
            "ms": 1e3 * statistics.median(self._seconds),
            "tokens": self._tokens[1:],
            "looked_at": looked_at / visible,
            "fired": fired / visible,
        }


def draw(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Where a step's time goes, by context and implementation."""
    contexts = sorted({row["context"] for row in rows})
    figure = pictures.figure(width=2 + 2.2 * len(contexts), height=4)
    grid = figure.subplots(1, len(contexts), squeeze=False)[0]
    for axes, context in zip(grid, contexts, strict=True):
        chosen = tables.where(rows, context=context)
        names = tables.column(chosen, "implementation")
        rest = [min(row["ms"], row["without_context_ms"]) for row in chosen]
        more = [row["ms"] - least for row, least in zip(chosen, rest, strict=True)]
        axes.bar(names, rest, color="tab:gray", label="step without a context")
        axes.bar(names, more, bottom=rest, color="tab:blue", label="attention to it")
        axes.set_title(f"{context:,} keys")
    grid[0].set_ylabel("ms a token")
    grid[0].legend(fontsize=8)
    return {"generation.png": figure}
