"""Bytes and byte-level BPE: lossless, saved, loaded, refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.files.vocabulary import load_tokenizer, save_tokenizer
from models.text.tokenizer import BPETokenizer, ByteTokenizer, TokenizerError, train_bpe

TEXT = Path(dataclasses.__file__).read_bytes()
LOW = train_bpe(b"low lower lowest \n" * 9, vocab_size=260)


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_bpe(TEXT, vocab_size=400)


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_survives(text):
    for each in (LOW, ByteTokenizer()):
        tokens = each.encode(text.encode())
        assert each.decode(tokens.tolist()) == text.encode()
        assert each.token_bytes[tokens].sum() == len(text.encode())


def test_merges_are_learned_and_pieces_join(bpe, monkeypatch):
    tokens = bpe.encode(TEXT)
    assert (bpe.vocab_size, tokens.dtype) == (400, np.uint16)
    assert tokens.size < 0.6 * len(TEXT)
    assert bpe.decode(tokens.tolist()) == TEXT
    assert bpe.token_bytes[tokens].sum() == len(TEXT)
    monkeypatch.setattr("models.text.tokenizer._PIECE", 1000)
    assert bpe.decode(bpe.encode(TEXT).tolist()) == TEXT
    assert bpe.encode(b"").size == 0


def test_saved_tokenizer_is_the_same(bpe, tmp_path):
    save_tokenizer(tmp_path, bpe)
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
    save_tokenizer(tmp_path, bpe)
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
