"""Cuts the network between two pods of a local cluster; all else reaches both of them.

Each pod gets a route that drops what it sends to the other one, by a process that enters its network:

    python -m tests.e2e.partition PID ADDRESS SECONDS

where PID is a process of the pod. It says "ready", waits for a line, drops for SECONDS, and ends.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path

from localcluster import linux
from localcluster.netlink import Netlink


class Partition:
    """`begin` cuts the connection for as long as it was made for."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def begin(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()


@contextlib.contextmanager
def partition(pods: dict[str, str], seconds: float) -> Iterator[Partition]:
    """Of two pods, addresses by name, prepared; at the end of the block it is over."""
    command = [sys.executable, "-m", "tests.e2e.partition"]
    with contextlib.ExitStack() as stack:
        running = []
        for name, other in zip(pods, reversed(pods.values()), strict=True):
            process = subprocess.Popen(
                [*command, str(process_of(name)), other, str(seconds)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
            )  # fmt: skip
            running.append(stack.enter_context(process))
            stack.callback(process.terminate)
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield Partition(running)
        assert [process.wait(seconds + 30) for process in running] == [0, 0]


def process_of(pod: str) -> int:
    """A process in the pod."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOSTNAME={pod}".encode() in (process / "environ").read_bytes().split(b"\0"):
                return int(process.name)
    raise AssertionError(f"no process of pod {pod} runs")


def drop(pid: int, address: IPv4Address, seconds: float) -> None:
    """In this process, which has one thread."""
    spaces = Path(f"/proc/{pid}/ns")
    if not (spaces / "user").samefile("/proc/self/ns/user"):
        enter(spaces / "user", linux.CLONE_NEWUSER)
    enter(spaces / "net", linux.CLONE_NEWNET)
    with Netlink() as netlink:
        print("ready", flush=True)
        sys.stdin.readline()
        netlink.add_dropping_route(address)
        time.sleep(seconds)
        netlink.delete_dropping_route(address)


def enter(path: Path, kind: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    linux.setns(descriptor, kind)
    os.close(descriptor)


if __name__ == "__main__":
    drop(int(sys.argv[1]), IPv4Address(sys.argv[2]), float(sys.argv[3]))
