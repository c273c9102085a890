"""Where ranks come to the leader: connections prove themselves side by side, so that none waits for another.

Whoever reaches the address can connect and say nothing. That may cost the leader a thread for some seconds,
but never keep a rank from joining.
"""

import contextlib
import logging
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from moe_worker.mesh.channel import Channel
from moe_worker.mesh.errors import MeshError, RankAbsentError
from moe_worker.mesh.joining import POLL_S, Guest, Identity, admit, all_needed, greet
from moe_worker.mesh.messages import Welcome

log = logging.getLogger(__name__)
PAUSE_S: Final = 1.0
STRANGERS: Final = 64
"""As many connections besides those of all ranks may prove themselves at a time; the oldest one ends then."""


class Reception:
    """Accepts connections at `listener`, which stays open, and greets each in a thread of its own."""

    def __init__(self, listener: socket.socket, identity: Identity) -> None:
        self._listener, self._identity = listener, identity
        self._most = STRANGERS + identity.shape.ranks
        self._lock = threading.Lock()
        self._greeted: dict[socket.socket, None] = {}  # in the order in which they came
        self._proven: queue.SimpleQueue[Guest] = queue.SimpleQueue()
        self._closed = False
        self._woken, self._wakes = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        for each in (listener, self._woken, self._wakes):
            each.setblocking(False)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends all connections that have not become guests of the caller."""
        with self._lock:
            self._closed = True
            for connection in self._greeted:
                _shut_down(connection)
            self._selector.close()
            self._woken.close()
            self._wakes.close()
        while not self._proven.empty():
            self._proven.get().channel.close()

    def next(self, seconds: float) -> Guest | None:
        """Who has proved itself next; None if that is nobody within `seconds`, or nobody can connect now."""
        ends = time.monotonic() + seconds
        while True:
            with contextlib.suppress(queue.Empty):
                return self._proven.get_nowait()
            left = ends - time.monotonic()
            if left <= 0:
                return None
            for key, _ in self._selector.select(left):
                if key.fileobj is self._woken:
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(1 << 12)
                elif not self._accept():
                    return None

    def admitted(
        self, guest: Guest, welcome: Welcome, joined: Sequence[int], later: Sequence[int] = ()
    ) -> Channel | None:
        """The channel to a guest that may join `joined`; None: it has been told why not. later: see admit."""
        try:
            return admit(guest, self._identity, welcome, joined, later)
        except MeshError as error:
            log.warning("a connection from %s did not join: %s", guest.came_from, error)
            guest.channel.close()
            return None

    def _accept(self) -> bool:
        """Whether connections can be accepted; if not (too many open files, the network), waits PAUSE_S."""
        try:
            with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                self._greet(*self._listener.accept())
        except OSError:
            log.exception("no rank can join at the moment")
            time.sleep(PAUSE_S)
            return False
        return True

    def _greet(self, connection: socket.socket, address: tuple[str, int]) -> None:
        connection.setblocking(True)
        with self._lock:
            self._greeted[connection] = None
            if len(self._greeted) > self._most:
                oldest = next(iter(self._greeted))
                del self._greeted[oldest]
                _shut_down(oldest)
        threading.Thread(
            target=self._run, args=(connection, address[0]), name="mesh greeting", daemon=True
        ).start()

    def _run(self, connection: socket.socket, came_from: str) -> None:
        guest = None
        try:
            guest = greet(connection, came_from, self._identity)
        except MeshError as error:
            log.warning("a connection from %s did not join: %s", came_from, error)
        finally:
            with self._lock:
                expected = connection in self._greeted and not self._closed
                self._greeted.pop(connection, None)
                if guest is None or not expected:
                    connection.close()
                else:
                    self._proven.put(guest)
                    with contextlib.suppress(BlockingIOError):  # it is awake
                        self._wakes.send(b"\0")


def gather_ranks(
    listener: socket.socket, identity: Identity, welcome: Welcome, seconds: float,
    may_lack: Callable[[frozenset[int], float], bool] = all_needed,
) -> list[Channel]:  # fmt: skip
    """The leader's part of joining: a channel to each other rank, in order.

    may_lack: whether the mesh may form without these ranks, after so many seconds. Raises MeshError where
    some that it needs have not come after `seconds`.
    """
    joined: dict[int, Channel] = {}
    begin = time.monotonic()
    with Reception(listener, identity) as reception:
        while missing := frozenset(range(1, identity.shape.ranks)) - joined.keys():
            waited = time.monotonic() - begin
            if may_lack(missing, waited):
                break
            if waited >= seconds:
                raise RankAbsentError(
                    f"mesh {identity.shape} is incomplete: ranks {sorted(missing)} did not join within "
                    f"{seconds:g} s; start them with the same --mesh and --mesh-leader"
                )
            guest = reception.next(min(POLL_S, seconds))
            if guest is None:
                continue
            joined = {rank: channel for rank, channel in joined.items() if not channel.ended()}
            if (channel := reception.admitted(guest, welcome, sorted(joined))) is not None:
                joined[channel.rank] = channel
    return [joined[rank] for rank in sorted(joined)]


def _shut_down(connection: socket.socket) -> None:
    """Whoever reads there wakes up."""
    with contextlib.suppress(OSError):  # the other end has left
        connection.shutdown(socket.SHUT_RDWR)
