"""An approximate index of the prefix caches of replicas: which replica was sent which prefixes. Pure.

Replicas are not asked. A block (`moe_api.prefixes`) that was not sent to a replica for TTL_S counts as
evicted.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

INDEX_MOST: Final = 50_000
"""Maximum blocks in the index; about 400 bytes each."""
TTL_S: Final = 600.0


class PrefixIndex:
    """The last time each block was sent to each replica. The least recently used blocks are dropped first."""

    def __init__(self, most: int = INDEX_MOST, ttl_s: float = TTL_S) -> None:
        self._most = most
        self._ttl_s = ttl_s
        self._sent: OrderedDict[int, dict[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sent)

    def note(self, replica: str, blocks: Sequence[int], now: float) -> None:
        """Notes that a prompt of these blocks is sent to a replica; `now` in seconds."""
        for block in reversed(blocks):  # so that the start of a prompt outlives its end
            self._sent.setdefault(block, {})[replica] = now
            self._sent.move_to_end(block)
        while len(self._sent) > self._most:
            self._sent.popitem(last=False)

    def held(self, blocks: Sequence[int], now: float) -> dict[str, int]:
        """How many leading blocks each replica is likely to hold; replicas with none are absent."""
        counts: dict[str, int] = {}
        for index, block in enumerate(blocks):
            holders = [
                replica
                for replica, at in self._sent.get(block, {}).items()
                if now - at < self._ttl_s and counts.get(replica, 0) == index
            ]
            if not holders:
                break
            counts.update(dict.fromkeys(holders, index + 1))
        return counts

    def was_sent(self, block: int, replica: str, now: float, within_s: float) -> bool:
        """Whether a block was sent to a replica in the last `within_s` seconds."""
        at = self._sent.get(block, {}).get(replica)
        return at is not None and now - at < within_s

    def keep(self, replicas: frozenset[str]) -> None:
        """Drops all other replicas: one that returns has an empty cache."""
        for block, holders in list(self._sent.items()):
            kept = {replica: at for replica, at in holders.items() if replica in replicas}
            if not kept:
                del self._sent[block]
            elif len(kept) < len(holders):
                self._sent[block] = kept
