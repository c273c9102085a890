"""Eviction policies behind one interface, and caches that use them. Pure; no dependency.

`policy` holds the contract. `POLICIES` lists every policy that needs no knowledge of the future, by name.
"""

from collections.abc import Callable
from typing import Any, Final

from moe_api.caching.adaptive import Adaptive
from moe_api.caching.arc import ARC
from moe_api.caching.policy import Policy
from moe_api.caching.queues import S3FIFO, Sieve
from moe_api.caching.recency import LRU, LRU2

POLICIES: Final[dict[str, Callable[[int], Policy[Any]]]] = {
    "lru": LRU,
    "lru2": LRU2,
    "s3fifo": S3FIFO,
    "sieve": Sieve,
    "arc": ARC,
    "moe": Adaptive,
}
"""By name; each is called with the number of keys that its cache holds."""
