"""What a client has of its stream, and the request with which another replica takes it up. Pure.

A stream is a function of its prompt, its sampling parameters and its seed. The frontend keeps these and the
tokens that it has passed on: with them any worker of the same revision computes what is missing, and nothing
else, since text and tokens of a message belong together (moe_api.inference.v1.Resume).
"""

import secrets

from google.protobuf.message import Message

from moe_api.inference.v1 import inference_pb2


class Progress:
    """Of one call. Of calls other than Generate it only counts the messages.

    Args:
        request: as the client sent it.
    """

    def __init__(self, request: Message) -> None:
        self._request = request
        self._generate = _with_seed(request) if isinstance(request, inference_pb2.GenerateRequest) else None
        self._revision = ""
        self._whole = True
        self._tokens: list[int] = []
        self.messages = 0
        self.finished = False

    @property
    def started(self) -> bool:
        """Whether the client has a part of the answer already."""
        return self.messages > 0

    @property
    def tokens(self) -> int:
        """Tokens that were passed on."""
        return len(self._tokens)

    @property
    def resumable(self) -> bool:
        """Whether another replica can give what is missing."""
        return self._generate is not None and self._whole

    @property
    def bound_to(self) -> str | None:
        """The only revision that may answer: that of the replica that began. None: any."""
        asked = self._generate.resume.revision if self._generate else ""
        return asked or (self._revision if self.started and self.resumable else None)

    def take(self, message: bytes) -> None:
        """Notes a message that went to the client."""
        self.messages += 1
        if self._generate is None:
            return
        response = inference_pb2.GenerateResponse.FromString(message)
        self._tokens.extend(response.tokens)
        # Text without its tokens could not be told from what is still to come.
        self._whole &= not response.text or len(response.tokens) > 0
        self.finished = response.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED

    def request(self, revision: str) -> Message:
        """What to ask a replica of this revision for."""
        if self._generate is None:
            return self._request
        self._revision = self.bound_to or revision
        asked = inference_pb2.GenerateRequest()
        asked.CopyFrom(self._generate)
        asked.resume.revision = self._revision
        asked.resume.tokens.extend(self._tokens)
        return asked


def _with_seed(request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
    """The request with the seed of its stream fixed where it samples: each worker would draw another."""
    seeded = inference_pb2.GenerateRequest()
    seeded.CopyFrom(request)
    sampling = request.sampling
    if sampling.temperature > 0 and not (sampling.HasField("seed") or request.resume.HasField("seed")):
        seeded.resume.seed = secrets.randbits(64)
    return seeded
