"""What one tenant's short requests take next to another tenant's many streams, with and without tenants.

    python -m benchmarks.fairness [--streams 560] [--requests 26] [--rounds 3] [--tokens 2] [--text 200]
                                  [--batch 16] [--json]

Starts a worker with examples/docs-moe on the CPU and a frontend before it, with an API key for each of two
tenants; the baseline is the same without keys, so that all callers are one tenant. In each round, tenant B
sends REQUESTS requests of TOKENS tokens one after the other, first alone, then next to STREAMS streams of
tenant A, each of TEXT tokens and sent again when it ends or is refused. The streams come from a process of
the lowest priority for the operating system, as if they came from another machine. The columns:

    alone    milliseconds of a request of B until its last token, median
    next     the same next to A's streams, median, and the 90th percentile
    ratio    next / alone; median of the rounds' ratios
    served   requests of B that were answered; a refused one is not sent again
    A tok/s  tokens per second of all streams of A meanwhile

The process prints the machine's load average, since clients, frontend and worker share the cores.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import grpc

from benchmarks.commands import positive
from moe_api import rich_status, transport
from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub

MODEL = Path(__file__).parents[1] / "examples/docs-moe"
START_S = 120.0
SETTLE_S = 3.0
REQUEST_S = 60.0
KEYS = {"a": "a-key-of-tenant-a-0123456789abcdef", "b": "a-key-of-tenant-b-0123456789abcdef"}
PROMPT = "The kernel maps a page of memory for process number {}"
PROCESSES = 4
"""Connections of tenant A; a frontend takes 1,024 calls on each."""


@dataclass
class Round:
    """Seconds of B's answered requests, of all that were sent; tokens per second of A."""

    alone_s: list[float]
    next_s: list[float]
    sent: int
    rate: float

    @property
    def ratio(self) -> float:
        """How much longer a request takes next to the streams; infinite if none was answered."""
        if not self.next_s:
            return float("inf")
        return statistics.median(self.next_s) / statistics.median(self.alone_s)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=positive, default=560)
    parser.add_argument("--requests", type=positive, default=26)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--tokens", type=positive, default=2)
    parser.add_argument("--text", type=positive, default=200)
    parser.add_argument("--batch", type=positive, default=16, help="--max-batch-size of the worker")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--as-crowd", metavar="ADDRESS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_crowd:
        asyncio.run(crowd(args.as_crowd, args.streams, args.text))
        return
    if not args.json:
        print(f"{'':10}{'alone':>10}{'next':>10}{'p90':>10}{'ratio':>8}{'served':>10}{'A tok/s':>9}")
    for name, keys in (("tenants", KEYS), ("baseline", {})):
        with served(keys, args.batch) as address:
            report(name, [measure(address, args) for _ in range(args.rounds)], as_json=args.json)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)


def measure(address: str, args: argparse.Namespace) -> Round:
    """One round."""
    with Asker(address) as asker:
        alone_s = asker.ask(args.requests, args.tokens)
        command = [sys.executable, "-m", "benchmarks.fairness", "--as-crowd", address]
        command += ["--streams", str(args.streams), "--text", str(args.text)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                lines = iter(process.stdout or ())
                next(lines)  # it has begun
                time.sleep(SETTLE_S)
                next_s = asker.ask(args.requests, args.tokens)
            finally:
                process.terminate()
            rates = [float(line) for line in lines]
    return Round(alone_s, next_s, args.requests, statistics.median(rates) if rates else 0.0)


@dataclass
class Asker:
    """Tenant B, which sends one request after the other."""

    address: str
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def __enter__(self) -> "Asker":
        self._channel = grpc.insecure_channel(self.address, options=transport.CLIENT_OPTIONS)
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def ask(self, count: int, tokens: int) -> list[float]:
        """Seconds of each answered request. Prompts have nothing in common with earlier ones."""
        stub, found = InferenceServiceStub(self._channel), []
        for _ in range(count):
            sampling = pb.SamplingParameters(max_tokens=tokens, ignore_eos=True)
            request = pb.GenerateRequest(prompt=PROMPT.format(self.chance.random()), sampling=sampling)
            began = time.monotonic()
            try:
                made = sum(
                    len(part.tokens)
                    for part in stub.Generate(request, timeout=REQUEST_S, metadata=credentials("b"))
                )
            except grpc.RpcError as error:
                print(f"B: {error.code().name}: {error.details()}", file=sys.stderr)
                continue
            if made != tokens:
                sys.exit(f"B got {made} tokens instead of {tokens}")
            found.append(time.monotonic() - began)
        return found


def credentials(tenant: str) -> tuple[tuple[str, str | bytes], ...]:
    """Metadata of a tenant's requests; a frontend without keys ignores it."""
    return (("authorization", f"Bearer {KEYS[tenant]}"),)


async def crowd(address: str, streams: int, tokens: int) -> None:
    """Tenant A: prints a line when all streams are sent, then the tokens of each second until its end."""
    os.nice(19)
    total = 0
    async with contextlib.AsyncExitStack() as stack:
        options = [*transport.CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        stubs = [
            InferenceServiceStub(
                await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options))
            )
            for _ in range(PROCESSES)
        ]

        async def stream(number: int) -> None:
            nonlocal total
            sampling = pb.SamplingParameters(max_tokens=tokens, ignore_eos=True)
            while True:
                request = pb.GenerateRequest(prompt=PROMPT.format(number), sampling=sampling)
                call = stubs[number % PROCESSES].Generate(request, metadata=credentials("a"))
                try:
                    async for part in call:
                        total += len(part.tokens)
                except grpc.aio.AioRpcError as error:
                    await asyncio.sleep(rich_status.retry_delay(rich_status.from_error(error)) or 1.0)

        tasks = [asyncio.create_task(stream(number)) for number in range(streams)]
        await asyncio.sleep(1.0)
        print("begun", flush=True)
        while all(not task.done() for task in tasks):
            before = total
            await asyncio.sleep(1.0)
            print(total - before, flush=True)


def report(name: str, rounds: list[Round], *, as_json: bool) -> None:
    """One line of the table."""
    alone = 1e3 * statistics.median(s for each in rounds for s in each.alone_s)
    beside = sorted(1e3 * s for each in rounds for s in each.next_s)
    median = statistics.median(beside) if beside else float("nan")
    p90 = beside[int(0.9 * (len(beside) - 1))] if beside else float("nan")
    ratio = statistics.median(each.ratio for each in rounds)
    answered, sent = len(beside), sum(each.sent for each in rounds)
    rate = statistics.median(each.rate for each in rounds)
    if as_json:
        line = {"what": name, "alone_ms": alone, "next_ms": median, "p90_ms": p90, "ratio": ratio}
        print(json.dumps(line | {"served": answered, "sent": sent, "crowd_tokens_per_s": rate}))
    else:
        of = f"{answered}/{sent}"
        print(f"{name:10}{alone:>10.1f}{median:>10.1f}{p90:>10.1f}{ratio:>8.2f}{of:>10}{rate:>9.0f}")


@contextlib.contextmanager
def served(keys: dict[str, str], batch: int) -> Iterator[str]:
    """A worker and a frontend that knows these keys; the frontend's address."""
    binaries = Path(sys.executable).parent
    worker: list[object] = [binaries / "moe-worker", "serve", "--model", MODEL, "--device", "cpu"]
    worker += ["--listen", "127.0.0.1:0", "--max-batch-size", batch]
    frontend: list[object] = [binaries / "moe-frontend", "--listen", "127.0.0.1:0"]
    with contextlib.ExitStack() as stack:
        if keys:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for tenant, key in keys.items():
                (folder / tenant).write_text(f"sha256:{hashlib.sha256(key.encode()).hexdigest()}\n")
            frontend += ["--api-keys", folder]
        log = stack.enter_context(started(worker))
        port = said(log, r"listening on port (\d+)")
        drain(log)
        log = stack.enter_context(started([*frontend, "--static", f"127.0.0.1:{port}"]))
        address = said(log, r"serving on (\S+)")
        said(log, r"(127\S+) accepts requests")
        drain(log)
        yield address


@contextlib.contextmanager
def started(command: list[object]) -> Iterator[IO[str]]:
    """A process that ends with the block; its log."""
    with subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True) as process:
        try:
            if process.stderr is None:
                sys.exit("the process has no log")
            yield process.stderr
        finally:
            process.kill()


def said(log: IO[str], pattern: str) -> str:
    """What the log says."""
    deadline = time.monotonic() + START_S
    for line in log:
        if found := re.search(pattern, line):
            return found[1]
        if time.monotonic() > deadline:
            break
    sys.exit(f"the log did not say {pattern!r}")


def drain(log: IO[str]) -> None:
    """Drops the rest of the log, so that the process never waits for its reader."""
    threading.Thread(target=lambda: [None for _ in log], daemon=True).start()


if __name__ == "__main__":
    main()
