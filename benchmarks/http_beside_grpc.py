"""Throughput of OpenAI's HTTP API relative to gRPC, through one frontend and one worker on this machine.

    python -m benchmarks.http_beside_grpc [--streams 64] [--tokens 64] [--rounds 5]

Starts a worker with examples/docs-moe on the CPU and a frontend with both ports. Each round streams STREAMS
greedy texts of TOKENS tokens at the same time over gRPC and over HTTP; the order alternates. The clients are
thin: grpc.aio with one connection, and a socket for each HTTP request. The columns:

    tokens/s   tokens of all texts, divided by the time until the last one ended; median of the rounds
    first ms   time to the first token of a text; median
    frontend   CPU milliseconds of the frontend for 1,000 tokens; median. Other load on the machine changes
               this less than the times
    relative   tokens/s relative to gRPC; median of the rounds' ratios, and the lowest and highest

The process prints the machine's load average, since the clients, the frontend and the worker share the cores.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from moe_api import transport
from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub

MODEL = Path(__file__).parents[1] / "examples/docs-moe"
PROMPT = "The kernel maps a page of memory for process number {}"
START_S = 120.0

Stream = Callable[[int], Awaitable["Text"]]


@dataclass(frozen=True)
class Text:
    """One text: its tokens, and seconds to the first one."""

    tokens: int
    first_s: float


@dataclass(frozen=True)
class Round:
    """Tokens a second of all texts, median time to the first token, CPU seconds of the frontend a token."""

    rate: float
    first_s: float
    cpu_s: float


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with served(args.streams) as site:
        asyncio.run(compare(site, args))


async def compare(site: "Site", args: argparse.Namespace) -> None:
    """Takes the rounds in turns."""
    options = transport.CLIENT_OPTIONS
    async with grpc.aio.insecure_channel(site.grpc, options=options) as channel:
        ways: dict[str, Stream] = {
            "gRPC": over_grpc(InferenceServiceStub(channel), args.tokens),
            "HTTP": over_http(site.http, args.tokens),
        }
        for stream in ways.values():
            await measure(stream, site, args)
        rounds: dict[str, list[Round]] = {name: [] for name in ways}
        for number in range(args.rounds):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                rounds[name].append(await measure(ways[name], site, args))
    show(rounds, args)


async def measure(stream: Stream, site: "Site", args: argparse.Namespace) -> Round:
    """One round of one way."""
    began, cpu_s = time.monotonic(), site.cpu_s()
    texts = await asyncio.gather(*(stream(number) for number in range(args.streams)))
    took_s = time.monotonic() - began
    wrong = [text.tokens for text in texts if text.tokens != args.tokens]
    if wrong:
        sys.exit(f"{len(wrong)} texts are not whole: {wrong[:5]} tokens instead of {args.tokens}")
    tokens, first_s = sum(text.tokens for text in texts), statistics.median(t.first_s for t in texts)
    return Round(tokens / took_s, first_s, (site.cpu_s() - cpu_s) / tokens)


def over_grpc(stub: InferenceServiceStub, tokens: int) -> Stream:
    """Streams over one connection."""

    async def stream(number: int) -> Text:
        sampling = pb.SamplingParameters(max_tokens=tokens, ignore_eos=True)
        request = pb.GenerateRequest(prompt=PROMPT.format(number), sampling=sampling)
        began, first_s, found = time.monotonic(), 0.0, 0
        async for response in stub.Generate(request):  # type: ignore[attr-defined]
            first_s = first_s or time.monotonic() - began
            found += len(response.tokens)
        return Text(found, first_s)

    return stream


def over_http(address: str, tokens: int) -> Stream:
    """Streams over a connection each."""
    host, _, port = address.rpartition(":")

    async def stream(number: int) -> Text:
        fields = {"prompt": PROMPT.format(number), "max_tokens": tokens, "temperature": 0, "stream": True}
        body = json.dumps(fields | {"ignore_eos": True, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(body)}\r\n"
        reader, writer = await asyncio.open_connection(host, int(port))
        began, first_s, last = time.monotonic(), 0.0, b""
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        async for line in reader:
            if line.startswith(b"data: {"):
                first_s, last = first_s or time.monotonic() - began, line
            elif line.startswith(b"data: [DONE]"):
                break
        writer.close()
        usage = json.loads(last.removeprefix(b"data: "))["usage"] if last else {"completion_tokens": 0}
        return Text(usage["completion_tokens"], first_s)

    return stream


def show(rounds: dict[str, list[Round]], args: argparse.Namespace) -> None:
    """Prints the table."""
    ratios = [http.rate / plain.rate for http, plain in zip(rounds["HTTP"], rounds["gRPC"], strict=True)]
    print(
        f"{args.streams} streams of {args.tokens} tokens, {args.rounds} rounds, {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':6}{'tokens/s':>10}{'first ms':>10}{'frontend':>10}{'relative':>10}")
    for name, found in rounds.items():
        rate, first_s, cpu_s = (
            statistics.median(getattr(each, field) for each in found)
            for field in ("rate", "first_s", "cpu_s")
        )
        line = f"{name:6}{rate:>10.0f}{first_s * 1e3:>10.0f}{cpu_s * 1e6:>10.0f}"
        if name == "HTTP":
            line += f"{statistics.median(ratios):>10.3f}   {min(ratios):.3f} to {max(ratios):.3f}"
        print(line)


@dataclass(frozen=True)
class Site:
    """Addresses of the frontend's two ports, and its process."""

    grpc: str
    http: str
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds of the frontend so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def served(streams: int) -> Iterator[Site]:
    """A worker, and a frontend before it."""
    binaries = Path(sys.executable).parent
    worker = [
        binaries / "moe-worker",
        "serve",
        "--model",
        MODEL,
        "--listen",
        "127.0.0.1:0",
        "--device",
        "cpu",
    ]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(started([*worker, "--max-batch-size", str(streams)]))
        port = said(process, r"listening on port (\d+)")
        frontend = [binaries / "moe-frontend", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        process = stack.enter_context(started([*frontend, "--static", f"127.0.0.1:{port}"]))
        http = said(process, r"serving HTTP on (\S+)")
        address = said(process, r"serving on (\S+)")
        said(process, r"(127\S+) accepts requests")
        yield Site(address, http, process.pid)


@contextlib.contextmanager
def started(command: list[object]) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block."""
    words = [str(word) for word in command]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str], pattern: str) -> str:
    """What the log of a process says."""
    deadline = time.monotonic() + START_S
    for line in process.stderr or ():
        if found := re.search(pattern, line):
            return found[1]
        if time.monotonic() > deadline:
            break
    sys.exit(f"{process.args!r} did not say {pattern!r}")


if __name__ == "__main__":
    main()
