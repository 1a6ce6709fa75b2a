"""Released models: config.json and model.safetensors, written whole, read with care."""

import dataclasses
import functools
import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.files import release, runs
from models.files.vocabulary import load_tokenizer
from models.generate import main as generate
from models.network.config import ModelConfig
from models.network.transformer import Transformer
from train import data, step
from train.__main__ import main
from train.config import PRESETS
from train.loop import train

CONFIG = ModelConfig(
    num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64
)


@pytest.fixture
def model():
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    model.threshold_scale[...] = jnp.float32(0.625)
    return model


@pytest.fixture
def released(model, tmp_path):
    runs.save_release(tmp_path / "model", model)
    return tmp_path / "model"


def test_a_released_model_is_the_same(model, released):
    again = runs.load_run(released, attention="hsr")
    assert again.config == dataclasses.replace(CONFIG, attention="hsr")
    jax.tree.map(
        np.testing.assert_array_equal, runs.model_item(again), runs.model_item(model)
    )


def test_float16_halves_the_file(model, released, tmp_path):
    runs.save_release(tmp_path / "half", model, dtype="float16")
    sizes = [
        (f / release.WEIGHTS).stat().st_size for f in (tmp_path / "half", released)
    ]
    assert sizes[0] < 0.55 * sizes[1]
    half = runs.model_item(runs.load_run(tmp_path / "half"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        half,
        runs.model_item(model),
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half))


def test_what_float16_cannot_hold_is_refused_and_the_old_file_stays(model, released):
    before = (released / release.WEIGHTS).read_bytes()
    model.blocks[0].mlp.up.kernel[...] = jnp.full((32, 64), 1e6)
    with pytest.raises(ValueError, match=r"up.kernel holds values that are not finite"):
        runs.save_release(released, model, dtype="float16")
    assert (released / release.WEIGHTS).read_bytes() == before
    assert sorted(os.listdir(released)) == ["config.json", release.WEIGHTS]


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def empty(file):
    file.write_bytes(b"")


def long_header(file):
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def edit_header(change):
    def damage(file):
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return damage


def beyond_the_file(header):
    header["embed.embedding"]["data_offsets"][1] += 2**40


def other_shape(header):
    header["embed.embedding"]["shape"] = [128, 64]


def other_dtype(header):
    header["embed.embedding"] |= {"dtype": "I32"}


def other_name(header):
    header["embed.weights"] = header.pop("embed.embedding")


def not_finite(file):
    content = bytearray(file.read_bytes())
    content[-4:] = struct.pack("<f", float("nan"))
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "incomplete|not fully covered"),
        (empty, "header"),
        (long_header, "header"),
        (edit_header(beyond_the_file), "offset|covered|invalid"),
        (edit_header(other_shape), r"must be float32 or float16 \[256, 32\]"),
        (edit_header(other_dtype), r"got I32"),
        (edit_header(other_name), r"missing variables \['embed.embedding'\]"),
        (not_finite, "not finite"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(released, damage, message, capsys):
    damage(released / release.WEIGHTS)
    with pytest.raises(runs.ModelFileError, match=message) as error:
        runs.load_run(released)
    assert release.WEIGHTS in str(error.value)
    assert generate(["--model", str(released), "--prompt", "a"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- a trained run ---


@pytest.fixture(scope="module")
def trained(text, compile_cache, tmp_path_factory):
    """Trains a little on byte pairs, or bytes: the config, the results, the folder."""

    @functools.cache
    def run(tokenizer):
        micro, size = PRESETS["micro"], {"bytes": 256, "bpe": 400}[tokenizer]
        config = dataclasses.replace(
            micro,
            data=str(text),
            tokenizer=tokenizer,
            model=dataclasses.replace(micro.model, vocab_size=size),
            steps=4,
            eval_every=4,
            telemetry_rows=0,
        )
        out = tmp_path_factory.mktemp(tokenizer) / "run"
        return config, train(config, out, progress=False), out

    return run


def test_a_model_of_byte_pairs_is_measured_per_byte(trained, text):
    config, results, out = trained("bpe")
    tokenizer = load_tokenizer(out, vocab_size=400)
    corpus = data.load_corpus(str(text))
    _, held_out = data.split(corpus.tokenized(tokenizer), row_length=32)
    rows = data.spread(held_out, limit=config.eval_rows)
    losses, _ = jax.jit(step.row_losses)(runs.load_run(out), jnp.asarray(rows))
    per_byte = 32 * losses.sum() / tokenizer.token_bytes[rows[:, 1:]].sum()
    assert results["validation_loss"] == pytest.approx(float(per_byte), rel=1e-5)
    assert results["validation_loss"] < 0.8 * float(losses.mean())
    again = train(config, out, resume=True, progress=False)
    assert again["validation_loss"] == results["validation_loss"]


@pytest.mark.parametrize("kind", ["bpe", pytest.param("bytes", marks=pytest.mark.slow)])
def test_export_writes_what_generate_reads(kind, trained, tmp_path, capsys):
    config, results, run = trained(kind)
    out = tmp_path / "out"
    words = ["export", str(run), "--out", str(out), "--name", "Tiny"]
    assert main(words) == 0
    assert main(words) == 0  # over itself
    card = (out / "README.md").read_text()
    for part in ("# Tiny", f"{results['validation_loss']:.4f} nats", "4 steps of 8"):
        assert part in card
    capsys.readouterr()
    prompt = ["--prompt", "def f(", "--max-tokens", "5", "--json"]
    prompt += ["--attention", "dense"]
    tokens = []
    for folder in (run, out):
        assert generate(["--model", str(folder), *prompt]) == 0
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        tokens.append(printed["tokens"])
        tokenizer = load_tokenizer(folder, vocab_size=config.model.vocab_size)
        assert printed["prompt_tokens"] == [tokenizer.encode(b"def f(").size]
    assert tokens[0] == tokens[1]
    assert len(tokens[0][0]) == 5


def test_export_refuses_in_one_sentence(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not lose me")
    words = ["export", str(tmp_path / "no"), "--out"]
    assert main([*words, str(tmp_path / "full")]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "new")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
