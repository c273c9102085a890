"""Reference counts of the cache's pages. Pure: kvcache/paged.py has the storage."""


class PagePool:
    """Pages 0 to `pages` - 1, each with a number of references; a page with none is free.

    Free pages are reused last in, first out: the newest one is most likely still in a CPU's cache.
    """

    def __init__(self, pages: int) -> None:
        self._references = [0] * pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def pages(self) -> int:
        """Number of pages."""
        return len(self._references)

    @property
    def free(self) -> int:
        """Pages without a reference."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages with a reference."""
        return self.pages - self.free

    def take(self, count: int) -> list[int]:
        """`count` free pages, each with one reference now. Raises ValueError where fewer are free."""
        if not 0 <= count <= len(self._free):
            raise ValueError(f"cannot take {count} pages: {len(self._free)} of {self.pages} are free")
        split = len(self._free) - count
        taken = self._free[split:][::-1]
        del self._free[split:]
        for page in taken:
            self._references[page] = 1
        return taken

    def references(self, page: int) -> int:
        """References to the page; 0: it is free."""
        return self._references[page]

    def retain(self, page: int) -> int:
        """Adds a reference to the page; returns the new count. Raises ValueError for a free page."""
        count = self._references[page]
        if not count:
            raise ValueError(f"page {page} is free; only a page in use can be shared")
        self._references[page] = count + 1
        return count + 1

    def release(self, page: int) -> int:
        """Removes a reference to the page, which is free at 0; returns the new count. Raises ValueError if
        free.
        """
        count = self._references[page] - 1
        if count < 0:
            raise ValueError(f"page {page} is free already; it was released twice")
        self._references[page] = count
        if not count:
            self._free.append(page)
        return count
