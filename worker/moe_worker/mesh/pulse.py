"""Notices ranks that die, hang or are cut off: each end of a channel sends a beat every BEAT_S seconds.

Where a channel ends, or is silent for too long, this process shuts its connections to other ranks down.
Whatever waits for them, deep inside gloo, then fails at once, and so do the ranks at their other ends. On
GPUs it aborts its exchanges and ends its channels, so that the other ranks abort theirs.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from moe_worker.mesh.channel import Channel
from moe_worker.mesh.errors import MeshError, RankLostError

log = logging.getLogger(__name__)
# Kernels for GPUs are compiled in the middle of the work, which can take seconds without a beat.
BEAT_S, SILENT_S, SILENT_GPU_S = 0.25, 1.5, 15.0


class Pulse:
    """Watches `channels` until `stop`. Silence counts once all ranks are armed: before, they load weights.

    lost: why, once a rank is; silent: ranks that are lost because they are silent. abort: aborts the
    exchanges of a GPU; None: there is none. on_lost: called then by another thread. kept: further channels,
    which get beats and stay open.
    """

    def __init__(
        self, channels: Sequence[Channel], abort: Callable[[], None] | None = None,
        on_lost: Callable[[], None] = lambda: None, kept: Callable[[], Iterable[Channel]] = tuple,
    ) -> None:  # fmt: skip
        self._channels, self._abort = channels, abort
        self._silent_s = SILENT_S if abort is None else SILENT_GPU_S
        self._stopped = threading.Event()
        self._armed = False
        self._on_lost, self._kept = on_lost, kept
        self.lost: MeshError | None = None
        self.silent: frozenset[int] = frozenset()
        for channel in channels:
            channel.listen(self._lost)
        self._thread = threading.Thread(target=self._run, name="mesh pulse", daemon=True)
        self._thread.start()

    def arm(self) -> None:
        """From now on silence counts."""
        for channel in self._channels:
            channel.heard = time.monotonic()
        self._armed = True

    def stop(self) -> None:
        """Ends the watch; the channels may be closed then."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        expected = time.monotonic()
        while not self._stopped.wait(BEAT_S):
            now = time.monotonic()
            late, expected = now - expected - BEAT_S, now
            for channel in self._kept():
                channel.beat()
            for channel in self._channels:
                channel.beat()
                channel.heard += max(0.0, late)  # whoever was paused itself blames nobody
                if self._armed and now - channel.heard > self._silent_s:
                    self.silent = self._silent(now)
                    self._lost(channel, _silence(channel, now))
                    return

    def _silent(self, now: float) -> frozenset[int]:
        """Ranks that are, or are about to be."""
        limit = self._silent_s - 2 * BEAT_S
        return frozenset(channel.rank for channel in self._channels if now - channel.heard > limit)

    def _lost(self, channel: Channel, error: MeshError) -> None:
        """May be called by several threads."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self.lost = error  # before the abort: what kernels give from then on means nothing
        if self._abort is None:
            log.warning("%s; shutting %d connections down", error, cut([*self._channels, *self._kept()]))
            channel.end(error)
        else:
            log.warning("%s; aborting the exchanges of this rank's GPU", error)
            self._abort()
            for each in self._channels:
                each.end(error)
        self._on_lost()


def _silence(channel: Channel, now: float) -> RankLostError:
    silent = f"no heartbeat received in {now - channel.heard:.1f} s"
    return RankLostError(
        f"rank {channel.rank}: connection lost: {silent}; check that it runs, and the network"
    )


def cut(channels: Iterable[Channel]) -> int:
    """Shuts down the process's TCP connections other than `channels`; returns how many there were."""
    kept, count = {channel.fileno() for channel in channels}, 0
    for link in Path("/proc/self/fd").iterdir():
        if int(link.name) not in kept:
            with contextlib.suppress(OSError):  # the descriptor is gone, or no connection
                count += _shut_down(link)
    return count


def _shut_down(link: Path) -> bool:
    if not str(link.readlink()).startswith("socket:"):
        return False
    with socket.socket(fileno=os.dup(int(link.name))) as found:
        if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
            return False
        found.getpeername()
        found.shutdown(socket.SHUT_RDWR)
        return True
