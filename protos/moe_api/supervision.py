"""Supervises background loops: an error is logged and counted, and the loop restarts after a pause.

Every long-lived task and thread of the operator, the frontend and the worker's edge runs under a
`Supervisor`. A bare asyncio task ends silently with its first error, and its work stops until the process is
restarted. gRPC makes this easy to miss: closing a channel raises CancelledError in the calls in flight, which
is not an `Exception` and looks like a cancellation of the task itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from opentelemetry import metrics

from moe_api.backoff import Backoff

__all__ = ["DEFAULT_BACKOFF", "Backoff", "LoopState", "Supervisor", "is_being_cancelled"]

_LOG: Final = logging.getLogger(__name__)

DEFAULT_BACKOFF: Final = Backoff()


@dataclass(frozen=True)
class LoopState:
    """The current state of a supervised loop.

    loop: the kind of work, shared by all loops of this kind; a label of metrics.
    name: identifies the loop within its kind.
    since_s: start of the current run or pause, on the supervisor's clock.
    failures: consecutive errors; 0 if the last run did not fail.
    error: the last error, for people.
    paused: whether it waits for its restart.
    """

    loop: str
    name: str
    since_s: float
    failures: int = 0
    error: str = ""
    paused: bool = False


def is_being_cancelled() -> bool:
    """Whether the current task is being cancelled; otherwise a CancelledError comes from something else."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class Supervisor:
    """Runs loops and restarts those that fail.

    A loop that returns has finished and is not restarted. If it ran for longer than the longest pause before
    it failed, the backoff starts again at the shortest pause. Call `start` in the thread of a running event
    loop; the other methods may be called from any thread.

    Args:
        meter: exports `moe.background.loops` (by `moe.loop` and `moe.state`) and `moe.background.restarts`;
            default: the process-wide one.
        backoff: pauses between a failure and the restart, unless a loop has its own.
        clock: seconds, monotonic.
        chance: numbers of [0, 1), for the jitter.
        expected: errors whose message is sufficient; they are logged without a traceback, and only the first
            of several in a row.
    """

    def __init__(
        self,
        meter: metrics.Meter | None = None,
        backoff: Backoff = DEFAULT_BACKOFF,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        expected: tuple[type[Exception], ...] = (),
    ) -> None:
        self._expected = expected
        self._backoff = backoff
        self._clock = clock
        self._chance = chance
        self._states: dict[object, LoopState] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        meter = meter or metrics.get_meter("moe_api.supervision")
        self._restarts = meter.create_counter(
            "moe.background.restarts", "{restart}", "Failures of background loops, each followed by a restart"
        )
        meter.create_observable_up_down_counter(
            "moe.background.loops", [self._observe], "{loop}", "Background loops, by their current state"
        )

    @property
    def states(self) -> tuple[LoopState, ...]:
        """All loops that have not finished."""
        return tuple(self._states.copy().values())

    def start(
        self,
        loop: str,
        work: Callable[[], Awaitable[None]],
        name: str = "",
        backoff: Backoff | None = None,
    ) -> asyncio.Task[None]:
        """Runs `work` in a task and restarts it until it returns; cancel the task to stop it.

        Only a cancellation of this task ends it: a CancelledError that `work` raises for another reason is a
        failure.
        """
        task = asyncio.create_task(
            self._run(loop, work, name, backoff or self._backoff), name=_title(loop, name)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def start_once(
        self, loop: str, work: Callable[[], Awaitable[None]], name: str = ""
    ) -> asyncio.Task[None]:
        """Like `start`, for what cannot be done again (a connection that came): an error is its end."""

        async def once() -> None:
            try:
                await work()
            except (Exception, asyncio.CancelledError) as error:
                if is_being_cancelled():
                    raise
                _LOG.error("%s failed", _title(loop, name), exc_info=error)

        return self.start(loop, once, name)

    def start_thread(
        self,
        loop: str,
        work: Callable[[], None],
        stopping: threading.Event,
        name: str = "",
        backoff: Backoff | None = None,
    ) -> threading.Thread:
        """Runs `work` in a daemon thread and restarts it until it returns or `stopping` is set."""
        thread = threading.Thread(
            target=self._run_in_thread,
            args=(loop, work, stopping, name, backoff or self._backoff),
            name=_title(loop, name),
            daemon=True,
        )
        thread.start()
        return thread

    async def close(self) -> None:
        """Cancels all tasks and waits for them. Threads end by their `stopping` event."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, loop: str, work: Callable[[], Awaitable[None]], name: str, backoff: Backoff) -> None:
        with self._tracked(loop, name) as key:
            while True:
                self._running(key)
                try:
                    await work()
                except asyncio.CancelledError as error:
                    if is_being_cancelled():
                        raise
                    pause_s = self._failed(key, error, backoff)
                except Exception as error:  # noqa: BLE001 - logged, and the loop restarts
                    pause_s = self._failed(key, error, backoff)
                else:
                    return
                await asyncio.sleep(pause_s)

    def _run_in_thread(
        self, loop: str, work: Callable[[], None], stopping: threading.Event, name: str, backoff: Backoff
    ) -> None:
        with self._tracked(loop, name) as key:
            while not stopping.is_set():
                self._running(key)
                try:
                    work()
                except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - as above
                    if stopping.is_set():
                        return
                    pause_s = self._failed(key, error, backoff)
                else:
                    return
                stopping.wait(pause_s)

    @contextlib.contextmanager
    def _tracked(self, loop: str, name: str) -> Iterator[object]:
        key = object()
        # Prometheus counts what a counter gains, so the first restart only counts where it was 0 before.
        self._restarts.add(0, {"moe.loop": loop})
        self._states[key] = LoopState(loop, name, self._clock())
        try:
            yield key
        finally:
            del self._states[key]

    def _running(self, key: object) -> None:
        self._states[key] = replace(self._states[key], since_s=self._clock(), paused=False)

    def _failed(self, key: object, error: BaseException, backoff: Backoff) -> float:
        """Records a failure; returns the pause before the restart, in seconds."""
        state, now = self._states[key], self._clock()
        healthy = now - state.since_s > backoff.longest_s
        failures = 1 if healthy else state.failures + 1
        text = f"{type(error).__name__}: {error}"
        self._states[key] = replace(state, since_s=now, failures=failures, error=text, paused=True)
        self._restarts.add(1, {"moe.loop": state.loop})
        pause_s = backoff.pause_s(failures, self._chance())
        expected = isinstance(error, self._expected)
        _LOG.log(
            logging.DEBUG if expected and failures > 1 else logging.ERROR,
            "%s failed (%s); restarting in %.1f s",
            _title(state.loop, state.name),
            text,
            pause_s,
            exc_info=None if failures > 1 or expected else error,
        )
        return pause_s

    def _observe(self, _: metrics.CallbackOptions) -> list[metrics.Observation]:
        counts = Counter((state.loop, "restarting" if state.paused else "running") for state in self.states)
        return [
            metrics.Observation(count, {"moe.loop": loop, "moe.state": state})
            for (loop, state), count in counts.items()
        ]


def _title(loop: str, name: str) -> str:
    return f"{loop} {name}" if name else loop
