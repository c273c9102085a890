"""The record of one gang that the operator keeps between reconciles: an annotation of its StatefulSet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from moe_operator.resources import names


@dataclass(frozen=True)
class GangRecord:
    """A gang is held while it has no pods on purpose: until a time, or until its revision changes."""

    attempts: int = 0
    """How often its pods were deleted because some of them had no node."""
    until: str = ""
    """When its pods are created again (RFC 3339); empty if they were not deleted."""
    stopped: bool = False
    """Its restart budget is spent: its pods stay deleted."""
    why: str = ""
    """Why its pods were deleted, in a sentence."""
    said: str = ""
    """The scheduler's own words, if it is the reason."""
    restarts: int = 0
    """Restarts of a pod when the gang last counted as healthy; the budget counts from there."""

    def held(self, now: datetime) -> bool:
        """Whether it has no pods on purpose."""
        return self.stopped or (bool(self.until) and now < datetime.fromisoformat(self.until))

    @property
    def text(self) -> str:
        """As JSON; empty if there is nothing to record."""
        return "" if self == NOTHING else json.dumps(asdict(self), sort_keys=True)


NOTHING: Final = GangRecord()


def recorded(manifest: Mapping[str, Any]) -> GangRecord:
    """The record of a StatefulSet; an empty one if there is none, or somebody edited it."""
    text = manifest["metadata"].get("annotations", {}).get(names.ANNOTATION_GANG, "")
    try:
        record = GangRecord(**json.loads(text)) if text else NOTHING
        record.held(datetime.fromisoformat("2000-01-01T00:00:00Z"))
        int(record.attempts), int(record.restarts)
    except (ValueError, TypeError, RecursionError):
        return NOTHING
    return record


def with_record(manifest: dict[str, Any], record: GangRecord, now: datetime) -> dict[str, Any]:
    """The StatefulSet with a record; without pods while it is held."""
    if not record.text:
        return manifest
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), names.ANNOTATION_GANG: record.text}
    spec = {**manifest["spec"], **({"replicas": 0} if record.held(now) else {})}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}, "spec": spec}
