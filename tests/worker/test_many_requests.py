"""Ten thousand requests with random cancels leave nothing behind: no page, no place in a queue, no task."""

import asyncio
import random

import grpc
import pytest

from moe_api import transport
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.worker.serving import Worker

REQUESTS = 10_000
AT_ONCE = 256


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_ten_thousand_requests_with_random_cancels(endless):
    rng = random.Random(3)
    outcomes = {"whole": 0, "cancelled": 0}
    # 60 pages of 16 tokens for 32 sequences of up to 64: preemptions and evictions all along.
    memory = str(60 * 16 * 3 * 24 * 4)
    flags = ("--context-length", "64", "--kv-memory", memory, "--max-batch-size", "32", "--max-queue", "256")
    with Worker(endless, *flags) as worker:
        worker.wait_ready()
        address = f"127.0.0.1:{worker.port}"
        async with grpc.aio.insecure_channel(address, options=transport.CLIENT_OPTIONS) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            gate = asyncio.Semaphore(AT_ONCE)

            async def one(prompt, tokens, patience):
                """Cancels after `patience` tokens, if ever."""
                async with gate:
                    request = inference_pb2.GenerateRequest(
                        prompt_tokens=inference_pb2.TokenIds(ids=prompt),
                        sampling=inference_pb2.SamplingParameters(max_tokens=tokens),
                    )
                    call, seen = stub.Generate(request, timeout=120), 0
                    if patience == 0:
                        await asyncio.sleep(0)
                        call.cancel()
                    try:
                        async for response in call:
                            seen += len(response.tokens)
                            if seen >= patience:
                                call.cancel()
                    except asyncio.CancelledError:
                        assert call.cancelled()
                        outcomes["cancelled"] += 1
                        return
                    assert seen == tokens
                    outcomes["whole"] += 1

            shared = rng.choices(range(2, 320), k=40)
            async with asyncio.TaskGroup() as group:
                for _ in range(REQUESTS):
                    prompt = shared[: rng.randrange(1, 40)] + rng.choices(
                        range(2, 320), k=rng.randrange(1, 8)
                    )
                    tokens = rng.randrange(1, 16)
                    patience = rng.choice([0, 1, tokens // 2 + 1, 100, 100])
                    group.create_task(one(prompt, tokens, patience))
        load = worker.wait_load(running=0, queued=0, kv_tokens_used=0)
        assert load.kv_tokens_capacity == 60 * 16
        assert sum(outcomes.values()) == REQUESTS
        assert min(outcomes.values()) > REQUESTS / 10
        # What is left serves on, with all its room: a text as long as the context allows.
        tokens = list(worker.generate("x", max_tokens=60))[-1].usage.completion_tokens
        assert tokens == 60
        worker.terminate()
        assert worker.process.wait(timeout=30) == 0


async def test_512_streams_at_once(endless):
    """Every stream has its first tokens while all others still run, and goes on from there."""
    flags = ("--context-length", "2048", "--max-batch-size", "512", "--max-queue", "512")
    with Worker(
        endless, *flags, "--kv-memory", str(512 * 2048 * 3 * 24 * 4), "--target-step-ms", "10000"
    ) as worker:
        worker.wait_ready()
        address = f"127.0.0.1:{worker.port}"
        async with grpc.aio.insecure_channel(address, options=transport.CLIENT_OPTIONS) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            all_run = asyncio.Barrier(512)

            async def one(number):
                request = inference_pb2.GenerateRequest(
                    prompt_tokens=inference_pb2.TokenIds(ids=[2 + number % 300, 5]),
                    sampling=inference_pb2.SamplingParameters(max_tokens=2000),
                )
                call = stub.Generate(request, timeout=150)
                await call.read()
                await all_run.wait()
                message = await call.read()
                assert message.tokens
                assert not message.finish_reason
                call.cancel()

            async with asyncio.TaskGroup() as group:
                for number in range(512):
                    group.create_task(one(number))
        worker.wait_load(running=0, queued=0, kv_tokens_used=0)
