"""Has questions answered by processes that can be killed, each within a time limit. See `moe_api.child`."""

import asyncio
import contextlib
import os
import sys
from dataclasses import dataclass
from typing import Final

from moe_api.child import LENGTH_BYTES, frame

START_S: Final = 30.0
"""Until a process has answered its first question; on a busy machine imports take seconds."""
PROCESSES: Final = 2
WAITING_MOST: Final = 64
_ENVIRONMENT: Final = ("PATH", "PYTHONPATH", "LANG", "HOME")
"""What Python needs to start, and nothing that may be secret."""


class ChildError(Exception):
    """A question has no answer."""


class ChildBusyError(ChildError):
    """Too many questions wait already; a later attempt may succeed."""


class ChildNotStartedError(ChildError):
    """No process starts; a later attempt may succeed."""


class ChildSlowError(ChildError):
    """The question took too long."""


class ChildEndedError(ChildError):
    """The question ended its process, for example because it needed too much memory or has a huge answer."""


@dataclass
class _Child:
    process: asyncio.subprocess.Process
    answer_most: int

    async def ask(self, question: bytes) -> bytes:
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise ConnectionError("the process has no pipes")
        stdin.write(frame(question))
        await stdin.drain()
        length = int.from_bytes(await stdout.readexactly(LENGTH_BYTES), "big")
        if length > self.answer_most:
            # Untrusted input may have taken the process over; its memory is bounded, that of this one is not.
            raise ConnectionError(f"the process announces an answer of {length} bytes")
        return await stdout.readexactly(length)

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


class ChildPool:
    """Starts processes when they are needed and replaces those that were killed. For one event loop.

    Args:
        module: to run, which calls `moe_api.child.serve`.
        limit_s: time for one answer, in seconds.
        first: a harmless question; a process is ready when it has answered it.
        answer_most: bytes of the longest answer.
    """

    def __init__(self, module: str, limit_s: float, first: bytes, answer_most: int) -> None:
        self._module = module
        self._limit_s = limit_s
        self._first = first
        self._answer_most = answer_most
        self._places = asyncio.Semaphore(PROCESSES)
        self._waiting = 0
        self._idle: list[_Child] = []

    async def ask(self, question: bytes) -> bytes:
        """The answer to a question.

        Raises:
            ChildError: one of its subclasses says why there is none.
        """
        if self._waiting >= WAITING_MOST:
            raise ChildBusyError(f"{WAITING_MOST} questions wait")
        self._waiting += 1
        try:
            async with self._places:
                return await self._answer(question)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Ends the processes."""
        while self._idle:
            await self._idle.pop().end()

    async def _answer(self, question: bytes) -> bytes:
        child = self._living() or await self._start()
        try:
            async with asyncio.timeout(self._limit_s):
                answer = await child.ask(question)
        except BaseException as error:
            # A late answer would belong to this question, so the process cannot take another one.
            await child.end()
            if isinstance(error, TimeoutError):
                raise ChildSlowError(f"no answer within {self._limit_s:g} s") from None
            if isinstance(error, EOFError | ConnectionError):
                raise ChildEndedError("the process has ended") from error
            raise
        self._idle.append(child)
        return answer

    def _living(self) -> _Child | None:
        """An idle process. One that has ended, for example by the kernel's OOM killer, gets no question."""
        while self._idle:
            child = self._idle.pop()
            if child.process.returncode is None:
                return child
        return None

    async def _start(self) -> _Child:
        """A process that has answered the first question. Raises ChildNotStartedError."""
        pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        child = _Child(
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", self._module, stdin=pipe, stdout=pipe, stderr=nothing, env=environment
            ),
            self._answer_most,
        )
        try:
            async with asyncio.timeout(START_S):
                await child.ask(self._first)
        except BaseException as error:
            await child.end()
            if isinstance(error, TimeoutError | EOFError | ConnectionError):
                raise ChildNotStartedError(f"{self._module} gives no answer") from error
            raise
        return child
