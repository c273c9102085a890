"""A worker that serves no model: command line, health, GetModel and load report of the real one.

It starts in half a second of CPU. Generate takes one of STANDIN_SLOTS places (4) for STANDIN_SECONDS (0.1)
and answers with one token. With STANDIN_ERROR set it refuses to start as the real worker does: that sentence,
exit code 2. STANDIN_REPORT spoils the load report: silent, fell, future or contradictory.
"""

from __future__ import annotations

import signal
import sys

# First of all: a container's first process ignores a signal for which it has no handler.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

import argparse  # noqa: E402
import asyncio  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import time  # noqa: E402
from bisect import bisect_left  # noqa: E402
from pathlib import Path  # noqa: E402

import grpc  # noqa: E402

from moe_api.health import Health  # noqa: E402
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc  # noqa: E402
from moe_api.semconv import TIME_TO_FIRST_TOKEN_BOUNDS  # noqa: E402
from moe_api.supervision import Supervisor  # noqa: E402
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc  # noqa: E402
from moe_worker.service import listening  # noqa: E402

HOUR_NS = 3600 * 10**9


class Service(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self):
        self.places = asyncio.Semaphore(int(os.environ.get("STANDIN_SLOTS", "4")))
        self.seconds = float(os.environ.get("STANDIN_SECONDS", "0.1"))
        self.received = self.completed = self.queued = self.running = 0
        self.waits = [0] * (len(TIME_TO_FIRST_TOKEN_BOUNDS) + 1)

    async def GetModel(self, request, context):
        return inference_pb2.Model(
            name="stand-in",
            architecture="deepseek_v3",
            parameters_total=11_200_000,
            parameters_active=4_100_000,
            format="fp32",
            context_length=2048,
        )

    async def Generate(self, request, context):
        submitted = time.monotonic()
        self.received += 1
        self.queued += 1
        try:
            await self.places.acquire()
        finally:
            self.queued -= 1
        self.running += 1
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
            self.places.release()
        self.completed += 1
        self.waits[bisect_left(TIME_TO_FIRST_TOKEN_BOUNDS, time.monotonic() - submitted)] += 1
        response = inference_pb2.GenerateResponse(text="token", tokens=[1])
        response.finish_reason = inference_pb2.FINISH_REASON_LENGTH
        response.usage.completion_tokens = 1
        yield response

    async def Tokenize(self, request, context):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the stand-in serves no model")


class Worker(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, service):
        self.service = service
        self.started_ns = time.time_ns()
        self.report = os.environ.get("STANDIN_REPORT", "")

    async def GetLoad(self, request, context):
        service = self.service
        load = worker_pb2.Load(
            queued=service.queued,
            running=service.running,
            requests_received=service.received,
            requests_completed=service.completed,
        )
        load.started.FromNanoseconds(self.started_ns + HOUR_NS * (self.report == "future"))
        load.time_to_first_token_seconds.bounds.extend(TIME_TO_FIRST_TOKEN_BOUNDS)
        load.time_to_first_token_seconds.counts.extend(service.waits)
        if self.report == "silent":
            await asyncio.sleep(3600)
        if self.report == "fell":
            load.requests_received += random.randrange(10**6)
        if self.report == "contradictory":
            load.requests_completed = load.requests_received + 1
        return load

    async def GetExpertLoad(self, request, context):
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the stand-in serves no model")


async def serve(listen: str) -> None:
    server = grpc.aio.server()
    service = Service()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Worker(service), server)
    health = Health(["moe_api.inference.v1.InferenceService"])
    await health.register(server)
    supervisor = Supervisor()
    folder = os.environ.get("MOE_WORKER_TLS")
    listening.bind(server, listen, listening.credentials(Path(folder) if folder else None, supervisor))
    await server.start()
    beside = await listening.probes(health, os.environ.get("MOE_WORKER_HEALTH"))
    await health.set_ready(ready=True)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await supervisor.close()
    for one in (server, *beside):
        await one.stop(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("serve")
    for option in ("model", "served-name", "max-batch-size", "kv-memory", "device", "dtype", "listen"):
        parser.add_argument(f"--{option}", required=True)
    parser.add_argument("--context-length")
    arguments = parser.parse_args()
    if refusal := os.environ.get("STANDIN_ERROR"):
        print("loading", file=sys.stderr)
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(2)
    asyncio.run(serve(arguments.listen))


if __name__ == "__main__":
    main()
