"""What caches saved, as a frontend publishes it and `moe status` reads it. Pure.

Each frontend writes its sums since it started as JSON into an annotation of its FrontendRoutes. A field would
need a newer CRD, and server-side apply refuses fields that a CRD does not have; annotations work with any.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

PROMPT: Final = ("promptTokens", "cachedPromptTokens")
"""Prompt tokens of completed responses, and how many of them a prefix cache held."""
OUTPUTS: Final = (
    *("outputHits", "outputShared", "outputMisses", "outputEvictions", "outputBytes"),
    *("savedTokens", "savedMilliseconds"),
)
"""Of the output cache; absent where it is off."""
_LONGEST: Final = 4096
_MOST: Final = 2**63 - 1


def write(sums: Mapping[str, int]) -> str:
    """The annotation of one frontend."""
    return json.dumps(dict(sums), separators=(",", ":"))


def total(annotations: Iterable[object]) -> dict[str, int]:
    """The sums of all frontends by key; without keys that no frontend has, and without what is malformed."""
    sums: Counter[str] = Counter()
    for annotation in annotations:
        for key, value in _parsed(annotation).items():
            if key in (*PROMPT, *OUTPUTS) and type(value) is int and 0 <= value <= _MOST:
                sums[key] += value
    return dict(sums)


def _parsed(annotation: object) -> dict[str, Any]:
    if not isinstance(annotation, str) or len(annotation) > _LONGEST:
        return {}
    try:
        found = json.loads(annotation)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
