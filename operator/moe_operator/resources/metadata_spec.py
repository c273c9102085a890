"""Annotations and labels that users add to objects of the operator."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from moe_operator.resources import names
from moe_operator.resources.base import rules
from moe_operator.resources.pods import LABEL_KEY

_KEYS = f"self.all(k, k.size() <= 316 && k.matches('{LABEL_KEY}'))"


def annotation_field(description: str) -> Any:
    """A field with annotations, of which none is the operator's own."""
    return _field(description, "annotations", f"{names.GROUP}/")


def label_field(description: str) -> Any:
    """A field with labels, of which none is the operator's own."""
    return _field(description, "labels", f"{names.GROUP}/", "app.kubernetes.io/")


def _field(description: str, what: str, *own: str) -> Any:
    """own: prefixes of the keys that are the operator's."""
    others = " && ".join(f"!k.startsWith('{prefix}')" for prefix in own)
    refused = " and ".join(f"{prefix}..." for prefix in own)
    return Field(
        default={},
        description=description,
        max_length=64,
        json_schema_extra=rules(
            (f"self.all(k, {others})", f"{what} {refused} are the operator's: remove them"),
            (_KEYS, f"the keys of {what} are names with an optional domain, e.g. example.org/name"),
        ),
    )
