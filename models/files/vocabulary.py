"""Tokenizers in files: tokenizer.json of a run or a published model, GGUF's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from models.files.atomic import write_atomic
from models.files.stored import read_json
from models.files.templates import folder_templates, gguf_templates
from models.text.tokenizer import (
    SPACE,
    BPETokenizer,
    ByteTokenizer,
    PretrainedTokenizer,
    Tokenizer,
    TokenizerError,
)

FILE = "tokenizer.json"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_WORDS = rf"{_BEFORE}\p{{L}}+"
_SIGNS, _SPACES = r" ?[^\s\p{L}\p{N}]+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf"{_SIGNS}[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*"
# How a GGUF file's tokenizer.ggml.pre cuts a text before merging; "" is GPT-2's way.
_CUTS = {
    "default": "",
    "gpt-2": "",
    "smollm": "digits",
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
    "tekken": rf"{_CASED}|\p{{N}}|{_SIGNS}[\r\n/]*|{_SPACES}",
}
_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # tokenizer.ggml.token_type
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")
TURN_ENDS += ("<|endoftext|>", "<|end_of_text|>", "<|return|>", "<|call|>", "<EOT>")
TURN_ENDS += (
    "_<EOT>",
    "[EOT]",
    "<end_of_utterance>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
"""How chat models write the end of a turn; files often name one of several."""
# Phi-3's other special tokens take in the white space behind them.
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes tokenizer.json into a run folder; bytes need none."""
    if isinstance(tokenizer, BPETokenizer):
        write_atomic(folder / FILE, tokenizer.inner.to_str(pretty=True))


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


def from_folder(folder: Path, *, vocab_size: int) -> PretrainedTokenizer | None:
    """The tokenizer of a Hugging Face folder; None where there is no tokenizer.json.

    Raises:
      ValueError: a file is damaged, or the tokenizer does not fit the model.
    """
    if not (folder / FILE).exists():
        return None
    try:
        inner = tokenizers.Tokenizer.from_str(json.dumps(read_json(folder / FILE)))
    except Exception as error:  # the package raises Exception itself
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{folder / FILE} is not a tokenizer ({reason})") from error
    inner.no_padding()
    inner.no_truncation()
    settings: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            found = read_json(folder / name)
            settings |= found if isinstance(found, dict) else {}
    templates = folder_templates(folder, settings)
    written = {name: _written(settings.get(name)) for name in _SPECIAL}
    special = {name: token for name, token in written.items() if token}
    ends = settings.get("eos_token_id")
    stops = {x for x in (ends if isinstance(ends, list) else [ends]) if type(x) is int}
    if (number := inner.token_to_id(written["eos_token"])) is not None:
        stops.add(number)
    for number, token in inner.get_added_tokens_decoder().items():
        ends_turns = token.special and token.content in TURN_ENDS
        if ends_turns and any(token.content in x for x in templates.values()):
            stops.add(number)
    return PretrainedTokenizer(
        inner,
        vocab_size=vocab_size,
        stops=frozenset(stops),
        chat_template=templates,
        special=special,
    )


def _written(token: Any) -> str:
    """A token of tokenizer_config.json, which is a text or an object with one."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def from_gguf(metadata: dict[str, Any], *, vocab_size: int) -> PretrainedTokenizer:
    """Rebuilds the tokenizer that a GGUF file describes.

    Args:
      metadata: plain values by name.
      vocab_size: V of the model.

    Raises:
      ValueError: a table is missing or of the wrong kind, or the tokenizer is of a
        kind that is not known here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _table(metadata, "tokens", str)
    types = _table(metadata, "token_type", int)
    if len(types) != len(tokens):
        raise ValueError("tokenizer.ggml.token_type and .tokens differ in length")
    if kind == "gpt2":
        inner = _byte_level(metadata, tokens)
    elif kind == "llama":
        inner = _sentence_piece(metadata, tokens, types)
    else:
        raise ValueError(f"tokenizer.ggml.model is {kind!r} and can be gpt2 or llama")
    strips = _is_phi3(metadata)
    stops = set()
    for number, (token, is_what) in enumerate(zip(tokens, types, strict=True)):
        if is_what in (_CONTROL, _USER):
            added = tokenizers.AddedToken(
                token,
                special=is_what == _CONTROL,
                rstrip=strips and token not in _PHI3_KEEPS,
            )
            add = inner.add_special_tokens if added.special else inner.add_tokens
            add([added])
            if token in TURN_ENDS:
                stops.add(number)
    names = ("bos", "eos", "eot", "eom")
    numbers = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names}
    numbers = {
        name: number
        for name, number in numbers.items()
        if type(number) is int and 0 <= number < len(tokens)
    }
    before = metadata.get("tokenizer.ggml.add_bos_token", _begins(metadata, kind))
    if before and "bos" in numbers:
        first = tokens[numbers["bos"]]
        inner.post_processor = processors.TemplateProcessing(
            single=[first, "$A"], special_tokens=[(first, numbers["bos"])]
        )
    stops |= {numbers[name] for name in names[1:] if name in numbers}
    return PretrainedTokenizer(
        inner,
        vocab_size=vocab_size,
        stops=frozenset(stops),
        chat_template=gguf_templates(metadata),
        special={f"{name}_token": tokens[x] for name, x in numbers.items()},
    )


def _is_phi3(metadata: dict[str, Any]) -> bool:
    """Whether a file is of Phi-3, which GGUF says by architecture or name alone."""
    name = str(metadata.get("general.name", "")).lower()
    is_named = "phi-3" in name or "phi3" in name
    return is_named or metadata.get("general.architecture") == "phi3"


def _begins(metadata: dict[str, Any], kind: str) -> bool:
    """Whether a text begins with a token of its own where the file does not say."""
    return kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"


def _table(metadata: dict[str, Any], name: str, kind: type) -> list[Any]:
    found = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(x, kind) for x in found):
        raise ValueError(f"tokenizer.ggml.{name} is missing or damaged")
    return found


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    """GPT-2's way: bytes, cut by a pattern, then merged."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _CUTS:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r} and can be one of {', '.join(_CUTS)}"
        )
    pairs = [tuple(x.split(" ")) for x in _table(metadata, "merges", str)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        inner = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    except Exception as error:  # a merge of pieces that are no tokens
        raise ValueError(f"tokenizer.ggml.merges: {error}") from error
    cut, byte_level = (
        _CUTS[name],
        pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=_CUTS[name] in ("", "digits")
        ),
    )
    before = []
    if cut == "digits":
        before = [pre_tokenizers.Digits(individual_digits=True)]
    elif cut:
        before = [pre_tokenizers.Split(Regex(cut), "isolated")]
    inner.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentence_piece(
    metadata: dict[str, Any], tokens: list[str], types: list[int]
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: the pair whose union scores best is merged first."""
    scores = _table(metadata, "scores", float)
    if len(scores) != len(tokens):
        raise ValueError("tokenizer.ggml.scores and .tokens differ in length")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [
        (-scores[number], number, cut, (token[:cut], token[cut:]))
        for token, number in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = [token for token, x in zip(tokens, types, strict=True) if x == _UNKNOWN]
    bpe = models.BPE(
        vocabulary,
        [pair for *_, pair in sorted(merges)],
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    inner = tokenizers.Tokenizer(bpe)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    before = [normalizers.Prepend(SPACE)] if prefix else []
    inner.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return inner
