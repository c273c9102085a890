"""Container processes: starting them through `enter`, waiting for them, stopping them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from localcluster.cri.enter import CANNOT_START, Spec
from localcluster.layout import CHECKOUT

_HELPER = (sys.executable, "-S", "-m", "localcluster.cri.enter")
MAX_OUTPUT = 16 * 1024 * 1024  # bytes of ExecSync output; api.proto asks for this limit (CVE-2022-1708)


@dataclass(frozen=True)
class Started:
    """The outcome of a start: the process, or why there is none."""

    pid: int
    error: str


@dataclass(frozen=True)
class Finished:
    """The outcome of a command executed in a container."""

    exit_code: int
    stdout: bytes
    stderr: bytes


async def readable(descriptor: int) -> None:
    """Waits until a descriptor is readable; a pidfd is when its process has ended."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(descriptor)


def _popen(spec: Spec, status: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    memory = os.memfd_create("spec")
    os.write(memory, spec.encode())
    os.lseek(memory, 0, os.SEEK_SET)
    inherited = [memory, status, *spec.namespaces] + ([] if spec.join is None else [spec.join])
    try:
        return subprocess.Popen(
            [*_HELPER, str(memory), str(status)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=inherited,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        )
    finally:
        os.close(memory)


async def _collect(descriptor: int, limit: int = MAX_OUTPUT) -> bytes:
    """Reads a pipe until its end; what exceeds `limit` is read and dropped."""
    os.set_blocking(descriptor, False)
    content = b""
    try:
        while True:
            await readable(descriptor)
            data = os.read(descriptor, 65536)
            if not data:
                return content
            content += data[: limit - len(content)]
    finally:
        os.close(descriptor)


async def start(spec: Spec, stdout: int, stderr: int) -> Started:
    """Starts a container's process; returns when its command has been executed, or could not be.

    The process becomes a child of the caller, which must be a subreaper. A PID comes with an error
    when the process was made but could not execute the command: it then ends with code 128.
    """
    result, status = os.pipe()
    # Not asyncio's: its child watchers would compete for the children that `exit_code` reaps.
    helper = _popen(spec, status, stdout, stderr)
    os.close(status)
    lines = (await _collect(result)).splitlines()
    code = await asyncio.to_thread(helper.wait)
    told: dict[str, object] = {}
    for line in lines:
        told.update(json.loads(line))
    missing = "" if "pid" in told else f"the container's helper ended with code {code}"
    return Started(int(str(told.get("pid", 0))), str(told.get("error", missing)))


async def exit_code(pid: int) -> int:
    """Waits for a child to end and reaps it; a process ended by signal N gives 128 + N, as shells and
    containerd do.
    """
    descriptor = os.pidfd_open(pid)
    try:
        await readable(descriptor)
        result = os.waitid(os.P_PIDFD, descriptor, os.WEXITED)  # noqa: ASYNC222 - it has ended
    finally:
        os.close(descriptor)
    if result is None:
        return CANNOT_START
    return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status


def send(pid: int, number: signal.Signals) -> None:
    """Signals a process; that it has ended meanwhile is fine."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


async def execute(
    pid: int, command: Sequence[str], environment: dict[str, str], limit: float
) -> Finished | None:
    """Executes a command in the namespaces of container process `pid`; None when it took over `limit` seconds
    (0: none).
    """
    container = os.pidfd_open(pid)
    (result, status), (output, stdout), (errors, stderr) = os.pipe(), os.pipe(), os.pipe()
    spec = Spec(list(command), environment, "/", [], join=container)
    helper = _popen(spec, status, stdout, stderr)
    for descriptor in (container, status, stdout, stderr):
        os.close(descriptor)
    gathered = asyncio.gather(_collect(result), _collect(output), _collect(errors))
    try:
        told, out, err = await asyncio.wait_for(gathered, limit or None)
    except TimeoutError:
        helper.kill()
        await asyncio.to_thread(helper.wait)
        return None
    code = await asyncio.to_thread(helper.wait)
    for line in told.splitlines():
        err += str(json.loads(line).get("error", "")).encode()
    return Finished(code, out, err)
