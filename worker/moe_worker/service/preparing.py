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
    """A request whose output format has been compiled, or cannot be: `guide.matcher` is done."""

    request: Request
    guide: Guide


class Preparing:
    """The requests that are held back. Belongs to the thread that runs the steps.

    Args:
        done: takes each prepared request, also a cancelled one; called in any thread.
    """

    def __init__(self, done: Callable[[Prepared], None]) -> None:
        self._done = done
        self._guides: dict[int, Guide] = {}

    def start(self, request: Request, guide: Guide) -> None:
        """Holds a request back until its guide is ready."""
        self._guides[request.id] = guide
        guide.matcher.add_done_callback(lambda _: self._done(Prepared(request, guide)))

    def cancel(self, request: int) -> None:
        """Forgets a request; it is no error if it is not held back."""
        guide = self._guides.pop(request, None)
        if guide is not None:
            guide.matcher.cancel()

    def take(self, prepared: Prepared) -> bool:
        """Whether a prepared request was not cancelled."""
        return self._guides.pop(prepared.request.id, None) is not None
