"""JSON values as text and as hashes, the same in every process."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical(content: Any) -> str:
    """A JSON value as text; equal values give the same."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def digest(content: Any, length: int = 10) -> str:
    """Hash of a JSON value, in hexadecimal digits."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:length]
