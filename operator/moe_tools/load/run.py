"""Replays a trace: schedules the requests, sends them, and records how each one ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import grpc
import numpy as np
from numpy.typing import NDArray

from moe_api import transport
from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from moe_api.supervision import Supervisor
from moe_client import calling, errors
from moe_client.endpoint import Endpoint
from moe_client.errors import CommandError
from moe_tools.load.trace import RequestTrace

if TYPE_CHECKING:
    from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceAsyncStub

_PROMPT_TOKENS: Final = 16
_CONNECTIONS: Final = 4
"""By default, an HTTP/2 connection allows 100 concurrent streams; further ones wait unnoticed."""
_SHOW_S: Final = 0.25
_MOST_READ: Final = 100_000_000
_MOST_SENT: Final = 10_000_000
"""So many requests take gigabytes of memory, and an hour at the rate of several clients."""


@dataclass(frozen=True)
class Part:
    """The replayed part of a trace, in seconds of the trace."""

    skip_s: float
    duration_s: float | None

    def holds(self, at_s: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Selects the times within the part."""
        end = math.inf if self.duration_s is None else self.skip_s + self.duration_s
        return (at_s >= self.skip_s) & (at_s < end)


@dataclass(frozen=True)
class Arrivals:
    """Requests to send."""

    at_s: NDArray[np.float64]
    """When each is due, in seconds from the start, ascending."""
    input_tokens: NDArray[np.int64]
    """Length of each prompt in tokens; 0 if unknown."""
    output_tokens: NDArray[np.int64]
    """Length of each continuation in tokens; 0 if unknown."""


def arrivals(trace: RequestTrace, part: Part, share: float, speed: float, seed: int) -> Arrivals:
    """The requests of a part of a trace, at random times within each interval of counts.

    Raises:
        CommandError: they are too many.
    """
    random = np.random.default_rng(seed)
    _check(float(trace.counts.sum()), _MOST_READ, "the trace has", "give a part of it")
    at_s, rows = _times(trace, random)
    inside = part.holds(at_s)
    _check(share * int(inside.sum()), _MOST_SENT, "this part and --share make", "lower --share or --duration")
    # 2.3 requests for each one: two, and a third with probability 0.3.
    copies = np.floor(share + random.random(len(at_s))).astype(np.int64) * inside
    chosen = np.repeat(np.arange(len(at_s)), copies)
    chosen = chosen[np.argsort(at_s[chosen], kind="stable")]
    lengths = [
        tokens[rows[chosen]] if len(tokens) else np.zeros(len(chosen), np.int64)
        for tokens in (trace.input_tokens, trace.output_tokens)
    ]
    return Arrivals((at_s[chosen] - part.skip_s) / speed, *lengths)


def _check(count: float, most: int, what: str, remedy: str) -> None:
    if count > most:
        raise CommandError(f"{what} {count:.4g} requests, more than {most:,}; {remedy}", errors.WRONG)


def _times(trace: RequestTrace, random: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Times of the requests, and the row of each."""
    if not len(trace.counts):
        return trace.at_s, np.arange(len(trace.at_s))
    whole = np.floor(trace.counts + random.random(len(trace.counts))).astype(np.int64)
    intervals = np.repeat(np.arange(len(whole)), whole)
    return (intervals + random.random(len(intervals))) * trace.interval_s, intervals


@dataclass(frozen=True)
class Requests:
    """The content of the requests."""

    model: str
    max_tokens: int
    prompt: str | None
    """Text of every request; None: random tokens."""
    seed: int
    timeout_s: float | None
    vocabulary: int = 0
    context: int = 0
    metadata: tuple[tuple[str, str], ...] = ()

    def message(self, number: int, arrivals: Arrivals) -> pb.GenerateRequest:
        """The request of this number."""
        wanted = int(arrivals.output_tokens[number]) or self.max_tokens
        sampling = pb.SamplingParameters(max_tokens=min(wanted, self.max_tokens))
        if self.prompt is not None:
            return pb.GenerateRequest(model=self.model, prompt=self.prompt, sampling=sampling)
        length = int(arrivals.input_tokens[number]) or _PROMPT_TOKENS
        length = max(min(length, self.context - sampling.max_tokens), 1)
        ids = np.random.default_rng((self.seed, number)).integers(self.vocabulary, size=length)
        return pb.GenerateRequest(
            model=self.model, prompt_tokens=pb.TokenIds(ids=ids.tolist()), sampling=sampling
        )


@dataclass(frozen=True)
class Outcome:
    """How one request ended. Times are seconds since it was due."""

    number: int
    sent_s: float
    first_s: float | None
    total_s: float
    tokens: int
    code: str
    """gRPC's status."""


@dataclass
class Tally:
    """Where a run stands."""

    sent: int = 0
    ok: int = 0
    failed: int = 0


async def play(
    endpoint: Endpoint, due: Arrivals, requests: Requests, show: Callable[[Tally], None]
) -> tuple[list[Outcome], bool]:
    """Sends every request at its time; returns the outcomes, and whether Ctrl-C ended the run early.

    Raises:
        CommandError: the endpoint does not respond.
    """
    outcomes: list[Outcome] = []
    tally, tasks, supervisor = Tally(), set[asyncio.Task[None]](), Supervisor()
    async with contextlib.AsyncExitStack() as stack:
        stubs = [await _stub(stack, endpoint, number) for number in range(_CONNECTIONS)]
        requests = replace(requests, metadata=endpoint.metadata)
        requests = await _with_model(requests, stubs[0], endpoint)
        with _interrupt() as interrupted:
            shown = supervisor.start("progress", lambda: _show(tally, show))
            started = time.monotonic()
            for number, at_s in enumerate(due.at_s):
                if await _until(started + at_s, interrupted):
                    break
                stub = stubs[number % _CONNECTIONS]
                send = functools.partial(_send, stub, requests, due, number, started, outcomes, tally)
                task = supervisor.start_once("request", send, str(number))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await _finish(tasks, interrupted)
            shown.cancel()
        show(tally)
    return outcomes, interrupted.is_set()


async def _stub(
    stack: contextlib.AsyncExitStack, endpoint: Endpoint, number: int
) -> InferenceServiceAsyncStub:
    # Channels with the same options would share one connection.
    options = (*transport.CLIENT_OPTIONS, ("moe.connection", number))
    channel = await stack.enter_async_context(endpoint.aio_channel(options))
    return InferenceServiceStub(channel)


async def _with_model(requests: Requests, stub: InferenceServiceAsyncStub, endpoint: Endpoint) -> Requests:
    """Adds the vocabulary and context length of the model, to generate random tokens."""
    if requests.prompt is not None:
        return requests
    try:
        model = await stub.GetModel(
            pb.GetModelRequest(model=requests.model), timeout=20, metadata=endpoint.metadata
        )
    except grpc.aio.AioRpcError as error:
        raise calling.explain(error, endpoint) from error
    if model is None:
        sentence = f"{endpoint} describes no model: its message cannot be decoded; is it a frontend?"
        raise CommandError(sentence, errors.FAILED)
    return replace(requests, vocabulary=model.vocabulary_size, context=model.context_length)


async def _send(
    stub: InferenceServiceAsyncStub,
    requests: Requests,
    due: Arrivals,
    number: int,
    started: float,
    outcomes: list[Outcome],
    tally: Tally,
) -> None:
    at = started + due.at_s[number]
    sent = time.monotonic() - at
    tally.sent += 1
    first, tokens, code = None, 0, "OK"
    try:
        async for part in stub.Generate(
            requests.message(number, due), timeout=requests.timeout_s, metadata=requests.metadata
        ):
            if part is None:
                code = "INTERNAL"  # grpc.aio gives None for a message that it cannot decode
                continue
            if first is None and (part.tokens or part.text):
                first = time.monotonic() - at
            tokens += len(part.tokens)
    except grpc.aio.AioRpcError as error:
        code = error.code().name
    except asyncio.CancelledError:
        code = "CANCELLED"
    outcomes.append(Outcome(number, sent, first, time.monotonic() - at, tokens, code))
    tally.ok += code == "OK"
    tally.failed += code != "OK"


async def _until(moment: float, interrupted: asyncio.Event) -> bool:
    """Waits until a time on the monotonic clock; returns whether Ctrl-C came first."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(interrupted.wait(), max(moment - time.monotonic(), 0))
    return interrupted.is_set()


async def _finish(tasks: set[asyncio.Task[None]], interrupted: asyncio.Event) -> None:
    """Waits for the responses; Ctrl-C cancels them."""
    stop = asyncio.create_task(interrupted.wait())
    while tasks and not interrupted.is_set():
        await asyncio.wait({*tasks, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    left = list(tasks)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def _show(tally: Tally, show: Callable[[Tally], None]) -> None:
    while True:
        show(tally)
        await asyncio.sleep(_SHOW_S)


@contextlib.contextmanager
def _interrupt() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C sets."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, event.set)
    try:
        yield event
    finally:
        loop.remove_signal_handler(signal.SIGINT)
