"""GGUF files: a header that is checked as it is read, tensors dequantized as needed.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf`
package dequantizes. Its reader believes the header, and takes seconds for a vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np
from gguf.quants import dequantize

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_ENTRIES = 1 << 16
_LONGEST_TEXT = 1 << 24
_LONGEST_LIST = 1 << 21
_DTYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_DTYPES += ("Q4_K", "Q5_K", "Q6_K")
# How a value is stored, by its type's number; 8 is a text and 9 a list.
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"}
_NUMBERS |= {7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_TEXT, _LIST = 8, 9
# Stored bytes that are dequantized at a time.
_AT_ONCE = 1 << 20


class _Tensor(NamedTuple):
    """Where a tensor lies: its shape, outermost first, and kind; bytes from offset."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    length: int


class GGUFFile:
    """One GGUF file.

    Args:
      path: the file.

    Attributes:
      fields: its metadata by name, as plain values.

    Raises:
      ValueError: it is damaged, its header lies, or a tensor is of an unknown kind.
    """

    def __init__(self, path: Path) -> None:
        self.fields, self._tensors = _read_header(path)
        self._bytes = np.asarray(np.memmap(path, np.uint8, "r"))  # slices are cheaper

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape; matrices are [outputs, inputs]."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, start: int, rows: int) -> np.ndarray:
        """Rows of a tensor, f32."""
        shape, kind, offset, length = self._tensors[name]
        stored = self._bytes[offset : offset + length].reshape(shape[0], -1)
        stored = stored[start : start + rows]
        values = np.empty((len(stored), *shape[1:]), np.float32)
        # What `dequantize` takes on the way is several times its result.
        step = max(1, _AT_ONCE // stored[:1].nbytes)
        for i in range(0, len(stored), step):
            part = values[i : i + step]
            part[...] = dequantize(stored[i : i + step], kind).reshape(part.shape)
        return values


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Reads fields and tensors; refuses what points or counts beyond the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _Header(file, size)
            if header.take(4) != _MAGIC:
                raise ValueError("it does not begin with GGUF")
            version = header.number("<I")
            if version not in _VERSIONS:
                raise ValueError(f"version is {version}, not one of {_VERSIONS}")
            tensors = header.count("tensor_count", _MOST_ENTRIES)
            entries = header.count("kv_count", _MOST_ENTRIES)
            fields = _by_name(header.entry() for _ in range(entries))
            alignment = fields.get("general.alignment", 32)
            if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
                raise ValueError(f"general.alignment is {alignment}")
            found = _by_name(header.tensor() for _ in range(tensors))
            begin = -(-file.tell() // alignment) * alignment
            for name, (_, _, offset, length) in found.items():
                if offset % alignment or begin + offset + length > size:
                    raise ValueError(f"{name} lies outside the file")
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error})") from None
    placed = {k: x._replace(offset=begin + x.offset) for k, x in found.items()}
    return fields, placed


def _by_name(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = value
    return found


class _Header:
    """Reads a header from its start, never more than what is there."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def take(self, length: int) -> bytes:
        if self.file.tell() + length > self.size:
            raise ValueError("the header ends early")
        return self.file.read(length)

    def number(self, kind: str) -> int:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def count(self, name: str, most: int) -> int:
        found = self.number("<Q")
        if found > most:
            raise ValueError(f"{name} is {found}, above {most}")
        return found

    def text(self, name: str) -> str:
        length = self.count(f"the length of {name}", _LONGEST_TEXT)
        return self.take(length).decode()

    def entry(self) -> tuple[str, Any]:
        """A name and its value."""
        name = self.text("a name")
        kind = self.number("<I")
        if kind == _TEXT:
            return name, self.text(f"the text of {name}")
        if kind != _LIST:
            return name, self.numbers(name, kind, 1)[0]
        kind, length = self.number("<I"), self.count(name, _LONGEST_LIST)
        if kind == _TEXT:
            label = f"a text of {name}"
            return name, [self.text(label) for _ in range(length)]
        return name, self.numbers(name, kind, length)

    def numbers(self, name: str, kind: int, length: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise ValueError(f"{name} is of an unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()

    def tensor(self) -> tuple[str, _Tensor]:
        """Name of a tensor and what is known of it."""
        name = self.text("a tensor's name")
        axes = self.number("<I")
        if not 1 <= axes <= 4:
            raise ValueError(f"{name} has {axes} axes")
        sizes = [self.number("<Q") for _ in range(axes)]
        kind, offset = self.number("<I"), self.number("<Q")
        names = {x.value: x.name for x in gguf.GGMLQuantizationType}
        if names.get(kind) not in _DTYPES:
            raise ValueError(
                f"{name} is {names.get(kind, kind)}, not one of {', '.join(_DTYPES)}"
            )
        quantized = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantized]
        values = 1
        for size in sizes:
            values *= size
        if not values or sizes[0] % block:
            raise ValueError(f"{name} has a shape of {sizes}, in blocks of {block}")
        shape = tuple(reversed(sizes))
        return name, _Tensor(shape, quantized, offset, values // block * block_bytes)
