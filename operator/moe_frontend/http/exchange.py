"""One request of a client: its texts are generated side by side, each by a call of the gRPC API.

The calls are answered as those of gRPC clients are (`Forwarder.answer`): by the same routing, holding and
replay. A client that goes away, or a deadline, ends all of them.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import grpc
from google.protobuf.message import Message
from opentelemetry import trace
from starlette.types import Receive, Scope, Send

from moe_api.inference.v1 import inference_pb2
from moe_frontend.http.errors import ApiError, of_status, shutting_down
from moe_frontend.transport.attempts import Recipient
from moe_frontend.transport.failures import Failure

SERVICE: Final = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
TIMEOUT_HEADER: Final = "x-request-timeout"
"""Seconds that the client waits for its answer: the deadline of the request."""
_DAY_S: Final = 86_400.0
Take = Callable[[int, inference_pb2.GenerateResponse], Awaitable[None]]
T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed its connection, or reads nothing: there is nobody to answer."""


class Answering(Protocol):
    """What answers calls: `forwarding.Forwarder`."""

    async def answer(
        self, method: str, request: Message, caller: Recipient, span: trace.Span
    ) -> Failure | None:
        """Gives the messages of the answer to `caller`, and why they are not all, where they are not."""


class _Relay:
    """Takes the place of a gRPC call's context: messages of the answer go to `take`."""

    def __init__(self, exchange: "Exchange", take: Callable[[bytes], Awaitable[None]]) -> None:
        self._exchange = exchange
        self._take = take

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return self._exchange.metadata

    def time_remaining(self) -> float | None:
        return self._exchange.remaining_s

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Answers over HTTP have begun by now, so nothing of it reaches the client."""

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """The answer begins with its first message."""

    async def write(self, message: bytes) -> None:
        await self._take(message)


@dataclass(frozen=True)
class Exchange:
    """One request, from its first byte to the last of its answer.

    Attributes:
        id: of the request, which the answer names.
        metadata: headers of the request, keys in lower case.
        receive, send: of ASGI.
        abort: cuts the connection.
        stopping: whether the process ends what still runs.
        deadline: when the client stops waiting, of `time.monotonic`; None: it never does.
        span: of the request.
        created: when it came, in seconds since the epoch.
    """

    id: str
    metadata: Sequence[tuple[str, str]]
    receive: Receive
    send: Send
    abort: Callable[[], None]
    stopping: Callable[[], bool]
    deadline: float | None
    span: trace.Span
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the deadline, 0 at least."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of what comes before the first text, such as a replica.

        Raises:
            ApiError: the deadline passed, or the process ends.
            ClientGoneError: nobody waits any more.
        """
        with self._attended():
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(_until_gone(self.receive))
                try:
                    async with asyncio.timeout(self.remaining_s):
                        result = await work
                except TimeoutError:
                    raise _late() from None
                watch.cancel()
        return result

    async def generate(
        self,
        service: Answering,
        tracer: trace.Tracer,
        requests: Sequence[inference_pb2.GenerateRequest],
        take: Take,
        renamed: Mapping[str, str],
    ) -> None:
        """Generates the texts of all requests; `take` gets each message with the number of its text.

        Args:
            service: answers.
            tracer: makes a span for each text.
            requests: one for each text.
            take: slow where the client is.
            renamed: fields of these requests to those of the client's, for errors.

        Raises:
            ApiError: one of them failed; the others are stopped.
            ClientGoneError: nobody waits any more.
        """

        async def generate(index: int, request: inference_pb2.GenerateRequest) -> None:
            async def relay(message: bytes) -> None:
                await take(index, inference_pb2.GenerateResponse.FromString(message))

            await self._answer(service, tracer, "Generate", request, relay, renamed)

        with self._attended():
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(_until_gone(self.receive))
                async with asyncio.TaskGroup() as texts:
                    for index, request in enumerate(requests[1:], start=1):
                        texts.create_task(generate(index, request))
                    await generate(0, requests[0])
                watch.cancel()

    async def _answer(
        self,
        service: Answering,
        tracer: trace.Tracer,
        method: str,
        request: Message,
        take: Callable[[bytes], Awaitable[None]],
        renamed: Mapping[str, str],
    ) -> None:
        name = f"{SERVICE}/{method}"
        span = tracer.start_span(name, context=trace.set_span_in_context(self.span))
        try:
            async with asyncio.timeout(self.remaining_s):
                failure = await service.answer(name, request, _Relay(self, take), span)
        except TimeoutError:
            raise _late() from None
        finally:
            span.end()
        if failure is None:
            return
        if failure.code is grpc.StatusCode.ABORTED:  # the client reads nothing, so nothing can be told to it
            self.abort()
            raise ClientGoneError
        raise of_status(failure.status, renamed)

    @contextlib.contextmanager
    def _attended(self) -> Iterator[None]:
        """The first error in the group of tasks, alone: what it stopped does not matter."""
        try:
            yield
        except BaseExceptionGroup as group:
            raise _first(group) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not self.stopping():
                raise
            task.uncancel()
            raise shutting_down() from None


def new_exchange(scope: Scope, receive: Receive, send: Send) -> Exchange:
    """The exchange of a request that passed the gate.

    Raises:
        ApiError: its timeout is none.
    """
    state = scope["state"]
    headers = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in scope["headers"]]
    metadata = [pair for pair in headers if pair[0] != "x-request-id"]
    given = dict(headers).get(TIMEOUT_HEADER)
    return Exchange(
        id=state["id"],
        metadata=(*metadata, ("x-request-id", state["id"])),
        receive=receive,
        send=send,
        abort=state["abort"],
        stopping=state["stopping"],
        deadline=None if given is None else time.monotonic() + _timeout(given),
        span=state["span"],
    )


def _timeout(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _DAY_S:
        raise ApiError(
            400, f"{TIMEOUT_HEADER} is {given[:40]!r}; give seconds, above 0 and {_DAY_S:.0f} at most"
        )
    return seconds


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGoneError


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _late() -> ApiError:
    return ApiError(
        504,
        f"the time given by {TIMEOUT_HEADER} is over; allow more, or ask for fewer tokens",
        "timeout_error",
        code="deadline_exceeded",
    )
