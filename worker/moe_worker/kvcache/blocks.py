"""Names of blocks of prompts that the cache holds, for those who choose a replica. Pure.

The edge names blocks (`moe_api.prefixes`), which are larger than pages and may end within one. A name has
holders: each page of the prefix tree in which the block ends, and each live request whose prompt has it.
"""

NAMED_MOST = 65_536
"""Names held at most, as `moe_api.prefixes` states it."""


class BlockNames:
    """Counts the holders of each name, and notes which names came and went."""

    def __init__(self, most: int = NAMED_MOST) -> None:
        self._most = most
        self._holders: dict[int, int] = {}
        self._changes: dict[int, bool] = {}

    def __len__(self) -> int:
        """Names with a holder."""
        return len(self._holders)

    def retain(self, name: int) -> bool:
        """Adds a holder; returns False, and does nothing, if there are too many names."""
        holders = self._holders.get(name, 0)
        if not holders:
            if len(self._holders) >= self._most:
                return False
            self._change(name, stored=True)
        self._holders[name] = holders + 1
        return True

    def release(self, name: int) -> None:
        """Removes a holder that was added."""
        self._holders[name] -= 1
        if not self._holders[name]:
            del self._holders[name]
            self._change(name, stored=False)

    def take(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The names that came and those that went since the last call."""
        if not self._changes:
            return (), ()
        changes, self._changes = self._changes, {}
        stored = tuple(name for name, came in changes.items() if came)
        return stored, tuple(name for name, came in changes.items() if not came)

    def _change(self, name: int, *, stored: bool) -> None:
        if self._changes.pop(name, stored) == stored:
            self._changes[name] = stored
