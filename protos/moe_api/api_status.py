"""The Status object with which an API server of Kubernetes answers a request that failed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def parse(body: str | bytes | None) -> Mapping[str, Any]:
    """The Status object of a response; empty if it is none: a proxy answers with text or HTML."""
    try:
        found = json.loads(body or "")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
