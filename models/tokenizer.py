"""Text to tokens and back: bytes as they are, or byte-level BPE by `tokenizers`.

Both are lossless on UTF-8 text and know how many bytes a token stands for, so that
losses compare whatever the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from models.load import write_atomic

FILE = "tokenizer.json"
_PIECE = 1 << 18  # bytes of text that are tokenized as one


class TokenizerError(ValueError):
    """A tokenizer's file is missing, damaged or of another vocabulary."""


class Tokenizer(Protocol):
    """What `train` and `generate` need.

    Attributes:
      vocab_size: V, tokens are 0 to V - 1.
      token_bytes: i32[V], bytes that each token stands for.
      stops: tokens that end a text.
    """

    vocab_size: int
    token_bytes: np.ndarray
    stops: frozenset[int]

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens u16 or i32[n] of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of tokens."""
        ...


class ByteTokenizer:
    """Every byte is a token."""

    vocab_size = 256
    stops: frozenset[int] = frozenset()

    def __init__(self) -> None:
        """Nothing to load."""
        self.token_bytes = np.ones(256, np.int32)

    def encode(self, text: bytes) -> np.ndarray:
        """The bytes, u8[n]."""
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The bytes."""
        return bytes(tokens)


class BPETokenizer:
    """Byte-pair encoding of UTF-8 bytes, as trained by `train_bpe`."""

    stops: frozenset[int] = frozenset()

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Wraps a byte-level tokenizer without special tokens."""
        self.inner = inner
        self.vocab_size = inner.get_vocab_size()
        alphabet = {character: byte for byte, character in byte_alphabet().items()}
        texts = (inner.id_to_token(number) or "" for number in range(self.vocab_size))
        self._texts = [bytes(alphabet[c] for c in text) for text in texts]
        self.token_bytes = np.array([len(text) for text in self._texts], np.int32)

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of a text; bytes that are not UTF-8 become U+FFFD."""
        pieces = _pieces(text.decode("utf-8", errors="replace"))
        found = self.inner.encode_batch_fast(pieces, add_special_tokens=False)
        kind = np.uint16 if self.vocab_size <= 1 << 16 else np.int32
        parts = [np.array(x.ids, kind) for x in found]
        return np.concatenate([np.zeros(0, kind), *parts])

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The bytes of the tokens, which may end inside a character."""
        return b"".join(self._texts[token] for token in tokens)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json in a folder."""
        write_atomic(folder / FILE, self.inner.to_str(pretty=True))


def train_bpe(text: bytes, *, vocab_size: int) -> BPETokenizer:
    """Learns byte-pair merges from a text.

    Args:
      text: UTF-8.
      vocab_size: V, at least 257.

    Returns:
      A tokenizer with V tokens.

    Raises:
      TokenizerError: the vocabulary is too small, or larger than the text can fill.
    """
    if vocab_size <= 256:
        raise TokenizerError(
            f"a BPE vocabulary holds the 256 bytes and merges, got {vocab_size}: use "
            "--vocab-size 2048, or --tokenizer bytes with 256"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(byte_alphabet().values()),
        show_progress=False,
    )
    inner.train_from_iterator(_pieces(text.decode("utf-8", errors="replace")), trainer)
    if (found := inner.get_vocab_size()) != vocab_size:
        raise TokenizerError(
            f"the text has merges for a vocabulary of {found} alone, not {vocab_size}: "
            f"use --vocab-size {found} or more text"
        )
    return BPETokenizer(inner)


def load_tokenizer(folder: Path, *, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run folder: its tokenizer.json, or bytes where there is none.

    Raises:
      TokenizerError: the file is damaged, or does not fit the model's vocabulary.
    """
    path = folder / FILE
    if not path.exists():
        found: Tokenizer = ByteTokenizer()
    else:
        try:
            found = BPETokenizer(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the package raises Exception itself
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise TokenizerError(
                f"{path} is not a byte-level BPE tokenizer ({reason[0][:200]}): "
                "restore it from a copy"
            ) from error
    if found.vocab_size != vocab_size:
        raise TokenizerError(
            f"{folder} has a tokenizer of {found.vocab_size} tokens and a model of "
            f"{vocab_size}: restore {FILE} from a copy"
        )
    return found


def byte_alphabet() -> dict[int, str]:
    """The character that byte-level BPE writes for each byte (as GPT-2 does)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    moved = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return {byte: chr(byte) for byte in kept} | moved


def _pieces(text: str) -> list[str]:
    """A text cut at ends of lines, so that pieces are tokenized side by side."""
    cut, start = [0], 0
    for line in re.finditer("\n(?=\\S)", text):
        if line.end() - start >= _PIECE:
            start = line.end()
            cut.append(start)
    ends = [*cut[1:], len(text)]
    return [text[a:b] for a, b in zip(cut, ends, strict=True) if b > a]
