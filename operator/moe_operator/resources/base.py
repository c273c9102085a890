"""Common base of the resource's models, and the helper that attaches CEL rules to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

RULES: Final = "x-kubernetes-validations"
LIST_TYPE: Final = "x-kubernetes-list-type"
LIST_KEYS: Final = "x-kubernetes-list-map-keys"
INT_OR_STRING: Final = "x-kubernetes-int-or-string"
_OBJECT_NAME: Final = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"


class Model(BaseModel):
    """Frozen; camelCase outside, snake_case inside.

    Unknown fields are ignored: they come from a newer CRD, which an upgrade installs before its operator. The
    API server refuses misspelled fields.
    """

    model_config = ConfigDict(
        frozen=True, extra="ignore", alias_generator=to_camel, validate_by_name=True, validate_by_alias=True
    )

    def manifest(self) -> dict[str, Any]:
        """The JSON form, with camelCase keys and without fields that are not set."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def object_name(clause: str) -> tuple[str, str]:
    """The rule that a string is the name of an object (a DNS subdomain); clause: of which one."""
    return f"self.matches('{_OBJECT_NAME}')", f"{clause}: lower-case letters, digits, - and ."


def number_between(clause: str, least: int, most: int) -> tuple[str, str]:
    """The rule that a number is within bounds, both allowed; clause: the sentence up to these."""
    return f"self >= {least} && self <= {most}", f"{clause} from {least} to {most}"


def rules(*pairs: tuple[str, str], at_creation: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """Schema extras with CEL rules, each a pair (expression, sentence that says what is correct).

    at_creation: rules that objects of an earlier CRD may break; updates are not checked by them.
    """
    always = [{"rule": rule, "message": message} for rule, message in pairs]
    once = [
        {"rule": f"oldSelf.hasValue() || ({rule})", "message": message, "optionalOldSelf": True}
        for rule, message in at_creation
    ]
    return {RULES: [*always, *once]}
