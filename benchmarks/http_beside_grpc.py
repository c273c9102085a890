"""Throughput of OpenAI's HTTP API, and of TLS with API keys, relative to gRPC; on this machine.

    python -m benchmarks.http_beside_grpc [--streams 64] [--tokens 64] [--rounds 5]

Starts a worker with examples/docs-moe on the CPU and two frontends before it, each with both ports: one in
plaintext, and one that serves TLS and asks for an API key. Each round streams STREAMS greedy texts of TOKENS
tokens at the same time in each way; the order alternates. The clients are thin: grpc.aio with one connection,
and a socket for each HTTP request. Its connection is open before the round, as OpenAI's client keeps 100 of
them open; with `new`, the round contains the connection and its TLS handshake. The columns:

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
import hashlib
import json
import os
import re
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.commands import positive
from moe_api import transport
from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tests.pki import Authority, mount

MODEL = Path(__file__).parents[1] / "examples/docs-moe"
PROMPT = "The kernel maps a page of memory for process number {}"
START_S = 120.0

Stream = Callable[[int], Awaitable["Text"]]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


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


@dataclass(frozen=True)
class Way:
    """How texts are streamed from a port. prepare: what comes before a round's clock, for so many streams."""

    stream: Stream
    port: "Port"
    prepare: Callable[[int], Awaitable[None]] | None = None


def parse(about: str | None) -> argparse.Namespace:
    """The options of a comparison of ways."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=positive, default=64)
    parser.add_argument("--tokens", type=positive, default=64)
    parser.add_argument("--rounds", type=positive, default=5)
    return parser.parse_args()


def main() -> None:
    """Prints the table."""
    args = parse(__doc__)
    with served(args.streams) as site:
        asyncio.run(compare(site, args))


async def compare(site: "Site", args: argparse.Namespace) -> None:
    """Takes the rounds in turns."""
    async with contextlib.AsyncExitStack() as stack:
        ways: dict[str, Way] = {}
        for name, port in (("", site.plain), (" TLS", site.guarded)):
            channel = await stack.enter_async_context(connected(port))
            ways[f"gRPC{name}"] = Way(over_grpc(InferenceServiceStub(channel), args.tokens, port), port)
            kept = HttpStreams(port, args.tokens)
            ways[f"HTTP{name}"] = Way(kept.stream, port, kept.open)
            ways[f"HTTP{name} new"] = Way(HttpStreams(port, args.tokens).stream, port)
        for way in ways.values():
            await measure(way, args)
        rounds: dict[str, list[Round]] = {name: [] for name in ways}
        for number in range(args.rounds):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                rounds[name].append(await measure(ways[name], args))
    show(rounds, args)


def connected(port: "Port") -> grpc.aio.Channel:
    """A channel to a frontend."""
    if port.authority is None:
        return grpc.aio.insecure_channel(port.grpc, options=transport.CLIENT_OPTIONS)
    credentials = grpc.ssl_channel_credentials(port.authority)
    return grpc.aio.secure_channel(port.grpc, credentials, options=transport.CLIENT_OPTIONS)


async def measure(way: Way, args: argparse.Namespace) -> Round:
    """One round of one way."""
    if way.prepare is not None:
        await way.prepare(args.streams)
    began, cpu_s = time.monotonic(), way.port.cpu_s()
    texts = await asyncio.gather(*(way.stream(number) for number in range(args.streams)))
    took_s = time.monotonic() - began
    wrong = [text.tokens for text in texts if text.tokens != args.tokens]
    if wrong:
        sys.exit(f"{len(wrong)} texts are not whole: {wrong[:5]} tokens instead of {args.tokens}")
    tokens, first_s = sum(text.tokens for text in texts), statistics.median(t.first_s for t in texts)
    return Round(tokens / took_s, first_s, (way.port.cpu_s() - cpu_s) / tokens)


def over_grpc(stub: InferenceServiceStub, tokens: int, port: "Port") -> Stream:
    """Streams over one connection."""
    metadata = tuple(port.headers.items())

    async def stream(number: int) -> Text:
        sampling = pb.SamplingParameters(max_tokens=tokens, ignore_eos=True)
        request = pb.GenerateRequest(prompt=PROMPT.format(number), sampling=sampling)
        began, first_s, found = time.monotonic(), 0.0, 0
        async for response in stub.Generate(request, metadata=metadata):  # type: ignore[attr-defined]
            first_s = first_s or time.monotonic() - began
            found += len(response.tokens)
        return Text(found, first_s)

    return stream


class HttpStreams:
    """Streams over a connection each, which `open` makes before they begin, or else they themselves."""

    def __init__(self, port: "Port", tokens: int) -> None:
        self._port, self._tokens = port, tokens
        authority = port.authority
        self._context = ssl.create_default_context(cadata=authority.decode()) if authority else None
        self._opened: list[Connection] = []

    async def open(self, count: int) -> None:
        """Connects `count` times, with TLS handshakes."""
        self._opened = await asyncio.gather(*(self._connect() for _ in range(count)))

    async def stream(self, number: int) -> Text:
        """One text."""
        began, first_s, last = time.monotonic(), 0.0, b""
        reader, writer = self._opened.pop() if self._opened else await self._connect()
        writer.write(self._request(number))
        async for line in reader:
            if line.startswith(b"data: {"):
                first_s, last = first_s or time.monotonic() - began, line
            elif line.startswith(b"data: [DONE]"):
                break
        writer.close()
        usage = json.loads(last.removeprefix(b"data: "))["usage"] if last else {"completion_tokens": 0}
        return Text(usage["completion_tokens"], first_s)

    async def _connect(self) -> Connection:
        host, _, number = self._port.http.rpartition(":")
        return await asyncio.open_connection(host, int(number), ssl=self._context)

    def _request(self, number: int) -> bytes:
        fields = {"prompt": PROMPT.format(number), "max_tokens": self._tokens, "temperature": 0}
        more = {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        body = json.dumps(fields | more).encode()
        headers = {"Host": self._port.http, "Content-Length": len(body), "Content-Type": "application/json"}
        lines = (f"{name}: {value}\r\n" for name, value in (headers | self._port.headers).items())
        return f"POST /v1/completions HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + body


def show(
    rounds: dict[str, list[Round]], args: argparse.Namespace, baseline: str = "gRPC", cpu: str = "frontend"
) -> None:
    """Prints the table; ratios are to `baseline`. cpu: the title of the column of CPU time."""
    print(
        f"{args.streams} streams of {args.tokens} tokens, {args.rounds} rounds, {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':13}{'tokens/s':>10}{'first ms':>10}{cpu:>10}{'relative':>10}")
    for name, found in rounds.items():
        rate, first_s, cpu_s = (
            statistics.median(getattr(each, field) for each in found)
            for field in ("rate", "first_s", "cpu_s")
        )
        line = f"{name:13}{rate:>10.0f}{first_s * 1e3:>10.0f}{cpu_s * 1e6:>10.0f}"
        if name != baseline:
            ratios = [one.rate / base.rate for one, base in zip(found, rounds[baseline], strict=True)]
            line += f"{statistics.median(ratios):>10.3f}   {min(ratios):.3f} to {max(ratios):.3f}"
        print(line)


@dataclass(frozen=True)
class Port:
    """Addresses of a frontend's two ports, its process, and what its clients need."""

    grpc: str
    http: str
    pid: int
    authority: bytes | None
    headers: dict[str, str]

    def cpu_s(self) -> float:
        """CPU seconds of the frontend so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Site:
    """Both frontends."""

    plain: Port
    guarded: Port


@contextlib.contextmanager
def served(streams: int) -> Iterator[Site]:
    """A worker, and two frontends before it."""
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
        worker_address = f"127.0.0.1:{port}"
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority, key = Authority(), "moe-benchmark-key"
        mount(folder / "tls", authority.pair())
        mount(folder / "keys", {"tenant": f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"})
        options: list[object] = ["--tls", folder / "tls", "--api-keys", folder / "keys"]
        headers = {"authorization": f"Bearer {key}"}
        yield Site(
            stack.enter_context(frontend(worker_address, [], None, {})),
            stack.enter_context(frontend(worker_address, options, authority.certificate, headers)),
        )


@contextlib.contextmanager
def frontend(
    worker: str, options: list[object], authority: bytes | None, headers: dict[str, str]
) -> Iterator[Port]:
    """A frontend that routes to the worker."""
    command = [Path(sys.executable).with_name("moe-frontend"), "--listen", "127.0.0.1:0"]
    with started([*command, "--http", "127.0.0.1:0", "--static", worker, *options]) as process:
        http = said(process, r"serving HTTP on (\S+)")
        address = said(process, r"serving on (\S+)")
        said(process, r"(127\S+) accepts requests")
        yield Port(address, http, process.pid, authority, headers)


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
