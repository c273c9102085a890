"""Deprecated fields of the spec, and what to write instead. Pure.

The API server accepts these fields, so that objects of an earlier CRD stay valid; the models read both names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from pydantic.alias_generators import to_camel

from moe_operator.resources.spec import Spec

_MILLI: Final = 1000


@dataclass(frozen=True)
class Replacement:
    """A deprecated field and the field of the same section that replaces it, as the models name them."""

    section: str
    field: str
    successor: str
    converted: Callable[[Any], object]
    """The value of the successor that means the same as a value of the field."""

    def advice(self, spec: Spec) -> str | None:
        """What to write instead, if the spec sets the field."""
        section = getattr(spec, self.section)
        value = None if section is None else getattr(section, self.field)
        if value is None:
            return None
        old, new = (
            f"spec.{to_camel(self.section)}.{to_camel(name)}" for name in (self.field, self.successor)
        )
        if getattr(section, self.successor) is not None:
            return f"{old} is deprecated and {new} takes precedence; remove it"
        return f"{old} is deprecated; replace it with {new}: {self.converted(value)}"


def as_quantity(number: float) -> str:
    """A number as a Kubernetes quantity: whole, or in thousandths where these suffice."""
    exact = Decimal(str(number))
    for scale, suffix in ((1, ""), (_MILLI, "m"), (_MILLI**2, "u"), (_MILLI**3, "n")):
        if exact * scale == int(exact * scale):
            return f"{int(exact * scale)}{suffix}"
    return f"{exact:f}"


REPLACEMENTS: Final = (
    Replacement("rollout", "pause", "paused", lambda value: str(value).lower()),
    Replacement(
        "scaling",
        "latency_target_seconds",
        "latency_target_milliseconds",
        lambda value: max(round(value * _MILLI), 1),
    ),
    Replacement("scaling", "prior_requests_per_second", "prior_throughput", as_quantity),
    Replacement("scaling", "gpu_budget", "gpu_limit", as_quantity),
    Replacement("worker", "accelerator_fraction", "accelerator_percentage", lambda value: round(value * 100)),
    Replacement("quality", "max_bits_per_byte_increase", "max_loss", as_quantity),
)


def advice(spec: Spec) -> Iterator[str]:
    """A sentence for each deprecated field that the spec sets."""
    sentences = (replacement.advice(spec) for replacement in REPLACEMENTS)
    return (sentence for sentence in sentences if sentence is not None)
