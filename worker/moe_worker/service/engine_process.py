"""The engine in its own process, so that no step delays an RPC.

Started by the edge as `python -m moe_worker.service.engine_process FD`, where FD is its end of a socket pair.
It ends with the edge: the socket is closed then.
"""

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_api.visible import LOG_MOST, guard_logs, visible
from moe_worker.engine.core import EngineCore
from moe_worker.engine.following import follow
from moe_worker.engine.loading import load
from moe_worker.engine.requests import Load, Request
from moe_worker.errors import WorkerError
from moe_worker.framing import LENGTH_BYTES
from moe_worker.garbage import collect_rarely, spare_loaded
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.sampling.guides import Guide
from moe_worker.service.preparing import Prepared, Preparing
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

log = logging.getLogger("moe_worker.engine")
# From one word of an engine that waits for other ranks to the next.
WAIT_S = 0.2


def main() -> None:
    """Serves the edge until it ends. Exits with the code of the error that ends it."""
    # The edge drains before it ends; a signal to the whole process group must not interrupt that.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    guard_logs()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    connection = socket.socket(fileno=int(sys.argv[1]))
    sender = _Sender(connection)
    try:
        _serve(connection, sender)
    except WorkerError as error:
        sender.end(_failed(str(error), error.exit_code))
        sys.exit(error.exit_code)
    except Exception as error:
        log.exception("the engine failed")
        sender.end(_failed(f"the engine failed: {type(error).__name__}: {error}", 1))
        sys.exit(1)


def _failed(sentence: str, exit_code: int) -> Failed:
    """Names in a checkpoint may contain lone surrogates, which no message can contain."""
    return Failed(visible(sentence, LOG_MOST), exit_code)


class _Sender:
    """Sends from a separate thread, in order: the next step does not wait for the edge to wake up.

    If the edge reads nothing, WAITING messages queue up, and then the engine waits. If the thread fails, the
    process ends, since nothing could be sent any more.
    """

    WAITING = 8

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: queue.Queue[Message | None] = queue.Queue(self.WAITING)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Appends a message to the queue."""
        self._messages.put(message)

    def end(self, last: Message) -> None:
        """Sends the queued messages and `last`; returns when all are sent."""
        self.send(last)
        self._messages.put(None)
        self._thread.join()

    def _run(self) -> None:
        with _ending_the_process("send to"):
            while (message := self._messages.get()) is not None:
                self._connection.sendall(encode(message))


@contextlib.contextmanager
def _ending_the_process(what: str) -> Iterator[None]:
    """Ends the process after an error in the block, so that no thread ends unseen; the edge starts another
    one.

    A lost connection is no error here: the edge has ended then, and the receiving thread ends the process.
    """
    try:
        yield
    except ConnectionError:
        pass
    except Exception:
        log.critical("the engine cannot %s the edge; it ends", what, exc_info=True)
        os._exit(1)


def _serve(connection: socket.socket, sender: _Sender) -> None:
    # The edge bounds its length: most_requests requests that were not received yet, and a Cancel for each.
    inbox: queue.SimpleQueue[Message | Prepared | Wake] = queue.SimpleQueue()
    farewells: list[Callable[[], None]] = []
    threading.Thread(target=_receive, args=(connection, inbox, farewells), daemon=True).start()
    start = inbox.get()
    if not isinstance(start, Start):
        raise WorkerError(f"the engine must be started with a Start message, not {type(start).__name__}")
    if start.options.mesh_rank:
        follow(Path(start.model), start.options, lambda name: sender.send(Loaded(name, Load(), 0)))
        return
    # The edge, which started this process, has tried the tokenizer.
    loaded = load(
        Path(start.model), start.options, progress=True, load_tokenizer=Tokenizer.load, prepare_formats=True
    )
    core = EngineCore(loaded, start.options)
    spare_loaded()
    collect_rarely()
    sender.send(Loaded(loaded.format, core.load, core.most_requests, core.mesh_report))
    mesh = _MeshTeller(core, sender)
    if loaded.member is not None:
        farewells.append(loaded.member.farewell)
        loaded.member.on_change = mesh.tell
        loaded.member.on_wait = mesh.tell_that_it_waits
        loaded.member.on_wake = lambda: inbox.put(Wake())
    preparing = Preparing(inbox.put)
    submitted = 0
    while True:
        submitted += _take_commands(core, inbox, sender, preparing)
        begin = time.monotonic_ns()
        deltas = tuple(core.step())
        mesh.tell()
        end, events = time.monotonic_ns(), core.take_events()
        changes = core.take_block_changes()
        sender.send(Stepped(begin, end, deltas, core.load, submitted, core.statistics, events, *changes))


@dataclass(frozen=True)
class Wake:
    """A thread to the main one: the mesh has something to do, even if there is nothing to compute."""


class _MeshTeller:
    """Tells the edge of the mesh when something has changed."""

    def __init__(self, core: EngineCore, sender: _Sender) -> None:
        self._core, self._sender, self._told = core, sender, core.mesh_report
        self._waited = 0.0

    def tell_that_it_waits(self) -> None:
        """May be called often."""
        now = time.monotonic()
        if now - self._waited >= WAIT_S:
            self._waited = now
            self._sender.send(Waits())

    def tell(self) -> None:
        report = self._core.mesh_report
        if report is not None and report != self._told:
            self._told = report
            self._sender.send(MeshChanged(report))


def _take_commands(
    core: EngineCore,
    inbox: "queue.SimpleQueue[Message | Prepared | Wake]",
    sender: _Sender,
    preparing: Preparing,
) -> int:
    """Handles the messages of the edge; waits for one if there is nothing to compute."""
    submitted = 0
    for message in _pending(inbox, wait=core.idle):
        if isinstance(message, Submit):
            guide = core.open_guide(message.request)
            if guide is None:
                submitted += 1
                _submit(core, message.request, None, sender)
            else:
                preparing.start(message.request, guide)
        elif isinstance(message, Prepared):
            submitted += 1
            guide = preparing.take(message)
            if guide is not None:
                _submit_prepared(core, message.request, guide, sender)
        elif isinstance(message, Cancel):
            preparing.cancel(message.id)
            core.cancel(message.id)
        elif isinstance(message, AskExperts):
            sender.send(ExpertReport(core.expert_statistics))
    return submitted


def _submit_prepared(core: EngineCore, request: Request, guide: Guide, sender: _Sender) -> None:
    error = guide.matcher.exception()
    if error is None:
        _submit(core, request, guide, sender)
        return
    log.warning("request %d is refused: its output format cannot be compiled", request.id, exc_info=error)
    sentence = f"output_format cannot be compiled: {type(error).__name__}; simplify it"
    sender.send(Refused(request.id, sentence, retryable=False))


def _submit(core: EngineCore, request: Request, guide: Guide | None, sender: _Sender) -> None:
    try:
        core.submit(request, guide)
    except WorkerError as error:  # of this request alone
        log.warning("request %d is refused: %s", request.id, error)
        sender.send(Refused(request.id, str(error), error.retryable))


def _pending(
    inbox: "queue.SimpleQueue[Message | Prepared | Wake]", wait: bool
) -> Iterator[Message | Prepared | Wake]:
    if wait:
        yield inbox.get()
    while True:
        try:
            yield inbox.get_nowait()
        except queue.Empty:
            return


def _receive(
    connection: socket.socket,
    inbox: "queue.SimpleQueue[Message | Prepared | Wake]",
    farewells: Sequence[Callable[[], None]],
) -> None:
    """Reads frames until the edge has ended; then ends the process, whatever the main thread does.

    A killed edge that had not read everything resets the connection instead of closing it.
    """
    with _ending_the_process("understand"), connection.makefile("rb") as stream:
        while head := stream.read(LENGTH_BYTES):
            inbox.put(decode(stream.read(int.from_bytes(head, "big"))))
    for farewell in farewells:
        farewell()
    os._exit(0)


if __name__ == "__main__":
    main()
