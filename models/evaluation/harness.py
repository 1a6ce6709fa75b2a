"""Any model under lm-evaluation-harness, whose tasks are those that others report.

The package lm-eval is optional; it asks for the likelihood of continuations, and for
texts to be continued. It is imported when it is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from models.decoding.generation import generate
from models.decoding.session import bucket
from models.evaluation.perplexity import read_row
from models.network.transformer import Transformer, with_length
from models.text.tokenizer import Tokenizer

_SHORTEST_ROW = 32
_DRAWN = 256  # tokens where a task does not say how many


class HarnessModel:
    """A model and its tokenizer with the methods of `lm_eval.api.model.LM`.

    Args:
      model: any transformer; `with_attention` says how it attends.
      tokenizer: of its vocabulary.
      max_length: tokens of a context and its continuation; longer ones lose their
        beginning.
      on_answer: called after each request.

    Example:
      >>> lm = as_lm(model, tokenizer)  # doctest: +SKIP
      >>> lm_eval.simple_evaluate(lm, tasks=["arc_easy"])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_length: int = 2048,
        on_answer: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self._on_answer = max_length, on_answer

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of continuations: nats, and whether each token was the most probable.

        Args:
          requests: `args` of each are a context and its continuation.
        """
        return [self._likelihood(*request.args) for request in self._each(requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of whole texts, in nats; a long one is read in rows that do not overlap.

        Args:
          requests: `args` of each is a text.
        """
        found = []
        for request in self._each(requests):
            tokens = self._encode(request.args[0], is_start=False)
            pieces = range(0, len(tokens), self.max_length - 1)
            total = 0.0
            for start in pieces:
                seen = tokens[start - 1 : start] if start else self._first()
                piece = tokens[start : start + self.max_length - 1]
                total += self._score(seen, piece)[0]
            found.append(total)
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continues texts up to a text that ends them.

        Args:
          requests: `args` of each are a context and what is asked of its continuation:
            until, max_gen_toks, and the ways of sampling.
        """
        return [self._continue(*request.args) for request in self._each(requests)]

    def _each(self, requests: Sequence[Any]) -> Iterable[Any]:
        for request in requests:
            yield request
            if self._on_answer is not None:
                self._on_answer()

    def _likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        # Spaces between the two belong to the word behind them.
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not kept:
            return self._score(
                self._first(), self._encode(continuation, is_start=False)
            )
        seen, both = self._encode(kept), self._encode(kept + continuation)
        return self._score(both[: len(seen)], both[len(seen) :])

    def _score(self, seen: list[int], said: list[int]) -> tuple[float, bool]:
        """Of tokens behind others."""
        said = said[-(self.max_length - 1) :]
        row = (seen + said)[-self.max_length :]
        padded = bucket(len(row), at_least=_SHORTEST_ROW) + 1
        model = with_length(self.model, len(row))
        found = read_row(model, np.pad(np.array(row, np.int32), (0, padded - len(row))))
        place = slice(len(row) - 1 - len(said), len(row) - 1)
        return -float(found.losses[place].sum()), bool(found.is_greedy[place].all())

    def _continue(self, context: str, asked: dict[str, Any]) -> str:
        until = asked.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        number = int(asked.get("max_gen_toks") or asked.get("max_tokens") or _DRAWN)
        warm = asked.get("temperature", 1.0) if asked.get("do_sample") else 0.0
        names = ("top_k", "top_p", "min_p")
        seen = self._encode(context) or self._first()
        drawn = generate(
            self.model,
            [seen[-max(1, self.max_length - number) :]],
            max_tokens=number,
            temperature=float(warm),
            **{name: asked[name] for name in names if asked.get(name)},
            stops=self.tokenizer.stops,
        ).tokens[0]
        text = self.tokenizer.decode(drawn).decode("utf-8", "replace")
        places = [text.find(end) for end in ends if end and end in text]
        return text[: min(places, default=len(text))]

    def _encode(self, text: str, *, is_start: bool = True) -> list[int]:
        """Tokens of a text, without the one that begins texts where it is none."""
        tokens = self.tokenizer.encode(text.encode()).tolist()
        begins = self.tokenizer.encode(b"").tolist()
        return tokens if is_start else tokens[len(begins) :]

    def _first(self) -> list[int]:
        """What is seen of nothing: the token that begins texts, or a new line."""
        begins = self.tokenizer.encode(b"").tolist()
        return begins or self.tokenizer.encode(b"\n").tolist()[-1:]


def as_lm(model: Transformer, tokenizer: Tokenizer, **options: Any) -> Any:
    """A `HarnessModel` that is an `lm_eval.api.model.LM` too.

    Raises:
      ValueError: lm-eval is not installed.
    """
    base = _lm_eval("lm_eval.api.model").LM
    return type("HsrjaxLM", (HarnessModel, base), {})(model, tokenizer, **options)


def evaluate(lm: Any, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    """What lm-evaluation-harness finds, by task and metric.

    Args:
      lm: from `as_lm`.
      tasks: by their names there; it downloads their questions.
      options: of `lm_eval.simple_evaluate`, as num_fewshot and limit.

    Raises:
      ValueError: lm-eval is not installed, or does not know a task.
    """
    harness = _lm_eval("lm_eval")
    try:
        found = harness.simple_evaluate(lm, tasks=list(tasks), **options)
    except KeyError as error:  # as it says that there is no such task
        raise ValueError(f"lm-eval has no task {error}") from error
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in numbers.items()
            if isinstance(value, (int, float))
        }
        for task, numbers in found["results"].items()
    }


def _lm_eval(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install lm-eval"
        ) from error
