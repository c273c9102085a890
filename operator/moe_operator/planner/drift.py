"""Finds fields that another client changed in an object that the operator applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_operator.observed.ownership import LOST, Owned, of_field, of_item
from moe_operator.resources import quantity


def first_difference(desired: Any, actual: Any, path: str = "", owned: Owned = None) -> str | None:
    """Path of the first value that differs from `desired`; None if there is none.

    Additional fields (defaults of the API server, fields of other managers) are no difference: server-side
    apply does not change them either. An atomic map or list is a single field, and whoever changes a part of
    it owns all of it; additional entries are a difference then (a Service's selector, a RoleBinding's
    subjects). Quantities compare by value, because the API server rewrites them.

    owned: the fields that the operator still owns. An owned field that differs was rewritten by an admission
    policy within the operator's own request; the policy would do the same to the next one, so it is no
    difference either. None: the ownership is unknown.
    """
    # JSON values are dicts and lists; checks for the abstract types took a third of a reconcile's time.
    if isinstance(desired, dict):
        return _in_mapping(desired, actual, path, owned)
    if isinstance(desired, list | tuple):
        return _in_list(desired, actual, path, owned)
    return None if quantity.same(desired, actual) else _unless(owned, path)


def _unless(owned: Owned, path: str) -> str | None:
    """The path, unless the operator owns the field."""
    return path if owned is None or owned is LOST else None


def _in_mapping(desired: Mapping[str, Any], actual: Any, path: str, owned: Owned) -> str | None:
    if not isinstance(actual, dict):
        # The API server drops empty objects.
        return None if not desired and actual is None else _unless(owned, path)
    for name, value in desired.items():
        if name in actual:
            found = first_difference(value, actual[name], _join(path, name), of_field(owned, name))
        elif value in ("", False, {}, []):
            continue
        else:
            found = _unless(of_field(owned, name), _join(path, name))
        if found is not None:
            return found
    return path if owned is LOST and actual.keys() - desired.keys() else None


def _in_list(desired: Sequence[Any], actual: Any, path: str, owned: Owned) -> str | None:
    if desired == actual:
        return None
    if not isinstance(actual, list | tuple):
        return _unless(owned, path)
    wanted = _named(desired)
    if owned is LOST and len(desired) != len(actual):
        return path
    if wanted:
        there = _named(actual)
        items = {f"{path}[{name}]": (item, there.get(name)) for name, item in wanted.items()}
    elif len(desired) == len(actual):
        items = {f"{path}[{index}]": pair for index, pair in enumerate(zip(desired, actual, strict=True))}
    else:
        return _unless(owned, path)
    found = (
        first_difference(item, other, place, of_item(owned, item)) for place, (item, other) in items.items()
    )
    return next((place for place in found if place is not None), None)


def _named(items: Sequence[Any]) -> dict[str, Any]:
    """The items by name, when each has one of its own (containers, ports, variables); else an empty dict."""
    names = [item["name"] for item in items if isinstance(item, dict) and isinstance(item.get("name"), str)]
    unique = len(set(names)) == len(items)
    return {item["name"]: item for item in items} if unique else {}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
