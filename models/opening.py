"""Any model by its path, under any attention that a command line names.

A path is that of a run or release, a Hugging Face folder or a GGUF file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, cast

import tyro

from models.command import JsonOption, at_home
from models.files.foreign import refuse_foreign
from models.files.pretrained import load_pretrained
from models.files.runs import CONFIG_FILE, FORMAT, ModelFileError, load_run
from models.files.stored import read_json
from models.files.vocabulary import load_tokenizer
from models.network.config import ComputeDtype, Method
from models.network.transformer import Transformer, with_attention, with_config
from models.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(JsonOption):
    """What every command that opens a model is told."""

    model: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Folder of `python -m train` or its export, folder of Hugging Face, or .gguf file.
    Nothing is downloaded."""
    attention: Literal["dense", "hsr", "auto", "top_r", "epsilon"] = "auto"
    """The first three give the same results; top_r and epsilon approximate softmax."""
    tail: int | None = None
    """With these two: what is left out acts through sketches, its values as means of so
    many consecutive keys (1 to 32; 1 is the most exact)."""
    dtype: ComputeDtype | None = None
    """Of the computation; None is the run's own, or float32."""


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
    name, path = str(path), at_home(path)
    refuse_foreign(name, path)
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
        content = read_json(path / CONFIG_FILE)
    except ValueError:
        return False
    return (
        isinstance(content, dict)
        and content.get("format") != FORMAT
        and "model_type" in content
    )
