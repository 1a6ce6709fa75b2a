"""What XLA compiled is kept from one command to the next, in a folder of the user's."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax

VARIABLE = "HSRJAX_CACHE"
_MOST_BYTES = 2**30
_WORTH_KEEPING = 0.1  # seconds of compiling


def keep_programs() -> Path | None:
    """Keeps compiled programs, so that a second start takes seconds, not a minute.

    In the folder that HSRJAX_CACHE names, else in hsrjax/ under XDG_CACHE_HOME or
    ~/.cache; at most a gigabyte, the oldest go first. "off" keeps none. What jax itself
    is told (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE) is left as it is,
    and so is a folder that cannot be written.

    Returns:
      The folder, or None. It can be deleted at any time.
    """
    jaxs_own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if jaxs_own or os.environ.get(VARIABLE) == "off":
        return None
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)
    return folder


def _folder() -> Path:
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser() / _machine()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hsrjax" / _machine()


def _machine() -> str:
    """Programs for CPUs run on CPUs of their kind alone; home folders are shared."""
    try:
        about = Path("/proc/cpuinfo").read_text()
        lines = [x for x in about.splitlines() if x.startswith(("flags", "Features"))]
        kind = lines[0] if lines else about
    except OSError:
        kind = platform.processor()
    name = hashlib.sha256(kind.encode()).hexdigest()[:12]
    return f"{platform.machine()}-{name}"
