"""Ranks that come while the mesh serves without them: they join, load, and wait until it meets again."""

import logging
import socket
import threading
from collections.abc import Callable

from moe_worker.mesh.channel import Channel
from moe_worker.mesh.errors import MeshError
from moe_worker.mesh.joining import POLL_S, Identity
from moe_worker.mesh.messages import Again, Allocate, Ready, Wait, Welcome
from moe_worker.mesh.reception import Reception

log = logging.getLogger(__name__)


class Door:
    """The leader's, over the address where ranks join. on_ready: called when a rank has loaded.

    A thread admits ranks while the door is open, and one for each of them waits until it has loaded.
    """

    def __init__(self, listener: socket.socket, identity: Identity, on_ready: Callable[[], None]) -> None:
        self.listener = listener
        self._identity, self._on_ready = identity, on_ready
        self._lock = threading.Lock()
        self._waiting: dict[int, Channel] = {}
        self._ready: set[int] = set()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def ready(self) -> frozenset[int]:
        """Ranks that have loaded and wait."""
        with self._lock:
            return frozenset(self._ready)

    def channels(self) -> list[Channel]:
        """To all ranks that load or wait."""
        with self._lock:
            return list(self._waiting.values())

    def open(self, welcome: Welcome, present: tuple[int, ...], pages: int) -> None:
        """Admits ranks other than those `present` from now on; they need room for `pages` pages."""
        self._closed.clear()
        self._thread = threading.Thread(
            target=self._run, args=(welcome, present, pages), name="mesh door", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Admits nobody for now; those that load go on."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def let_in(self) -> None:
        """Tells the ranks that have loaded to join."""
        with self._lock:
            called = [self._waiting.pop(rank) for rank in self._ready]
            self._ready.clear()
        for channel in called:
            try:
                channel.send(Again())
            except MeshError as error:
                log.warning("a rank that waited is gone: %s", error)
            channel.close()

    def end(self) -> None:
        """Sends everybody away."""
        self.close()
        self.listener.close()
        for channel in self.channels():
            channel.close()

    def _run(self, welcome: Welcome, present: tuple[int, ...], pages: int) -> None:
        with Reception(self.listener, self._identity) as reception:
            while not self._closed.is_set():
                guest = reception.next(POLL_S)
                if guest is None:
                    continue
                waiting = [channel.rank for channel in self.channels()]
                channel = reception.admitted(guest, welcome, waiting, later=present)
                if channel is not None:
                    threading.Thread(
                        target=self._follow, args=(channel, pages), name="mesh guest", daemon=True
                    ).start()

    def _follow(self, channel: Channel, pages: int) -> None:
        """Until the rank has loaded."""
        try:
            channel.send(Wait())
            channel.listen(self._gone)
            with self._lock:
                self._waiting[channel.rank] = channel
            for _ in range(2):  # it has loaded its weights, and then compiled its passes (recovery)
                if channel.receive(Ready).pages < pages:
                    raise MeshError(
                        f"it has no room for {pages} pages of KV cache; give it the others' --kv-memory, "
                        "or free memory of its device"
                    )
                channel.send(Allocate(pages))
        except MeshError as error:
            self._gone(channel, error)
            return
        with self._lock:
            self._ready.add(channel.rank)
        log.info("rank %d has loaded and waits", channel.rank)
        self._on_ready()

    def _gone(self, channel: Channel, error: MeshError) -> None:
        with self._lock:
            if self._waiting.get(channel.rank) is not channel:
                return
            del self._waiting[channel.rank]
            self._ready.discard(channel.rank)
        log.warning("rank %d does not wait any more: %s", channel.rank, error)
        channel.close()
