"""The text and the model of the experiments on real attention."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from benchmarks.common import Basics
from models.opening import Opened, open_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(Basics):
    """Options of what reads a text with a model."""

    model: Path
    """A .gguf file, Hugging Face folder, run folder or released model; softmax."""
    text: Path | None = None
    """Text file (UTF-8); None is the documentation that Python carries (pydoc)."""


def read(command: Reading) -> tuple[Opened, np.ndarray, dict[str, str]]:
    """The model, the tokens i32[n] of the whole text, and what they are.

    Raises:
      ValueError: files that cannot be read, or attention that is not softmax.
    """
    if command.text is None:
        text = "\n\n".join(topics.values()).encode()
    else:
        text = command.text.read_bytes()
    opened = open_model(command.model)
    kind = opened.model.config.attention_kind
    if kind != "softmax":
        raise ValueError(
            f"{command.model} attends by {kind}, and the paper's claims are about "
            "softmax: give a softmax model"
        )
    about = {
        "model": command.model.name,
        "text": command.text.name if command.text else "pydoc_data.topics",
        "text_sha256": hashlib.sha256(text).hexdigest(),
    }
    return opened, np.asarray(opened.tokenizer.encode(text), np.int32), about


def pieces(
    tokens: np.ndarray, *, length: int, number: int, seed: int
) -> list[np.ndarray]:
    """Stretches of a text, evenly apart, the first at a place the seed chooses.

    Raises:
      ValueError: the text is shorter than one of them.
    """
    room = tokens.size - length
    if room < 0:
        raise ValueError(
            f"the text has {tokens.size:,} tokens, fewer than the {length:,} needed: "
            "give smaller sizes or another --text"
        )
    first = int(np.random.default_rng(seed).integers(room // number + 1))
    starts = [first + i * room // number for i in range(number)]
    return [tokens[start : start + length] for start in starts]
