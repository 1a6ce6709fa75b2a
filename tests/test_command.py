"""What commands share: paths, words that are close, what cannot be printed."""

import dataclasses
import io
import sys
from pathlib import Path

import jax
import pytest

from models.command import did_you_mean, exit_status, parse


@dataclasses.dataclass(frozen=True)
class Command:
    """Takes paths."""

    out: Path
    """A folder."""
    others: tuple[Path, ...] = ()
    """Folders."""
    maybe: Path | None = None
    """A folder."""
    prompt: str = ""
    """A text."""


def test_paths_begin_at_home(monkeypatch):
    """Behind an equals sign shells leave the ~; a text stays as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--out=~/x", "--others", "~/y", "z", "--maybe=~", "--prompt=~/x"]
    found = parse(Command, words, prog="x")
    assert found == Command(
        Path("/home/me/x"), (Path("/home/me/y"), Path("z")), Path("/home/me"), "~/x"
    )
    assert parse(Command, ["--out=~nobody-here/x"], prog="x").out == Path(
        "~nobody-here/x"
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_cannot_be_printed_is_replaced(encoding, monkeypatch):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)  # a process may have none
    assert exit_status(lambda: print("für 日本 \udcff")) == 0
    want = {"ascii": "f?r ?? ?", "cp1252": "für ?? ?", "utf-8": "für 日本 ?"}
    assert written.getvalue().decode(encoding) == want[encoding] + "\n"


def test_a_device_that_is_missing_is_one_sentence(monkeypatch, capsys):
    """Without a GPU jax 0.10 raises a bare AssertionError for JAX_PLATFORMS=cuda."""

    def fail():
        raise AssertionError

    with pytest.raises(AssertionError):  # of anything else it is a fault of ours
        exit_status(fail)
    monkeypatch.setattr(jax, "devices", fail)
    assert exit_status(fail) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: jax finds no device of the kind")
    assert captured.err.count("\n") == 1


def test_a_word_that_is_close_is_answered_with_the_nearest():
    commands = ("report", "speed")
    for word, nearest in (
        ("reprot", "report"),
        ("SPEED", "speed"),
        ("repot", "report"),
    ):
        assert did_you_mean(word, commands) == f"did you mean {nearest}? "
    assert did_you_mean("xyz", commands) == did_you_mean("", commands) == ""
