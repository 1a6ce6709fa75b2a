"""`python -m train export RUN --out DIR`: a trained model as files to hand on.

Writes config.json, model.safetensors, tokenizer.json for BPE, and a model card. A
softmax model that is a Llama is written as one, for `transformers` and others.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Literal

import jax
import tyro
from flax import nnx

from models.command import JsonOption
from models.files import vocabulary
from models.files.atomic import write_atomic
from models.files.llama import is_llama, save_llama
from models.files.release import WEIGHTS
from models.files.runs import load_run, read_run_config, save_release
from models.files.vocabulary import load_tokenizer
from train.files.card import card
from train.files.metrics import evaluated, read_metrics


@dataclasses.dataclass(frozen=True)
class Command(JsonOption):
    """Writes a trained model as config.json, model.safetensors and a model card.

    A softmax model is written as LlamaForCausalLM where it is one.

    For example:

        python -m train export runs/mine --out my-model
    """

    run: tyro.conf.Positional[Path]
    """Run folder."""
    out: Path
    """Folder to write."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored values; float16 halves the file."""
    name: str = ""
    """Of the model, for the card; the run folder's name if left out."""


def work(command: Command) -> None:
    """Writes the folder and says so."""
    size = export(command)
    print(f"{command.out}: {size / 1e6:.1f} MB")
    command.print_json({"out": str(command.out), "bytes": size})


def export(command: Command) -> int:
    """Writes the folder; returns the size of the weights in bytes.

    Raises:
        ValueError: the run cannot be loaded, or the folder holds something else.
    """
    run, out = command.run, command.out
    if out.exists() and any(out.iterdir()) and not (out / WEIGHTS).exists():
        raise ValueError(f"{out} holds other files: give an empty or new folder")
    model = load_run(run)
    _, options = read_run_config(run)
    last = evaluated(read_metrics(run))[-1]
    as_llama = is_llama(model.config)
    if as_llama:
        tokenizer = load_tokenizer(run, vocab_size=model.config.vocab_size)
        length = options["row_length"]
        kept = {"row_length": length, "train": options, "dtype": command.dtype}
        save_llama(out, model, tokenizer, **kept)
    else:
        save_release(out, model, train=options, dtype=command.dtype)
        if (run / vocabulary.FILE).exists():
            shutil.copyfile(run / vocabulary.FILE, out / vocabulary.FILE)
    params = nnx.state(model, nnx.Param)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    text = card(
        command.name or run.name,
        model=model.config.to_dict(),
        options=options,
        last=last,
        parameters=parameters,
        is_llama=as_llama,
    )
    write_atomic(out / "README.md", text)
    return (out / WEIGHTS).stat().st_size
