"""Calls up to 16 pods concurrently: so many that do not respond cost one timeout together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_AT_ONCE = 16

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def ask(question: Callable[[Item], Answer], items: Iterable[Item]) -> list[tuple[Item, Answer]]:
    """Each item with its result, in the order of the items."""
    items = list(items)
    if len(items) < 2:
        return [(item, question(item)) for item in items]
    with ThreadPoolExecutor(min(_AT_ONCE, len(items))) as threads:
        return list(zip(items, threads.map(question, items), strict=True))
