"""`python -m benchmarks query`: half-space reporting against range search libraries.

Build time has a column of its own; query time is that of a whole batch. An exact
implementation must report the true set, up to keys whose score is within float32
rounding of the offset; of the others the recall is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.contestants.search import OURS, PEERS, RangePeer, Search, answers
from benchmarks.harness import inputs, pictures, tables
from benchmarks.harness.members import judge, truth
from benchmarks.harness.timing import Contestant, Unavailable, one_line, race
from benchmarks.header import Attending, Results

HEAD_DIM = 64


@dataclasses.dataclass(frozen=True)
class Command(Attending):
    """Times the search for all keys with <normal, key> >= offset.

    For example:

        python -m benchmarks query --peers faiss-flat
    """

    keys: int | None = None
    """Stored keys of size 64: 1,000,000; with --quick, 4,000."""
    share: float = 1e-4
    """Of the keys that are members for every query; at least 8 keys are."""
    batches: tuple[int, ...] = ()
    """Queries per batch: 1, 16 and 256; with --quick, 1 and 16."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {self.share}")


def run(command: Command) -> Results:
    """Builds every implementation once, then lets them answer in turns."""
    names = command.chosen_peers(PEERS)
    contenders = OURS | {name: PEERS[name] for name in names}
    count = command.keys or (4_000 if command.quick else 1_000_000)
    batches = command.batches or ((1, 16) if command.quick else (1, 16, 256))
    keys, normals = inputs.range_keys(
        command.source, keys=count, head_dim=HEAD_DIM, queries=max(batches)
    )
    members = max(8, round(command.share * len(keys)))
    offsets = _offsets(keys, normals, members)
    truths = [truth(keys, *one) for one in zip(normals, offsets, strict=True)]
    rows: list[dict[str, Any]] = []
    steps = len(contenders) + len(batches) * command.rounds
    with tqdm(total=steps, unit="step") as bar:
        built = {}
        for name, peer in contenders.items():
            bar.set_postfix_str(f"building {name}")
            built[name] = _build(peer, keys)
            bar.update()
        for batch in batches:
            asked = (normals[:batch], offsets[:batch])
            found = _race(contenders, built, asked, truths, command.rounds, bar)
            shared = {"keys": len(keys), "head_dim": keys.shape[1], "batch": batch}
            rows += [shared | {"members": members} | row for row in found]
            tqdm.write(f"batch of {batch}: {_sentence(found)}")
    wrong = [f"{r['name']}: {r['status']}" for r in rows if r["wrong"]]
    for row in rows:
        del row["wrong"]
    return Results(rows, summarize(rows), draw(rows), wrong)


def _offsets(keys: np.ndarray, normals: np.ndarray, members: int) -> np.ndarray:
    shape = (1, len(normals), 1, normals.shape[1])
    bias = inputs.thresholds(
        normals.reshape(shape), keys[None, :, None], lambda _: members, causal=False
    )
    return bias.reshape(-1)


def _build(peer: RangePeer, keys: np.ndarray) -> tuple[Search | None, float, str]:
    """The search, the seconds it took to build, and why there is none."""
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            search = peer.build(keys)
    except Unavailable as reason:
        return None, 0.0, str(reason)
    except Exception as error:  # peers raise what they like
        if peer.ours:
            raise
        return None, 0.0, one_line(error)
    return search, time.perf_counter() - start, ""


def _race(contenders, built, asked, truths, rounds, bar) -> list[dict[str, Any]]:
    """Rows of one batch size."""
    recalls: dict[str, float] = {}
    faults: dict[str, str] = {}

    def contestant(name: str, peer: RangePeer) -> Contestant:
        search, _, failure = built[name]

        def prepare():
            if search is None:
                raise Unavailable(failure)
            return lambda: lambda: search(*asked)

        def finish(answer):
            found = answers(peer, answer)
            recalls[name], fault = judge(found, truths[: len(asked[0])])
            if peer.exact and fault:
                faults[name] = fault
            return ()

        kind = "exact" if peer.exact else "approximate"
        return Contestant(name, kind, prepare, finish, peer.ours, peer.detail)

    timings = race(
        [contestant(name, peer) for name, peer in contenders.items()],
        rounds=rounds,
        score=lambda *_: None,
        tick=tables.ticker(bar),
    )
    hsr = timings["hsrjax.query"].ms
    rows = []
    for name, timing in timings.items():
        ms = timing.ms
        rows.append(
            {
                "name": name,
                "kind": timing.contestant.definition,
                "reports": "ids" if contenders[name].ids else "counts",
                "build_s": built[name][1] if built[name][0] else None,
                "ms": ms,
                "ms_per_query": ms / len(asked[0]) if ms else None,
                "this_over_hsr": ms / hsr if ms and hsr else None,
                "recall": recalls.get(name),
                "timed_calls": timing.calls,
                "status": timing.failure or faults.get(name, "measured"),
                "detail": timing.contestant.detail,
                "wrong": name in faults,
            }
        )
    return rows


def _sentence(rows: list[dict[str, Any]]) -> str:
    parts = []
    for row in rows:
        ratio = row["this_over_hsr"]
        if ratio is None:
            parts.append(f"{row['name']} {row['status']}")
        elif row["name"] == "hsrjax.query":
            parts.append(f"{row['name']} {row['ms_per_query']:.2f} ms a query")
        else:
            parts.append(f"{row['name']} {ratio:.2f}x hsr, recall {row['recall']:.4f}")
    return "; ".join(parts)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"not_measured": tables.not_measured(rows)}
    found |= {"time_over_hsr": {}, "least_recall": {}}
    for row in rows:
        if row["ms"] is not None:
            name, recall = row["name"], row["recall"]
            times = found["time_over_hsr"].setdefault(name, {})
            times[row["batch"]] = row["this_over_hsr"]
            least = found["least_recall"].get(name, recall)
            found["least_recall"][name] = min(least, recall)
    return found


def draw(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    names = {"hsrjax.query": "hsr", "hsrjax.count": "auto"}  # their colours
    shown = [row | {"name": names.get(row["name"], row["name"])} for row in rows]
    figure = pictures.figure(width=9)
    axes = figure.subplots()
    pictures.plot_lines(axes, shown, x="batch", y="ms_per_query")
    keys, members = rows[0]["keys"], rows[0]["members"]
    axes.set(
        xlabel="queries in a batch",
        ylabel="milliseconds per query",
        title=f"{keys:,} keys of {HEAD_DIM}, {members} members per query",
    )
    handles, labels = axes.get_legend_handles_labels()
    back = {short: name for name, short in names.items()}
    figure.legend(
        handles, [back.get(str(x), str(x)) for x in labels], loc="outside right upper"
    )
    return {"times.png": figure}
