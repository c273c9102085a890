"""The result of a cache replay as JSON for scripts. Keys are stable: docs/caching.md lists them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from moe_tools.cache_replay.recording import KeyTrace
from moe_tools.cache_replay.simulation import BELADY, CacheOutcome

_DIGITS: Final = 6


@dataclass(frozen=True)
class ReplicaUse:
    """What the scaler ordered for the work that one cache leaves.

    mean, peak: replicas. violated_share: steps that ended with unfinished work, in percent.
    work_share: of the work without a cache.
    """

    mean: float
    peak: int
    violated_share: float
    work_share: float


@dataclass(frozen=True)
class CacheReplay:
    """The result of a replay; `outcomes` by policy, `replicas` by cache (None: unknown)."""

    recording: KeyTrace
    capacity: int
    outcomes: dict[str, CacheOutcome]
    ceiling: CacheOutcome
    replicas: dict[str, ReplicaUse] | None = None


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
        "replicas": _replicas(replay.replicas),
    }


def _replicas(found: dict[str, ReplicaUse] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        name: {key: round(value, _DIGITS) for key, value in asdict(use).items()}
        for name, use in found.items()
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
