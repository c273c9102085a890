"""Sizes in bytes as Kubernetes quantities."""

import re

from moe_worker.errors import SettingsError

_UNITS = {"": 1} | {
    letter + binary: base**power
    for binary, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate(("k" if not binary else "K", "M", "G", "T", "P"), start=1)
}
_FORM = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)([kKMGTP]?i?)")


def parse_bytes(text: str, flag: str) -> int:
    """Bytes in a quantity such as "2Gi", "1.5G" or "1000000", the value of `flag`. Raises SettingsError."""
    match = _FORM.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS:
        raise SettingsError(f"{flag} {text!r} is not a size; write bytes as 2Gi, 512Mi, 1.5G or 1000000")
    return int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]
