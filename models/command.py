"""What commands share: options as dataclasses, errors of one line, Ctrl-C, JSON.

A command's dataclass ends its docstring with an example, which `--help` shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

_STOPPED = "stopped: nothing was written"
_RAISING = ("strict", "surrogateescape")


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

    Paths may begin with ~, also behind an equals sign, where shells leave it.
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
                registry=_paths(),
            )
    except SystemExit as stopped:
        if not stopped.code:
            raise
    lines = [line.strip(" │|") for line in printed.getvalue().splitlines()[1:]]
    words = " ".join(line for line in lines if line.strip("─-╭╮╰╯+ "))
    words = words.replace(f"Missing from {prog}:", "missing:")
    raise ValueError(words.split(" For full helptext")[0] + f" (see {prog} --help)")


def _paths() -> ConstructorRegistry:
    """How paths are read."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def path(info: Any) -> PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: at_home(words[0]),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def at_home(path: str | Path) -> Path:
    """A path whose ~ is the user's folder; of a user that is not known it stays."""
    return Path(os.path.expanduser(path))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A question that names the nearest choice, with a space behind it, or nothing.

    Args:
        word: as it was written.
        choices: what it can be.

    Returns:
        For a message that goes on with all choices.

    Example:
        >>> did_you_mean("needel", ["needle", "words"])
        'did you mean needle? '
    """
    near = difflib.get_close_matches(word.lower(), list(choices), n=1)
    return f"did you mean {near[0]}? " if near else ""


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
    _print_what_can_be_printed()
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
    except (ArithmeticError, AssertionError, MemoryError, RuntimeError) as error:
        if missing := _missing_device():
            print(f"error: {missing}", file=sys.stderr)
            return 2
        if isinstance(error, AssertionError):
            raise
        reason = str(error).strip() or type(error).__name__
        print(f"error: {doing} failed: {reason.splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or stopped}", file=sys.stderr)
        return 130


def _print_what_can_be_printed() -> None:
    """Has characters that a terminal cannot show replaced, not raised.

    Where its encoding is ASCII or of one country, a model's text would end the command
    after the work was done.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _RAISING:
            stream.reconfigure(errors="replace")


def _missing_device() -> str | None:
    """What to say where jax finds no device of those that it was told to use."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError):
        told = os.environ.get("JAX_PLATFORMS", "")
        return (
            f"jax finds no device of the kind that JAX_PLATFORMS={told} names: leave "
            "it out to run on what there is, or install jax for that kind"
        )
    return None


def early_value(arguments: list[str], flag: str) -> str | None:
    """Value of a flag before the rest is parsed: `--flag VALUE` or `--flag=VALUE`."""
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None
