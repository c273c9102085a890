"""The emitted part of a stream, and the request with which another replica continues it. Pure.

A stream is a function of its prompt, its sampling parameters and its seed. The frontend keeps these and the
emitted tokens: with them any worker of the same revision computes exactly the missing part, since text and
tokens of a message belong together (moe_api.inference.v1.Resume). Workers are not trusted: their messages are
checked against the .proto file before the client receives them.
"""

import secrets
from typing import Final

from google.protobuf import message as protobuf
from google.protobuf.message import Message

from moe_api.inference.v1 import inference_pb2
from moe_frontend.policy.costs import prompt_tokens
from moe_frontend.policy.echo import ContractError, EchoGuard

_ANSWERS: Final[dict[type[Message], type[Message]]] = {
    inference_pb2.GenerateRequest: inference_pb2.GenerateResponse,
    inference_pb2.TokenizeRequest: inference_pb2.TokenizeResponse,
    inference_pb2.GetModelRequest: inference_pb2.Model,
}


class Progress:
    """The progress of one call. For calls other than Generate: whether their single message has arrived.

    Args:
        request: as the client sent it.
    """

    def __init__(self, request: Message) -> None:
        self._request = request
        self._answer = _ANSWERS[type(request)]
        self._generate = _with_seed(request) if isinstance(request, inference_pb2.GenerateRequest) else None
        self._revision = ""
        self._whole = True
        self._tokens: list[int] = []
        self._scored = self._repeated = 0
        self._guard = EchoGuard(())
        self.messages = 0
        self.finished = False
        self.usage: inference_pb2.Usage | None = None
        """As the last replica reported it with the end of the response."""

    @property
    def started(self) -> bool:
        """Whether the client already has a part of the response."""
        return self.messages > 0

    @property
    def size(self) -> int:
        """Bytes of the client's request."""
        return self._request.ByteSize()

    @property
    def tokens(self) -> int:
        """Number of emitted tokens."""
        return len(self._tokens)

    @property
    def used(self) -> int:
        """Tokens of the prompt and of the text so far, once a replica was asked; estimated until its end."""
        if self._generate is None or not (self._revision or self.started):
            return 0
        if self.usage is not None:
            return self.usage.prompt_tokens + self.usage.completion_tokens
        return prompt_tokens(self._generate) + self.tokens

    @property
    def resumable(self) -> bool:
        """Whether another replica can compute the missing part."""
        return self._generate is not None and self._whole

    @property
    def revision(self) -> str:
        """The revision of the last replica; "" before the first attempt."""
        return self._revision

    @property
    def bound_to(self) -> str | None:
        """The required revision: the one that started the response. None: any."""
        asked = self._generate.resume.revision if self._generate else ""
        return asked or (self._revision if self.started and self.resumable else None)

    def request(self, revision: str) -> Message:
        """The request for a replica of this revision; starts an attempt."""
        if self._generate is None:
            return self._request
        self._revision = self.bound_to or revision
        asked = inference_pb2.GenerateRequest()
        asked.CopyFrom(self._generate)
        asked.resume.revision = self._revision
        asked.resume.tokens.extend(self._tokens)
        self._guard = EchoGuard(tuple(asked.resume.tokens))
        self._repeated = self._scored
        return asked

    def take(self, message: bytes) -> list[bytes]:
        """Checks and records a message of the replica; returns the messages to send now, which may be none.

        Raises:
            ContractError: the message violates the .proto file.
        """
        response = self._parsed(message)
        if self.finished:
            raise ContractError("sent a message after the end of the answer")
        if not isinstance(response, inference_pb2.GenerateResponse):
            self.messages, self.finished = 1, True
            return [message]
        passed = self._guard.take(response)
        trimmed = self._drop_repeated(response)
        for ready in passed:
            self._note(ready)
        unchanged = None if trimmed else response
        return [message if ready is unchanged else ready.SerializeToString() for ready in passed]

    def end(self) -> None:
        """Checks that the response is complete when the replica ends it.

        Raises:
            ContractError: it is not complete.
        """
        if not self.finished:
            raise ContractError(
                "ended the answer without a finish reason" if self._generate else "sent no message"
            )

    def _parsed(self, message: bytes) -> Message:
        try:
            return self._answer.FromString(message)
        except protobuf.DecodeError as error:
            invalid = f"sent an invalid {self._answer.DESCRIPTOR.name}: {error}"
            raise ContractError(f"{invalid}; use worker and frontend images of the same version") from None

    def _drop_repeated(self, response: inference_pb2.GenerateResponse) -> bool:
        """Removes tokens of the prompt that the client has: a replica that begins anew sends all of them."""
        repeated = min(len(response.prompt), self._repeated)
        self._repeated -= repeated
        del response.prompt[:repeated]
        return repeated > 0

    def _note(self, response: inference_pb2.GenerateResponse) -> None:
        self._check(response)
        self.messages += 1
        self._tokens.extend(response.tokens)
        self._scored += len(response.prompt)
        # Text without tokens cannot be told apart from text that is still missing.
        self._whole &= not response.text or len(response.tokens) > 0
        if response.HasField("usage"):
            self.usage = response.usage
        self.finished = response.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED

    def _check(self, response: inference_pb2.GenerateResponse) -> None:
        if self._generate is None:
            return
        if response.finish_reason not in inference_pb2.FinishReason.values():
            raise ContractError(f"sent finish reason {response.finish_reason}, which does not exist")
        sampling = self._generate.sampling
        if response.prompt and not sampling.HasField("prompt_logprobs"):
            raise ContractError("sent tokens of the prompt, for which nobody asked")
        total = len(self._generate.resume.tokens) + self.tokens + len(response.tokens)
        if sampling.HasField("max_tokens") and total > sampling.max_tokens:
            raise ContractError(f"sent more than max_tokens ({sampling.max_tokens}) tokens")
        doubtful = self._guard.doubtful and response.HasField("usage")
        if doubtful and response.usage.completion_tokens != total:
            raise ContractError(
                f"reports {response.usage.completion_tokens} completion tokens, but sent {total}"
            )


def _with_seed(request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
    """The request with a fixed seed if it samples; otherwise each worker would draw its own."""
    seeded = inference_pb2.GenerateRequest()
    seeded.CopyFrom(request)
    sampling = request.sampling
    if sampling.temperature > 0 and not (sampling.HasField("seed") or request.resume.HasField("seed")):
        seeded.resume.seed = secrets.randbits(64)
    return seeded
