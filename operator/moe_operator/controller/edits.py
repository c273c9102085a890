"""Tells what users change of deployments from everything else that a watch of them shows. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_operator.resources.deployment import restarted_at


class Edits:
    """Remembers what each deployment asks for: its spec, by the generation, and the last restart."""

    def __init__(self) -> None:
        self._asked: dict[str, tuple[object, str]] = {}

    def take(self, kind: str | None, body: Mapping[str, Any]) -> bool:
        """Whether a user created, edited or deleted the deployment.

        The operator's own status writes are none. Neither is an object of a list that is known as it is: kopf
        lists again when the API server does not have the history since its last version any more, and edits
        would then wait for the reconciles of all deployments.

        kind: of the event, as a watch names it; None for an object of a list.
        """
        uid, asked = body["metadata"]["uid"], (body["metadata"].get("generation"), restarted_at(body))
        if kind == "DELETED":
            self._asked.pop(uid, None)
            return True
        before, self._asked[uid] = self._asked.get(uid), asked
        return kind == "ADDED" or before != asked
