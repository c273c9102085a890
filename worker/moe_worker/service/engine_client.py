"""The edge's side of the engine process: starts it, submits requests, hands out what comes back."""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

from moe_worker.engine.requests import Load, Request
from moe_worker.engine.statistics import ExpertStatistics, Statistics
from moe_worker.errors import EngineDiedError, QueueFullError
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service.streams import Stream, Timeline
from moe_worker.service.wire import (
    LENGTH_BYTES,
    AskExperts,
    Cancel,
    ExpertReport,
    Failed,
    Loaded,
    Message,
    Start,
    Stepped,
    Submit,
    decode,
    encode,
)

# Time in which a place in a full queue is likely to come free.
RETRY_AFTER_S = 1.0
# An engine that does not end by itself once its socket is closed is killed after this long. One that loads
# is killed at once: it does not look at its socket before torch is imported, and has nothing to lose.
END_TIMEOUT_S = 2.0
# Steps take milliseconds to seconds. An engine that has made none for so long, with requests to compute, is
# hung (a collective that waits for a rank that is gone, a driver that does not answer) and never comes back.
STALL_TIMEOUT_S = 120.0
# torch's OpenMP threads spin while they wait for one another. On cores that other processes use too, a step
# of a small model then takes 420 ms instead of 6 (two threads on two busy cores): let them sleep at once.
ENGINE_ENVIRONMENT = {"GOMP_SPINCOUNT": "0"}
# Called after each step with the engine's sums before and after it, and the step's seconds.
StepListener = Callable[[Statistics, Statistics, float], None]
log = logging.getLogger(__name__)


class EngineFailedError(EngineDiedError):
    """The engine said why it ended."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class EngineClient:
    """One engine process. All methods belong to the event loop's thread."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    most_requests: int = 0
    load: Load = field(default_factory=Load)
    format: str = ""
    statistics: Statistics = field(default_factory=Statistics)
    step_s: float = 0.0  # of all steps
    on_step: StepListener | None = None
    stall_timeout_s: float = STALL_TIMEOUT_S
    _streams: dict[int, Stream] = field(default_factory=dict)
    _ids: "count[int]" = field(default_factory=count)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _asked: "list[asyncio.Future[ExpertStatistics]]" = field(default_factory=list)
    _submitted: int = 0
    _acknowledged: int = 0
    _heard: float = 0.0  # when there was nothing to compute, or a step had ended, last; of time.monotonic
    _hung: bool = False

    @classmethod
    async def start(cls, message: Start) -> "EngineClient":
        """Starts the process and tells it what to load; `run` then follows it."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "moe_worker.service.engine_process",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                env=ENGINE_ENVIRONMENT | os.environ,
                # Ctrl-C in a terminal goes to the whole group; the edge alone decides when the engine ends.
                process_group=0,
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        writer.write(encode(message))
        return cls(process, reader, writer)

    @property
    def requests(self) -> int:
        """Requests under way: waiting, computed, or finished and not yet read by their clients."""
        return len(self._streams)

    @property
    def current_load(self) -> Load:
        """The engine's last word, with what was submitted since counted as queued."""
        return replace(self.load, queued=self.load.queued + self._submitted - self._acknowledged)

    def submit(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParameters,
        seed: int,
        deadline: float | None = None,
        written: tuple[int, ...] = (),
    ) -> tuple[int, Stream]:
        """Sends a checked request; its number and its stream. Raises QueueFullError.

        deadline: in the time of `time.monotonic`. written: tokens of the text that were sent already.
        """
        if self.requests >= self.most_requests:
            raise QueueFullError(f"the queue is full ({self.requests} requests are under way)", RETRY_AFTER_S)
        if not self._computes:
            self._heard = time.monotonic()
        number = next(self._ids)
        stream = self._streams[number] = Stream(Timeline(submitted_ns=time.time_ns()))
        request = Request(number, prompt, sampling, seed, deadline=deadline, written=written)
        self.writer.write(encode(Submit(request)))
        self._submitted += 1
        self._idle.clear()
        return number, stream

    def close(self, number: int) -> None:
        """Forgets a request; the engine stops computing it if it has not finished."""
        stream = self._streams.pop(number, None)
        if stream is not None and stream.timeline.finish_reason is None and not stream.failed:
            self.writer.write(encode(Cancel(number)))
        if not self._streams:
            self._idle.set()

    async def expert_statistics(self) -> ExpertStatistics:
        """Where tokens have gone so far, once the step under way has ended. Raises EngineDiedError."""
        answer: asyncio.Future[ExpertStatistics] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self.writer.write(encode(AskExperts()))
        return await answer

    async def until_idle(self) -> None:
        """Waits until no request is under way."""
        if self._streams:
            await self._idle.wait()

    async def loaded(self) -> None:
        """Waits until the model is loaded. Raises EngineDiedError with the reason if it cannot be."""
        message = await self._receive()
        if not isinstance(message, Loaded):
            raise await self._death(message)
        self.format, self.load, self.most_requests = message.format, message.load, message.most_requests

    async def run(self) -> EngineDiedError:
        """Hands out what the engine produces until it ends, or is killed because it hangs; why it did."""
        watching = asyncio.ensure_future(self._kill_if_hung())
        try:
            while isinstance(message := await self._receive(), Stepped | ExpertReport):
                if isinstance(message, Stepped):
                    self._take(message)
                elif not (answer := self._asked.pop(0)).done():
                    answer.set_result(message.experts)
        finally:
            watching.cancel()
        error = await self._death(message)
        for stream in self._streams.values():
            stream.fail(error)
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(error)
        return error

    @property
    def _computes(self) -> bool:
        """Whether there is something to compute; a finished text that waits for its reader is not."""
        return any(stream.timeline.finish_reason is None for stream in self._streams.values())

    async def _kill_if_hung(self) -> None:
        while not self._hung:
            await asyncio.sleep(self.stall_timeout_s / 10)
            silent_s = time.monotonic() - self._heard
            self._hung = self._computes and silent_s > self.stall_timeout_s
        self.process.kill()

    def _take(self, message: Stepped) -> None:
        self._heard = time.monotonic()
        before, self.statistics = self.statistics, message.statistics
        self.load, self._acknowledged = message.load, message.submitted
        for event in message.events:
            if event.id in self._streams:
                self._streams[event.id].timeline.note(event, message.start_ns)
        for delta in message.deltas:
            if delta.id in self._streams:
                self._streams[delta.id].push(delta, message.start_ns, message.end_ns)
        if message.statistics.steps > before.steps:
            elapsed_s = (message.end_ns - message.start_ns) / 1e9
            self.step_s += elapsed_s
            if self.on_step is not None:
                self.on_step(before, message.statistics, elapsed_s)

    async def stop(self) -> None:
        """Ends the process, which by itself ends when its socket closes, unless it is still loading."""
        self.writer.close()
        loading = not self.format
        try:
            await asyncio.wait_for(self.process.wait(), 0 if loading else END_TIMEOUT_S)
        except TimeoutError:
            if self.process.returncode is None:
                self.process.kill()
            await self.process.wait()

    async def _receive(self) -> Message | None:
        """The next message; None once the process is gone."""
        try:
            size = int.from_bytes(await self.reader.readexactly(LENGTH_BYTES), "big")
            return decode(await self.reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def _death(self, last: Message | None) -> EngineDiedError:
        code = await self.process.wait()
        if self._hung:
            return EngineDiedError(
                f"the engine made no step for {self.stall_timeout_s:g} s with {self.requests} requests under "
                "way; it was hung and is started again"
            )
        if isinstance(last, Failed):
            return EngineFailedError(last.message, last.exit_code)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        why = "; the machine may be out of memory" if code == -signal.SIGKILL else ""
        return EngineDiedError(f"the engine process {how}{why}")
