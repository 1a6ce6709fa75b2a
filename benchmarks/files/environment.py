"""What was run on what; nothing that tells whose machine it is."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import hsrjax


def environment(words: Sequence[str], packages: Iterable[str]) -> dict[str, Any]:
    """The command, the versions and the machine.

    Args:
      words: the command line.
      packages: distributions of the peers.
    """
    shown = [Path(word).name if os.path.isabs(word) else word for word in words]
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *shown]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hsrjax": hsrjax.__version__,
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "numpy": np.__version__,
        "peers": {x: version(x) for x in sorted({*packages} - {"jax", "numpy"})},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "matmul_precision": _matmul_precision(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def version(package: str) -> str:
    """Version of a distribution, "not installed" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _matmul_precision() -> str:
    """The precision of products where none is asked for: "default" is the backend's."""
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return precision or "default"


def _processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()
