"""GGUF files: header checked before it is believed, tensors dequantized one at a time.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf`
package parses and dequantizes; it trusts what the header says, so that is walked first.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

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
# Bytes of a value by its type's number; 8 is a text and 9 a list.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
# Stored bytes that are dequantized at a time.
_AT_ONCE = 1 << 20


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
        _check_header(path)
        try:
            reader = gguf.GGUFReader(path)
            self.fields: dict[str, Any] = {
                name: field.contents() for name, field in reader.fields.items()
            }
        except Exception as error:  # whatever a header can still make it do
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ValueError(f"{path} is not a whole GGUF file ({reason})") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape; matrices are [outputs, inputs]."""
        return {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, start: int, rows: int) -> np.ndarray:
        """Rows of a tensor, f32."""
        tensor = self._tensors[name]
        stored = tensor.data[start : start + rows]
        values = np.empty((len(stored), *self.shapes()[name][1:]), np.float32)
        # What `dequantize` takes on the way is several times its result.
        step = max(1, _AT_ONCE // stored[:1].nbytes)
        for i in range(0, len(stored), step):
            part = stored[i : i + step]
            values[i : i + step] = dequantize(part, tensor.tensor_type)
        return values


def _check_header(path: Path) -> None:
    """Walks the header and refuses what points or counts beyond the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            walk = _Walk(file, size)
            if walk.take(4) != _MAGIC:
                raise ValueError("it does not begin with GGUF")
            version = walk.number("<I")
            if version not in _VERSIONS:
                raise ValueError(f"version is {version}, not one of {_VERSIONS}")
            tensors = walk.count("tensor_count", _MOST_ENTRIES)
            entries = walk.count("kv_count", _MOST_ENTRIES)
            alignment = 32
            for _ in range(entries):
                name, value = walk.entry()
                if name == "general.alignment":
                    alignment = value
            if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
                raise ValueError(f"general.alignment is {alignment}")
            places = [walk.tensor() for _ in range(tensors)]
            begin = -(-file.tell() // alignment) * alignment
            for name, offset, length in places:
                if offset % alignment or begin + offset + length > size:
                    raise ValueError(f"{name} lies outside the file")
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error})") from None


class _Walk:
    """Reads a header from its start, never more than what is there."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def take(self, length: int) -> bytes:
        found = self.file.read(length)
        if len(found) != length:
            raise ValueError("the header ends early")
        return found

    def skip(self, length: int) -> None:
        if self.file.tell() + length > self.size:
            raise ValueError("the header ends early")
        self.file.seek(length, 1)

    def number(self, kind: str) -> int:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def count(self, name: str, most: int) -> int:
        found = self.number("<Q")
        if found > most:
            raise ValueError(f"{name} is {found}, above {most}")
        return found

    def text(self, name: str) -> str:
        length = self.count(f"the length of {name}", _LONGEST_TEXT)
        return self.take(length).decode("utf-8", "replace")

    def entry(self) -> tuple[str, int | None]:
        """A name, and its value where that is one whole number of 4 bytes."""
        name = self.text("a name")
        kind = self.number("<I")
        if kind == _LIST:
            kind, length = self.number("<I"), self.count(name, _LONGEST_LIST)
            if kind == _TEXT:
                for _ in range(length):
                    self.skip(self.count(f"a text of {name}", _LONGEST_TEXT))
            else:
                self.skip(length * self._size(name, kind))
            return name, None
        if kind == _TEXT:
            self.skip(self.count(f"the text of {name}", _LONGEST_TEXT))
            return name, None
        if kind == 4:
            return name, self.number("<I")
        self.skip(self._size(name, kind))
        return name, None

    def tensor(self) -> tuple[str, int, int]:
        """Name, offset and bytes of a tensor."""
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
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        values = 1
        for size in sizes:
            values *= size
        if not values or sizes[0] % block:
            raise ValueError(f"{name} has a shape of {sizes}, in blocks of {block}")
        return name, offset, values // block * block_bytes

    def _size(self, name: str, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"{name} is of an unknown type {kind}")
        return _SIZES[kind]
