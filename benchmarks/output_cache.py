"""What the output cache costs and saves: latency and CPU time of the frontend, in front of a stand-in worker.

`python -m benchmarks.output_cache [--requests 200] [--tokens 64]`: one client, one request after the other,
over loopback. The worker computes nothing: with a model, a miss takes longer, and both shares are smaller.

`--alone` measures what a miss adds without the noise of sockets: in one process, the CPU time to write an
answer through the cache (key, shared computation, stored answer) less that to write it to the client.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from pathlib import Path

import grpc
from opentelemetry.trace import INVALID_SPAN

from benchmarks.commands import positive
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.supervision import Supervisor
from moe_api.writing import Writer
from moe_frontend.outputs.cache import OutputCache
from moe_frontend.outputs.flight import Flight
from moe_frontend.outputs.key import key_of
from moe_frontend.outputs.store import Store

FAKE_WORKER = Path(__file__).parents[1] / "tests" / "frontend" / "fake_worker.py"
TICKS = os.sysconf("SC_CLK_TCK")
Metadata = tuple[tuple[str, str], ...]


def cpu_s(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def measured(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, process: int, tokens: int, calls: list[Metadata]
) -> tuple[float, float]:
    """Median latency and mean CPU time of the frontend, in milliseconds."""
    request = inference_pb2.GenerateRequest(prompt=f"count {tokens}")
    before, latencies = cpu_s(process), []
    for metadata in calls:
        start = time.perf_counter()
        async for _ in stub.Generate(request, metadata=metadata):
            pass
        latencies.append(time.perf_counter() - start)
    return 1e3 * statistics.median(latencies), 1e3 * (cpu_s(process) - before) / len(calls)


class Client:
    """Takes messages and does nothing with them."""

    def invocation_metadata(self) -> Metadata:
        return ()

    def set_trailing_metadata(self, trailing_metadata: object) -> None: ...

    async def send_initial_metadata(self, initial_metadata: object) -> None: ...

    async def write(self, message: bytes) -> None: ...


async def added_ms(tokens: int, requests: int) -> tuple[float, float]:
    """Median CPU time in milliseconds to write an answer: directly, and through the cache as a miss."""
    pieces = [
        inference_pb2.GenerateResponse(text="word ", tokens=[number]).SerializeToString()
        for number in range(tokens)
    ]
    last = inference_pb2.GenerateResponse(finish_reason=inference_pb2.FINISH_REASON_LENGTH)
    messages = [*pieces, last.SerializeToString()]
    supervisor, store = Supervisor(), Store(64 * 2**20, 3600.0)
    cache: OutputCache[str] = OutputCache(store, supervisor, "stopped")
    cache.serve(frozenset({"r"}))

    async def compute(writer: Writer | Flight[str]) -> tuple[str | None, str]:
        for message in messages:
            await writer.write(message)
            await asyncio.sleep(0)  # the next message arrives
        return None, "r"

    async def miss(number: int) -> None:
        request = inference_pb2.GenerateRequest(prompt=f"count {number}")
        request.sampling.temperature = 0.0
        key = key_of(request, (), "r", samples=True)
        client = Client()
        if key is not None:
            await cache.answer(key, (), client, Writer(client, 30.0), INVALID_SPAN, compute)

    direct, missed = [], []
    for number in range(requests):
        began = time.thread_time()
        await compute(Writer(Client(), 30.0))
        between = time.thread_time()
        await miss(number)
        direct.append(between - began)
        missed.append(time.thread_time() - between)
    await supervisor.close()
    return 1e3 * statistics.median(direct), 1e3 * statistics.median(missed)


async def started(*command: str, environment: dict[str, str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )


async def address_of(frontend: asyncio.subprocess.Process) -> str:
    assert frontend.stderr is not None  # noqa: S101
    while line := (await frontend.stderr.readline()).decode():
        if "serving on" in line:
            return line.split()[-1]
    raise RuntimeError("moe-frontend did not start")


async def run(requests: int, tokens: int) -> None:
    worker = await started(sys.executable, str(FAKE_WORKER), "w", environment={"MOE_WORKER_REVISION": "r1"})
    assert worker.stdout is not None  # noqa: S101
    at = (await worker.stdout.readline()).decode().strip()
    command = str(Path(sys.executable).with_name("moe-frontend"))
    options = ("--listen", "127.0.0.1:0", "--static", at, "--output-cache", str(64 * 2**20))
    frontend = await started(command, *options, environment={})
    try:
        async with grpc.aio.insecure_channel(await address_of(frontend)) as channel:
            await compare(inference_pb2_grpc.InferenceServiceStub(channel), frontend.pid, requests, tokens)
    finally:
        for process in (frontend, worker):
            process.kill()
            await process.wait()


async def compare(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, process: int, requests: int, tokens: int
) -> None:
    kinds: dict[str, list[Metadata]] = {
        "warm-up": [(("cache-control", "no-store"),)] * 20,
        "without the cache": [(("cache-control", "no-store"),)] * requests,
        "miss": [(("x-cache-salt", str(index)),) for index in range(requests)],
        "repeat": [()] * requests,
    }
    print(f"{tokens} tokens in as many messages, {requests} requests each, two rounds")
    for _ in range(2):
        for name, calls in kinds.items():
            latency, cpu = await measured(stub, process, tokens, calls)
            print(f"{name:20} latency {latency:7.2f} ms   frontend's CPU {cpu:7.2f} ms a request")
        kinds["miss"] = [((key, f"{value}b"),) for ((key, value),) in kinds["miss"]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=positive, default=200)
    parser.add_argument("--tokens", type=positive, default=64)
    parser.add_argument("--alone", action="store_true")
    given = parser.parse_args()
    if given.alone:
        direct, missed = asyncio.run(added_ms(given.tokens, given.requests))
        print(f"CPU to write {given.tokens} messages: {direct:.3f} ms, as a miss {missed:.3f} ms")
    else:
        asyncio.run(run(given.requests, given.tokens))
