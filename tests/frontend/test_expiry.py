"""Metrics tell when the certificates expire that a process uses now."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from moe_api import expiry, mounted, mutual, tls
from moe_api.supervision import Supervisor
from moe_frontend import edges
from moe_frontend.edges import Guards
from moe_operator.certificates.issuing import LIFE, issue, new_authority
from moe_operator.executor.certificates import files
from moe_worker.service import listening
from tests.pki import Authority, mount

NOW = datetime.now(UTC).replace(microsecond=0)


class Exported:
    """A meter, and what it exports."""

    def __init__(self):
        self._reader = InMemoryMetricReader()
        self.meter = MeterProvider([self._reader]).get_meter("test")

    def ends(self):
        """When each use's certificate expires."""
        (scope,) = self._reader.get_metrics_data().resource_metrics[0].scope_metrics
        return {
            point.attributes[expiry.USE]: datetime.fromtimestamp(point.value, UTC)
            for metric in scope.metrics
            for point in metric.data.data_points
            if metric.name == "moe.certificate.not_after.timestamp"
        }


@pytest.fixture
async def supervisor(monkeypatch):
    monkeypatch.setattr(mounted, "INTERVAL_S", 0.02)
    made = Supervisor()
    yield made
    await made.close()


def internal(component, at):
    """The files of a component whose certificate is issued at that time."""
    authority = new_authority("prod", at)
    return files(issue(authority, component, authority.certificate, at))


async def renewed(exported, use, end):
    async with asyncio.timeout(10):
        while exported.ends()[use] != end:
            await asyncio.sleep(0.02)


async def test_a_frontend_exports_both_and_follows_a_renewal(tmp_path, supervisor):
    client = Authority().pair()
    mount(tmp_path / "client", client)
    mount(tmp_path / "internal", internal(mutual.FRONTEND, NOW))
    exported = Exported()
    guards = Guards(tls=tmp_path / "client", internal_tls=tmp_path / "internal")
    edges.edge_of(guards, supervisor).measure(exported.meter)
    _, end = expiry.life(tls.parse(client))
    assert exported.ends() == {"client": end, "internal": NOW + LIFE}
    mount(tmp_path / "internal", internal(mutual.FRONTEND, NOW + timedelta(days=60)))
    await renewed(exported, "internal", NOW + timedelta(days=60) + LIFE)


async def test_a_worker_exports_its_own_and_follows_a_renewal(tmp_path, supervisor):
    mount(tmp_path, internal(mutual.WORKER, NOW))
    exported = Exported()
    listening.credentials(tmp_path, supervisor, exported.meter)
    assert exported.ends() == {"internal": NOW + LIFE}
    mount(tmp_path, internal(mutual.WORKER, NOW + timedelta(days=60)))
    await renewed(exported, "internal", NOW + timedelta(days=60) + LIFE)


def test_the_certificate_of_a_chain_that_expires_first_counts():
    first, second = (new_authority("prod", NOW - timedelta(days=day)) for day in (700, 0))
    leaf = issue(second, mutual.WORKER, b"", NOW)
    chain = tls.KeyPair(leaf.certificate + first.certificate, leaf.key)
    assert expiry.life(chain) == (
        first.parsed.not_valid_before_utc,
        first.parsed.not_valid_after_utc,
    )
