"""A softmax model of ours as a folder that `transformers` loads as LlamaForCausalLM.

`load_pretrained` reads it back.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from models.files import mapping, release, vocabulary
from models.files.atomic import write_atomic
from models.files.runs import CONFIG_FILE, by_name, model_item
from models.network.config import ModelConfig
from models.network.transformer import Transformer
from models.text.tokenizer import BPETokenizer, Tokenizer, byte_alphabet

MODEL_TYPE, ARCHITECTURE = "llama", "LlamaForCausalLM"
# Fields that are written, that say nothing of softmax, or that say how it is computed.
_ANY = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
_ANY += ("vocab_size", "rope_theta", "norm_eps", "tie_embeddings", "mlp_bias")
_ANY += ("relu_power", "threshold", "attention", "capacity", "top_r", "epsilon", "tail")
_ANY += ("dtype", "param_dtype")
# Fields with two ways to say the same, which are looked at one by one.
_RESOLVED = ("attention_kind", "value_dim", "rotary_dim", "qk_norm", "output_norm")
_RESOLVED += ("qkv_bias", "out_bias")


def is_llama(config: ModelConfig) -> bool:
    """Whether a model is a Llama: softmax, and nothing that Llama has not."""
    for field in dataclasses.fields(config):
        is_free = field.name in (*_ANY, *_RESOLVED)
        if not is_free and getattr(config, field.name) != field.default:
            return False
    return (
        config.attention_kind == "softmax"
        and config.value_size == config.turning_dim == config.head_dim
        and config.qkv_bias == config.out_bias
        and not (config.normalizes_heads or config.normalizes_output)
    )


def save_llama(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    row_length: int,
    train: dict[str, Any],
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Writes config.json, model.safetensors and the files of the tokenizer.

    Args:
      folder: made where it is missing.
      model: for which `is_llama` holds.
      tokenizer: of bytes or byte pairs.
      row_length: tokens that it was trained on at a time.
      train: kept in config.json, for people.
      dtype: of the stored values.

    Raises:
      ValueError: a value is not finite in that dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    variables = by_name(model_item(model))
    del variables["threshold_scale"]
    shapes = {name: leaf.shape for name, leaf in variables.items()}
    places = mapping.parts(config, mapping.HUGGING_FACE, shapes)
    stored = {part.name: part.store(variables[name]) for name, part in places.items()}
    release.write_weights(folder, stored, dtype=dtype, layout="pt")
    fields = config_fields(config, row_length=row_length, dtype=dtype)
    about = {"hsrjax": {"model": config.to_dict(), "train": train}}
    _write(folder / CONFIG_FILE, fields | about)
    _tokenizer_of(tokenizer).save(str(folder / vocabulary.FILE))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"model_max_length": row_length, "clean_up_tokenization_spaces": False}
    _write(folder / "tokenizer_config.json", settings)


def config_fields(
    config: ModelConfig, *, row_length: int, dtype: str
) -> dict[str, Any]:
    """A Llama's config.json, the inverse of `models.files.families.model_config`."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": row_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        # No token begins or ends a text; Llama's own defaults are 1 and 2.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }


def _tokenizer_of(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """As the `tokenizers` package has it; bytes are pairs that were never merged."""
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.inner
    alphabet = {character: byte for byte, character in byte_alphabet().items()}
    inner = tokenizers.Tokenizer(models.BPE(alphabet, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=2) + "\n")
