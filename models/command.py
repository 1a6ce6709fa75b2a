"""Dataclasses from the command line, with errors of one sentence."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import tyro


def parse(
    kind: Any, arguments: list[str], *, prog: str, default: Any = tyro.MISSING_NONPROP
) -> Any:
    """Reads a dataclass from the command line.

    Args:
        kind: the dataclass.
        arguments: words of the command line.
        prog: how the program is called.
        default: an instance that holds the defaults, if not the dataclass itself.

    Returns:
        The instance.

    Raises:
        ValueError: with what tyro would print in a box, as one sentence.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                kind,
                args=arguments,
                prog=prog,
                default=default,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stopped:
        if not stopped.code:
            raise
    lines = [line.strip(" │|") for line in printed.getvalue().splitlines()[1:]]
    words = " ".join(line for line in lines if line.strip("─-╭╮╰╯+ "))
    words = words.replace(f"Missing from {prog}:", "missing:")
    raise ValueError(words.split(" For full helptext")[0] + f" (see {prog} --help)")


def early_value(arguments: list[str], flag: str) -> str | None:
    """Value of a flag before the rest is parsed: `--flag VALUE` or `--flag=VALUE`."""
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None
