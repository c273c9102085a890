"""One client process of benchmarks.serving: streams of one connection, and when their tokens came.

Standard input has a line of JSON (address, prompts, tokens) and, after the answer "ready", an empty line. It
begins all streams then, and prints a line of JSON about what came.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import grpc

from moe_api import transport
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc


def main() -> None:
    print(json.dumps(asyncio.run(run(json.loads(sys.stdin.readline())))), flush=True)


async def run(task: dict[str, Any]) -> dict[str, Any]:
    async with grpc.aio.insecure_channel(task["address"], options=transport.CLIENT_OPTIONS) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await channel.channel_ready()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        cpu, began = time.process_time(), time.monotonic()
        streams = await asyncio.gather(*(stream(stub, each, task["tokens"]) for each in task["prompts"]))
        return {
            "began": began, "ended": time.monotonic(), "cpu": time.process_time() - cpu,
            "tokens": sum(count for count, _ in streams), "came": [came for _, came in streams],
        }  # fmt: skip


async def stream(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, prompt: list[int], tokens: int
) -> tuple[int, list[float]]:
    """The number of tokens, and when each message came."""
    request = inference_pb2.GenerateRequest(
        prompt_tokens=inference_pb2.TokenIds(ids=prompt),
        sampling=inference_pb2.SamplingParameters(max_tokens=tokens, ignore_eos=True),
    )
    produced, came = 0, []
    async for response in stub.Generate(request):
        produced += len(response.tokens)
        came.append(time.monotonic())
    return produced, came


if __name__ == "__main__":
    main()
