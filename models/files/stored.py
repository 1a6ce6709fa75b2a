"""Tensors in files of others: safetensors folders, mapped and read one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")
_LARGEST_TEXT = 1 << 26


class Stored(Protocol):
    """Named tensors that are read when they are asked for."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape; matrices are [outputs, inputs]."""
        ...

    def read(self, name: str, start: int, rows: int) -> np.ndarray:
        """Some rows of a tensor, in a floating dtype."""
        ...


class SafetensorsFolder:
    """The safetensors files of a Hugging Face folder, one or many.

    Args:
      folder: holds model.safetensors, or an index and the files that it names.

    Raises:
      ValueError: there are none, one is damaged, or the index points elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for path, expected in _shards(folder).items():
            self._where |= _headers(path, expected)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: shape for name, (_, shape) in self._where.items()}

    def read(self, name: str, start: int, rows: int) -> np.ndarray:
        """Rows of a tensor, copied out of the mapped file."""
        path, _ = self._where[name]
        # Opened anew each time, so that no more than one tensor's pages stay mapped.
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.get_slice(name)[start : start + rows]


def read_json(path: Path) -> Any:
    """Content of a JSON file from outside.

    Raises:
      ValueError: it is missing, too large, or no JSON.
    """
    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{path} cannot be read as JSON ({reason})") from error


def read_text(path: Path) -> str:
    """A text file from outside, UTF-8.

    Raises:
      ValueError: it is too large, or is no UTF-8.
      OSError: it cannot be read.
    """
    if path.stat().st_size > _LARGEST_TEXT:
        raise ValueError(f"{path} has more than {_LARGEST_TEXT} bytes")
    return path.read_text(encoding="utf-8")


def inside(folder: Path, name: Any) -> Path:
    """The file of a folder that another file names.

    Links may lead to another place in the folder, or, as in the cache of Hugging Face,
    from snapshots/NAME to the blobs beside snapshots.

    Raises:
      ValueError: the name is a path, or the file lies outside or does not exist.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{folder} names a file {name!r:.80}, which is a path")
    found = (folder / name).resolve()
    allowed = [folder.resolve()]
    caches = [x.parent for x in folder.resolve().parents if x.name == "snapshots"]
    allowed += [cache / "blobs" for cache in caches[:1]]
    if not any(found.is_relative_to(place) for place in allowed):
        raise ValueError(f"{folder / name} leads out of its folder, to {found}")
    if not found.is_file():
        raise ValueError(f"{folder / name} is not a file")
    return found


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The files, and what each of them must hold where an index says so."""
    if (folder / WEIGHTS).exists() or (folder / WEIGHTS).is_symlink():
        return {inside(folder, WEIGHTS): None}
    if not (folder / INDEX).exists():
        pickled = sorted(x.name for x in folder.glob("*.bin"))
        if pickled:
            raise ValueError(
                f"{folder} holds its weights as {pickled[0]}, a pickle, which can run "
                "code when it is read: convert it to safetensors"
            )
        raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
    content = read_json(inside(folder, INDEX))
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{folder / INDEX} lacks weight_map")
    found: dict[Path, set[str] | None] = {}
    for tensor, name in places.items():
        names = found.setdefault(inside(folder, name), set())
        assert names is not None
        names.add(tensor)
    return found


def _headers(
    path: Path, expected: set[str] | None
) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """What a file holds, by its header alone."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if expected is not None and names != expected:
                odd = sorted(names ^ expected)[:3]
                raise ValueError(f"{path} and {INDEX} disagree about {odd}")
            found = {}
            for name in names:
                view = file.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{path}: {name} is {view.get_dtype()}, not one of "
                        f"{', '.join(_DTYPES)}"
                    )
                found[name] = (path, tuple(view.get_shape()))
            return found
    except (safetensors.SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{path} is not a whole safetensors file ({reason})") from None
