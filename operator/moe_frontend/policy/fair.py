"""A queue that tenants share by weight: start-time fair queueing. Pure.

Goyal, Vin and Cheng, "Start-Time Fair Queuing" (SIGCOMM 1996). Each item has a start tag: the later of the
virtual time at which it arrives and the end of its tenant's last item, which is its start plus cost / weight.
The item with the least start tag is next, and the virtual time is that of the last one taken. So while two
tenants both have items, what they got, divided by weight, differs by less than the largest cost / weight of
the one plus that of the other; and a tenant that had none for a while starts like a new one.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

T = TypeVar("T")
IDLE_MOST: Final = 1024
"""Tenants without items whose last tags are kept."""


@dataclass(frozen=True)
class _Entry(Generic[T]):
    item: T
    start: float
    number: int


@dataclass
class _Line(Generic[T]):
    """The items of a tenant in order of arrival, and the end of the last one."""

    end: float = 0.0
    entries: deque[_Entry[T]] = field(default_factory=deque)


class FairQueue(Generic[T]):
    """Items of tenants, in the order in which they should be served."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._idle: OrderedDict[str, float] = OrderedDict()
        self._now = 0.0
        self._number = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def of(self, tenant: str) -> int:
        """The items of a tenant."""
        line = self._lines.get(tenant)
        return 0 if line is None else len(line.entries)

    def tenants(self) -> Iterator[tuple[str, int]]:
        """The tenants with items, and how many each has."""
        return ((tenant, len(line.entries)) for tenant, line in self._lines.items())

    def push(self, tenant: str, item: T, weight: float = 1.0, cost: float = 1.0) -> None:
        """Adds an item that costs so much to serve."""
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = _Line(self._idle.pop(tenant, 0.0))
        start = max(self._now, line.end)
        line.end = start + cost / weight
        self._number += 1
        self._count += 1
        line.entries.append(_Entry(item, start, self._number))

    def pop(self, may: Callable[[str], bool] = lambda _: True) -> tuple[str, T] | None:
        """Takes the next item of the tenants that `may` be served, with its tenant; None if there is none."""
        heads = [
            (line.entries[0].start, line.entries[0].number, tenant)
            for tenant, line in self._lines.items()
            if may(tenant)
        ]
        if not heads:
            return None
        start, _, tenant = min(heads)
        self._now = max(self._now, start)
        return tenant, self._take(tenant, 0).item

    def remove(self, tenant: str, item: T) -> bool:
        """Takes an item out that is not served; its tenant's next items keep their tags."""
        line = self._lines.get(tenant)
        for index, entry in enumerate(() if line is None else line.entries):
            if entry.item is item:
                self._take(tenant, index)
                return True
        return False

    def newest(self, tenant: str) -> T:
        """The last item of a tenant. Raises LookupError if it has none."""
        return self._lines[tenant].entries[-1].item

    def _take(self, tenant: str, index: int) -> _Entry[T]:
        line = self._lines[tenant]
        entry = line.entries[index]
        del line.entries[index]
        self._count -= 1
        if not line.entries:
            del self._lines[tenant]
            self._idle[tenant] = line.end
            if len(self._idle) > IDLE_MOST:
                self._idle.popitem(last=False)
        return entry
