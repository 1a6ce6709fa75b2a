"""`python -m benchmarks paper-claims`: every claim of the paper and what came of it.

Reads what the other paper commands wrote and writes claims.md beside results.csv. No
number that is measured is typed in: `verdicts` works each out of those files.
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

from benchmarks.files.results import read
from benchmarks.header import Basics, Results
from benchmarks.paper import errata, verdicts
from benchmarks.paper.findings import Finding, Found

EXPERIMENTS = ("table1", "lemma61", "theorem43", "figure3", "time")
HEADER = """# What came of the paper's claims

Chen, Liang, Sha, Shi, Song: HSR-Enhanced Sparse Attention Acceleration
(arXiv 2410.10165). Written by `python -m benchmarks paper-claims` from the results of
the other `paper-` commands, which lie beside this folder. "Says nothing": the statement
is true, but of no consequence where it was measured. "Not testable": nothing that has
the claimed property can be built. Errata (E1 to E13) are slips of the paper: "measured"
where an experiment shows them, "worked out" where arithmetic does, "read" otherwise.
"""


@dataclasses.dataclass(frozen=True)
class Command(Basics):
    """Puts the results of the other paper commands beside the paper's claims.

    For example:

        python -m benchmarks paper-claims --results benchmarks/results/paper
    """

    results: Path | None = None
    """Folder that holds theirs: OUT/paper."""


def run(command: Command) -> Results:
    """Judges every claim."""
    found = load(command.results or command.folder / "paper")
    try:
        judged = [*verdicts.judge(found), *errata.judge(found)]
    except KeyError as name:
        raise ValueError(
            f"the results lack {name}, so that an older version wrote them: run the "
            "paper- commands again"
        ) from name
    rows = [dataclasses.asdict(one) for one in judged]
    numbers = collections.Counter(one.verdict for one in judged)
    return Results(rows, dict(numbers), texts={"claims.md": HEADER + as_table(judged)})


def load(folder: Path) -> Found:
    """What each experiment wrote.

    Raises:
      ValueError: an experiment is missing; the message says which to run.
    """
    found = Found({}, {})
    for name in EXPERIMENTS:
        try:
            found.summaries[name], tables = read(folder / name)
        except OSError as error:
            raise ValueError(
                f"{folder / name} holds no results ({error.strerror}): run "
                f"python -m benchmarks paper-{name} first"
            ) from error
        for stem, lines in tables.items():
            key = name if stem == "results" else f"{name}/{stem}"
            found.tables[key] = lines
    return found


def as_table(findings: list[Finding]) -> str:
    """A table in Markdown."""
    lines = [
        "",
        "| | claim | verdict | what was found | from |",
        "|---|---|---|---|---|",
    ]
    for one in findings:
        cells = dataclasses.astuple(one)
        lines.append(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        )
    return "\n".join(lines) + "\n"
