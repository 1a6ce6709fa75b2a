"""Released models: config.json and model.safetensors, written whole, read with care."""

import dataclasses
import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import load, release
from models.config import ModelConfig
from models.generate import main as generate
from models.transformer import Transformer
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
    load.save_release(tmp_path / "model", model)
    return tmp_path / "model"


def test_a_released_model_is_the_same(model, released):
    again = load.load_run(released, attention="hsr")
    assert again.config == dataclasses.replace(CONFIG, attention="hsr")
    jax.tree.map(
        np.testing.assert_array_equal, load.model_item(again), load.model_item(model)
    )


def test_float16_halves_the_file(model, released, tmp_path):
    load.save_release(tmp_path / "half", model, dtype="float16")
    sizes = [
        (f / release.WEIGHTS).stat().st_size for f in (tmp_path / "half", released)
    ]
    assert sizes[0] < 0.55 * sizes[1]
    half = load.model_item(load.load_run(tmp_path / "half"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        half,
        load.model_item(model),
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half))


def test_what_float16_cannot_hold_is_refused_and_the_old_file_stays(model, released):
    before = (released / release.WEIGHTS).read_bytes()
    model.blocks[0].mlp.up.kernel[...] = jnp.full((32, 64), 1e6)
    with pytest.raises(ValueError, match=r"up.kernel holds values that are not finite"):
        load.save_release(released, model, dtype="float16")
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
    with pytest.raises(load.ModelFileError, match=message) as error:
        load.load_run(released)
    assert release.WEIGHTS in str(error.value)
    assert generate(["--model", str(released), "--prompt", "a"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_export_writes_what_generate_reads(
    tokenizer, text, tmp_path, capsys, lenient_promotion
):
    micro = PRESETS["micro"]
    size = {"bytes": 256, "bpe": 300}[tokenizer]
    config = dataclasses.replace(
        micro,
        data=str(text),
        tokenizer=tokenizer,
        model=dataclasses.replace(micro.model, vocab_size=size),
        steps=4,
        eval_every=4,
        telemetry_rows=0,
    )
    results = train(config, tmp_path / "run", progress=False)
    out = tmp_path / "out"
    words = ["export", str(tmp_path / "run"), "--out", str(out), "--name", "Tiny"]
    assert main(words) == 0
    assert main(words) == 0  # over itself
    card = (out / "README.md").read_text()
    for part in ("# Tiny", f"{results['validation_loss']:.4f} nats", "4 steps of 8"):
        assert part in card
    capsys.readouterr()
    prompt = ["--prompt", "def ", "--max-tokens", "5", "--json"]
    tokens = []
    for folder in (tmp_path / "run", out):
        assert generate(["--model", str(folder), *prompt]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        tokens.append(json.loads(last)["tokens"])
    assert tokens[0] == tokens[1]


def test_export_refuses_in_one_sentence(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not lose me")
    words = ["export", str(tmp_path / "no"), "--out"]
    assert main([*words, str(tmp_path / "full")]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "new")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
