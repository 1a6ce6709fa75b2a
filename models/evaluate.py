"""What a model can do, measured: `python -m models.evaluate TASK --model PATH`.

Tasks: perplexity. `python -m models.evaluate TASK --help` lists a task's options.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from models.command import carry_out
from models.load import write_atomic
from models.opening import attending, open_model
from models.perplexity import Perplexity, perplexity, rows_of, table

TASKS = ("perplexity",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Reads a text, every token predicted from those before it, and reports the loss.

    With several values of --r or --epsilon, one line for each.
    """

    model: str
    """Folder of `python -m train`, folder of Hugging Face, or .gguf file."""
    text: Path
    """Text file (UTF-8)."""
    context: int = 2048
    """Tokens per row; each row is read on its own."""
    rows: int | None = None
    """Rows to read at most, the first ones; None is the whole text."""
    attention: Literal["dense", "hsr", "auto", "top_r", "epsilon"] = "auto"
    """The first three give the same loss; top_r and epsilon approximate softmax."""
    r: tuple[int, ...] = (64,)
    """With --attention top_r: keys kept per query."""
    epsilon: tuple[float, ...] = (1e-3,)
    """With --attention epsilon: largest share of the softmax mass left out."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the computation; None is the run's own, or float32."""
    out: Path | None = None
    """Folder for perplexity.csv and heads.csv, what every head did."""
    json: bool = False
    """End with one line on stdout that holds the results as JSON."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: instead of those of the process.

    Returns:
        Exit status: 0 done, 2 refused, 130 Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["--help"], ["-h"]):
        print((__doc__ or "").strip())
        return 0
    if not words or words[0] not in TASKS:
        wanted = f"no task is called {words[0]}" if words else "no task was named"
        print(
            f"error: {wanted}: choose from {', '.join(TASKS)} "
            "(see python -m models.evaluate --help)",
            file=sys.stderr,
        )
        return 2
    return carry_out(
        Measured,
        words[1:],
        _measure_all,
        prog=f"python -m models.evaluate {words[0]}",
    )


def _measure_all(command: Measured) -> None:
    text = _read(command.text)
    opened = open_model(command.model, dtype=command.dtype)
    rows = rows_of(
        opened.tokenizer.encode(text), context=command.context, limit=command.rows
    )
    values: dict[str, tuple[Any, ...]] = {"top_r": command.r}
    values["epsilon"] = command.epsilon
    summaries, heads = [], []
    for value in values.get(command.attention, (None,)):
        limited = {} if value is None else {"r": int(value), "epsilon": value}
        model = attending(opened.model, command.attention, **limited)
        label = _label(command.attention, value)
        started = time.perf_counter()
        with tqdm(total=len(rows), desc=label, unit="row", file=sys.stderr) as bar:
            losses: list[float] = []

            def show(
                loss: np.ndarray, bar: tqdm = bar, losses: list[float] = losses
            ) -> None:
                losses.append(float(loss.mean()))
                bar.set_postfix_str(f"perplexity {np.exp(np.mean(losses)):.4g}")
                bar.update()

            found = perplexity(
                model, rows, token_bytes=opened.tokenizer.token_bytes, on_row=show
            )
        seconds = time.perf_counter() - started
        summaries.append({"attention": label, **found.summary(), "seconds": seconds})
        heads += [{"attention": label, **line} for line in table(found)]
        print(_sentence(label, found))
    if command.out is not None:
        command.out.mkdir(parents=True, exist_ok=True)
        _write_csv(command.out / "perplexity.csv", summaries)
        _write_csv(command.out / "heads.csv", heads)
    if command.json:
        about = {"model": command.model, "text": str(command.text)}
        about |= {"context": command.context, "rows": len(rows)}
        print(json.dumps(about | {"results": summaries}))


def _label(attention: str, value: float | None) -> str:
    return attention if value is None else f"{attention} {value:g}"


def _sentence(label: str, found: Perplexity) -> str:
    numbers = found.summary()
    bounded = f", at most {numbers['missed_mass_bound']:.2%} of the mass left out"
    return (
        f"{label}: perplexity {numbers['perplexity']:.4f} over {numbers['tokens']:,} "
        f"tokens, {numbers['bits_per_byte']:.4f} bits per byte; keys looked at "
        f"{numbers['keys_looked_at']:.2%}, fired {numbers['keys_fired']:.2%}"
        + (bounded if numbers["missed_mass_bound"] else "")
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give a text file with --text"
        ) from error


def _write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    written = io.StringIO()
    writer = csv.DictWriter(written, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(path, written.getvalue())


if __name__ == "__main__":
    sys.exit(main())
