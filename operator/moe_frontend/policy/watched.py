"""What replicas say that their prefix caches hold, and routing by it. Pure.

A replica is not trusted: messages out of order or too large end its watch, and it may name a bounded number
of blocks. False names cost time only, since a replica computes what it does not hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from moe_api.prefixes import CHANGE_MOST, HELD_MOST
from moe_api.worker.v1 import worker_pb2
from moe_frontend.policy.prefixes import INDEX_MOST, PrefixIndex

WATCHED_MOST: Final = 400_000
"""Maximum blocks of all replicas together; about 100 bytes each."""
SENT_S: Final = 5.0
"""For so long a block counts as held where this frontend sent it, until the replica says so itself."""


class ImplausibleChangeError(ValueError):
    """A replica's messages contradict the protocol, or one of them is missing."""


@dataclass
class Held:
    """The blocks of one replica, as its messages say.

    Attributes:
        blocks: their names.
        sequence: of the last message.
    """

    blocks: set[int] = field(default_factory=set)
    sequence: int = 0

    def apply(self, change: worker_pb2.CacheChange, most: int) -> None:
        """Applies the next message; more than `most` blocks are not kept.

        Raises:
            ImplausibleChangeError: nothing is known any more; the watch has to begin again.
        """
        if change.sequence != self.sequence + 1 or not (change.reset or self.sequence):
            raise ImplausibleChangeError(
                f"message {change.sequence} follows message {self.sequence}; asking for a new snapshot"
            )
        if len(change.stored) + len(change.evicted) > CHANGE_MOST:
            raise ImplausibleChangeError(f"a message names more than {CHANGE_MOST} blocks; asking again")
        self.sequence += 1
        if change.reset:
            self.blocks.clear()
        self.blocks.difference_update(change.evicted)
        room = max(0, most - len(self.blocks))
        self.blocks.update(change.stored[:room])


class WatchedIndex(PrefixIndex):
    """Knows what watched replicas hold; of others, it takes what was sent to them as held.

    most: blocks of all replicas together.
    """

    def __init__(self, most: int = WATCHED_MOST, sent_most: int = INDEX_MOST) -> None:
        super().__init__(sent_most)
        self._most_watched = most
        self._watched: dict[str, Held] = {}

    @property
    def blocks(self) -> int:
        """Blocks of all watched replicas; one that two replicas hold counts twice."""
        return sum(len(held.blocks) for held in list(self._watched.values()))  # metrics read it in a thread

    @property
    def watched(self) -> int:
        """Replicas whose blocks are known."""
        return len(self._watched)

    def apply(self, replica: str, held: Held, change: worker_pb2.CacheChange) -> None:
        """Applies a message of a replica's watch. Raises ImplausibleChangeError."""
        room = self._most_watched - self.blocks
        held.apply(change, min(HELD_MOST, len(held.blocks) + max(0, room)))
        self._watched[replica] = held

    def forget(self, replica: str, held: Held) -> None:
        """A watch has ended; a newer one of the same replica is not concerned."""
        if self._watched.get(replica) is held:
            del self._watched[replica]

    def keep(self, replicas: frozenset[str]) -> None:
        """Drops all other replicas."""
        super().keep(replicas)
        for replica in self._watched.keys() - replicas:
            del self._watched[replica]

    def held(self, blocks: Sequence[int], now: float) -> dict[str, int]:
        """How many leading blocks each replica holds; replicas with none may be absent."""
        counts = super().held(blocks, now)
        return counts | {replica: self._count(replica, blocks, now) for replica in self._watched}

    def _count(self, replica: str, blocks: Sequence[int], now: float) -> int:
        there = self._watched[replica].blocks
        for index, block in enumerate(blocks):
            if block not in there and not self.was_sent(block, replica, now, SENT_S):
                return index
        return len(blocks)
