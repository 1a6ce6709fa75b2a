"""Published architectures: what their config.json says, as a `ModelConfig`.

All are pre-norm decoders with RMSNorm, RoPE, grouped heads and SwiGLU; they differ in
biases, norms of heads, windows, where positions are and how these are stretched.
"""

from __future__ import annotations

from typing import Any

from models.files.fields import Fields
from models.files.positions import gguf_rope, rope_fields, rotary_dim, scaling
from models.files.stored import Stored
from models.network.config import ComputeDtype, ModelConfig

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")


def model_config(fields: Any, *, dtype: ComputeDtype = "float32") -> ModelConfig:
    """Translates the content of a Hugging Face config.json, trusting nothing.

    Args:
      fields: the parsed JSON.
      dtype: of the parameters and the computation.

    Returns:
      A softmax model of the same shape.

    Raises:
      ValueError: another architecture, a missing or impossible field, or an option that
        this transformer does not have; the message names the field.
    """
    reader = Fields(fields)
    family = reader.text("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"model_type is {family!r} and can be one of {', '.join(FAMILIES)}"
        )
    activation = reader.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {activation!r}, not silu")
    heads = reader.count("num_attention_heads")
    width = reader.count("hidden_size")
    head_dim = reader.count("head_dim", width // heads)
    layers = reader.count("num_hidden_layers")
    window, window_from = _windows(reader, family, layers)
    rope = rope_fields(reader)
    return ModelConfig(
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=reader.count("num_key_value_heads", heads),
        head_dim=head_dim,
        mlp_dim=reader.count("intermediate_size"),
        vocab_size=reader.count("vocab_size"),
        attention_kind="softmax",
        rope_theta=rope.number("rope_theta", reader.number("rope_theta", 10_000.0)),
        rope_scaling=scaling(rope, reader),
        rotary_dim=rotary_dim(rope, reader, head_dim),
        nope_interval=_nope_interval(reader, layers) if family == "smollm3" else None,
        window=window,
        window_from=window_from,
        head_norm=family == "qwen3",
        qkv_bias=family == "qwen2" or reader.flag("attention_bias"),
        out_bias=family != "qwen2" and reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        tie_embeddings=reader.flag("tie_word_embeddings", family == "smollm3"),
        dtype=dtype,
        param_dtype=dtype,
    )


def _windows(reader: Fields, family: str, layers: int) -> tuple[int | None, int]:
    """Sliding window, and the first layer that has it."""
    if family in ("qwen2", "qwen3", "smollm3"):
        used = reader.flag("use_sliding_window") and reader.has("sliding_window")
    else:
        # Mistral's config had a window before it was written into the file.
        used = reader.has("sliding_window") or (
            family == "mistral" and "sliding_window" not in reader.fields
        )
    if used and family == "smollm3":
        raise ValueError("use_sliding_window is true, which smollm3 here has not")
    window = reader.count("sliding_window", 4096) if used else None
    late = used and family in ("qwen2", "qwen3")
    first = reader.count("max_window_layers", 28, least=0) if late else 0
    kinds = reader.fields.get("layer_types")
    if family == "llama" or kinds is None:
        return (None if family == "llama" else window), first
    expected = [
        "full_attention" if window is None or layer < first else "sliding_attention"
        for layer in range(layers)
    ]
    if kinds != expected:
        raise ValueError("layer_types is not what sliding_window and the family say")
    return window, first


def _nope_interval(reader: Fields, layers: int) -> int | None:
    """Every so many layers, SmolLM3 has one without positions."""
    interval = reader.count("no_rope_layer_interval", 4)
    listed = reader.fields.get("no_rope_layers")
    if listed is None:
        return interval
    # A 1 stands for a layer with positions.
    if listed == [1] * layers:
        return None
    for every in (interval, *range(1, layers + 1)):
        if listed == [int((layer + 1) % every != 0) for layer in range(layers)]:
            return every
    raise ValueError("no_rope_layers does not leave out every n-th layer")


def gguf_fields(metadata: dict[str, Any], stored: Stored) -> dict[str, Any]:
    """The metadata of a GGUF file in the words of a Hugging Face config.json.

    Args:
      metadata: plain values by name.
      stored: the file's tensors; a few of them belong to the config.

    Returns:
      For `model_config`, which checks it.

    Raises:
      ValueError: another architecture, or a table is missing.
    """
    about = Fields(metadata, "the metadata")
    if (kind := about.text("general.type", "model")) != "model":
        raise ValueError(f"general.type is {kind!r}: it is no language model")
    if (parts := about.count("split.count", 1, least=0)) > 1:
        raise ValueError(
            f"it is one of {parts} parts: join them with llama-gguf-split --merge"
        )
    family = about.text("general.architecture")
    shapes = stored.shapes()
    if "token_embd.weight" not in shapes:
        raise ValueError("token_embd.weight is missing")

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"{family}.{name}", default)

    fields = {
        "model_type": family,
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base"),
        "max_position_embeddings": get("context_length"),
        "sliding_window": get("attention.sliding_window") or None,
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": "blk.0.ffn_down.bias" in shapes,
        "rope_parameters": gguf_rope(family, metadata, stored, shapes),
    }
    turning = get("rope.dimension_count")
    if turning is not None:
        reader = Fields(fields | {"turning": turning})
        width, heads = reader.count("hidden_size"), reader.count("num_attention_heads")
        size = reader.count("head_dim", width // heads)
        fields["partial_rotary_factor"] = reader.count("turning") / size
    return fields
