"""Typed reading of a checkpoint's configuration: each option is read, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from sartor.errors import FormatError, UnsupportedError

_LONGEST_WINDOW = 1 << 40
"""In tokens: longer than any context, and a number that native code can hold."""


class Options:
    """The key-value pairs of a config.json, or those of one architecture in a GGUF file.

    ``prefix`` is put before every key (``"llama."``). An absent key and a null are the same.
    """

    def __init__(self, values: Mapping[str, object], where: str, prefix: str = "") -> None:
        self._values = values
        self.where = where
        self.prefix = prefix
        self._read: set[str] = set()

    def raw(self, key: str) -> object:
        """The value as stored, or None."""
        key = self.prefix + key
        self._read.add(key)
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._present(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._mistyped(key, value, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._present(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._mistyped(key, value, "a number")
        try:
            return float(value)
        except OverflowError:
            raise self._mistyped(key, value, "a number of at most 64 bits") from None

    def size(self, key: str, default: int | None = None) -> int:
        """An integer above zero."""
        value = self.integer(key, default)
        if value <= 0:
            raise self._mistyped(key, value, "above zero")
        return value

    def even_size(self, key: str, default: int | None = None) -> int:
        """An even integer above zero; rotary embedding pairs the features of a head."""
        value = self.size(key, default)
        if value % 2:
            raise self.refusal(key, value)
        return value

    def window(self, key: str, default: int) -> int:
        """A window in tokens; 0 for none. Absent is the default, null and 0 are none."""
        return min(self.nullable(key, default), _LONGEST_WINDOW)

    def nullable(self, key: str, default: int) -> int:
        """An integer from zero. Absent is the default, null is 0."""
        absent = self.prefix + key not in self._values
        value = self.integer(key, default if absent else 0)
        if value < 0:
            raise self._mistyped(key, value, "at least zero")
        return value

    def cap(self, key: str, default: float) -> float:
        """A soft-cap: a finite number from zero. Absent is the default, null is 0: none."""
        absent = self.prefix + key not in self._values
        value = self.number(key, default if absent else 0.0)
        if not 0 <= value < math.inf:
            raise self._mistyped(key, value, "at least zero")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.number(key, default)
        if not 0 < value < math.inf:
            raise self._mistyped(key, value, "above zero")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._present(key, default)
        if not isinstance(value, str):
            raise self._mistyped(key, value, "a string")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self._mistyped(key, value, "true or false")
        return value

    def table(self, key: str) -> Options:
        """A nested object; empty where absent."""
        value = self.raw(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self._mistyped(key, value, "an object")
        return Options(value, f"{self.where}: {self.prefix}{key}")

    def texts(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None where absent."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self._mistyped(key, value, "a list of strings")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers."""
        value = self._present(key, None)
        if not isinstance(value, list | tuple) or not all(
            isinstance(item, int | float) and not isinstance(item, bool) for item in value
        ):
            raise self._mistyped(key, value, "a list of numbers")
        try:
            return tuple(float(item) for item in value)
        except OverflowError:
            raise self._mistyped(key, value, "a list of numbers of at most 64 bits") from None

    def present(self) -> list[str]:
        """Keys that hold a value, without the prefix."""
        start = len(self.prefix)
        return [
            key[start:]
            for key in self._values
            if key.startswith(self.prefix) and self._values[key] is not None
        ]

    def require(self, key: str, *implemented: object) -> None:
        """Refuses an option whose value, when present, is none of those implemented."""
        value = self.raw(key)
        if value is not None and value not in implemented:
            raise self.refusal(key, value)

    def refusal(self, key: str, value: object) -> UnsupportedError:
        return UnsupportedError(
            f"{self.where}: option {self.prefix}{key} = {value!r} is not implemented; use a "
            "checkpoint without it"
        )

    def has_read(self, key: str) -> bool:
        """Whether anything has asked for this option."""
        return self.prefix + key in self._read

    def refuse_unread(self, harmless: Iterable[str] = ()) -> None:
        """Refuses every key that nothing has read, but for harmless ones (``x.*`` for a group)."""
        harmless = tuple(harmless)
        for key in self.present():
            group = key.partition(".")[0] + ".*"
            known = self.prefix + key in self._read or key in harmless or group in harmless
            if not known:
                raise self.refusal(key, self._values[self.prefix + key])

    def _present(self, key: str, default: object) -> object:
        value = self.raw(key)
        if value is None:
            value = default
        if value is None:
            raise FormatError(
                f"{self.where}: {self.prefix}{key} is missing; the configuration is incomplete"
            )
        return value

    def _mistyped(self, key: str, value: object, wanted: str) -> FormatError:
        return FormatError(f"{self.where}: {self.prefix}{key} is {value!r}; it must be {wanted}")
