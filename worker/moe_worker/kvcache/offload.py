"""Which pages CPU memory holds after the cache evicted them. Pure: kvcache/{host,pinned}.py copy and compare.

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

    def fetch(self, slots: Iterable[int]) -> None:
        """Starts to bring pages to where `intact` sees them, as many of the first ones as it can."""
        ...

    def intact(self, slot: int) -> bool | None:
        """Whether the slot holds what arrived; None: it is on its way, or was not fetched."""
        ...

    def forget(self, slot: int) -> None:
        """Nobody waits any more for a page that `fetch` was asked for."""
        ...


@dataclass(eq=False)
class Kept:
    """A page in CPU memory.

    digest: of the prefix that it ends. names: of blocks that end in it. users: requests that it comes back
    for. dropped: the slot belongs to another page now.
    """

    digest: bytes
    slot: int
    names: tuple[int, ...] = ()
    users: int = 0
    dropped: bool = False


class Offload:
    """Gives slots to evicted pages, and plans the copies. Copies run in the order in which they are planned.

    Attributes:
        saved, restored: pages so far.
    """

    def __init__(self, storage: Storage, names: BlockNames) -> None:
        self._storage = storage
        self._names = names
        self._entries: OrderedDict[bytes, Kept] = OrderedDict()
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
            entry = self._entries[digest] = Kept(digest, slot)
            self._moves.append(Move(slot, page, saves=True))
            self._planned.add(slot)
            self.saved += 1
        self._entries.move_to_end(digest)
        entry.names += tuple(name for name in names if name not in entry.names and self._names.retain(name))

    def match(self, digests: Iterable[bytes]) -> list[Kept]:
        """Those of a prefix's next pages that can come back, in order; held until `load` or `release`."""
        found = []
        for digest in digests:
            entry = self._entries.get(digest)
            if entry is None or entry.slot in self._planned or not self._storage.ready(entry.slot):
                break
            self._entries.move_to_end(digest)
            entry.users += 1
            found.append(entry)
        return found

    def fetch(self, entries: Iterable[Kept]) -> None:
        """Matched pages are about to be loaded, in this order."""
        self._storage.fetch(entry.slot for entry in entries if not entry.dropped)

    def load(self, entry: Kept, page: int) -> bool | None:
        """Plans to copy a matched page back; False if it is damaged, None if it is still on its way."""
        intact = not entry.dropped and self._storage.intact(entry.slot)
        if intact is None:
            return None
        entry.users -= 1
        if not entry.dropped and not intact:
            self._drop(entry)
        if entry.dropped:
            return False
        self._moves.append(Move(entry.slot, page, saves=False))
        self.restored += 1
        return True

    def release(self, entries: Iterable[Kept]) -> None:
        """Matched pages are not needed any more."""
        for entry in entries:
            entry.users -= 1
            if not entry.users and not entry.dropped:
                self._storage.forget(entry.slot)

    def take(self) -> list[Move]:
        """The copies planned since the last call, which run now, before the next step."""
        moves, self._moves = self._moves, []
        self._planned.clear()
        return moves

    def _take_slot(self) -> int | None:
        """A free slot, or that of the least recently used page that does not come back."""
        if not self._free:
            oldest = next((entry for entry in self._entries.values() if not entry.users), None)
            if oldest is None:
                return None
            self._drop(oldest)
        return self._free.pop()

    def _drop(self, entry: Kept) -> None:
        del self._entries[entry.digest]
        entry.dropped = True
        for name in entry.names:
            self._names.release(name)
        self._free.append(entry.slot)


def first_digest(namespace: str) -> bytes:
    """The digest of the empty prefix of a namespace."""
    return hashlib.blake2b(namespace.encode(), digest_size=DIGEST_BYTES).digest()


def next_digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a prefix with one more page of token ids, of 32 bits."""
    return hashlib.blake2b(array("I", tokens).tobytes(), digest_size=DIGEST_BYTES, key=before).digest()
