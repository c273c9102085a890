"""What Grafana's own types say of a dashboard: the types that Grafana Labs generates from its schemas.

They read any JSON: `from_json` passes over unknown fields and checks no type. So each object is compared with
what it was read from (a field that is not written again is unknown) and each attribute with its type hint.
"""

from __future__ import annotations

import copy
import enum
import typing
import warnings
from collections.abc import Iterator
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Grafana prefers another form, and reads this one
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.cog.runtime import UnknownDataquery, panelcfg_config
    from grafana_foundation_sdk.models import dashboard, units

register_default_plugins()
UNITS = {value for value in vars(units).values() if isinstance(value, str)}
"""Names of the units that Grafana formats."""


class _Marked(str):
    """The name of an attribute, in place of its value."""


def problems(body: dict[str, Any]) -> list[str]:
    """Fields of a dashboard that Grafana does not know or whose value has another type."""
    try:
        read = dashboard.Dashboard.from_json(body)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"dashboard cannot be read: {error!r}"]
    return list(_of_object(read, body, "dashboard"))


def _of_object(read: Any, given: Any, place: str) -> Iterator[str]:
    if not isinstance(given, dict):
        yield f"{place} is {given!r}, not an object"
        return
    if isinstance(read, UnknownDataquery):
        yield f"{place} is a query of an unknown data source: {given.get('datasource')}"
        return
    written = read.to_json()
    unknown = sorted(key for key in given.keys() - written.keys() if given[key] is not None)
    yield from (f"{place}.{key} is unknown" for key in unknown)
    if isinstance(read, dashboard.Panel):
        if panelcfg_config(read.type_val) is None:
            yield f"{place}.type is {read.type_val!r}, no panel of Grafana"
        unit = given.get("fieldConfig", {}).get("defaults", {}).get("unit", "none")
        if unit not in UNITS:
            yield f"{place}.fieldConfig.defaults.unit is {unit!r}, no unit of Grafana"
    hints = typing.get_type_hints(type(read))
    marked = copy.copy(read)  # tells which field each attribute becomes
    vars(marked).update({name: _Marked(name) for name in hints})
    for key, mark in marked.to_json().items():
        if isinstance(mark, _Marked) and key in given:
            yield from _of_value(getattr(read, mark), given[key], hints[mark], f"{place}.{key}")


def _of_value(read: Any, given: Any, hint: Any, place: str) -> Iterator[str]:
    """`read` is what the types made of `given`."""
    if given is None:
        return
    if hasattr(read, "to_json"):
        yield from _of_object(read, given, place)
        return
    kinds = [hint] if typing.get_origin(hint) is not typing.Union else list(typing.get_args(hint))
    lists = [kind for kind in kinds if typing.get_origin(kind) is list]
    if lists and isinstance(read, list) and isinstance(given, list):
        (inner,) = typing.get_args(lists[0])
        for number, (item, raw) in enumerate(zip(read, given, strict=True)):
            yield from _of_value(item, raw, inner, f"{place}[{number}]")
    elif not any(_is(read, kind) for kind in kinds):
        yield f"{place} is {given!r}, not {hint}"


def _is(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if kind in {object, Any}:
        return True
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if origin is dict:
        inner = typing.get_args(kind)[1]
        return isinstance(value, dict) and all(_is(item, inner) for item in value.values())
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return value in {item.value for item in kind}
    if kind in {int, float}:
        return isinstance(value, kind | int) and not isinstance(value, bool)
    return origin is None and isinstance(kind, type) and isinstance(value, kind)
