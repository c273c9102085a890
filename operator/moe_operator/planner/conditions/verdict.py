"""A condition before it has a time, and with one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from moe_api.visible import one_line
from moe_operator.planner.decision import timestamp
from moe_operator.resources.status import Condition, Status

_MESSAGE_MOST = 4096
"""Maximum characters of a message: Kubernetes allows 32768, which is too long to read."""


@dataclass(frozen=True)
class Verdict:
    """A condition before it has a time."""

    holds: bool | None
    """None: not known, or neither."""
    reason: str
    message: str

    @property
    def status(self) -> Literal["True", "False", "Unknown"]:
        """As Kubernetes writes it."""
        if self.holds is None:
            return "Unknown"
        return "True" if self.holds else "False"


def dated(
    found: dict[str, Verdict], previous: Status, generation: int, now: datetime
) -> tuple[Condition, ...]:
    """The conditions with their times: lastTransitionTime moves only when the status changes."""
    conditions = []
    for kind, verdict in found.items():
        before = previous.condition(kind)
        same = before is not None and before.status == verdict.status
        conditions.append(
            Condition(
                type=kind,
                status=verdict.status,
                reason=verdict.reason,
                message=one_line(verdict.message, _MESSAGE_MOST),
                observed_generation=generation,
                last_transition_time=before.last_transition_time if before and same else timestamp(now),
            )
        )
    return tuple(conditions)
