"""One TCP connection between the leader and another rank, over which frames of messages travel."""

import contextlib
import hashlib
import logging
import math
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from moe_worker.framing import LENGTH_BYTES, MalformedMessageError
from moe_worker.mesh.errors import MeshError, RankFailedError, RankLostError, RankMemoryError
from moe_worker.mesh.messages import CODEC, Beat, End, Message, RankFailed
from moe_worker.mesh.secure import SecureConnection

log = logging.getLogger(__name__)
LARGEST_FRAME: Final = 1 << 28
_ONE_VERSION: Final = "use the same worker version on all ranks"
# Between two calls while a message is awaited.
WAIT_S: Final = 1.0
# The other end has so long to take note of a failure.
NOTED_S: Final = 5.0
Lost = Callable[["Channel", MeshError], None]


class Channel:
    """One connection; `rank` is at its other end. One thread sends and receives; beats come from others.

    heard: when something came last, once the channel listens. progress: what beats tell the other end; told:
    what its beats tell. process: the one at the other end.
    """

    def __init__(self, connection: socket.socket | SecureConnection, rank: int) -> None:
        self._connection, self.rank = connection, rank
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[Message | MeshError] | None = None
        self.heard = time.monotonic()
        self.progress = self.told = 0
        self.process = ""
        self._limit_s = self._ends = math.inf
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def listen(self, lost: Lost) -> None:
        """Reads in a thread from now on, which calls `lost` when the other end fails or is gone."""
        self._inbox = queue.SimpleQueue()
        threading.Thread(
            target=self._listen, args=(self._inbox, lost), name=f"mesh rank {self.rank}", daemon=True
        ).start()

    def beat(self) -> None:
        """Says that this process runs, unless something else is being sent."""
        if self._sending.acquire(blocking=False):
            try:
                self._connection.sendall(CODEC.encode(Beat(self.progress)))
            except OSError as error:  # the thread that reads finds out, too
                log.debug("no beat to rank %d: %s", self.rank, error)
            finally:
                self._sending.release()

    def send(self, message: Message) -> None:
        """Raises MeshError."""
        frame = CODEC.encode(message)
        with self._sending:
            self._send(frame)

    def fail(self, sentence: str, tokens: int = 0) -> None:
        """Says why this rank cannot go on; returns when the other end knows, and has ended the connection.

        Only where the channel listens. Until then other ranks wait: they learn it from the leader.
        """
        with contextlib.suppress(MeshError):
            self.send(RankFailed(sentence, tokens))
        ends = time.monotonic() + NOTED_S
        while self._inbox is not None and (left := ends - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                if isinstance(self._inbox.get(timeout=left), MeshError):
                    return

    def receive(
        self, *kinds: type[Any], most: int = LARGEST_FRAME, waits: Callable[["Channel"], None] | None = None
    ) -> Any:
        """The next message, which must be one of `kinds`. Raises MeshError.

        waits: called every WAIT_S until it comes, where the channel listens.
        """
        message = self._read_message(most) if self._inbox is None else _next(self, self._inbox, waits)
        if isinstance(message, MeshError):
            self.end(message)
            raise message
        if not isinstance(message, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            found = type(message).__name__
            raise MeshError(
                f"rank {self.rank}: unexpected message {found}, expected {expected}; {_ONE_VERSION}"
            )
        return message

    def end(self, error: MeshError) -> None:
        """Whoever receives gets `error`, and whoever sends fails."""
        if self._inbox is not None:
            self._inbox.put(error)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def ended(self) -> bool:
        """Whether the other end has closed a channel that does not listen yet."""
        try:
            return self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._connection.fileno()

    def _listen(self, inbox: "queue.SimpleQueue[Message | MeshError]", lost: Lost) -> None:
        over = False  # whether the leader's newest message was the last one of a run
        try:
            while True:
                message = self._read_message(LARGEST_FRAME)
                self.heard = time.monotonic()
                if isinstance(message, Beat):
                    self.told = message.progress
                    continue
                if isinstance(message, RankFailed):
                    raise self._failed(message)
                over = isinstance(message, End)
                inbox.put(message)
        except MeshError as error:
            inbox.put(error)
            if not over:
                lost(self, error)

    def _failed(self, message: RankFailed) -> MeshError:
        if message.tokens:
            return RankMemoryError(self.rank, message.tokens)
        return RankFailedError(f"rank {self.rank} ended: {message.sentence}")

    def _read_message(self, most: int) -> Message:
        length = int.from_bytes(self._read(LENGTH_BYTES), "big")
        if not 1 <= length <= most:
            raise MeshError(
                f"rank {self.rank}: invalid message: {length} bytes, not 1 to {most}; {_ONE_VERSION}"
            )
        try:
            return CODEC.decode(self._read(length))
        except MalformedMessageError as error:
            raise MeshError(f"rank {self.rank}: invalid message: {error}; {_ONE_VERSION}") from error

    def challenge(self) -> bytes:
        """Sends fresh random bytes for the other end to sign."""
        nonce = secrets.token_bytes(32)
        self._send(nonce)
        return nonce

    def read_challenge(self) -> bytes:
        """The bytes to sign."""
        return self._read(32)

    def send_proof(self, proof: bytes) -> None:
        """The signature."""
        self._send(proof)

    def read_proof(self) -> bytes:
        """The other end's signature."""
        return self._read(hashlib.sha256().digest_size)

    def end_within(self, seconds: float | None) -> None:
        """All reads and writes from now on must end within so many seconds together; None: no limit.

        A limit for each read would let the other end take as long as it likes, with a byte now and then.
        """
        self._connection.settimeout(seconds)
        self._limit_s = math.inf if seconds is None else seconds
        self._ends = time.monotonic() + self._limit_s

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):  # a thread that reads wakes up by this, not by closing
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, count: int) -> bytes:
        data = bytearray()
        with self._lost():
            while len(data) < count:
                self._await_deadline()
                part = self._connection.recv(min(count - len(data), 1 << 20))
                if not part:
                    raise RankLostError(f"rank {self.rank} left the mesh: its connection is closed")
                data += part
        return bytes(data)

    def _send(self, data: bytes) -> None:
        with self._lost():
            self._await_deadline()
            self._connection.sendall(data)

    def _await_deadline(self) -> None:
        """The next read or write ends at the deadline at the latest. Raises TimeoutError after it."""
        if self._ends < math.inf:
            left_s = self._ends - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._connection.settimeout(left_s)

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            late = isinstance(error, TimeoutError) and self._ends < math.inf
            why = f"its messages did not arrive within {self._limit_s:g} s" if late else str(error)
            raise RankLostError(
                f"rank {self.rank}: connection lost: {why}; check that it runs, and the network"
            ) from error


def _next(
    channel: Channel,
    inbox: "queue.SimpleQueue[Message | MeshError]",
    waits: Callable[[Channel], None] | None,
) -> Message | MeshError:
    while waits is not None:
        with contextlib.suppress(queue.Empty):
            return inbox.get(timeout=WAIT_S)
        waits(channel)
    return inbox.get()
