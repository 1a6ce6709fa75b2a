"""What all commands share: their options, and how one begins and ends.

A command is a module with a dataclass `Command`, made of `Basics`, and a function
`run(command) -> Results`. Most have `summarize(rows)` and `draw(rows)`, which the rows
of a committed results.csv can be given to as well. One that writes something else than
a folder of results has a function `finish`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.contestants import peers, search
from benchmarks.files import results
from benchmarks.files.environment import environment
from benchmarks.files.results import Results as Results
from benchmarks.harness import devices
from benchmarks.harness.allocator import keep_freed_memory
from benchmarks.harness.inputs import Kind, Source
from models.command import carry_out, did_you_mean

PROG = "python -m benchmarks"
RESULTS = Path("runs/benchmarks")
LEAST = {"keys": 2, "memory_keys": 2, "prefill_keys": 2, "tokens": 2, "contexts": 1}
LEAST |= dict.fromkeys(("batches", "rows", "head_dim", "head_dims", "repeats"), 1)
LEAST |= dict.fromkeys(("r", "continuation", "starts"), 1)
"""Smallest values of what options count, in whichever command has them."""
_ABOUT_PEERS = (
    "Peers to measure beside hsrjax and dense, where a command has them: some of "
    f"{', '.join([*peers.PEERS, *search.PEERS])}; or all, or none."
)


@dataclasses.dataclass(frozen=True)
class Basics:
    """Options that every command has."""

    out: Path | None = None
    """Folder of the results: runs/benchmarks; with --quick, runs/benchmarks/quick."""
    json: bool = False
    """End with one line on stdout that holds the results as JSON."""
    quick: bool = False
    """Small sizes: shows that everything runs, says nothing about speed."""
    seed: int = 0
    """Of the random inputs."""

    def __post_init__(self) -> None:
        """Refuses values that cannot work, in one sentence."""
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie between 0 and 2**32 - 1, got {self.seed}")
        for name, least in LEAST.items():
            value = getattr(self, name, None)
            given = value if isinstance(value, tuple) else (value,)
            if any(number is not None and number < least for number in given):
                words = name.replace("_", "-")
                raise ValueError(f"{words} must be {least} or more, got {value}")

    @property
    def folder(self) -> Path:
        """Where results go, with the default resolved."""
        return self.out or (RESULTS / "quick" if self.quick else RESULTS)


@dataclasses.dataclass(frozen=True)
class Settings(Basics):
    """Options of what takes time and may have rivals."""

    repeats: int | None = None
    """Rounds in which everything takes a turn; medians count. 7; with --quick, 2."""
    peers: Annotated[tuple[str, ...], tyro.conf.arg(help=_ABOUT_PEERS)] = ("all",)

    def __post_init__(self) -> None:
        """Refuses values that cannot work, in one sentence."""
        super().__post_init__()
        if len(self.peers) > 1 and {"all", "none"} & set(self.peers):
            raise ValueError("peers are names, or all alone, or none alone")

    @property
    def rounds(self) -> int:
        """Rounds, with the default resolved."""
        return self.repeats or (2 if self.quick else 7)

    def chosen_peers(self, known: Iterable[str]) -> list[str]:
        """The peers that are asked for; ValueError where one is not known."""
        known = list(known)
        if self.peers == ("all",):
            return known
        if self.peers == ("none",) or not self.peers:
            return []
        unknown = [name for name in self.peers if name not in known]
        if unknown:
            raise ValueError(
                f"unknown peers {', '.join(unknown)}: {did_you_mean(unknown[0], known)}"
                f"choose from {', '.join(known)}, "
                "or all, or none"
            )
        return [name for name in known if name in self.peers]


@dataclasses.dataclass(frozen=True)
class Attending(Settings):
    """Options of what attends to random or captured inputs."""

    inputs: Kind = "gaussian"
    """What keys and queries are."""
    captured: Path | None = None
    """File of python -m benchmarks.capture, for --inputs captured."""
    device: devices.Device | None = None
    """Where to run: cpu, gpu or tpu; what jax prefers unless given. On gpu and tpu many
    steps are one program, and results go to a folder of their own."""

    @property
    def source(self) -> Source:
        """Where inputs come from."""
        return Source(self.inputs, self.captured, self.seed)


def carry_through(module: Any, words: list[str]) -> int:
    """Reads a command line, measures, and hands on what was found.

    Args:
      module: the command's.
      words: of the command line; the first is the command's name.

    Returns:
      Exit status: 0 done, 1 a result is wrong, 2 refused, 130 Ctrl-C.
    """

    def work(command: Any) -> int:
        keep_freed_memory()
        devices.choose(getattr(command, "device", None))
        found = module.run(command)
        return getattr(module, "finish", finish)(words, command, found)

    return carry_out(module.Command, words[1:], work, prog=f"{PROG} {words[0]}")


def finish(words: list[str], command: Basics, found: Results) -> int:
    """Writes and prints; 1 if a result was wrong."""
    device = getattr(command, "device", None)
    name = words[0].replace("paper-", "paper/")
    folder = command.folder / (name if device in (None, "cpu") else f"{name}-{device}")
    everyone = [*peers.PEERS.values(), *search.PEERS.values()]
    about = environment(words, [peer.package for peer in everyone])
    results.write(folder, found, about | {"quick": command.quick})
    print(f"results: {folder}")
    for fault in found.wrong:
        print(f"error: wrong result: {fault}", file=sys.stderr)
    if command.json:
        rows = {"rows": found.rows, "summary": found.summary, "wrong": found.wrong}
        print(json.dumps(results.clean(rows | {"folder": str(folder)})))
    return 1 if found.wrong else 0
