"""Notices a worker that begins a stream anew where it was asked to go on, before the client sees it. Pure."""

from collections.abc import Sequence
from typing import Final

from moe_api.inference.v1 import inference_pb2

LEAST: Final = 4
"""Fewer tokens are often repeated by chance, as in "ha ha"."""
ENOUGH: Final = 64
"""So many tokens in their old order are no chance."""


class ContractError(Exception):
    """A replica answered against the .proto file; the text says how, behind "it "."""


class EchoGuard:
    """Watches the beginning of one attempt.

    A worker that says how many tokens it goes on behind is believed. One that does not, for it may be of an
    earlier version, has its messages held for as long as they repeat the stream's first tokens. A stream that
    consists of one repeated part may go on with that very part, so there nothing is held.

    Args:
        sent: tokens of the stream that the worker was told of.
    """

    def __init__(self, sent: Sequence[int]) -> None:
        self._sent = sent
        self._matched = 0
        self._held: list[inference_pb2.GenerateResponse] = []
        self._first = True
        self._acknowledged = False
        self._sure = len(sent) < LEAST or _is_repetition(sent)

    @property
    def doubtful(self) -> bool:
        """Whether the worker was asked to go on, and has not said from where it does."""
        return len(self._sent) > 0 and not self._acknowledged

    def take(self, response: inference_pb2.GenerateResponse) -> list[inference_pb2.GenerateResponse]:
        """The messages that can be passed on now.

        Raises:
            ContractError: the worker goes on from elsewhere than it was asked to.
        """
        self._acknowledge(response)
        self._sure = self._sure or self._goes_on(response)
        self._held.append(response)
        if not self._sure:
            return []
        ready, self._held = self._held, []
        return ready

    def _acknowledge(self, response: inference_pb2.GenerateResponse) -> None:
        first, self._first = self._first, False
        if not first or not response.resumed:
            return
        if response.resumed != len(self._sent):
            raise ContractError(
                f"continues after {response.resumed} tokens, but {len(self._sent)} were emitted"
            )
        self._acknowledged = self._sure = True

    def _goes_on(self, response: inference_pb2.GenerateResponse) -> bool:
        for token in response.tokens:
            if token != self._sent[self._matched]:
                return True
            self._matched += 1
            if self._matched == min(len(self._sent), ENOUGH):
                raise ContractError("restarted the text instead of continuing after the given tokens")
        return response.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED


def _is_repetition(tokens: Sequence[int]) -> bool:
    """Whether the tokens are a shorter sequence, repeated. By the borders of Knuth, Morris and Pratt."""
    borders = [0] * len(tokens)
    for index in range(1, len(tokens)):
        border = borders[index - 1]
        while border and tokens[index] != tokens[border]:
            border = borders[border - 1]
        borders[index] = border + (tokens[index] == tokens[border])
    period = len(tokens) - borders[-1]
    return period < len(tokens) and len(tokens) % period == 0
