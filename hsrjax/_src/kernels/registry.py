"""Which implementations there are, and which of them a call may use."""

from __future__ import annotations

from hsrjax._src.kernels.base import Implementation, InTurn
from hsrjax._src.kernels.xla.implementation import XLA

_implementations: dict[str, Implementation] = {XLA.name: XLA()}


def register(implementation: Implementation) -> None:
    """Makes an implementation known by its name, which must be new.

    Raises:
      ValueError: the name is taken.
    """
    name = implementation.name
    if name in _implementations:
        raise ValueError(f"there is an implementation {name!r} already")
    _implementations[name] = implementation


def choose(name: str | None, platform: str) -> tuple[str, ...]:
    """The names of the implementations that a call may use, in turn.

    Args:
      name: what was asked for, alone; None is the preferred ones, then XLA.
      platform: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: the name is unknown, or the implementation does not run here. Names
        those that do, and why the others do not.
    """
    reasons = {x.name: x.unavailable(platform) for x in _implementations.values()}
    if name is None:
        preferred = [x.name for x in _implementations.values() if x.preferred]
        return (*(x for x in preferred if not reasons[x]), XLA.name)
    if name in reasons and not reasons[name]:
        return (name,)
    here = [repr(x) for x, reason in reasons.items() if not reason]
    others = [f"{x!r} does not: {reason}" for x, reason in reasons.items() if reason]
    raise ValueError(
        f"implementation must be None or one that runs on this {platform} "
        f"({', '.join(here)}), got {name!r}"
        + "".join(f"; {words}" for words in others)
        + "."
    )


def operations(names: tuple[str, ...]) -> InTurn:
    """The operations of chosen implementations."""
    return InTurn([_implementations[name] for name in names])
