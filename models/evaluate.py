"""What a model can do, measured: `python -m models.evaluate TASK --model PATH`.

perplexity  how well it predicts a text, with any attention
needle      whether it finds a fact in a long text, by length and depth
variables   whether it follows a chain of assignments through one
words       whether it sees which words of a long list come back most often
harness     tasks of lm-evaluation-harness (pip install lm-eval)

For example:

    python -m models.evaluate perplexity --model runs/mine --text book.txt
    python -m models.evaluate needle --model SmolLM2.gguf --chat --contexts 1024 4096

`python -m models.evaluate TASK --help` lists a task's options.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from models.command import did_you_mean, exit_status, parse
from models.compilation import keep_programs
from models.evaluation import harness, retrieval, tasks
from models.evaluation.perplexity import Perplexity, perplexity, rows_of, table
from models.files.atomic import write_atomic
from models.network.transformer import Transformer
from models.opening import ModelOptions, attending, open_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """What every task is told."""

    r: tuple[int, ...] = (64,)
    """With --attention top_r: keys kept per query; several are measured in turn."""
    epsilon: tuple[float, ...] = (1e-3,)
    """With --attention epsilon: largest share of the mass left out; likewise."""
    out: Path | None = None
    """Folder for the tables and plots."""

    def attended(self, model: Transformer) -> Iterator[tuple[str, Transformer]]:
        """The model under each attention that was asked for, with its name."""
        limits = {"top_r": self.r, "epsilon": self.epsilon}.get(self.attention)
        if limits is None:
            yield self.attention, attending(model, self.attention, tail=self.tail)
        for limit in limits or ():
            name = "r" if self.attention == "top_r" else "epsilon"
            options = {name: limit, "tail": self.tail}
            limited = attending(model, self.attention, **options)
            label = f"{self.attention} {limit:g}"
            yield label if self.tail is None else f"{label} tail {self.tail}", limited


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read(Options):
    """Reads a text, every token predicted from those before it, and reports the loss.

    With --out, perplexity.csv has a line for each attention and heads.csv what every
    head did.

    For example:

        python -m models.evaluate perplexity --model runs/mine --text book.txt
    """

    text: Path
    """Text file (UTF-8)."""
    context: int = 2048
    """Tokens per row; each row is read on its own."""
    rows: int | None = None
    """Rows to read at most, the first ones; None is the whole text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask(Options):
    """Asks about long texts whose answers are known, and counts those that are found.

    With --out, TASK.csv has a line for each question and TASK-ATTENTION.png is a map of
    the scores by length (and depth). The tasks are needle, variables and words.

    For example:

        python -m models.evaluate needle --model SmolLM2.gguf --contexts 1024 4096
    """

    contexts: tuple[int, ...] = (512, 1024, 2048)
    """Tokens of question and answer together."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle is, from 0 (the beginning) to 1 (the end)."""
    samples: int = 3
    """Questions for each context and depth."""
    seed: int = 0
    """Of the first question; the others follow."""
    max_tokens: int = 32
    """Tokens of an answer."""
    chat: bool = False
    """Ask by the model's chat template."""
    text: Path | None = None
    """Text whose sentences surround needles and variables; None is a filler."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harness(Options):
    """Runs tasks of lm-evaluation-harness, the package lm-eval, which has to be there.

    The package downloads the questions. With --out, harness.csv has a line for each
    attention, task and metric.

    For example:

        python -m models.evaluate harness --model runs/mine --tasks arc_easy --limit 100
    """

    tasks: tuple[str, ...]
    """Names of tasks, as `lm-eval ls tasks` lists them."""
    num_fewshot: int | None = None
    """Answered questions before each; None is the task's own number."""
    limit: int | None = None
    """Questions of each task at most, the first ones; None is all."""
    max_length: int = 2048
    """Tokens of a context and its continuation; longer ones lose their beginning."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: instead of those of the process.

    Returns:
        Exit status: 0 done, 1 failed while running, 2 refused, 130 Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    keep_programs()
    return exit_status(functools.partial(_run, words), doing="evaluation")


def _run(words: list[str]) -> None:
    if words[:1] in (["--help"], ["-h"]):
        print((__doc__ or "").strip())
        return
    task = words[0] if words else ""
    if task not in _TASKS:
        wanted = f"no task is called {task}" if words else "no task was named"
        raise ValueError(
            f"{wanted}: {did_you_mean(task, _TASKS)}choose from {', '.join(_TASKS)} "
            "(see python -m models.evaluate --help)"
        )
    kind, work = _TASKS[task]
    work(parse(kind, words[1:], prog=f"python -m models.evaluate {words[0]}"))


def _read_text(options: Read) -> None:
    text = _bytes_of(options.text)
    opened = open_model(options.model, dtype=options.dtype)
    rows = rows_of(
        opened.tokenizer.encode(text), context=options.context, limit=options.rows
    )
    lines, heads = [], []
    for label, model in options.attended(opened.model):
        started = time.perf_counter()
        with tqdm(total=len(rows), desc=label, unit="row", file=sys.stderr) as bar:
            found = perplexity(
                model,
                rows,
                token_bytes=opened.tokenizer.token_bytes,
                on_row=functools.partial(_show_loss, bar, []),
            )
        seconds = time.perf_counter() - started
        lines.append({"attention": label, **found.summary(), "seconds": seconds})
        heads += [{"attention": label, **line} for line in table(found)]
        print(_sentence(label, found))
    if options.out is not None:
        _write_csv(options.out, "perplexity", lines)
        _write_csv(options.out, "heads", heads)
    about = {"model": options.model, "text": str(options.text)}
    about |= {"context": options.context, "rows": len(rows)}
    options.print_json(about | {"results": lines})


def _ask(kind: str, options: Ask) -> None:
    plan = retrieval.Plan(
        kind=kind,
        contexts=options.contexts,
        depths=options.depths,
        samples=options.samples,
        seed=options.seed,
        max_tokens=options.max_tokens,
        is_chat=options.chat,
        haystack=() if options.text is None else _sentences_of(options.text),
    )
    opened = open_model(options.model, dtype=options.dtype)
    lines, scores = [], {}
    for label, model in options.attended(opened.model):
        total = len(plan.cells)
        with tqdm(total=total, desc=label, unit="question", file=sys.stderr) as bar:
            found = retrieval.ask(
                model,
                opened.tokenizer,
                plan,
                on_answer=functools.partial(_show_score, bar, []),
            )
        lines += [{"attention": label, **line} for line in found]
        scores[label] = float(np.mean([line["score"] for line in found]))
        print(f"{label}: {scores[label]:.1%} of the answers found")
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            figure = retrieval.draw(found, label)
            name = label.replace(" ", "-")
            figure.savefig(options.out / f"{kind}-{name}.png", dpi=120)
    if options.out is not None:
        _write_csv(options.out, kind, lines)
    options.print_json({"model": options.model, "scores": scores, "results": lines})


def _harness(options: Harness) -> None:
    opened = open_model(options.model, dtype=options.dtype)
    asked = {"num_fewshot": options.num_fewshot, "limit": options.limit}
    lines = []
    for label, model in options.attended(opened.model):
        with tqdm(desc=label, unit="request", file=sys.stderr) as bar:
            lm = harness.as_lm(
                model,
                opened.tokenizer,
                max_length=options.max_length,
                on_answer=bar.update,
            )
            found = harness.evaluate(lm, options.tasks, **asked)
        for task, numbers in found.items():
            about = {"attention": label, "task": task}
            lines += [about | {"metric": x, "value": y} for x, y in numbers.items()]
            shown = ", ".join(f"{x} {y:.4g}" for x, y in numbers.items())
            print(f"{label}: {task}: {shown}")
    if options.out is not None and lines:
        _write_csv(options.out, "harness", lines)
    options.print_json({"model": options.model, "results": lines})


def _show_loss(bar: tqdm, losses: list[float], loss: np.ndarray) -> None:
    losses.append(float(loss.mean()))
    bar.set_postfix_str(f"perplexity {np.exp(np.mean(losses)):.4g}")
    bar.update()


def _show_score(bar: tqdm, scores: list[float], line: dict[str, Any]) -> None:
    scores.append(line["score"])
    bar.set_postfix_str(f"found {np.mean(scores):.1%}")
    bar.update()


def _sentence(label: str, found: Perplexity) -> str:
    numbers = found.summary()
    bounded = f", at most {numbers['missed_mass_bound']:.2%} of the mass left out"
    return (
        f"{label}: perplexity {numbers['perplexity']:.4f} over {numbers['tokens']:,} "
        f"tokens, {numbers['bits_per_byte']:.4f} bits per byte; keys looked at "
        f"{numbers['keys_looked_at']:.2%}, fired {numbers['keys_fired']:.2%}"
        + (bounded if numbers["missed_mass_bound"] else "")
    )


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give a text file with --text"
        ) from error


def _sentences_of(path: Path) -> tuple[str, ...]:
    return retrieval.sentences_of(_bytes_of(path).decode("utf-8", "replace"))


def _write_csv(folder: Path, name: str, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    written = io.StringIO()
    writer = csv.DictWriter(written, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(folder / f"{name}.csv", written.getvalue())


_TASKS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "perplexity": (Read, _read_text),
    **{kind: (Ask, functools.partial(_ask, kind)) for kind in tasks.KINDS},
    "harness": (Harness, _harness),
}


if __name__ == "__main__":
    sys.exit(main())
