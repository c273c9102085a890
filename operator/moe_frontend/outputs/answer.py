"""A stored answer: one message, and where the worker's messages ended in it. Pure."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from moe_api.inference.v1 import inference_pb2

_OBJECTS: Final = 700
"""Bytes of an entry's Python objects and its places in dictionaries, measured with tracemalloc."""


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        payload: one GenerateResponse with all text and tokens; usage.cached is set.
        marks: after each message of the worker, the tokens and the characters until there; flat pairs.
    """

    payload: bytes
    marks: "array[int]"

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return len(self.payload) + self.marks.itemsize * len(self.marks) + _OBJECTS

    def behind(self, resumed: Sequence[int]) -> bytes | None:
        """The message that goes on behind the tokens that a client has; None where there is no telling."""
        if not resumed:
            return self.payload
        characters = dict(zip(self.marks[::2], self.marks[1::2], strict=True)).get(len(resumed))
        whole = inference_pb2.GenerateResponse.FromString(self.payload)
        if characters is None or whole.tokens[: len(resumed)] != list(resumed):
            return None
        return inference_pb2.GenerateResponse(
            text=whole.text[characters:],
            tokens=whole.tokens[len(resumed) :],
            logprobs=whole.logprobs[len(resumed) :],
            finish_reason=whole.finish_reason,
            usage=whole.usage,
            resumed=len(resumed),
        ).SerializeToString()


def answer_of(messages: Iterable[bytes]) -> Answer | None:
    """The answer that a stream of messages makes; None where it is not whole."""
    whole = inference_pb2.GenerateResponse()
    marks, texts, characters = array("I"), [], 0
    for message in messages:
        piece = inference_pb2.GenerateResponse.FromString(message)
        whole.tokens.extend(piece.tokens)
        whole.logprobs.extend(piece.logprobs)
        texts.append(piece.text)
        characters += len(piece.text)
        marks.extend((len(whole.tokens), characters))
        whole.finish_reason = piece.finish_reason
        if piece.HasField("usage"):
            whole.usage.CopyFrom(piece.usage)
    if whole.finish_reason == inference_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    whole.text = "".join(texts)
    whole.usage.cached = True
    return Answer(whole.SerializeToString(), marks)
