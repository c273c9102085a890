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
    return Field(
        default={},
        description=description,
        max_length=64,
        json_schema_extra=rules(
            (
                f"self.all(k, !k.startsWith('{names.GROUP}/'))",
                f"annotations {names.GROUP}/... are the operator's: remove them",
            ),
            (_KEYS, "the keys of annotations are names with an optional domain, e.g. example.org/name"),
        ),
    )


def label_field(description: str) -> Any:
    """A field with labels, of which none is the operator's own."""
    return Field(
        default={},
        description=description,
        max_length=64,
        json_schema_extra=rules(
            (
                f"self.all(k, !k.startsWith('{names.GROUP}/') && !k.startsWith('app.kubernetes.io/'))",
                f"labels {names.GROUP}/... and app.kubernetes.io/... are the operator's: remove them",
            ),
            (_KEYS, "the keys of labels are names with an optional domain, e.g. example.org/name"),
        ),
    )
