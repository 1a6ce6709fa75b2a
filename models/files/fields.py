"""A dictionary from outside, read field by field."""

from __future__ import annotations

from typing import Any


class Fields:
    """A dictionary from outside, read field by field with its type checked."""

    def __init__(self, fields: Any, name: str = "the config") -> None:
        if not isinstance(fields, dict):
            raise ValueError(f"{name} must be an object, got {type(fields).__name__}")
        self.fields = fields

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{name} is missing")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a text, got {value!r:.80}")
        return value

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._get(name, default)
        if type(value) is not int or value < least:
            raise ValueError(
                f"{name} must be an integer from {least}, got {value!r:.80}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if not _is_number(value):
            raise ValueError(f"{name} must be a number, got {value!r:.80}")
        return _as_float(name, value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r:.80}")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self._get(name, None)
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise ValueError(f"{name} must be a list of numbers, got {value!r:.80}")
        return tuple(_as_float(name, x) for x in value)

    def has(self, name: str) -> bool:
        return self.fields.get(name) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is beyond what a number can be") from None
