"""`python -m train export RUN --out DIR`: a trained model as files to hand on.

Writes config.json, model.safetensors, tokenizer.json for BPE, and a model card.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from flax import nnx

from models.command import JsonOption
from models.files import vocabulary
from models.files.atomic import write_atomic
from models.files.release import WEIGHTS
from models.files.runs import load_run, read_run_config, save_release
from train.files.metrics import evaluated, read_metrics


@dataclasses.dataclass(frozen=True)
class Command(JsonOption):
    """Writes a trained model as config.json, model.safetensors and a model card."""

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
    )
    write_atomic(out / "README.md", text)
    return (out / WEIGHTS).stat().st_size


def card(
    name: str,
    *,
    model: dict[str, Any],
    options: dict[str, Any],
    last: dict[str, float],
    parameters: int,
) -> str:
    """The model card, in Markdown.

    Args:
        name: of the model.
        model: fields of its config.
        options: of its training.
        last: the last line of metrics.csv with a held-out loss.
        parameters: how many.
    """
    corpus = options.get("corpus", {})
    tokens = options["steps"] * options["batch"] * options["row_length"]
    zeros = 100 * (1 - last["validation_nonzero_fraction"])
    heads = (
        f"{model['num_heads']} query and {model['num_kv_heads']} key/value heads of "
        f"{model['head_dim']}"
    )
    waits = options["threshold_schedule"] == "loss"
    rise = "rising while the loss falls" if waits else "rising linearly"
    return f"""# {name}

A {parameters / 1e6:.2f} M parameter language model with `{model["attention_kind"]}`
attention (ReLU to the power {model["relu_power"]}), trained by hsrjax.

| | |
|---|---|
| architecture | {model["num_layers"]} layers, width {model["embed_dim"]}, {heads} |
| tokens | {options.get("tokenizer", "bytes")}, vocabulary {model["vocab_size"]} |
| data | {corpus.get("name")}, {corpus.get("bytes"):,} bytes |
| training | {options["steps"]:,} steps of {options["batch"]} rows of \
{options["row_length"]:,} tokens ({tokens / 1e6:.1f} M tokens), seed {options["seed"]} |
| learning rate | {options["learning_rate"]:g}, AdamW, cosine |
| thresholds | from {options["threshold_start"]:g} to {options["threshold_end"]:g} \
times what the largest of so many unrelated cosines would be, {rise} |
| held-out loss | {last["validation_loss"]:.4f} nats per byte |
| zero attention scores | {zeros:.2f} % of the visible ones, on held-out rows |

    python -m models.generate --model FOLDER --prompt TEXT --attention hsr

`--attention dense` draws the same tokens; `hsr` looks at few of the keys.

## Limits

It has read nothing but the corpus above and is far too small to know anything: it
writes text that looks like that corpus, not text that is true or code that runs. It was
trained on rows of {options["row_length"]:,} tokens; how it fares beyond them was not
part of the training.
"""
