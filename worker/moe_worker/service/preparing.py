"""Holds requests with an output format back until it is compiled, so that no step waits for a format.

Clients choose the formats. One takes up to a quarter of a second, and ten at once would stop all streams for
seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass

from moe_worker.engine.requests import Request
from moe_worker.sampling.guides import Guide


@dataclass(frozen=True)
class Prepared:
    """A request whose output format has been compiled, or cannot be: the matcher of its guide is done."""

    request: Request


class Preparing:
    """The requests that are held back. Belongs to the thread that runs the steps.

    Args:
        done: takes each prepared request, also a cancelled one; called in any thread.
    """

    def __init__(self, done: Callable[[Prepared], None]) -> None:
        self._done = done
        self._guides: dict[int, Guide] = {}

    def start(self, request: Request, guide: Guide) -> None:
        """Holds a request back until its guide is ready.

        The guide's future keeps what it calls: were the guide part of that, its memory would wait for a full
        garbage collection, which is rare.
        """
        self._guides[request.id] = guide
        done, prepared = self._done, Prepared(request)
        guide.matcher.add_done_callback(lambda _: done(prepared))

    def cancel(self, request: int) -> None:
        """Forgets a request; it is no error if it is not held back."""
        guide = self._guides.pop(request, None)
        if guide is not None:
            guide.matcher.cancel()

    def take(self, prepared: Prepared) -> Guide | None:
        """The guide of a prepared request; None if that was cancelled."""
        return self._guides.pop(prepared.request.id, None)
