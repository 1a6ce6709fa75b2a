"""Peak memory of one call, measured in a process of its own.

`python -m benchmarks.memory NAME KEYS SEED` is what `measure` starts; it prints JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.contestants import causal, chunked
from benchmarks.harness.inputs import Source
from benchmarks.harness.timing import Open, Unavailable, one_line

TIMEOUT_S = 900
WARM_UP_KEYS = 256


def measure(name: str, keys: int, seed: int) -> dict[str, Any]:
    """Runs one causal attention in a fresh process.

    Args:
      name: contestant of `causal.contestants`.
      keys: length of the sequence.
      seed: of the inputs.

    Returns:
      before_mib (with the operands there), peak_mib and their difference added_mib, in
      which compiling for this length is included; or status, in words.
    """
    words = [sys.executable, "-m", "benchmarks.memory", name, str(keys), str(seed)]
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            words, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {"status": f"not finished after {TIMEOUT_S} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"status": f"the process ended with status {done.returncode}"}


def resident_mib() -> float:
    """Memory this process holds now; sets its peak back to that, where Linux can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return peak_mib()


def peak_mib() -> float:
    """Most memory this process ever held, or held since `resident_mib`.

    Linux keeps the parent's peak over fork and exec in getrusage's number, so that it
    says too much in a child of a large process; VmHWM begins anew.
    """
    try:
        return _status("VmHWM")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (2**20 if sys.platform == "darwin" else 1024)


def _status(name: str) -> float:
    """A line of /proc/self/status in MiB; OSError where there is none."""
    lines = Path("/proc/self/status").read_text().splitlines()
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {name} in /proc/self/status")


def main(words: list[str]) -> int:
    """Makes inputs, calls once, prints what it took."""
    name, keys, seed = words[0], int(words[1]), int(words[2])
    try:
        found = _call_once(name, keys, seed)
    except Unavailable as reason:
        found = {"status": str(reason)}
    except Exception as error:  # peers raise what they like
        found = {"status": one_line(error)}
    print(json.dumps(found))
    return 0


def _call_once(name: str, keys: int, seed: int) -> dict[str, float]:
    chunked.TILINGS[:] = [chunked.Tiling(128, 1024, False)]
    _prepared(name, WARM_UP_KEYS, seed)()()  # imports and first-use memory
    opened = _prepared(name, keys, seed)
    before = resident_mib()
    opened()()
    peak = peak_mib()
    return {"before_mib": before, "peak_mib": peak, "added_mib": peak - before}


def _prepared(name: str, keys: int, seed: int) -> Open:
    given = causal.make_inputs(Source(seed=seed), keys, exact=False)
    ours = name in ("hsr", "auto") or name.startswith("dense")
    everyone = causal.contestants([] if ours else [name], "prefill", given)
    (contestant,) = [one for one in everyone if one.name == name]
    return contestant.prepare()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
