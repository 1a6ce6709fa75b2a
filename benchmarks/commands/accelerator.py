"""`python -m benchmarks accelerator --minutes 10`: every row that is asked of a card.

First the contract suite's device part, then the rows in order of worth. What is found
is written after each, so that whatever ends the run, all until then is there; a later
run replaces the rows that it measures. For example:

    python -m benchmarks accelerator --minutes 10
    python -m benchmarks accelerator --minutes 4 --only 2 4
    python -m benchmarks accelerator --quick --skip 0    # a rehearsal, on any machine
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from matplotlib.figure import Figure

from benchmarks.accelerator import cells, language, sequences, steps, suite
from benchmarks.accelerator.findings import ROWS, Finding, table
from benchmarks.accelerator.setting import Setting
from benchmarks.contestants import peers
from benchmarks.files import results
from benchmarks.files.environment import environment
from benchmarks.harness import devices, internals, pictures, tables
from benchmarks.harness.timing import NO_TIME, one_line
from benchmarks.header import Results, Settings
from models.compilation import keep_programs

Block = Callable[[Setting], list[Finding]]
BLOCKS: list[tuple[tuple[int, ...], Block]] = [
    ((1, 5), lambda setting: steps.relu(1, setting)),
    ((2, 8), lambda setting: steps.relu(2, setting)),
    ((3,), lambda setting: steps.relu(3, setting)),
    ((4,), lambda setting: steps.relu(4, setting)),
    ((6, 7), steps.softmax),
    ((9,), sequences.gradients),
    ((10,), language.training),
    ((11,), language.tokens),
    ((12,), cells.auto),
]
"""Rows that share inputs and programs, in order of worth."""
_SUITE_SHARE = 0.25
_QUICK_TEST = "test_kernels_are_for_new_nvidia_cards"
_LEAST_SECONDS = 15.0
_REHEARSED = "; a rehearsal: sizes are small"
_GRACE = 60.0
_BROKEN = "the device does not answer any more"


@dataclasses.dataclass(frozen=True)
class Command(Settings):
    """Measures what is asked of an accelerator.

    For example:

        python -m benchmarks accelerator --minutes 10
    """

    minutes: float = 10.0
    """At most; rows for which no time is left say so."""
    only: tuple[int, ...] = ()
    """Rows to measure, 0 (the contract suite) to 12; all unless given."""
    skip: tuple[int, ...] = ()
    """Rows to leave out."""
    without: tuple[str, ...] = ()
    """Implementations to leave out, by their names in results.csv."""
    peers: tuple[str, ...] = ("jax-cudnn", "tokamax")
    """Peers to measure beside hsrjax and dense: names, or all, or none."""
    device: devices.Device | None = None
    """Where to run: cpu, gpu or tpu; what jax prefers unless given."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        super().__post_init__()
        unknown = sorted({*self.only, *self.skip} - ROWS.keys())
        if unknown:
            raise ValueError(f"there are rows 0 to {max(ROWS)}, not {unknown}")
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be above 0, got {self.minutes}")

    @property
    def rounds(self) -> int:
        """Turns of each contestant: a loop in a program needs few."""
        return self.repeats or (1 if self.quick else 3)

    def wants(self, *numbers: int) -> bool:
        """Whether any of these rows is asked for."""
        asked = self.only or tuple(ROWS)
        return any(n in asked and n not in self.skip for n in numbers)


def run(command: Command) -> Results:
    """Measures row after row and writes each."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    command.chosen_peers(peers.names("decode"))  # refused here, an error costs nothing
    begun = time.monotonic()
    report = Report(command, command.folder / "accelerator")
    try:
        with _ending(60 * command.minutes + _GRACE):
            _measure_all(command, report, begun + 60 * command.minutes)
    except KeyboardInterrupt:
        words = f"stopped: {report.folder} holds the rows until then"
        raise KeyboardInterrupt(words) from None
    return report.results()


def _measure_all(command: Command, report: Report, until: float) -> None:
    if command.wants(0):
        report.add(_contract(command))
    setting = _setting(command, until)
    for number, (rows, block) in enumerate(BLOCKS):
        if not command.wants(*rows):
            continue
        report.add(_measured(rows, block, setting))
        if not _answers():
            rest = [n for more, _ in BLOCKS[number:] for n in more]
            _again(command, setting, report, rest)
            return


def _contract(command: Command) -> list[Finding]:
    seconds = 60 * command.minutes * _SUITE_SHARE
    platforms = {"cpu": "cpu", "tpu": "tpu,cpu"}.get(command.device or "", "cuda,cpu")
    chosen = suite.FILES
    if command.quick:
        chosen, platforms = (f"{chosen[0]}::{_QUICK_TEST}",), "cpu"
    return [suite.contract(seconds, platforms=platforms, chosen=chosen)]


def _setting(command: Command, until: float) -> Setting:
    keep_programs()
    kernels = internals.KERNELS
    if command.quick and internals.kernels_missing():
        kernels = internals.play_kernels()
    return Setting(
        kernels=kernels,
        quick=command.quick,
        rounds=command.rounds,
        seed=command.seed,
        until=until,
        without=command.without,
        peers=command.chosen_peers(peers.names("decode")),
        tell=lambda name: print(name or "\n", end="; " * bool(name), file=sys.stderr),
    )


def _measured(rows: tuple[int, ...], block: Block, setting: Setting) -> list[Finding]:
    """The findings of a block; a failure is the reason why there is no number."""
    if setting.left < _LEAST_SECONDS:
        return [Finding(number, status=NO_TIME) for number in rows]
    print(f"row {' and '.join(map(str, rows))}: {ROWS[rows[0]].what}", file=sys.stderr)
    try:
        return block(setting)
    except Exception as error:  # whatever a device or a compiler raises
        return [Finding(number, status=one_line(error)) for number in rows]


def _answers() -> bool:
    """Whether the device still works: after some faults this process has lost it."""
    try:
        return float(jnp.ones(8).sum()) == 8.0
    except Exception:
        return False


def _again(command: Command, setting: Setting, report: Report, rest: list[int]) -> None:
    """Goes on in a process of its own, without what broke the device."""
    rows = [row for one in report.findings.values() for row in one.rows]
    lost = [r for r in rows if not r["us"] and "CUDA" in r["status"]][:1]
    broken = [row["name"] for row in lost]
    left = setting.left / 60
    if not broken or left < 0.5:
        print(f"error: {_BROKEN}", file=sys.stderr)
        return
    asked = [str(number) for number in rest if command.wants(number)]
    words = [sys.executable, "-m", "benchmarks", "accelerator", "--only", *asked]
    words += ["--minutes", f"{left:.2f}", "--without", *command.without, *broken]
    words += ["--out", str(command.folder), "--peers", *command.peers]
    print(f"{_BROKEN}: going on without {broken[0]}", file=sys.stderr)
    subprocess.run(words, check=False)
    report.read()
    for row in lost:
        report.findings[row["row"]].rows.append(row)


@contextlib.contextmanager
def _ending(seconds: float):
    """Ends the process if it hangs in a kernel: all that was measured is written."""
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Report:
    """What was found so far, in this run and in those before, as files and a table."""

    def __init__(self, command: Command, folder: Path):
        self.findings: dict[int, Finding] = {}
        self.folder, self._quick = folder, command.quick
        self._device, self._packages = "", [x.package for x in peers.PEERS.values()]
        self.read()

    def read(self) -> None:
        """Takes over what is in the folder."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            summary, tables_ = results.read(self.folder)
            for number, fields in summary["rows"].items():
                known = {x.name for x in dataclasses.fields(Finding)}
                fields = {k: v for k, v in fields.items() if k in known}
                rows = tables.where(tables_["results"], row=int(number))
                self.findings[int(number)] = Finding(int(number), **fields, rows=rows)

    def add(self, found: list[Finding]) -> None:
        """Takes findings, prints the table and writes everything."""
        device = devices.here() + _REHEARSED * self._quick
        for one in found:
            for row in one.rows:
                row["device"] = device
            if one.status != NO_TIME or one.number not in self.findings:
                self.findings[one.number] = one
        self._device = device
        print(table({one.number: one for one in found}, device), flush=True)
        about = environment(["accelerator"], self._packages) | {"quick": self._quick}
        results.write(self.folder, self.results(), about)

    def results(self) -> Results:
        """All findings, in order."""
        ordered = sorted(self.findings.values(), key=lambda one: one.number)
        rows = [row for one in ordered for row in one.rows]
        summary = {"rows": {one.number: one.summary() for one in ordered}}
        wrong = [
            f"row {row['row']}, {row['name']} (relative error "
            f"{row['max_relative_error']})"
            for row in rows
            if row["status"] == tables.DIFFERS
        ]
        text = table(self.findings, self._device or devices.here()) + "\n"
        note = _REHEARSED * self._quick
        figures = {"rows.png": draw(ordered, note)} if ordered else {}
        return Results(rows, summary, figures, wrong, {"table.txt": text})


def draw(findings: list[Finding], note: str = "") -> Figure:
    """How many times as fast as the fastest dense, beside what is asked."""
    shown = [x for x in findings if ROWS[x.number].unit == "x" and x.measured]
    figure = pictures.figure(width=9, height=1.5 + 0.4 * len(shown))
    axes = figure.subplots()
    names = [f"{x.number}: {ROWS[x.number].what}" for x in shown]
    bars = axes.barh(names, [x.measured or 0 for x in shown], color="tab:red")
    axes.bar_label(bars, [f"{x.measured:.2f}" for x in shown], padding=3)
    for place, one in enumerate(shown):
        asked = ROWS[one.number]
        marks = [x for x in (asked.asked, asked.aim) if x is not None]
        axes.plot(marks, [place] * len(marks), "k|", markersize=14)
    axes.axvline(1.0, color="tab:gray", linewidth=1)
    axes.set(xlabel=f"fastest dense / hsr; marks: asked, aim{note}")
    axes.invert_yaxis()
    return figure


def finish(words: list[str], command: Command, found: Results) -> int:
    """Prints the whole table; 1 if a result was wrong."""
    print(found.texts["table.txt"], end="")
    print(f"results: {command.folder / words[0]}")
    for fault in found.wrong:
        print(f"error: wrong result: {fault}", file=sys.stderr)
    if command.json:
        rows = {"rows": found.rows, "summary": found.summary, "wrong": found.wrong}
        print(
            json.dumps(results.clean(rows | {"folder": str(command.folder / words[0])}))
        )
    return 1 if found.wrong else 0
