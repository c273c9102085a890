"""Which pages CPU memory holds after the cache evicted them. Pure: kvcache/host.py copies and compares.

A page is known by a chained digest of its namespace, which has the tenant's salt, and of all tokens up to its
end. So a page is only ever found by the prefix that it belongs to. The least recently used pages are dropped
first. A page that came back stays here, too: it need not be copied again when it is evicted again.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moe_worker.kvcache.blocks import BlockNames

DIGEST_BYTES = 16


class Move(NamedTuple):
    """A copy of a page. saves: from the cache to the slot; otherwise back."""

    slot: int
    page: int
    saves: bool


class Storage(Protocol):
    """CPU memory for pages, in slots from 0 on."""

    @property
    def slots(self) -> int:
        """Their number."""
        ...

    @property
    def page_s(self) -> float:
        """Seconds that a page takes to come back."""
        ...

    def ready(self, slot: int) -> bool:
        """Whether the last page that was copied to the slot has arrived."""
        ...

    def intact(self, slot: int) -> bool:
        """Whether the slot holds what arrived."""
        ...


@dataclass
class _Entry:
    slot: int
    names: tuple[int, ...] = ()
    held: bool = False


class Offload:
    """Gives slots to evicted pages, and plans the copies. Copies run in the order in which they are planned.

    Attributes:
        saved, restored: pages so far.
    """

    def __init__(self, storage: Storage, names: BlockNames) -> None:
        self._storage = storage
        self._names = names
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._free = list(range(storage.slots - 1, -1, -1))
        self._moves: list[Move] = []
        self._planned: set[int] = set()
        """Slots whose page is copied after the next `take`."""
        self.saved = self.restored = 0

    @property
    def page_s(self) -> float:
        """Seconds that a page takes to come back."""
        return self._storage.page_s

    def save(self, digest: bytes, page: int, names: Sequence[int]) -> None:
        """Plans to keep a page that the cache evicts; names: of blocks that end in it."""
        entry = self._entries.get(digest)
        if entry is None:
            slot = self._take_slot()
            if slot is None:
                return
            entry = self._entries[digest] = _Entry(slot)
            self._moves.append(Move(slot, page, saves=True))
            self._planned.add(slot)
            self.saved += 1
        self._entries.move_to_end(digest)
        entry.names += tuple(name for name in names if name not in entry.names and self._names.retain(name))

    def match(self, digests: Iterable[bytes]) -> list[bytes]:
        """Those of a prefix's next pages that can come back, in order; held until `load`."""
        found = []
        for digest in digests:
            entry = self._entries.get(digest)
            if entry is None or entry.slot in self._planned or not self._storage.ready(entry.slot):
                break
            if not self._storage.intact(entry.slot):
                self._drop(digest)
                break
            self._entries.move_to_end(digest)
            entry.held = True
            found.append(digest)
        return found

    def load(self, digest: bytes, page: int) -> None:
        """Plans to copy a held page back."""
        entry = self._entries[digest]
        entry.held = False
        self._moves.append(Move(entry.slot, page, saves=False))
        self.restored += 1

    def take(self) -> list[Move]:
        """The copies planned since the last call, which run now, before the next step."""
        moves, self._moves = self._moves, []
        self._planned.clear()
        return moves

    def _take_slot(self) -> int | None:
        """A free slot, or that of the least recently used page that is not held."""
        if not self._free:
            oldest = next((digest for digest, entry in self._entries.items() if not entry.held), None)
            if oldest is None:
                return None
            self._drop(oldest)
        return self._free.pop()

    def _drop(self, digest: bytes) -> None:
        entry = self._entries.pop(digest)
        for name in entry.names:
            self._names.release(name)
        self._free.append(entry.slot)


def first_digest(namespace: str) -> bytes:
    """The digest of the empty prefix of a namespace."""
    return hashlib.blake2b(namespace.encode(), digest_size=DIGEST_BYTES).digest()


def next_digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a prefix with one more page of token ids, of 32 bits."""
    return hashlib.blake2b(array("I", tokens).tobytes(), digest_size=DIGEST_BYTES, key=before).digest()
