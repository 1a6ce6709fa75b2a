"""Takes turns: every implementation is timed a few calls in a row, round after round.

Noise of the machine then hits all of them alike. The calls that are timed are the calls
whose results are scored.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

CALLS = 3
"""Timed calls in a row, after one that is not timed."""
SLOW = 1.0
"""Seconds from which one call a turn is enough."""
BUDGET = 20.0
"""Seconds after which an implementation takes no further turns."""
NO_TIME = "not run: no time was left"
_THREADS = 8


class Unavailable(Exception):
    """This implementation cannot be measured here; the message says why."""


Call = Callable[[], Any]
"""Runs once, waits for the result and returns it. One that takes several steps in a
program says how many, as its attribute `steps`."""
Open = Callable[[], Call]
"""Lays out what the calls of one turn work on: not timed."""
Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass
class Contestant:
    """One implementation on one input.

    Attributes:
      name: as in the tables.
      definition: what it computes: "relu", "softmax", or words for anything else.
      prepare: makes its `Open`; raises `Unavailable` where it cannot be measured.
      finish: turns what a call returned into arrays that can be scored.
      ours: hsrjax or a dense baseline: a failure is an error, not a remark.
      detail: how it was configured.
    """

    name: str
    definition: str
    prepare: Callable[[], Open]
    finish: Callable[[Any], Arrays] = lambda result: tuple(map(np.asarray, result))
    ours: bool = True
    detail: str = ""


@dataclasses.dataclass
class Timing:
    """What was measured of a contestant.

    Attributes:
      contestant: the contestant.
      rounds: median seconds of each round's calls.
      calls: timed calls in all.
      error: largest of what `score` said of the results; None if not scored.
      failure: why there are no numbers, or empty.
      lenient: a failure is a remark, whoever's it is.
    """

    contestant: Contestant
    rounds: list[float] = dataclasses.field(default_factory=list)
    calls: int = 0
    error: float | None = None
    failure: str = ""
    spent: float = 0.0
    open: Open | None = None
    lenient: bool = False

    @property
    def ms(self) -> float | None:
        """Median milliseconds of a call."""
        return 1e3 * statistics.median(self.rounds) if self.rounds else None


Score = Callable[[Contestant, Arrays], float | None]


def race(
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    score: Score,
    tick: Callable[[str], None],
    budget: float = BUDGET,
    until: float = math.inf,
    lenient: bool = False,
    together: bool = False,
) -> dict[str, Timing]:
    """Times all contestants in turns, each round beginning with the next of them.

    Args:
      contestants: names must differ.
      rounds: turns of each, unless its budget of seconds is spent earlier.
      score: error of a result, or None where there is nothing to compare with.
      tick: told the contestant's name before each turn, and "" after each round.
      budget: seconds of calls after which a contestant takes no further turns.
      until: time of `time.monotonic` from which no turn begins.
      lenient: a failure of our own is a remark as well.
      together: prepare all at once, in threads, before the first turn: compiling is
        most of that, and a device that is lent has more cores than one.

    Returns:
      Timings by name, in the order given.
    """
    timings = {one.name: Timing(one, lenient=lenient) for one in contestants}
    if together:
        tick("compiling")
        _prepare_all(list(timings.values()))
    for number in range(rounds):
        turns = list(timings.values())
        first = number % len(turns)
        for timing in turns[first:] + turns[:first]:
            if timing.failure or timing.spent > budget:
                continue
            if time.monotonic() > until:
                timing.failure = "" if timing.rounds else NO_TIME
                continue
            tick(timing.contestant.name)
            with _quiet(), _own_failures_only(timing):
                _turn(timing, score)
        tick("")
    return timings


def _prepare_all(timings: list[Timing]) -> None:
    """Opens stay with their timings, and so do failures."""

    def prepare(timing: Timing) -> None:
        with _own_failures_only(timing):
            timing.open = timing.contestant.prepare()

    with _quiet(), concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(prepare, timings))


def _turn(timing: Timing, score: Score) -> None:
    """Opens, calls once untimed, then times a few calls and scores the last."""
    if timing.open is None:
        timing.open = timing.contestant.prepare()
    call = timing.open()
    steps = getattr(call, "steps", 1)
    slow = bool(timing.rounds) and steps * timing.rounds[-1] > SLOW
    start = time.perf_counter()
    if not slow:
        call()
    seconds, result = [], None
    while len(seconds) < CALLS:
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
        if seconds[-1] > SLOW:
            break
    timing.spent += time.perf_counter() - start
    timing.rounds.append(statistics.median(seconds) / steps)
    timing.calls += len(seconds)
    error = score(timing.contestant, timing.contestant.finish(result))
    if error is not None:
        timing.error = max(error, timing.error or 0.0)


def _quiet():
    """What peers print does not reach stdout."""
    return contextlib.redirect_stdout(sys.stderr)


@contextlib.contextmanager
def _own_failures_only(timing: Timing):
    """Keeps a peer's failure as words."""
    try:
        yield
    except Unavailable as reason:
        timing.failure = str(reason)
    except Exception as error:  # peers raise what they like
        if timing.contestant.ours and not timing.lenient:
            raise
        timing.failure = one_line(error)


def one_line(error: BaseException) -> str:
    """An exception in one line, without the folders of this machine."""
    text = str(error).strip().splitlines()
    words = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
    return re.sub(r"(?:/[\w.+@~-]+)+/", "", words)[:200]


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    if got.shape != expected.shape:
        raise ValueError(f"got shape {got.shape}, expected {expected.shape}")
    if not np.isfinite(got).all():
        return float("inf")
    largest = float(np.abs(expected).max())
    return float(np.abs(got - expected).max()) / (largest or 1.0)
