"""What others read of an export: the files of a Llama, model types, the card."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.files import runs
from models.files.llama import is_llama, save_llama
from models.generate import main as generate
from models.network.config import ModelConfig
from models.opening import open_model
from models.text.tokenizer import train_bpe
from tests import llama
from tests.made_up import run_of
from train.__main__ import main
from train.config import PRESETS
from train.files.metrics import COLUMNS

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "attention_kind": "softmax"}
TOKENS = np.frombuffer("def für(x):\n    return".encode(), np.uint8).astype(np.int32)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """Makes a run folder of a kind that training might have left, each once."""
    folder = tmp_path_factory.mktemp("runs")

    def make(kind, **shape):
        path = folder / kind
        if not path.exists():
            model = run_of(path, str(text), **shape, attention_kind=kind)
            options = PRESETS["micro"].to_dict()
            about = {"corpus": {"name": "text", "bytes": 50_000}}
            runs.write_run_config(path, model.config, train=options | about)
            line = dict.fromkeys(COLUMNS, "0.5")
            lines = [",".join(COLUMNS), ",".join(line.values()), ""]
            (path / "metrics.csv").write_text("\n".join(lines))
        return path

    return make


def logits(model, tokens):
    graphdef, state = nnx.split(model)
    read = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    return np.asarray(read(state, jnp.asarray(tokens)[None])[0])


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """A softmax run, the folder it was exported to, its logits."""
    source = run("softmax", num_heads=4, num_kv_heads=2, tie_embeddings=False)
    out = tmp_path_factory.mktemp("llama") / "out"
    assert main(["export", str(source), "--out", str(out), "--name", "Tiny"]) == 0
    return source, out, logits(runs.load_run(source, attention="dense"), TOKENS)


def test_a_softmax_run_is_a_llama_with_the_same_logits(exported):
    _, out, want = exported
    content = json.loads((out / "config.json").read_text())
    assert content["architectures"] == ["LlamaForCausalLM"]
    assert content["model_type"] == "llama"
    assert content["hsrjax"]["train"]["steps"] == PRESETS["micro"].steps
    assert content["bos_token_id"] is content["eos_token_id"] is None
    found = llama.logits(out, TOKENS)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    assert np.ptp(want, axis=0).min() > 0.01


@pytest.mark.filterwarnings("ignore")  # whatever other people's packages warn of
def test_transformers_reads_the_same_logits_and_tokens(exported):
    torch = pytest.importorskip("torch", reason="pip install torch transformers")
    transformers = pytest.importorskip(
        "transformers", reason="pip install transformers"
    )
    _, out, want = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        found = model(torch.tensor(TOKENS)[None]).logits[0].numpy()
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = bytes(TOKENS.tolist()).decode()
    assert tokenizer(text).input_ids == TOKENS.tolist()
    assert tokenizer.decode(TOKENS.tolist()) == text


def test_an_exported_llama_is_read_back_and_generates(exported, capsys):
    source, out, want = exported
    model, tokenizer = open_model(out)
    np.testing.assert_array_equal(logits(model, TOKENS), want)
    assert tokenizer.encode(bytes(TOKENS.tolist())).tolist() == TOKENS.tolist()
    assert tokenizer.decode(TOKENS.tolist()) == bytes(TOKENS.tolist())
    assert tokenizer.stops == frozenset()
    tokens = []
    for folder in (source, out):
        words = ["--model", str(folder), "--prompt", "def", "--max-tokens", "4"]
        assert generate([*words, "--attention", "dense", "--json"]) == 0
        tokens.append(json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"])
    assert tokens[0] == tokens[1]


def test_byte_pairs_and_half_floats_are_exported_too(exported, tmp_path):
    model = runs.load_run(exported[0])
    pairs = train_bpe(b"def f(self): return self\n" * 50, vocab_size=300 - 32)
    config = dataclasses.replace(model.config, vocab_size=268, tie_embeddings=True)
    item = runs.model_item(model)
    del item["head"]
    item["embed"]["embedding"] = jnp.resize(item["embed"]["embedding"], (268, 32))
    model = runs.restore_model(config, item)
    kept = {"row_length": 32, "train": {}, "dtype": "float16"}
    save_llama(tmp_path, model, pairs, **kept)
    found, tokenizer = open_model(tmp_path)
    text = b"def f(self): return other\n"
    np.testing.assert_array_equal(tokenizer.encode(text), pairs.encode(text))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        runs.model_item(found)["blocks"],
        runs.model_item(model)["blocks"],
    )


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"top_r": 4, "tail": 1, "dtype": "bfloat16", "relu_power": 2}, True),
        ({"value_dim": 8, "rotary_dim": 8, "qk_norm": False}, True),
        ({"qkv_bias": True, "out_bias": True, "mlp_bias": True}, True),
        ({"qkv_bias": True}, False),
        ({"value_dim": 16}, False),
        ({"rotary_dim": 4}, False),
        ({"qk_norm": True}, False),
        ({"output_norm": True}, False),
        ({"head_norm": True}, False),
        ({"keep_self": True}, False),
        ({"window": 8}, False),
        ({"nope_interval": 2}, False),
        ({"attention_kind": "entmax"}, False),
    ],
)
def test_what_is_a_llama(changes, same):
    config = ModelConfig(num_layers=1, embed_dim=32, head_dim=8, mlp_dim=8, **SHAPE)
    assert is_llama(dataclasses.replace(config, **changes)) is same


@pytest.mark.parametrize("kind", ["softmax", "threshold_relu", "entmax"])
def test_a_card_says_what_the_model_is(kind, run, tmp_path):
    out = tmp_path / "out"
    source = run(kind, **({} if kind != "softmax" else SHAPE))
    assert main(["export", str(source), "--out", str(out), "--name", "Tiny"]) == 0
    _, front, card = (out / "README.md").read_text().split("---\n", 2)
    lines = front.splitlines()
    library = "transformers" if kind == "softmax" else "hsrjax"
    assert lines[:3] == [
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
    ]
    assert f"- {kind.replace('_', '-')}-attention" in lines[3:]
    assert all(line.startswith("- ") for line in lines[3:])
    assert card.startswith("# Tiny\n")
    assert ("ReLU to the power" in card) is (kind == "threshold_relu")
    assert ("| thresholds |" in card) is (kind == "threshold_relu")
    assert ("zero attention scores" in card) is (kind != "softmax")
    content = json.loads((out / "config.json").read_text())
    assert content["model_type"] == ("llama" if kind == "softmax" else "hsrjax")
    assert content["architectures"][0].endswith("ForCausalLM")
    assert open_model(out).model.config.attention_kind == kind


def test_the_released_model_carries_them_too(repo_root):
    folder = repo_root / "models" / "released" / "python-2.8m"
    content = json.loads((folder / "config.json").read_text())
    assert (content["model_type"], content["format"]) == ("hsrjax", runs.FORMAT)
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: hsrjax\n")
