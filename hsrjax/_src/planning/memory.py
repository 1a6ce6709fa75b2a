"""How much memory a call needs, and refusing what cannot fit before it is allocated.

What is counted has to be there at the same time, so that nothing that would run is
refused: a call may need somewhat more.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from hsrjax._src.core import checks
from hsrjax._src.core.bitset import WORD
from hsrjax._src.planning import costs

VARIABLE = "HSRJAX_MEMORY"
"""Environment variable: bytes that a device may use, instead of all that it has."""

MAX_SLOTS = 2**31 - WORD
"""Slots of a row, and one past the end, are counted in int32."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def of_index(sets: int, keys: int, head_dim: int, *, itemsize: int) -> int:
    """Bytes of an index: the keys and their int8 codes."""
    return sets * keys * head_dim * (itemsize + 1)


def check(what: str, needed: int, *, remedy: str, devices: int) -> None:
    """Raises ValueError where more bytes are needed than there are.

    Args:
      what: needs them.
      needed: bytes.
      remedy: the setting to change.
      devices: that share what is needed.
    """
    if fits(needed, devices=devices):
        return
    total = available() or 0
    has = f"the device has {in_words(total)}"
    if devices > 1:
        has = f"{devices} devices have {in_words(devices * total)}"
    raise ValueError(
        f"{what} needs at least {in_words(needed)} of memory, {has}: {remedy}. "
        f"({VARIABLE}=BYTES says what a device has.)"
    )


def check_room(
    name: str, room: int, lead: tuple[int, ...], head_dim: int, dtype, *, beside=0
) -> None:
    """Raises ValueError where there is no memory for so many keys.

    Args:
      name: of the setting that asks for it.
      room: keys of each row.
      lead: batch axes *B.
      head_dim: H.
      dtype: of the keys.
      beside: numbers of that dtype that are stored with each key.
    """
    itemsize = jnp.dtype(dtype).itemsize
    sets, padded = math.prod(lead), -(-room // WORD) * WORD
    needed = of_index(sets, padded, head_dim, itemsize=itemsize)
    needed += sets * padded * beside * itemsize
    remedy = f"give a smaller {name} or fewer rows"
    check(
        f"{name}={room} in each of {sets} rows of keys",
        needed,
        remedy=remedy if itemsize < 4 else f"{remedy}, or store bfloat16",
        devices=devices(),
    )
    if padded > MAX_SLOTS:
        raise ValueError(
            f"{name} must be at most {MAX_SLOTS}, slots are counted in int32, got "
            f"{room}; use more rows."
        )


def fits(needed: int, *, devices: int) -> bool:
    """Whether so many bytes may be allocated; True where nothing is known."""
    total = available()
    return total is None or needed <= devices * total


def available() -> int | None:
    """Bytes of memory of the default device, or None where it does not tell.

    Raises:
      ValueError: HSRJAX_MEMORY is not a number of bytes.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        return _of_device(costs.default_device())
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{VARIABLE} must be a number of bytes, got {given!r}.")
    return int(given)


@functools.lru_cache
def _of_device(device: Any) -> int | None:
    if device.platform == "cpu":
        names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
        known = getattr(os, "sysconf_names", {})
        if not all(name in known for name in names):
            return None
        return math.prod(os.sysconf(name) for name in names)
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:
        return None
    return stats.get("bytes_limit")


def devices(*arrays: jax.Array) -> int:
    """How many devices' memory these arrays may be spread over.

    Under jit shapes are those of whole arrays, however they will be cut. The devices of
    the CPU backend share the memory of their process.
    """
    if costs.default_device().platform == "cpu":
        return jax.process_count()
    arrays = arrays or (jnp.zeros(()),)  # a tracer under jit
    if not checks.concrete(*arrays):
        return jax.device_count()
    shardings = [getattr(x, "sharding", None) for x in arrays]
    return max(len(s.device_set) if s is not None else 1 for s in shardings)


def in_words(size: int) -> str:
    """Bytes with three digits and a unit."""
    power = min(max(size, 1).bit_length() - 1, 59) // 10
    return f"{size / 1024**power:.3g} {_UNITS[power]}"
