"""What commands share: options as dataclasses, errors of one line, Ctrl-C, JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

_STOPPED = "stopped: nothing was written"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonOption:
    """Base of the options of a command that has results to hand on."""

    json: bool = False
    """End with one line on stdout that holds the results as JSON."""

    def print_json(self, results: Any) -> None:
        """Prints that line where it was asked for."""
        if self.json:
            print(json.dumps(results), flush=True)


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
    arguments: Sequence[str] | None,
    work: Callable[[Any], int | None],
    *,
    prog: str,
    default: Any = tyro.MISSING_NONPROP,
    stopped: str = _STOPPED,
    doing: str = "the command",
) -> int:
    """Reads a command line and does its work: `exit_status` of both.

    Args:
        kind: dataclass of the options.
        arguments: instead of those of the process.
        work: is given the options; raises ValueError or OSError for what it refuses.
        prog: how the program is called.
        default: an instance that holds the defaults, if not the dataclass itself.
        stopped: what to say on Ctrl-C.
        doing: what to call the work where it fails.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(
        lambda: work(parse(kind, words, prog=prog, default=default)),
        stopped=stopped,
        doing=doing,
    )


def exit_status(
    work: Callable[[], int | None],
    *,
    stopped: str = _STOPPED,
    doing: str = "the command",
) -> int:
    """Does the work of a command, with errors of one line on stderr.

    Args:
        work: raises ValueError or OSError for what it refuses.
        stopped: what to say on Ctrl-C, if the interruption brings no words itself.
        doing: what to call the work where it fails.

    Returns:
        What `work` returned (None is 0), 1 failed while running, 2 refused, 130 Ctrl-C.
    """
    try:
        return work() or 0
    except BrokenPipeError:  # the reader has left: say nothing, also not at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        # Without what tyro puts before a dataclass's own words.
        said = str(error).removeprefix("Error parsing Command: ")
        print(f"error: {said}", file=sys.stderr)
        return 2
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        reason = str(error).strip() or type(error).__name__
        print(f"error: {doing} failed: {reason.splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or stopped}", file=sys.stderr)
        return 130


def early_value(arguments: list[str], flag: str) -> str | None:
    """Value of a flag before the rest is parsed: `--flag VALUE` or `--flag=VALUE`."""
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None
