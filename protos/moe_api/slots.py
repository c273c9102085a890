"""Slots of requests, of which one tenant cannot take all. Pure."""

from collections import Counter
from typing import Final

SPARE: Final = 7
"""A tenant gets another slot while it has fewer than this many for each free one, at a worker."""


class Slots:
    """Which requests are active, and whose they are.

    A tenant may have `spare` times as many slots as are free: 7/8 of all if it is alone, 7/15 if there are
    two. So the next tenant always finds some, and no slot is reserved for tenants that do not exist. These
    are the dynamic thresholds of Choudhury and Hahne (IEEE/ACM Transactions on Networking, 1998). Requests
    without a tenant may take all slots.
    """

    def __init__(self, spare: int = SPARE) -> None:
        self._spare = spare
        self._tenants: dict[int, str] = {}
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._tenants)

    def of(self, tenant: str) -> int:
        """The slots of a tenant."""
        return self._counts[tenant]

    def has_room(self, tenant: str, most: int) -> bool:
        """Whether a tenant may take another of `most` slots."""
        free = most - len(self)
        return free > 0 and (not tenant or self._counts[tenant] < self._spare * free)

    def take(self, number: int, tenant: str) -> None:
        """Takes a slot for a request."""
        self._tenants[number] = tenant
        self._counts[tenant] += 1

    def free(self, number: int) -> None:
        """Frees the slot of a request; ignores requests that have none."""
        tenant = self._tenants.pop(number, None)
        if tenant is None:
            return
        self._counts[tenant] -= 1
        if not self._counts[tenant]:
            del self._counts[tenant]
