"""The pages of jobs: from the pool, from the prefix tree, and back."""

from collections import deque
from collections.abc import Callable, Iterator

from moe_worker.kvcache.blocks import BlockNames
from moe_worker.kvcache.offload import Kept, Move, Offload, Storage, next_digest
from moe_worker.kvcache.pages import PagePool
from moe_worker.kvcache.prefix import PrefixTree
from moe_worker.scheduler.job import Job
from moe_worker.scheduler.plan import Limits


class Memory:
    """Gives pages to jobs, shares those of equal prefixes, and evicts idle ones if the pool is empty.

    storage: CPU memory for evicted pages; None: they are lost. worth: whether so many pages should come back.
    """

    def __init__(
        self, limits: Limits, storage: Storage | None = None, worth: Callable[[int], bool] = lambda _: True
    ) -> None:
        self._limits = limits
        self._size = limits.page_size
        self._worth = worth
        self.pool = PagePool(limits.pages)
        names = BlockNames()
        self.offload = None if storage is None else Offload(storage, names)
        self.tree = PrefixTree(self.pool, limits.page_size, names, self.offload)

    @property
    def available(self) -> int:
        """Pages that are free or can be evicted."""
        return self.pool.free + self.tree.idle

    def announce(self, job: Job) -> None:
        """Names the blocks of a new job's prompt as held: they will be."""
        if self._limits.prefix_cache:
            names = self.tree.names
            job.announced = tuple(block.name for block in job.arrival.blocks if names.retain(block.name))

    def retract(self, job: Job) -> None:
        """The job has ended; from now on the cache holds what is in the tree."""
        for name in job.announced:
            self.tree.names.release(name)
        job.announced = ()

    def missing(self, job: Job, reserve: int) -> int:
        """Gives a waiting job the pages of all its tokens; `reserve` more must stay available.

        Returns 0, or, if pages are short, changes nothing and returns how many it needs without the reserve.
        """
        before = self.available
        # The last token is always computed, because its logits are needed: its page is never shared.
        shares = self._limits.prefix_cache and not job.arrival.scored
        most = (job.length - 1) // self._size if shares else 0
        job.node, shared = self.tree.match(job.tokens, job.arrival.namespace, most)
        fresh = self._limits.pages_for(job.length) - len(shared)
        if self.available < fresh + reserve:
            needed = fresh + before - self.available
            self.free(job)
            return needed
        job.kept = self._restorable(job, len(shared), most)
        job.shared = len(shared)
        job.table = shared + self._take(fresh)
        job.computed = job.written = len(shared) * self._size
        self._name(job, 0)
        return 0

    @property
    def page_s(self) -> float:
        """Seconds that a page takes to come back from CPU memory."""
        return 0.0 if self.offload is None else self.offload.page_s

    def restore(self, job: Job, most: int) -> int:
        """Up to `most` pages of a job that has computed nothing yet come back; returns how many.

        Pages that are still on their way come back in a later step. If one is damaged, the job has to compute
        that page and all after it.
        """
        if self.offload is None:
            return 0
        self.offload.fetch(job.kept)
        first = job.computed // self._size
        pages = min(most, len(job.kept))
        for count, page in enumerate(job.table[first : first + pages]):
            back = self.offload.load(job.kept[0], page)
            if back is None:
                return count
            job.kept.popleft()
            if not back:
                self._abandon(job)
                return count
            job.computed = job.written = job.computed + self._size
        return pages

    def grow(self, job: Job) -> bool:
        """One more page for a running job; False if there is none."""
        if not self.available:
            return False
        job.table += self._take(1)
        return True

    def share(self, job: Job) -> None:
        """Adds the job's full pages to the tree; equal pages that are already there replace them."""
        if not self._limits.prefix_cache or job.node is None:
            return
        first, last = job.shared, job.written // self._size
        pages = job.table[first:last]
        job.node, kept = self.tree.insert(job.node, job.tokens[first * self._size : last * self._size], pages)
        job.shared = last
        self._name(job, first)
        if kept != pages:
            job.table[first:last] = kept
            job.told = min(job.told, first)

    def free(self, job: Job) -> None:
        """Takes all pages from a job; those in the tree stay there for others."""
        self._abandon(job)
        for page in job.table[job.shared :]:
            self.pool.release(page)
        if job.node is not None:
            self.tree.release(job.node)
        job.node, job.table = None, []
        job.shared = job.told = job.computed = job.written = 0

    def take_moves(self) -> list[Move]:
        """Copies of pages that run now, before the next step."""
        return [] if self.offload is None else self.offload.take()

    def _restorable(self, job: Job, first: int, most: int) -> deque[Kept]:
        """The pages after the first `first` ones that come back from CPU memory."""
        if self.offload is None or job.node is None or not self._worth(most - first):
            return deque()
        return deque(self.offload.match(self._digests(job, job.node.digest, first, most)))

    def _abandon(self, job: Job) -> None:
        """No more pages come back for a job."""
        if self.offload is not None:
            self.offload.release(job.kept)
        job.kept.clear()

    def _digests(self, job: Job, digest: bytes, first: int, most: int) -> Iterator[bytes]:
        for page in range(first, most):
            digest = next_digest(digest, job.tokens[page * self._size : (page + 1) * self._size])
            yield digest

    def _name(self, job: Job, first: int) -> None:
        """Names the blocks that end in the pages from `first` on that the job has in the tree."""
        node, last = job.node, job.shared - 1
        for block in reversed(job.arrival.blocks):
            page = (block.end - 1) // self._size
            if page < first or node is None:
                return
            if page <= last:
                node, last = self.tree.name(node, last - page, block.name), page

    def _take(self, count: int) -> list[int]:
        self.tree.evict(count - self.pool.free)
        return self.pool.take(count)
