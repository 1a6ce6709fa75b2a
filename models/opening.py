"""Any model by its path: a run or release, a Hugging Face folder, a GGUF file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple, cast

from models.config import ComputeDtype, Method
from models.load import CONFIG_FILE, FORMAT, ModelFileError, load_run
from models.pretrained import load_pretrained
from models.tokenizer import Tokenizer, load_tokenizer
from models.transformer import Transformer, with_attention, with_config


class Opened(NamedTuple):
    """A model and what turns text into its tokens.

    Attributes:
      model: as it was trained; `with_attention` computes it otherwise.
      tokenizer: of its vocabulary.
    """

    model: Transformer
    tokenizer: Tokenizer


def open_model(path: str | Path, *, dtype: ComputeDtype | None = None) -> Opened:
    """Loads whatever lies there.

    Args:
      path: a folder that `python -m train` or `python -m train export` wrote, a Hugging
        Face folder, or a .gguf file.
      dtype: of the computation, and of the parameters of published models; None is the
        run's own, or float32.

    Raises:
      ModelFileError: files are missing, damaged or of something else.
      TokenizerError: likewise for the tokenizer's.
    """
    path = Path(path)
    if is_published(path):
        model, tokenizer = load_pretrained(path, dtype=dtype or "float32")
        if tokenizer is None:
            raise ModelFileError(
                f"{path} holds no tokenizer.json, which text needs; copy it there from "
                "where the model came from."
            )
        return Opened(model, tokenizer)
    model = load_run(path)
    if dtype is not None:
        model = with_config(model, dataclasses.replace(model.config, dtype=dtype))
    return Opened(model, load_tokenizer(path, vocab_size=model.config.vocab_size))


def attending(
    model: Transformer,
    attention: str,
    *,
    r: int = 64,
    epsilon: float = 1e-3,
    tail: int | None = None,
) -> Transformer:
    """The model under an attention of the command line.

    Raises:
      ValueError: an approximation of softmax, and the model is of another kind; or a
        tail, and nothing is left out.
    """
    if attention not in ("top_r", "epsilon"):
        if tail is not None:
            raise ValueError(
                f"--tail {tail} is what keys left out contribute, and --attention "
                f"{attention} leaves out none: use --attention top_r or epsilon."
            )
        return with_attention(model, cast(Method, attention))
    if model.config.attention_kind != "softmax":
        raise ValueError(
            f"--attention {attention} approximates softmax attention and the model "
            f"has attention_kind={model.config.attention_kind!r}, which is sparse and "
            "exact already; use --attention hsr."
        )
    if attention == "top_r":
        return with_attention(model, "hsr", top_r=r, tail=tail)
    return with_attention(model, "hsr", epsilon=epsilon, tail=tail)


def is_published(path: Path) -> bool:
    """Whether a path is a file, or a folder whose config.json is Hugging Face's."""
    if path.is_file():
        return True
    try:
        content = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return (
        isinstance(content, dict)
        and content.get("format") != FORMAT
        and "model_type" in content
    )
