"""The loops that scale deployments: nothing that happens to one of them ends it unseen."""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from moe_api.supervision import Supervisor
from moe_operator.autoscaling import scaling_history
from moe_operator.autoscaling.loop import Autoscaler
from moe_operator.autoscaling.metrics import ScalingMetrics
from moe_operator.autoscaling.model.capacity import Capacity
from moe_operator.autoscaling.model.history import History
from moe_operator.autoscaling.model.horizon import ColdStarts
from moe_operator.autoscaling.polling import Poller
from moe_operator.autoscaling.rounds import ScaledFactory
from moe_operator.autoscaling.scaler import Memory, Scaler
from moe_operator.autoscaling.subject import subject
from moe_operator.errors import ClusterUnavailableError, ReadForbiddenError
from moe_operator.observed.observation import Observed, observe
from moe_operator.resources import names
from moe_operator.resources.deployment import Name
from moe_operator.resources.scaling_status import ScalingStatus
from moe_operator.resources.status import Status
from moe_operator.rpc.pods import PodClient
from moe_operator.settings import Settings
from tests.operator.autoscaling.test_metrics import collected
from tests.operator.autoscaling.test_polling import Front
from tests.operator.worlds import deployment

OWNER = deployment().identity
DOCS = Name("default", "docs")
QUICK = Settings(retry_first_seconds=0.01, retry_most_seconds=0.02, recheck_seconds=0.01, sample_seconds=0.05)


def quiet():
    """A memory of half an hour without a request."""
    history, now = History(), int(time.time() / 60)
    for minute in range(now - 30, now):
        history.add(minute, 0.0)
    return Memory(history, ColdStarts(), frozenset(), Capacity.from_prior(60.0))


class Store:
    """Plays the API server: keeps what scaling writes into the status."""

    def __init__(self):
        self.wanted = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.trouble = []
        self.kept = scaling_history.manifest(OWNER, quiet(), ())
        self.histories = []
        """Names of the ScalingHistories that were written."""
        self.reads = 0

    def get(self, kind, namespace, name):
        self.reads += 1
        if self.trouble:
            raise self.trouble.pop(0)
        return self.kept

    def apply(self, manifest, subresource="", manager=""):
        if manifest["kind"] == names.HISTORY_KIND:
            self.histories.append(manifest["metadata"]["name"])
        wanted = manifest.get("status", {}).get("scaling", {}).get("desiredReplicas")
        self.loop.call_soon_threadsafe(self.wanted.put_nowait, wanted)

    def create(self, manifest):
        pass

    async def becomes(self, replicas):
        async with asyncio.timeout(60):
            while await self.wanted.get() != replicas:
                pass


class Site:
    """An autoscaler, and what it works with. settings: other than those of QUICK."""

    def __init__(self, **settings):
        self.reader = InMemoryMetricReader()
        self.store = Store()
        provider = MeterProvider([self.reader])
        self.supervisor = Supervisor(provider.get_meter("test"))
        self.acting = True
        self.threads = ThreadPoolExecutor(2)
        self.client = PodClient(1.0)
        self.factory = ScaledFactory(
            self.store,
            self.client,
            Poller(self.client, 1.0),
            replace(QUICK, **settings),
            threads=self.threads,
            laboratory=self.threads,
            decided=lambda name: None,
            metrics=ScalingMetrics(provider.get_meter("test")),
            tracer=trace.get_tracer("test"),
            supervisor=self.supervisor,
        )

        async def acts():
            if isinstance(self.acting, Exception):
                raise self.acting
            return self.acting

        self.autoscaler = Autoscaler(self.factory, acts)

    def failures(self):
        return {state.loop: state.failures for state in self.supervisor.states}

    async def until(self, wanted):
        async with asyncio.timeout(60):
            while not wanted():
                await asyncio.sleep(0.01)

    async def aclose(self):
        await self.autoscaler.close()
        await self.supervisor.close()
        await self.client.close()
        self.threads.shutdown()


@pytest.fixture
async def site():
    async with contextlib.aclosing(Site()) as made:
        yield made


def asleep(**scaling):
    """A deployment that was scaled to zero."""
    wanted = {"maxReplicas": 4, "minReplicas": 0, **scaling}
    return replace(deployment(scaling=wanted), status=Status(scaling=ScalingStatus(desired_replicas=0)))


def frontends(*addresses):
    role = {"serving.moe-operator.dev/role": "frontend"}
    return observe(
        pods_there=(
            {"metadata": {"name": f"docs-frontend-{address}", "labels": role}, "status": {"podIP": address}}
            for address in addresses
        )
    )


async def test_a_rollout_of_the_frontend_at_zero_replicas_strands_nobody(world):
    """The call that waits for a first request ends when its frontend's connection is closed."""
    old_front = Front(0)
    old, new = await world(old_front, Front(2))
    async with contextlib.aclosing(Site(sample_seconds=1)) as site:
        site.autoscaler.saw(asleep(), frontends(old))
        await site.store.becomes(0)
        async with asyncio.timeout(60):
            await old_front.waited_for.wait()
        site.autoscaler.saw(asleep(), frontends(new))
        await site.store.becomes(1)
        assert site.failures()["scaling"] == 0


async def test_scaling_goes_on_after_errors_and_after_a_cancellation_that_was_not_its_own(site, world):
    (front,) = await world(Front(0))
    site.store.trouble = [ClusterUnavailableError("away"), KeyError("a bug"), asyncio.CancelledError()]
    site.autoscaler.saw(asleep(), frontends(front))
    await site.store.becomes(0)
    assert site.store.trouble == []


@pytest.mark.parametrize("remedy", ["deleted", "corrected"])
async def test_a_damaged_history_is_not_used_and_not_replaced(world, remedy):
    """It may be of a later version of the operator, or a slip of somebody who edited it."""
    (front,) = await world(Front(0))
    async with contextlib.aclosing(Site(history_seconds=0.05)) as site:
        sound, messages = site.store.kept, []
        apply = site.store.apply

        def noted(manifest, *more, **options):
            messages.extend(c["message"] for c in manifest.get("status", {}).get("conditions", ()))
            apply(manifest, *more, **options)

        site.store.apply = noted
        site.store.kept = sound | {"rates": "damaged"}
        site.autoscaler.saw(asleep(), frontends(front))
        await site.store.becomes(1)  # nothing is known, so it is seen whether somebody comes
        assert "ScalingHistory docs is invalid: rates: " in messages[-1]
        assert "; correct or delete it" in messages[-1]
        reads = site.store.reads
        await site.until(lambda: site.store.reads > reads + 6)
        assert site.store.histories == []
        site.store.kept = None if remedy == "deleted" else sound
        await site.until(lambda: site.store.histories)
        whole, recent = "docs", names.recent_history("docs")
        assert site.store.histories[0] == (whole if remedy == "deleted" else recent)


async def test_a_corrected_history_is_not_replaced_by_a_stop_before_it_is_used(site):
    sound, seen = site.store.kept, subject(asleep(), Observed())
    site.store.kept = sound | {"rates": "damaged"}
    scaled = await site.factory.load(seen)
    site.store.kept = sound
    for _ in range(2):  # the next round, and the stop
        await scaled.keep(seen)
    assert scaled.outdated
    assert site.store.histories == []


async def test_the_condition_speaks_of_an_edited_spec_at_once(site, world, monkeypatch):
    (front,) = await world(Front(0))
    written, rounds, step = [], [], Scaler.step

    def apply(manifest, subresource="", manager=""):
        written.extend(c["observedGeneration"] for c in manifest.get("status", {}).get("conditions", ()))

    def counted(*arguments):
        rounds.append(1)
        return step(*arguments)

    monkeypatch.setattr("moe_operator.autoscaling.scaler.Scaler.step", counted)
    site.store.apply = apply
    site.autoscaler.saw(asleep(), frontends(front))
    await site.until(lambda: len(rounds) > 5)
    assert set(written) == {1}
    site.autoscaler.saw(replace(asleep(), identity=replace(OWNER, generation=2)), frontends(front))
    first = len(rounds)
    await site.until(lambda: len(rounds) > first + 3)
    assert written[-1] == 2


async def test_a_history_that_may_not_be_read_is_read_later_and_never_replaced(world):
    (front,) = await world(Front(0))
    async with contextlib.aclosing(Site(history_seconds=0.05)) as site:
        site.store.trouble = [ReadForbiddenError("reading it is forbidden")] * 4
        site.autoscaler.saw(asleep(), frontends(front))
        await site.until(lambda: site.store.histories)
        assert site.store.trouble == []
        assert set(site.store.histories) == {names.recent_history("docs")}, "the stored one continues"


async def test_it_stops_while_the_api_server_does_not_respond(site, world, caplog):
    (front,) = await world(Front(0))
    site.autoscaler.saw(asleep(), frontends(front))
    await site.store.becomes(0)
    site.acting = ClusterUnavailableError("it does not respond")
    await site.autoscaler.close()
    assert "the scaling histories of 1 deployments are not stored: it does not respond" in caplog.text


async def test_the_gauges_go_with_the_deployment(site, world):
    (front,) = await world(Front(0))
    site.autoscaler.saw(asleep(), frontends(front))
    await site.until(lambda: collected(site.reader).get("replicas"))
    site.autoscaler.gone(DOCS)
    await site.until(lambda: not collected(site.reader).get("replicas"))
    assert "scaling" not in site.failures()


async def test_the_gauges_go_where_another_process_acts(site, world):
    (front,) = await world(Front(2))
    site.autoscaler.saw(asleep(), frontends(front))
    await site.until(lambda: collected(site.reader).get("replicas"))
    site.acting = False
    await site.until(lambda: not collected(site.reader).get("replicas"))
    assert "scaling" in site.failures()


async def test_learning_that_fails_is_tried_again(site, world, monkeypatch):
    (front,) = await world(Front(0))
    tries = []

    def upkeep(self):
        tries.append(1)
        if len(tries) < 3:
            raise ValueError

    monkeypatch.setattr("moe_operator.autoscaling.scaler.Scaler.upkeep", upkeep)
    site.autoscaler.saw(asleep(), frontends(front))
    await site.until(lambda: len(tries) >= 3)
    assert site.failures()["scaling"] == 0


async def test_what_is_taken_out_of_the_status_is_tried_until_it_is_done(site):
    off = replace(deployment(replicas=1), status=Status(scaling=ScalingStatus(desired_replicas=3)))
    calls = []

    def apply(manifest, subresource="", manager=""):
        calls.append(manifest["status"])
        if len(calls) == 1:
            raise ClusterUnavailableError("away")

    site.store.apply = apply
    site.autoscaler.saw(off, Observed())
    await site.until(lambda: len(calls) == 2)
    assert calls[1] == {}
