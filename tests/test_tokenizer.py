"""Bytes and byte-level BPE: lossless, saved, loaded, refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.generate import main as generate
from models.load import load_run
from models.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    TokenizerError,
    load_tokenizer,
    train_bpe,
)
from train import data, step
from train.config import PRESETS
from train.loop import train

TEXT = Path(dataclasses.__file__).read_bytes()


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_bpe(TEXT, vocab_size=400)


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_survives(text):
    tokenizer = train_bpe(b"low lower lowest \n" * 9, vocab_size=260)
    for each in (tokenizer, ByteTokenizer()):
        tokens = each.encode(text.encode())
        assert each.decode(tokens.tolist()) == text.encode()
        assert each.token_bytes[tokens].sum() == len(text.encode())


def test_merges_are_learned_and_pieces_join(bpe, monkeypatch):
    tokens = bpe.encode(TEXT)
    assert (bpe.vocab_size, tokens.dtype) == (400, np.uint16)
    assert tokens.size < 0.6 * len(TEXT)
    assert bpe.decode(tokens.tolist()) == TEXT
    assert bpe.token_bytes[tokens].sum() == len(TEXT)
    monkeypatch.setattr("models.tokenizer._PIECE", 1000)
    assert bpe.decode(bpe.encode(TEXT).tolist()) == TEXT
    assert bpe.encode(b"").size == 0


def test_saved_tokenizer_is_the_same(bpe, tmp_path):
    bpe.save(tmp_path)
    again = load_tokenizer(tmp_path, vocab_size=400)
    np.testing.assert_array_equal(again.encode(TEXT), bpe.encode(TEXT))
    assert isinstance(load_tokenizer(tmp_path / "none", vocab_size=256), ByteTokenizer)


@pytest.mark.parametrize(
    ("content", "vocabulary", "message"),
    [
        (b"{}", 400, "is not a byte-level BPE tokenizer"),
        (b"\x00\xff", 400, "is not a byte-level BPE tokenizer"),
        (None, 401, "a tokenizer of 400 tokens and a model of 401"),
        ("words", 3, "is not a byte-level BPE tokenizer"),
    ],
)
def test_foreign_files_are_refused(bpe, tmp_path, content, vocabulary, message):
    bpe.save(tmp_path)
    if content == "words":  # whole words: no bytes can be told
        model = {"type": "WordLevel", "vocab": {"a": 0, "b c": 1}, "unk_token": "a"}
        content = json.dumps({"version": "1.0", "model": model}).encode()
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path, vocab_size=vocabulary)


def test_impossible_vocabularies_are_refused():
    with pytest.raises(TokenizerError, match="256 bytes and merges, got 256"):
        train_bpe(TEXT, vocab_size=256)
    with pytest.raises(TokenizerError, match=r"merges for a vocabulary of .* not 9999"):
        train_bpe(b"to be or not to be", vocab_size=9999)


def test_a_model_of_byte_pairs_trains_and_generates(
    tmp_path, text, capsys, lenient_promotion
):
    micro = PRESETS["micro"]
    config = dataclasses.replace(
        micro,
        data=str(text),
        tokenizer="bpe",
        model=dataclasses.replace(micro.model, vocab_size=400),
        steps=4,
        eval_every=4,
        telemetry_rows=0,
    )
    out = tmp_path / "run"
    results = train(config, out, progress=False)
    corpus = data.load_corpus(str(text))
    tokenizer = load_tokenizer(out, vocab_size=400)
    _, held_out = data.split(corpus.tokenized(tokenizer), row_length=32)
    rows = data.spread(held_out, limit=config.eval_rows)
    losses, _ = jax.jit(step.row_losses)(load_run(out), jnp.asarray(rows))
    per_byte = 32 * losses.sum() / tokenizer.token_bytes[rows[:, 1:]].sum()
    assert results["validation_loss"] == pytest.approx(float(per_byte), rel=1e-5)
    assert results["validation_loss"] < 0.8 * float(losses.mean())
    assert load_tokenizer(out, vocab_size=400).vocab_size == 400
    again = train(config, out, resume=True, progress=False)
    assert again["validation_loss"] == results["validation_loss"]
    arguments = ["--model", str(out), "--prompt", "def f(", "--max-tokens", "3"]
    assert generate([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(printed["tokens"][0]) == 3
    assert printed["prompt_tokens"] == [
        load_tokenizer(out, vocab_size=400).encode(b"def f(").size
    ]
