"""Throughput with mutual TLS between frontend and worker, relative to plaintext; on this machine.

    python -m benchmarks.internal_tls [--streams 64] [--tokens 64] [--rounds 5]

Starts two workers with examples/docs-moe on the CPU, with a frontend before each: one pair in plaintext, one
with mutual TLS. Each round streams STREAMS greedy texts of TOKENS tokens at the same time over gRPC through
each pair; the order alternates, and the other pair idles. The columns are those of
benchmarks.http_beside_grpc; `both` is the CPU time of the frontend and the worker's edge together.
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.http_beside_grpc import (
    MODEL,
    Port,
    Round,
    Way,
    connected,
    measure,
    over_grpc,
    parse,
    said,
    show,
    started,
)
from moe_api import mutual
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tests.pki import Authority, mount


@dataclass(frozen=True)
class Pair(Port):
    """A frontend with its worker, whose edge's CPU time counts as well.

    worker: its PID.
    """

    worker: int

    def cpu_s(self) -> float:
        """CPU seconds of both so far."""
        return super().cpu_s() + Port(self.grpc, "", self.worker, None, {}).cpu_s()


def main() -> None:
    """Prints the table."""
    args = parse(__doc__)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority = Authority()
        for role, name in (("worker", mutual.WORKER), ("frontend", mutual.FRONTEND)):
            mount(folder / role, authority.pair(name))
        secured = (["--tls", folder / "worker"], ["--internal-tls", folder / "frontend"])
        pairs = {
            "plaintext": stack.enter_context(served(args.streams, [], [])),
            "mutual TLS": stack.enter_context(served(args.streams, *secured)),
        }
        asyncio.run(compare(pairs, args))


async def compare(pairs: dict[str, Pair], args: argparse.Namespace) -> None:
    """Takes the rounds in turns."""
    async with contextlib.AsyncExitStack() as stack:
        ways = {}
        for name, pair in pairs.items():
            channel = await stack.enter_async_context(connected(pair))
            ways[name] = Way(over_grpc(InferenceServiceStub(channel), args.tokens, pair), pair)
            await measure(ways[name], args)
        rounds: dict[str, list[Round]] = {name: [] for name in ways}
        for number in range(args.rounds):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                rounds[name].append(await measure(ways[name], args))
    show(rounds, args, baseline="plaintext", cpu="both")


@contextlib.contextmanager
def served(streams: int, of_worker: list[object], of_frontend: list[object]) -> Iterator[Pair]:
    """A worker with a frontend before it, and options of each."""
    binaries = Path(sys.executable).parent
    serve: list[object] = [binaries / "moe-worker", "serve", "--model", MODEL, "--device", "cpu"]
    serve += ["--listen", "127.0.0.1:0", "--max-batch-size", streams]
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(started([*serve, *of_worker]))
        port = said(worker, r"listening on port (\d+)")
        address = f"127.0.0.1:{port}"
        route = [binaries / "moe-frontend", "--listen", "127.0.0.1:0", "--static", address, *of_frontend]
        process = stack.enter_context(started(route))
        at = said(process, r"serving on (\S+)")
        said(process, r"(127\S+) accepts requests")
        yield Pair(at, "", process.pid, None, {}, worker.pid)


if __name__ == "__main__":
    main()
