"""A stored answer: one message, and the ends of the worker's messages in it. Pure."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from moe_api.inference.v1 import inference_pb2

_OBJECTS: Final = 700
"""Bytes of an entry's Python objects and its places in dictionaries, measured with tracemalloc."""


@dataclass(frozen=True, slots=True)
class Saving:
    """What an answer without a worker saves.

    Attributes:
        tokens: of the prompt and the text that a worker would compute; cached prefixes do not count.
        seconds: that a worker would take, queueing included.
    """

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer.

    Attributes:
        payload: one GenerateResponse with all text and tokens; usage.cached is set.
        marks: the number of tokens and characters up to the end of each message of the worker, as flat pairs.
        tokens: that the worker computed, as `Saving.tokens`.
        seconds: that the worker took.
    """

    payload: bytes
    marks: "array[int]"
    tokens: int
    seconds: float

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return len(self.payload) + self.marks.itemsize * len(self.marks) + _OBJECTS

    def saving(self, resumed: int) -> Saving:
        """What a hit saves if the client already has this many tokens."""
        length = self.marks[-2] if self.marks else 0
        missing = (length - resumed) / length if length else 1.0
        return Saving(self.tokens - resumed, self.seconds * missing)

    def behind(self, resumed: Sequence[int]) -> bytes | None:
        """The message that continues after the tokens of a client; None if they end within a message."""
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


def answer_of(messages: Iterable[bytes], seconds: float = 0.0) -> Answer | None:
    """The answer from a stream of messages; None if it is incomplete.

    seconds: that the worker took.
    """
    whole = inference_pb2.GenerateResponse()
    marks, texts, characters = array("I"), [], 0
    tokens = whole.tokens
    for message in messages:
        whole.text = ""  # merging appends to lists, and leaves a text where the message has none
        whole.MergeFromString(message)
        text = whole.text
        texts.append(text)
        characters += len(text)
        marks.append(len(tokens))
        marks.append(characters)
    for field in ("resumed", "prompt"):
        whole.ClearField(field)
    whole.DiscardUnknownFields()
    if whole.finish_reason == inference_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    whole.text = "".join(texts)
    whole.usage.cached = True
    computed = max(0, whole.usage.prompt_tokens - whole.usage.cached_tokens) + len(whole.tokens)
    return Answer(whole.SerializeToString(), marks, computed, seconds)
