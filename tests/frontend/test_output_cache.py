"""The output cache in a running frontend: real gRPC, a worker that counts what reaches it."""

import asyncio
import math

import grpc
import pytest

from moe_api.inference.v1 import inference_pb2
from moe_frontend.outputs.cache import RESULT, SAVED_SECONDS, SAVED_TOKENS
from moe_frontend.outputs.flight import _AHEAD_MOST
from moe_operator.resources import cache_sums

MEMORY = 1 << 20


def request(prompt, resume=None, **sampling):
    return inference_pb2.GenerateRequest(
        prompt=prompt, sampling=inference_pb2.SamplingParameters(**sampling), resume=resume
    )


async def answer(bench, asked, **options):
    return [response async for response in bench.stub.Generate(asked, **options)]


def text(responses):
    return "".join(response.text for response in responses)


def results(bench):
    return [span.attributes[RESULT] for span in bench.spans.get_finished_spans() if RESULT in span.attributes]


@pytest.fixture
async def cached(bench):
    return await bench(workers=1, output_cache=MEMORY, revision="r1")


async def test_a_repeat_costs_no_worker_and_says_so(cached):
    first = await answer(cached, request("count 3", temperature=0))
    again = await answer(cached, request("count 3", temperature=0))
    assert cached.workers[0].requests == 1
    assert len(again) == 1
    assert text(again) == text(first) == "w-0:0 w-0:1 w-0:2 "
    assert list(again[0].tokens) == [0, 1, 2]
    assert (again[0].finish_reason, again[0].usage.completion_tokens) == (first[-1].finish_reason, 3)
    assert again[0].usage.cached
    assert not first[-1].usage.cached
    assert results(cached) == ["miss", "hit"]


def savings(bench):
    """Saved tokens and seconds of each request that needed no worker, from its span."""
    spans = (span.attributes for span in bench.spans.get_finished_spans())
    return [(found[SAVED_TOKENS], found[SAVED_SECONDS]) for found in spans if SAVED_TOKENS in found]


async def test_workers_without_a_revision_are_named_once_as_the_reason_why_nothing_is_kept(bench, caplog):
    without = await bench(workers=1, output_cache=MEMORY)
    for _ in range(2):
        await answer(without, request("count 3", temperature=0))
        await without.publish()
    assert without.workers[0].requests == 2
    said = [record.message for record in caplog.records if "output cache" in record.message]
    assert len(said) == 1
    assert said[0].endswith("start all workers with --revision NAME")


async def test_each_answer_without_a_worker_says_what_it_saved(cached):
    """9 prompt tokens, of which a prefix cache held 4, and 3 of text: a worker computed 8."""
    await answer(cached, request("scored"))
    await answer(cached, request("scored"))
    assert [tokens for tokens, _ in savings(cached)] == [8]
    assert cached.outputs.measures.saved_tokens == {"anonymous": 8}
    assert (cached.forwarder.prompts.tokens, cached.forwarder.prompts.cached) == (9, 4)


async def followed(cached, followers):
    """Waits until so many requests follow the one computation."""
    async with asyncio.timeout(60):
        while not cached.outputs._flights:
            await asyncio.sleep(0.01)
        (flight, _) = next(iter(cached.outputs._flights.values()))
        while len(flight._positions) < followers:
            await asyncio.sleep(0.01)


async def test_a_shared_computation_saves_its_time_once_for_each_further_reader(cached):
    asked = request("count 5 0.05")
    cached.workers[0].most = 1
    asking = [asyncio.create_task(answer(cached, asked)) for _ in range(3)]
    await followed(cached, 3)
    await cached.workers[0].allow(math.inf)
    await asyncio.gather(*asking)
    assert cached.outputs.measures.results() == {"miss": 1, "shared": 2}
    assert [tokens for tokens, _ in savings(cached)] == [3 + 5] * 2  # words of the prompt, and tokens
    assert all(seconds >= 0.25 for _, seconds in savings(cached))
    resume = inference_pb2.Resume(tokens=[0, 1, 2], revision="r1")
    await answer(cached, request("count 5 0.05", resume=resume))
    tokens, seconds = savings(cached)[-1]
    assert tokens == 3 + 2
    assert seconds == pytest.approx(2 / 5 * savings(cached)[0][1])


async def test_the_sums_are_those_that_a_status_shows(cached):
    for _ in range(2):
        await answer(cached, request("count 2"))
    sums = cached.outputs.measures.sums()
    assert set(sums) == set(cache_sums.OUTPUTS)
    assert (sums["outputHits"], sums["outputMisses"], sums["savedTokens"]) == (1, 1, 3 + 2)
    assert sums["outputBytes"] == cached.store.bytes > 0


@pytest.mark.parametrize(
    ("first", "second", "requests"),
    [
        ({"temperature": 0}, {"temperature": 0, "max_tokens": 9}, 2),
        ({"temperature": 1, "seed": 1}, {"temperature": 1, "seed": 2}, 2),
        ({"temperature": 1, "seed": 1}, {"temperature": 1, "seed": 1}, 1),
        ({"temperature": 1}, {"temperature": 1}, 2),
        ({}, {}, 1),
    ],
)
async def test_only_equal_determined_requests_share_an_answer(cached, first, second, requests):
    await answer(cached, request("count 2", **first))
    await answer(cached, request("count 2", **second))
    assert cached.workers[0].requests == requests


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([("authorization", "Bearer a")], [("authorization", "Bearer b")]),
        ([("authorization", "Bearer a")], []),
        ([("x-cache-salt", "a")], [("x-cache-salt", "b")]),
        ([], [("cache-control", "no-store")]),
    ],
)
async def test_other_tenants_and_those_who_opt_out_get_an_answer_of_their_own(cached, first, second):
    await answer(cached, request("count 2"), metadata=first)
    responses = await answer(cached, request("count 2"), metadata=second)
    assert cached.workers[0].requests == 2
    assert not any(response.usage.cached for response in responses)


async def test_equal_requests_under_way_are_computed_once(cached):
    """The first one's cancellation does not cut the others off."""
    asked = request("count 6")
    cached.workers[0].most = 1
    first = cached.stub.Generate(asked)
    await first.read()
    second = asyncio.create_task(answer(cached, asked))
    third = asyncio.create_task(answer(cached, asked))
    await followed(cached, 3)
    async with asyncio.timeout(60):
        first.cancel()
        await cached.workers[0].allow(math.inf)
        whole = "".join(f"w-0:{i} " for i in range(6))
        assert text(await second) == text(await third) == whole
    assert cached.workers[0].requests == 1
    assert cached.workers[0].cancelled == 0
    assert (await answer(cached, asked))[0].usage.cached


async def test_a_computation_that_nobody_follows_is_stopped(cached):
    call = cached.stub.Generate(request("hold"))
    await call.read()
    call.cancel()
    await cached.workers[0].until(lambda worker: worker.cancelled == 1)
    assert not cached.outputs._flights
    assert len(cached.store) == 0


async def test_errors_reach_all_who_wait_and_are_not_stored(cached):
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(cached, request("bad"))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert cached.workers[0].requests == 2
    assert len(cached.store) == 0


async def test_a_stream_that_goes_on_gets_the_suffix(cached):
    await answer(cached, request("count 4"))
    resume = inference_pb2.Resume(tokens=[0, 1], revision="r1")
    (rest,) = await answer(cached, request("count 4", resume=resume))
    assert (rest.text, list(rest.tokens), rest.resumed) == ("w-0:2 w-0:3 ", [2, 3], 2)
    assert cached.workers[0].requests == 1
    other = inference_pb2.Resume(tokens=[0, 7], revision="r1")
    assert text(await answer(cached, request("count 4", resume=other))) == "w-0:2 w-0:3 "
    assert cached.workers[0].requests == 2


async def test_a_rollout_drops_the_answers_of_the_old_revision(cached):
    await answer(cached, request("count 2"))
    assert len(cached.store) == 1
    old = cached.workers[0]
    await cached.add_process("new", "r2")
    # While both revisions are served, either may answer, and nothing comes from the cache.
    await answer(cached, request("count 2"))
    cached.workers.clear()
    await cached.publish()
    assert len(cached.store) == 0
    assert cached.store.evictions == {("anonymous", "revision"): 1}
    assert text(await answer(cached, request("count 2"))) == "new:0 new:1 "
    assert (await answer(cached, request("count 2")))[0].usage.cached
    await old.server.stop(None)


async def test_a_client_that_reads_nothing_holds_up_nobody_but_itself(cached):
    """Neither those who follow the computation that it started, nor the computation."""
    asked = request("flood 200")  # 12.5 MiB, far more than its window
    stalled = cached.stub.Generate(asked)
    await stalled.read()
    async with asyncio.timeout(60):
        await followed(cached, 1)
        ((flight, _),) = cached.outputs._flights.values()
        while len(flight.messages) - max(flight._positions.values()) <= _AHEAD_MOST:
            await asyncio.sleep(0.01)
        answers = await asyncio.gather(answer(cached, asked), answer(cached, asked))
    assert [len(text(responses)) for responses in answers] == [200 * 65536] * 2
    assert cached.workers[0].requests == 1
    assert not cached.outputs._flights
    stalled.cancel()
