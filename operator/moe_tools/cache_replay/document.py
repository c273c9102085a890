"""The result of a cache replay as JSON for scripts. Keys are stable: docs/caching.md lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from moe_tools.cache_replay.recording import KeyTrace
from moe_tools.cache_replay.simulation import BELADY, CacheOutcome

_DIGITS: Final = 6


@dataclass(frozen=True)
class CacheReplay:
    """The result of a replay; `outcomes` by policy."""

    recording: KeyTrace
    capacity: int
    outcomes: dict[str, CacheOutcome]
    ceiling: CacheOutcome


def document(replay: CacheReplay) -> dict[str, Any]:
    """Numbers, texts and objects, ready for JSON; the same replay gives the same document."""
    return {
        "trace": replay.recording.name,
        "requests": len(replay.recording.requests),
        "lookups": replay.ceiling.lookups,
        "capacity": replay.capacity,
        "keys": replay.ceiling.lookups - replay.ceiling.hits,
        "blocks": replay.recording.blocks,
        "ceiling": _outcome(replay.ceiling, replay),
        "cache": {name: _outcome(outcome, replay) for name, outcome in replay.outcomes.items()},
    }


def _outcome(outcome: CacheOutcome, replay: CacheReplay) -> dict[str, Any]:
    lru, best = replay.outcomes["lru"].hits, replay.outcomes[BELADY].hits
    return {
        "hits": outcome.hits,
        "block_hit_share": round(outcome.hit_share, _DIGITS),
        "evictions": outcome.evictions,
        "gap_closed": round((outcome.hits - lru) / (best - lru), _DIGITS) if best > lru else None,
        "recomputed_tokens": outcome.recomputed,
        "recomputed_positions": outcome.positions,
    }
