"""`python -m benchmarks.capture --run RUN --tokens N --out FILE.npz`: real attention.

Runs a trained model over N tokens of its held-out text and stores what one layer's
attention gets, as `files.captured` keeps it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hsrjax
from benchmarks.files.captured import Captured, save
from models.command import carry_out
from models.files.runs import load_run, read_run_config
from models.network.operands import Operands, as_relu, attention_operands
from models.network.transformer import Transformer
from train.data import load_corpus, split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Stores queries, keys, values and thresholds of one layer of a trained model.

    For example:

        python -m benchmarks.capture --run runs/mine --out runs/captured.npz
    """

    run: Path
    """Run folder of python -m train."""
    out: Path
    """File to write, .npz."""
    tokens: int = 4096
    """Tokens of held-out text, read as one sequence."""
    layer: int = -1
    """Which layer; negative counts from the last."""
    data: str = ""
    """Text file or folder, where it is no longer where the run found it."""

    def __post_init__(self) -> None:
        """Refuses values that cannot work, in one sentence."""
        if self.tokens < 1:
            raise ValueError(f"tokens must be 1 or more, got {self.tokens}")
        if self.out.suffix != ".npz":
            raise ValueError(f"out must end in .npz, got {self.out.name}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: instead of those of the process.

    Returns:
      Exit status: 0 done, 2 refused, 130 Ctrl-C.
    """

    def work(command: Command) -> None:
        model = load_run(command.run)
        tokens, source = held_out(command)
        captured = capture(model, tokens, layer=command.layer)
        captured.about.update(source, layer=_layer(model, command.layer))
        save(command.out, captured)
        shape = "x".join(map(str, captured.query.shape[1:]))
        print(f"{command.out}: queries of shape {shape}")

    return carry_out(Command, arguments, work, prog="python -m benchmarks.capture")


def held_out(command: Command) -> tuple[np.ndarray, dict[str, Any]]:
    """The first tokens of a run's held-out text, and where they come from."""
    _, options = read_run_config(command.run)
    try:
        path, length = options["data"], options["row_length"]
        known = options["corpus"]["sha256"]
    except (KeyError, TypeError):
        raise ValueError(
            f"{command.run} does not say what it was trained on: give a folder that "
            "python -m train wrote"
        ) from None
    corpus = load_corpus(command.data or path)
    if corpus.sha256 != known:
        raise ValueError(
            f"the text {corpus.name} is not the one that {command.run} was trained on, "
            "so its held-out part is not held out: give the same text with --data"
        )
    _, rows = split(corpus, row_length=length)
    wanted = -(-command.tokens // (length + 1))
    text = rows[np.arange(min(wanted, len(rows)))].reshape(-1)[: command.tokens]
    if text.size < command.tokens:
        raise ValueError(
            f"the held-out text has {text.size} tokens, fewer than the "
            f"{command.tokens} asked for: give smaller --tokens"
        )
    return text, {"corpus_sha256": known, "tokens": command.tokens}


def capture(model: Transformer, tokens: np.ndarray, *, layer: int) -> Captured:
    """What the attention of a layer gets.

    Args:
      model: any transformer.
      tokens: integers [T].
      layer: which; negative counts from the last.
    """
    (captured,) = layers(model, tokens, (_layer(model, layer),))
    return captured


def layers(
    model: Transformer, tokens: np.ndarray, which: Sequence[int]
) -> list[Captured]:
    """What the attention of several layers gets, from one reading.

    Args:
      model: any transformer.
      tokens: integers [T].
      which: layers, from 0 on.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, tokens):
        found = attention_operands(nnx.merge(graph, state), tokens)
        return [as_relu(found[layer]) for layer in which]

    found = run(state, jnp.asarray(tokens, jnp.int32)[None])
    return [_captured(model, operands) for operands in found]


def _captured(model: Transformer, operands: Operands) -> Captured:
    *arrays, activation = operands
    query, key, value = map(np.asarray, arrays)
    about = {"attention_kind": model.config.attention_kind}
    if isinstance(activation, hsrjax.ReLU):
        about |= {"power": activation.power, "normalize": activation.normalize}
        return Captured(query, key, value, np.asarray(activation.bias), about)
    about |= {"power": model.config.relu_power, "normalize": "row_sum"}
    return Captured(query, key, value, None, about)


def _layer(model: Transformer, layer: int) -> int:
    layers = model.config.num_layers
    if not -layers <= layer < layers:
        raise ValueError(f"layer must lie between 0 and {layers - 1}, got {layer}")
    return layer % layers


if __name__ == "__main__":
    sys.exit(main())
