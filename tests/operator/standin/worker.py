"""A worker that serves no model: command line, health and GetModel of the real one, in half a second of CPU.

With STANDIN_ERROR set it refuses to start as the real worker does: that sentence, exit code 2.
"""

from __future__ import annotations

import signal
import sys

# First of all: a container's first process ignores a signal for which it has no handler.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

import argparse  # noqa: E402
import asyncio  # noqa: E402
import os  # noqa: E402

import grpc  # noqa: E402

from moe_api.health import Health  # noqa: E402
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc  # noqa: E402


class Service(inference_pb2_grpc.InferenceServiceServicer):
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
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the stand-in serves no model")

    async def Tokenize(self, request, context):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the stand-in serves no model")


async def serve(listen: str) -> None:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Service(), server)
    health = Health(["moe_api.inference.v1.InferenceService"])
    await health.register(server)
    server.add_insecure_port(listen)
    await server.start()
    await health.set_ready(ready=True)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.stop(1)


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
