"""The prefix tree: sequences with the same prefix share its cache pages, which are computed once.

A node is one full page of token ids. A path from the root is a prefix, and equal prefixes of one namespace
share a path. The pool counts references: the tree holds one to each of its pages, and every user of a path
holds one to each page on it. A page with the tree's reference only is idle and may be evicted. Users hold
whole paths, so all pages below an idle page are idle, too.

The least useful leaf is evicted first. Usefulness is the time of the last use, counted in lookups, plus a
credit for each of the first MOST_HITS hits. The credit is the number of lookups that together use as many
pages as the tree holds, measured over recent lookups. With recency alone, a burst of prompts that never
return would evict a system prompt that everybody shares; without the bound on hits, a prefix that was popular
once would stay forever. A constant credit would be too small for a large cache and would keep stale pages in
a small one.
"""

from collections.abc import Sequence

from moe_worker.kvcache.blocks import BlockNames
from moe_worker.kvcache.heap import LazyHeap
from moe_worker.kvcache.offload import Offload, first_digest, next_digest
from moe_worker.kvcache.pages import PagePool

MOST_HITS = 3
MOST_NAMES = 8
"""Blocks that may end in one page: several where equal tokens came as different requests."""
_SMOOTHING = 1 / 64
"""Weight of the last lookup in the mean number of pages per lookup."""


class Node:
    """A page in the tree, and the prefix that ends with it. Opaque to users."""

    __slots__ = ("children", "digest", "hits", "key", "names", "page", "parent", "usefulness")

    def __init__(self, parent: "Node | None", key: tuple[int, ...], page: int, usefulness: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.usefulness = usefulness  # the leaf with the least is evicted first
        self.hits = 0
        self.children: dict[tuple[int, ...], Node] = {}
        self.names: tuple[int, ...] = ()  # of blocks that end in it
        self.digest = b""  # of its prefix; only where evicted pages are kept


class _Root(Node):
    """The empty prefix of a namespace."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: str) -> None:
        super().__init__(None, (), -1, 0)
        self.namespace = namespace
        self.digest = first_digest(namespace)


class PrefixTree:
    """Prefixes whose pages are in `pool`, `page_size` tokens a page. Not thread-safe.

    names: told which blocks come and go. offload: gets evicted pages; None: they are lost.
    """

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        names: BlockNames | None = None,
        offload: Offload | None = None,
    ) -> None:
        self._pool = pool
        self._page_size = page_size
        self._roots: dict[str, _Root] = {}
        self._leaves: LazyHeap[float, Node] = LazyHeap(self._is_idle_leaf)
        self._lookups = 0
        self._touched = 0
        self._touched_mean = 1.0
        self.names = BlockNames() if names is None else names
        self._offload = offload
        self.lifetime = 0  # lookups that use as many pages as the tree holds
        self.pages = 0
        self.idle = 0
        self.evictions = 0

    def match(
        self, tokens: Sequence[int], namespace: str = "", most: int | None = None
    ) -> tuple[Node, list[int]]:
        """The longest cached prefix of `tokens`, in full pages (at most `most`), and its pages in order.

        The caller holds a reference to these pages until it passes the node to `release`.
        """
        self._lookups += 1
        self._measure_lifetime()
        node: Node = self._roots.get(namespace) or _Root(namespace)
        pages: list[int] = []
        size = self._page_size
        last = len(tokens) // size if most is None else min(most, len(tokens) // size)
        for index in range(last):
            child = node.children.get(tuple(tokens[index * size : (index + 1) * size]))
            if child is None:
                break
            self._use(child)
            pages.append(child.page)
            node = child
        return node, pages

    def insert(self, node: Node, tokens: Sequence[int], pages: Sequence[int]) -> tuple[Node, list[int]]:
        """Adds pages filled with `tokens` after a node in use; returns the last node and the pages.

        The caller's reference to a page becomes a reference to the tree's page. If the tree already has a
        page for the same prefix, that page replaces the caller's, which is released: the pages returned then
        differ from those given. Raises ValueError if the pages are not full.
        """
        size = self._page_size
        if len(tokens) != size * len(pages):
            raise ValueError(f"{len(tokens)} tokens do not fill {len(pages)} pages of {size} tokens")
        kept: list[int] = []
        for index, page in enumerate(pages):
            node = self._insert_page(node, tuple(tokens[index * size : (index + 1) * size]), page)
            kept.append(node.page)
        return node, kept

    def name(self, node: Node, back: int, name: int) -> Node:
        """Names the block that ends in the page `back` pages before a node in use; returns that page's."""
        for _ in range(back):
            node = node.parent or node
        if len(node.names) < MOST_NAMES and name not in node.names and self.names.retain(name):
            node.names += (name,)
        return node

    def release(self, node: Node) -> None:
        """Drops the caller's references to the prefix that ends in `node`; its pages stay until evicted."""
        while node.parent is not None:
            if self._pool.release(node.page) == 1:
                self.idle += 1
                if not node.children:
                    self._leaves.push(node.usefulness, node)
            node = node.parent

    def evict(self, count: int) -> int:
        """Frees up to `count` idle pages, the least useful first; returns how many."""
        for freed in range(count):
            leaf = self._leaves.pop()
            if leaf is None:
                return freed
            self._remove(leaf)
        return count

    def _use(self, node: Node) -> None:
        if self._pool.retain(node.page) == 2:
            self.idle -= 1
        self._touched += 1
        node.hits += 1
        node.usefulness = self._lookups + self.lifetime * min(node.hits, MOST_HITS)

    def _measure_lifetime(self) -> None:
        self._touched_mean += _SMOOTHING * (self._touched - self._touched_mean)
        self._touched = 0
        self.lifetime = int(self.pages / max(1.0, self._touched_mean))

    def _insert_page(self, node: Node, key: tuple[int, ...], page: int) -> Node:
        if isinstance(node, _Root):
            # While the caller held this root, its last page may have been evicted and the root dropped.
            node = self._roots.setdefault(node.namespace, node)
        child = node.children.get(key)
        if child is not None:
            self._use(child)
            self._pool.release(page)
            return child
        self._pool.retain(page)
        child = node.children[key] = Node(node, key, page, self._lookups)
        if self._offload is not None:
            child.digest = next_digest(node.digest, key)
        self.pages += 1
        self._touched += 1
        return child

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        if parent is None:
            raise ValueError("the root of a namespace holds no page to evict")
        del parent.children[leaf.key]
        leaf.parent = None
        if self._offload is not None:
            self._offload.save(leaf.digest, leaf.page, leaf.names)
        for name in leaf.names:
            self.names.release(name)
        self._pool.release(leaf.page)
        self.pages -= 1
        self.idle -= 1
        self.evictions += 1
        if parent.children:
            return
        if isinstance(parent, _Root):
            self._roots.pop(parent.namespace)
        else:
            self._leaves.push(parent.usefulness, parent)

    def _is_idle_leaf(self, key: float, node: Node) -> bool:
        return (
            node.parent is not None
            and not node.children
            and node.usefulness == key
            and self._pool.references(node.page) == 1
        )
