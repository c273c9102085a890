"""The edge's side of the engine process: starts it, submits requests, distributes its results."""

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

from moe_api.clock import Anchor
from moe_api.slots import Slots
from moe_api.supervision import Supervisor
from moe_worker.config.mesh import MeshReport
from moe_worker.engine.requests import Load, Request
from moe_worker.engine.statistics import ExpertStatistics, Statistics
from moe_worker.errors import EngineDiedError, QueueFullError, RequestError, WorkerError
from moe_worker.framing import LENGTH_BYTES, MalformedMessageError
from moe_worker.service.cache_feed import CacheFeed
from moe_worker.service.pacing import Pacing
from moe_worker.service.streams import Stream, Timeline
from moe_worker.service.watchdog import STALL_TIMEOUT_S, Watchdog
from moe_worker.service.wire import (
    AskExperts,
    Cancel,
    ExpertReport,
    Failed,
    Loaded,
    MeshChanged,
    Message,
    Refused,
    Start,
    Stepped,
    Submit,
    Waits,
    decode,
    encode,
)

# Time in which a slot of a full queue is likely to come free.
RETRY_AFTER_S = 1.0
# An engine that does not end by itself after its socket is closed is killed after this long. One that loads
# is killed at once: it does not read its socket before torch is imported, and has nothing to lose.
END_TIMEOUT_S = 2.0
# torch's OpenMP threads spin while they wait for one another. On cores that other processes use too, a step
# of a small model then takes 420 ms instead of 6 (two threads on two busy cores): let them sleep at once.
ENGINE_ENVIRONMENT = {"GOMP_SPINCOUNT": "0"}
# Called after each step with the engine's sums before and after it, and the step's seconds.
StepListener = Callable[[Statistics, Statistics, float], None]
# The module that runs as the engine process; a benchmark runs another one.
ENGINE = "moe_worker.service.engine_process"
log = logging.getLogger(__name__)


class EngineFailedError(EngineDiedError):
    """The engine reported why it ended."""

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
    mesh: MeshReport | None = None
    statistics: Statistics = field(default_factory=Statistics)
    step_s: float = 0.0  # of all steps
    on_step: StepListener | None = None
    cached: CacheFeed = field(default_factory=CacheFeed)
    _pacing: Pacing = field(default_factory=Pacing)
    _slots: Slots = field(default_factory=Slots)
    _streams: dict[int, Stream] = field(default_factory=dict)
    _ids: "count[int]" = field(default_factory=count)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _asked: "asyncio.Future[ExpertStatistics] | None" = None
    _submitted: int = 0
    _acknowledged: int = 0
    _watchdog: Watchdog = field(default_factory=Watchdog)
    _ended: WorkerError | None = None

    @classmethod
    async def start(cls, message: Start, stall_timeout_s: float = STALL_TIMEOUT_S) -> "EngineClient":
        """Starts the process and sends it what to load; `run` then reads its messages.

        stall_timeout_s: an engine that makes no step for so long, with requests to compute, is killed.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                ENGINE,
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                env=ENGINE_ENVIRONMENT | os.environ,
                # Ctrl-C in a terminal goes to the whole group; the edge alone decides when the engine ends.
                process_group=0,
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        writer.write(encode(message))
        return cls(process, reader, writer, _watchdog=Watchdog(stall_timeout_s))

    @property
    def requests(self) -> int:
        """Active requests: admitted, waiting, running, or finished and not yet read by their clients."""
        return len(self._slots)

    @property
    def current_load(self) -> Load:
        """The engine's last report; requests submitted since count as queued.

        Finished streams whose clients have not read them count as running: they occupy slots.
        """
        unread = sum(stream.timeline.finish_reason is not None for stream in self._streams.values())
        queued = self.load.queued + self._untaken
        return replace(self.load, queued=queued, running=self.load.running + unread)

    @property
    def _untaken(self) -> int:
        """Requests that the engine has not received yet, including cancelled ones."""
        return self._submitted - self._acknowledged

    def admit(self, tenant: str = "") -> int:
        """Reserves a slot for a request, until `close`; returns its number.

        Raises:
            QueueFullError: all slots are taken, or as many as the tenant may have, or the engine has not
                received as many requests yet.
            EngineDiedError: the engine has ended.
        """
        self._raise_if_ended()
        if max(self.requests, self._untaken) >= self.most_requests:
            raise QueueFullError(f"the queue is full ({self.requests} requests are active)", RETRY_AFTER_S)
        if not self._slots.has_room(tenant, self.most_requests):
            raise QueueFullError(
                f"the tenant's part of the queue is full ({self._slots.of(tenant)} of its requests are "
                f"active, {self.requests} of all tenants); the rest is for other tenants",
                RETRY_AFTER_S,
            )
        number = next(self._ids)
        self._slots.take(number, tenant)
        self._idle.clear()
        return number

    def submit(self, request: Request, anchor: Anchor | None = None) -> Stream:
        """Sends a checked request that was admitted (`id` is its number); its stream. Raises EngineDiedError.

        anchor: for timestamps of the stream's times. Default: now.
        """
        self._raise_if_ended()
        timeline = Timeline(anchor or Anchor.now(), submitted_ns=time.monotonic_ns())
        stream = self._streams[request.id] = Stream(timeline, self._pacing)
        self.writer.write(encode(Submit(request)))
        self._submitted += 1
        return stream

    def close(self, number: int) -> None:
        """Removes a request and frees its slot; the engine stops computing it if it has not finished."""
        self._slots.free(number)
        stream = self._streams.pop(number, None)
        if stream is not None and stream.timeline.finish_reason is None and not stream.failed:
            self.writer.write(encode(Cancel(number)))
        if not self._slots:
            self._idle.set()

    async def expert_statistics(self) -> ExpertStatistics:
        """The tokens of each expert so far, after the current step. Raises EngineDiedError."""
        self._raise_if_ended()
        if self._asked is None:
            self._asked = asyncio.get_running_loop().create_future()
            self.writer.write(encode(AskExperts()))
        return await asyncio.shield(self._asked)  # others may wait for the same answer

    def abandon(self, reason: WorkerError) -> None:
        """Ends all streams with `reason`, and refuses requests from now on."""
        self._ended = reason
        self.cached.close()
        for stream in self._streams.values():
            stream.fail(reason)
        if self._asked is not None:
            self._asked.set_exception(reason)
            self._asked.exception()  # nobody may be waiting any more
            self._asked = None

    def _raise_if_ended(self) -> None:
        if self._ended is not None:
            raise self._ended

    async def until_idle(self) -> None:
        """Waits until no request is under way."""
        if self._slots:
            await self._idle.wait()

    async def loaded(self) -> None:
        """Waits until the model is loaded. Raises EngineDiedError with the reason if it cannot be."""
        message = await self._receive()
        if not isinstance(message, Loaded):
            raise await self._death(message)
        self.format, self.load, self.most_requests = message.format, message.load, message.most_requests
        self.mesh = message.mesh

    async def run(self, supervisor: Supervisor) -> EngineDiedError:
        """Distributes the engine's results until it ends, or is killed because it hangs; returns why."""
        watching = supervisor.start(
            "engine watchdog", lambda: self._watchdog.watch(self._computes, self.process.kill)
        )
        try:
            last = await self._hand_out()
        finally:
            watching.cancel()
        error = await self._death(last)
        self.abandon(error)
        return error

    async def _hand_out(self) -> Message | None:
        """Reads the engine's messages to the last one; None if it ended without one."""
        kinds = Stepped | Refused | ExpertReport | MeshChanged | Waits
        while isinstance(message := await self._receive(), kinds):
            if isinstance(message, Waits):
                self._watchdog.heard()
            elif isinstance(message, Stepped):
                self._take(message)
            elif isinstance(message, Refused):
                self._refuse(message)
            elif isinstance(message, MeshChanged):
                self.mesh = message.mesh
            elif self._asked is not None:
                self._asked.set_result(message.experts)
                self._asked = None
        return message

    def _computes(self) -> bool:
        """Whether there is something to compute; a finished stream with an unread rest does not count."""
        return any(stream.timeline.finish_reason is None for stream in self._streams.values())

    def _take(self, message: Stepped) -> None:
        self._watchdog.heard()
        before, self.statistics = self.statistics, message.statistics
        self.load, self._acknowledged = message.load, message.submitted
        if message.stored or message.evicted:
            self.cached.change(message.stored, message.evicted)
        for event in message.events:
            if event.id in self._streams:
                self._streams[event.id].timeline.note(event, message.start_ns)
        for delta in message.deltas:
            if delta.id in self._streams:
                self._streams[delta.id].push(delta, message.end_ns)
        if message.statistics.steps > before.steps:
            elapsed_s = (message.end_ns - message.start_ns) / 1e9
            self.step_s += elapsed_s
            if self.on_step is not None:
                self.on_step(before, message.statistics, elapsed_s)

    def _refuse(self, message: Refused) -> None:
        error = (
            QueueFullError(message.message, RETRY_AFTER_S)
            if message.retryable
            else RequestError("", message.message)
        )
        if message.id in self._streams:
            self._streams[message.id].fail(error)

    async def stop(self) -> None:
        """Ends the process, which by itself ends when its socket closes, unless it is still loading."""
        self.cached.close()
        self.writer.close()
        loading = not self.format
        try:
            await asyncio.wait_for(self.process.wait(), 0 if loading else END_TIMEOUT_S)
        except TimeoutError:
            if self.process.returncode is None:
                self.process.kill()
            await self.process.wait()

    async def _receive(self) -> Message | None:
        """The next message; None after the process has ended."""
        try:
            size = int.from_bytes(await self.reader.readexactly(LENGTH_BYTES), "big")
            return decode(await self.reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except MalformedMessageError as error:
            log.exception("the engine sent an invalid message; killing it")
            self.process.kill()
            return Failed(f"the engine sent a malformed message: {error}; report this", 1)

    async def _death(self, last: Message | None) -> EngineDiedError:
        code = await self.process.wait()
        if self._watchdog.hung:
            return EngineDiedError(
                f"the engine made no step for {self._watchdog.timeout_s:g} s with {self.requests} requests "
                "in progress; it hung and is restarted"
            )
        if isinstance(last, Failed):
            return EngineFailedError(last.message, last.exit_code)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        why = "; the machine may be out of memory" if code == -signal.SIGKILL else ""
        return EngineDiedError(f"the engine process {how}{why}")
