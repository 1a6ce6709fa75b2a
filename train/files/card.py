"""The model card of an export: what a hub reads, and what people do."""

from __future__ import annotations

from typing import Any

_OURS = """    python -m models.generate --model FOLDER --prompt TEXT --attention hsr

`--attention dense` draws the same tokens; `hsr` looks at few of the keys."""
_LLAMA = """    python -m models.generate --model FOLDER --prompt TEXT

It is a Llama, which `transformers` loads as well, with the same logits:

    model = transformers.AutoModelForCausalLM.from_pretrained("FOLDER")
    tokenizer = transformers.AutoTokenizer.from_pretrained("FOLDER")"""


def card(
    name: str,
    *,
    model: dict[str, Any],
    options: dict[str, Any],
    last: dict[str, float],
    parameters: int,
    is_llama: bool = False,
) -> str:
    """The model card, in Markdown with YAML in front.

    Args:
        name: of the model.
        model: fields of its config.
        options: of its training.
        last: the last line of metrics.csv with a held-out loss.
        parameters: how many.
        is_llama: whether the folder is one of `transformers`.
    """
    kind = model["attention_kind"]
    power = f" (ReLU to the power {model['relu_power']})" if "relu" in kind else ""
    rows = _rows(model, options, last)
    table = "\n".join(f"| {about} | {what} |" for about, what in rows.items())
    return f"""{_front(kind, is_llama=is_llama)}
# {name}

A {parameters / 1e6:.2f} M parameter language model with `{kind}`
attention{power}, trained by hsrjax.

| | |
|---|---|
{table}

{_LLAMA if is_llama else _OURS}

## Limits

It has read nothing but the corpus above and is far too small to know anything: it
writes text that looks like that corpus, not text that is true or code that runs. It was
trained on rows of {options["row_length"]:,} tokens; how it fares beyond them was not
part of the training.
"""


def _front(kind: str, *, is_llama: bool) -> str:
    """YAML by which a hub files the model. A license is its owner's to give."""
    tags = ["hsrjax", "jax", f"{kind.replace('_', '-')}-attention"]
    if kind != "softmax":
        tags.append("sparse-attention")
    lines = [f"library_name: {'transformers' if is_llama else 'hsrjax'}"]
    lines += ["pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _rows(
    model: dict[str, Any], options: dict[str, Any], last: dict[str, float]
) -> dict[str, str]:
    """The lines of the table."""
    corpus = options.get("corpus", {})
    tokens = options["steps"] * options["batch"] * options["row_length"]
    rows = {
        "architecture": f"{model['num_layers']} layers, width {model['embed_dim']}, "
        f"{model['num_heads']} query and {model['num_kv_heads']} key/value heads of "
        f"{model['head_dim']}",
        "tokens": f"{options.get('tokenizer', 'bytes')}, vocabulary "
        f"{model['vocab_size']}",
        "data": f"{corpus.get('name')}, {corpus.get('bytes'):,} bytes",
        "training": f"{options['steps']:,} steps of {options['batch']} rows of "
        f"{options['row_length']:,} tokens ({tokens / 1e6:.1f} M tokens), seed "
        f"{options['seed']}",
        "learning rate": f"{options['learning_rate']:g}, AdamW, cosine",
    }
    if model["attention_kind"] in ("threshold_relu", "differential_relu"):
        waits = options["threshold_schedule"] == "loss"
        rise = "rising while the loss falls" if waits else "rising linearly"
        rows["thresholds"] = (
            f"from {options['threshold_start']:g} to {options['threshold_end']:g} "
            f"times what the largest of so many unrelated cosines would be, {rise}"
        )
    rows["held-out loss"] = f"{last['validation_loss']:.4f} nats per byte"
    if model["attention_kind"] != "softmax":
        zeros = 100 * (1 - last["validation_nonzero_fraction"])
        rows["zero attention scores"] = (
            f"{zeros:.2f} % of the visible ones, on held-out rows"
        )
    return rows
