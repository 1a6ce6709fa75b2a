"""Which device is measured: chosen before jax has made its first one."""

from __future__ import annotations

import os
from typing import Literal

import jax

from benchmarks.harness.loops import Loop, of_step

Device = Literal["cpu", "gpu", "tpu"]
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}
_PACKAGES = {"cpu": "jax", "gpu": "jax[cuda12]", "tpu": "jax[tpu]"}
STEPS = 40
"""Of a decode step in one program; of attention over whole sequences, fewer."""
SEQUENCES = 4


def choose(device: Device | None) -> None:
    """Makes jax run there.

    Raises:
      ValueError: there is none, or jax has begun on another. Names what there is.
    """
    if device is None:
        return
    # Tests and peers in the same minutes need memory as well.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    before = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_platforms", _PLATFORMS[device])
    try:
        if jax.default_backend() == device:
            return
        reason = ""
    except RuntimeError as error:
        reason = f" ({str(error).splitlines()[0][:120]})"
    jax.config.update("jax_platforms", before)
    raise ValueError(
        f"--device {device}: there is none that jax can use{reason}, it finds "
        f"{here()}; install {_PACKAGES[device]}, or leave --device out"
    )


def here() -> str:
    """The devices that jax has, in words."""
    return ", ".join(f"{x.platform} ({x.device_kind})" for x in jax.devices()[:1])


def decode_loop(scanned: int) -> Loop | None:
    """How decode steps are repeated here; None where a step is a call.

    Args:
      scanned: bytes of a cache's sketch.
    """
    if jax.default_backend() == "cpu":
        return None
    return of_step(scanned, steps=STEPS)


def sequence_loop() -> Loop | None:
    """The same for attention over whole sequences, which is bound by arithmetic."""
    return None if jax.default_backend() == "cpu" else Loop(SEQUENCES)
