"""Whether a model finds what stands in a long text: tasks over lengths and depths."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from models.decoding.generation import generate
from models.evaluation import tasks
from models.network.transformer import Transformer
from models.text.tokenizer import PretrainedTokenizer, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which tasks to set.

    Attributes:
      kind: one of tasks.KINDS.
      contexts: tokens of prompts and answers together.
      depths: where needles are, from 0 to 1; other kinds have none.
      samples: tasks of each context and depth.
      seed: of the first sample.
      max_tokens: of an answer.
      is_chat: ask by the model's chat template.
      haystack: sentences around needles; empty is a filler.
    """

    kind: str
    contexts: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int
    max_tokens: int
    is_chat: bool
    haystack: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("contexts", "depths"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold one value or more")
        for name in ("samples", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")

    @property
    def cells(self) -> list[tuple[int, float, int]]:
        """Context, depth and seed of every task."""
        depths = self.depths if self.kind == "needle" else self.depths[:1]
        return [
            (context, depth, self.seed + sample)
            for context in self.contexts
            for depth in depths
            for sample in range(self.samples)
        ]


def ask(
    model: Transformer,
    tokenizer: Tokenizer,
    plan: Plan,
    *,
    on_answer: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Sets every task of a plan, one after the other, greedily answered.

    Args:
      model: any transformer.
      tokenizer: of its vocabulary.
      plan: what to ask.
      on_answer: called with each line as soon as it is known.

    Returns:
      A line per task: context, depth, seed, score, answer, expected, prompt_tokens,
      tokens_per_second and keys_looked_at.

    Raises:
      ValueError: a context is too short for a task, or the model cannot chat.
    """
    lines = []
    for context, depth, seed in plan.cells:
        room = context - plan.max_tokens
        empty = tasks.Task("", "", "", ())
        around = len(prompt_of(empty, tokenizer, is_chat=plan.is_chat))
        task = tasks.make(
            plan.kind,
            length=room - around,
            depth=depth,
            seed=seed,
            count=lambda text: len(tokenizer.encode(text.encode())),
            **({"haystack": plan.haystack} if plan.haystack else {}),
        )
        prompt = prompt_of(task, tokenizer, is_chat=plan.is_chat)
        found = generate(
            model, [prompt], max_tokens=plan.max_tokens, stops=tokenizer.stops
        )
        answer = tokenizer.decode(found.tokens[0]).decode("utf-8", "replace")
        line = {
            "kind": plan.kind,
            "context": context,
            "depth": depth if plan.kind == "needle" else "",
            "seed": seed,
            "score": task.score(answer),
            "expected": " ".join(task.answers),
            "answer": answer,
            "prompt_tokens": len(prompt),
            "tokens_per_second": found.decode.tokens_per_second,
            "keys_looked_at": found.decode.keys_looked_at,
        }
        lines.append(line)
        if on_answer is not None:
            on_answer(line)
    return lines


def prompt_of(task: tasks.Task, tokenizer: Tokenizer, *, is_chat: bool) -> list[int]:
    """A task as tokens that the answer follows."""
    asked = f"{task.text}\n\n{task.question}"
    if not is_chat:
        return tokenizer.encode(f"{asked}\n\n{task.beginning}".encode()).tolist()
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise ValueError("the model was not trained to chat: leave out --chat")
    opening = tokenizer.encode_chat([{"role": "user", "content": asked}])
    begun = tokenizer.encode(task.beginning.encode(), is_start=False)
    return [*opening.tolist(), *begun.tolist()]


def sentences_of(text: str) -> tuple[str, ...]:
    """A text cut behind its sentences.

    Raises:
      ValueError: it has none.
    """
    found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    kept = tuple(sentence for sentence in found if sentence)
    if not kept:
        raise ValueError("the text around the needles is empty")
    return kept


def draw(lines: Sequence[dict[str, Any]], label: str) -> Figure:
    """Mean scores by context and depth as a heat map."""
    contexts = sorted({line["context"] for line in lines})
    depths = sorted({line["depth"] for line in lines}, key=str)
    scores = np.array(
        [
            [
                np.mean(
                    [
                        line["score"]
                        for line in lines
                        if (line["context"], line["depth"]) == (context, depth)
                    ]
                )
                for context in contexts
            ]
            for depth in depths
        ]
    )
    figure = Figure(
        figsize=(2.5 + 0.9 * len(contexts), 1.6 + 0.45 * len(depths)),
        layout="constrained",
    )
    axes = figure.subplots()
    image = axes.imshow(scores, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set(xlabel="context, tokens", title=f"{lines[0]['kind']}: {label}")
    if lines[0]["kind"] == "needle":
        axes.set_ylabel("depth of the needle")
    for (row, column), score in np.ndenumerate(scores):
        style = {"color": "black" if 0.2 < score < 0.8 else "white", "fontsize": 8}
        axes.text(column, row, f"{score:.2f}", ha="center", va="center", **style)
    figure.colorbar(image, label="share of answers found")
    return figure
