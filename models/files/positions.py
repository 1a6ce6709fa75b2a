"""How positions turn in published models: what configs and GGUF files say of RoPE.

A key that is not known could change every logit, so none is passed over.
"""

from __future__ import annotations

from typing import Any

from models.files.fields import Fields
from models.files.stored import Stored
from models.network.rope import RopeScaling, yarn_gain

_ANY = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ANY |= {"original_max_position_embeddings", "finetuned"}
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "beta_fast", "beta_slow", "attention_factor", "truncate"}
    | {"mscale", "mscale_all_dim"},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor"},
}
_GGUF_KEYS = {"dimension_count", "freq_base", "scale_linear", "scaling.type"}
_GGUF_KEYS |= {"scaling.factor", "scaling.original_context_length", "scaling.finetuned"}
_GGUF_KEYS |= {"scaling.attn_factor", "scaling.yarn_beta_fast"}
_GGUF_KEYS |= {"scaling.yarn_beta_slow"}


def rope_fields(reader: Fields) -> Fields:
    """What says how positions turn; its name and place have changed over the years.

    Raises:
      ValueError: two places differ, or layers of two types do.
    """
    names = [x for x in ("rope_parameters", "rope_scaling") if reader.has(x)]
    if not names:
        return Fields({})
    found = reader.fields[names[0]]
    if reader.fields[names[-1]] != found:
        raise ValueError("rope_parameters and rope_scaling are both there and differ")
    if isinstance(found, dict) and any(isinstance(x, dict) for x in found.values()):
        first, *others = found.values()
        if any(other != first for other in others):
            raise ValueError(
                f"{names[0]} differs by layer type ({', '.join(map(str, found))}), "
                "which this transformer has not"
            )
        found = first
    return Fields(found, names[0])


def rotary_dim(rope: Fields, reader: Fields, head_dim: int) -> int | None:
    """Dimensions of a head that turn; None is all."""
    share = rope.number(
        "partial_rotary_factor", reader.number("partial_rotary_factor", 1.0)
    )
    if not 0 < share <= 1:
        raise ValueError(f"partial_rotary_factor must lie in (0, 1], got {share}")
    return None if share == 1 else int(head_dim * share)


def scaling(rope: Fields, reader: Fields) -> RopeScaling | None:
    """How positions are stretched for longer rows.

    Args:
      rope: from `rope_fields`.
      reader: the whole config.

    Raises:
      ValueError: a kind or a key that is not known here; the message names it.
    """
    kind = rope.text("rope_type", rope.text("type", "default"))
    kind = "longrope" if kind == "su" else kind
    if kind not in _KEYS:
        raise ValueError(f"rope_type is {kind!r} and can be {', '.join(_KEYS)}")
    unknown = sorted(
        x for x in rope.fields if rope.has(x) and x not in _ANY | _KEYS[kind]
    )
    if unknown:
        raise ValueError(
            f"the rope parameter {unknown[0]} is not known here for rope_type {kind!r}"
        )
    if kind == "default":
        return None
    longest = reader.count("max_position_embeddings", 2048)
    # Phi-3 has it beside the other fields, newer files inside.
    beside = reader.fields.get("original_max_position_embeddings")
    original = rope.count("original_max_position_embeddings", beside or longest)
    gain = rope.number("attention_factor") if rope.has("attention_factor") else None
    if kind == "linear":
        factor = rope.number("factor")
        return RopeScaling(kind="linear", factor=factor, original_length=longest)
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=rope.number("factor"),
            original_length=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    if kind == "yarn":
        factor = rope.number("factor")
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_length=original,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            truncate=rope.flag("truncate", True),
            attention_factor=_mscale_gain(rope, factor) if gain is None else gain,
        )
    return RopeScaling(
        kind="longrope",
        factor=rope.number("factor", longest / original),
        original_length=original,
        divisors=rope.numbers("short_factor"),
        long_divisors=rope.numbers("long_factor"),
        attention_factor=gain,
    )


def _mscale_gain(rope: Fields, factor: float) -> float | None:
    """DeepSeek's way to say yarn's gain, as a quotient; None is yarn's own."""
    shares = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if not all(shares):
        return None
    above, below = (yarn_gain(factor, share) for share in shares)
    return above / below if below else 0.0  # which is refused


def gguf_rope(
    family: str,
    metadata: dict[str, Any],
    stored: Stored,
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, Any] | None:
    """What a GGUF file says of positions, in the words of a config.json.

    Llama 3 and longrope come as tensors that divide the frequencies.

    Args:
      family: of the model, which begins the names of its fields.
      metadata: plain values by name.
      stored: the file's tensors.
      shapes: of these.

    Raises:
      ValueError: a field or a table that is not known here.
    """
    start = f"{family}.rope."
    found = {
        name.removeprefix(start): value
        for name, value in metadata.items()
        if name.startswith(start)
    }
    if unknown := sorted(found.keys() - _GGUF_KEYS):
        raise ValueError(f"the field {start}{unknown[0]} is not known here")

    def table(name: str) -> list[float]:
        if len(shapes[name]) != 1 or shapes[name][0] > 2**12:
            raise ValueError(f"{name} has the shape {shapes[name]}")
        return stored.read(name, 0, shapes[name][0]).astype(float).tolist()

    kept = {
        "original_max_position_embeddings": found.get("scaling.original_context_length")
    }
    gain = found.get("scaling.attn_factor")
    if "rope_freqs.weight" in shapes:
        same = table("rope_freqs.weight")
        same = {"short_factor": same, "long_factor": same, "attention_factor": 1.0}
        return {"rope_type": "longrope"} | kept | same
    names = ("rope_factors_short.weight", "rope_factors_long.weight")
    if all(name in shapes for name in names):
        short, long = (table(name) for name in names)
        tables = {"short_factor": short, "long_factor": long, "attention_factor": gain}
        return {"rope_type": "longrope"} | kept | tables
    factor = found.get("scaling.factor") or found.get("scale_linear")
    # A factor alone means linear, as in llama.cpp.
    kind = found.get("scaling.type", "linear" if factor else "none")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    fields = {"rope_type": kind, "factor": factor} | kept
    if kind != "yarn":
        return fields
    fields |= {
        name: found.get(f"scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")
    }
    if gain is not None:  # of yarn's own
        own = yarn_gain(Fields(fields).number("factor"))
        fields["attention_factor"] = own * Fields({"attn_factor": gain}).number(
            "attn_factor"
        )
    return fields
