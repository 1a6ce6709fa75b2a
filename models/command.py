"""Dataclasses from the command line, with errors of one sentence."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
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
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as stopped:
        if not stopped.code:
            raise
    lines = [line.strip(" │|") for line in printed.getvalue().splitlines()[1:]]
    words = " ".join(line for line in lines if line.strip("─-╭╮╰╯+ "))
    words = words.replace(f"Missing from {prog}:", "missing:")
    raise ValueError(words.split(" For full helptext")[0] + f" (see {prog} --help)")


def carry_out(
    kind: Any,
    arguments: list[str] | None,
    work: Callable[[Any], int | None],
    *,
    prog: str,
    default: Any = tyro.MISSING_NONPROP,
    stopped: str = "stopped: nothing was written",
) -> int:
    """Reads a command line and does its work, with errors of one line on stderr.

    Args:
        kind: dataclass of the options.
        arguments: instead of those of the process.
        work: is given the options; raises ValueError or OSError for what it refuses.
        prog: how the program is called.
        default: an instance that holds the defaults, if not the dataclass itself.
        stopped: what to say on Ctrl-C.

    Returns:
        Exit status: what `work` returned (None is 0), 2 refused, 130 Ctrl-C.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return work(parse(kind, words, prog=prog, default=default)) or 0
    except (ValueError, OSError) as error:
        # Without what tyro puts before a dataclass's own words.
        said = str(error).removeprefix("Error parsing Command: ")
        print(f"error: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130


def early_value(arguments: list[str], flag: str) -> str | None:
    """Value of a flag before the rest is parsed: `--flag VALUE` or `--flag=VALUE`."""
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None
