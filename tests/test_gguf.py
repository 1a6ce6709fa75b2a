"""GGUF files: the same models in another format, every kind of block, bad files."""

import dataclasses
import json
import struct
import tracemalloc
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.files import mapping
from models.files.families import model_config
from models.files.gguf_file import GGUFFile
from models.files.pretrained import load_pretrained
from models.files.runs import ModelFileError
from models.files.vocabulary import from_gguf
from models.network.rope import frequencies
from models.network.transformer import with_attention, with_length

HERE = Path(__file__).parent / "pretrained"
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16")


def interleave(stored, heads):
    """What llama.cpp's converter does to queries and keys of Llama."""
    halves = stored.reshape(heads, 2, -1, *stored.shape[1:])
    return halves.swapaxes(1, 2).reshape(stored.shape)


def add_vocabulary(writer, size):
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(33 + i) for i in range(size - 1)] + ["AB"])
    writer.add_token_types([1] * size)
    writer.add_token_merges(["A B"])


def write(path, name):
    """A model of tests/pretrained as a GGUF file."""
    fields = json.loads((HERE / name / "config.json").read_text())
    family = fields["model_type"]
    weights = {}
    for file in (HERE / name).glob("*.safetensors"):
        weights |= safetensors.numpy.load_file(file)
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    rope = fields.get("rope_parameters") or fields["rope_scaling"]
    writer.add_rope_freq_base(rope.get("rope_theta") or fields["rope_theta"])
    if "head_dim" in fields:
        writer.add_key_length(fields["head_dim"])
    if fields.get("sliding_window"):
        writer.add_sliding_window(fields["sliding_window"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        size = fields["hidden_size"] // fields["num_attention_heads"]
        writer.add_rope_dimension_count(int(size * rope["partial_rotary_factor"]))
        original = rope["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        for kind in ("long", "short"):
            table = np.array(rope[f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", table)
    if rope["rope_type"] == "llama3":
        config = model_config(fields)
        shape = {"theta": config.rope_theta}
        plain, _ = frequencies(config.head_dim, **shape)
        scaled, _ = frequencies(config.head_dim, **shape, scaling=config.rope_scaling)
        writer.add_tensor("rope_freqs.weight", plain / scaled)
    add_vocabulary(writer, fields["vocab_size"])
    for stored, value in weights.items():
        given = rename(stored)
        heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        for part, count in zip(("attn_q.", "attn_k."), heads, strict=True):
            if family == "llama" and part in given:
                value = interleave(value, count)
        writer.add_tensor(given, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rename(name):
    """From the names of Hugging Face to those of GGUF."""
    ours = {theirs: mine for mine, theirs in mapping.HUGGING_FACE.top.items()}
    if name in ours:
        return mapping.GGUF.top[ours[name]]
    _, _, layer, rest = name.split(".", 3)
    module, ending = rest.rsplit(".", 1)
    ours = {theirs: mine for mine, theirs in mapping.HUGGING_FACE.inside.items()}
    return f"blk.{layer}.{mapping.GGUF.inside[ours[module]]}.{ending}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "llama3.gguf", "llama3")


@pytest.mark.parametrize("name", ["llama3", "llama_biases", "phi3_long", "qwen3"])
def test_a_file_is_the_same_model_as_its_folder(name, tmp_path):
    """The numbers of its config are float32, and Llama's turns come as a table."""
    found, tokenizer = load_pretrained(write(tmp_path / "x.gguf", name))
    model, _ = load_pretrained(HERE / name)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(model))
    for tokens in (1, 4096):  # shorter and longer than the original training
        got, want = (with_length(x, tokens).config for x in (found, model))
        (turns, gain), (expected, expected_gain) = (
            frequencies(x.turning_dim, theta=x.rope_theta, scaling=x.rope_scaling)
            for x in (got, want)
        )
        np.testing.assert_allclose(turns, expected, rtol=1e-6)
        assert gain == pytest.approx(expected_gain, rel=1e-6)
    for field in ("rope_theta", "norm_eps"):
        assert getattr(got, field) == pytest.approx(getattr(want, field), rel=1e-6)
    close = {"rope_theta", "norm_eps", "rope_scaling"}
    assert got == dataclasses.replace(want, **{x: getattr(got, x) for x in close})
    assert tokenizer.encode(b"AB!").tolist() == [model.config.vocab_size - 1, 0]


@pytest.mark.slow
def test_a_file_gives_the_logits_of_transformers(tmp_path):
    with np.load(HERE / "phi3_long" / "expected.npz") as file:
        tokens, want = jnp.asarray(file["tokens"]), file["logits"]
    model, _ = load_pretrained(write(tmp_path / "x.gguf", "phi3_long"))
    model = with_length(with_attention(model, "dense"), tokens.shape[1])
    graphdef, state = nnx.split(model)
    got = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_blocks_of_every_kind_are_read(kind, tmp_path):
    number = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("a", gguf.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.shapes() == {"a": (6, 64)}
    bits = int(kind[1]) if kind[0] == "Q" else 8
    found = file.read("a", 2, 3)
    assert found.dtype == np.float32
    spread = np.abs(values).max() / 2 ** (bits - 1)
    np.testing.assert_allclose(found, values[2:5], atol=1.1 * spread)


@pytest.mark.parametrize(
    ("kind", "size"), [("Q4_K", 144), ("Q5_K", 176), ("Q6_K", 210)]
)
def test_blocks_that_no_one_here_writes_are_read(kind, size, tmp_path):
    """Twice the scale is twice the values; the scale is the block's own half float."""
    number = gguf.GGMLQuantizationType[kind]
    block = np.random.default_rng(0).integers(0, 256, (2, size), np.uint8)
    at = slice(size - 2, size) if kind == "Q6_K" else slice(0, 2)
    half = lambda x: np.frombuffer(np.float16(x).tobytes(), np.uint8)
    block[1] = block[0]
    if kind != "Q6_K":
        block[:, 2:4] = half(0.0)  # the smallest value of the block
    block[0, at], block[1, at] = half(0.25), half(0.5)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("a", block, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.shapes() == {"a": (2, 256)}
    once, twice = file.read("a", 0, 2)
    assert np.ptp(once) > 1
    np.testing.assert_allclose(twice, 2 * once)


def test_reading_a_large_tensor_takes_little_more_than_the_tensor(tmp_path):
    values = np.random.default_rng(0).standard_normal((2**14, 256), np.float32)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("a", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    tracemalloc.start()
    try:
        found = file.read("a", 1, 2**14 - 1)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(found, values[1:], atol=0.5)
    assert found.nbytes < most < 2 * found.nbytes


# --- tokenizers ---


def sentencepiece(**changes):
    content = json.loads((HERE / "sentencepiece.json").read_text())
    names = ("tokens", "scores", "token_type")
    metadata = {f"tokenizer.ggml.{name}": content[name] for name in names}
    metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1}
    metadata |= {"tokenizer.ggml.eos_token_id": 2}
    return metadata | changes, content["texts"]


def test_sentencepiece_is_rebuilt():
    metadata, texts = sentencepiece()
    tokenizer = from_gguf(metadata, vocab_size=640)
    assert tokenizer.stops == {2}
    for text, want in texts.items():
        got = tokenizer.encode(text.encode()).tolist()
        assert got == [1, *want], text
        assert tokenizer.decode(got) == b" " * bool(text) + text.encode()
    assert tokenizer.token_bytes.shape == (640,)
    assert tokenizer.token_bytes[1] == 0
    cut = "für".encode()
    pieces = [tokenizer.decode([x]) for x in tokenizer.encode(cut)]
    assert b"".join(pieces) == b" " + cut


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is 't5'"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.scores": [1.0]}, "differ in length"),
        ({"tokenizer.ggml.token_type": [1]}, "differ in length"),
    ],
)
def test_a_bad_vocabulary_is_refused(changes, words):
    metadata, _ = sentencepiece(**changes)
    with pytest.raises(ValueError, match=words):
        from_gguf(metadata, vocab_size=640)


def test_a_vocabulary_larger_than_the_model_is_refused():
    metadata, _ = sentencepiece()
    with pytest.raises(ValueError, match="the tokenizer has 600 tokens"):
        from_gguf(metadata, vocab_size=599)


def test_byte_level_merges_are_checked():
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
    metadata |= {"tokenizer.ggml.token_type": [1, 1]}
    for changes, words in (
        ({"tokenizer.ggml.merges": ["a c"]}, "merges"),
        ({"tokenizer.ggml.merges": ["a"]}, "merges"),
        ({"tokenizer.ggml.merges": [], "tokenizer.ggml.pre": "odd"}, "pre is 'odd'"),
    ):
        with pytest.raises(ValueError, match=words):
            from_gguf(metadata | changes, vocab_size=2)


# --- bad files ---


def header(*, version=3, tensors=0, entries=0):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def text(value):
    return struct.pack("<Q", len(value)) + value


def entry(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


HOSTILE = {
    "empty": (b"", "ends early"),
    "another format": (b"PK\3\4" + b"\0" * 64, "does not begin with GGUF"),
    "big endian": (header(version=3 << 24), "version is"),
    "endless entries": (header(entries=2**60), "kv_count is"),
    "endless tensors": (header(tensors=2**60), "tensor_count is"),
    "a length that lies": (
        header(entries=1) + struct.pack("<Q", 2**62) + b"abc",
        "the length of a name is",
    ),
    "a long text that is not there": (
        header(entries=1) + entry(b"a", 8, struct.pack("<Q", 2**20)),
        "ends early",
    ),
    "an endless list": (
        header(entries=1) + entry(b"a", 9, struct.pack("<IQ", 4, 2**61)),
        "a is 2305843009213693952",
    ),
    "lists in lists": (
        header(entries=1) + entry(b"a", 9, struct.pack("<IQ", 9, 1)),
        "unknown type 9",
    ),
    "an unknown type": (header(entries=1) + entry(b"a", 77, b""), "unknown type 77"),
    "a tensor beyond the end": (
        header(tensors=1) + text(b"w") + struct.pack("<IQIQ", 1, 32, 0, 2**40),
        "w lies outside",
    ),
    "a shape that lies": (
        header(tensors=1)
        + text(b"w")
        + struct.pack("<IQQIQ", 2, 2**31, 2**31, 0, 0)
        + b"\0" * 128,
        "w lies outside",
    ),
    "too many axes": (
        header(tensors=1) + text(b"w") + struct.pack("<I", 9),
        "w has 9 axes",
    ),
    "an unknown quantization": (
        header(tensors=1) + text(b"w") + struct.pack("<IQIQ", 1, 32, 99, 0),
        "w is 99, not one of",
    ),
    "a known one that is not supported": (
        header(tensors=1) + text(b"w") + struct.pack("<IQIQ", 1, 256, 16, 0),
        "w is IQ2_XXS, not one of",
    ),
    "a field twice": (
        header(entries=2) + 2 * entry(b"a", 4, struct.pack("<I", 1)),
        "a is there twice",
    ),
    "a tensor twice": (
        header(tensors=2) + 2 * (text(b"w") + struct.pack("<IQIQ", 1, 32, 0, 0)),
        "w is there twice",
    ),
    "alignment zero": (
        header(entries=1) + entry(b"general.alignment", 4, struct.pack("<I", 0)),
        "general.alignment is 0",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(name, tmp_path):
    content, words = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=words) as caught:
        load_pretrained(path)
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_file_is_refused_wherever_it_is_cut(llama, tmp_path):
    whole = llama.read_bytes()
    for share in (0.01, 0.05, 0.3, 0.9, 0.9999):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ModelFileError, match=r"cut\.gguf"):
            load_pretrained(path)


def test_flipped_bytes_are_an_error_or_another_model(llama, tmp_path):
    """Never another exception; a changed weight cannot be noticed."""
    whole, generator = bytearray(llama.read_bytes()), np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        changed = bytearray(whole)
        for place in generator.integers(0, 3000, 3):
            changed[place] ^= int(generator.integers(1, 256))
        path = tmp_path / "flipped.gguf"
        path.write_bytes(changed)
        try:
            load_pretrained(path)
        except ModelFileError as error:
            refused += 1
            assert "flipped.gguf" in str(error)
    assert refused > 20


def test_a_file_without_the_models_tensors_is_refused(llama, tmp_path):
    whole = llama.read_bytes()
    for old, new, words in (
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_ux.weight", "missing tensors"),
        (b"general.architecture", b"general.architectura", "general.architecture"),
        (b"llama.block_count", b"llama.block_counx", "num_hidden_layers is missing"),
        (b"token_embd.weight", b"token_embx.weight", "token_embd.weight is missing"),
    ):
        path = tmp_path / "x.gguf"
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ModelFileError, match=words):
            load_pretrained(path)
