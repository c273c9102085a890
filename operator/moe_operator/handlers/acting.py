"""Whether this process acts, asked by many at short intervals."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor
from datetime import UTC, datetime

from moe_operator.kube import peering
from moe_operator.kube.client import Cluster
from moe_operator.settings import Settings


class Acting:
    """Looks at the peering object at most every `recheck_seconds`, for all who ask. Of one event loop."""

    def __init__(self, cluster: Cluster, settings: Settings, priority: int, threads: Executor) -> None:
        self._cluster = cluster
        self._settings = settings
        self._priority = priority
        self._threads = threads
        self._lock = asyncio.Lock()
        self._asked_at = -settings.recheck_seconds
        self._acts = False

    async def __call__(self) -> bool:
        """Whether no process that lives ranks higher.

        Raises what the client raises when the API server does not answer.
        """
        async with self._lock:
            if time.monotonic() >= self._asked_at + self._settings.recheck_seconds:
                loop = asyncio.get_running_loop()
                self._acts = not await loop.run_in_executor(self._threads, self._outranked)
                self._asked_at = time.monotonic()
        return self._acts

    def _outranked(self) -> bool:
        return peering.outranked(self._cluster, self._settings.peering, self._priority, datetime.now(UTC))
