"""The contract suite's device part, in a process of its own and for a time."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accelerator.findings import Finding

FILES = (
    "tests/test_triton.py",
    "tests/test_triton_gradients.py",
    "tests/test_triton_best.py",
    "tests/test_triton_tail.py",
    "tests/test_decode.py",
    "tests/test_attention.py",
    "tests/test_bounds.py",
    "tests/test_query.py",
)
_WORKERS = 6
_GRACE = 10.0
_OUTCOME = re.compile(
    r"(?:(?P<before>PASSED|FAILED|ERROR|SKIPPED)\s+(?P<name>tests/\S.*)"
    r"|(?P<other>tests/\S.*?)\s+(?P<after>PASSED|FAILED|ERROR|SKIPPED)(?:\s.*)?)$"
)


def contract(
    seconds: float, *, platforms: str, chosen: Sequence[str] = FILES
) -> Finding:
    """Runs the tests, and stops them when their time is over.

    Args:
      seconds: at most.
      platforms: for JAX_PLATFORMS.
      chosen: files and names of tests, the most telling first.
    """
    words = [sys.executable, "-m", "pytest", "-v", "-rf", "--tb=short"]
    words += ["-p", "no:benchmark", "-p", "no:cacheprovider"]
    words += ["-m", "not slow and not notebook", "--color=no"]
    if importlib.util.find_spec("xdist") and len(chosen) > 1:
        # Most of the time goes into compiling, which the host's cores do.
        words += ["-n", str(min(_WORKERS, os.cpu_count() or 1))]
    settings = {
        "JAX_PLATFORMS": platforms,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "HSRJAX_TEST_OPTIMIZED": "1",
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*words, *chosen],
            env=os.environ | settings,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).resolve().parents[2],
            start_new_session=True,
        )
        try:
            stopped = not _ended(process, seconds)
        finally:
            _end(process)
        log.seek(0)
        return judge(log.read(), stopped=stopped)


def judge(log: str, *, stopped: bool = False) -> Finding:
    """What pytest said, as a finding with a row for each test.

    Args:
      log: of `pytest -v`, with or without workers.
      stopped: whether its time was over before its end.
    """
    outcomes: dict[str, str] = {}
    for line in log.splitlines():
        line = re.sub(r"^\[gw\d+\]\s+\[\s*\d+%\]\s+", "", line)
        if found := _OUTCOME.match(line):
            name = (found["name"] or found["other"]).split(" - ")[0].strip()
            outcomes[name] = (found["before"] or found["after"]).lower()
    failed = [name for name, what in outcomes.items() if what in ("failed", "error")]
    passed = sum(what == "passed" for what in outcomes.values())
    rows = [
        {"row": 0, "name": name, "status": what, "definition": "part", "us": None}
        for name, what in outcomes.items()
    ]
    finding = Finding(0, rows=rows)
    if passed + len(failed):
        finding.measured = 100 * passed / (passed + len(failed))
    finding.ours = f"{passed} passed, {len(failed)} failed"
    words = [f"failed: {', '.join(failed)}"] * bool(failed)
    words += ["stopped before the end: its time was over"] * stopped
    if not outcomes:
        words = [(log.strip().splitlines() or ["pytest said nothing"])[-1][:200]]
    finding.status = "; ".join(words) or "measured"
    return finding


def _ended(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of its session: workers outlive a pytest that is ended."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None or number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
