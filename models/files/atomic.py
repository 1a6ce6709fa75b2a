"""Files that readers see old or new, never in part."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Gives the path of an empty file that takes the place of `path` at the end.

    On an exception `path` stays as it was. Its folder must exist.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file so that a reader sees the old text or the new, never a part.

    Args:
      path: the file; its folder must exist.
      text: written as UTF-8.
    """
    with replacing(Path(path)) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
