"""Reads typed fields of parsed JSON, with an error message for wrong ones."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_worker.errors import ConfigError

# A thousand times above any published model; keeps sizes far from 64-bit overflow.
LARGEST_SIZE = 2**31 - 1
# Characters of a wrong value that a message quotes.
MOST_SHOWN = 100
# Larger integers are not finite floating-point numbers.
LARGEST_FLOAT = sys.float_info.max


@dataclass(frozen=True)
class Fields:
    """One JSON object of a configuration file.

    Every reader raises ConfigError with the file, the field, the value found and the values allowed.
    A field that is null counts as missing.
    """

    source: str
    values: Mapping[str, Any]

    def fail(self, name: str, allowed: str) -> ConfigError:
        """The error for field `name`, which must be `allowed`."""
        value = self.values.get(name)
        found = "is missing" if value is None else f"is {_shown(value)}"
        return ConfigError(f"{self.source}: {name} {found}; it must be {allowed}")

    def integer(self, name: str, default: int | None = None, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """An integer from `least` to `most`."""
        value = self._or_default(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.fail(name, f"an integer from {least} to {most}")
        return value

    def optional_integer(self, name: str, least: int = 1) -> int | None:
        """An integer as above, or None if the field is null or absent."""
        return None if self.values.get(name) is None else self.integer(name, least=least)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.values.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST_FLOAT:
            raise self.fail(name, "a finite number")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._or_default(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= LARGEST_FLOAT:
            raise self.fail(name, "a finite number above 0")
        return float(value)

    def optional_positive(self, name: str) -> float | None:
        """A finite number above 0, or None if the field is null or absent (0 counts as absent)."""
        return None if not self.values.get(name) else self.positive(name)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """true or false."""
        value = self._or_default(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of the texts in `allowed`."""
        value = self._or_default(name, default)
        if value not in allowed:
            raise self.fail(name, " or ".join(repr(text) for text in allowed))
        return str(value)

    def integers(self, name: str, least: int = 0) -> tuple[int, ...]:
        """An integer or a list of them as a tuple; empty if the field is null or absent."""
        value = self.values.get(name)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= least for item in items):
            raise self.fail(name, f"an integer of at least {least}, or a list of them")
        return tuple(items)

    def _or_default(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded: JSON and command lines may contain lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(value: object) -> str:
    """A value as quoted in a message."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
