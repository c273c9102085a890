"""How much of a checkpoint is there, and how long the rest takes; served over gRPC to the operator."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from moe_api import transport
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_worker.errors import SettingsError

_WINDOW_S: Final = 30.0
_EVERY_S: Final = 1.0
_LINE_S: Final = 30.0


@dataclass
class Meter:
    """Measures a download by what is on the disk, whichever client writes it. Thread-safe.

    total: bytes of the whole checkpoint; 0 while it is not known.
    """

    total: int = 0
    measure: Callable[[], int] = lambda: 0
    clock: Callable[[], float] = time.monotonic
    _seen: deque[tuple[float, int]] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def done(self) -> int:
        """Bytes that are there."""
        with self._lock:
            return self._seen[-1][1] if self._seen else 0

    def sample(self) -> None:
        """Measures now."""
        now, found = self.clock(), self.measure()
        with self._lock:
            self._seen.append((now, min(found, self.total) if self.total else found))
            while now - self._seen[0][0] > _WINDOW_S and len(self._seen) > 2:
                self._seen.popleft()

    def seconds_left(self) -> int:
        """At the speed of the last half minute; 0 where nothing can be said."""
        with self._lock:
            if len(self._seen) < 2:
                return 0
            (began, before), (now, done) = self._seen[0], self._seen[-1]
        speed = (done - before) / (now - began) if now > began else 0
        return int((self.total - done) / speed) + 1 if speed > 0 and self.total > done else 0

    @contextmanager
    def running(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Samples in a thread, and tells a line from time to time."""
        stopping = threading.Event()
        thread = threading.Thread(target=self._follow, args=(stopping, tell), name="meter", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()

    def _follow(self, stopping: threading.Event, tell: Callable[[str], None]) -> None:
        told = self.clock()
        while not stopping.wait(_EVERY_S):
            try:
                self.sample()
            except OSError as error:  # a measurement more or less is no reason to fail
                tell(f"progress is not known: {error}")
            if self.clock() - told >= _LINE_S and self.total:
                told = self.clock()
                tell(f"{100 * self.done // self.total} % are there, {self.seconds_left()} s left")


class _Service(worker_pb2_grpc.FetchServiceServicer):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def GetProgress(self, request: Any, context: Any) -> worker_pb2.FetchProgress:  # noqa: ARG002, N802
        meter = self._meter
        return worker_pb2.FetchProgress(
            bytes=meter.done, total_bytes=meter.total, seconds_left=meter.seconds_left()
        )


@contextmanager
def served(meter: Meter, address: str) -> Iterator[None]:
    """Serves a meter at HOST:PORT; nowhere if that is empty. Raises SettingsError."""
    if not address:
        yield
        return
    server = grpc.server(ThreadPoolExecutor(2), options=transport.server_options(1 << 20))
    worker_pb2_grpc.add_FetchServiceServicer_to_server(_Service(meter), server)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise SettingsError(f"cannot listen on {address}; give a free HOST:PORT of this machine") from error
    server.start()
    try:
        yield
    finally:
        server.stop(None)
