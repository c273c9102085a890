"""A deployment without a ready replica: requests wait for one, and the operator hears of them."""

import asyncio
import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_api import rich_status
from moe_api.frontend.v1 import frontend_pb2, frontend_pb2_grpc
from moe_api.inference.v1 import inference_pb2
from moe_frontend.transport import failures, holding
from tests.frontend.fake_worker import FakeWorker


async def demand(bench, wait_s=0.0):
    wait = Duration()
    wait.FromNanoseconds(round(wait_s * 1e9))
    stub = frontend_pb2_grpc.FrontendServiceStub(bench.channel)
    return (await stub.GetDemand(frontend_pb2.GetDemandRequest(wait=wait))).held


async def held(bench, number):
    """Waits until that many requests wait."""
    async with asyncio.timeout(60):
        while await demand(bench) != number:
            await asyncio.sleep(0.01)


async def add_worker(bench):
    bench.workers.append(FakeWorker("w-0"))
    await bench.workers[0].start()
    await bench.publish()


async def test_requests_wait_for_the_first_replica_and_are_answered_by_it(bench):
    running = await bench(workers=0, hold_s=60)
    waiting = [asyncio.create_task(running.text(f"count {n}")) for n in (1, 2, 3)]
    await held(running, 3)
    await add_worker(running)
    assert all(text.startswith("w-0:") for text in await asyncio.gather(*waiting))
    assert (await demand(running), running.workers[0].requests) == (0, 3)


async def test_the_operator_hears_of_a_first_request_at_once(bench):
    running = await bench(workers=0, hold_s=60)
    asked = asyncio.create_task(demand(running, wait_s=60))
    request = running.generate("count 1")
    reading = asyncio.create_task(request.read())
    started = time.monotonic()
    assert await asked == 1
    assert time.monotonic() - started < 30
    reading.cancel()


async def test_without_a_request_the_answer_comes_after_the_wait(bench):
    running = await bench(workers=0, hold_s=60)
    started = time.monotonic()
    assert await demand(running, wait_s=0.3) == 0
    assert time.monotonic() - started >= 0.3


def test_a_frontend_with_workers_by_address_sends_nobody_to_a_command_for_deployments():
    message = failures.nobody(holding.NO_DEPLOYMENT).status.message
    assert message == "this frontend has no ready replica; see why in the logs of its workers"


async def test_after_the_limit_the_client_is_told_what_happened_and_when_to_come_back(bench):
    running = await bench(workers=0, hold_s=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.text("count 1")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == (
        "demo has no ready replica: none became ready within 0.2 s; see why with `moe status demo`"
    )
    assert rich_status.retry_delay(rich_status.from_error(caught.value)) == holding.RETRY_AFTER_S
    assert await demand(running) == 0


async def test_a_client_that_goes_away_waits_no_more(bench):
    running = await bench(workers=0, hold_s=60)
    call = running.generate("count 1")
    reading = asyncio.create_task(call.read())
    await held(running, 1)
    call.cancel()
    await held(running, 0)
    reading.cancel()


async def test_the_number_of_requests_that_wait_has_a_limit(bench, monkeypatch):
    monkeypatch.setattr(holding, "HELD_MOST", 2)
    running = await bench(workers=0, hold_s=60)
    waiting = [asyncio.create_task(running.text("count 1")) for _ in range(2)]
    await held(running, 2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.text("count 1")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await add_worker(running)
    await asyncio.gather(*waiting)


async def test_a_wait_without_a_hold_has_the_same_limits(bench, monkeypatch):
    running = await bench(workers=0, patience_s=60)
    monkeypatch.setattr(holding, "HELD_BYTES_MOST", 3_000)
    waiting = asyncio.create_task(running.text("count 1" + " " * 2_000))
    await held(running, 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.text("count 1" + " " * 2_000, timeout=30)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await add_worker(running)
    assert await waiting == "w-0:0 "
    assert running.hold._bytes == 0


async def test_a_revision_that_no_ready_replica_has_is_refused_at_once(bench):
    running = await bench(workers=1, patience_s=60)
    request = inference_pb2.GenerateRequest(prompt="count 1", resume=inference_pb2.Resume(revision="gone"))
    with pytest.raises(grpc.aio.AioRpcError, match="no ready replica of demo has this revision") as caught:
        await running.stub.Generate(request, timeout=30).read()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert running.workers[0].requests == 0


async def test_so_have_their_bytes(bench, monkeypatch):
    monkeypatch.setattr(holding, "HELD_BYTES_MOST", 3_000)
    running = await bench(workers=0, hold_s=60)
    waiting = asyncio.create_task(running.text("count 1" + " " * 2_000))
    await held(running, 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.text("count 1" + " " * 2_000)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await add_worker(running)
    await waiting
    assert running.hold._bytes == 0


async def test_a_frontend_that_does_not_hold_fails_at_once(bench):
    running = await bench(workers=0)
    with pytest.raises(grpc.aio.AioRpcError, match="demo has no ready replica"):
        await running.text("count 1")


async def test_asking_for_the_model_starts_nothing(bench):
    running = await bench(workers=0, hold_s=60)
    with pytest.raises(grpc.aio.AioRpcError, match="demo has no ready replica"):
        await running.stub.GetModel(inference_pb2.GetModelRequest())


async def test_a_wait_that_makes_no_sense_is_refused(bench):
    running = await bench(workers=0, hold_s=60)
    for wait_s in (-1.0, 61.0):
        with pytest.raises(grpc.aio.AioRpcError, match="use 0 to 60 s"):
            await demand(running, wait_s=wait_s)


@pytest.mark.parametrize(("from_zero", "answer"), [(False, "NOT_SERVING"), (True, "SERVING")])
async def test_without_a_replica_only_a_frontend_for_which_one_is_made_is_ready(bench, from_zero, answer):
    running = await bench(workers=0, hold_s=60, from_zero=from_zero)
    stub = health_pb2_grpc.HealthStub(running.channel)
    status = (await stub.Check(health_pb2.HealthCheckRequest())).status
    assert health_pb2.HealthCheckResponse.ServingStatus.Name(status) == answer


async def test_where_the_only_replica_went_for_good_the_client_is_told_where_to_look(bench):
    running = await bench(workers=1, patience_s=1.0)
    call = asyncio.create_task(running.text("silent", timeout=30))
    await running.workers[0].until(lambda worker: worker.running == 1)
    gone, running.workers = running.workers[0], []
    await running.publish()
    await gone.server.stop(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.details() == "demo has no ready replica; see why with `moe status demo`"
