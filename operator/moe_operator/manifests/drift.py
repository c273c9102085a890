"""Finds what somebody else changed in an object that the operator applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_operator.resources import quantity


def first_difference(desired: Any, actual: Any, path: str = "") -> str | None:
    """Path of the first value that was set to `desired` and is something else now; None when there is none.

    What is there beyond `desired` (defaults of the API server, fields of other managers) is no difference:
    server-side apply leaves it alone too. Amounts compare by size, for the API server rewrites them.
    """
    if isinstance(desired, Mapping):
        return _in_mapping(desired, actual, path)
    if isinstance(desired, Sequence) and not isinstance(desired, str):
        return _in_list(desired, actual, path)
    return None if quantity.same(desired, actual) else path


def _in_mapping(desired: Mapping[str, Any], actual: Any, path: str) -> str | None:
    if not isinstance(actual, Mapping):
        # The API server drops objects that say nothing.
        return path if desired or actual is not None else None
    for name, value in desired.items():
        if name not in actual and value not in ("", False, {}, []):
            return _join(path, name)
        if name in actual:
            found = first_difference(value, actual[name], _join(path, name))
            if found is not None:
                return found
    return None


def _in_list(desired: Sequence[Any], actual: Any, path: str) -> str | None:
    if not isinstance(actual, Sequence) or isinstance(actual, str):
        return path
    if desired and all(isinstance(item, Mapping) and "name" in item for item in desired):
        by_name = {item["name"]: item for item in actual if isinstance(item, Mapping) and "name" in item}
        pairs = [(f"{path}[{item['name']}]", item, by_name.get(item["name"])) for item in desired]
    elif len(desired) != len(actual):
        return path
    else:
        pairs = [(f"{path}[{index}]", item, actual[index]) for index, item in enumerate(desired)]
    for place, item, other in pairs:
        found = place if other is None else first_difference(item, other, place)
        if found is not None:
            return found
    return None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
