"""Models of others, as this transformer: Hugging Face folders and GGUF files.

`load_pretrained` reads config, weights and tokenizer; every check comes before the
first tensor, and tensors are read one at a time, so that memory holds the model once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from models.files import mapping
from models.files.families import gguf_fields, model_config
from models.files.gguf_file import GGUFFile
from models.files.runs import ModelFileError, by_name, model_item, restore_model
from models.files.stored import SafetensorsFolder, Stored, inside, read_json
from models.files.vocabulary import from_folder, from_gguf
from models.network.config import ComputeDtype
from models.network.transformer import Transformer, abstract_model
from models.text.tokenizer import PretrainedTokenizer

CONFIG = "config.json"
_BAR: dict[str, Any] = {"unit": "tensor", "delay": 2, "leave": False, "disable": None}
# Variables that no other model has.
_OURS = ("threshold_scale",)
_INTERLEAVED = ("llama", "smollm3")
# Stored beside the parameters by some exporters, and computed here.
_IGNORED = ("rotary_emb.inv_freq", "rope_freqs.weight")
_IGNORED += ("rope_factors_long.weight", "rope_factors_short.weight")


class Pretrained(NamedTuple):
    """What a published model consists of.

    Attributes:
      model: softmax attention, dense unless told otherwise.
      tokenizer: None where the folder has none.
    """

    model: Transformer
    tokenizer: PretrainedTokenizer | None


def load_pretrained(path: Path, *, dtype: ComputeDtype = "float32") -> Pretrained:
    """Loads a softmax model that was trained elsewhere, and its tokenizer.

    Args:
      path: a folder with config.json and safetensors files, or a .gguf file.
      dtype: of the parameters and the computation.

    Returns:
      The model, every value checked finite, and the tokenizer.

    Raises:
      ModelFileError: a file is missing, damaged, hostile or of another architecture;
        the message names file and field.
    """
    try:
        source = _open(path)
        config = model_config(source.fields, dtype=dtype)
        shapes = source.stored.shapes()
        if config.num_layers > len(shapes):
            raise ValueError(
                f"the config has {config.num_layers} layers and the weights "
                f"{len(shapes)} tensors"
            )
        tokenizer = source.tokenizer(vocab_size=config.vocab_size)
        item = model_item(abstract_model(config))
        variables = {name: x for name, x in by_name(item).items() if name not in _OURS}
        places = mapping.parts(
            config,
            source.names,
            {name: leaf.shape for name, leaf in variables.items()},
            fused=source.fields["model_type"] == "phi3",
            interleaved=source.interleaved,
        )
        head = source.names.top["head.kernel"]
        _check(places, shapes, unused={head} if config.tie_embeddings else set())
        filled = {name: jnp.ones((), jnp.float32) for name in _OURS}
        bar = tqdm(variables.items(), desc=f"loading {path.name}", **_BAR)
        for name, leaf in bar:
            filled[name] = _read(places[name], source.stored, leaf)
        leaves = [filled[name] for name in by_name(item)]
        full = jax.tree.unflatten(jax.tree.structure(item), leaves)
        return Pretrained(restore_model(config, full), tokenizer)
    except ValueError as error:
        raise ModelFileError(f"{path} cannot be loaded: {error}") from error


class _Source(NamedTuple):
    """What a file format says, in one form.

    Attributes:
      fields: as in a Hugging Face config.json.
      stored: the tensors.
      names: of the tensors.
      interleaved: halves of query and key heads are.
      tokenizer: makes it for a vocabulary of so many tokens.
    """

    fields: Any
    stored: Stored
    names: mapping.Names
    interleaved: bool
    tokenizer: Callable[..., PretrainedTokenizer | None]


def _open(path: Path) -> _Source:
    if path.is_file():
        file = GGUFFile(path)
        fields = gguf_fields(file.fields, file)
        interleaved = fields["model_type"] in _INTERLEAVED
        tokenizer = functools.partial(from_gguf, file.fields)
        return _Source(fields, file, mapping.GGUF, interleaved, tokenizer)
    fields, stored = read_json(inside(path, CONFIG)), SafetensorsFolder(path)
    tokenizer = functools.partial(from_folder, path)
    return _Source(fields, stored, mapping.HUGGING_FACE, False, tokenizer)


def _check(
    places: dict[str, mapping.Part],
    shapes: dict[str, tuple[int, ...]],
    *,
    unused: set[str],
) -> None:
    """Raises ValueError unless the file holds what the config needs, and no more."""
    needed = {part.name: part.stored_shape for part in places.values()}
    ignored = unused | {name for name in shapes if name.endswith(_IGNORED)}
    missing = sorted(needed.keys() - shapes.keys())
    unknown = sorted(shapes.keys() - needed.keys() - ignored)
    if missing or unknown:
        raise ValueError(
            f"missing tensors {missing[:3]} ({len(missing)} in all), unknown tensors "
            f"{unknown[:3]} ({len(unknown)} in all)"
        )
    for name, shape in needed.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{name} has the shape {list(shapes[name])} where the config needs "
                f"{list(shape)}"
            )


def _read(part: mapping.Part, stored: Stored, leaf: Any) -> jax.Array:
    """One variable, converted on the way and checked."""
    rows = part.arrange(stored.read(part.name, part.start, part.rows), leaf.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = rows.astype(leaf.dtype, order="C", copy=False)
    if not np.isfinite(rows).all():
        raise ValueError(f"{part.name} is not finite in {leaf.dtype}")
    return jnp.asarray(rows)
