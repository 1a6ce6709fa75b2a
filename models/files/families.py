"""Published architectures: what their config.json says, as a `ModelConfig`.

All are pre-norm decoders with RMSNorm, RoPE, grouped heads and SwiGLU; they differ in
biases, norms of heads, windows, where positions are and how these are stretched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models.files.stored import Stored
from models.network.config import ComputeDtype, ModelConfig
from models.network.rope import RopeScaling

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
    reader = _Fields(fields)
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
    rope = _rope(reader)
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
        rope_scaling=_scaling(rope, reader),
        rotary_dim=_rotary_dim(rope, reader, head_dim),
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


class _Fields:
    """A dictionary from outside, read field by field with its type checked."""

    def __init__(self, fields: Any, name: str = "the config") -> None:
        if not isinstance(fields, dict):
            raise ValueError(f"{name} must be an object, got {type(fields).__name__}")
        self.fields = fields

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{name} is missing")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a text, got {value!r:.80}")
        return value

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._get(name, default)
        if type(value) is not int or value < least:
            raise ValueError(
                f"{name} must be an integer from {least}, got {value!r:.80}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number, got {value!r:.80}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r:.80}")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self._get(name, None)
        if not isinstance(value, list) or not all(
            isinstance(x, (int, float)) and not isinstance(x, bool) for x in value
        ):
            raise ValueError(f"{name} must be a list of numbers, got {value!r:.80}")
        return tuple(float(x) for x in value)

    def has(self, name: str) -> bool:
        return self.fields.get(name) is not None


def _windows(reader: _Fields, family: str, layers: int) -> tuple[int | None, int]:
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


def _nope_interval(reader: _Fields, layers: int) -> int | None:
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


def _rope(reader: _Fields) -> _Fields:
    """What says how positions turn; its name and place have changed over the years."""
    for name in ("rope_parameters", "rope_scaling"):
        if reader.has(name):
            return _Fields(reader.fields[name], name)
    return _Fields({})


def _rotary_dim(rope: _Fields, reader: _Fields, head_dim: int) -> int | None:
    share = rope.number(
        "partial_rotary_factor", reader.number("partial_rotary_factor", 1.0)
    )
    if not 0 < share <= 1:
        raise ValueError(f"partial_rotary_factor must lie in (0, 1], got {share}")
    return None if share == 1 else int(head_dim * share)


def _scaling(rope: _Fields, reader: _Fields) -> RopeScaling | None:
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return None
    longest = reader.count("max_position_embeddings", 2048)
    if kind == "linear":
        factor = rope.number("factor")
        return RopeScaling(kind="linear", factor=factor, original_length=longest)
    # Phi-3 has it beside the other fields, newer files inside.
    beside = reader.fields.get("original_max_position_embeddings")
    original = rope.count("original_max_position_embeddings", beside or longest)
    gain = rope.number("attention_factor") if rope.has("attention_factor") else None
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=rope.number("factor"),
            original_length=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=rope.number("factor"),
            original_length=original,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            attention_factor=gain,
        )
    if kind in ("longrope", "su"):
        return RopeScaling(
            kind="longrope",
            factor=rope.number("factor", longest / original),
            original_length=original,
            divisors=rope.numbers("short_factor"),
            long_divisors=rope.numbers("long_factor"),
            attention_factor=gain,
        )
    raise ValueError(
        f"rope_type is {kind!r} and can be default, linear, llama3, longrope or yarn"
    )


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
    family = _Fields(metadata, "the metadata").text("general.architecture")
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
        "rope_parameters": _gguf_rope(get, stored, shapes),
    }
    turning = get("rope.dimension_count")
    if turning is not None:
        reader = _Fields(fields | {"turning": turning})
        width, heads = reader.count("hidden_size"), reader.count("num_attention_heads")
        size = reader.count("head_dim", width // heads)
        fields["partial_rotary_factor"] = reader.count("turning") / size
    return fields


def _gguf_rope(
    get: Callable[..., Any], stored: Stored, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any] | None:
    """Llama 3 and longrope come as tensors that divide the frequencies."""

    def table(name: str) -> list[float]:
        if len(shapes[name]) != 1 or shapes[name][0] > 2**12:
            raise ValueError(f"{name} has the shape {shapes[name]}")
        return stored.read(name, 0, shapes[name][0]).astype(float).tolist()

    original = get("rope.scaling.original_context_length")
    divided = {"rope_type": "longrope", "original_max_position_embeddings": original}
    if "rope_freqs.weight" in shapes:
        same = table("rope_freqs.weight")
        same = {"short_factor": same, "long_factor": same, "attention_factor": 1.0}
        return divided | same
    names = ("rope_factors_short.weight", "rope_factors_long.weight")
    if all(name in shapes for name in names):
        short, long = (table(name) for name in names)
        gain = get("rope.scaling.attn_factor")
        tables = {"short_factor": short, "long_factor": long, "attention_factor": gain}
        return divided | tables
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = get("rope.scaling.factor")
    kept = {"original_max_position_embeddings": original}
    return {"rope_type": kind, "factor": factor} | kept
