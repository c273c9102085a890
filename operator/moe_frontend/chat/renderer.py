"""Has templates rendered by processes that can be killed: within a time, however the template loops."""

import asyncio
import contextlib
import os
import sys
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from moe_frontend.chat.render_process import LENGTH_BYTES, Job, Result

RENDER_S: Final = 5.0
"""Of one conversation; published templates take milliseconds."""
START_S: Final = 30.0
"""Of a process, which imports jinja2; on a busy machine that takes seconds."""
PROCESSES: Final = 2
WAITING_MOST: Final = 64
_MODULE: Final = "moe_frontend.chat.render_process"
_NEEDED: Final = ("PATH", "PYTHONPATH", "LANG", "HOME")
_SLOW: Final = "the chat template did not render the conversation within {:g} s; shorten it"
_ENDED: Final = "the chat template ended its process on the conversation; shorten it"
_NOT_STARTED: Final = "the process that renders chat templates does not start; try later"
_NOTHING: Final = msgspec.json.encode(Job("", {}, 0))
_DECODER: Final = msgspec.json.Decoder(Result)


class RenderError(Exception):
    """There is no prompt. The text is for the client.

    Attributes:
        busy: whether others wait already; a later attempt may succeed.
    """

    def __init__(self, sentence: str, *, busy: bool = False) -> None:
        super().__init__(sentence)
        self.busy = busy


@dataclass
class _Process:
    inner: asyncio.subprocess.Process

    async def ask(self, payload: bytes) -> bytes:
        stdin, stdout = self.inner.stdin, self.inner.stdout
        if stdin is None or stdout is None:
            raise ConnectionError("the process has no pipes")
        stdin.write(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)
        await stdin.drain()
        length = int.from_bytes(await stdout.readexactly(LENGTH_BYTES), "big")
        return await stdout.readexactly(length)

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.inner.kill()
        await self.inner.wait()


class Renderer:
    """Starts processes when they are needed, and replaces those that were killed. For one event loop.

    Args:
        limit_s: how long one conversation may take, in seconds.
    """

    def __init__(self, limit_s: float = RENDER_S) -> None:
        self._limit_s = limit_s
        self._places = asyncio.Semaphore(PROCESSES)
        self._waiting = 0
        self._idle: list[_Process] = []

    async def render(self, template: str, variables: dict[str, Any], most: int) -> str:
        """The prompt, of `most` characters at most.

        Raises:
            RenderError: there is none.
        """
        payload = msgspec.json.encode(Job(template, variables, most))
        if self._waiting >= WAITING_MOST:
            raise RenderError(f"{WAITING_MOST} conversations wait to be rendered; try later", busy=True)
        self._waiting += 1
        try:
            async with self._places:
                result = await self._result(payload)
        finally:
            self._waiting -= 1
        if result.error:
            raise RenderError(result.error)
        return result.prompt

    async def _result(self, payload: bytes) -> Result:
        process = self._living() or await _start()
        try:
            async with asyncio.timeout(self._limit_s):
                answer = await process.ask(payload)
        except BaseException as error:
            # What it would still answer is of this job, so it cannot take another one.
            await process.end()
            if isinstance(error, TimeoutError):
                raise RenderError(_SLOW.format(self._limit_s)) from None
            if isinstance(error, EOFError | ConnectionError):
                raise RenderError(_ENDED) from error
            raise
        self._idle.append(process)
        return _DECODER.decode(answer)

    def _living(self) -> _Process | None:
        """An idle process. One that has ended, such as by the kernel's OOM killer, takes no job."""
        while self._idle:
            process = self._idle.pop()
            if process.inner.returncode is None:
                return process
        return None

    async def close(self) -> None:
        """Ends the processes."""
        while self._idle:
            await self._idle.pop().end()


def _environment() -> dict[str, str]:
    """What Python needs to start, and nothing that may be secret."""
    return {name: os.environ[name] for name in _NEEDED if name in os.environ}


async def _start() -> _Process:
    """A process that has rendered a first template.

    Raises:
        RenderError: it does not start.
    """
    pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = _Process(
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", _MODULE, stdin=pipe, stdout=pipe, stderr=nothing, env=_environment()
        )
    )
    try:
        async with asyncio.timeout(START_S):
            await process.ask(_NOTHING)
    except BaseException as error:
        await process.end()
        if isinstance(error, TimeoutError | EOFError | ConnectionError):
            raise RenderError(_NOT_STARTED, busy=True) from error
        raise
    return process
