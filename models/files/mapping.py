"""Where each variable of the transformer lies in published checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from models.network.config import ModelConfig


class Part(NamedTuple):
    """Rows of a stored tensor; matrices are stored as [outputs, inputs].

    Attributes:
      name: of the stored tensor.
      start: first row.
      rows: how many.
      stored_shape: of the whole tensor.
      is_kernel: whether it is a matrix that is applied to a vector.
      heads: heads whose halves are interleaved for another way of turning (GGUF files
        of Llama), or 0.
    """

    name: str
    start: int
    rows: int
    stored_shape: tuple[int, ...]
    is_kernel: bool
    heads: int = 0

    def arrange(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """From rows as they are stored to a variable of `shape`."""
        if self.heads:
            paired = stored.reshape(self.heads, -1, 2, *stored.shape[1:])
            stored = paired.swapaxes(1, 2).reshape(stored.shape)
        return (stored.T if self.is_kernel else stored).reshape(shape)

    def store(self, variable: np.ndarray) -> np.ndarray:
        """The inverse of `arrange`, of a tensor that holds one variable whole."""
        if not self.is_kernel:
            return np.asarray(variable).reshape(self.stored_shape)
        return np.asarray(variable).reshape(self.stored_shape[::-1]).T


@dataclasses.dataclass(frozen=True)
class Names:
    """How a file format calls tensors.

    Attributes:
      top: names outside the layers, by our names.
      layer: prefix of a layer's tensors, with a place for its number.
      inside: names within a layer, without ".weight" and ".bias", by our names.
    """

    top: Mapping[str, str]
    layer: str
    inside: Mapping[str, str]


HUGGING_FACE = Names(
    top={
        "embed.embedding": "model.embed_tokens.weight",
        "final_norm.scale": "model.norm.weight",
        "head.kernel": "lm_head.weight",
    },
    layer="model.layers.{}.",
    inside={
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "attention.out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
        "qkv": "self_attn.qkv_proj",
        "gate_up": "mlp.gate_up_proj",
    },
)
GGUF = Names(
    top={
        "embed.embedding": "token_embd.weight",
        "final_norm.scale": "output_norm.weight",
        "head.kernel": "output.weight",
    },
    layer="blk.{}.",
    inside={
        "attention_norm": "attn_norm",
        "attention.query": "attn_q",
        "attention.key": "attn_k",
        "attention.value": "attn_v",
        "attention.query_norm": "attn_q_norm",
        "attention.key_norm": "attn_k_norm",
        "attention.out": "attn_output",
        "mlp_norm": "ffn_norm",
        "mlp.gate": "ffn_gate",
        "mlp.up": "ffn_up",
        "mlp.down": "ffn_down",
        "qkv": "attn_qkv",
        "gate_up": "ffn_up",
    },
)


def parts(
    config: ModelConfig,
    names: Names,
    variables: Mapping[str, tuple[int, ...]],
    *,
    fused: bool = False,
    interleaved: bool = False,
) -> dict[str, Part]:
    """Says for every variable of a model where a checkpoint keeps it.

    Args:
      config: the model's shape.
      names: of the file format.
      variables: shapes by our names, like "blocks.0.mlp.up.kernel".
      fused: queries, keys and values are one matrix, gate and up another (Phi-3).
      interleaved: halves of query and key heads are interleaved.

    Returns:
      A part for each variable.
    """
    wide = config.num_heads * config.head_dim
    narrow = config.num_kv_heads * config.head_dim
    together = {
        "attention.query": ("qkv", 0, wide + 2 * narrow),
        "attention.key": ("qkv", wide, wide + 2 * narrow),
        "attention.value": ("qkv", wide + narrow, wide + 2 * narrow),
        "mlp.gate": ("gate_up", 0, 2 * config.mlp_dim),
        "mlp.up": ("gate_up", config.mlp_dim, 2 * config.mlp_dim),
    }
    heads = {"attention.query": config.num_heads, "attention.key": config.num_kv_heads}
    found = {}
    for name, shape in variables.items():
        is_kernel = name.endswith(".kernel")
        rows, *inner = _stored_shape(name, shape)
        if name in names.top:
            full, start, stored_rows, swapped = names.top[name], 0, rows, 0
        else:
            _, layer, rest = name.split(".", 2)
            module, leaf = rest.rsplit(".", 1)
            start, stored_rows, stored = 0, rows, module
            if fused and module in together:
                stored, start, stored_rows = together[module]
            ending = ".bias" if leaf == "bias" else ".weight"
            full = names.layer.format(layer) + names.inside[stored] + ending
            swapped = heads.get(module, 0) if interleaved else 0
        stored_shape = (stored_rows, *inner)
        found[name] = Part(full, start, rows, stored_shape, is_kernel, swapped)
    return found


def _stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the stored tensor of a variable that has one to itself."""
    if name.endswith(".embedding"):
        return shape
    if not name.endswith(".kernel"):
        return (math.prod(shape),)
    # A kernel is [E, V], [E, N, H] or, back into the stream, [N, D, E].
    inputs = shape[:-1] if ".out." in name else shape[:1]
    return math.prod(shape) // math.prod(inputs), math.prod(inputs)
