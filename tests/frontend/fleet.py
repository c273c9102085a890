"""Two workers whose WorkerService a test says, and the replicas of one frontend that knows them."""

import asyncio

from moe_api.supervision import Supervisor
from moe_frontend.transport.replicas import Replicas
from tests.frontend.fake_worker import FakeWorker


class Fleet:
    """The workers w-0 and w-1 with these services."""

    def __init__(self, services, policy=None):
        self.services = services
        self.workers = [FakeWorker("w-0"), FakeWorker("w-1")]
        self.replicas = Replicas(policy=policy)
        self.supervisor = Supervisor()

    async def start(self):
        for worker, service in zip(self.workers, self.services, strict=True):
            await worker.start(leaving=service)
        self.publish(*self.workers)

    def publish(self, *workers):
        self.replicas.update(frozenset(worker.endpoint for worker in workers))

    async def until(self, condition):
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)

    async def close(self):
        await self.supervisor.close()
        await self.replicas.close()
        for worker in self.workers:
            await worker.server.stop(None)
