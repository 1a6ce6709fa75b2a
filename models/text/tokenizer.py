"""Text to tokens and back: bytes as they are, byte-level BPE, published vocabularies.

All know how many bytes a token stands for, so that losses compare whatever the
vocabulary. `models.files.vocabulary` reads them from files and writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from models.text.chat import DEFAULT, Message, chosen, render

SPACE = "\u2581"
"""How SentencePiece writes a space."""
_PIECE = 1 << 18  # bytes of text that are tokenized as one
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class TokenizerError(ValueError):
    """A vocabulary cannot be made, or its file is damaged or of another model."""


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


class PretrainedTokenizer:
    """A published tokenizer, as `train` and `generate` need one.

    Args:
      inner: of the `tokenizers` package.
      vocab_size: V of the model, which may be padded beyond the tokenizer's.
      stops: tokens that end a text.
      chat_template: Jinja template that arranges a conversation, or several by name.
      special: how the template calls special tokens, and how these are written.

    Attributes:
      vocab_size: V.
      token_bytes: i32[V], bytes that each token stands for; special ones are 0.
      stops: as given.

    Raises:
      ValueError: it has tokens that the model has not, or spells in an unknown way.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        vocab_size: int,
        stops: frozenset[int] = frozenset(),
        chat_template: str | Mapping[str, str] | None = None,
        special: Mapping[str, str] | None = None,
    ) -> None:
        self.inner, self.vocab_size, self.stops = inner, vocab_size, stops
        if isinstance(chat_template, str):
            chat_template = {DEFAULT: chat_template}
        self._templates, self._special = chat_template or {}, special or {}
        vocabulary = inner.get_vocab(with_added_tokens=True)
        if not vocabulary or max(vocabulary.values()) >= vocab_size:
            raise ValueError(
                f"the tokenizer has {len(vocabulary)} tokens up to number "
                f"{max(vocabulary.values(), default=-1)} and the model {vocab_size}"
            )
        spell = _spelling(inner)
        added = inner.get_added_tokens_decoder()
        self._texts = [b""] * vocab_size
        for text, number in vocabulary.items():
            if number not in added:
                self._texts[number] = spell(text)
            elif not added[number].special:
                self._texts[number] = text.encode()
        self.token_bytes = np.array([len(text) for text in self._texts], np.int32)

    def encode(self, text: bytes, *, is_start: bool = True) -> np.ndarray:
        """Tokens i32[n] of a text.

        Args:
          text: UTF-8; other bytes become U+FFFD.
          is_start: begin with the token that the model expects first.
        """
        readable = text.decode("utf-8", errors="replace")
        found = self.inner.encode(readable, add_special_tokens=is_start)
        return np.array(found.ids, np.int32)

    def encode_chat(
        self, messages: Sequence[Message], *, template: str | None = None
    ) -> np.ndarray:
        """Tokens i32[n] of a conversation and the beginning of the answer.

        Args:
          messages: each with a role and its content.
          template: by name, where the model has several; None is "default".

        Raises:
          ValueError: the model has no such chat template, or it does not render.
        """
        found = chosen(self._templates, template)
        text = render(found, messages, special=self._special)
        return self.encode(text.encode(), is_start=False)  # it is written

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The bytes of the tokens, which may end inside a character."""
        return b"".join(self._texts[token] for token in tokens)


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


def _spelling(inner: tokenizers.Tokenizer) -> Any:
    """The function from a token as it is written to the bytes that it stands for."""
    written = json.dumps(json.loads(inner.to_str()).get("decoder"))
    if "ByteLevel" in written:
        alphabet = {character: byte for byte, character in byte_alphabet().items()}

        def spell(token: str) -> bytes:
            if all(character in alphabet for character in token):
                return bytes(alphabet[character] for character in token)
            return token.encode()

    elif "ByteFallback" in written or "Metaspace" in written:

        def spell(token: str) -> bytes:
            if byte := _BYTE.fullmatch(token):
                return bytes.fromhex(byte[1])
            return token.replace(SPACE, " ").encode()

    else:
        raise ValueError("the tokenizer is neither byte-level nor SentencePiece BPE")
    return spell
