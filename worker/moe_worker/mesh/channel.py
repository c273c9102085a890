"""One TCP connection between the leader and another rank, over which frames of messages travel."""

import contextlib
import hashlib
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from moe_worker.framing import LENGTH_BYTES, MalformedMessageError
from moe_worker.mesh.errors import MeshError, RankLostError
from moe_worker.mesh.messages import CODEC, Beat, End, Message

log = logging.getLogger(__name__)
LARGEST_FRAME: Final = 1 << 28


class Channel:
    """One connection; `rank` is at its other end. One thread sends and receives; beats come from others.

    heard: when something came last, once the channel listens. progress: what beats tell the other end; told:
    what its beats tell. process: the one at the other end.
    """

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self._connection, self.rank = connection, rank
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[Message | MeshError] | None = None
        self.heard = time.monotonic()
        self.progress = self.told = 0
        self.process = ""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def listen(self, lost: Callable[["Channel", str], None]) -> None:
        """Reads in a thread from now on, which calls `lost` with a sentence when the connection ends."""
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
        with self._lost(), self._sending:
            self._connection.sendall(frame)

    def receive(self, *kinds: type[Any], most: int = LARGEST_FRAME) -> Any:
        """The next message, which must be one of `kinds`. Raises MeshError."""
        message = self._read_message(most) if self._inbox is None else self._inbox.get()
        if isinstance(message, MeshError):
            self.end(str(message))
            raise message
        if not isinstance(message, kinds):
            raise MeshError(f"rank {self.rank} sent {type(message).__name__} out of turn")
        return message

    def end(self, sentence: str) -> None:
        """Whoever receives is told `sentence`, and whoever sends fails."""
        if self._inbox is not None:
            self._inbox.put(MeshError(sentence))
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

    def _listen(
        self, inbox: "queue.SimpleQueue[Message | MeshError]", lost: Callable[["Channel", str], None]
    ) -> None:
        try:
            while True:
                message = self._read_message(LARGEST_FRAME)
                self.heard = time.monotonic()
                if isinstance(message, Beat):
                    self.told = message.progress
                else:
                    inbox.put(message)
                if isinstance(message, End):  # what comes next is no loss
                    return
        except MeshError as error:
            inbox.put(error)
            lost(self, str(error))

    def _read_message(self, most: int) -> Message:
        length = int.from_bytes(self._read(LENGTH_BYTES), "big")
        if not 1 <= length <= most:
            raise MeshError(f"rank {self.rank} sent a message of {length} bytes; {most} are allowed")
        try:
            return CODEC.decode(self._read(length))
        except MalformedMessageError as error:
            raise MeshError(f"rank {self.rank} sent what is no message: {error}") from error

    def challenge(self) -> bytes:
        """Sends fresh random bytes for the other end to sign."""
        nonce = secrets.token_bytes(32)
        with self._lost():
            self._connection.sendall(nonce)
        return nonce

    def read_challenge(self) -> bytes:
        """The bytes to sign."""
        return self._read(32)

    def send_proof(self, proof: bytes) -> None:
        """The signature."""
        with self._lost():
            self._connection.sendall(proof)

    def read_proof(self) -> bytes:
        """The other end's signature."""
        return self._read(hashlib.sha256().digest_size)

    def timeout(self, seconds: float | None) -> None:
        """For each read and write; None: none."""
        self._connection.settimeout(seconds)

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):  # a thread that reads wakes up by this, not by closing
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, count: int) -> bytes:
        data = bytearray()
        with self._lost():
            while len(data) < count:
                part = self._connection.recv(min(count - len(data), 1 << 20))
                if not part:
                    raise RankLostError(f"rank {self.rank} left the mesh: its connection is closed")
                data += part
        return bytes(data)

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RankLostError(f"rank {self.rank} is out of reach: {error or 'it is silent'}") from error
