"""Output formats in the order of steps: tokens reach the guides, and masks the steps that sample.

The mask of a step depends on the tokens before it. If their step is still in flight, the new one is launched
first, so that the device does not wait.
"""

from collections.abc import Callable, Sequence

from moe_worker.engine.active import ActiveRequest
from moe_worker.engine.flight import Flight
from moe_worker.engine.loading import LoadedModel
from moe_worker.engine.requests import Request
from moe_worker.sampling.guides import Allowed, Guide

Sampling = Sequence[tuple[int, ActiveRequest]]
Flights = Sequence[Flight[ActiveRequest]]


class StepGuides:
    """The guides of all active requests of a model."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._tokenizer, self._device, self._guides = loaded.tokenizer, loaded.device, loaded.guides

    def open(self, request: Request) -> Guide | None:
        """The guide of a new request; None if it has no output format."""
        return self._opened(request, request.written)

    def undo(self, flight: Flight[ActiveRequest]) -> None:
        """Guides that took tokens of a step that does not count begin again, behind the text so far."""
        for _, active in flight.sampling if flight.guided else ():
            if active.guide is not None:
                active.guide = self._opened(active.request, active.output)

    def begin(self, sampling: Sampling, flights: Flights, now: bool) -> Callable[[], Allowed | None]:
        """How to compute the masks for requests that sample in a new step, behind the steps in `flights`.

        Call the result when the forward pass is launched: it waits for the tokens of those steps, and returns
        the masks, or None if no request has a format. now: compute them at once. Where nothing else computes
        during a forward pass, they take less time before it: the matchers are in the processor's caches then.
        """
        guided = [(row, it.guide) for row, (_, it) in enumerate(sampling) if it.guide is not None]
        if not guided:
            return lambda: None
        names = {name for name, it in sampling if it.guide is not None}
        before = [flight for flight in flights if not names.isdisjoint(flight.rows)]

        def masks() -> Allowed:
            for flight in before:
                self.take(flight)
            return self._guides.masks(guided, self._device)

        if now:
            allowed = masks()
            return lambda: allowed
        return masks

    def mask_seconds(self, flight: Flight[ActiveRequest]) -> dict[int, float]:
        """What masks of the requests of a step took since the last call, by request."""
        return {name: it.guide.take_seconds() for name, it in flight.sampling if it.guide is not None}

    def take(self, flight: Flight[ActiveRequest]) -> None:
        """Gives the tokens of a step to the guides of their texts, once; waits for the tokens.

        Later tokens may follow before these are sent, so the flight notes which texts are complete.
        """
        if flight.guided or not [active for _, active in flight.sampling if active.guide is not None]:
            return
        flight.guided = True
        tokens, failed, _ = flight.wait()
        rows = zip(flight.sampling, tokens, failed, strict=True)
        for row, ((_, active), token, wrong) in enumerate(rows):
            guide = None if wrong else active.guide
            if guide is not None and guide.take(token, self._tokenizer.token_bytes(token)):
                flight.complete.add(row)

    def _opened(self, request: Request, text: Sequence[int]) -> Guide | None:
        """The guide of a request whose text so far has these tokens; None if it has no output format."""
        if request.output_format is None:
            return None
        guide = self._guides.open(request.output_format, text, request.salt)
        guide.owner = request.tenant
        return guide
