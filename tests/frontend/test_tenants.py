"""Tenants of a frontend with API keys: limits, priorities, slots, and what workers and caches are told."""

import asyncio
import dataclasses
import hashlib
import json

import grpc
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from moe_api import rich_status
from moe_api.inference.v1 import inference_pb2
from moe_frontend.edges import Guards
from moe_frontend.outputs.answer import Saving
from moe_frontend.outputs.measures import CacheMeasures
from moe_frontend.outputs.store import Store
from moe_frontend.policy.salt import prefix_salt, salt_of
from moe_frontend.transport.prompts import Prompts
from tests.frontend.http.conftest import http  # noqa: F401 - a fixture

KEYS = {tenant: f"the key of tenant {tenant}, long enough" for tenant in ("crowd", "guest")}


@pytest.fixture
def guards(tmp_path):
    for tenant, key in KEYS.items():
        (tmp_path / tenant).write_text(f"sha256:{hashlib.sha256(key.encode()).hexdigest()}\n")
    return Guards(api_keys=tmp_path)


def by(tenant):
    return [("authorization", f"Bearer {KEYS[tenant]}")]


def config(default=None, **tenants):
    named = [{"name": name, **limits} for name, limits in tenants.items()]
    return json.dumps({"tenants": named, "defaultTenant": default or {}})


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


async def test_a_limit_is_told_with_the_time_to_wait_and_others_are_served(bench, guards):
    b = await bench(workers=1, guards=guards, tenants=config(crowd={"requestsPerMinute": 2}))
    for _ in range(2):
        await b.text("count 1", metadata=by("crowd"))
    error = await refusal(b.text("count 1", metadata=by("crowd")))
    status = rich_status.from_error(error)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "tenant 'crowd' has reached its limit of 2 requests per minute; send the request again in" in (
        error.details()
    )
    assert rich_status.reason(status) == rich_status.TENANT_LIMIT
    assert 20 < rich_status.retry_delay(status) <= 30
    await b.text("count 1", metadata=by("guest"))
    assert b.workers[0].requests == 3


async def test_over_http_it_is_429_with_retry_after(http, guards):  # noqa: F811
    h = await http(workers=1, guards=guards, tenants=config({"tokensPerMinute": 100}))
    headers = dict(by("guest"))
    first = await h.client.post(
        "/v1/completions", json={"prompt": "count 1", "max_tokens": 300}, headers=headers
    )
    silent = asyncio.create_task(
        h.client.post("/v1/completions", json={"prompt": "silent", "max_tokens": 300}, headers=headers)
    )
    await h.bench.workers[0].until(lambda worker: worker.running == 1)
    answer = await h.client.post("/v1/completions", json={"prompt": "count 1"}, headers=headers)
    silent.cancel()
    assert first.status_code == 200  # it used few tokens of the many that it might have
    assert answer.status_code == 429
    assert 100 < int(answer.headers["retry-after"]) < 130
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "tenant 'guest' has reached its limit of 100 tokens per minute" in error["message"]


async def test_requests_in_progress_are_limited_until_one_ends(bench, guards):
    b = await bench(workers=1, guards=guards, tenants=config(crowd={"concurrency": 1}))
    held = b.generate("hold", metadata=by("crowd"))
    await held.read()
    error = await refusal(b.text("count 1", metadata=by("crowd")))
    assert "tenant 'crowd' has 1 requests in progress, its limit" in error.details()
    held.cancel()
    await b.workers[0].until(lambda worker: worker.running == 0)
    async with asyncio.timeout(60):
        while True:
            try:
                await b.text("count 1", metadata=by("crowd"))
                return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.01)


async def test_nobody_raises_itself_above_its_class(bench, guards):
    b = await bench(workers=1, guards=guards, tenants=config(crowd={"weight": 5, "priority": 3}))

    async def ask(tenant, **fields):
        call = b.stub.Generate(inference_pb2.GenerateRequest(prompt="count 1", **fields), metadata=by(tenant))
        return [part async for part in call]

    for given, told in (({}, "3"), ({"priority": 0}, None), ({"priority": 2}, "2")):
        await ask("crowd", **given)
        assert b.workers[0].metadata[-1].get("x-moe-priority") == told
        assert b.workers[0].metadata[-1]["x-moe-weight"] == "5"
    error = await refusal(ask("crowd", priority=4))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "priority: is 4; your tenant may use 0 to 3"
    assert "is 1; your tenant may use 0 only" in (await refusal(ask("guest", priority=1))).details()


async def test_over_http_a_priority_is_checked_too(http, guards):  # noqa: F811
    h = await http(workers=1, guards=guards, tenants=config(crowd={"priority": 3}))
    body = {"prompt": "count 1", "priority": 3}
    assert (await h.client.post("/v1/completions", json=body, headers=dict(by("crowd")))).status_code == 200
    answer = await h.client.post("/v1/completions", json=body, headers=dict(by("guest")))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")


async def test_one_tenant_leaves_slots_for_others_and_its_rest_waits(bench, guards):
    b = await bench(workers=1, guards=guards)
    b.replicas.update(frozenset({dataclasses.replace(b.workers[0].endpoint, max_requests=14)}))
    crowd = [b.generate("hold", metadata=by("crowd")) for _ in range(30)]
    await b.workers[0].until(lambda worker: worker.running == 12)
    assert await b.text("count 2", metadata=by("guest"))
    assert b.workers[0].running == 12
    assert b.forwarder._turns.waiting == 18
    for call in crowd[:20]:
        call.cancel()
    await b.workers[0].until(lambda worker: worker.running == 10)
    assert b.forwarder._turns.waiting == 0
    for call in crowd:
        call.cancel()
    await b.workers[0].until(lambda worker: worker.running == 0)


async def test_who_waits_too_long_is_told_and_more_slots_help_at_once(bench, guards):
    b = await bench(workers=1, guards=guards, patience_s=0.2)
    endpoint = b.workers[0].endpoint
    b.replicas.update(frozenset({dataclasses.replace(endpoint, max_requests=1)}))
    held = b.generate("hold", metadata=by("crowd"))
    await held.read()
    error = await refusal(b.text("count 1", metadata=by("guest")))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "a request of tenant 'guest' waited 0.2 s for a replica; send it again later" in error.details()
    waiting = asyncio.create_task(b.text("count 1", metadata=by("guest")))
    async with asyncio.timeout(60):
        while not b.forwarder._turns.waiting:
            await asyncio.sleep(0)
    b.replicas.update(frozenset({dataclasses.replace(endpoint, max_requests=10)}))
    assert await waiting
    held.cancel()


async def test_requests_without_a_tenant_do_not_wait_for_slots(bench):
    b = await bench(workers=1)
    b.replicas.update(frozenset({dataclasses.replace(b.workers[0].endpoint, max_requests=1)}))
    calls = [b.generate("hold") for _ in range(3)]
    await b.workers[0].until(lambda worker: worker.running == 3)
    for call in calls:
        call.cancel()


async def test_prefixes_of_tenants_have_different_salts_and_a_client_cannot_set_its_own(bench, guards):
    b = await bench(workers=1, guards=guards)
    for tenant in ("crowd", "guest", "crowd"):
        await b.text("count 1", metadata=[*by(tenant), ("x-moe-salt", "0"), ("x-moe-weight", "9")])
    salts = [told["x-moe-salt"] for told in b.workers[0].metadata]
    assert salts[0] == salts[2] != salts[1]
    assert "0" not in salts
    assert not any("x-moe-weight" in told for told in b.workers[0].metadata)
    assert not any(KEYS["crowd"] in str(told) for told in b.workers[0].metadata)


def test_salts_go_by_tenant_else_by_credentials_and_by_what_the_client_adds():
    key, other, own = ("authorization", "k"), ("authorization", "l"), ("x-cache-salt", "s")
    assert salt_of([key], "a") == salt_of([other], "a") != salt_of([key], "b")
    assert salt_of([key]) != salt_of([other])
    assert salt_of([key, own], "a") != salt_of([key], "a")
    assert prefix_salt([], "") == ""
    assert len(prefix_salt([own])) == 32
    assert prefix_salt([("authorization", "a")]) != prefix_salt([], "a")


class Callbacks:
    """A meter that keeps what exports call, in their threads."""

    def __init__(self):
        self.all = []

    def create_observable_counter(self, _, callbacks, *more):
        self.all += callbacks

    create_observable_up_down_counter = create_observable_counter


def test_a_tenant_may_come_while_its_metrics_are_exported():
    store, prompts, meter = Store(2**20, 60.0), Prompts(), Callbacks()
    measures = CacheMeasures(store)
    measures.export(meter)
    prompts.measure(meter)

    def request_of(tenant):
        prompts.count(tenant, inference_pb2.Usage(prompt_tokens=3))
        measures.lookups[tenant, "miss"] += 1
        measures.save(tenant, Saving(3, 1.0))
        store.sizes[tenant] += 1
        store.evictions[tenant, "capacity"] += 1

    request_of("a")
    exports = [iter(callback(None)) for callback in meter.all]
    first = [next(export).attributes["tenant"] for export in exports]
    request_of("b")
    for export in exports:
        first += [one.attributes["tenant"] for one in export]
    assert set(first) == {"a"}


async def test_what_caches_save_is_exported_by_class_of_tenant(bench, guards):
    """A tenant that the configuration does not name counts as "other": labels are few."""
    b = await bench(workers=1, guards=guards, tenants=config(crowd={}), output_cache=2**20, revision="r1")
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader]).get_meter("test")
    b.outputs.measures.export(meter)
    b.forwarder.prompts.measure(meter)
    for tenant in ("crowd", "crowd", "guest"):
        await b.text("scored", metadata=by(tenant))
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    found = {
        (metric.name.removeprefix("moe_frontend."), *point.attributes.values()): point.value
        for metric in scope.metrics
        for point in metric.data.data_points
    }
    assert found.pop(("output_cache.saved_time", "crowd")) > 0
    size = found.pop(("output_cache.size", "crowd"))
    assert found == {
        ("output_cache.lookups", "crowd", "miss"): 1,
        ("output_cache.lookups", "crowd", "hit"): 1,
        ("output_cache.lookups", "other", "miss"): 1,
        ("output_cache.saved_tokens", "crowd"): 8,
        ("output_cache.size", "other"): size,
        ("prefix_cache.tokens", "crowd", "hit"): 4,
        ("prefix_cache.tokens", "crowd", "miss"): 5,
        ("prefix_cache.tokens", "other", "hit"): 4,
        ("prefix_cache.tokens", "other", "miss"): 5,
    }
    b.outputs.serve(frozenset({"r2"}))
    assert b.store.evictions == {("crowd", "revision"): 1, ("other", "revision"): 1}
    assert b.store.sizes == {"crowd": 0, "other": 0}
