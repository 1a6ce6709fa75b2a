"""The run folder: whether it may be used, what it was started with.

    RUN/config.json      format, version, model options, training options, corpus
    RUN/tokenizer.json   where the tokens are byte pairs
    RUN/checkpoints/     see `train.files.checkpoints`
    RUN/metrics.csv ...  see `train.files.metrics`

`models/files/` owns the formats of config.json and tokenizer.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from models.files import runs
from models.files.vocabulary import load_tokenizer, save_tokenizer
from models.text.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from train.config import TrainConfig, differences
from train.data import Corpus, load_corpus, split


class CheckpointError(ValueError):
    """A run folder cannot be used; the message says why and what to do."""


def check_folder(out: Path, *, resume: bool) -> bool:
    """Decides whether a run may be started or resumed in a folder; writes nothing.

    Args:
        out: the run folder.
        resume: whether the caller wants to continue a run.

    Returns:
        Whether the folder already holds a run.

    Raises:
        CheckpointError: a run is there and `resume` is not set, no folder is there and
            `resume` is set, or the folder holds something else.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file, not a folder: give another --out")
    if (out / runs.CONFIG_FILE).exists():
        if not resume:
            raise CheckpointError(
                f"{out} already holds a run: continue it with --resume, or give "
                "another --out"
            )
        return True
    if resume and not out.exists():
        raise CheckpointError(
            f"nothing to resume: there is no folder {out}; leave --resume out to start "
            "a run there"
        )
    if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise CheckpointError(
            f"{out} holds files but no run of hsrjax (no config.json): give an empty "
            "or new folder as --out"
        )
    return False


def open_run(
    config: TrainConfig, out: Path, *, resume: bool
) -> tuple[Corpus, Corpus, Tokenizer]:
    """Checks a run folder, or makes it once all else is known to be right.

    Returns:
        The corpus as bytes, the same as tokens, the tokenizer.
    """
    exists = check_folder(out, resume=resume)
    size = config.model.vocab_size
    if exists:
        saved, saved_corpus = read_config(out)
        _check_same_run(config, saved, out=out)
        corpus = load_corpus(config.data)
        _check_corpus(corpus, saved_corpus)
        _check_writable(out)
        tokenizer = load_tokenizer(out, vocab_size=size)
        return corpus, corpus.tokenized(tokenizer), tokenizer
    corpus = load_corpus(config.data)
    if config.tokenizer == "bpe":
        tokenizer = train_bpe(corpus.data.tobytes(), vocab_size=size)
    else:
        tokenizer = ByteTokenizer()
    tokens = corpus.tokenized(tokenizer)
    split(tokens, row_length=config.row_length)
    _create(out, config=config, corpus=corpus, tokenizer=tokenizer)
    return corpus, tokens, tokenizer


def read_config(out: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Reads config.json.

    Returns:
        The options of the run, and name, bytes and sha256 of its corpus.

    Raises:
        CheckpointError: damaged, or not the config of a run.
    """
    try:
        model, options = runs.read_run_config(out)
        corpus = dict(options.pop("corpus"))
        return TrainConfig.from_dict(options, model=model), corpus
    except runs.ModelFileError as error:
        raise CheckpointError(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{out / runs.CONFIG_FILE} does not describe a training run ({error}): "
            "restore it from a copy, or start a new run in another --out"
        ) from error


def read_text(run: Path) -> tuple[TrainConfig, Corpus, Tokenizer]:
    """What a run learned from: its options, its corpus as tokens, its tokenizer.

    Raises:
        ValueError: not a run, or its corpus is no longer there.
    """
    config, _ = read_config(run)
    tokenizer = load_tokenizer(run, vocab_size=config.model.vocab_size)
    return config, load_corpus(config.data).tokenized(tokenizer), tokenizer


def _check_same_run(config: TrainConfig, saved: TrainConfig, *, out: Path) -> None:
    """Raises CheckpointError when options differ that decide what is learned."""
    if names := differences(config, saved):
        raise CheckpointError(
            f"{out} was started with other options ({', '.join(names)}): leave them "
            "out, since --resume takes them from the run, or give another --out"
        )


def _check_corpus(corpus: Corpus, saved: dict[str, Any]) -> None:
    """Raises CheckpointError unless the run was started on this text."""
    if saved.get("sha256") != corpus.sha256:
        raise CheckpointError(
            f"the run was started on another corpus ({saved.get('name')}, "
            f"{saved.get('bytes')} bytes) than {corpus.name} ({corpus.size} bytes): "
            "give the same text with --data, or start a new run in another --out"
        )


def _check_writable(out: Path) -> None:
    """Raises CheckpointError when no file can be made in an existing folder."""
    try:
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise CheckpointError(
            f"cannot write in the folder {out} ({error.strerror}): make it writable or "
            "copy the run to another folder"
        ) from error


def _create(
    out: Path, *, config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer
) -> None:
    """Makes the run folder and writes tokenizer.json, for BPE, and config.json.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    about = {"name": corpus.name, "bytes": corpus.size, "sha256": corpus.sha256}
    options = config.to_dict() | {"corpus": about}
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_tokenizer(out, tokenizer)
        # Last: a folder with a config is a run.
        runs.write_run_config(out, config.model, train=options)
    except OSError as error:
        raise CheckpointError(
            f"cannot write in the folder {out} ({error.strerror}): give another --out"
        ) from error
