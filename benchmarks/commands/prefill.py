"""`python -m benchmarks prefill`: causal attention over a whole sequence.

Building the index is inside the timer. Memory is measured apart, at longer lengths, in
fresh processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import memory
from benchmarks.contestants import causal, peers
from benchmarks.harness import devices, inputs, oracle, pictures, tables
from benchmarks.harness.timing import race
from benchmarks.header import Attending, Results

KEYS = (1024, 2048, 4096, 8192, 16384)
QUICK_KEYS = (256, 512)
MEMORY_KEYS = (4096, 16384, 65536)


@dataclasses.dataclass(frozen=True)
class Command(Attending):
    """Times causal attention over sequences in which 1 % of the visible keys fire.

    For example:

        python -m benchmarks prefill --keys 4096 16384
    """

    keys: tuple[int, ...] = ()
    """Lengths: 1024 to 16384; with --quick, 256 and 512."""
    memory_keys: tuple[int, ...] | None = None
    """Lengths at which memory is measured, Gaussian: 4096 to 65536; quick: none."""


def run(command: Command) -> Results:
    """Measures time at every length, then memory."""
    names = command.chosen_peers(peers.names("prefill"))
    lengths = _lengths(command)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(lengths) * command.rounds, unit="round") as bar:
        for keys in lengths:
            found = _measure(command, keys, names, bar)
            rows += found
            tqdm.write(f"{keys:,} keys: {tables.sentence(found)}")
    used = _memory(command, names)
    summary = summarize(rows) | {"memory": used}
    figures = draw(rows, command.inputs, used)
    return Results(rows, summary, figures, tables.wrong(rows))


def summarize(rows: list[tables.Row]) -> dict[str, Any]:
    """Ratios, break-even and slopes."""
    ratios = tables.dense_over_hsr(rows)
    return {
        "not_measured": tables.not_measured(rows),
        "dense_over_hsr": ratios,
        "break_even_keys": tables.crossing(list(ratios), list(ratios.values())),
        "log_log_slope": {
            name: tables.slope(*tables.series(rows, name)) for name in ("hsr", "dense")
        },
    }


def _lengths(command: Command) -> tuple[int, ...]:
    lengths = command.keys or (QUICK_KEYS if command.quick else KEYS)
    if command.captured is not None and not command.keys:
        tokens = inputs.captured_tokens(command.captured)
        lengths = tuple(n for n in lengths if n <= tokens) or (tokens,)
    return lengths


def _measure(command: Command, keys: int, names: list[str], bar) -> list[tables.Row]:
    """Rows of one length."""
    given = causal.make_inputs(command.source, keys)
    given = dataclasses.replace(given, loop=devices.sequence_loop())
    score, expected = oracle.scoring(given)
    timings = race(
        causal.contestants(names, "prefill", given, quick=command.quick),
        rounds=command.rounds,
        score=score,
        tick=tables.ticker(bar),
    )
    shared = tables.describe(given) | {"firing_keys": expected("relu").firing}
    return tables.rows(timings, shared)


def _memory(command: Command, names: list[str]):
    lengths = command.memory_keys
    if lengths is None:
        lengths = () if command.quick or command.captured else MEMORY_KEYS
    wanted = ["hsr", "auto", "dense in tiles", "dense einsum", *names]
    pairs = [(name, keys) for keys in lengths for name in wanted]
    used = []
    for name, keys in tqdm(pairs, unit="process", disable=not pairs):
        found = memory.measure(name, keys, command.seed)
        used.append({"name": name, "keys": keys, **found})
        words = found.get("status") or f"{found['added_mib']:.0f} MiB"
        tqdm.write(f"memory at {keys:,} keys: {name} {words}")
    return used


def draw(
    rows: list[tables.Row], kind: str = "gaussian", used: Sequence[tables.Row] = ()
) -> dict[str, Figure]:
    """Times, and memory where it was measured, by length."""
    heads = "{heads} query / {kv_heads} key heads of {head_dim}".format(**rows[0])
    figures = {
        "times.png": _figure(
            [row for row in rows if tables.drawn(row)],
            y="ms",
            ylabel="milliseconds",
            title=f"Causal attention, {heads}, {kind} keys",
        )
    }
    if used:
        figures["memory.png"] = _figure(
            [{"added_mib": None, **row} for row in used],
            y="added_mib",
            ylabel="MiB",
            title="Peak memory of one call beside its operands",
        )
    return figures


def _figure(rows: list[dict[str, Any]], *, y: str, ylabel: str, title: str) -> Figure:
    figure = pictures.figure(width=9)
    axes = figure.subplots()
    pictures.plot_lines(axes, rows, x="keys", y=y)
    axes.set(xlabel="length of the sequence", ylabel=ylabel, title=title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure
