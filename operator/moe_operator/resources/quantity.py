"""Kubernetes quantities ("512Mi", "0.5", "2e9")."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

PATTERN: Final = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]+))?$"

_SCALES: Final = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "": Decimal(1),
    **{suffix: Decimal(1000) ** (power + 1) for power, suffix in enumerate("kMGTPE")},
    **{f"{suffix}i": Decimal(1024) ** (power + 1) for power, suffix in enumerate("KMGTPE")},
}


def parse(text: str | int) -> Decimal:
    """The number that a quantity stands for.

    Raises ValueError when the text is not a quantity.
    """
    match = re.fullmatch(PATTERN, str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a quantity; write a number with an optional suffix, such as 512Mi")
    suffix = match[3] or ""
    if match[5]:
        return Decimal(str(text))
    digits = str(text)[: len(str(text)) - len(suffix)]
    return Decimal(digits) * _SCALES[suffix]


def same(left: object, right: object) -> bool:
    """Whether two JSON leaves are equal, or are quantities of the same size ("0.5" and "500m")."""
    if left == right:
        return True
    if not isinstance(left, (str, int)) or not isinstance(right, (str, int)):
        return False
    try:
        return parse(left) == parse(right)
    except ValueError:
        return False
