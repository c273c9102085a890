"""Forecasters learn from what they see as it comes, but fit no models: that takes a second each time."""

import contextlib
import secrets
from collections.abc import Iterator

import grpc
import pytest

from moe_api.frontend.v1 import frontend_pb2_grpc
from moe_api.worker.v1 import worker_pb2_grpc
from moe_operator.autoscaling.model.forecast.forecaster import Forecaster
from moe_operator.resources import names


@pytest.fixture(scope="module", autouse=True)
def _no_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forecaster, "refit_due", property(lambda _: False))
        yield


@pytest.fixture
async def world():
    """`await world(servicer, ...)` gives the loopback address of each, all listening where workers do."""
    net = ".".join(str(1 + secrets.randbelow(250)) for _ in range(2))
    async with contextlib.AsyncExitStack() as stack:

        async def start(*servicers):
            addresses = []
            for number, servicer in enumerate(servicers, 1):
                server = grpc.aio.server()
                if isinstance(servicer, worker_pb2_grpc.WorkerServiceServicer):
                    worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
                else:
                    frontend_pb2_grpc.add_FrontendServiceServicer_to_server(servicer, server)
                addresses.append(f"127.{net}.{number}")
                server.add_insecure_port(f"{addresses[-1]}:{names.GRPC_PORT}")
                await server.start()
                stack.push_async_callback(server.stop, None)
            return addresses

        yield start
